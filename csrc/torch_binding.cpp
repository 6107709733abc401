// The ops of the flagship and its parts, as torch sees them: checks arguments, turns tensors into
// pointers and strides (binding.h), and registers the CPU kernels. Stable ABI only. The other ops
// are in binding_*.cpp, the schemas in consensusdrop_kernels/ops.py.
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "binding_fused.h"
#ifdef CDROP_WITH_CUDA
#include "kernels/cuda/device.h"
#endif

namespace cdrop::binding {
namespace {

void check_index_values(const Tensor& index, int64_t tokens, const MaybeTensor& valid) {
  const auto at = matrix_of<int64_t>(index);
  const auto is_valid = matrix_of<uint8_t>(valid);
  for (int64_t b = 0; b < index.size(0); ++b) {
    for (int64_t s = 0; s < index.size(1); ++s) {
      const int64_t token = at.at(b, s);
      CDROP_CHECK(token >= -1 && token < tokens, "index",
                  text("be in 0..N-1=", tokens - 1, ", or -1 for an empty slot"),
                  std::to_string(token));
    }
  }
  std::vector<uint8_t> seen(static_cast<size_t>(tokens));
  for (int64_t b = 0; b < index.size(0); ++b) {
    std::fill(seen.begin(), seen.end(), uint8_t{0});
    for (int64_t s = 0; s < index.size(1); ++s) {
      const int64_t token = at.at(b, s);
      if (token < 0) continue;
      CDROP_CHECK(!seen[static_cast<size_t>(token)], "index", "name each token once",
                  text("token ", token, " twice"));
      seen[static_cast<size_t>(token)] = 1;
    }
  }
  for (int64_t b = 0; is_valid && b < index.size(0); ++b) {
    for (int64_t s = 0; s < index.size(1); ++s) {
      const int64_t token = at.at(b, s);
      CDROP_CHECK(token < 0 || is_valid.at(b, token), "index", "name valid tokens only",
                  text("token ", token, ", which is not"));
    }
  }
}

Tensor attention_saliency(const Tensor& q, const Tensor& k, std::optional<double> scale,
                          const MaybeTensor& lse, const MaybeTensor& key_valid,
                          const MaybeTensor& query_weight, int64_t prefix, bool causal,
                          std::string reduce) {
  const SaliencyParams params =
      check_saliency(q, k, scale, lse, key_valid, query_weight, prefix, causal, reduce);
  Tensor out = output(q, {params.batch, params.keys - prefix}, ScalarType::Float);
  cpu::attention_saliency(params, static_cast<float*>(out.mutable_data_ptr()), threads());
  return out;
}

std::tuple<Tensor, Tensor> consensus_select(const Tensor& visual, const MaybeTensor& textual,
                                            int64_t keep, double alpha, std::string fusion,
                                            const MaybeTensor& valid, const MaybeTensor& priority,
                                            int64_t priority_keep) {
  CDROP_CHECK(visual.scalar_type() == ScalarType::Float, "visual", "be float32",
              dtype_name(visual.scalar_type()));
  CDROP_CHECK(visual.dim() == 2, "visual", "be [B, N]", shape(visual));
  const int64_t batch = visual.size(0), tokens = visual.size(1);
  if (textual) {
    check_like(*textual, "textual", ScalarType::Float, {batch, tokens},
               batch_by(batch, "N", tokens));
    check_device(*textual, "textual", "visual", visual);
  }
  SelectParams params = check_selection(batch, tokens, visual, "visual", keep, alpha, fusion, valid,
                                        priority, priority_keep);
  params.visual = matrix_of<float>(visual);
  params.textual = matrix_of<float>(textual);
  Tensor index = output(visual, {batch, keep}, ScalarType::Long);
  Tensor score = output(visual, {batch, tokens}, ScalarType::Float);
  params.index = static_cast<int64_t*>(index.mutable_data_ptr());
  params.score = static_cast<float*>(score.mutable_data_ptr());
  cpu::consensus_select(params, threads());
  return {index, score};
}

std::tuple<Tensor, Tensor, Tensor> token_merge(const Tensor& x, const Tensor& metric,
                                               const Tensor& index, int64_t contextual,
                                               const MaybeTensor& weight, const MaybeTensor& valid,
                                               double threshold, double blend) {
  check_metric(x, metric);
  const int64_t batch = x.size(0), tokens = x.size(1);
  CDROP_CHECK(index.scalar_type() == ScalarType::Long, "index", "be int64",
              dtype_name(index.scalar_type()));
  CDROP_CHECK(
      index.dim() == 2 && index.size(0) == batch && index.size(1) >= 1 && index.size(1) <= tokens,
      "index", text("be [B=", batch, ", K] with K in 1..N=", tokens), shape(index));
  check_device(index, "index", "x", x);
  check_merge_options(contextual, threshold, blend);
  if (weight) {
    check_like(*weight, "weight", ScalarType::Float, {batch, tokens}, batch_by(batch, "N", tokens));
    check_device(*weight, "weight", "x", x);
    check_weight_values(weight, "weight");
  }
  if (valid) {
    check_like(*valid, "valid", ScalarType::Bool, {batch, tokens}, batch_by(batch, "N", tokens));
    check_device(*valid, "valid", "x", x);
  }
  check_index_values(index, tokens, valid);

  const Tensor x_rows = with_unit_stride(x), metric_rows = with_unit_stride(metric);
  MergeParams params = merge_params(x_rows, index.size(1), contextual, threshold, blend, valid);
  set_metric(&params, metric_rows);
  params.weight = matrix_of<float>(weight);
  params.index = matrix_of<int64_t>(index);
  const MergeOutputs out = merge_outputs(x, &params);
  cpu::token_merge(params, threads());
  return {out.tokens, out.assign, out.size};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_merge(
    const Tensor& x, const Tensor& q_vis, const Tensor& k_vis, const MaybeTensor& q_txt,
    const MaybeTensor& k_txt, int64_t keep, int64_t contextual, double alpha, std::string fusion,
    int64_t prefix, std::optional<double> scale_vis, std::optional<double> scale_txt,
    const MaybeTensor& lse_vis, const MaybeTensor& lse_txt, const MaybeTensor& txt_weight,
    std::string txt_reduce, const MaybeTensor& metric, const MaybeTensor& valid,
    const MaybeTensor& priority, int64_t priority_keep, double threshold, double blend,
    double diversity) {
  const FusedCall call =
      prepare_select_merge(x, q_vis, k_vis, q_txt, k_txt, keep, contextual, alpha, fusion, prefix,
                           scale_vis, scale_txt, lse_vis, lse_txt, txt_weight, txt_reduce, metric,
                           valid, priority, priority_keep, threshold, blend, diversity);
  cpu::select_merge(call.params, threads());
  return call.result();
}

std::string cpu_capability() { return cpu::capability(); }

// Why CUDA kernels of this build can't run here, or nothing.
std::string cuda_missing() {
#ifdef CDROP_WITH_CUDA
  const cuda::Status status = cuda::probe_device();
  return status ? "" : status.message;
#else
  return "built without nvcc";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdrop, CPU, m) {
  m.impl("attention_saliency", TORCH_BOX(&attention_saliency));
  m.impl("consensus_select", TORCH_BOX(&consensus_select));
  m.impl("token_merge", TORCH_BOX(&token_merge));
  m.impl("select_merge", TORCH_BOX(&select_merge));
}

STABLE_TORCH_LIBRARY(cdrop_info, m) {
  m.def("cpu_capability() -> str");
  m.def("cuda_missing() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(cdrop_info, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("cuda_missing", TORCH_BOX(&cuda_missing));
}

}  // namespace cdrop::binding
