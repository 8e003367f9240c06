// In place of torch's header: a guard of a device that is not there, and checks of errors of the emulated runtime.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

static inline void torch_c10_cuda_check_msg(int32_t error, const char* file, const char* function, uint32_t line, bool,
                                            char** message) {
  if (error == 0) return;
  const std::string text = std::string("CUDA emulation: error in ") + function + ", " + file + ":" + std::to_string(line);
  *message = strdup(text.c_str());
}
static inline void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

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
