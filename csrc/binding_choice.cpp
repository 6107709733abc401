// adaptive_split_select and greedy_diverse_select, as torch sees them.
#include <cmath>
#include <tuple>

#include "binding.h"

namespace cdrop::binding {
namespace {

void check_keep(int64_t keep, int64_t tokens) {
  CDROP_CHECK(keep >= 1 && keep <= tokens, "keep", text("be in 1..N=", tokens),
              std::to_string(keep));
}

std::tuple<Tensor, Tensor> adaptive_split_select(const Tensor& visual, const Tensor& textual,
                                                 int64_t keep, double reserve,
                                                 const MaybeTensor& valid) {
  CDROP_CHECK(visual.scalar_type() == ScalarType::Float, "visual", "be float32",
              dtype_name(visual.scalar_type()));
  CDROP_CHECK(visual.dim() == 2, "visual", "be [B, N]", shape(visual));
  SplitParams p;
  p.batch = visual.size(0);
  p.tokens = visual.size(1);
  p.keep = keep;
  p.reserve = reserve;
  p.visual = matrix_of<float>(visual);
  p.textual = token_matrix<float>(textual, "textual", ScalarType::Float, p.batch, p.tokens,
                                  "visual", visual);
  check_keep(keep, p.tokens);
  CDROP_CHECK(reserve >= 0.0 && reserve <= 0.5, "reserve", "be in 0..0.5", number(reserve));
  p.valid =
      token_matrix<uint8_t>(valid, "valid", ScalarType::Bool, p.batch, p.tokens, "visual", visual);
  Tensor index = output(visual, {p.batch, keep}, ScalarType::Long);
  Tensor split = output(visual, {p.batch}, ScalarType::Long);
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  p.split = static_cast<int64_t*>(split.mutable_data_ptr());
  cpu::adaptive_split_select(p, threads());
  return {index, split};
}

// Under dpp the relevance scales a kernel; NaN is left to rank last.
void check_relevance_values(const Matrix<float>& relevance, int64_t batch, int64_t tokens) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < tokens; ++i) {
      const float value = relevance.at(b, i);
      CDROP_CHECK(!(value < 0.0f) && !std::isinf(value), "relevance", "be finite and >= 0 with dpp",
                  number(value));
    }
  }
}

Tensor greedy_diverse_select(const Tensor& features, int64_t keep, const MaybeTensor& relevance,
                             std::string objective, const MaybeTensor& valid) {
  check_float(features, "features", 3, "[B, N, F]");
  DiverseParams p;
  p.batch = features.size(0);
  p.tokens = features.size(1);
  p.width = features.size(2);
  p.keep = keep;
  CDROP_CHECK(p.width >= 1, "features", "have at least one column", shape(features));
  check_keep(keep, p.tokens);
  p.objective = static_cast<Objective>(check_choice(objective, "objective", {"maxmin", "dpp"}));
  p.relevance = token_matrix<float>(relevance, "relevance", ScalarType::Float, p.batch, p.tokens,
                                    "features", features);
  if (p.relevance && p.objective == Objective::kDpp) {
    check_relevance_values(p.relevance, p.batch, p.tokens);
  }
  p.valid = token_matrix<uint8_t>(valid, "valid", ScalarType::Bool, p.batch, p.tokens, "features",
                                  features);
  const Tensor rows = with_unit_stride(features);
  p.features = rows_of(rows);
  Tensor index = output(features, {p.batch, keep}, ScalarType::Long);
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  cpu::greedy_diverse_select(p, threads());
  return index;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdrop, CPU, m) {
  m.impl("adaptive_split_select", TORCH_BOX(&adaptive_split_select));
  m.impl("greedy_diverse_select", TORCH_BOX(&greedy_diverse_select));
}

}  // namespace cdrop::binding
