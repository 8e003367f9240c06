// In place of torch's header: its products on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

static inline AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle onto, AtenTensorHandle a,
                                                       AtenTensorHandle b, double beta, double alpha) {
  return aoti_torch_cpu_addmm_out(out, onto, a, b, beta, alpha);
}
