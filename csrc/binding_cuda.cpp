// The CUDA C++ kernels as torch sees them: `cdrop_cuda::*`, which ops.py puts behind `cdrop::*`.
#include <torch/csrc/stable/accelerator.h>

#include "binding_fused.h"
#include "kernels/cuda/select_merge.h"

// Not there in a torch without CUDA, where no tensor leads to it either.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace cdrop::binding {
namespace {

void require(const cuda::Status& status) {
  if (!status) throw std::runtime_error(text("select_merge on CUDA: ", status.message));
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("select_merge on CUDA: this torch has no CUDA streams");
  }
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> select_merge(
    const Tensor& x, const Tensor& q_vis, const Tensor& k_vis, const MaybeTensor& q_txt,
    const MaybeTensor& k_txt, int64_t keep, int64_t contextual, double alpha, std::string fusion,
    int64_t prefix, std::optional<double> scale_vis, std::optional<double> scale_txt,
    const MaybeTensor& lse_vis, const MaybeTensor& lse_txt, const MaybeTensor& txt_weight,
    std::string txt_reduce, const MaybeTensor& metric, const MaybeTensor& valid,
    const MaybeTensor& priority, int64_t priority_keep, double threshold, double blend,
    double diversity) {
  const auto device = static_cast<int32_t>(x.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(device);
  const FusedCall call =
      prepare_select_merge(x, q_vis, k_vis, q_txt, k_txt, keep, contextual, alpha, fusion, prefix,
                           scale_vis, scale_txt, lse_vis, lse_txt, txt_weight, txt_reduce, metric,
                           valid, priority, priority_keep, threshold, blend, diversity);
  cuda::DeviceLimits limits;
  require(cuda::device_limits(&limits));
  const cuda::LaunchPlan plan = cuda::plan_select_merge(call.params, limits);
  CDROP_CHECK(plan.path != cuda::Path::kNone, "select_merge on backend 'cuda'",
              "be a call that its kernel takes", text("one it does not: ", plan.reason));
  if (call.params.merge.batch == 0) return call.result();
  const Tensor workspace = output(x, {plan.workspace_bytes}, ScalarType::Byte);
  require(cuda::launch_select_merge(call.params, plan, workspace.mutable_data_ptr(),
                                    current_stream(device)));
  return call.result();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdrop_cuda, CUDA, m) { m.impl("select_merge", TORCH_BOX(&select_merge)); }

}  // namespace cdrop::binding
