// How a call of select_merge is laid out on a device: a pure function of sizes, so that it is
// tested where there is no GPU.
#pragma once

#include "../params.h"

namespace cdrop::cuda {

constexpr int kThreads = 512, kWarps = kThreads / 32;
// Width limits of the kernel: a head is held in registers, 32 elements of each of four steps.
constexpr int64_t kMaxHeadWidth = 128;
// Tokens and slots are numbered in 16 bits.
constexpr int64_t kMaxTokens = 65000;

struct DeviceLimits {
  int capability = 0;        // 10 * major + minor
  int processors = 0;        // multiprocessors
  int64_t shared_bytes = 0;  // of a block, opted in
  int max_cluster = 1;       // blocks of a cluster, non-portable sizes included
};

enum class Path : int32_t { kNone, kCluster, kGrid };

// Byte offsets in a block's dynamic shared memory, or in its part of the workspace.
struct Layout {
  // What other blocks of the sample read, and write by atomics. Relative to the area of the block.
  uint32_t maxima, sums, saliency, fused, slots_out, metric, peer_bytes;
  // Shared memory of the block alone: first what lives through several phases.
  uint32_t peers;  // where that area begins, if it is in shared memory
  uint32_t scratch, histogram, own, slots;
  // Then what the phases put in the same place.
  uint32_t visual_logits, textual_logits, factors, head_sums;
  uint32_t keys, places;
  uint32_t stage, best;
  uint32_t order, counters, starts, fragments;
};

struct LaunchPlan {
  Path path = Path::kNone;
  const char* reason = nullptr;                 // why there is no path
  int ranks = 0;                                // blocks that share a sample
  int groups = 0;                               // samples at a time
  int tokens = 0, prefix = 0;                   // of a rank
  int rows = 0;                                 // query rows of all heads, both sides
  int visual_columns = 0, textual_columns = 0;  // of a row of logits, padding included
  int columns = 0;                              // of x, of a rank
  int block_columns = 0;                        // of those, at a time
  int segment = 0;                              // sorted tokens of a piece of a sum
  int stage_targets = 0, metric_stride = 0;
  bool prefetch = false;  // x into the L2 cache while the saliencies are computed
  int64_t shared_bytes = 0, workspace_bytes = 0;
  Layout at{};
};

LaunchPlan plan_select_merge(const SelectMergeParams& params, const DeviceLimits& device);

}  // namespace cdrop::cuda
