// CUDA's bfloat16 on the CPU, with the conversions of torch's headers.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  c10::BFloat16 own;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(c10::BFloat16 value) : own(value) {}
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(c10::BFloat16(value)); }
inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value.own); }
