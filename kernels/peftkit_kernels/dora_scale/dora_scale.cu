// Norms of the rows of weight + scale * up @ down on a GPU; see reference.py for the definition.
//
// A block forms 8 rows column by column in registers, never in memory, and adds their squares: as many operations as the
// cross term takes, and less cancellation. A row that cancels even so is formed once more in double.

#include "peftkit_cuda.h"

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kRows = 8;
constexpr int kThreads = 256;
constexpr int kRanks = 64;  // ranks whose part of `up` is in shared memory at a time
constexpr double kTolerance = 4e-6;

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

template <class Weight>
__global__ void __launch_bounds__(kThreads) squares(const Weight* __restrict__ weight, float* __restrict__ out,
                                                    int64_t columns) {
  const Weight* own = weight + static_cast<int64_t>(blockIdx.x) * columns;
  double sum = 0;
  for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
    const float value = peftkit::widen(own[j]);
    sum += static_cast<double>(value * value);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(sum);
}

// Squared norms of the rows of `down`.
template <class Factor>
__global__ void __launch_bounds__(kThreads) lengths(const Factor* __restrict__ down, float* __restrict__ out,
                                                    int64_t columns) {
  const Factor* own = down + static_cast<int64_t>(blockIdx.x) * columns;
  double sum = 0;
  for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
    const float value = peftkit::widen(own[j]);
    sum += static_cast<double>(value * value);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<float>(sqrt(sum));
}

template <class Weight, class Factor>
__global__ void __launch_bounds__(kThreads)
    norms(const Weight* __restrict__ weight, const float* __restrict__ squared, const Factor* __restrict__ down,
          const Factor* __restrict__ up, const float* __restrict__ length, float* __restrict__ out, float scale,
          int64_t rows, int64_t columns, int64_t rank) {
  __shared__ float part[kRanks][kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  double totals[kRows] = {};
  for (int64_t base = 0; base < columns; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    const bool inside = j < columns;
    float values[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      values[row] = inside && first + row < rows ? peftkit::widen(weight[(first + row) * columns + j]) : 0.0f;
    }
    for (int64_t k0 = 0; k0 < rank; k0 += kRanks) {
      const int count = static_cast<int>(min(static_cast<int64_t>(kRanks), rank - k0));
      if (rank > kRanks || base == 0) {
        __syncthreads();
        for (int i = threadIdx.x; i < count * kRows; i += kThreads) {
          const int row = i % kRows, k = i / kRows;
          part[k][row] = first + row < rows ? scale * peftkit::widen(up[(first + row) * rank + k0 + k]) : 0.0f;
        }
        __syncthreads();
      }
      for (int k = 0; k < count; ++k) {
        const float value = inside ? peftkit::widen(down[(k0 + k) * columns + j]) : 0.0f;
#pragma unroll
        for (int row = 0; row < kRows; ++row) values[row] = fmaf(part[k][row], value, values[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) totals[row] += static_cast<double>(values[row] * values[row]);
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (first + row >= rows) break;
    double total = block_sum(totals[row]);
    double reach = 0;
    for (int64_t k = threadIdx.x; k < rank; k += kThreads) {
      reach += fabs(static_cast<double>(scale * peftkit::widen(up[(first + row) * rank + k]))) * length[k];
    }
    reach = block_sum(reach);
    // Each element makes a rounding a rank, one for the scale and one for the square.
    const double error = (rank + 3) * 0x1p-24 * (sqrt(static_cast<double>(squared[first + row])) + reach);
    if (error > kTolerance * sqrt(total)) {
      total = 0;
      for (int64_t j = threadIdx.x; j < columns; j += kThreads) {
        double value = static_cast<double>(peftkit::widen(weight[(first + row) * columns + j]));
        for (int64_t k = 0; k < rank; ++k) {
          const double by = static_cast<double>(scale) * peftkit::widen(up[(first + row) * rank + k]);
          value = fma(by, static_cast<double>(peftkit::widen(down[k * columns + j])), value);
        }
        total = fma(value, value, total);
      }
      total = block_sum(total);
    }
    if (threadIdx.x == 0) out[first + row] = static_cast<float>(sqrt(total));
  }
}

Tensor row_squares(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "row_squares: expected a contiguous matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {rows}, std::make_optional(ScalarType::Float));
  if (rows == 0) return out;
  const peftkit::OnDevice device(weight);
  peftkit::with_type(weight.scalar_type(), "row_squares", [&](auto* w) {
    using Weight = std::remove_pointer_t<decltype(w)>;
    squares<Weight><<<static_cast<unsigned>(rows), kThreads, 0, device.stream()>>>(
        static_cast<const Weight*>(weight.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()), columns);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor dora_norms(Tensor weight, Tensor squared, Tensor down, Tensor up, double scale) {
  STD_TORCH_CHECK(weight.is_contiguous() && squared.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "dora_norms: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 && down.size(0) == up.size(1) &&
                      weight.size(0) == up.size(0) && weight.size(1) == down.size(1) &&
                      squared.numel() == weight.size(0) && squared.scalar_type() == ScalarType::Float &&
                      down.scalar_type() == up.scalar_type(),
                  "dora_norms: expected weight (out, in), squared (out,) in float32, down (r, in) and up (out, r)");
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  Tensor out = torch::stable::new_empty(weight, {rows}, std::make_optional(ScalarType::Float));
  Tensor length = torch::stable::new_empty(weight, {rank}, std::make_optional(ScalarType::Float));
  if (rows == 0) return out;
  const peftkit::OnDevice device(weight);
  const auto blocks = static_cast<unsigned>((rows + kRows - 1) / kRows);
  peftkit::with_type(down.scalar_type(), "dora_norms", [&](auto* f) {
    using Factor = std::remove_pointer_t<decltype(f)>;
    const auto* wide_down = static_cast<const Factor*>(down.const_data_ptr());
    auto* of_down = static_cast<float*>(length.mutable_data_ptr());
    if (rank > 0) {
      lengths<Factor><<<static_cast<unsigned>(rank), kThreads, 0, device.stream()>>>(wide_down, of_down, columns);
    }
    peftkit::with_type(weight.scalar_type(), "dora_norms", [&](auto* w) {
      using Weight = std::remove_pointer_t<decltype(w)>;
      norms<Weight, Factor><<<blocks, kThreads, 0, device.stream()>>>(
          static_cast<const Weight*>(weight.const_data_ptr()), static_cast<const float*>(squared.const_data_ptr()),
          wide_down, static_cast<const Factor*>(up.const_data_ptr()), of_down,
          static_cast<float*>(out.mutable_data_ptr()), static_cast<float>(scale), rows, columns, rank);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("row_squares", TORCH_BOX(&row_squares));
  library.impl("dora_norms", TORCH_BOX(&dora_norms));
}
