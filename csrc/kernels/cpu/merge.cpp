#include "merge.h"

#include <algorithm>
#include <limits>

namespace cdrop::cpu {
namespace {

int64_t bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

MergeWork::MergeWork(const MergeParams& params) : params_(params) {
  const int64_t b = params.batch, n = params.tokens;
  slots_ = params.keep + params.contextual;
  targets_ = params.contextual > 0 ? std::min(params.contextual, n) : params.keep;
  padded_ = padded(targets_, kSlotBlock);
  blocks_ = (n + kBlock - 1) / kBlock;
  slot_groups_ = (slots_ + kSlotsTogether - 1) / kSlotsTogether;
  stretches_ = (params.width + kStretch - 1) / kStretch;
  own_ = Buffer<int64_t>(b * slots_);
  target_ = Buffer<int32_t>(b * targets_);
  target_slot_ = Buffer<int32_t>(b * targets_);
  target_count_ = Buffer<int32_t>(b);
  vectors_ = Buffer<float>(b * params.metric_width * padded_);
  bias_ = Buffer<float>(b * padded_);
  joining_ = Buffer<int32_t>(b * n);
  found_ = Buffer<int32_t>(b * n);
  joining_count_ = Buffer<int32_t>(b);
  member_ = Buffer<int32_t>(b * n);
  member_from_ = Buffer<int32_t>(b * (slots_ + 1));
}

MetricRows MergeWork::metric(int64_t sample) const {
  const Rows& m = params_.metric;
  const char* data = static_cast<const char*>(m.data) + sample * m.stride[0] * bytes(m.dtype);
  return {data, m.dtype, params_.metric_heads, m.stride[1], m.stride[2], params_.metric_width};
}

void MergeWork::prepare(int64_t b, const int64_t* index, float* scratch) {
  const int64_t n = params_.tokens;
  int64_t* assign = params_.out_assign + b * n;
  int64_t* own = own_.get() + b * slots_;
  int32_t* joining = joining_.get() + b * n;
  int32_t* target = target_.get() + b * targets_;
  int32_t* target_slot = target_slot_.get() + b * targets_;
  std::fill_n(assign, n, int64_t{-1});
  std::fill_n(own, slots_, int64_t{-1});
  std::copy_n(index, params_.keep, own);
  for (int64_t s = 0; s < params_.keep; ++s) {
    if (own[s] >= 0) assign[own[s]] = s;
  }
  int32_t dropped = 0, targets = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool valid = !params_.valid || params_.valid.at(b, i) != 0;
    if (assign[i] < 0 && valid) joining[dropped++] = static_cast<int32_t>(i);
  }
  if (params_.contextual > 0) {
    const int64_t c = params_.contextual;
    targets = static_cast<int32_t>(std::min<int64_t>(c, dropped));
    for (int32_t t = 0; t < targets; ++t) {
      target[t] = joining[dropped >= c ? t * int64_t{dropped} / c : t];
      target_slot[t] = static_cast<int32_t>(params_.keep + t);
      own[target_slot[t]] = target[t];
      assign[target[t]] = target_slot[t];
    }
    dropped = static_cast<int32_t>(
        std::remove_if(joining, joining + dropped, [&](int32_t i) { return assign[i] >= 0; }) -
        joining);
  } else {
    // Ascending by token whatever the order of `index`, since ties go to the lower token.
    for (int64_t i = 0; i < n; ++i) {
      if (assign[i] >= 0) {
        target[targets] = static_cast<int32_t>(i);
        target_slot[targets++] = static_cast<int32_t>(assign[i]);
      }
    }
  }
  joining_count_[b] = dropped;
  target_count_[b] = targets;
  if (dropped == 0 || targets == 0) return;
  float* bias = bias_.get() + b * padded_;
  std::fill_n(bias, targets, 0.0f);
  std::fill(bias + targets, bias + padded_, -std::numeric_limits<float>::infinity());
  simd().slot_vectors(metric(b), target, targets,
                      vectors_.get() + b * params_.metric_width * padded_, padded_, scratch);
}

void MergeWork::assign(int64_t task, float* scratch) {
  const int64_t b = task / blocks_, from = task % blocks_ * kBlock;
  const int64_t count = std::min(kBlock, joining_count_[b] - from);
  if (count <= 0) return;
  int32_t* out = found_.get() + b * params_.tokens + from;
  if (target_count_[b] == 0) {
    std::fill_n(out, count, -1);
    return;
  }
  NearestTask t{};
  t.metric = metric(b);
  t.slots = vectors_.get() + b * params_.metric_width * padded_;
  t.bias = bias_.get() + b * padded_;
  t.padded = padded_;
  t.joining = joining_.get() + b * params_.tokens + from;
  t.count = count;
  t.threshold = params_.threshold;
  t.always = params_.contextual > 0;
  t.scratch = scratch;
  t.out = out;
  simd().nearest(t);
}

void MergeWork::gather(int64_t b) {
  const int64_t n = params_.tokens;
  int64_t* assign = params_.out_assign + b * n;
  const int64_t* own = own_.get() + b * slots_;
  const int32_t* joining = joining_.get() + b * n;
  const int32_t* found = found_.get() + b * n;
  const int32_t* target_slot = target_slot_.get() + b * targets_;
  int32_t* from = member_from_.get() + b * (slots_ + 1);
  int32_t* member = member_.get() + b * n;
  float* size = params_.out_size + b * slots_;

  for (int64_t s = 0; s < slots_; ++s) size[s] = own[s] >= 0 ? weight(b, own[s]) : 0.0f;
  std::fill_n(from, slots_ + 1, 0);
  const auto joins = [&](int32_t j) { return found[j] >= 0 && weight(b, joining[j]) > 0.0f; };
  for (int32_t j = 0; j < joining_count_[b]; ++j) {
    if (found[j] < 0) continue;
    const int32_t slot = target_slot[found[j]];
    assign[joining[j]] = slot;
    if (joins(j)) ++from[slot + 1], size[slot] += weight(b, joining[j]);
  }
  for (int64_t s = 0; s < slots_; ++s) from[s + 1] += from[s];
  for (int32_t j = 0; j < joining_count_[b]; ++j) {
    if (joins(j)) member[from[target_slot[found[j]]]++] = joining[j];
  }
  for (int64_t s = slots_; s > 0; --s) from[s] = from[s - 1];
  from[0] = 0;
  if (params_.out_index != nullptr) std::copy_n(own, slots_, params_.out_index + b * slots_);
}

void MergeWork::merge(int64_t task, float* scratch) const {
  const int64_t column = task % stretches_ * kStretch;
  const int64_t first = task / stretches_ % slot_groups_ * kSlotsTogether;
  const int64_t b = task / stretches_ / slot_groups_;
  const int64_t end = std::min(first + kSlotsTogether, slots_);
  for (int64_t slot = first; slot < end; ++slot) {
    merge_slot(b, slot, column, std::min(slot + 1, end - 1), scratch);
  }
}

void MergeWork::merge_slot(int64_t b, int64_t slot, int64_t column, int64_t next_slot,
                           float* scratch) const {
  const int64_t size = bytes(params_.x.dtype);
  const int64_t width = std::min(kStretch, params_.width - column);
  char* out = static_cast<char*>(params_.out_tokens) +
              ((b * slots_ + slot) * params_.width + column) * size;
  const int64_t* own = own_.get() + b * slots_;
  if (own[slot] < 0) {
    std::fill_n(out, width * size, char{0});
    return;
  }
  const int32_t* from = member_from_.get() + b * (slots_ + 1);
  const int32_t* member = member_.get() + b * params_.tokens;
  MergeTask t{};
  t.x = static_cast<const char*>(params_.x.data) + (b * params_.x.stride[0] + column) * size;
  t.dtype = params_.x.dtype;
  t.row_stride = params_.x.stride[1];
  t.width = width;
  t.own = own[slot];
  t.own_weight = weight(b, own[slot]);
  t.joined = member + from[slot];
  t.count = from[slot + 1] - from[slot];
  if (params_.weight) {
    t.weight = &params_.weight.at(b, 0);
    t.weight_stride = params_.weight.stride[1];
  }
  t.blend = params_.blend;
  for (int i = 0; i < kMergeSweep; ++i) {
    const int64_t at = from[next_slot] + i - 1;
    t.ahead[i] =
        i > 0 && at < from[next_slot + 1] ? member[at] : std::max<int64_t>(own[next_slot], 0);
  }
  t.scratch = scratch;
  t.out = out;
  simd().merge(t);
}

void token_merge(const MergeParams& params, const Threads& threads) {
  MergeWork work(params);
  for_each_task(threads, params.batch, work.prepare_scratch() + params.keep * 2,
                [&](int64_t b, float* scratch) {
                  int64_t* index = reinterpret_cast<int64_t*>(scratch);
                  for (int64_t s = 0; s < params.keep; ++s) index[s] = params.index.at(b, s);
                  work.prepare(b, index, scratch + params.keep * 2);
                });
  for_each_task(threads, work.assign_tasks(), work.assign_scratch(),
                [&](int64_t task, float* scratch) { work.assign(task, scratch); });
  for (int64_t b = 0; b < params.batch; ++b) work.gather(b);
  for_each_task(threads, work.merge_tasks(), work.merge_scratch(),
                [&](int64_t task, float* scratch) { work.merge(task, scratch); });
}

}  // namespace cdrop::cpu
