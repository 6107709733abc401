// attention_saliency.varlen and similarity_saliency, as torch sees them.
#include <algorithm>
#include <cmath>

#include "binding.h"

namespace cdrop::binding {
namespace {

// The values of cu_seqlens [S+1], checked.
std::vector<int64_t> sequence_starts(const Tensor& cu_seqlens, int64_t total, int64_t max_seqlen) {
  std::vector<int64_t> starts(static_cast<size_t>(cu_seqlens.size(0)));
  const bool wide = cu_seqlens.scalar_type() == ScalarType::Long;
  const void* data = cu_seqlens.const_data_ptr();
  for (size_t i = 0; i < starts.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * cu_seqlens.stride(0);
    starts[i] =
        wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
  CDROP_CHECK(starts[0] == 0, "cu_seqlens", "start at 0", std::to_string(starts[0]));
  int64_t longest = 0;
  for (size_t i = 1; i < starts.size(); ++i) {
    CDROP_CHECK(starts[i] >= starts[i - 1], "cu_seqlens", "not decrease",
                text(starts[i], " after ", starts[i - 1]));
    longest = std::max(longest, starts[i] - starts[i - 1]);
  }
  CDROP_CHECK(starts.back() == total, "cu_seqlens", text("end at T=", total),
              std::to_string(starts.back()));
  CDROP_CHECK(longest <= max_seqlen, "max_seqlen",
              text("be at least the longest sequence (", longest, ")"), std::to_string(max_seqlen));
  return starts;
}

void check_packed(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, int64_t max_seqlen) {
  check_float(q, "q", 3, "[T, Hq, d]");
  check_float(k, "k", 3, "[T, Hk, d]");
  CDROP_CHECK(k.scalar_type() == q.scalar_type(), "k",
              text("have the dtype of q (", dtype_name(q.scalar_type()), ")"),
              dtype_name(k.scalar_type()));
  check_device(k, "k", "q", q);
  const int64_t total = q.size(0), heads = q.size(1), width = q.size(2);
  CDROP_CHECK(heads >= 1 && width >= 1, "q", "have at least one head and one column", shape(q));
  CDROP_CHECK(k.size(0) == total && k.size(2) == width && k.size(1) >= 1, "k",
              text("be [T=", total, ", Hk, d=", width, "]"), shape(k));
  CDROP_CHECK(heads % k.size(1) == 0, "the heads of q",
              text("be a multiple of the heads of k (", k.size(1), ")"), std::to_string(heads));
  check_unit_stride(q, "q");
  check_unit_stride(k, "k");
  const ScalarType type = cu_seqlens.scalar_type();
  CDROP_CHECK(type == ScalarType::Int || type == ScalarType::Long, "cu_seqlens",
              "be int32 or int64", dtype_name(type));
  CDROP_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens", "be [S+1]",
              shape(cu_seqlens));
  check_device(cu_seqlens, "cu_seqlens", "q", q);
  CDROP_CHECK(max_seqlen >= 0, "max_seqlen", "be >= 0", std::to_string(max_seqlen));
}

// [T, H, d] as the heads of one sample.
Rows packed_rows(const Tensor& t) {
  Rows rows = rows_of(t);
  rows.stride[2] = t.stride(0);
  rows.stride[0] = 0;
  return rows;
}

Tensor attention_saliency_varlen(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens,
                                 int64_t max_seqlen, std::optional<double> scale,
                                 const MaybeTensor& lse, const MaybeTensor& weight, bool causal,
                                 std::string reduce) {
  check_packed(q, k, cu_seqlens, max_seqlen);
  if (scale) check_number(*scale, "scale");
  PackedSaliencyParams packed;
  SaliencyParams& p = packed.all;
  p.reduce = static_cast<Reduce>(check_choice(reduce, "reduce", {"mean", "max"}));
  const int64_t total = q.size(0), heads = q.size(1), width = q.size(2);
  if (lse) {
    check_like(*lse, "lse", ScalarType::Float, {heads, total},
               text("[Hq=", heads, ", T=", total, "]"));
    check_device(*lse, "lse", "q", q);
    p.lse = static_cast<const float*>(lse->const_data_ptr());
    p.lse_stride[1] = lse->stride(0);
    p.lse_stride[2] = lse->stride(1);
  }
  if (weight) {
    check_like(*weight, "query_weight", ScalarType::Float, {total}, text("[T=", total, "]"));
    check_device(*weight, "query_weight", "q", q);
    check_weight_values(weight, "query_weight");
    p.query_weight = matrix_of<float>(weight);
  }
  const std::vector<int64_t> starts = sequence_starts(cu_seqlens, total, max_seqlen);
  packed.starts = starts.data();
  packed.sequences = static_cast<int64_t>(starts.size()) - 1;
  p.q = packed_rows(q);
  p.k = packed_rows(k);
  p.query_heads = heads;
  p.key_heads = k.size(1);
  p.width = width;
  p.causal = causal;
  p.scale = static_cast<float>(scale.value_or(std::pow(static_cast<double>(width), -0.5)));
  Tensor out = output(q, {total}, ScalarType::Float);
  cpu::attention_saliency_varlen(packed, static_cast<float*>(out.mutable_data_ptr()), threads());
  return out;
}

Tensor similarity_saliency(const Tensor& text_rows, const Tensor& visual, double temperature,
                           const MaybeTensor& text_valid, const MaybeTensor& visual_valid,
                           std::string reduce) {
  check_float(text_rows, "text", 3, "[B, T, D]");
  check_float(visual, "visual", 3, "[B, N, D]");
  CDROP_CHECK(visual.scalar_type() == text_rows.scalar_type(), "visual",
              text("have the dtype of text (", dtype_name(text_rows.scalar_type()), ")"),
              dtype_name(visual.scalar_type()));
  check_device(visual, "visual", "text", text_rows);
  SimilarityParams p;
  p.batch = text_rows.size(0);
  p.rows = text_rows.size(1);
  p.width = text_rows.size(2);
  p.tokens = visual.size(1);
  CDROP_CHECK(p.rows >= 1 && p.width >= 1, "text", "have at least one row and one column",
              shape(text_rows));
  CDROP_CHECK(visual.size(0) == p.batch && p.tokens >= 1 && visual.size(2) == p.width, "visual",
              text("be [B=", p.batch, ", N, D=", p.width, "]"), shape(visual));
  CDROP_CHECK(std::isfinite(temperature) && temperature > 0.0, "temperature", "be finite and > 0",
              number(temperature));
  p.temperature = temperature;
  p.reduce = static_cast<Reduce>(check_choice(reduce, "reduce", {"mean", "max"}));
  p.text_valid = token_matrix<uint8_t>(text_valid, "text_valid", ScalarType::Bool, p.batch, p.rows,
                                       "text", text_rows, "T");
  p.visual_valid = token_matrix<uint8_t>(visual_valid, "visual_valid", ScalarType::Bool, p.batch,
                                         p.tokens, "text", text_rows);
  const Tensor texts = with_unit_stride(text_rows), visuals = with_unit_stride(visual);
  p.text = rows_of(texts);
  p.visual = rows_of(visuals);
  Tensor out = output(text_rows, {p.batch, p.tokens}, ScalarType::Float);
  cpu::similarity_saliency(p, static_cast<float*>(out.mutable_data_ptr()), threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdrop, CPU, m) {
  m.impl("attention_saliency.varlen", TORCH_BOX(&attention_saliency_varlen));
  m.impl("similarity_saliency", TORCH_BOX(&similarity_saliency));
}

}  // namespace cdrop::binding
