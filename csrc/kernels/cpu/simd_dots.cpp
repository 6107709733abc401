// The vector loops for whole token vectors: products, sizes, changes of scale, and the steps of a
// greedy choice by determinants; compiled once per
// instruction set. See simd.h for why nothing of the standard library is used here.
#include <cstddef>

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cdrop::cpu {
namespace {

#include "vec.h"

// out[n][r] = <q[n], power[r] row[r]> for kQ vectors and kLanes / kQ rows: one sum per register,
// and one transposing reduction for all. Rows past `count` repeat the last one and are not written.
template <typename T, int kQ>
CDROP_INLINE void tile(const DotsTask& task, int64_t first_row, const float* q, float* out) {
  constexpr int kRows = kLanes / kQ;
  const int64_t q_stride = padded(task.width, kScratchPad);
  const int64_t whole = task.width / kLanes * kLanes;
  const T* row[kRows];
  float power[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = first_row + r < task.count ? first_row + r : task.count - 1;
    row[r] = static_cast<const T*>(task.rows) + at * task.row_stride;
    power[r] = task.power[at];
  }
  Vec sum[kLanes] = {};
  const auto step = [&](int64_t c, bool part) __attribute__((always_inline)) {
    Vec of_q[kQ];
#pragma GCC unroll 4
    for (int n = 0; n < kQ; ++n) of_q[n] = load(q + n * q_stride + c);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = part ? load_part(row[r] + c, task.width - c) : load(row[r] + c);
      const Vec scaled = x * power[r];
#pragma GCC unroll 4
      for (int n = 0; n < kQ; ++n) sum[r * kQ + n] += scaled * of_q[n];
    }
  };
  for (int64_t c = 0; c < whole; c += kLanes) step(c, false);
  if (whole < task.width) step(whole, true);
  const Vec sums = lane_sums(sum);
  for (int r = 0; r < kRows && first_row + r < task.count; ++r) {
    for (int n = 0; n < kQ; ++n) out[n * task.out_stride + first_row + r] = sums[r * kQ + n];
  }
}

template <typename T>
void all_dots(const DotsTask& task) {
  constexpr int kGroup = static_cast<int>(kDotQueries);
  if (task.queries == 1) {
    for (int64_t r = 0; r < task.count; r += kLanes) tile<T, 1>(task, r, task.q, task.out);
    return;
  }
  // Few rows stay in the cache while all vectors pass.
  const int64_t q_stride = padded(task.width, kScratchPad);
  for (int64_t r = 0; r < task.count; r += kLanes / kGroup) {
    for (int64_t n = 0; n < task.queries; n += kGroup) {
      tile<T, kGroup>(task, r, task.q + n * q_stride, task.out + n * task.out_stride);
    }
  }
}

template <typename T>
float largest_of(const T* row, int64_t width) {
  const int64_t whole = width / kLanes * kLanes;
  Vec most = {}, zero = {};  // x - x is 0, or NaN
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec x = load(row + c), size = choose(x < 0.0f, -x, x);
    most = choose(size > most, size, most);
    zero += x - x;
  }
  if (whole < width) {
    const Vec x = load_part(row + whole, width - whole), size = choose(x < 0.0f, -x, x);
    most = choose(size > most, size, most);
    zero += x - x;
  }
  float result = 0.0f;
  for (int l = 0; l < kLanes; ++l) result = most[l] > result ? most[l] : result;
  return result + sum_lanes(zero);
}

template <typename T>
void widen_row(const T* row, int64_t width, float factor, float* to) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(row + c) * factor);
  for (int64_t c = whole; c < width; ++c) to[c] = to_float(row[c]) * factor;
  for (int64_t c = width; c < padded(width, kScratchPad); ++c) to[c] = 0.0f;
}

template <typename T>
void rescale_row(const T* row, int64_t width, float factor, T* to) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(row + c) * factor);
  for (int64_t c = whole; c < width; ++c) from_float(to_float(row[c]) * factor, to + c);
}

template <int kColumns>
CDROP_INLINE void cholesky_columns(const CholeskyRowTask& task, int64_t j) {
  double left[kColumns];
  for (int l = 0; l < kColumns; ++l) {
    double cosine = task.product[j + l] * (task.row_inverse * task.inverse[j + l]);
    cosine = cosine < -1.0 ? -1.0 : cosine;
    cosine = cosine > 1.0 ? 1.0 : cosine;
    left[l] = static_cast<float>(cosine);
  }
  for (int64_t s = 0; s < task.steps; ++s) {
    const float* row = task.rows + s * task.row_stride + j;
    const double factor = task.at_row[s];
#pragma GCC unroll 32
    for (int l = 0; l < kColumns; ++l) left[l] -= factor * static_cast<double>(row[l]);
  }
  for (int l = 0; l < kColumns; ++l) {
    left[l] /= task.root;
    task.row[j + l] = static_cast<float>(left[l]);
    task.residual[j + l] -= left[l] * left[l];
  }
}

}  // namespace

namespace CDROP_SIMD {

void cholesky_row(const CholeskyRowTask& task) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= task.count; j += 2 * kLanes) cholesky_columns<2 * kLanes>(task, j);
  for (; j < task.count; ++j) cholesky_columns<1>(task, j);
}

BestGain best_gain(const BestGainTask& task) {
  constexpr int kDoubles = kLanes / 2;
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  const Doubles none = Doubles{} - 1.0;
  const auto gain = [&](Doubles worth, Doubles residual) __attribute__((always_inline)) {
    const Doubles raised = residual > task.floor ? worth * residual : Doubles{};
    return worth >= 0.0 ? raised : none;
  };
  const auto block = [&](const double* from, int64_t j, Doubles past) {
    if (j + kDoubles <= task.count) {
      __builtin_memcpy(&past, from + j, sizeof(past));
    } else {
      for (int l = 0; j + l < task.count; ++l) past[l] = from[j + l];
    }
    return past;
  };
  Doubles most = none;
  for (int64_t j = 0; j < task.count; j += kDoubles) {
    const Doubles here = gain(block(task.worth, j, none), block(task.residual, j, Doubles{}));
    most = here > most ? here : most;
  }
  BestGain best{-1, -1.0};
  for (int l = 0; l < kDoubles; ++l) best.gain = most[l] > best.gain ? most[l] : best.gain;
  if (best.gain < 0.0) return {};
  for (int64_t j = 0; best.at < 0; j += kDoubles) {
    const Doubles here = gain(block(task.worth, j, none), block(task.residual, j, Doubles{}));
    for (int l = kDoubles - 1; l >= 0; --l) {
      if (here[l] == best.gain) best.at = j + l;
    }
  }
  return best;
}

void dots(const DotsTask& task) {
  switch (task.dtype) {
    case DType::kFloat32: return all_dots<float>(task);
    case DType::kFloat16: return all_dots<Half>(task);
    case DType::kBFloat16: return all_dots<BFloat16>(task);
  }
}

float largest(const void* row, DType dtype, int64_t width) {
  switch (dtype) {
    case DType::kFloat32: return largest_of(static_cast<const float*>(row), width);
    case DType::kFloat16: return largest_of(static_cast<const Half*>(row), width);
    case DType::kBFloat16: return largest_of(static_cast<const BFloat16*>(row), width);
  }
  return 0.0f;
}

void widen(const void* row, DType dtype, int64_t width, float factor, float* to) {
  switch (dtype) {
    case DType::kFloat32: return widen_row(static_cast<const float*>(row), width, factor, to);
    case DType::kFloat16: return widen_row(static_cast<const Half*>(row), width, factor, to);
    case DType::kBFloat16: return widen_row(static_cast<const BFloat16*>(row), width, factor, to);
  }
}

void rescale(const void* row, DType dtype, int64_t width, float factor, void* to) {
  switch (dtype) {
    case DType::kFloat32:
      return rescale_row(static_cast<const float*>(row), width, factor, static_cast<float*>(to));
    case DType::kFloat16:
      return rescale_row(static_cast<const Half*>(row), width, factor, static_cast<Half*>(to));
    case DType::kBFloat16:
      return rescale_row(static_cast<const BFloat16*>(row), width, factor,
                         static_cast<BFloat16*>(to));
  }
}

}  // namespace CDROP_SIMD
}  // namespace cdrop::cpu
