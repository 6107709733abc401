// The inner loops that are compiled once per instruction set, and their arguments.
//
// The simd_*.cpp are built several times with different flags, so they must not instantiate
// anything of the standard library that another file also uses: the linker would keep one copy, and
// that one might need instructions this processor lacks. Plain pointers only.
#pragma once

#include "../params.h"

namespace cdrop::cpu {

constexpr int64_t kTokenBlock = 4;   // tokens the nearest-slot kernel takes at once
constexpr int64_t kSlotBlock = 64;   // slots are padded to a multiple
constexpr int64_t kMaxRowBlock = 8;  // query rows the attention kernel takes at once, at most
constexpr int64_t kMaxTaskHeads = 8;
constexpr int kMergeSweep = 4;       // rows the merge kernel adds at once
constexpr int64_t kScratchPad = 32;  // room past the last key for a whole vector

// Rows of some query heads of one or a few key heads of one sample, against all keys.
struct AttentionTask {
  const void* q;  // first head of the task, row 0
  const void* k;  // first key head of the task, key 0
  DType dtype;
  int64_t q_head_stride, q_row_stride, k_head_stride, k_row_stride;
  int64_t rows;                // M, the rows of one head
  int64_t key_heads;           // at most kMaxTaskHeads; more than 1 only if group_rows <= row_block
  int64_t group_rows;          // rows of all the query heads of one key head
  int64_t row_begin, row_end;  // of the heads' rows one after another: head r / M, row r % M
  int64_t keys, width, prefix;
  float scale;
  bool causal;
  Reduce reduce;
  const float* lse;  // of the first head, or null
  int64_t lse_head_stride, lse_row_stride;
  const uint8_t* key_valid;  // of key `valid_from` on, or null
  int64_t valid_stride, valid_from;
  const float* weight;  // [rows]; rows of weight 0 are skipped
  // Factors on the products of each key and of each row, or both null.
  const float *key_factor, *row_factor;
  float* scratch;  // attention_scratch floats
  float* out;      // [keys - prefix], written: the sum over the task's heads and rows
};

// The vectors that say which tokens of one sample are alike: the mean over heads of its rows.
struct MetricRows {
  const void* data;
  DType dtype;
  int64_t heads, head_stride, row_stride, width;
};

// The most similar of some slots, for some tokens of one sample.
struct NearestTask {
  MetricRows metric;
  const float* slots;  // [width][padded]: unit vectors, transposed
  const float* bias;   // [padded]: 0, or -inf past the last slot
  int64_t padded;
  const int32_t* joining;  // the tokens
  int64_t count;
  float threshold;  // tokens below it get -1
  bool always;      // no threshold: where nothing compares (NaN), the first slot
  float* scratch;   // kTokenBlock * width floats
  int32_t* out;     // [count], number of the slot in the order of `slots`
};

// One slot of the merge.
struct MergeTask {
  const void* x;  // of the sample
  DType dtype;
  int64_t row_stride, width;
  int64_t own;
  float own_weight;
  const int32_t* joined;  // ascending, weight > 0
  int64_t count;
  const float* weight;  // of the sample, or null: all 1
  int64_t weight_stride;
  float blend;
  int64_t ahead[kMergeSweep];  // tokens whose rows are wanted next, to fetch meanwhile
  float* scratch;              // width floats
  void* out;                   // [width]
};

// Products of a few vectors with some rows of one sample. Each is summed in an order that depends
// on the width alone, so equal rows have equal products, whatever stands beside them.
struct DotsTask {
  const void* rows;  // the first of them
  DType dtype;
  int64_t row_stride, width;
  int64_t count;
  const float* power;  // [count]: factor on each row, a power of two
  const float* q;      // [queries][padded(width, kScratchPad)], as `widen` leaves them
  int64_t queries;     // 1, or a multiple of kDotQueries
  float* out;          // [queries][out_stride]
  int64_t out_stride;
};
constexpr int64_t kDotQueries = 4;  // vectors the dots kernel takes at once

// Some columns of a new row of a Cholesky factor of cosines: the cosines with the token of the row,
// less what the earlier rows explain, over the root of what they leave of the token itself.
struct CholeskyRowTask {
  const float* product;   // [count]: of the vectors with that of the row
  const double* inverse;  // [count]: one over their lengths
  double row_inverse;     // and over that of the row's
  const float* rows;      // the first of the earlier rows
  int64_t row_stride;
  const double* at_row;  // [steps]: the earlier rows at the token of the row
  int64_t steps;
  double root;
  int64_t count;
  float* row;        // [count], written
  double* residual;  // [count]: less the squares of the row
};

// The largest of `worth * residual`, 0 for residuals up to `floor`, where `worth` is no less than
// 0.
struct BestGainTask {
  const double *worth, *residual;  // [count]
  double floor;
  int64_t count;
};
struct BestGain {
  int64_t at = -1;  // the first of them; -1 where there is none
  double gain = 0.0;
};

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A row of `width` elements in units of `per`, an even number of them.
inline int64_t row_units(int64_t width, int64_t per) { return padded((width + per - 1) / per, 2); }

inline int64_t logits_stride(int64_t keys) { return padded(keys, kScratchPad) + kScratchPad; }

// Rows of logits that a key head of a task has room for: a single row is taken by itself, more are
// taken as a whole block however many of it are used.
inline int64_t task_rows(int64_t rows, int64_t key_heads) {
  return key_heads > 1 && rows == key_heads ? 1 : kMaxRowBlock;
}

inline int64_t attention_scratch(int64_t keys, int64_t width, int64_t rows, int64_t key_heads) {
  const int64_t row = padded(width, kScratchPad);
  const int64_t head = kMaxRowBlock * row + task_rows(rows, key_heads) * logits_stride(keys);
  return padded(keys, kScratchPad) + row + key_heads * head;
}

struct SimdKernels {
  const char* name;
  int64_t row_block;  // query rows `attention` takes at once, at most kMaxRowBlock
  void (*attention)(const AttentionTask&);
  // Unit vectors of `tokens`, transposed into `slots` [width][padded] (columns past `count` zero).
  void (*slot_vectors)(const MetricRows&, const int32_t* tokens, int64_t count, float* slots,
                       int64_t padded, float* scratch);
  void (*nearest)(const NearestTask&);
  void (*merge)(const MergeTask&);
  void (*dots)(const DotsTask&);
  // The largest absolute value of a row; NaN where an element is NaN or infinite.
  float (*largest)(const void* row, DType dtype, int64_t width);
  // to[c] = factor * row[c], with zeros from `width` to the next multiple of kScratchPad.
  void (*widen)(const void* row, DType dtype, int64_t width, float factor, float* to);
  // The same in the type of the row, without the zeros.
  void (*rescale)(const void* row, DType dtype, int64_t width, float factor, void* to);
  void (*cholesky_row)(const CholeskyRowTask&);
  BestGain (*best_gain)(const BestGainTask&);
};

#ifdef CDROP_SIMD
// Those of simd_dots.cpp, compiled for the instruction set of this file.
namespace CDROP_SIMD {
void dots(const DotsTask& task);
float largest(const void* row, DType dtype, int64_t width);
void widen(const void* row, DType dtype, int64_t width, float factor, float* to);
void rescale(const void* row, DType dtype, int64_t width, float factor, void* to);
void cholesky_row(const CholeskyRowTask& task);
BestGain best_gain(const BestGainTask& task);
}  // namespace CDROP_SIMD
#endif

extern const SimdKernels kBaselineKernels;
#ifdef CDROP_X86
extern const SimdKernels kAvx2Kernels;
extern const SimdKernels kAvx512Kernels;
extern const SimdKernels kAvx512Bf16Kernels;
#endif
// The best this processor runs; CDROP_CPU_CAPABILITY lowers it (for tests).
const SimdKernels& simd();

}  // namespace cdrop::cpu
