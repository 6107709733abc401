// The pybind11 module `_C`: what was built, and how a launch would be laid out. Nothing of the hot
// path goes through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "kernels/cuda/plan.h"

namespace py = pybind11;

namespace {

using Side = std::tuple<int64_t, int64_t, int64_t>;

cdrop::SaliencyParams saliency_of(const Side& side, int64_t batch, int64_t keys, int64_t prefix) {
  cdrop::SaliencyParams p;
  std::tie(p.query_heads, p.rows, p.width) = side;
  p.key_heads = p.query_heads;
  p.batch = batch;
  p.keys = keys;
  p.prefix = prefix;
  return p;
}

py::dict launch_plan(int64_t batch, int64_t tokens, int64_t width, int64_t keep, const Side& visual,
                     const std::optional<Side>& textual, int64_t contextual, int64_t prefix,
                     std::optional<int64_t> metric_width, int64_t element_bytes, int capability,
                     int processors, int64_t shared_bytes, int max_cluster) {
  cdrop::SelectMergeParams p;
  p.visual = saliency_of(visual, batch, tokens + prefix, prefix);
  p.has_text = textual.has_value();
  if (textual) p.textual = saliency_of(*textual, batch, tokens, 0);
  p.select.keep = p.merge.keep = keep;
  p.merge.contextual = contextual;
  p.merge.batch = batch;
  p.merge.tokens = tokens;
  p.merge.width = width;
  p.merge.metric_width = metric_width.value_or(std::get<2>(visual));
  p.merge.x.dtype = element_bytes == 4 ? cdrop::DType::kFloat32 : cdrop::DType::kBFloat16;
  const cdrop::cuda::LaunchPlan plan =
      cdrop::cuda::plan_select_merge(p, {capability, processors, shared_bytes, max_cluster});
  const char* paths[] = {"none", "cluster", "grid"};
  py::dict out;
  out["path"] = paths[static_cast<int>(plan.path)];
  if (plan.reason != nullptr) {
    out["reason"] = plan.reason;
    return out;
  }
  out["blocks_per_sample"] = plan.ranks;
  out["samples_at_once"] = plan.groups;
  out["threads"] = cdrop::cuda::kThreads;
  out["tokens_per_block"] = plan.tokens;
  out["columns_per_block"] = plan.columns;
  out["shared_bytes"] = plan.shared_bytes;
  out["workspace_bytes"] = plan.workspace_bytes;
  out["prefetch"] = plan.prefetch;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of consensusdrop_kernels holds.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = CDROP_VERSION;
        info["commit"] = CDROP_COMMIT;
        info["compiler"] = CDROP_COMPILER;
        info["cuda_compiler"] = CDROP_CUDA_VERSION;
        info["cuda_architectures"] = CDROP_ARCHITECTURES;
        return info;
      },
      "Version, commit, compiler, nvcc version and CUDA architectures (empty without CUDA).");
  m.def("launch_plan", &launch_plan, py::arg("batch"), py::arg("tokens"), py::arg("width"),
        py::arg("keep"), py::arg("visual"), py::arg("textual") = py::none(), py::kw_only(),
        py::arg("contextual") = 0, py::arg("prefix") = 0, py::arg("metric_width") = py::none(),
        py::arg("element_bytes") = 2, py::arg("capability") = 90, py::arg("processors") = 132,
        py::arg("shared_bytes") = 232448, py::arg("max_cluster") = 16,
        "How select_merge in CUDA C++ would be launched; the device is an H200 unless told.\n\n"
        "visual and textual: (query heads, rows, head width); element_bytes: of x, 2 or 4.\n"
        "Returns a dict: path ('cluster', 'grid' or 'none', then with the reason), blocks per\n"
        "sample, samples at once, tokens and columns of a block, bytes of shared memory and of\n"
        "workspace, and whether x is fetched ahead.");
}
