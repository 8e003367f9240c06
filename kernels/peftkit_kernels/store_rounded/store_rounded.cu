// stored <- meant, rounded once, and the sums over what was stored and what was meant, on a GPU; see reference.py.
//
// Each block adds up what it stores, and a second small kernel adds the blocks up in their order, so that the sums do not
// depend on chance.

#include "peftkit_cuda.h"

#include <algorithm>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kThreads = 256;
constexpr int kSums = 8;
constexpr int64_t kBlocks = 1024;  // at most

// `Count` neighbouring numbers, read or written at once where Count is more than one.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T of[Count];
};

__device__ inline int not_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u; }

// The sum over the block, for its first thread.
__device__ inline double block_sum(double value) {
  __shared__ double parts[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) store_kernel(T* __restrict__ stored, const float* __restrict__ meant,
                                                         int64_t count, double* __restrict__ parts) {
  double sums[4] = {};
  int counts[4] = {};
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads * kCount) {
    const Pack<float, kCount> wanted = *reinterpret_cast<const Pack<float, kCount>*>(meant + i);
    Pack<T, kCount> own = *reinterpret_cast<const Pack<T, kCount>*>(stored + i);
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      const float before = peftkit::widen(own.of[c]);
      own.of[c] = peftkit::narrow<T>(wanted.of[c]);
      const float after = peftkit::widen(own.of[c]);
      const double w = before, d = static_cast<double>(wanted.of[c]) - w, r = static_cast<double>(after) - w;
      sums[0] = fma(w, w, sums[0]);
      sums[1] = fma(d, d, sums[1]);
      sums[2] = fma(r - d, r - d, sums[2]);
      sums[3] = fma(r, d, sums[3]);
      counts[0] += after != before;
      counts[1] += not_finite(before);
      counts[2] += not_finite(wanted.of[c]);
      counts[3] += not_finite(after);
    }
    *reinterpret_cast<Pack<T, kCount>*>(stored + i) = own;
  }
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    const double total = block_sum(sum < 4 ? sums[sum % 4] : static_cast<double>(counts[sum % 4]));
    if (threadIdx.x == 0) parts[static_cast<int64_t>(blockIdx.x) * kSums + sum] = total;
  }
}

// out[s] = sum over the blocks of parts[block][s]; a block a sum.
__global__ void __launch_bounds__(kThreads) add_up(const double* __restrict__ parts, int64_t blocks,
                                                   double* __restrict__ out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += parts[i * kSums + blockIdx.x];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

bool starts_at(const void* address, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

Tensor store(Tensor stored, Tensor meant) {
  STD_TORCH_CHECK(stored.is_contiguous() && meant.is_contiguous() && stored.numel() == meant.numel() &&
                      meant.scalar_type() == ScalarType::Float,
                  "store_rounded_: compiled code takes contiguous tensors of one size, `meant` in float32");
  const int64_t count = stored.numel();
  if (count == 0) return torch::stable::new_zeros(stored, {kSums}, std::make_optional(ScalarType::Double));
  const peftkit::OnDevice device(stored);
  const int64_t blocks = std::min<int64_t>((count + 8 * kThreads - 1) / (8 * kThreads), kBlocks);
  Tensor out = torch::stable::new_empty(stored, {kSums}, std::make_optional(ScalarType::Double));
  Tensor parts = torch::stable::new_empty(stored, {blocks * kSums}, std::make_optional(ScalarType::Double));
  auto* found = static_cast<double*>(parts.mutable_data_ptr());
  peftkit::with_type(stored.scalar_type(), "store_rounded_", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    auto* to = static_cast<T*>(stored.mutable_data_ptr());
    const auto* from = static_cast<const float*>(meant.const_data_ptr());
    if (count % 4 == 0 && starts_at(to, 4 * sizeof(T)) && starts_at(from, 16)) {
      store_kernel<T, 4><<<static_cast<unsigned>(blocks), kThreads, 0, device.stream()>>>(to, from, count, found);
    } else {
      store_kernel<T, 1><<<static_cast<unsigned>(blocks), kThreads, 0, device.stream()>>>(to, from, count, found);
    }
  });
  add_up<<<kSums, kThreads, 0, device.stream()>>>(found, blocks, static_cast<double*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) { library.impl("store_rounded_", TORCH_BOX(&store)); }
