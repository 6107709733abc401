// token_merge in the phases that select_merge shares.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace cdrop::cpu {

class MergeWork {
 public:
  explicit MergeWork(const MergeParams& params);

  // 1. Per sample: who keeps a slot, who must find one, and the slots' unit vectors.
  int64_t prepare_scratch() const { return params_.metric_width; }
  void prepare(int64_t sample, const int64_t* index, float* scratch);
  // 2. Per block of tokens: the slot each dropped token joins.
  int64_t assign_tasks() const { return params_.batch * blocks_; }
  int64_t assign_scratch() const { return kTokenBlock * params_.metric_width; }
  void assign(int64_t task, float* scratch);
  // 3. Per sample: slot numbers, sizes, and each slot's tokens in ascending order.
  void gather(int64_t sample);
  // 4. Per few slots and stretch of columns: the merged tokens. Each row of x is read once.
  int64_t merge_tasks() const { return params_.batch * slot_groups_ * stretches_; }
  int64_t merge_scratch() const { return kStretch; }
  void merge(int64_t task, float* scratch) const;

 private:
  static constexpr int64_t kBlock = 64;      // tokens of an assign task
  static constexpr int64_t kStretch = 4096;  // columns of a merge task
  static constexpr int64_t kSlotsTogether = 4;

  MetricRows metric(int64_t sample) const;
  void merge_slot(int64_t sample, int64_t slot, int64_t column, int64_t next_slot,
                  float* scratch) const;
  float weight(int64_t sample, int64_t token) const {
    return params_.weight ? params_.weight.at(sample, token) : 1.0f;
  }

  MergeParams params_;
  int64_t slots_, targets_, padded_, blocks_, slot_groups_, stretches_;
  Buffer<int64_t> own_;                   // [B, slots]: token of each slot, -1 where unused
  Buffer<int32_t> target_, target_slot_;  // [B, targets]: tokens that may be joined, ascending
  Buffer<int32_t> target_count_;          // [B]
  Buffer<float> vectors_, bias_;          // [B, F, padded], [B, padded]
  Buffer<int32_t> joining_, found_;       // [B, N]: dropped tokens, and the target each joins
  Buffer<int32_t> joining_count_;         // [B]
  Buffer<int32_t> member_, member_from_;  // [B, N], [B, slots + 1]: tokens by slot
};

}  // namespace cdrop::cpu
