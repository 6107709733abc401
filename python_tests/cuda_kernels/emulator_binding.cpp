// torch.ops.cdrop_emulated: select_merge as the CUDA binding calls it, on a device of the test's
// choice that the emulator plays.
#include <dlfcn.h>

#include "binding_fused.h"
#include "emulator.h"

namespace cdrop::binding {
namespace {

cuda::DeviceLimits device{90, 8, 232448, 16};
int64_t order = 0;
CdropEmulatedLaunch* launch = cdrop_emulated_launch;
cuda::LaunchPlan last;

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
  last = cuda::plan_select_merge(call.params, device);
  if (last.path == cuda::Path::kNone) throw std::runtime_error(last.reason);
  if (call.params.merge.batch > 0) launch(call.params, last, order);
  return call.result();
}

void set_device(int64_t capability, int64_t processors, int64_t shared_bytes, int64_t max_cluster,
                int64_t new_order) {
  device = {static_cast<int>(capability), static_cast<int>(processors), shared_bytes,
            static_cast<int>(max_cluster)};
  order = new_order;
}

// The emulator of another library, one with a changed body; "" for the own one.
void set_body(std::string library) {
  if (library.empty()) {
    launch = cdrop_emulated_launch;
    return;
  }
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  launch = reinterpret_cast<CdropEmulatedLaunch*>(dlsym(handle, "cdrop_emulated_launch"));
}

// Of the last call: the path, ranks, samples at a time, bytes of shared memory.
std::string last_plan() {
  const char* paths[] = {"none", "cluster", "grid"};
  return text(paths[static_cast<int>(last.path)], " ", last.ranks, " ", last.groups, " ",
              last.shared_bytes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cdrop_emulated, CPU, m) {
  m.impl("select_merge", TORCH_BOX(&select_merge));
}

STABLE_TORCH_LIBRARY_IMPL(cdrop_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_device", TORCH_BOX(&set_device));
  m.impl("set_body", TORCH_BOX(&set_body));
  m.impl("last_plan", TORCH_BOX(&last_plan));
}

}  // namespace cdrop::binding
