// The host side of the fused kernels for ctypes: the planner, keys.h and numbers.h.
#include <sstream>
#include <string>

#include "kernels/cuda/numbers.h"
#include "kernels/cuda/plan.h"

using namespace cdrop;
using namespace cdrop::cuda;

namespace {

// A JSON object, field by field.
class Object {
 public:
  template <typename T>
  void add(const char* name, const T& value) {
    out_ << (empty_ ? "{\"" : ", \"") << name << "\": " << value;
    empty_ = false;
  }
  std::string text() const { return out_.str() + "}"; }

 private:
  std::ostringstream out_;
  bool empty_ = true;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Sizes in the order of `Sizes`, limits in that of `Device` (see emulated.py).
EXPORT const char* cdrop_plan(const int64_t* sizes, const int64_t* limits) {
  SelectMergeParams p;
  p.merge.batch = p.select.batch = p.visual.batch = p.textual.batch = *sizes++;
  p.merge.tokens = p.select.tokens = p.textual.keys = *sizes++;
  p.merge.width = *sizes++;
  p.merge.keep = p.select.keep = *sizes++;
  p.merge.contextual = *sizes++;
  p.visual.query_heads = *sizes++;
  p.visual.key_heads = p.merge.metric_heads = *sizes++;
  p.visual.rows = *sizes++;
  p.visual.width = *sizes++;
  p.visual.prefix = *sizes++;
  p.visual.keys = p.merge.tokens + p.visual.prefix;
  p.has_text = *sizes > 0;  // no head: no text
  p.textual.query_heads = *sizes++;
  p.textual.key_heads = *sizes++;
  p.textual.rows = *sizes++;
  p.textual.width = *sizes++;
  p.merge.metric_width = *sizes++;
  p.merge.x.dtype = *sizes++ == 2 ? DType::kBFloat16 : DType::kFloat32;
  DeviceLimits device;
  device.capability = static_cast<int>(*limits++);
  device.processors = static_cast<int>(*limits++);
  device.shared_bytes = *limits++;
  device.max_cluster = static_cast<int>(*limits++);
  const LaunchPlan plan = plan_select_merge(p, device);

  const char* paths[] = {"\"none\"", "\"cluster\"", "\"grid\""};
  Object out, at;
  out.add("path", paths[static_cast<int>(plan.path)]);
  out.add("reason", plan.reason == nullptr ? "null" : '"' + std::string(plan.reason) + '"');
#define FIELD(name) out.add(#name, plan.name)
  FIELD(ranks), FIELD(groups), FIELD(tokens), FIELD(prefix), FIELD(rows);
  FIELD(visual_columns), FIELD(textual_columns), FIELD(columns), FIELD(block_columns);
  FIELD(segment), FIELD(stage_targets), FIELD(metric_stride);
  FIELD(shared_bytes), FIELD(workspace_bytes);
#undef FIELD
  out.add("prefetch", plan.prefetch ? "true" : "false");
#define OFFSET(name) at.add(#name, plan.at.name)
  OFFSET(maxima), OFFSET(sums), OFFSET(saliency), OFFSET(fused), OFFSET(slots_out), OFFSET(metric);
  OFFSET(peer_bytes), OFFSET(peers), OFFSET(scratch), OFFSET(histogram), OFFSET(own);
  OFFSET(slots), OFFSET(visual_logits), OFFSET(textual_logits), OFFSET(factors);
  OFFSET(head_sums), OFFSET(keys), OFFSET(places), OFFSET(stage), OFFSET(best), OFFSET(order);
  OFFSET(counters), OFFSET(starts), OFFSET(fragments);
#undef OFFSET
  out.add("at", at.text());
  static std::string text;
  text = out.text();
  return text.c_str();
}

EXPORT void cdrop_order_keys(const float* values, int64_t count, uint32_t nan, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = order_key(values[i], nan);
}

EXPORT void cdrop_key_values(const uint32_t* keys, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = key_value(keys[i]);
}

EXPORT uint64_t cdrop_ranked_key(uint32_t key, uint32_t tie) { return ranked_key(key, tie); }

// The `wanted`-th largest of more distinct keys, or the least that separates as many of them; in
// `passes`, how often all keys were looked at.
EXPORT uint64_t cdrop_threshold(const uint64_t* keys, int64_t count, uint32_t wanted,
                                int32_t* passes) {
  uint64_t low = ~uint64_t{0}, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  RadixSearch search = start_search(low, high, wanted);
  *passes = 0;
  for (bool done = false; !done; ++*passes) {
    uint32_t histogram[kRadixBins] = {};
    for (int64_t i = 0; i < count; ++i) {
      if (search.open(keys[i])) ++histogram[search.digit(keys[i])];
    }
    uint32_t above = 0, digit = kRadixBins - 1;
    while (digit > 0 && above + histogram[digit] < search.left) above += histogram[digit--];
    done = search.narrow(digit, above, histogram[digit]);
    if (*passes > 16) return 0;
  }
  return search.threshold();
}

EXPORT void cdrop_contextual_slots(int64_t dropped, int64_t contextual, int32_t* out) {
  for (int64_t i = 0; i < dropped; ++i) out[i] = contextual_slot(i, dropped, contextual);
}

EXPORT void cdrop_to_fixed(const float* values, int64_t count, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_fixed(values[i]);
}

EXPORT void cdrop_from_fixed(const uint64_t* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_fixed(values[i]);
}

// Bits of 16-bit numbers, float16 or bfloat16, as float32 and back.
EXPORT void cdrop_from_bits(const uint16_t* bits, int64_t count, bool bfloat16, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bfloat16 ? to_float(BFloat16{bits[i]}) : to_float(Half{bits[i]});
  }
}

EXPORT void cdrop_to_bits(const float* values, int64_t count, bool bfloat16, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 b;
    Half h;
    from_float(values[i], &b);
    from_float(values[i], &h);
    out[i] = bfloat16 ? b.bits : h.bits;
  }
}
