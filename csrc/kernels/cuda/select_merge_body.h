// select_merge as the blocks of one launch run it.
//
// Every block owns a slice of the tokens until the merge, where it owns a slice of the columns of
// `x`. Between phases the blocks of a sample meet; what they tell each other lies in the area that
// `Group::peer(rank)` gives: shared memory of the cluster, or a workspace in the L2 cache.
//
//   logits, metric | maxima | sums | saliency | places, fused keys | choice, nearest | merge
#pragma once

#include "choice_phase.h"
#include "merge_phase.h"
#include "saliency_phase.h"

namespace cdrop::cuda {

template <class Group>
CDROP_DEVICE void select_merge_body(Group& group, const SelectMergeParams& params,
                                    const LaunchPlan& plan, int64_t first_sample) {
  const int64_t sample = first_sample + group.group();
  const Context<Group> c(group, params, plan, sample);
  const bool here = sample < params.merge.batch;  // else the block only waits with the others
  if (here) reset(c);
  group.arrive();  // the tables are clear before others add to them
  if (here) {
    if (plan.prefetch) prefetch(c);
    metric(c);
    logits(c, params.visual, 0);
    if (params.has_text) logits(c, params.textual, 1);
    group.sync();
  }
  group.wait();
  if (params.visual.lse == nullptr || (params.has_text && params.textual.lse == nullptr)) {
    if (here) row_maxima(c);
    group.sync_group();
    if (here) row_sums(c);
    group.sync_group();
  }
  if (here) saliency(c);
  group.sync_group();
  if (here) fuse(c);
  group.sync_group();
  if (here) {
    choose(c);
    nearest(c);
  }
  group.sync_group();
  if (here) collect_slots(c);
  // No block of a cluster leaves while another reads its shared memory.
  if constexpr (Group::kAreasEnd) group.arrive();
  if (here) merge(c);
  if constexpr (Group::kAreasEnd) group.wait();
}

}  // namespace cdrop::cuda
