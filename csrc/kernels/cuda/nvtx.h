// Ranges for Nsight, in a domain of their own: about 2 ns each when no tool listens.
#pragma once

#include <nvtx3/nvtx3.hpp>

namespace cdrop::cuda::nvtx {

struct Domain {
  static constexpr const char* name{"cdrop"};
};
using Range = nvtx3::scoped_range_in<Domain>;

}  // namespace cdrop::cuda::nvtx
