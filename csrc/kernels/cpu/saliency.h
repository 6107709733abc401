// attention_saliency as independent tasks, so that select_merge can run those of both its
// saliencies side by side.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace cdrop::cpu {

class SaliencyWork {
 public:
  // `samples`: how many run side by side, should that be more than the batch.
  explicit SaliencyWork(const SaliencyParams& params, int64_t samples = 1);

  int64_t tasks() const { return params_.batch * tasks_of_sample(); }
  int64_t scratch_floats() const {
    return attention_scratch(params_.keys, params_.width, heads_ * group_ * params_.rows, heads_);
  }
  // Each task leaves the sum over its rows; `combine` adds a sample's up in a fixed order.
  void run(int64_t task, float* scratch) const;
  void combine(int64_t sample, float* out) const;

 private:
  int64_t tasks_of_sample() const { return (params_.key_heads + heads_ - 1) / heads_ * parts_; }
  int64_t tokens() const { return params_.keys - params_.prefix; }
  // A maximum is over the rows of one head: parts of a head are combined by it, heads are added.
  bool parts_by_max() const { return params_.reduce == Reduce::kMax && params_.query_heads == 1; }

  SaliencyParams params_;
  int64_t group_;         // query heads of a key head
  int64_t heads_;         // key heads of a task; more than 1 only with one part
  int64_t part_rows_;     // rows of a task
  int64_t parts_;         // tasks of a key head
  Buffer<float> weight_;  // [B, M]: shares of the query weights for a mean, else the weights
  Buffer<float> partial_;
};

}  // namespace cdrop::cpu
