// weight + scale * up @ down in place on a GPU; see reference.py for the definition.
//
// A block takes 16 rows and 256 columns. Each thread keeps the sums of its two columns over all rows in registers, in
// a chain of fused multiply-adds, one rank after the other, so that the bits are those of every other implementation.

#include "peftkit_cuda.h"

namespace {

using peftkit::Tensor;

constexpr int kRows = 16;
constexpr int kThreads = 128;
constexpr int kColumns = 2;  // of a thread
constexpr int kRanks = 16;   // ranks whose part of `up` is in shared memory at a time

template <class Weight, class Factor>
__global__ void __launch_bounds__(kThreads) merge(Weight* __restrict__ weight, const Factor* __restrict__ down,
                                                  const Factor* __restrict__ up, float scale, int64_t rows,
                                                  int64_t columns, int64_t rank) {
  __shared__ float part[kRows][kRanks];
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t column0 = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kColumns;
  float sums[kRows][kColumns] = {};
  for (int64_t k0 = 0; k0 < rank; k0 += kRanks) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kRanks), rank - k0));
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kRanks; i += kThreads) {
      const int row = i / kRanks, k = i % kRanks;
      const bool inside = row0 + row < rows && k < count;
      part[row][k] = inside ? peftkit::widen(up[(row0 + row) * rank + k0 + k]) : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      float values[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const bool inside = column0 + c < columns;
        values[c] = inside ? peftkit::widen(down[(k0 + k) * columns + column0 + c]) : 0.0f;
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[row][c] = __fmaf_rn(part[row][k], values[c], sums[row][c]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (row0 + row >= rows) break;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column0 + c >= columns) break;
      Weight& own = weight[(row0 + row) * columns + column0 + c];
      own = peftkit::narrow<Weight>(__fadd_rn(peftkit::widen(own), __fmul_rn(sums[row][c], scale)));
    }
  }
}

void launch(Tensor weight, Tensor down, Tensor up, double scale) {
  STD_TORCH_CHECK(weight.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "merge_lora_: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 && down.size(0) == up.size(1) &&
                      weight.size(0) == up.size(0) && weight.size(1) == down.size(1) &&
                      down.scalar_type() == up.scalar_type(),
                  "merge_lora_: expected weight (out, in), down (r, in) and up (out, r), the last two of one dtype");
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  if (rows == 0 || columns == 0) return;
  const peftkit::OnDevice device(weight);
  const dim3 blocks(static_cast<unsigned>((columns + kThreads * kColumns - 1) / (kThreads * kColumns)),
                    static_cast<unsigned>((rows + kRows - 1) / kRows));
  peftkit::with_type(weight.scalar_type(), "merge_lora_", [&](auto* w) {
    peftkit::with_type(down.scalar_type(), "merge_lora_", [&](auto* f) {
      using Weight = std::remove_pointer_t<decltype(w)>;
      using Factor = std::remove_pointer_t<decltype(f)>;
      merge<Weight, Factor><<<blocks, kThreads, 0, device.stream()>>>(
          static_cast<Weight*>(weight.mutable_data_ptr()), static_cast<const Factor*>(down.const_data_ptr()),
          static_cast<const Factor*>(up.const_data_ptr()), static_cast<float>(scale), rows, columns, rank);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) { library.impl("merge_lora_", TORCH_BOX(&launch)); }
