// The flagship: four parallel steps over the parts of the other kernels.
#include <optional>

#include "merge.h"
#include "saliency.h"
#include "select.h"

namespace cdrop::cpu {

void select_merge(const SaliencyParams& visual, const SaliencyParams& textual, SelectParams select,
                  MergeParams merge, const Threads& threads) {
  const int64_t n = select.tokens, keep = select.keep;
  const SaliencyWork of_image(visual);
  std::optional<SaliencyWork> of_text;
  if (textual.q.data != nullptr) of_text.emplace(textual);

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

  // 2. Per sample: ranks, the choice, and the vectors of the kept tokens.
  MergeWork work(merge);
  const Buffer<int64_t> index(select.batch * keep);
  for_each_task(threads, select.batch, 2 * n + work.prepare_scratch(),
                [&](int64_t b, float* scratch) {
                  of_image.combine(b, scratch);
                  if (of_text) of_text->combine(b, scratch + n);
                  select_sample(select, b, scratch, of_text ? scratch + n : nullptr,
                                &index[b * keep], nullptr);
                  work.prepare(b, &index[b * keep], scratch + 2 * n);
                });

  // 3. Where the dropped tokens go.
  for_each_task(threads, work.assign_tasks(), work.assign_scratch(),
                [&](int64_t task, float* scratch) { work.assign(task, scratch); });
  for (int64_t b = 0; b < select.batch; ++b) work.gather(b);

  // 4. The merged tokens.
  for_each_task(threads, work.merge_tasks(), work.merge_scratch(),
                [&](int64_t task, float* scratch) { work.merge(task, scratch); });
}

}  // namespace cdrop::cpu
