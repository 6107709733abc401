// The vector loops of attention and merging; compiled once per instruction set (CDROP_SIMD names
// which), as those of simd_dots.cpp.
// See simd.h for why nothing of the standard library is used here.
#include <cstddef>

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cdrop::cpu {
namespace {

#include "vec.h"

// --- attention ----------------------------------------------------------------------------------

constexpr int kRowBlock = kLanes / 2;  // query rows taken at once
static_assert(kRowBlock <= kMaxRowBlock);

// Rows lie far apart where heads alternate in memory, too far for the processor to guess the next.
template <typename T>
CDROP_INLINE void fetch_row(const T* row, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < width; c += kLine) __builtin_prefetch(row + c);
}

// s[j..j + kLanes) = <q, k[j]> for one row. kLanes dot products at a time, so that one transposing
// reduction sums them all. `q` is padded with zeros to whole vectors.
template <typename T>
void one_row_products(const AttentionTask& task, const T* k, int64_t j, const float* q, float* s) {
  const int64_t whole = task.width / kLanes * kLanes;
  Vec sum[kLanes] = {};
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) {
    const int64_t at = j + n < task.keys ? j + n : task.keys - 1;
    const T* key = k + at * task.k_row_stride;
    fetch_row(key + kLanes * task.k_row_stride, task.width);
    for (int64_t c = 0; c < whole; c += kLanes) sum[n] += load(key + c) * load(q + c);
    if (whole < task.width) {
      sum[n] += load_part(key + whole, task.width - whole) * load(q + whole);
    }
  }
  store(s + j, lane_sums(sum));
}

// How a block of rows is multiplied: in units of 32 bits, one float or (where the processor
// multiplies them) two bfloat16. `kPer` elements make a unit.
struct FloatUnit {
  static constexpr int kPer = 1;
  static CDROP_INLINE_MEMBER Vec multiply_add(Vec sum, Vec q, Vec k) { return sum + q * k; }
};
template <typename T>
struct UnitOf {
  using type = FloatUnit;
};
#if defined(__AVX512BF16__)
struct BFloat16Pair {
  static constexpr int kPer = 2;
  static CDROP_INLINE_MEMBER Vec multiply_add(Vec sum, Vec q, Vec k) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                  reinterpret_cast<__m512bh>(q),
                                                  reinterpret_cast<__m512bh>(k)));
  }
};
template <>
struct UnitOf<BFloat16> {
  using type = BFloat16Pair;
};
#endif

// Copy one row into units, with zeros up to `units` of them.
template <typename T>
CDROP_INLINE void stage_row(const T* from, int64_t width, float* to, int64_t units) {
  constexpr int kPer = UnitOf<T>::type::kPer;
  if constexpr (kPer == 1) {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(from + c));
    for (int64_t c = whole; c < width; ++c) to[c] = to_float(from[c]);
    for (int64_t c = width; c < units; ++c) to[c] = 0.0f;
  } else {
    const float* raw = reinterpret_cast<const float*>(from);  // loaded and stored, not read
    const int64_t whole = width / (kLanes * kPer) * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(raw + c));
    T* rest = reinterpret_cast<T*>(to);
    for (int64_t c = whole * kPer; c < width; ++c) rest[c] = from[c];
    for (int64_t c = width; c < units * kPer; ++c) rest[c] = T{};
  }
}

constexpr int64_t kChunk = 128;  // units: a constant, so that one address reaches all keys

// Products of one chunk of the units, `from` on, added to `sum`; see block_products.
template <typename T>
CDROP_INLINE void chunk_products(const AttentionTask& task, const T* k, int64_t j, const float* q,
                                 int64_t from, int64_t units, Vec (&sum)[kLanes]) {
  using Unit = typename UnitOf<T>::type;
  typedef double Pairs __attribute__((vector_size(kLanes * 4)));
  alignas(64) float tile[kLanes * kChunk];
  const int64_t size = units - from < kChunk ? units - from : kChunk;
  const int64_t left = task.width - from * Unit::kPer;
  const int64_t width = left < kChunk * Unit::kPer ? left : kChunk * Unit::kPer;
  for (int n = 0; n < kLanes; ++n) {
    const int64_t at = j + n < task.keys ? j + n : task.keys - 1;
    const T* key = k + at * task.k_row_stride + from * Unit::kPer;
    stage_row(key, width, tile + n * kChunk, size);
  }
  // The next kLanes keys are fetched meanwhile, line by line so that no burst fills the queues.
  const char* ahead =
      reinterpret_cast<const char*>(k + (j + kLanes) * task.k_row_stride) + from * 4;
  const int64_t ahead_stride = task.k_row_stride * static_cast<int64_t>(sizeof(T));
  constexpr int kPerTurn = kLanes < 8 ? 1 : kLanes / 8;  // a line is eight turns of 8 bytes
  for (int64_t c = 0; c < size; c += 2) {
    for (int n = 0; n < kPerTurn; ++n) {
      __builtin_prefetch(ahead + (c / 2 % 8 * kPerTurn + n) * ahead_stride + c * 4);
    }
    const Vec rows = load(q + (from + c) * kRowBlock);
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      double pair;
      __builtin_memcpy(&pair, tile + n * kChunk + c, sizeof(pair));
      sum[n] = Unit::multiply_add(sum[n], rows, reinterpret_cast<Vec>(pair - Pairs{}));
    }
  }
}

// s[r][j..j + kLanes) = <q[r], k[j]> for kRowBlock rows. `q` holds the rows side by side: lane
// 2 r + e of vector c is unit 2 c + e of row r. A pair of a key's units is then one 64-bit
// broadcast, and every lane of every product is needed.
template <typename T>
void block_products(const AttentionTask& task, const T* k, int64_t j, const float* q, float* s,
                    int64_t s_stride) {
  const int64_t units = row_units(task.width, UnitOf<T>::type::kPer);
  Vec total[kLanes] = {};
  chunk_products(task, k, j, q, 0, units, total);
  for (int64_t from = kChunk; from < units; from += kChunk) {
    Vec sum[kLanes] = {};  // long rows are summed chunk by chunk, which rounds less
    chunk_products(task, k, j, q, from, units, sum);
    for (int n = 0; n < kLanes; ++n) total[n] += sum[n];
  }
  // Lane 2 r + e of total[n]: add up e, then bring each row's keys together.
  Vec t[kRowBlock];
#pragma GCC unroll 8
  for (int n = 0; n < kRowBlock; ++n) t[n] = pair_sums<1>(total[2 * n], total[2 * n + 1]);
#pragma GCC unroll 8
  for (int n = 0; n < kRowBlock; n += 2) exchange<2>(&t[n], &t[n + 1]);
  if constexpr (kRowBlock >= 4) {
#pragma GCC unroll 8
    for (int n = 0; n < kRowBlock; ++n) {
      if (!(n & 2)) exchange<4>(&t[n], &t[n + 2]);
    }
  }
  if constexpr (kRowBlock >= 8) {
#pragma GCC unroll 8
    for (int n = 0; n < kRowBlock / 2; ++n) exchange<8>(&t[n], &t[n + kRowBlock / 2]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowBlock; ++r) store(s + r * s_stride + j, t[r]);
}

struct Row {
  int64_t head, row;
  float weight;
};

// Keys the row may see: a prefix of them when causal, aligned at the bottom right.
int64_t visible_keys(const AttentionTask& task, const Row& row) {
  if (!task.causal) return task.keys;
  const int64_t n = row.row + (task.keys - task.rows) + 1;
  return n < 0 ? 0 : (n < task.keys ? n : task.keys);
}

bool key_is_valid(const AttentionTask& task, int64_t key) {
  return task.key_valid == nullptr || key < task.valid_from ||
         task.key_valid[(key - task.valid_from) * task.valid_stride] != 0;
}

// Scale the logits, -inf where the row does not look; the largest of them (NaN passed over).
float mask_logits(const AttentionTask& task, const Row& row, float* s) {
  const float kMinusInf = -__builtin_inff();
  const int64_t seen = visible_keys(task, row);
  const int64_t end = padded(task.keys, kLanes);
  Vec most = splat(kMinusInf);
  if (task.key_valid == nullptr) {
    for (int64_t j = 0; j < seen; j += kLanes) {
      const Vec v = load(s + j) * task.scale;
      store(s + j, v);
      if (j + kLanes <= seen) most = choose(v > most, v, most);
    }
    for (int64_t j = seen; j < end; ++j) s[j] = kMinusInf;
    const Vec last = load(s + (seen > 0 ? seen - 1 : 0) / kLanes * kLanes);
    most = choose(last > most, last, most);
  } else {
    for (int64_t j = 0; j < end; ++j) {
      s[j] = j < seen && key_is_valid(task, j) ? s[j] * task.scale : kMinusInf;
    }
    for (int64_t j = 0; j < end; j += kLanes) {
      const Vec v = load(s + j);
      most = choose(v > most, v, most);
    }
  }
  float m = kMinusInf;
  for (int l = 0; l < kLanes; ++l) m = most[l] > m ? most[l] : m;
  return m;
}

bool any_nan(const float* s, int64_t count) {
  int found = 0;
  for (int64_t j = 0; j < count; ++j) found |= s[j] != s[j];
  return found != 0;
}

// s[j] becomes e^(s[j] - shift); the sum of them.
float exponentials(float* s, int64_t count, float shift) {
  Vec total = {};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec e = exponential(load(s + j) - shift);
    store(s + j, e);
    total += e;
  }
  return sum_lanes(total);
}

// out[i] += factor * p[i], or out[i] = max(out[i], factor * p[i]) where NaN wins.
void accumulate(float* out, const float* p, int64_t count, float factor, Reduce reduce) {
  const int64_t whole = count / kLanes * kLanes;
  if (reduce == Reduce::kMean) {
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, load(out + i) + load(p + i) * factor);
    for (int64_t i = whole; i < count; ++i) out[i] += p[i] * factor;
    return;
  }
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec v = load(p + i) * factor, old = load(out + i);
    store(out + i, choose((v > old) | (v != v), v, old));
  }
  for (int64_t i = whole; i < count; ++i) {
    const float v = p[i] * factor;
    if (v > out[i] || v != v) out[i] = v;
  }
}

// Probabilities of a row that is NaN throughout: NaN where it looks, 0 where it does not.
void nan_row(const AttentionTask& task, const Row& row, float* p) {
  const int64_t seen = visible_keys(task, row);
  for (int64_t j = 0; j < task.keys; ++j) {
    p[j] = j < seen && key_is_valid(task, j) ? __builtin_nanf("") : 0.0f;
  }
}

// Turn one row's dot products into probabilities and add them to `out` [keys - prefix].
void add_row(const AttentionTask& task, const Row& row, float* s, float* out) {
  if (task.key_factor != nullptr) {
    const float factor = task.row_factor[row.row];
    for (int64_t j = 0; j < task.keys; ++j) s[j] = s[j] * task.key_factor[j] * factor;
  }
  float shift = mask_logits(task, row, s);
  float factor = task.reduce == Reduce::kMean ? row.weight : 1.0f;
  if (task.lse != nullptr) {
    shift = task.lse[row.head * task.lse_head_stride + row.row * task.lse_row_stride];
  }
  const bool unbounded = shift == __builtin_inff() || shift == -__builtin_inff();
  if (unbounded && (task.lse != nullptr || !any_nan(s, task.keys))) return;
  const float total = unbounded ? __builtin_nanf("") : exponentials(s, task.keys, shift);
  if (task.lse == nullptr) factor /= total;
  if (shift != shift || factor != factor) nan_row(task, row, s), factor = 1.0f;
  accumulate(out, s + task.prefix, task.keys - task.prefix, factor, task.reduce);
}

template <typename T>
const T* query(const AttentionTask& task, const Row& row) {
  return static_cast<const T*>(task.q) + row.head * task.q_head_stride +
         row.row * task.q_row_stride;
}

// A few rows of one key head on their way to scores.
template <typename T>
struct Block {
  Row rows[kRowBlock];
  int64_t count;
  const T* k;
  float* q;  // the rows as the products want them
  float* s;  // [kRowBlock][s_stride] logits
};

template <typename T>
bool row_by_row(const Block<T>& block) {
  return block.count == 1 || block.count <= kRowBlock / 4;
}

// Lay the block's rows out for one_row_products or block_products; `row` is scratch.
template <typename T>
void load_queries(const AttentionTask& task, const Block<T>& block, float* row) {
  if (row_by_row(block)) {
    const int64_t size = padded(task.width, kLanes);
    for (int64_t r = 0; r < block.count; ++r) {
      const T* from = query<T>(task, block.rows[r]);
      float* to = block.q + r * size;
      for (int64_t c = 0; c < size; ++c) to[c] = c < task.width ? to_float(from[c]) : 0.0f;
    }
    return;
  }
  const int64_t units = row_units(task.width, UnitOf<T>::type::kPer);
  for (int64_t r = 0; r < kRowBlock; ++r) {
    stage_row(query<T>(task, block.rows[r < block.count ? r : 0]), task.width, row, units);
    for (int64_t c = 0; c < units; c += 2) {
      block.q[c * kRowBlock + 2 * r] = row[c];
      block.q[c * kRowBlock + 2 * r + 1] = row[c + 1];
    }
  }
}

template <typename T>
void products(const AttentionTask& task, const Block<T>& block, int64_t j, int64_t s_stride) {
  if (block.count == 0) return;
  if (!row_by_row(block)) {
    block_products<T>(task, block.k, j, block.q, block.s, s_stride);
    return;
  }
  for (int64_t r = 0; r < block.count; ++r) {
    one_row_products<T>(task, block.k, j, block.q + r * padded(task.width, kLanes),
                        block.s + r * s_stride);
  }
}

// The next rows of weight > 0 before `end`, at most kRowBlock of them.
int64_t next_rows(const AttentionTask& task, int64_t* at, int64_t end, Row* rows) {
  int64_t n = 0;
  for (; *at < end && n < kRowBlock; ++*at) {
    const Row row{*at / task.rows, *at % task.rows, task.weight[*at % task.rows]};
    if (row.weight > 0.0f) rows[n++] = row;
  }
  return n;
}

// With several key heads, all their rows fit one block each, and each key's heads are read one
// after another: where they alternate in memory, that is one long stretch.
template <typename T>
void attention_rows(const AttentionTask& task) {
  const int64_t s_stride = logits_stride(task.keys);
  const int64_t q_size = kMaxRowBlock * padded(task.width, kScratchPad);
  const int64_t count = task.keys - task.prefix;
  float* most = task.scratch;  // over the rows of one head
  float* row = most + padded(count, kScratchPad);
  float* at_block = row + padded(task.width, kScratchPad);
  Block<T> blocks[kMaxTaskHeads];
  for (int64_t h = 0; h < task.key_heads; ++h) {
    blocks[h].k = static_cast<const T*>(task.k) + h * task.k_head_stride;
    blocks[h].q = at_block;
    blocks[h].s = at_block + q_size;
    at_block += q_size + task_rows(task.row_end - task.row_begin, task.key_heads) * s_stride;
  }
  const bool by_max = task.reduce == Reduce::kMax;
  for (int64_t i = 0; i < count; ++i) task.out[i] = 0.0f;
  int64_t head = -1;
  for (int64_t at = task.row_begin; at < task.row_end;) {
    for (int64_t h = 0; h < task.key_heads; ++h) {
      const int64_t end = task.row_end - (task.key_heads - 1 - h) * task.group_rows;
      blocks[h].count = next_rows(task, &at, end, blocks[h].rows);
      if (blocks[h].count > 0) load_queries(task, blocks[h], row);
    }
    for (int64_t j = 0; j < task.keys; j += kLanes) {
      for (int64_t h = 0; h < task.key_heads; ++h) products(task, blocks[h], j, s_stride);
    }
    for (int64_t h = 0; h < task.key_heads; ++h) {
      for (int64_t r = 0; r < blocks[h].count; ++r) {
        const Row& here = blocks[h].rows[r];
        if (by_max && here.head != head) {
          if (head >= 0) accumulate(task.out, most, count, 1.0f, Reduce::kMean);
          for (int64_t i = 0; i < count; ++i) most[i] = 0.0f;
          head = here.head;
        }
        add_row(task, here, blocks[h].s + r * s_stride, by_max ? most : task.out);
      }
    }
  }
  if (head >= 0) accumulate(task.out, most, count, 1.0f, Reduce::kMean);
}

void attention(const AttentionTask& task) {
  switch (task.dtype) {
    case DType::kFloat32: return attention_rows<float>(task);
    case DType::kFloat16: return attention_rows<Half>(task);
    case DType::kBFloat16: return attention_rows<BFloat16>(task);
  }
}

// --- nearest slot -------------------------------------------------------------------------------

// The metric vector of one token: the mean over heads of its rows.
template <typename T>
void metric_vector(const MetricRows& metric, int64_t token, float* out) {
  const T* row = static_cast<const T*>(metric.data) + token * metric.row_stride;
  const float share = 1.0f / static_cast<float>(metric.heads);
  const int64_t whole = metric.width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    Vec total = load(row + c);
    for (int64_t h = 1; h < metric.heads; ++h) total += load(row + h * metric.head_stride + c);
    store(out + c, total * share);
  }
  for (int64_t c = whole; c < metric.width; ++c) {
    float total = to_float(row[c]);
    for (int64_t h = 1; h < metric.heads; ++h) total += to_float(row[h * metric.head_stride + c]);
    out[c] = total * share;
  }
}

void metric_vector(const MetricRows& metric, int64_t token, float* out) {
  switch (metric.dtype) {
    case DType::kFloat32: return metric_vector<float>(metric, token, out);
    case DType::kFloat16: return metric_vector<Half>(metric, token, out);
    case DType::kBFloat16: return metric_vector<BFloat16>(metric, token, out);
  }
}

// Bring the largest element to 1, so that no square overflows or vanishes, and return the length
// the vector then has: 1 for a zero vector, whose cosine with everything is 0.
float scale_and_measure(float* v, int64_t width) {
  Vec most = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec x = load(v + c), size = choose(x < 0.0f, -x, x);
    most = choose(size > most, size, most);
  }
  float largest = 0.0f;
  for (int l = 0; l < kLanes; ++l) largest = most[l] > largest ? most[l] : largest;
  for (int64_t c = whole; c < width; ++c) {
    const float size = v[c] < 0.0f ? -v[c] : v[c];
    largest = size > largest ? size : largest;
  }
  if (largest == 0.0f) return 1.0f;  // or all NaN, which stays NaN
  Vec squares = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Vec x = load(v + c) / largest;
    store(v + c, x);
    squares += x * x;
  }
  float total = sum_lanes(squares);
  for (int64_t c = whole; c < width; ++c) {
    v[c] /= largest;
    total += v[c] * v[c];
  }
  return __builtin_sqrtf(total);
}

void slot_vectors(const MetricRows& metric, const int32_t* tokens, int64_t count, float* slots,
                  int64_t padded, float* scratch) {
  for (int64_t i = 0; i < metric.width * padded; ++i) slots[i] = 0.0f;
  for (int64_t s = 0; s < count; ++s) {
    metric_vector(metric, tokens[s], scratch);
    const float length = scale_and_measure(scratch, metric.width);
    for (int64_t c = 0; c < metric.width; ++c) slots[c * padded + s] = scratch[c] / length;
  }
}

struct Best {
  Vec value[kTokenBlock];
  VecI slot[kTokenBlock];
};

// Four tokens against kTiles vectors of slots from `first` on, keeping the best of each lane.
template <int kTiles>
void compare(const NearestTask& task, const float* tokens, int64_t first, Best* best) {
  const int64_t width = task.metric.width;
  Vec dot[kTokenBlock][kTiles] = {};
  const float* slots = task.slots + first;
  for (int64_t c = 0; c < width; ++c) {
    Vec slot[kTiles];
#pragma GCC unroll 8
    for (int v = 0; v < kTiles; ++v) slot[v] = load(slots + c * task.padded + v * kLanes);
#pragma GCC unroll 8
    for (int t = 0; t < kTokenBlock; ++t) {
      const Vec token = splat(tokens[t * width + c]);
#pragma GCC unroll 8
      for (int v = 0; v < kTiles; ++v) dot[t][v] += token * slot[v];
    }
  }
  VecI lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  for (int v = 0; v < kTiles; ++v) {
    const Vec bias = load(task.bias + first + v * kLanes);
    const VecI number = lane + static_cast<int32_t>(first + v * kLanes);
    for (int t = 0; t < kTokenBlock; ++t) {
      const Vec value = dot[t][v] + bias;
      const VecI better = value > best->value[t];
      best->value[t] = choose(better, value, best->value[t]);
      best->slot[t] = choose(better, number, best->slot[t]);
    }
  }
}

void nearest(const NearestTask& task) {
  constexpr int kTiles = kLanes == 16 ? 4 : 2;  // what the registers hold
  const int64_t width = task.metric.width;
  for (int64_t i = 0; i < task.count; i += kTokenBlock) {
    const int64_t here = task.count - i < kTokenBlock ? task.count - i : kTokenBlock;
    float length[kTokenBlock];
    for (int64_t t = 0; t < kTokenBlock; ++t) {
      metric_vector(task.metric, task.joining[i + (t < here ? t : 0)], task.scratch + t * width);
      length[t] = scale_and_measure(task.scratch + t * width, width);
    }
    Best best;
    for (int t = 0; t < kTokenBlock; ++t) {
      best.value[t] = splat(-__builtin_inff());
      best.slot[t] = VecI{} - 1;
    }
    for (int64_t first = 0; first < task.padded; first += kTiles * kLanes) {
      compare<kTiles>(task, task.scratch, first, &best);
    }
    for (int64_t t = 0; t < here; ++t) {
      float value = -__builtin_inff();
      int32_t slot = -1;
      for (int l = 0; l < kLanes; ++l) {
        const float v = best.value[t][l];
        const int32_t number = best.slot[t][l];
        if (v > value || (v == value && number < slot)) value = v, slot = number;
      }
      if (task.always) {
        slot = slot < 0 ? 0 : slot;
      } else if (slot >= 0) {
        const float cosine = value / length[t];
        if (!((cosine < -1.0f ? -1.0f : cosine > 1.0f ? 1.0f : cosine) >= task.threshold))
          slot = -1;
      }
      task.out[i + t] = slot;
    }
  }
}

// --- merge --------------------------------------------------------------------------------------

template <typename T>
CDROP_INLINE void fetch_rows(const T* const* rows, int64_t column) {
  for (int n = 0; n < kMergeSweep; ++n) __builtin_prefetch(rows[n] + column);
}

template <typename T>
void copy_row(const T* from, T* to, const T* const* ahead, int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < width; c += kLine) {
    fetch_rows(ahead, c);
    const int64_t size = width - c < kLine ? width - c : kLine;
    if (size == kLine) {
      __builtin_memcpy(to + c, from + c, 64);
    } else {
      __builtin_memcpy(to + c, from + c, static_cast<size_t>(size) * sizeof(T));
    }
  }
}

// One sweep over kRows rows: total = (kFirst ? 0 : acc) + sum_n factor[n] x[row[n]], left in `acc`,
// or where it is the last, times `scale` in `out`. The rows lie anywhere, so those of the next
// sweep are fetched meanwhile.
template <typename T, int kRows, bool kFirst, bool kLast>
void sweep(const T* const* row, const float* factor, const T* const* next, int64_t width,
           float scale, float* acc, T* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) {
    if (c % kLine == 0) fetch_rows(next, c);
    Vec total = kFirst ? Vec{} : load(acc + c);
#pragma GCC unroll 4
    for (int n = 0; n < kRows; ++n) total += load(row[n] + c) * factor[n];
    if constexpr (kLast) {
      store(out + c, total * scale);
    } else {
      store(acc + c, total);
    }
  }
  for (int64_t c = whole; c < width; ++c) {
    float total = kFirst ? 0.0f : acc[c];
    for (int n = 0; n < kRows; ++n) total += to_float(row[n][c]) * factor[n];
    if constexpr (kLast) {
      from_float(total * scale, out + c);
    } else {
      acc[c] = total;
    }
  }
}

template <typename T, bool kFirst>
void last_sweep(int rows, const T* const* row, const float* factor, const T* const* next,
                int64_t width, float scale, float* acc, T* out) {
  if (rows == 1) sweep<T, 1, kFirst, true>(row, factor, next, width, scale, acc, out);
  if (rows == 2) sweep<T, 2, kFirst, true>(row, factor, next, width, scale, acc, out);
  if (rows == 3) sweep<T, 3, kFirst, true>(row, factor, next, width, scale, acc, out);
  if (rows == 4) sweep<T, 4, kFirst, true>(row, factor, next, width, scale, acc, out);
}

template <typename T>
void merge_slot(const MergeTask& task) {
  const T* x = static_cast<const T*>(task.x);
  T* out = static_cast<T*>(task.out);
  const T* own = x + task.own * task.row_stride;
  const T* ahead[kMergeSweep];
  for (int i = 0; i < kMergeSweep; ++i) ahead[i] = x + task.ahead[i] * task.row_stride;
  if (task.count == 0 || task.blend == 0.0f) {  // as it is, to the bit
    copy_row(own, out, ahead, task.width);
    return;
  }
  // The slot's own token first, then those that joined; a weight of 0 takes no part, not even as
  // 0 * NaN.
  const int64_t lead = task.own_weight > 0.0f ? 1 : 0;
  const int64_t count = lead + task.count;
  const auto given = [&](int64_t n) {
    if (n < lead) return task.own_weight;
    return task.weight ? task.weight[task.joined[n - lead] * task.weight_stride] : 1.0f;
  };
  // Against the largest, so that no sum of weights overflows or vanishes.
  float largest = 0.0f, total = 0.0f;
  for (int64_t n = 0; n < count; ++n) largest = given(n) > largest ? given(n) : largest;
  const auto weight = [&](int64_t n) {
    return given(n) / largest * (n < lead ? 1.0f : task.blend);
  };
  for (int64_t n = 0; n < count; ++n) total += weight(n);
  const T* row[2 * kMergeSweep];
  float factor[2 * kMergeSweep] = {};
  const auto fetch = [&](int64_t n, int at) {
    if (n >= count) {  // nothing more to add: what comes after this slot
      row[at] = ahead[at % kMergeSweep];
      return;
    }
    row[at] = x + (n < lead ? task.own : task.joined[n - lead]) * task.row_stride;
    factor[at] = weight(n);
  };
  for (int n = 0; n < kMergeSweep; ++n) fetch(n, n);
  const T* const* next = row + kMergeSweep;
  const float scale = 1.0f / total;
  for (int64_t n = 0; n < count; n += kMergeSweep) {
    for (int i = 0; i < kMergeSweep; ++i) fetch(n + kMergeSweep + i, kMergeSweep + i);
    const int64_t left = count - n;
    const int64_t width = task.width;
    float* acc = task.scratch;
    if (left > kMergeSweep) {
      n == 0 ? sweep<T, kMergeSweep, true, false>(row, factor, next, width, scale, acc, out)
             : sweep<T, kMergeSweep, false, false>(row, factor, next, width, scale, acc, out);
    } else {
      const int rows = static_cast<int>(left);
      n == 0 ? last_sweep<T, true>(rows, row, factor, next, width, scale, acc, out)
             : last_sweep<T, false>(rows, row, factor, next, width, scale, acc, out);
    }
    for (int i = 0; i < kMergeSweep; ++i) {
      row[i] = row[kMergeSweep + i];
      factor[i] = factor[kMergeSweep + i];
    }
  }
}

void merge(const MergeTask& task) {
  switch (task.dtype) {
    case DType::kFloat32: return merge_slot<float>(task);
    case DType::kFloat16: return merge_slot<Half>(task);
    case DType::kBFloat16: return merge_slot<BFloat16>(task);
  }
}

}  // namespace

#define CDROP_STRING_(name) #name
#define CDROP_STRING(name) CDROP_STRING_(name)
extern const SimdKernels CDROP_SIMD_TABLE;
const SimdKernels CDROP_SIMD_TABLE = {CDROP_STRING(CDROP_SIMD),
                                      kRowBlock,
                                      attention,
                                      slot_vectors,
                                      nearest,
                                      merge,
                                      CDROP_SIMD::dots,
                                      CDROP_SIMD::largest,
                                      CDROP_SIMD::widen,
                                      CDROP_SIMD::rescale,
                                      CDROP_SIMD::cholesky_row,
                                      CDROP_SIMD::best_gain};

}  // namespace cdrop::cpu
