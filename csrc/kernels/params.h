// What the kernels of every device take: raw pointers, sizes and strides (in elements). No torch.
#pragma once

#include <cstdint>

// nvcc compiles the small functions for the device too.
#ifdef __CUDACC__
#define CDROP_BOTH __host__ __device__
#else
#define CDROP_BOTH
#endif

namespace cdrop {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };
enum class Reduce : int32_t { kMean, kMax };
enum class Objective : int32_t { kMaxmin, kDpp };
enum class Fusion : int32_t { kRank, kRrf, kSum, kZscore, kProduct, kMax };

// A strided view of up to three leading dimensions over rows whose elements are adjacent.
struct Rows {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[3] = {0, 0, 0};  // [B, H, row] for queries and keys; [B, row, unused] for tokens
};

// A small two-dimensional input, absent when `data` is null.
template <typename T>
struct Matrix {
  const T* data = nullptr;
  int64_t stride[2] = {0, 0};
  CDROP_BOTH explicit operator bool() const { return data != nullptr; }
  CDROP_BOTH const T& at(int64_t i, int64_t j) const { return data[i * stride[0] + j * stride[1]]; }
};

// attention_saliency: q [B, Hq, M, d], k [B, Hk, P+N, d].
struct SaliencyParams {
  Rows q, k;
  int64_t batch = 0, query_heads = 0, key_heads = 0, rows = 0, keys = 0, width = 0;
  int64_t prefix = 0;
  float scale = 1.0f;
  bool causal = false;
  Reduce reduce = Reduce::kMean;
  const float* lse = nullptr;  // [B, Hq, M], absent when null
  int64_t lse_stride[3] = {0, 0, 0};
  Matrix<uint8_t> key_valid;  // [B, P+N - valid_from]: keys before `valid_from` are all valid
  int64_t valid_from = 0;
  Matrix<float> query_weight;  // [B, M]
  // Factors on the products of each key [B, P+N] and each row [B, M], adjacent, or both null.
  const float *key_factor = nullptr, *row_factor = nullptr;
};

// attention_saliency.varlen: q [T, Hq, d], k [T, Hk, d], cu_seqlens [S+1] -> [T].
struct PackedSaliencyParams {
  SaliencyParams all;  // strides as of one sample [1, H, T, d]; its sizes of rows and keys unused
  const int64_t* starts = nullptr;  // [sequences + 1]
  int64_t sequences = 0;
};

// similarity_saliency: text [B, T, D], visual [B, N, D] -> [B, N].
struct SimilarityParams {
  Rows text, visual;
  int64_t batch = 0, rows = 0, tokens = 0, width = 0;
  double temperature = 0.01;
  Matrix<uint8_t> text_valid, visual_valid;
  Reduce reduce = Reduce::kMax;
};

// adaptive_split_select: visual, textual [B, N] -> index [B, K], split [B].
struct SplitParams {
  Matrix<float> visual, textual;
  int64_t batch = 0, tokens = 0, keep = 0;
  double reserve = 0.25;
  Matrix<uint8_t> valid;
  int64_t *index = nullptr, *split = nullptr;
};

// greedy_diverse_select: features [B, N, F] -> index [B, K].
struct DiverseParams {
  Rows features;
  int64_t batch = 0, tokens = 0, width = 0, keep = 0;
  Objective objective = Objective::kMaxmin;
  Matrix<float> relevance;
  Matrix<uint8_t> valid;
  int64_t* index = nullptr;
};

// consensus_select: visual, textual [B, N] -> index [B, K], score [B, N] (both contiguous).
struct SelectParams {
  Matrix<float> visual, textual;
  int64_t batch = 0, tokens = 0, keep = 0;
  float visual_share = 0.5f, textual_share = 0.5f;  // 1 - alpha and alpha
  Fusion fusion = Fusion::kRank;
  Matrix<uint8_t> valid;
  Matrix<float> priority;
  int64_t priority_keep = 0;
  int64_t* index = nullptr;
  float* score = nullptr;  // not wanted when null
};

// token_merge: x [B, N, D], index [B, K] -> tokens [B, K+C, D], assign [B, N], size [B, K+C].
struct MergeParams {
  Rows x;
  Rows metric;               // [B, (heads,) N, F]; its stride[1] is that of the heads
  int64_t metric_heads = 1;  // the metric is the mean over them
  int64_t metric_width = 0;
  int64_t batch = 0, tokens = 0, width = 0, keep = 0, contextual = 0;
  Matrix<float> weight;
  Matrix<uint8_t> valid;
  float threshold = -1.0f, blend = 1.0f;
  Matrix<int64_t> index;
  void* out_tokens = nullptr;
  int64_t* out_index = nullptr;  // [B, K+C], the own token of each slot; not wanted when null
  int64_t* out_assign = nullptr;
  float* out_size = nullptr;
};

// select_merge: both saliencies over the tokens that `select.valid` leaves, the choice, the merge.
struct SelectMergeParams {
  SaliencyParams visual, textual;
  bool has_text = false;
  SelectParams select;     // without its lists and outputs
  double diversity = 0.0;  // above 0 the consensus is the relevance of a diverse choice
  MergeParams merge;       // without its index list
};

}  // namespace cdrop
