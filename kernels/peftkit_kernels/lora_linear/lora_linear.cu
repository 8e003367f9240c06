// A frozen linear layer with a low-rank update on a GPU; see reference.py for the definition.
//
// For a few rows one small kernel makes the inner product, and one streams the weight and adds the update at the end. On
// sm_90 the second starts before the first has ended and waits for it only where it needs it, so that the update hides
// behind the weight. Many rows go to the library that torch uses, with the factors cast and scaled in one pass.

#include "peftkit_cuda.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>
#include <optional>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kFew = 8;
constexpr int kThreads = 256;
constexpr int kWarps = 8;  // of a block that streams the weight, an output each
constexpr int kLevels = 1 << 16;

using Seed = std::optional<Tensor>;

struct Chance {
  unsigned threshold;
  double gain;

  Chance(double scale, double probability, const Seed& seed)
      : threshold(seed.has_value() ? static_cast<unsigned>(probability * kLevels + 0.5) : 0) {
    const double share = 1.0 - static_cast<double>(threshold) / kLevels;
    gain = share > 0.0 ? scale / share : 0.0;
  }
};

// Four neighbours a thread.
template <class Bits>
__global__ void __launch_bounds__(kThreads) drop(const Bits* __restrict__ from, Bits* __restrict__ to, int64_t count,
                                                 const int64_t* __restrict__ seed, unsigned threshold) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group * 4 >= count) return;
  uint64_t bits = static_cast<uint64_t>(*seed) + (static_cast<uint64_t>(group) + 1) * 0x9E3779B97F4A7C15ull;
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  bits ^= bits >> 31;
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t at = group * 4 + lane;
    if (at < count) to[at] = ((bits >> (16 * lane)) & 0xffffu) >= threshold ? from[at] : Bits(0);
  }
}

template <class From, class To>
__global__ void __launch_bounds__(kThreads) cast(const From* __restrict__ from, To* __restrict__ to, float by,
                                                 int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = peftkit::narrow<To>(peftkit::widen(from[i]) * by);
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// inner[row][k] = gain * x[row] . down[k]; a block for each.
template <class Value, class Factor>
__global__ void __launch_bounds__(kThreads)
    inner_products(const Value* __restrict__ x, const Factor* __restrict__ down, float* __restrict__ inner, float gain,
                   int64_t width, int64_t rank) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  __shared__ float parts[kThreads / 32];
  const Value* own = x + static_cast<int64_t>(blockIdx.y) * width;
  const Factor* other = down + static_cast<int64_t>(blockIdx.x) * width;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < width; j += kThreads) sum += peftkit::widen(own[j]) * peftkit::widen(other[j]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (float part : parts) total += part;
    inner[static_cast<int64_t>(blockIdx.y) * rank + blockIdx.x] = gain * total;
  }
}

// A warp an output: the row of the weight with every row of x, then the update.
template <class Value, class Factor, int Rows>
__global__ void __launch_bounds__(32 * kWarps)
    outputs(const Value* __restrict__ x, const Value* __restrict__ weight, const Value* __restrict__ bias,
            const Factor* __restrict__ up, const float* __restrict__ inner, Value* __restrict__ out, int rows,
            int64_t width, int64_t count, int64_t rank, bool aligned) {
  constexpr int kStep = 16 / sizeof(Value);
  const int lane = threadIdx.x % 32;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const bool inside = output < count;
  const Value* own = weight + (inside ? output : 0) * width;
  float sums[Rows] = {};
  int64_t rest = 0;
  if (aligned) {
    rest = width / kStep * kStep;
#pragma unroll 4
    for (int64_t j = static_cast<int64_t>(lane) * kStep; j < rest; j += 32 * kStep) {
      const uint4 packed = __ldg(reinterpret_cast<const uint4*>(own + j));
      const Value* values = reinterpret_cast<const Value*>(&packed);
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        if (row >= rows) break;
        const uint4 other = __ldg(reinterpret_cast<const uint4*>(x + row * width + j));
        const Value* others = reinterpret_cast<const Value*>(&other);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          sums[row] = fmaf(peftkit::widen(values[i]), peftkit::widen(others[i]), sums[row]);
        }
      }
    }
  }
  for (int64_t j = rest + lane; j < width; j += 32) {
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      if (row < rows) sums[row] = fmaf(peftkit::widen(own[j]), peftkit::widen(x[row * width + j]), sums[row]);
    }
  }
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  const Factor* factor = up + (inside ? output : 0) * rank;
  for (int64_t k = lane; k < rank; k += 32) {
    const float by = peftkit::widen(factor[k]);
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      // Not through the read-only cache: another kernel writes it while this one runs.
      if (row < rows) sums[row] = fmaf(by, __ldcg(inner + row * rank + k), sums[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < Rows; ++row) {
    if (row >= rows) break;
    const float total = warp_sum(sums[row]);
    if (inside && lane == 0) {
      const float shift = bias == nullptr ? 0.0f : peftkit::widen(bias[output]);
      out[row * count + output] = peftkit::narrow<Value>(total + shift);
    }
  }
}

template <class Value, class Factor, int Rows>
void launch_outputs(const peftkit::OnDevice& device, const Tensor& x, const Tensor& weight, const Value* bias,
                    const Tensor& up, const Tensor& inner, Tensor& out) {
  const int64_t width = x.size(1), count = weight.size(0), rank = up.size(1);
  int ordinal = 0, major = 0;
  STD_CUDA_CHECK(cudaGetDevice(&ordinal));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal));
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((count + kWarps - 1) / kWarps));
  config.blockDim = dim3(32 * kWarps);
  config.stream = device.stream();
  config.attrs = &early;
  config.numAttrs = major >= 9 ? 1 : 0;
  const auto* values = static_cast<const Value*>(x.const_data_ptr());
  const auto* own = static_cast<const Value*>(weight.const_data_ptr());
  const bool aligned = width % (16 / static_cast<int64_t>(sizeof(Value))) == 0 &&
                       reinterpret_cast<uintptr_t>(values) % 16 == 0 && reinterpret_cast<uintptr_t>(own) % 16 == 0;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, outputs<Value, Factor, Rows>, values, own, bias,
                                    static_cast<const Factor*>(up.const_data_ptr()),
                                    static_cast<const float*>(inner.const_data_ptr()),
                                    static_cast<Value*>(out.mutable_data_ptr()), static_cast<int>(x.size(0)), width,
                                    count, rank, aligned));
}

Tensor dropped_of(const Tensor& x, unsigned threshold, const Tensor& seed) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t count = x.numel();
  if (count == 0) return out;
  const peftkit::OnDevice device(x);
  const auto* key = static_cast<const int64_t*>(seed.const_data_ptr());
  const unsigned blocks = blocks_for((count + 3) / 4);
  if (x.scalar_type() == ScalarType::Float) {
    drop<uint32_t><<<blocks, kThreads, 0, device.stream()>>>(static_cast<const uint32_t*>(x.const_data_ptr()),
                                                             static_cast<uint32_t*>(out.mutable_data_ptr()), count, key,
                                                             threshold);
  } else {
    drop<uint16_t><<<blocks, kThreads, 0, device.stream()>>>(static_cast<const uint16_t*>(x.const_data_ptr()),
                                                             static_cast<uint16_t*>(out.mutable_data_ptr()), count, key,
                                                             threshold);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor scaled(const Tensor& factor, ScalarType type, double by) {
  if (factor.scalar_type() == type && by == 1.0) return factor;
  Tensor out = torch::stable::new_empty(factor, {factor.size(0), factor.size(1)}, std::make_optional(type));
  const int64_t count = factor.numel();
  if (count == 0) return out;
  const peftkit::OnDevice device(factor);
  peftkit::with_type(factor.scalar_type(), "lora_linear", [&](auto* f) {
    peftkit::with_type(type, "lora_linear", [&](auto* t) {
      using From = std::remove_pointer_t<decltype(f)>;
      using To = std::remove_pointer_t<decltype(t)>;
      cast<From, To><<<blocks_for(count), kThreads, 0, device.stream()>>>(
          static_cast<const From*>(factor.const_data_ptr()), static_cast<To*>(out.mutable_data_ptr()),
          static_cast<float>(by), count);
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

void add_product(Tensor& to, const Tensor& onto, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(to.get(), onto.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor down, Tensor up, double scale,
               double probability, Seed seed) {
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "lora_linear: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 &&
                      x.size(1) == weight.size(1) && down.size(1) == weight.size(1) && up.size(0) == weight.size(0) &&
                      up.size(1) == down.size(0) && x.scalar_type() == weight.scalar_type() &&
                      up.scalar_type() == down.scalar_type(),
                  "lora_linear: expected x (rows, in), weight (out, in), down (r, in) and up (out, r)");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), width = x.size(1), count = weight.size(0), rank = down.size(0);
  const Chance chance(scale, probability, seed);
  const bool few = rows > 0 && rows <= kFew && rank > 0 && count > 0 && width > 0;
  if (!few && chance.threshold == 0 && type == ScalarType::Float &&
      count * width * (rank + 2) < rows * rank * (count + width)) {
    Tensor sum = torch::stable::empty_like(weight);
    add_product(sum, weight, scaled(up, type, chance.gain), scaled(down, type, 1.0));
    return linear(x, sum, bias);
  }
  const Tensor own = chance.threshold > 0 ? dropped_of(x, chance.threshold, *seed) : x;
  if (!few) {
    Tensor out = linear(x, weight, bias);
    if (rows == 0 || rank == 0 || count == 0) return out;
    const Tensor inner = linear(own, scaled(down, type, 1.0), std::nullopt);
    add_product(out, out, inner, torch::stable::transpose(scaled(up, type, chance.gain), 0, 1));
    return out;
  }
  Tensor out = torch::stable::new_empty(x, {rows, count});
  Tensor inner = torch::stable::new_empty(x, {rows, rank}, std::make_optional(ScalarType::Float));
  const peftkit::OnDevice device(x);
  peftkit::with_type(type, "lora_linear", [&](auto* v) {
    peftkit::with_type(down.scalar_type(), "lora_linear", [&](auto* f) {
      using Value = std::remove_pointer_t<decltype(v)>;
      using Factor = std::remove_pointer_t<decltype(f)>;
      inner_products<Value, Factor>
          <<<dim3(static_cast<unsigned>(rank), static_cast<unsigned>(rows)), kThreads, 0, device.stream()>>>(
              static_cast<const Value*>(own.const_data_ptr()), static_cast<const Factor*>(down.const_data_ptr()),
              static_cast<float*>(inner.mutable_data_ptr()), static_cast<float>(chance.gain), width, rank);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const Value* shift = bias.has_value() ? static_cast<const Value*>(bias->const_data_ptr()) : nullptr;
      if (rows == 1) {
        launch_outputs<Value, Factor, 1>(device, x, weight, shift, up, inner, out);
      } else if (rows <= 4) {
        launch_outputs<Value, Factor, 4>(device, x, weight, shift, up, inner, out);
      } else {
        launch_outputs<Value, Factor, kFew>(device, x, weight, shift, up, inner, out);
      }
    });
  });
  return out;
}

Tensor dropped(Tensor x, double probability, Seed seed) {
  STD_TORCH_CHECK(x.is_contiguous(), "lora_dropped: compiled code takes contiguous tensors");
  const Chance chance(1.0, probability, seed);
  return chance.threshold > 0 ? dropped_of(x, chance.threshold, *seed) : torch::stable::clone(x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("lora_forward", TORCH_BOX(&forward));
  library.impl("lora_dropped", TORCH_BOX(&dropped));
}
