// The CPU kernels: each takes its parameters and the threads to run on, and may throw only
// std::bad_alloc.
#pragma once

#include <functional>

#include "../params.h"

namespace cdrop::cpu {

// How a caller lends its thread pool: `run(n, body)` calls `body(begin, end)` over parts of [0, n).
struct Threads {
  int64_t count = 1;
  std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)> run;
};

// Which instruction set the vector code was chosen for: "avx512", "avx2" or "baseline".
const char* capability();

void attention_saliency(const SaliencyParams& params, float* out, const Threads& threads);
void attention_saliency_varlen(const PackedSaliencyParams& params, float* out,
                               const Threads& threads);
void similarity_saliency(const SimilarityParams& params, float* out, const Threads& threads);
void adaptive_split_select(const SplitParams& params, const Threads& threads);
void greedy_diverse_select(const DiverseParams& params, const Threads& threads);
void consensus_select(const SelectParams& params, const Threads& threads);
void token_merge(const MergeParams& params, const Threads& threads);
// The parts above in one call.
void select_merge(const SelectMergeParams& params, const Threads& threads);

}  // namespace cdrop::cpu
