// CUDA's half precision on the CPU, with the conversions of torch's headers.
#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  c10::Half own;
  __half() = default;
  explicit __half(c10::Half value) : own(value) {}
  explicit __half(unsigned short) = delete;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline __half __float2half_rn(float value) { return __half(c10::Half(value)); }
inline float __half2float(__half value) { return static_cast<float>(value.own); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
