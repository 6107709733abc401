#include "plan.h"

#include <algorithm>

namespace cdrop::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

// Hands out offsets, each on a 16-byte boundary.
class Packer {
 public:
  explicit Packer(int64_t at = 0) : at_(at) {}
  uint32_t take(int64_t bytes) {
    const int64_t here = at_;
    at_ += round_up(bytes, 16);
    return static_cast<uint32_t>(here);
  }
  int64_t end() const { return at_; }

 private:
  int64_t at_;
};

// The plan for `ranks` blocks a sample; its shared memory may be more than there is.
LaunchPlan lay_out(const SelectMergeParams& p, Path path, int64_t ranks) {
  const int64_t tokens = p.merge.tokens, slots = p.merge.keep + p.merge.contextual;
  const int64_t visual_rows = p.visual.query_heads * p.visual.rows;
  const int64_t textual_rows = p.has_text ? p.textual.query_heads * p.textual.rows : 0;
  const int64_t heads = p.visual.query_heads + (p.has_text ? p.textual.query_heads : 0);

  LaunchPlan plan;
  plan.path = path;
  plan.ranks = static_cast<int>(ranks);
  const int64_t n = round_up(ceil_div(tokens, ranks), 8);
  plan.tokens = static_cast<int>(n);
  plan.prefix = static_cast<int>(ceil_div(p.visual.prefix, ranks));
  plan.rows = static_cast<int>(visual_rows + textual_rows);
  // An odd number of words, so that the rows of a column lie in different banks.
  plan.visual_columns = static_cast<int>(round_up(plan.prefix + n, 8) + 1);
  plan.textual_columns = static_cast<int>(n + 1);
  plan.columns = static_cast<int>(round_up(ceil_div(p.merge.width, ranks), 32));
  plan.block_columns = std::min(plan.columns, 128);
  // Pieces of a sum such that every thread has one of eight columns, and none a second one.
  const int64_t pieces = std::max<int64_t>(1, kThreads / (plan.block_columns / 8));
  plan.segment = static_cast<int>(std::max<int64_t>(8, round_up(ceil_div(tokens, pieces), 4)));
  // Rows of the metric end 4 words past a multiple of 8: fragments of 8 rows meet no bank twice.
  plan.metric_stride = static_cast<int>(round_up(p.merge.metric_width, 8) + 4);
  plan.stage_targets = static_cast<int>(
      std::clamp<int64_t>(32768 / (4 * plan.metric_stride) / 8 * 8, 8, round_up(slots, 8)));

  Packer peer;
  plan.at.maxima = peer.take(4 * ceil_div(plan.rows, ranks));
  plan.at.sums = peer.take(8 * ceil_div(plan.rows, ranks));
  plan.at.saliency = peer.take(4 * 2 * n);
  plan.at.fused = peer.take(8 * n);
  plan.at.slots_out = peer.take(4 * n);
  plan.at.metric = peer.take(4 * n * plan.metric_stride);
  plan.at.peer_bytes = static_cast<uint32_t>(round_up(peer.end(), 128));

  Packer all;
  plan.at.peers = all.take(path == Path::kCluster ? plan.at.peer_bytes : 0);
  plan.at.scratch = all.take(8 * 64);
  plan.at.histogram = all.take(4 * 256);
  plan.at.own = all.take(4 * slots);
  plan.at.slots = all.take(2 * tokens);
  const int64_t arena = all.end();

  // Before the choice there is nothing in what lives through the phases after it.
  Packer saliency(plan.at.scratch);
  plan.at.visual_logits = saliency.take(4 * visual_rows * plan.visual_columns);
  plan.at.textual_logits = saliency.take(4 * textual_rows * plan.textual_columns);
  plan.at.factors = saliency.take(4 * plan.rows);
  plan.at.head_sums = saliency.take(4 * heads * n);
  Packer choice(arena);
  plan.at.keys = choice.take(8 * tokens);  // two lists of 32 bits, then one of 64
  plan.at.places = choice.take(4 * 2 * n);
  Packer nearest(arena);
  plan.at.stage = nearest.take(4 * static_cast<int64_t>(plan.stage_targets) * plan.metric_stride);
  plan.at.best = nearest.take(8 * n);
  Packer merge(arena);
  const int64_t segments = ceil_div(tokens, plan.segment);
  plan.at.order = merge.take(2 * tokens);
  plan.at.counters = merge.take(2 * kWarps * slots);
  plan.at.starts = merge.take(4 * (slots + 1));
  plan.at.fragments = merge.take(4 * 2 * segments * plan.block_columns);
  plan.shared_bytes = std::max({saliency.end(), choice.end(), nearest.end(), merge.end()});
  return plan;
}

const char* unsupported(const SelectMergeParams& p) {
  if (p.visual.width > kMaxHeadWidth || (p.has_text && p.textual.width > kMaxHeadWidth)) {
    return "a head is wider than 128";
  }
  if (p.diversity > 0.0) return "a diverse choice is asked for";
  if (p.merge.tokens > kMaxTokens) return "there are more than 65000 tokens";
  if (p.merge.keep + p.merge.contextual > kMaxTokens) return "there are more than 65000 slots";
  if (p.visual.rows * p.visual.query_heads > (1 << 20) ||
      (p.has_text && p.textual.rows * p.textual.query_heads > (1 << 20))) {
    return "there are more than 2^20 query rows";
  }
  return nullptr;
}

}  // namespace

LaunchPlan plan_select_merge(const SelectMergeParams& params, const DeviceLimits& device) {
  LaunchPlan none;
  none.reason = unsupported(params);
  if (none.reason == nullptr && device.capability < 80) {
    none.reason = "the device is older than compute capability 8.0";
  }
  if (none.reason != nullptr) return none;
  const int64_t batch = std::max<int64_t>(1, params.merge.batch);
  // A rank without tokens would only wait for the others.
  const int64_t useful =
      std::min<int64_t>(std::max<int64_t>(1, (params.merge.tokens + 7) / 8), device.processors);
  const auto fits = [&](const LaunchPlan& plan) {
    return plan.shared_bytes <= device.shared_bytes;
  };

  // A cluster a sample, of the largest power of two that leaves no sample waiting, or the smallest
  // whose blocks hold their part.
  LaunchPlan cluster = none;
  if (device.capability >= 90) {
    int64_t ranks = 1;
    while (2 * ranks <= device.max_cluster && 2 * ranks * batch <= device.processors &&
           2 * ranks <= useful) {
      ranks *= 2;
    }
    for (; ranks <= device.max_cluster; ranks *= 2) {
      const LaunchPlan plan = lay_out(params, Path::kCluster, ranks);
      if (!fits(plan)) continue;
      cluster = plan;
      cluster.groups = static_cast<int>(batch);
      break;
    }
  }
  // A few samples that clusters can't spread over the device: all its blocks, and grid barriers.
  LaunchPlan grid = none;
  const int64_t spread = std::clamp<int64_t>(device.processors / batch, 1, useful);
  if (cluster.path == Path::kNone || spread >= 2 * cluster.ranks) {
    for (int64_t ranks = spread; ranks <= useful; ++ranks) {
      const LaunchPlan plan = lay_out(params, Path::kGrid, ranks);
      if (!fits(plan)) continue;
      grid = plan;
      grid.groups = static_cast<int>(std::min(batch, device.processors / ranks));
      grid.workspace_bytes = static_cast<int64_t>(grid.groups) * grid.ranks * grid.at.peer_bytes;
      break;
    }
  }
  LaunchPlan plan = grid.path != Path::kNone ? grid : cluster;
  if (plan.path == Path::kNone) {
    plan.reason =
        "its logits, or the keys of its tokens, don't fit the shared memory of the device";
    return plan;
  }
  // Small enough that what is fetched early is still there when it is wanted.
  const int64_t element = params.merge.x.dtype == DType::kFloat32 ? 4 : 2;
  plan.prefetch = plan.groups * params.merge.tokens * params.merge.width * element <= (16 << 20);
  return plan;
}

}  // namespace cdrop::cuda
