// Which instruction set to use, decided once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace cdrop::cpu {
namespace {

const SimdKernels& best() {
#ifdef CDROP_X86
  const char* cap = std::getenv("CDROP_CPU_CAPABILITY");
  const auto allowed = [cap](const char* name) {
    return cap == nullptr || std::strcmp(cap, name) == 0 ||
           (std::strcmp(cap, "avx512") == 0 && std::strcmp(name, "avx2") == 0);
  };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && allowed("avx512")) return kAvx512Kernels;
  if (avx2 && allowed("avx2")) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

}  // namespace

const SimdKernels& simd() {
  static const SimdKernels& chosen = best();
  return chosen;
}

const char* capability() { return simd().name; }

}  // namespace cdrop::cpu
