// The choice of tokens for one sample.
#pragma once

#include "parallel.h"

namespace cdrop::cpu {

// Orders tokens by score: descending, equal scores in the order they had, NaN last. A stable radix
// sort over order-preserving keys.
class Sorter {
 public:
  explicit Sorter(int64_t tokens) : pairs_(tokens), other_(tokens) {}
  // `order[0..count)` holds token numbers; it is rearranged.
  void sort(const float* score, int32_t* order, int64_t count);

 private:
  struct Pair {
    uint32_t key;
    int32_t token;
  };
  Buffer<Pair> pairs_, other_;
};

// Chooses for sample `b`; `visual` and `textual` (or null) are its scores, adjacent. Fills
// `index[0..keep)` and, where wanted, `score[0..tokens)`.
void select_sample(const SelectParams& params, int64_t b, const float* visual, const float* textual,
                   int64_t* index, float* score);

// Turns the scores of sample `b` into relevances for a choice so diverse (above 0, up to 1), 1 for
// the best and less by its place: in place, 0 for invalid tokens.
void relevance_of_places(const SelectParams& params, int64_t b, double diversity, float* score);

}  // namespace cdrop::cpu
