// Lengths of token vectors of any size, without overflow and without a copy of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace cdrop::cpu {

inline const char* token_row(const Rows& rows, int64_t sample, int64_t row) {
  const int64_t size = rows.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(rows.data) +
         (sample * rows.stride[0] + row * rows.stride[1]) * size;
}

// 2^n, as far as a normal float goes.
inline float power_of_two(int n) { return std::ldexp(1.0f, std::clamp(n, -126, 126)); }

// A vector times `power` has a squared length of `square`, and elements of about 1.
struct Measure {
  float power = 1.0f;
  float square = 0.0f;  // 0 for a zero vector, NaN where an element is NaN or infinite
  double length() const { return std::sqrt(static_cast<double>(square)) / power; }
};

// `scratch`: padded(width, kScratchPad) floats; it is left with the scaled vector.
inline Measure measure(const Rows& rows, int64_t sample, int64_t row, int64_t width,
                       float* scratch) {
  const char* data = token_row(rows, sample, row);
  const float largest = simd().largest(data, rows.dtype, width);
  Measure m;
  if (std::isnan(largest)) {
    m.square = largest;
    return m;
  }
  if (largest == 0.0f) return m;
  m.power = power_of_two(-std::ilogb(largest));
  simd().widen(data, rows.dtype, width, m.power, scratch);
  // By the kernel that multiplies two vectors, so that a copy of a vector has cosine 1 to the bit.
  simd().dots({data, rows.dtype, 0, width, 1, &m.power, scratch, 1, &m.square, 1});
  return m;
}

}  // namespace cdrop::cpu
