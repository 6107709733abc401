#include "saliency.h"

#include <algorithm>

namespace cdrop::cpu {

SaliencyWork::SaliencyWork(const SaliencyParams& params)
    : params_(params), group_(params.query_heads / params.key_heads) {
  // Split a key head's rows where heads alone would not fill a machine. By shape only, never by the
  // number of threads: that keeps the result the same to the bit. A maximum is over the rows of one
  // head, so there a part is whole heads.
  const int64_t unit = params.reduce == Reduce::kMax ? params.rows : kMaxRowBlock;
  const int64_t units = (group_ * params.rows + unit - 1) / unit;
  const int64_t heads = std::max<int64_t>(1, params.batch * params.key_heads);
  const int64_t wanted = std::clamp<int64_t>(64 / heads, 1, 8);
  const int64_t per_part = (units + wanted - 1) / wanted;
  part_rows_ = per_part * unit;
  parts_ = (units + per_part - 1) / per_part;
  partial_ = Buffer<float>(tasks() * tokens());
}

void SaliencyWork::run(int64_t task, float* scratch) const {
  const SaliencyParams& p = params_;
  const int64_t part = task % parts_;
  const int64_t key_head = task / parts_ % p.key_heads;
  const int64_t b = task / parts_ / p.key_heads;
  const int64_t size = p.q.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t q_at = b * p.q.stride[0] + key_head * group_ * p.q.stride[1];
  const int64_t k_at = b * p.k.stride[0] + key_head * p.k.stride[1];

  AttentionTask t{};
  t.q = static_cast<const char*>(p.q.data) + q_at * size;
  t.k = static_cast<const char*>(p.k.data) + k_at * size;
  t.dtype = p.q.dtype;
  t.q_head_stride = p.q.stride[1];
  t.q_row_stride = p.q.stride[2];
  t.k_row_stride = p.k.stride[2];
  t.rows = p.rows;
  t.row_begin = part * part_rows_;
  t.row_end = std::min(t.row_begin + part_rows_, group_ * p.rows);
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
  if (p.query_weight) {
    t.weight = &p.query_weight.at(b, 0);
    t.weight_stride = p.query_weight.stride[1];
  }
  t.scratch = scratch;
  t.out = partial_.get() + task * tokens();
  simd().attention(t);
}

void SaliencyWork::combine(int64_t sample, float* out) const {
  const int64_t n = tokens();
  const int64_t per_sample = params_.key_heads * parts_;
  const float* from = partial_.get() + sample * per_sample * n;
  std::copy(from, from + n, out);
  for (int64_t part = 1; part < per_sample; ++part) {
    const float* add = from + part * n;
    for (int64_t i = 0; i < n; ++i) out[i] += add[i];
  }
  float total = static_cast<float>(params_.rows);
  if (params_.query_weight) {
    total = 0.0f;
    for (int64_t m = 0; m < params_.rows; ++m) total += params_.query_weight.at(sample, m);
  }
  float share = 1.0f / static_cast<float>(params_.query_heads);
  if (params_.reduce == Reduce::kMean) share = total > 0.0f ? share / total : 0.0f;
  for (int64_t i = 0; i < n; ++i) out[i] *= share;
}

void attention_saliency(const SaliencyParams& params, float* out, const Threads& threads) {
  const SaliencyWork work(params);
  const int64_t n = params.keys - params.prefix;
  for_each_task(threads, work.tasks(), work.scratch_floats(),
                [&](int64_t task, float* scratch) { work.run(task, scratch); });
  for (int64_t b = 0; b < params.batch; ++b) work.combine(b, out + b * n);
}

}  // namespace cdrop::cpu
