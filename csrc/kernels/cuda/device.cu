#include <cuda_runtime.h>

#include "device.h"

namespace cdrop::cuda {
namespace {

// Never launched: the runtime finds it only where this library holds code for the device.
__global__ void probe_kernel() {}

}  // namespace

Status probe_device() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel));
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error is told here; later calls must not find it
  return {cudaGetErrorString(error)};
}

}  // namespace cdrop::cuda
