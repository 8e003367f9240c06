// In place of torch's header: a guard of a device that is not there, and checks of errors of the emulated runtime.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR)                                                                   \
  do {                                                                                         \
    if ((EXPR) != cudaSuccess) throw std::runtime_error("CUDA emulation: " #EXPR " failed");   \
  } while (0)

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

static inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
