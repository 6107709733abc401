// select_merge on a CUDA device, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "device.h"
#include "plan.h"

namespace cdrop::cuda {

// Of the current device.
Status device_limits(DeviceLimits* out);

// Starts the planned launch; `workspace` holds `plan.workspace_bytes`, on a 128-byte boundary.
Status launch_select_merge(const SelectMergeParams& params, const LaunchPlan& plan, void* workspace,
                           cudaStream_t stream);

// Registers, stack and shared memory of the kernel of a path, as the driver sees them.
struct KernelAttributes {
  int registers = 0, static_shared = 0, local = 0, max_threads = 0;
};
Status kernel_attributes(Path path, KernelAttributes* out);

}  // namespace cdrop::cuda
