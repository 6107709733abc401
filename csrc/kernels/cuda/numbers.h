// Elements of the three dtypes as float32, eight at a time. For the device, and for the emulation
// of the kernels on the CPU.
#pragma once

#include "keys.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define CDROP_DEVICE __device__
#define CDROP_UNROLL _Pragma("unroll")
#define CDROP_ROLL _Pragma("unroll 1")
#else
#define CDROP_DEVICE
#define CDROP_UNROLL
#define CDROP_ROLL
#endif

namespace cdrop::cuda {

// Stored elements: the bits of a number, whose dtype the type tells.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

CDROP_BOTH inline float to_float(float v) { return v; }
CDROP_BOTH inline float to_float(BFloat16 v) {
  return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}
CDROP_BOTH inline float to_float(Half v) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(v.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // The exponent is moved by a multiplication, which makes denormals right too.
  const float value = bit_cast<float>(rest << 13) * bit_cast<float>(0x77800000u);  // 2^112
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}

CDROP_BOTH inline void from_float(float v, float* out) { *out = v; }
CDROP_BOTH inline void from_float(float v, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // to nearest even
}
CDROP_BOTH inline void from_float(float v, Half* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(v));
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x47800000u) {  // 65536 and more
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below the least normal half: rounded by an addition
    const float magic = 0.5f;       // its last bit is that of the least denormal half, 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(rest) + magic) - bit_cast<uint32_t>(magic);
  } else {  // rounding up may carry into the exponent, up to infinity: right as it is
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// Eight elements as they lie in memory, on a boundary of their size where that is known.
template <typename T>
struct alignas(16) Eight {
  T at[8];
};

template <typename T>
CDROP_BOTH inline Eight<T> load_wide(const T* at) {
  return *reinterpret_cast<const Eight<T>*>(at);
}

// Whether every row of a tensor begins on a boundary of 16 bytes.
template <typename T>
CDROP_BOTH inline bool sixteen_aligned(const void* data, const int64_t (&stride)[3]) {
  constexpr int64_t kPer = 16 / static_cast<int64_t>(sizeof(T));
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         (stride[0] | stride[1] | stride[2]) % kPer == 0;
}

}  // namespace cdrop::cuda
