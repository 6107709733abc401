// The flagship: four parallel steps over the parts of the other kernels, and the greedy loop
// between them where the choice is to be diverse.
#include <optional>

#include "measure.h"
#include "merge.h"
#include "saliency.h"
#include "select.h"

namespace cdrop::cpu {
namespace {

constexpr int64_t kBlock = 64;  // tokens whose heads a task takes the mean of

// The mean over heads of some tokens' metric, `to` [count, F].
void head_mean(const MergeParams& p, int64_t b, int64_t first, float* scratch, float* to) {
  const int64_t width = p.metric_width, size = p.metric.dtype == DType::kFloat32 ? 4 : 2;
  const auto* data = static_cast<const char*>(p.metric.data);
  const auto heads = static_cast<float>(p.metric_heads);
  for (int64_t i = first; i < std::min(first + kBlock, p.tokens); ++i, to += width) {
    std::fill_n(to, width, 0.0f);
    for (int64_t h = 0; h < p.metric_heads; ++h) {
      const int64_t at = b * p.metric.stride[0] + h * p.metric.stride[1] + i * p.metric.stride[2];
      simd().widen(data + at * size, p.metric.dtype, width, 1.0f, scratch);
      for (int64_t c = 0; c < width; ++c) to[c] += scratch[c];
    }
    for (int64_t c = 0; c < width; ++c) to[c] /= heads;
  }
}

}  // namespace

void select_merge(const SelectMergeParams& params, const Threads& threads) {
  const SelectParams& select = params.select;
  MergeParams merge = params.merge;
  const int64_t n = select.tokens, keep = select.keep, batch = select.batch;
  const SaliencyWork of_image(params.visual);
  std::optional<SaliencyWork> of_text;
  if (params.has_text) of_text.emplace(params.textual);

  // 1. Both saliencies, head by head. The question's tasks are the larger: they go first.
  const int64_t text_tasks = of_text ? of_text->tasks() : 0;
  int64_t scratch_floats = of_image.scratch_floats();
  if (of_text) scratch_floats = std::max(scratch_floats, of_text->scratch_floats());
  for_each_task(threads, text_tasks + of_image.tasks(), scratch_floats,
                [&](int64_t task, float* scratch) {
                  if (task < text_tasks) {
                    of_text->run(task, scratch);
                  } else {
                    of_image.run(task - text_tasks, scratch);
                  }
                });

  // 2. Per sample: ranks and the choice; then the vectors of the kept tokens.
  const Buffer<int64_t> index(batch * keep);
  const auto choose = [&](int64_t b, float* scratch, float* score) {
    of_image.combine(b, scratch);
    if (of_text) of_text->combine(b, scratch + n);
    select_sample(select, b, scratch, of_text ? scratch + n : nullptr, &index[b * keep], score);
  };
  Buffer<float> means;
  if (params.diversity > 0.0) {
    const int64_t width = merge.metric_width, blocks = (n + kBlock - 1) / kBlock;
    if (merge.metric_heads > 1) {
      means = Buffer<float>(batch * n * width);
      for_each_task(threads, batch * blocks, padded(width, kScratchPad),
                    [&](int64_t task, float* scratch) {
                      const int64_t b = task / blocks, first = task % blocks * kBlock;
                      head_mean(params.merge, b, first, scratch, &means[(b * n + first) * width]);
                    });
      merge.metric = {means.get(), DType::kFloat32, {n * width, 0, width}};
      merge.metric_heads = 1;
    }
    const Buffer<float> relevance(batch * n);
    for_each_task(threads, batch, 2 * n, [&](int64_t b, float* scratch) {
      choose(b, scratch, &relevance[b * n]);
      relevance_of_places(select, b, params.diversity, &relevance[b * n]);
    });
    DiverseParams diverse;
    diverse.features = {
        merge.metric.data, merge.metric.dtype, {merge.metric.stride[0], merge.metric.stride[2], 0}};
    diverse.batch = batch;
    diverse.tokens = n;
    diverse.width = width;
    diverse.keep = keep;
    diverse.objective = Objective::kDpp;
    diverse.relevance = {relevance.get(), {n, 1}};
    diverse.valid = select.valid;
    diverse.index = index.get();
    greedy_diverse_select(diverse, threads);
  }
  MergeWork work(merge);
  for_each_task(threads, batch, 2 * n + work.prepare_scratch(), [&](int64_t b, float* scratch) {
    if (params.diversity == 0.0) choose(b, scratch, nullptr);
    work.prepare(b, &index[b * keep], scratch + 2 * n);
  });

  // 3. Where the dropped tokens go.
  for_each_task(threads, work.assign_tasks(), work.assign_scratch(),
                [&](int64_t task, float* scratch) { work.assign(task, scratch); });
  for (int64_t b = 0; b < batch; ++b) work.gather(b);

  // 4. The merged tokens.
  for_each_task(threads, work.merge_tasks(), work.merge_scratch(),
                [&](int64_t task, float* scratch) { work.merge(task, scratch); });
}

}  // namespace cdrop::cpu
