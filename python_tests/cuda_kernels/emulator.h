// A launch of the fused kernels on the CPU, free of torch, so that a changed body is compiled in a
// second.
#pragma once

#include <cstdint>

#include "kernels/cuda/plan.h"

extern "C" {
// `order` 0 runs the threads in their order, any other number shuffles them. Throws
// std::runtime_error where a device would hang or write where it must not.
using CdropEmulatedLaunch = void(const cdrop::SelectMergeParams&, const cdrop::cuda::LaunchPlan&,
                                 int64_t order);
__attribute__((visibility("default"))) CdropEmulatedLaunch cdrop_emulated_launch;
}
