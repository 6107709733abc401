// Which instruction set to use, decided once.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace cdrop::cpu {
namespace {

#ifdef CDROP_X86
// Position of CDROP_CPU_CAPABILITY in the order of the tables below, or past them when not set.
int allowed() {
  const char* cap = std::getenv("CDROP_CPU_CAPABILITY");
  if (cap == nullptr) return 3;
  const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(cap, names[i]) == 0) return i;
  }
  return 3;
}
#endif

const SimdKernels& best() {
#ifdef CDROP_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed() >= 3) return kAvx512Bf16Kernels;
  if (avx512 && allowed() >= 2) return kAvx512Kernels;
  if (avx2 && allowed() >= 1) return kAvx2Kernels;
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
