// What select_merge and its parts check and prepare, wherever they run.
#include "binding_fused.h"

#include <cmath>
#include <limits>

namespace cdrop::binding {

SaliencyParams check_saliency(const Tensor& q, const Tensor& k, std::optional<double> scale,
                              const MaybeTensor& lse, const MaybeTensor& key_valid,
                              const MaybeTensor& weight, int64_t prefix, bool causal,
                              const std::string& reduce, const SaliencyNames& say) {
  check_float(q, say.q, 4, "[B, Hq, M, d]");
  check_float(k, say.k, 4, "[B, Hk, P+N, d]");
  CDROP_CHECK(k.scalar_type() == q.scalar_type(), say.k,
              text("have the dtype of ", say.q, " (", dtype_name(q.scalar_type()), ")"),
              dtype_name(k.scalar_type()));
  check_device(k, say.k, say.q, q);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), width = q.size(3);
  CDROP_CHECK(heads >= 1 && rows >= 1 && width >= 1, say.q,
              "have at least one head, one row and one column", shape(q));
  CDROP_CHECK(k.size(0) == batch && k.size(3) == width && k.size(1) >= 1, say.k,
              text("be [B=", batch, ", Hk, P+N, d=", width, "]"), shape(k));
  CDROP_CHECK(heads % k.size(1) == 0, text("the heads of ", say.q),
              text("be a multiple of the heads of ", say.k, " (", k.size(1), ")"),
              std::to_string(heads));
  const int64_t keys = k.size(2);
  CDROP_CHECK(prefix >= 0 && prefix < keys, "prefix", text("be in 0..P+N-1=", keys - 1),
              std::to_string(prefix));
  check_unit_stride(q, say.q);
  check_unit_stride(k, say.k);
  if (scale) check_number(*scale, say.scale);

  SaliencyParams p;
  p.reduce = static_cast<Reduce>(check_choice(reduce, say.reduce, {"mean", "max"}));
  if (lse) {
    check_like(*lse, say.lse, ScalarType::Float, {batch, heads, rows},
               text("[B=", batch, ", Hq=", heads, ", M=", rows, "]"));
    check_device(*lse, say.lse, say.q, q);
    p.lse = static_cast<const float*>(lse->const_data_ptr());
    for (int64_t i = 0; i < 3; ++i) p.lse_stride[i] = lse->stride(i);
  }
  if (key_valid) {
    check_like(*key_valid, "key_valid", ScalarType::Bool, {batch, keys},
               batch_by(batch, "P+N", keys));
    check_device(*key_valid, "key_valid", say.q, q);
    p.key_valid = matrix_of<uint8_t>(key_valid);
  }
  if (weight) {
    check_like(*weight, say.weight, ScalarType::Float, {batch, rows}, batch_by(batch, "M", rows));
    check_device(*weight, say.weight, say.q, q);
    check_weight_values(weight, say.weight);
    p.query_weight = matrix_of<float>(weight);
  }
  p.q = rows_of(q);
  p.k = rows_of(k);
  p.batch = batch;
  p.query_heads = heads;
  p.key_heads = k.size(1);
  p.rows = rows;
  p.keys = keys;
  p.width = width;
  p.prefix = prefix;
  p.causal = causal;
  p.scale = static_cast<float>(scale.value_or(std::pow(static_cast<double>(width), -0.5)));
  return p;
}

SelectParams check_selection(int64_t batch, int64_t tokens, const Tensor& main, const char* like,
                             int64_t keep, double alpha, const std::string& fusion,
                             const MaybeTensor& valid, const MaybeTensor& priority,
                             int64_t priority_keep) {
  CDROP_CHECK(keep >= 1 && keep <= tokens, "keep", text("be in 1..N=", tokens),
              std::to_string(keep));
  check_unit(alpha, "alpha");
  SelectParams p;
  p.fusion = static_cast<Fusion>(
      check_choice(fusion, "fusion", {"rank", "rrf", "sum", "zscore", "product", "max"}));
  if (valid) {
    check_like(*valid, "valid", ScalarType::Bool, {batch, tokens}, batch_by(batch, "N", tokens));
    check_device(*valid, "valid", like, main);
    p.valid = matrix_of<uint8_t>(valid);
  }
  CDROP_CHECK(priority_keep >= 0 && priority_keep <= keep, "priority_keep",
              text("be in 0..keep=", keep), std::to_string(priority_keep));
  CDROP_CHECK(priority_keep == 0 || priority, "priority",
              text("be given with priority_keep=", priority_keep), "None");
  if (priority) {
    const std::string layout = text("[N=", tokens, "] or ", batch_by(batch, "N", tokens));
    if (priority->dim() == 1) {
      check_like(*priority, "priority", ScalarType::Float, {tokens}, layout);
    } else {
      check_like(*priority, "priority", ScalarType::Float, {batch, tokens}, layout);
    }
    check_device(*priority, "priority", like, main);
    p.priority = matrix_of<float>(priority);
  }
  p.batch = batch;
  p.tokens = tokens;
  p.keep = keep;
  p.visual_share = static_cast<float>(1.0 - alpha);
  p.textual_share = static_cast<float>(alpha);
  p.priority_keep = priority_keep;
  return p;
}

void check_metric(const Tensor& x, const Tensor& metric) {
  check_float(x, "x", 3, "[B, N, D]");
  const std::string layout = text("[B=", x.size(0), ", N=", x.size(1), ", F]");
  check_float(metric, "metric", 3, layout);
  CDROP_CHECK(metric.size(0) == x.size(0) && metric.size(1) == x.size(1) && metric.size(2) >= 1,
              "metric", "be " + layout, shape(metric));
  check_device(metric, "metric", "x", x);
}

void check_merge_options(int64_t contextual, double threshold, double blend) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  CDROP_CHECK(contextual >= 0 && contextual <= kMost, "contextual", text("be in 0..", kMost),
              std::to_string(contextual));
  CDROP_CHECK(!std::isnan(threshold), "threshold", "be a number", "nan");
  check_unit(blend, "blend");
}

// The sizes and options of a merge; pointers of its outputs are filled in by the caller.
MergeParams merge_params(const Tensor& x, int64_t keep, int64_t contextual, double threshold,
                         double blend, const MaybeTensor& valid) {
  MergeParams p;
  p.x = rows_of(x);
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.width = x.size(2);
  p.keep = keep;
  p.contextual = contextual;
  p.threshold = static_cast<float>(threshold);
  p.blend = static_cast<float>(blend);
  p.valid = matrix_of<uint8_t>(valid);
  return p;
}

void set_metric(MergeParams* p, const Tensor& metric) {
  p->metric = rows_of(metric);  // [B, N, F]: one head
  p->metric.stride[2] = p->metric.stride[1];
  p->metric.stride[1] = 0;
  p->metric_width = metric.size(2);
}

MergeOutputs merge_outputs(const Tensor& x, MergeParams* p) {
  const int64_t slots = p->keep + p->contextual;
  MergeOutputs out{output(x, {p->batch, slots, p->width}, x.scalar_type()),
                   output(x, {p->batch, p->tokens}, ScalarType::Long),
                   output(x, {p->batch, slots}, ScalarType::Float)};
  p->out_tokens = out.tokens.mutable_data_ptr();
  p->out_assign = static_cast<int64_t*>(out.assign.mutable_data_ptr());
  p->out_size = static_cast<float*>(out.size.mutable_data_ptr());
  return out;
}

namespace {

// The keys of select_merge belong to the tokens of `x`.
void check_keys_fit(const Tensor& k, const char* name, int64_t batch, int64_t keys,
                    const char* keys_name) {
  CDROP_CHECK(k.size(0) == batch && k.size(2) == keys, name,
              text("be [B=", batch, ", Hk, ", keys_name, "=", keys, ", d] to match x"), shape(k));
}

}  // namespace

FusedCall prepare_select_merge(const Tensor& x, const Tensor& q_vis, const Tensor& k_vis,
                               const MaybeTensor& q_txt, const MaybeTensor& k_txt, int64_t keep,
                               int64_t contextual, double alpha, const std::string& fusion,
                               int64_t prefix, std::optional<double> scale_vis,
                               std::optional<double> scale_txt, const MaybeTensor& lse_vis,
                               const MaybeTensor& lse_txt, const MaybeTensor& txt_weight,
                               const std::string& txt_reduce, const MaybeTensor& metric,
                               const MaybeTensor& valid, const MaybeTensor& priority,
                               int64_t priority_keep, double threshold, double blend,
                               double diversity) {
  check_float(x, "x", 3, "[B, N, D]");
  const int64_t batch = x.size(0), tokens = x.size(1);
  check_device(q_vis, "q_vis", "x", x);
  FusedCall call;
  SaliencyParams& visual = call.params.visual;
  SaliencyParams& textual = call.params.textual;
  visual = check_saliency(q_vis, k_vis, scale_vis, lse_vis, {}, {}, prefix, false, "mean",
                          {"q_vis", "k_vis", "scale_vis", "lse_vis", "", ""});
  check_keys_fit(k_vis, "k_vis", batch, tokens + prefix, "P+N");
  CDROP_CHECK(q_txt || !k_txt, "q_txt", "be given with k_txt", "None");
  CDROP_CHECK(k_txt || !q_txt, "k_txt", "be given with q_txt", "None");
  call.params.has_text = q_txt.has_value();
  if (q_txt) {
    check_device(*q_txt, "q_txt", "x", x);
    textual =
        check_saliency(*q_txt, *k_txt, scale_txt, lse_txt, {}, txt_weight, 0, false, txt_reduce,
                       {"q_txt", "k_txt", "scale_txt", "lse_txt", "txt_weight", "txt_reduce"});
    check_keys_fit(*k_txt, "k_txt", batch, tokens, "N");
  } else {
    CDROP_CHECK(!lse_txt, "lse_txt", "be None without q_txt", "a tensor");
    CDROP_CHECK(!txt_weight, "txt_weight", "be None without q_txt", "a tensor");
    check_choice(txt_reduce, "txt_reduce", {"mean", "max"});
  }
  if (metric) check_metric(x, *metric);
  const SelectParams select = call.params.select =
      check_selection(batch, tokens, x, "x", keep, alpha, fusion, valid, priority, priority_keep);
  check_merge_options(contextual, threshold, blend);
  // Less would leave most tokens a relevance of 0 in float32.
  CDROP_CHECK(diversity == 0.0 || (diversity >= 0.02 && diversity <= 1.0), "diversity",
              "be 0 or in 0.02..1", number(diversity));
  CDROP_CHECK(diversity == 0.0 || priority_keep == 0, "priority_keep",
              "be 0 unless diversity is 0, which spreads tokens in its own way",
              std::to_string(priority_keep));
  call.params.diversity = diversity;

  visual.key_valid = textual.key_valid = select.valid;  // of the tokens: the prefix is always valid
  visual.valid_from = prefix;
  call.x = with_unit_stride(x);
  call.metric = metric ? with_unit_stride(*metric) : k_vis;
  MergeParams& merge = call.params.merge;
  merge = merge_params(call.x, keep, contextual, threshold, blend, valid);
  if (metric) {
    set_metric(&merge, call.metric);
  } else {  // the head mean of the encoder's keys, past the prefix
    merge.metric = visual.k;
    const int64_t bytes = visual.k.dtype == DType::kFloat32 ? 4 : 2;
    merge.metric.data =
        static_cast<const char*>(visual.k.data) + prefix * visual.k.stride[2] * bytes;
    merge.metric_heads = visual.key_heads;
    merge.metric_width = visual.width;
  }
  call.out = merge_outputs(x, &merge);
  call.index = output(x, {batch, keep + contextual}, ScalarType::Long);
  merge.out_index = static_cast<int64_t*>(call.index.mutable_data_ptr());
  return call;
}

}  // namespace cdrop::binding
