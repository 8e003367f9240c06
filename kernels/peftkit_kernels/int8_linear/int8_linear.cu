// A linear layer with an 8-bit weight on a GPU; see reference.py for the definition.
//
// Rows are quantized by a block each. A few rows are multiplied here, a warp an output, four codes an instruction; many go
// to the library's integer product where their sizes suit it.

#include "peftkit_cuda.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>
#include <cfloat>
#include <optional>
#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = 8;
constexpr int kRows = 8;  // rows of a pass over the weight
constexpr int64_t kMany = 17;  // rows from which the library's product may be used
constexpr float kLargest = 127.0f;

template <class Value>
__global__ void __launch_bounds__(kThreads)
    quantize(const Value* __restrict__ x, int8_t* __restrict__ codes, float* __restrict__ scales, int shift,
             int64_t width) {
  __shared__ float parts[kThreads / 32];
  const Value* own = x + static_cast<int64_t>(blockIdx.x) * width;
  float largest = 0.0f;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) largest = fmaxf(largest, fabsf(peftkit::widen(own[j])));
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = largest;
  __syncthreads();
  for (float part : parts) largest = fmaxf(largest, part);
  const float inverse = largest > 0.0f ? fminf(__fdiv_rn(kLargest, largest), FLT_MAX) : 0.0f;
  int8_t* to = codes + static_cast<int64_t>(blockIdx.x) * width;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) {
    const float code = fminf(fmaxf(rintf(__fmul_rn(peftkit::widen(own[j]), inverse)), -kLargest), kLargest);
    to[j] = static_cast<int8_t>(static_cast<int>(code) + shift);
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = __fdiv_rn(largest, kLargest);
}

template <class Value, class Sum>
__global__ void __launch_bounds__(kThreads)
    finish(const Sum* __restrict__ sums, const float* __restrict__ row_scale, const float* __restrict__ weight_scale,
           const Value* __restrict__ bias, Value* __restrict__ out, int64_t count, int64_t total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t row = i / count, output = i % count;
  const float shift = bias == nullptr ? 0.0f : peftkit::widen(bias[output]);
  out[i] = peftkit::narrow<Value>(static_cast<float>(sums[i]) * (row_scale[row] * weight_scale[output]) + shift);
}

__device__ inline int warp_sum(int value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Integer products of up to kRows rows of codes, finished.
template <class Value>
__global__ void __launch_bounds__(32 * kWarps)
    multiply(const int8_t* __restrict__ codes, const float* __restrict__ row_scale, const int8_t* __restrict__ weight,
             const float* __restrict__ weight_scale, const Value* __restrict__ bias, Value* __restrict__ out, int rows,
             int64_t width, int64_t count, bool aligned) {
  const int lane = threadIdx.x % 32;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (output >= count) return;
  const int8_t* own = weight + output * width;
  int sums[kRows] = {};
  int64_t rest = 0;
  if (aligned) {
    rest = width / 16 * 16;
#pragma unroll 2
    for (int64_t j = static_cast<int64_t>(lane) * 16; j < rest; j += 512) {
      const int4 w = __ldg(reinterpret_cast<const int4*>(own + j));
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= rows) break;
        const int4 x = __ldg(reinterpret_cast<const int4*>(codes + row * width + j));
        sums[row] = __dp4a(w.x, x.x, sums[row]);
        sums[row] = __dp4a(w.y, x.y, sums[row]);
        sums[row] = __dp4a(w.z, x.z, sums[row]);
        sums[row] = __dp4a(w.w, x.w, sums[row]);
      }
    }
  }
  for (int64_t j = rest + lane; j < width; j += 32) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row < rows) sums[row] += static_cast<int>(own[j]) * static_cast<int>(codes[row * width + j]);
    }
  }
  const float shift = bias == nullptr ? 0.0f : peftkit::widen(bias[output]);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row >= rows) break;
    const int total = warp_sum(sums[row]);
    if (lane == 0) {
      const float value = static_cast<float>(total) * (row_scale[row] * weight_scale[output]) + shift;
      out[row * count + output] = peftkit::narrow<Value>(value);
    }
  }
}

// The same with rows that are not quantized.
template <class Value>
__global__ void __launch_bounds__(32 * kWarps)
    multiply_wide(const Value* __restrict__ x, const int8_t* __restrict__ weight,
                  const float* __restrict__ weight_scale, const Value* __restrict__ bias, Value* __restrict__ out,
                  int rows, int64_t width, int64_t count) {
  const int lane = threadIdx.x % 32;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (output >= count) return;
  const int8_t* own = weight + output * width;
  float sums[kRows] = {};
#pragma unroll 4
  for (int64_t j = lane; j < width; j += 32) {
    const float w = static_cast<float>(own[j]);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row < rows) sums[row] = fmaf(w, peftkit::widen(x[row * width + j]), sums[row]);
    }
  }
  const float shift = bias == nullptr ? 0.0f : peftkit::widen(bias[output]);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row >= rows) break;
    const float total = warp_sum(sums[row]);
    if (lane == 0) out[row * count + output] = peftkit::narrow<Value>(total * weight_scale[output] + shift);
  }
}

template <class Value>
__global__ void __launch_bounds__(kThreads) decode(const int8_t* __restrict__ weight,
                                                   const float* __restrict__ weight_scale, Value* __restrict__ out,
                                                   int64_t width, int64_t total) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < total) out[i] = peftkit::narrow<Value>(static_cast<float>(weight[i]) * weight_scale[i / width]);
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast(const From* __restrict__ from, To* __restrict__ to, float by,
                                                 int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = peftkit::narrow<To>(peftkit::widen(from[i]) * by);
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

Tensor scaled(const Tensor& factor, ScalarType type, double by, const peftkit::OnDevice& device) {
  if (factor.scalar_type() == type && by == 1.0) return factor;
  Tensor out = torch::stable::new_empty(factor, {factor.size(0), factor.size(1)}, std::make_optional(type));
  peftkit::with_type(factor.scalar_type(), "int8_linear", [&](auto* f) {
    peftkit::with_type(type, "int8_linear", [&](auto* t) {
      using From = std::remove_pointer_t<decltype(f)>;
      using To = std::remove_pointer_t<decltype(t)>;
      cast<From, To><<<blocks_for(factor.numel()), kThreads, 0, device.stream()>>>(
          static_cast<const From*>(factor.const_data_ptr()), static_cast<To*>(out.mutable_data_ptr()),
          static_cast<float>(by), factor.numel());
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor int_product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_int_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool shifted) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "int8_quantize_rows: expected a contiguous matrix");
  const int64_t rows = x.size(0), width = x.size(1);
  const ScalarType type = shifted ? ScalarType::Byte : ScalarType::Char;
  Tensor codes = torch::stable::new_empty(x, {rows, width}, std::make_optional(type));
  Tensor scales = torch::stable::new_empty(x, {rows}, std::make_optional(ScalarType::Float));
  if (rows == 0) return {codes, scales};
  const peftkit::OnDevice device(x);
  peftkit::with_type(x.scalar_type(), "int8_quantize_rows", [&](auto* v) {
    using Value = std::remove_pointer_t<decltype(v)>;
    quantize<Value><<<static_cast<unsigned>(rows), kThreads, 0, device.stream()>>>(
        static_cast<const Value*>(x.const_data_ptr()), static_cast<int8_t*>(codes.mutable_data_ptr()),
        static_cast<float*>(scales.mutable_data_ptr()), shifted ? 128 : 0, width);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, scales};
}

Tensor finish_rows(Tensor sums, Tensor row_scale, Tensor weight_scale, std::optional<Tensor> bias, Tensor like) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && row_scale.is_contiguous() && weight_scale.is_contiguous() &&
                      row_scale.numel() == sums.size(0) && weight_scale.numel() == sums.size(1) &&
                      row_scale.scalar_type() == ScalarType::Float && weight_scale.scalar_type() == ScalarType::Float &&
                      (sums.scalar_type() == ScalarType::Int || sums.scalar_type() == ScalarType::Float),
                  "int8_finish: expected sums (rows, out) and float32 scales (rows,) and (out,)");
  Tensor out = torch::stable::new_empty(like, {sums.size(0), sums.size(1)});
  const int64_t total = out.numel(), count = sums.size(1);
  if (total == 0) return out;
  const peftkit::OnDevice device(sums);
  peftkit::with_type(like.scalar_type(), "int8_finish", [&](auto* v) {
    using Value = std::remove_pointer_t<decltype(v)>;
    const Value* shift = bias.has_value() ? static_cast<const Value*>(bias->const_data_ptr()) : nullptr;
    const auto launch = [&](auto* from) {
      using Sum = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      finish<Value, Sum><<<blocks_for(total), kThreads, 0, device.stream()>>>(
          from, static_cast<const float*>(row_scale.const_data_ptr()),
          static_cast<const float*>(weight_scale.const_data_ptr()), shift, static_cast<Value*>(out.mutable_data_ptr()),
          count, total);
    };
    if (sums.scalar_type() == ScalarType::Int) {
      launch(static_cast<const int*>(sums.const_data_ptr()));
    } else {
      launch(static_cast<const float*>(sums.const_data_ptr()));
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor forward(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, std::optional<Tensor> down,
               std::optional<Tensor> up, double scale, bool dynamic) {
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight_scale.is_contiguous() && x.dim() == 2 &&
                      weight.dim() == 2 && x.size(1) == weight.size(1) && weight_scale.numel() == weight.size(0) &&
                      weight.scalar_type() == ScalarType::Char && weight_scale.scalar_type() == ScalarType::Float,
                  "int8_linear: expected contiguous x (rows, in), int8 weight (out, in) and float32 weight_scale (out,)");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), width = x.size(1), count = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, count});
  if (rows == 0 || count == 0) return out;
  const peftkit::OnDevice device(x);
  const auto* own = static_cast<const int8_t*>(weight.const_data_ptr());
  const auto* by = static_cast<const float*>(weight_scale.const_data_ptr());
  const auto blocks = static_cast<unsigned>((count + kWarps - 1) / kWarps);
  if (dynamic) {
    const auto [codes, scales] = quantize_rows(x, false);
    if (rows >= kMany && width % 8 == 0 && count % 8 == 0 && width > 0) {
      out = finish_rows(int_product(codes, torch::stable::transpose(weight, 0, 1)), scales, weight_scale, bias, x);
    } else {
      const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
      const auto* row_scale = static_cast<const float*>(scales.const_data_ptr());
      const bool aligned = width % 16 == 0 && reinterpret_cast<uintptr_t>(own) % 16 == 0 &&
                           reinterpret_cast<uintptr_t>(from) % 16 == 0;
      peftkit::with_type(type, "int8_linear", [&](auto* v) {
        using Value = std::remove_pointer_t<decltype(v)>;
        const Value* shift = bias.has_value() ? static_cast<const Value*>(bias->const_data_ptr()) : nullptr;
        auto* to = static_cast<Value*>(out.mutable_data_ptr());
        for (int64_t first = 0; first < rows; first += kRows) {
          const int part = static_cast<int>(rows - first < kRows ? rows - first : kRows);
          multiply<Value><<<blocks, 32 * kWarps, 0, device.stream()>>>(from + first * width, row_scale + first, own, by,
                                                                       shift, to + first * count, part, width, count,
                                                                       aligned);
        }
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  } else if (rows <= kRows) {
    peftkit::with_type(type, "int8_linear", [&](auto* v) {
      using Value = std::remove_pointer_t<decltype(v)>;
      const Value* shift = bias.has_value() ? static_cast<const Value*>(bias->const_data_ptr()) : nullptr;
      multiply_wide<Value><<<blocks, 32 * kWarps, 0, device.stream()>>>(
          static_cast<const Value*>(x.const_data_ptr()), own, by, shift, static_cast<Value*>(out.mutable_data_ptr()),
          static_cast<int>(rows), width, count);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    Tensor wide = torch::stable::new_empty(x, {count, width});
    if (wide.numel() > 0) {
      peftkit::with_type(type, "int8_linear", [&](auto* v) {
        using Value = std::remove_pointer_t<decltype(v)>;
        decode<Value><<<blocks_for(wide.numel()), kThreads, 0, device.stream()>>>(
            own, by, static_cast<Value*>(wide.mutable_data_ptr()), width, wide.numel());
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    out = linear(x, wide, bias);
  }
  if (down.has_value() && up.has_value() && down->size(0) > 0) {
    const Tensor inner = linear(x, scaled(*down, type, 1.0, device), std::nullopt);
    const Tensor factor = torch::stable::transpose(scaled(*up, type, scale, device), 0, 1);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), inner.get(), factor.get(), 1.0, 1.0));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("int8_forward", TORCH_BOX(&forward));
  library.impl("int8_quantize_rows", TORCH_BOX(&quantize_rows));
  library.impl("int8_finish", TORCH_BOX(&finish_rows));
}
