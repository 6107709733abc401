// The pybind11 module `_C`: what was built. Nothing of the hot path goes through it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

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
}
