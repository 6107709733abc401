// A vector of floats as wide as the instruction set allows, through the compiler's vector
// extensions; only the half-precision conversions need intrinsics. Included by simd_kernels.cpp
// alone, inside its own namespace.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#define CDROP_INLINE_MEMBER inline __attribute__((always_inline))
#define CDROP_INLINE static CDROP_INLINE_MEMBER

// v - 0 is v to the bit, so nothing but the broadcast remains; 0 + v is not (-0).
CDROP_INLINE Vec splat(float v) { return v - Vec{}; }
CDROP_INLINE Vec as_float(VecI v) { return reinterpret_cast<Vec>(v); }
CDROP_INLINE VecI as_int(Vec v) { return reinterpret_cast<VecI>(v); }
CDROP_INLINE Vec choose(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
CDROP_INLINE VecI choose(VecI mask, VecI yes, VecI no) { return mask ? yes : no; }

CDROP_INLINE float to_float(float v) { return v; }
CDROP_INLINE float to_float(BFloat16 v) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(v.bits) << 16);
}
CDROP_INLINE float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  // Shift the exponent into place, then rescale by 2^112: right for denormals too.
  float f = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) f = __builtin_bit_cast(float, (magnitude << 13) | 0x7f800000u);
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, f) | sign);
}

CDROP_INLINE void from_float(float v, float* out) { *out = v; }
CDROP_INLINE void from_float(float v, BFloat16* out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  out->bits = v != v ? 0x7fc0u : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
CDROP_INLINE void from_float(float v, Half* out) {
  const uint32_t u = __builtin_bit_cast(uint32_t, v);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    bits = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // a denormal half: let the addition round
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    bits = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  } else {
    bits = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(bits) | sign;
}

CDROP_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
// __builtin_convertvector would do between 16 and 32 bits, but gcc makes five instructions of it.
CDROP_INLINE Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(_mm512_maskz_cvtepu16_epi32(0xffff, raw))
                               << 16);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(raw)) << 16);
#else
  VecU16 raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return reinterpret_cast<Vec>(__builtin_convertvector(raw, VecU) << 16);
#endif
}
CDROP_INLINE Vec load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

CDROP_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
CDROP_INLINE void store(BFloat16* p, Vec v) {
  const VecU u = reinterpret_cast<VecU>(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU nan = VecU{} + 0x7fc0u;
  const VecU bits = (v != v) ? nan : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#else
  const VecU16 half = __builtin_convertvector(bits, VecU16);
  __builtin_memcpy(p, &half, sizeof(half));
#endif
}
CDROP_INLINE void store(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

// The first `count` < kLanes elements; the other lanes are 0.
template <typename T>
CDROP_INLINE Vec load_part(const T* p, int64_t count) {
  T part[kLanes] = {};
  __builtin_memcpy(part, p, static_cast<size_t>(count) * sizeof(T));
  return load(part);
}

// Exchange between two vectors, as in one step of a transposition: lanes whose bit `kBit` is 0 stay
// in `*a`, lanes whose bit is 1 stay in `*b`, the others change places.
template <int kBit>
CDROP_INLINE void exchange(Vec* a, Vec* b) {
#if defined(__clang__)  // has no __builtin_shuffle, but makes shuffles of this loop
  Vec low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = (l & kBit) ? (*b)[l ^ kBit] : (*a)[l];
    high[l] = (l & kBit) ? (*b)[l] : (*a)[l ^ kBit];
  }
#else
  VecI of_low, of_high;
  for (int l = 0; l < kLanes; ++l) {
    of_low[l] = (l & kBit) ? kLanes + (l ^ kBit) : l;
    of_high[l] = (l & kBit) ? kLanes + l : (l ^ kBit);
  }
  const Vec low = __builtin_shuffle(*a, *b, of_low);
  const Vec high = __builtin_shuffle(*a, *b, of_high);
#endif
  *a = low;
  *b = high;
}

// Sums of neighbours at distance `kBit`: those of `a` where bit `kBit` of the lane is 0, else of b.
template <int kBit>
CDROP_INLINE Vec pair_sums(Vec a, Vec b) {
  exchange<kBit>(&a, &b);
  return a + b;
}

// Lane l of the result is the sum over the lanes of v[l].
CDROP_INLINE Vec lane_sums(const Vec (&v)[kLanes]) {
  Vec t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes / 2; ++i) t[i] = pair_sums<1>(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < kLanes / 4; ++i) t[i] = pair_sums<2>(t[2 * i], t[2 * i + 1]);
  if constexpr (kLanes >= 8) {
#pragma GCC unroll 2
    for (int i = 0; i < kLanes / 8; ++i) t[i] = pair_sums<4>(t[2 * i], t[2 * i + 1]);
  }
  if constexpr (kLanes >= 16) t[0] = pair_sums<8>(t[0], t[1]);
  return t[0];
}

CDROP_INLINE float sum_lanes(Vec v) {
  float total = 0.0f;
  for (int l = 0; l < kLanes; ++l) total += v[l];
  return total;
}

// e^x to about 1 unit in the last place; 0 below -87.3 (where the result would be denormal), inf
// above 88.7, NaN stays NaN. Range reduction by ln 2 in two parts and a degree-6 polynomial.
CDROP_INLINE Vec exponential(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
  const Vec clipped = choose(x > 89.0f, splat(89.0f), choose(x < -88.0f, splat(-88.0f), x));
  const Vec shifted = clipped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n in two factors, so that n = 128 does not overflow on its way to a finite result.
  const VecI k = as_int(shifted) - as_int(magic);
  const VecI half = k >> 1;
  const Vec value = p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
  const Vec bounded =
      choose(x > 88.7228f, splat(__builtin_inff()), choose(x < -87.3365f, splat(0.0f), value));
  return choose(x != x, x, bounded);
}
