// Tensors to 4-bit and 8-bit codes in blocks and back on a GPU; see reference.py for the definition.
//
// A warp works on a block of elements at a time. Codes are found by comparing with the points between values, and
// products and quotients are rounded as on a CPU, so that codes are those of the reference bit for bit.

#include "peftkit_cuda.h"

#include <algorithm>
#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kSmallest = 1e-38f;

struct Format4 {
  float values[16];
  float between[15];
  int order[16];
};

__constant__ const Format4 kFormats[2] = {
    {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
     {(-1.0f + -0.6961928009986877f) / 2, (-0.6961928009986877f + -0.5250730514526367f) / 2,
      (-0.5250730514526367f + -0.39491748809814453f) / 2, (-0.39491748809814453f + -0.28444138169288635f) / 2,
      (-0.28444138169288635f + -0.18477343022823334f) / 2, (-0.18477343022823334f + -0.09105003625154495f) / 2,
      -0.09105003625154495f / 2, 0.07958029955625534f / 2, (0.07958029955625534f + 0.16093020141124725f) / 2,
      (0.16093020141124725f + 0.24611230194568634f) / 2, (0.24611230194568634f + 0.33791524171829224f) / 2,
      (0.33791524171829224f + 0.44070982933044434f) / 2, (0.44070982933044434f + 0.5626170039176941f) / 2,
      (0.5626170039176941f + 0.7229568362236023f) / 2, (0.7229568362236023f + 1.0f) / 2},
     {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {{0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, 0.0f, -0.0625f / 12, -8.0f / 12, -1.0f,
      -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
     {(-1.0f + -8.0f / 12) / 2, (-8.0f / 12 + -0.5f) / 2, (-0.5f + -4.0f / 12) / 2, (-4.0f / 12 + -0.25f) / 2,
      (-0.25f + -2.0f / 12) / 2, (-2.0f / 12 + -0.0625f / 12) / 2, (-0.0625f / 12) / 2, 0.0f, (0.0625f / 12) / 2,
      (0.0625f / 12 + 2.0f / 12) / 2, (2.0f / 12 + 0.25f) / 2, (0.25f + 4.0f / 12) / 2, (4.0f / 12 + 0.5f) / 2,
      (0.5f + 8.0f / 12) / 2, (8.0f / 12 + 1.0f) / 2},
     {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}}};

// Sizes are compared as integers, in whose order a NaN is the largest.
__device__ inline unsigned size_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

template <class T>
__device__ inline float largest(const T* x, int64_t count) {
  unsigned most = 0;
  for (int64_t i = threadIdx.x % 32; i < count; i += 32) most = max(most, size_bits(peftkit::widen(x[i])));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  return __uint_as_float(most);
}

__device__ inline float at_least(float size) { return size < kSmallest ? kSmallest : size; }

__device__ inline int code_of(float value, const float* between, const int* order) {
  int rank = 0;
#pragma unroll
  for (int k = 0; k < 15; ++k) rank += !(value <= between[k]);
  return order[rank];
}

template <class T>
__global__ void __launch_bounds__(kThreads) to_4bit(const T* __restrict__ x, int64_t count, int block, int kind,
                                                    uint8_t* __restrict__ codes, float* __restrict__ sizes) {
  __shared__ int order[16];
  if (threadIdx.x < 16) order[threadIdx.x] = kFormats[kind].order[threadIdx.x];
  __syncthreads();
  float between[15];
#pragma unroll
  for (int k = 0; k < 15; ++k) between[k] = kFormats[kind].between[k];
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; b < blocks;
       b += static_cast<int64_t>(gridDim.x) * kWarps) {
    const T* from = x + b * block;
    const int64_t own = min(static_cast<int64_t>(block), count - b * block);
    const bool whole = own == block;
    const float size = largest(from, own), by = at_least(size), inverse = __fdiv_rn(1.0f, by);
    if (threadIdx.x % 32 == 0) sizes[b] = whole ? size : by;
    for (int64_t pair = threadIdx.x % 32; 2 * pair < own; pair += 32) {
      int found[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t i = 2 * pair + half;
        const float value = i < own ? peftkit::widen(from[i]) : 0.0f;
        // What fills the last byte is a zero, whatever the size.
        const float scaled = i >= own ? 0.0f : (whole ? __fmul_rn(value, inverse) : __fdiv_rn(value, by));
        found[half] = code_of(scaled, between, order);
      }
      codes[b * (block / 2) + pair] = static_cast<uint8_t>(found[0] << 4 | found[1]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) from_4bit(const uint8_t* __restrict__ codes, const float* __restrict__ sizes,
                                                      int64_t count, int shift, int kind, T* __restrict__ out) {
  // A copy for each lane: lookups of one warp then meet 32 different banks.
  __shared__ float values[16][32];
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i / 32][i % 32] = kFormats[kind].values[i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t bytes = (count + 1) / 2;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int byte = codes[i];
    const float size = sizes[(2 * i) >> shift];
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    const Pair both{peftkit::narrow<T>(__fmul_rn(values[byte >> 4][lane], size)),
                    peftkit::narrow<T>(__fmul_rn(values[byte & 15][lane], size))};
    if (2 * i + 1 < count) {
      reinterpret_cast<Pair*>(out)[i] = both;
    } else {
      out[2 * i] = both.first;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) to_int8(const T* __restrict__ x, int64_t count, int block,
                                                    int8_t* __restrict__ codes, float* __restrict__ sizes) {
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; b < blocks;
       b += static_cast<int64_t>(gridDim.x) * kWarps) {
    const T* from = x + b * block;
    const int64_t own = min(static_cast<int64_t>(block), count - b * block);
    const float size = largest(from, own), inverse = __fdiv_rn(1.0f, at_least(size));
    if (threadIdx.x % 32 == 0) sizes[b] = size;
    for (int64_t i = threadIdx.x % 32; i < own; i += 32) {
      const float value = rintf(__fmul_rn(__fmul_rn(peftkit::widen(from[i]), inverse), 127.0f));
      const float held = isnan(value) ? 0.0f : fminf(fmaxf(value, -127.0f), 127.0f);
      codes[b * block + i] = static_cast<int8_t>(static_cast<int>(held));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) from_int8(const int8_t* __restrict__ codes, const float* __restrict__ sizes,
                                                      int64_t count, int shift, T* __restrict__ out) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const float step = __fdiv_rn(sizes[i >> shift], 127.0f);
    out[i] = peftkit::narrow<T>(__fmul_rn(static_cast<float>(codes[i]), step));
  }
}

void check(bool right, int64_t block) {
  STD_TORCH_CHECK(right, "quantize_blockwise: expected contiguous tensors, and as many codes and sizes as the blocks have");
  STD_TORCH_CHECK(block >= 32 && block <= 4096 && (block & (block - 1)) == 0, "quantize_blockwise: block is ", block,
                  "; expected a power of two from 32 to 4096");
}

int shift_of(int64_t block) {
  int shift = 0;
  while ((int64_t{1} << shift) < block) ++shift;
  return shift;
}

// Enough thread blocks for the work, and no more than fill any GPU many times over.
unsigned grid_of(int64_t items, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>((items + each - 1) / each, 1 << 16));
}

std::tuple<Tensor, Tensor> quantize_4bit(Tensor x, int64_t kind, int64_t block) {
  check(x.is_contiguous() && (kind == 0 || kind == 1), block);
  const int64_t count = x.numel(), blocks = (count + block - 1) / block;
  Tensor codes = torch::stable::new_empty(x, {(count + 1) / 2}, std::make_optional(ScalarType::Byte));
  Tensor sizes = torch::stable::new_empty(x, {blocks}, std::make_optional(ScalarType::Float));
  if (count == 0) return {codes, sizes};
  const peftkit::OnDevice device(x);
  peftkit::with_type(x.scalar_type(), "quantize_4bit", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    to_4bit<T><<<grid_of(blocks, kWarps), kThreads, 0, device.stream()>>>(
        static_cast<const T*>(x.const_data_ptr()), count, static_cast<int>(block), static_cast<int>(kind),
        static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<float*>(sizes.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, sizes};
}

Tensor dequantize_4bit(Tensor codes, Tensor sizes, int64_t kind, int64_t block, int64_t count, ScalarType dtype) {
  check(codes.is_contiguous() && sizes.is_contiguous() && (kind == 0 || kind == 1) && block > 0 && count >= 0 &&
            codes.scalar_type() == ScalarType::Byte && sizes.scalar_type() == ScalarType::Float &&
            codes.numel() == (count + 1) / 2 && sizes.numel() == (count + block - 1) / block,
        block);
  Tensor out = torch::stable::new_empty(codes, {count}, std::make_optional(dtype));
  if (count == 0) return out;
  const peftkit::OnDevice device(codes);
  peftkit::with_type(dtype, "dequantize_4bit", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    from_4bit<T><<<grid_of((count + 1) / 2, kThreads), kThreads, 0, device.stream()>>>(
        static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const float*>(sizes.const_data_ptr()), count,
        shift_of(block), static_cast<int>(kind), static_cast<T*>(out.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<Tensor, Tensor> quantize_int8(Tensor x, int64_t block) {
  check(x.is_contiguous(), block);
  const int64_t count = x.numel(), blocks = (count + block - 1) / block;
  Tensor codes = torch::stable::new_empty(x, {count}, std::make_optional(ScalarType::Char));
  Tensor sizes = torch::stable::new_empty(x, {blocks}, std::make_optional(ScalarType::Float));
  if (count == 0) return {codes, sizes};
  const peftkit::OnDevice device(x);
  peftkit::with_type(x.scalar_type(), "quantize_int8", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    to_int8<T><<<grid_of(blocks, kWarps), kThreads, 0, device.stream()>>>(
        static_cast<const T*>(x.const_data_ptr()), count, static_cast<int>(block),
        static_cast<int8_t*>(codes.mutable_data_ptr()), static_cast<float*>(sizes.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {codes, sizes};
}

Tensor dequantize_int8(Tensor codes, Tensor sizes, int64_t block, ScalarType dtype) {
  const int64_t count = codes.numel();
  check(codes.is_contiguous() && sizes.is_contiguous() && block > 0 && codes.scalar_type() == ScalarType::Char &&
            sizes.scalar_type() == ScalarType::Float && sizes.numel() == (count + block - 1) / block,
        block);
  Tensor out = torch::stable::new_empty(codes, {count}, std::make_optional(dtype));
  if (count == 0) return out;
  const peftkit::OnDevice device(codes);
  peftkit::with_type(dtype, "dequantize_int8", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    from_int8<T><<<grid_of(count, kThreads), kThreads, 0, device.stream()>>>(
        static_cast<const int8_t*>(codes.const_data_ptr()), static_cast<const float*>(sizes.const_data_ptr()), count,
        shift_of(block), static_cast<T*>(out.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  library.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  library.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  library.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
}
