// Low-rank updates whose adapter differs from row to row, on a GPU; see reference.py for the definition.
//
// Rows are sorted by adapter on the device, so that the host never waits for it. A block stands for one place in that
// order and finds out by itself whether a piece of up to kPiece rows of one adapter begins there; the others end at
// once. A piece reads its factor once, in vectors of 16 bytes where the sizes allow it; ranks and widths are run-time
// numbers.

#include "peftkit_cuda.h"

#include <array>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int kPiece = 8;           // rows of one adapter that share one reading of its factor
constexpr int kShrinkThreads = 256;
constexpr int kExpandThreads = 64;
constexpr int kOuterThreads = 64;
constexpr int kOuterRanks = 8;      // ranks of a block of `outer`
constexpr int kStaged = 64;         // ranks or rows whose intermediate is in shared memory at a time

// What every kernel knows about the batch: adapters in ascending order, and the rows in that order.
struct Batch {
  const int64_t* key;
  const int64_t* order;
  const int64_t* starts;
  int64_t rows, adapters, total, max_rank;
};

struct Piece {
  int64_t adapter, start, rank;
  int count;
};

// The first place of the order whose adapter is not less than `wanted`.
__device__ inline int64_t lower_bound(const Batch& batch, int64_t wanted) {
  int64_t low = 0, high = batch.rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (batch.key[middle] < wanted) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The ranks of an adapter; none for rows without one, and for an adapter that there is not.
__device__ inline Piece ranks_of(const Batch& batch, int64_t adapter) {
  Piece piece{adapter, 0, 0, 0};
  if (adapter < 0 || adapter >= batch.adapters) return piece;
  const int64_t start = batch.starts[adapter], end = batch.starts[adapter + 1];
  if (start < 0 || end < start || end > batch.total || end - start > batch.max_rank) return piece;
  piece.start = start;
  piece.rank = end - start;
  return piece;
}

// The piece that begins at a place of the order; `count` is 0 where none does.
__device__ inline Piece piece_at(const Batch& batch, int64_t place) {
  Piece piece = ranks_of(batch, batch.key[place]);
  if (piece.rank == 0 || (place - lower_bound(batch, piece.adapter)) % kPiece != 0) return piece;
  while (piece.count < kPiece && place + piece.count < batch.rows && batch.key[place + piece.count] == piece.adapter) {
    ++piece.count;
  }
  return piece;
}

// `Count` neighbouring numbers, read or written at once where Count is more than one.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T of[Count];
};

template <class T, int Count>
__device__ inline void read(const T* from, float (&to)[Count]) {
  const Pack<T, Count> pack = *reinterpret_cast<const Pack<T, Count>*>(from);
#pragma unroll
  for (int i = 0; i < Count; ++i) to[i] = peftkit::widen(pack.of[i]);
}

// hidden[row][k] = factor[start + k] · x[row] for the rows of a piece and kRanks ranks.
template <class X, class Factor, int kCount, int kRanks>
__global__ void __launch_bounds__(kShrinkThreads) shrink_kernel(Batch batch, const X* __restrict__ x,
                                                                const Factor* __restrict__ factor,
                                                                float* __restrict__ hidden, int64_t width) {
  __shared__ float parts[kShrinkThreads / 32][kPiece][kRanks];
  const Piece piece = piece_at(batch, blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRanks;
  if (piece.count == 0 || first >= piece.rank) return;
  const X* own[kPiece];
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    own[i] = x + batch.order[blockIdx.x + min(i, piece.count - 1)] * width;
  }
  const Factor* from[kRanks];
#pragma unroll
  for (int k = 0; k < kRanks; ++k) from[k] = factor + (piece.start + min(first + k, piece.rank - 1)) * width;
  float sums[kPiece][kRanks] = {};
#pragma unroll 2
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kCount; at < width; at += kShrinkThreads * kCount) {
    float values[kRanks][kCount];
#pragma unroll
    for (int k = 0; k < kRanks; ++k) read<Factor, kCount>(from[k] + at, values[k]);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (i >= piece.count) break;
      float by[kCount];
      read<X, kCount>(own[i] + at, by);
#pragma unroll
      for (int k = 0; k < kRanks; ++k) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[i][k] = fmaf(by[c], values[k][c], sums[i][k]);
      }
    }
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i >= piece.count) break;
#pragma unroll
    for (int k = 0; k < kRanks; ++k) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[i][k] += __shfl_xor_sync(0xffffffffu, sums[i][k], step);
      if (lane == 0) parts[warp][i][k] = sums[i][k];
    }
  }
  __syncthreads();
  const int i = threadIdx.x / kRanks, k = threadIdx.x % kRanks;
  if (i < piece.count && first + k < piece.rank) {
    float whole = 0.0f;
#pragma unroll
    for (int w = 0; w < kShrinkThreads / 32; ++w) whole += parts[w][i][k];
    hidden[batch.order[blockIdx.x + i] * batch.max_rank + first + k] = whole;
  }
}

// out[row][j] += scale * sum_k hidden[row][k] factor[start + k][j] for the rows of a piece and a block of columns.
template <class Out, class Factor, int kCount>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(Batch batch, const float* __restrict__ scales,
                                                                const float* __restrict__ hidden,
                                                                const Factor* __restrict__ factor,
                                                                Out* __restrict__ out, int64_t width) {
  __shared__ float by[kStaged][kPiece];
  const Piece piece = piece_at(batch, blockIdx.x);
  if (piece.count == 0) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kExpandThreads + threadIdx.x) * kCount;
  const float scale = scales[piece.adapter];
  float sums[kPiece][kCount] = {};
  for (int64_t k0 = 0; k0 < piece.rank; k0 += kStaged) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kStaged), piece.rank - k0));
    __syncthreads();
    for (int at = threadIdx.x; at < count * piece.count; at += kExpandThreads) {
      const int i = at / count, k = at % count;
      by[k][i] = scale * hidden[batch.order[blockIdx.x + i] * batch.max_rank + k0 + k];
    }
    __syncthreads();
    if (column >= width) continue;
    const Factor* from = factor + (piece.start + k0) * width + column;
#pragma unroll 8
    for (int k = 0; k < count; ++k) {
      float values[kCount];
      read<Factor, kCount>(from + k * width, values);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (i >= piece.count) break;
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[i][c] = fmaf(by[k][i], values[c], sums[i][c]);
      }
    }
  }
  if (column >= width) return;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i >= piece.count) break;
    Out* to = out + batch.order[blockIdx.x + i] * width + column;
    float own[kCount];
    read<Out, kCount>(to, own);
    Pack<Out, kCount> pack;
#pragma unroll
    for (int c = 0; c < kCount; ++c) pack.of[c] = peftkit::narrow<Out>(own[c] + sums[i][c]);
    *reinterpret_cast<Pack<Out, kCount>*>(to) = pack;
  }
}

// found[start + k][j] = scale * sum over the rows of one adapter of hidden[row][k] y[row][j]. The block at the first
// row of an adapter takes all of its rows, one after the other, so that the result does not depend on chance.
template <class Y, class Factor, int kCount>
__global__ void __launch_bounds__(kOuterThreads) outer_kernel(Batch batch, const float* __restrict__ scales,
                                                              const float* __restrict__ hidden,
                                                              const Y* __restrict__ y, Factor* __restrict__ found,
                                                              int64_t width) {
  __shared__ float by[kStaged][kOuterRanks];
  __shared__ int64_t row[kStaged];
  const int64_t place = blockIdx.x;
  const int64_t adapter = batch.key[place];
  if (place > 0 && batch.key[place - 1] == adapter) return;
  const Piece piece = ranks_of(batch, adapter);
  const int64_t first = static_cast<int64_t>(blockIdx.z) * kOuterRanks;
  if (first >= piece.rank) return;
  const int64_t end = lower_bound(batch, adapter + 1);
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kOuterThreads + threadIdx.x) * kCount;
  const float scale = scales[adapter];
  float sums[kOuterRanks][kCount] = {};
  for (int64_t i0 = place; i0 < end; i0 += kStaged) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kStaged), end - i0));
    __syncthreads();
    for (int at = threadIdx.x; at < count * kOuterRanks; at += kOuterThreads) {
      const int i = at / kOuterRanks, k = at % kOuterRanks;
      const int64_t own = batch.order[i0 + i];
      by[i][k] = first + k < piece.rank ? scale * hidden[own * batch.max_rank + first + k] : 0.0f;
      if (k == 0) row[i] = own;
    }
    __syncthreads();
    if (column >= width) continue;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      float values[kCount];
      read<Y, kCount>(y + row[i] * width + column, values);
#pragma unroll
      for (int k = 0; k < kOuterRanks; ++k) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[k][c] = fmaf(by[i][k], values[c], sums[k][c]);
      }
    }
  }
  if (column >= width) return;
#pragma unroll
  for (int k = 0; k < kOuterRanks; ++k) {
    if (first + k >= piece.rank) break;
    Pack<Factor, kCount> pack;
#pragma unroll
    for (int c = 0; c < kCount; ++c) pack.of[c] = peftkit::narrow<Factor>(sums[k][c]);
    *reinterpret_cast<Pack<Factor, kCount>*>(found + (piece.start + first + k) * width + column) = pack;
  }
}

void check_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), "multi_lora: compiled code takes ", name,
                  " as a contiguous matrix");
}

std::array<Tensor, 2> sorted(const Tensor& adapter) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(adapter), torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Batch batch_of(const std::array<Tensor, 2>& order, const Tensor& starts, int64_t total, int64_t max_rank) {
  STD_TORCH_CHECK(starts.dim() == 1 && starts.is_contiguous() && starts.numel() >= 1 &&
                      starts.scalar_type() == ScalarType::Long && order[0].scalar_type() == ScalarType::Long,
                  "multi_lora: adapter and starts must be contiguous vectors of int64");
  Batch batch{};
  batch.key = static_cast<const int64_t*>(order[0].const_data_ptr());
  batch.order = static_cast<const int64_t*>(order[1].const_data_ptr());
  batch.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  batch.rows = order[0].numel();
  batch.adapters = starts.numel() - 1;
  batch.total = total;
  batch.max_rank = max_rank;
  return batch;
}

void check_hidden(const Tensor& hidden, const Tensor& scales, const Tensor& starts, const Tensor& adapter) {
  check_matrix(hidden, "the intermediate");
  STD_TORCH_CHECK(hidden.scalar_type() == ScalarType::Float && scales.scalar_type() == ScalarType::Float &&
                      scales.is_contiguous() && scales.dim() == 1 && scales.numel() + 1 == starts.numel() &&
                      adapter.dim() == 1 && adapter.numel() == hidden.size(0),
                  "multi_lora: expected an intermediate (rows, max rank) and scales (adapters,) in float32");
}

bool fits(const Tensor& tensor, int64_t width, int count) {
  const auto bytes = tensor.element_size() * count;
  return width % count == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

unsigned blocks_of(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// Calls `use` with null pointers of the types of two dtypes.
template <class Use>
void with_types(const Tensor& a, const Tensor& b, Use&& use) {
  peftkit::with_type(a.scalar_type(), "multi_lora", [&](auto* first) {
    peftkit::with_type(b.scalar_type(), "multi_lora", [&](auto* second) { use(first, second); });
  });
}

template <class X, class Factor, int kCount, int kRanks>
void run_shrink(const Batch& batch, const Tensor& x, const Tensor& factor, Tensor& hidden, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(batch.rows), blocks_of(batch.max_rank, kRanks));
  shrink_kernel<X, Factor, kCount, kRanks><<<blocks, kShrinkThreads, 0, stream>>>(
      batch, static_cast<const X*>(x.const_data_ptr()), static_cast<const Factor*>(factor.const_data_ptr()),
      static_cast<float*>(hidden.mutable_data_ptr()), x.size(1));
}

Tensor shrink(Tensor x, Tensor factor, Tensor starts, Tensor adapter, int64_t max_rank) {
  check_matrix(x, "x");
  check_matrix(factor, "a factor");
  const int64_t rows = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(factor.size(1) == width && adapter.dim() == 1 && adapter.numel() == rows && max_rank >= 0,
                  "multi_lora: expected x (rows, width), a factor (total rank, width) and adapter (rows,)");
  Tensor hidden = torch::stable::new_zeros(x, {rows, max_rank}, std::make_optional(ScalarType::Float));
  if (rows == 0 || max_rank == 0) return hidden;
  const peftkit::OnDevice device(x);
  const std::array<Tensor, 2> order = sorted(adapter);
  const Batch batch = batch_of(order, starts, factor.size(0), max_rank);
  // Few rows: many blocks, each with two ranks. Many rows: each reading of x serves more ranks.
  const bool few = rows * ((max_rank + 1) / 2) < 2048;
  with_types(x, factor, [&](auto* x_type, auto* factor_type) {
    using X = std::remove_pointer_t<decltype(x_type)>;
    using Factor = std::remove_pointer_t<decltype(factor_type)>;
    constexpr int count = sizeof(X) == 2 && sizeof(Factor) == 2 ? 8 : 4;
    const bool wide = fits(x, width, count) && fits(factor, width, count);
    if (wide && few) {
      run_shrink<X, Factor, count, 2>(batch, x, factor, hidden, device.stream());
    } else if (wide) {
      run_shrink<X, Factor, count, 4>(batch, x, factor, hidden, device.stream());
    } else {
      run_shrink<X, Factor, 1, 2>(batch, x, factor, hidden, device.stream());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return hidden;
}

template <class Out, class Factor, int kCount>
void run_expand(const Batch& batch, const Tensor& scales, const Tensor& hidden, const Tensor& factor, Tensor& out,
                cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(batch.rows), blocks_of(out.size(1), kExpandThreads * kCount));
  expand_kernel<Out, Factor, kCount><<<blocks, kExpandThreads, 0, stream>>>(
      batch, static_cast<const float*>(scales.const_data_ptr()), static_cast<const float*>(hidden.const_data_ptr()),
      static_cast<const Factor*>(factor.const_data_ptr()), static_cast<Out*>(out.mutable_data_ptr()), out.size(1));
}

void expand(Tensor out, Tensor hidden, Tensor factor, Tensor starts, Tensor scales, Tensor adapter) {
  check_matrix(out, "out");
  check_matrix(factor, "a factor");
  check_hidden(hidden, scales, starts, adapter);
  const int64_t rows = out.size(0), width = out.size(1);
  STD_TORCH_CHECK(factor.size(1) == width && rows == hidden.size(0),
                  "multi_lora: expected out (rows, width) and a factor (total rank, width)");
  if (rows == 0 || width == 0 || hidden.size(1) == 0) return;
  const peftkit::OnDevice device(out);
  const std::array<Tensor, 2> order = sorted(adapter);
  const Batch batch = batch_of(order, starts, factor.size(0), hidden.size(1));
  with_types(out, factor, [&](auto* out_type, auto* factor_type) {
    using Out = std::remove_pointer_t<decltype(out_type)>;
    using Factor = std::remove_pointer_t<decltype(factor_type)>;
    constexpr int count = sizeof(Out) == 2 && sizeof(Factor) == 2 ? 8 : 4;
    if (fits(out, width, count) && fits(factor, width, count)) {
      run_expand<Out, Factor, count>(batch, scales, hidden, factor, out, device.stream());
    } else {
      run_expand<Out, Factor, 1>(batch, scales, hidden, factor, out, device.stream());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Y, class Factor, int kCount>
void run_outer(const Batch& batch, const Tensor& scales, const Tensor& hidden, const Tensor& y, Tensor& found,
               cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(batch.rows), blocks_of(y.size(1), kOuterThreads * kCount),
                    blocks_of(batch.max_rank, kOuterRanks));
  outer_kernel<Y, Factor, kCount><<<blocks, kOuterThreads, 0, stream>>>(
      batch, static_cast<const float*>(scales.const_data_ptr()), static_cast<const float*>(hidden.const_data_ptr()),
      static_cast<const Y*>(y.const_data_ptr()), static_cast<Factor*>(found.mutable_data_ptr()), y.size(1));
}

Tensor outer(Tensor hidden, Tensor y, Tensor like, Tensor starts, Tensor scales, Tensor adapter) {
  check_matrix(y, "y");
  check_matrix(like, "a factor");
  check_hidden(hidden, scales, starts, adapter);
  const int64_t rows = y.size(0), width = y.size(1);
  STD_TORCH_CHECK(like.size(1) == width && rows == hidden.size(0),
                  "multi_lora: expected y (rows, width) and a factor (total rank, width)");
  Tensor found = torch::stable::new_zeros(like, {like.size(0), width});
  if (rows == 0 || width == 0 || hidden.size(1) == 0) return found;
  const peftkit::OnDevice device(y);
  const std::array<Tensor, 2> order = sorted(adapter);
  const Batch batch = batch_of(order, starts, like.size(0), hidden.size(1));
  with_types(y, like, [&](auto* y_type, auto* factor_type) {
    using Y = std::remove_pointer_t<decltype(y_type)>;
    using Factor = std::remove_pointer_t<decltype(factor_type)>;
    // Two columns a thread: a long segment has few blocks as it is.
    if (fits(y, width, 2) && fits(found, width, 2)) {
      run_outer<Y, Factor, 2>(batch, scales, hidden, y, found, device.stream());
    } else {
      run_outer<Y, Factor, 1>(batch, scales, hidden, y, found, device.stream());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("multi_lora_shrink", TORCH_BOX(&shrink));
  library.impl("multi_lora_expand_", TORCH_BOX(&expand));
  library.impl("multi_lora_outer", TORCH_BOX(&outer));
}
