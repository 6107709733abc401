// Whether the CUDA kernels of this build can run on the current device.
#pragma once

namespace cdrop::cuda {

// What a launcher returns: `message` is null on success, else a static string that says why not.
struct Status {
  const char* message = nullptr;
  explicit operator bool() const { return message == nullptr; }
};

// Looks for a driver, a device, and code for that device in this library.
Status probe_device();

}  // namespace cdrop::cuda
