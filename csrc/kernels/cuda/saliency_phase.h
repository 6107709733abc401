// Both saliencies of the tokens of a block's slice, and their unit vectors for the merge.
#pragma once

#include "context.h"

namespace cdrop::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kHeadSteps = kMaxHeadWidth / 32;

template <class C>
CDROP_DEVICE int visual_rows(const C& c) {
  return static_cast<int>(c.p.visual.query_heads * c.p.visual.rows);
}

template <class C>
CDROP_DEVICE const SaliencyParams& side_of(const C& c, int row) {
  return row < visual_rows(c) ? c.p.visual : c.p.textual;
}

// The logits of a row of either side, and how many columns it has.
template <class C>
CDROP_DEVICE float* logits_of(const C& c, int row, int* columns) {
  const int visual = visual_rows(c);
  if (row < visual) {
    *columns = c.plan.prefix + c.plan.tokens;
    return shared<float>(c, c.plan.at.visual_logits) + row * c.plan.visual_columns;
  }
  *columns = c.plan.tokens;
  return shared<float>(c, c.plan.at.textual_logits) + (row - visual) * c.plan.textual_columns;
}

// --- start -------------------------------------------------------------------------------------

template <class C>
CDROP_DEVICE void reset(const C& c) {
  const int mine = (c.plan.rows + c.plan.ranks - 1) / c.plan.ranks;
  for (int i = c.thread; i < mine; i += kThreads) {
    peer<uint32_t>(c, c.rank, c.plan.at.maxima)[i] = 0;
    peer<uint64_t>(c, c.rank, c.plan.at.sums)[i] = 0;
  }
}

template <class C>
CDROP_DEVICE void prefetch(const C& c) {
  const MergeParams& m = c.p.merge;
  const int64_t bytes = m.x.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t begin = int64_t{c.rank} * c.plan.columns;
  const int64_t end = begin + c.plan.columns < m.width ? begin + c.plan.columns : m.width;
  const int64_t lines = end > begin ? ((end - begin) * bytes + 127) / 128 : 0;
  const char* data = static_cast<const char*>(m.x.data) + bytes * (c.b * m.x.stride[0] + begin);
  for (int64_t i = c.thread; i < c.tokens * lines; i += kThreads) {
    c.g.prefetch(data + bytes * (i / lines) * m.x.stride[1] + i % lines * 128);
  }
}

// The metric of the tokens of this rank, the mean over its heads, eight columns a thread.
template <typename T, class C>
CDROP_DEVICE void head_means(const C& c, float* out) {
  const MergeParams& m = c.p.merge;
  const int width = static_cast<int>(m.metric_width), heads = static_cast<int>(m.metric_heads);
  const int stride = c.plan.metric_stride;
  const float by = static_cast<float>(heads);
  const T* data = static_cast<const T*>(m.metric.data) + c.b * m.metric.stride[0] +
                  c.first * m.metric.stride[2];
  if (width % 8 == 0 && sixteen_aligned<T>(m.metric.data, m.metric.stride)) {
    const int eights = width / 8;
    CDROP_ROLL
    for (int i = c.thread; i < c.count * eights; i += kThreads) {
      const int token = i / eights, start = i % eights * 8;
      const T* row = data + token * m.metric.stride[2] + start;
      float sum[8] = {};
      for (int h = 0; h < heads; ++h) {
        const Eight<T> here = load_wide(row + h * m.metric.stride[1]);
        for (int e = 0; e < 8; ++e) sum[e] += to_float(here.at[e]);
      }
      for (int e = 0; e < 8; ++e) out[token * stride + start + e] = c.g.div_rn(sum[e], by);
    }
    return;
  }
  CDROP_ROLL
  for (int i = c.thread; i < c.count * width; i += kThreads) {
    const int token = i / width, f = i % width;
    float sum = 0.0f;
    CDROP_ROLL
    for (int h = 0; h < heads; ++h) {
      sum += to_float(data[token * m.metric.stride[2] + h * m.metric.stride[1] + f]);
    }
    out[token * stride + f] = c.g.div_rn(sum, by);
  }
}

// Unit vectors of the metric of the tokens of this rank, float32.
template <class C>
CDROP_DEVICE void metric(const C& c) {
  const int width = static_cast<int>(c.p.merge.metric_width), stride = c.plan.metric_stride;
  float* out = peer<float>(c, c.rank, c.plan.at.metric);
  switch (c.p.merge.metric.dtype) {
    case DType::kFloat32: head_means<float>(c, out); break;
    case DType::kFloat16: head_means<Half>(c, out); break;
    case DType::kBFloat16: head_means<BFloat16>(c, out); break;
  }
  c.g.sync();
  // Divided by its largest element first, so that no square overflows or vanishes.
  for (int token = c.warp; token < c.count; token += kWarps) {
    float* row = out + token * stride;
    float largest = 0.0f;
    for (int f = c.lane; f < width; f += 32) {
      const float v = row[f] < 0.0f ? -row[f] : row[f];
      largest = v > largest || v != v ? v : largest;
    }
    for (int by = 16; by > 0; by /= 2) {
      const float v = c.g.shfl_xor(largest, by);
      largest = v > largest || v != v ? v : largest;
    }
    const float unscaled = largest > 0.0f ? largest : 1.0f;  // NaN stays in the elements
    float squares = 0.0f;
    for (int f = c.lane; f < width; f += 32) {
      const float v = c.g.div_rn(row[f], unscaled);
      row[f] = v;
      squares += v * v;
    }
    for (int by = 16; by > 0; by /= 2) squares += c.g.shfl_xor(squares, by);
    const float length = squares == 0.0f ? 1.0f : c.g.sqrt_rn(squares);
    for (int f = c.lane; f < width; f += 32) row[f] = c.g.div_rn(row[f], length);
  }
}

// --- logits ------------------------------------------------------------------------------------

// The key of a column of the slice, -1 where there is none; `token` is -1 for the prefix.
template <class C>
CDROP_DEVICE int key_of(const C& c, int side, int column, int* token) {
  *token = -1;
  if (side == 0) {
    if (column < c.plan.prefix) return column < c.prefix_count ? c.first_prefix + column : -1;
    column -= c.plan.prefix;
  }
  if (column >= c.count) return -1;
  *token = c.first + column;
  return *token + (side == 0 ? static_cast<int>(c.p.visual.prefix) : 0);
}

// Row `r` of the rows that read one key head, the first of whose query heads is `head`.
template <typename T>
CDROP_DEVICE const T* query_row(const T* q, const SaliencyParams& s, int head, int r) {
  const int rows = static_cast<int>(s.rows);
  return q + (head + r / rows) * s.q.stride[1] + r % rows * s.q.stride[2];
}

// Whether the rows of both operands can be read 16 bytes at a time, whatever the sample.
template <typename T>
CDROP_DEVICE bool wide_rows(const SaliencyParams& s) {
  return s.width % 8 == 0 && sixteen_aligned<T>(s.q.data, s.q.stride) &&
         sixteen_aligned<T>(s.k.data, s.k.stride);
}

// Base-2 logits of every row against the keys of the slice. A warp takes eight keys of a head and
// all the rows that read it; the keys go from memory to registers once.
template <typename T, class C>
CDROP_DEVICE void wide_logits(const C& c, const SaliencyParams& s, int side, float* out) {
  const int columns = side == 0 ? c.plan.visual_columns : c.plan.textual_columns;
  const int heads = static_cast<int>(s.key_heads), width = static_cast<int>(s.width);
  const int group = static_cast<int>(s.query_heads) / heads;
  const int all = group * static_cast<int>(s.rows), tiles = (columns - 1) / 8;
  const float scale = s.scale * kLog2E;
  const T* k = static_cast<const T*>(s.k.data) + c.b * s.k.stride[0];
  const T* q = static_cast<const T*>(s.q.data) + c.b * s.q.stride[0];
  const int g = c.lane / 4, t = c.lane % 4;

  for (int unit = c.warp; unit < heads * tiles; unit += kWarps) {
    const int head = unit % heads, tile = unit / heads;
    int token;
    const int key = key_of(c, side, tile * 8 + g, &token);
    const bool open = key >= 0 && (token < 0 || valid(c, token));
    // Of the two columns whose sums this lane ends up with.
    const bool open_left = c.g.shfl(open, 8 * t), open_right = c.g.shfl(open, 8 * t + 4);
    const T* key_row = k + head * s.k.stride[1] + key * s.k.stride[2] + 8 * t;
    const auto load_key = [&](int step) {
      return key >= 0 && 32 * step + 8 * t < width ? load_wide(key_row + 32 * step) : Eight<T>{};
    };
    // Float32 keys would take too many registers: they are read again, from the L1 cache.
    constexpr int kHeld = sizeof(T) == 4 ? 0 : kHeadSteps;
    Eight<T> keys[kHeadSteps];
    CDROP_UNROLL
    for (int step = 0; step < kHeld; ++step) keys[step] = load_key(step);
    CDROP_ROLL
    for (int base = 0; base < all; base += 16) {
      const int upper = base + g, lower = base + g + 8;
      const T* upper_row = query_row(q, s, head * group, upper < all ? upper : 0) + 8 * t;
      const T* lower_row = query_row(q, s, head * group, lower < all ? lower : 0) + 8 * t;
      float sum[4] = {};
      CDROP_UNROLL
      for (int step = 0; step < kHeadSteps; ++step) {
        if (32 * step >= width) break;
        Eight<T> up{}, low{};
        if (32 * step + 8 * t < width) {
          up = load_wide(upper_row + 32 * step);
          if (base + 8 < all) low = load_wide(lower_row + 32 * step);
        }
        c.g.multiply(sum, up, low, kHeld > 0 ? keys[step] : load_key(step));
      }
      const float none = -c.g.infinity();
      float* column = out + head * all * columns + tile * 8 + 2 * t;
      if (upper < all) {
        column[upper * columns] = open_left ? sum[0] * scale : none;
        column[upper * columns + 1] = open_right ? sum[1] * scale : none;
      }
      if (lower < all) {
        column[lower * columns] = open_left ? sum[2] * scale : none;
        column[lower * columns + 1] = open_right ? sum[3] * scale : none;
      }
    }
  }
}

// The same for rows that can't be read 16 bytes at a time: every product by itself, in float32.
template <typename T, class C>
CDROP_DEVICE void narrow_logits(const C& c, const SaliencyParams& s, int side, float* out) {
  const int columns = side == 0 ? c.plan.visual_columns : c.plan.textual_columns;
  const int rows = static_cast<int>(s.query_heads * s.rows), width = static_cast<int>(s.width);
  const int group = static_cast<int>(s.query_heads / s.key_heads);
  const int all = group * static_cast<int>(s.rows);
  const T* k = static_cast<const T*>(s.k.data) + c.b * s.k.stride[0];
  const T* q = static_cast<const T*>(s.q.data) + c.b * s.q.stride[0];
  CDROP_ROLL
  for (int item = c.thread; item < rows * (columns - 1); item += kThreads) {
    const int row = item / (columns - 1), column = item % (columns - 1), head = row / all;
    int token;
    const int key = key_of(c, side, column, &token);
    float sum = 0.0f;
    const bool open = key >= 0 && (token < 0 || valid(c, token));
    if (open) {
      const T* key_row = k + head * s.k.stride[1] + key * s.k.stride[2];
      const T* own = query_row(q, s, head * group, row - head * all);
      CDROP_ROLL
      for (int i = 0; i < width; ++i) sum += to_float(own[i]) * to_float(key_row[i]);
    }
    out[row * columns + column] = open ? sum * (s.scale * kLog2E) : -c.g.infinity();
  }
}

template <typename T, class C>
CDROP_DEVICE void logits_of_dtype(const C& c, const SaliencyParams& s, int side) {
  float* out = shared<float>(c, side == 0 ? c.plan.at.visual_logits : c.plan.at.textual_logits);
  if (wide_rows<T>(s)) {
    wide_logits<T>(c, s, side, out);
  } else {
    narrow_logits<T>(c, s, side, out);
  }
}

template <class C>
CDROP_DEVICE void logits(const C& c, const SaliencyParams& s, int side) {
  switch (s.k.dtype) {
    case DType::kFloat32: return logits_of_dtype<float>(c, s, side);
    case DType::kFloat16: return logits_of_dtype<Half>(c, s, side);
    case DType::kBFloat16: return logits_of_dtype<BFloat16>(c, s, side);
  }
}

// --- softmax -----------------------------------------------------------------------------------

template <class C>
CDROP_DEVICE void row_maxima(const C& c) {
  for (int row = c.thread; row < c.plan.rows; row += kThreads) {
    if (side_of(c, row).lse != nullptr) continue;
    int columns;
    const float* s = logits_of(c, row, &columns);
    uint32_t largest = 0;
    for (int i = 0; i < columns; ++i) {
      const uint32_t key = order_key(s[i], kNanOnTop);
      largest = key > largest ? key : largest;
    }
    uint32_t* table = peer<uint32_t>(c, row % c.plan.ranks, c.plan.at.maxima);
    c.g.atomic_max(table + row / c.plan.ranks, largest);
  }
}

template <class C>
CDROP_DEVICE float maximum_of(const C& c, int row) {
  const uint32_t key = peer<uint32_t>(c, row % c.plan.ranks, c.plan.at.maxima)[row / c.plan.ranks];
  return key == kNanOnTop ? c.g.nan() : key_value(key);
}

// Logits become exponentials; their sums are added as integers, in whatever order.
template <class C>
CDROP_DEVICE void row_sums(const C& c) {
  for (int row = c.thread; row < c.plan.rows; row += kThreads) {
    if (side_of(c, row).lse != nullptr) continue;
    const float largest = maximum_of(c, row);
    if (!c.g.is_finite(largest)) continue;
    int columns;
    float* s = logits_of(c, row, &columns);
    float sum = 0.0f;
    for (int i = 0; i < columns; ++i) {
      const float e = c.g.exp2(s[i] - largest);
      s[i] = e;
      sum += e;
    }
    uint64_t* table = peer<uint64_t>(c, row % c.plan.ranks, c.plan.at.sums);
    c.g.atomic_add(table + row / c.plan.ranks, to_fixed(sum));
  }
}

template <class C>
CDROP_DEVICE float factor_of(const C& c, int row) {
  const SaliencyParams& s = side_of(c, row);
  const int within = row < visual_rows(c) ? row : row - visual_rows(c);
  const int rows = static_cast<int>(s.rows), head = within / rows, m = within % rows;
  float share = 1.0f;
  if (s.query_weight) {
    if (!(s.query_weight.at(c.b, m) > 0.0f)) return 0.0f;
    if (s.reduce == Reduce::kMean) {
      double sum = 0.0;
      for (int i = 0; i < rows; ++i) sum += s.query_weight.at(c.b, i);
      share = static_cast<float>(s.query_weight.at(c.b, m) / sum);
    }
  } else if (s.reduce == Reduce::kMean) {
    share = static_cast<float>(1.0 / static_cast<double>(rows));
  }
  if (s.lse == nullptr) {
    const float largest = maximum_of(c, row);
    if (largest != largest) return largest;
    if (!c.g.is_finite(largest)) return 0.0f;  // every key is masked, or its sum is infinite
    return c.g.div_rn(share, from_fixed(peer<uint64_t>(c, row % c.plan.ranks,
                                                       c.plan.at.sums)[row / c.plan.ranks]));
  }
  const float lse = s.lse[c.b * s.lse_stride[0] + head * s.lse_stride[1] + m * s.lse_stride[2]];
  if (lse == c.g.infinity() || lse == -c.g.infinity()) return 0.0f;
  int columns;
  float* logits = logits_of(c, row, &columns);
  for (int i = 0; i < columns; ++i) logits[i] = c.g.exp2(logits[i] - lse * kLog2E);
  return share;
}

// What each exponential of a row is multiplied by, 0 where the row gives nothing; a given lse is
// applied to the logits here.
template <class C>
CDROP_DEVICE void row_factors(const C& c) {
  for (int row = c.thread; row < c.plan.rows; row += kThreads) {
    shared<float>(c, c.plan.at.factors)[row] = factor_of(c, row);
  }
}

template <class C>
CDROP_DEVICE float* head_sums_of(const C& c, int side) {
  return shared<float>(c, c.plan.at.head_sums) +
         (side == 0 ? 0 : static_cast<int>(c.p.visual.query_heads) * c.plan.tokens);
}

// Over the rows of each head: the mean or the maximum of what they pay to each token.
template <class C>
CDROP_DEVICE void head_sums(const C& c, const SaliencyParams& s, int side) {
  const int rows = static_cast<int>(s.rows), heads = static_cast<int>(s.query_heads);
  const int columns = side == 0 ? c.plan.visual_columns : c.plan.textual_columns;
  const float* logits =
      shared<float>(c, side == 0 ? c.plan.at.visual_logits : c.plan.at.textual_logits) +
      (side == 0 ? c.plan.prefix : 0);
  const float* factors = shared<float>(c, c.plan.at.factors) + (side == 0 ? 0 : visual_rows(c));
  float* out = head_sums_of(c, side);
  for (int i = c.thread; i < heads * c.count; i += kThreads) {
    const int head = i / c.count, token = i % c.count;
    float sum = 0.0f;
    for (int m = 0; m < rows; ++m) {
      const int row = head * rows + m;
      const float factor = factors[row];
      if (factor == 0.0f) continue;
      const float share = logits[row * columns + token] * factor;
      if (s.reduce == Reduce::kMean) {
        sum += share;
      } else {
        sum = share > sum || share != share ? share : sum;
      }
    }
    out[head * c.plan.tokens + token] = sum;
  }
}

template <class C>
CDROP_DEVICE void saliency(const C& c) {
  row_factors(c);
  c.g.sync();
  head_sums(c, c.p.visual, 0);
  if (c.p.has_text) head_sums(c, c.p.textual, 1);
  c.g.sync();
  const int n = c.plan.tokens, sides = c.p.has_text ? 2 : 1;
  float* out = peer<float>(c, c.rank, c.plan.at.saliency);
  for (int i = c.thread; i < sides * c.count; i += kThreads) {
    const int side = i / c.count, token = i % c.count;
    const SaliencyParams& s = side == 0 ? c.p.visual : c.p.textual;
    const int heads = static_cast<int>(s.query_heads);
    const float* sums = head_sums_of(c, side);
    float sum = 0.0f;
    for (int h = 0; h < heads; ++h) sum += sums[h * n + token];
    out[side * n + token] =
        valid(c, c.first + token) ? c.g.div_rn(sum, static_cast<float>(heads)) : 0.0f;
  }
}

}  // namespace cdrop::cuda
