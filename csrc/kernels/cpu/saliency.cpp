#include "saliency.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace cdrop::cpu {

SaliencyWork::SaliencyWork(const SaliencyParams& params, int64_t samples)
    : params_(params), group_(params.query_heads / params.key_heads) {
  // How much one task takes depends on the shape alone, never on the number of threads: that keeps
  // the result the same to the bit. Few heads of many rows are split by rows (for the maximum over
  // each of several heads, into whole heads); many heads of few rows are taken together.
  const int64_t group_rows = group_ * params.rows;
  const bool whole_heads = params.reduce == Reduce::kMax && !parts_by_max();
  const int64_t unit = whole_heads ? params.rows : kMaxRowBlock;
  const int64_t units = (group_rows + unit - 1) / unit;
  const int64_t all_heads =
      std::max<int64_t>(1, std::max(params.batch, samples) * params.key_heads);
  const int64_t wanted = std::clamp<int64_t>(64 / all_heads, 1, 8);
  const int64_t per_part = (units + wanted - 1) / wanted;
  part_rows_ = per_part * unit;
  parts_ = (units + per_part - 1) / per_part;
  heads_ = 1;
  if (group_rows <= simd().row_block) {
    parts_ = 1;
    part_rows_ = group_rows;
    const int64_t most =
        std::min({kMaxTaskHeads, 4 * simd().row_block / group_rows, params.key_heads});
    // Only where the rows of one head lie pages apart.
    const int64_t size = params.k.dtype == DType::kFloat32 ? 4 : 2;
    if (params.k.stride[2] * size >= 2048) heads_ = std::clamp<int64_t>(all_heads / 8, 1, most);
  }
  partial_ = Buffer<float>(tasks() * tokens());

  // In float64, where no sum of float32 weights overflows or vanishes.
  weight_ = Buffer<float>(params.batch * params.rows);
  for (int64_t b = 0; b < params.batch; ++b) {
    double total = 0.0;
    const auto weight = [&](int64_t m) {
      return params.query_weight ? params.query_weight.at(b, m) : 1.0f;
    };
    for (int64_t m = 0; m < params.rows; ++m) total += static_cast<double>(weight(m));
    for (int64_t m = 0; m < params.rows; ++m) {
      const double w = static_cast<double>(weight(m));
      const bool mean = params.reduce == Reduce::kMean && w > 0.0;
      weight_[b * params.rows + m] = static_cast<float>(mean ? w / total : w);
    }
  }
}

void SaliencyWork::run(int64_t task, float* scratch) const {
  const SaliencyParams& p = params_;
  const int64_t b = task / tasks_of_sample();
  const int64_t part = task % parts_;
  const int64_t key_head = task % tasks_of_sample() / parts_ * heads_;
  const int64_t size = p.q.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t q_at = b * p.q.stride[0] + key_head * group_ * p.q.stride[1];
  const int64_t k_at = b * p.k.stride[0] + key_head * p.k.stride[1];

  AttentionTask t{};
  t.q = static_cast<const char*>(p.q.data) + q_at * size;
  t.k = static_cast<const char*>(p.k.data) + k_at * size;
  t.dtype = p.q.dtype;
  t.q_head_stride = p.q.stride[1];
  t.q_row_stride = p.q.stride[2];
  t.k_head_stride = p.k.stride[1];
  t.k_row_stride = p.k.stride[2];
  t.rows = p.rows;
  t.key_heads = std::min(heads_, p.key_heads - key_head);
  t.group_rows = group_ * p.rows;
  t.row_begin = part * part_rows_;
  t.row_end = std::min(t.row_begin + part_rows_, t.group_rows);
  if (heads_ > 1) t.row_end = t.key_heads * t.group_rows;
  t.keys = p.keys;
  t.width = p.width;
  t.prefix = p.prefix;
  t.scale = p.scale;
  t.causal = p.causal;
  t.reduce = p.reduce;
  if (p.lse != nullptr) {
    t.lse = p.lse + b * p.lse_stride[0] + key_head * group_ * p.lse_stride[1];
    t.lse_head_stride = p.lse_stride[1];
    t.lse_row_stride = p.lse_stride[2];
  }
  if (p.key_valid) {
    t.key_valid = &p.key_valid.at(b, 0);
    t.valid_stride = p.key_valid.stride[1];
    t.valid_from = p.valid_from;
  }
  t.weight = weight_.get() + b * p.rows;
  if (p.key_factor != nullptr) {
    t.key_factor = p.key_factor + b * p.keys;
    t.row_factor = p.row_factor + b * p.rows;
  }
  t.scratch = scratch;
  t.out = partial_.get() + task * tokens();
  simd().attention(t);
}

void SaliencyWork::combine(int64_t sample, float* out) const {
  const int64_t n = tokens();
  const int64_t per_sample = tasks_of_sample();
  const float* from = partial_.get() + sample * per_sample * n;
  std::copy(from, from + n, out);
  for (int64_t part = 1; part < per_sample; ++part) {
    const float* add = from + part * n;
    if (parts_by_max()) {  // where NaN wins
      for (int64_t i = 0; i < n; ++i) {
        if (add[i] > out[i] || std::isnan(add[i])) out[i] = add[i];
      }
      continue;
    }
    for (int64_t i = 0; i < n; ++i) out[i] += add[i];
  }
  const float share = 1.0f / static_cast<float>(params_.query_heads);
  for (int64_t i = 0; i < n; ++i) out[i] *= share;
}

void attention_saliency(const SaliencyParams& params, float* out, const Threads& threads) {
  const SaliencyWork work(params);
  const int64_t n = params.keys - params.prefix;
  for_each_task(threads, work.tasks(), work.scratch_floats(),
                [&](int64_t task, float* scratch) { work.run(task, scratch); });
  for (int64_t b = 0; b < params.batch; ++b) work.combine(b, out + b * n);
}

namespace {

// One sequence of a pack, as a sample of its own.
SaliencyParams sequence(const PackedSaliencyParams& params, int64_t number) {
  SaliencyParams p = params.all;
  const int64_t start = params.starts[number];
  const int64_t size = p.q.dtype == DType::kFloat32 ? 4 : 2;
  p.batch = 1;
  p.rows = p.keys = params.starts[number + 1] - start;
  p.q.data = static_cast<const char*>(p.q.data) + start * p.q.stride[2] * size;
  p.k.data = static_cast<const char*>(p.k.data) + start * p.k.stride[2] * size;
  if (p.lse != nullptr) p.lse += start * p.lse_stride[2];
  if (p.query_weight) p.query_weight.data += start * p.query_weight.stride[1];
  return p;
}

}  // namespace

void attention_saliency_varlen(const PackedSaliencyParams& params, float* out,
                               const Threads& threads) {
  std::vector<SaliencyWork> work;
  std::vector<int64_t> first{0}, number;  // the first task of each sequence that has tokens
  int64_t scratch_floats = 0;
  for (int64_t s = 0; s < params.sequences; ++s) {
    if (params.starts[s + 1] == params.starts[s]) continue;
    work.emplace_back(sequence(params, s), params.sequences);
    first.push_back(first.back() + work.back().tasks());
    number.push_back(s);
    scratch_floats = std::max(scratch_floats, work.back().scratch_floats());
  }
  for_each_task(threads, first.back(), scratch_floats, [&](int64_t task, float* scratch) {
    const int64_t at = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    work[at].run(task - first[at], scratch);
  });
  for (size_t i = 0; i < work.size(); ++i) work[i].combine(0, out + params.starts[number[i]]);
}

}  // namespace cdrop::cpu
