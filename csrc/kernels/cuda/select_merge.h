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

}  // namespace cdrop::cuda
