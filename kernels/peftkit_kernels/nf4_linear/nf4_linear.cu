// A linear layer whose weight is in NF4, with a low-rank update, on a GPU; see reference.py for the definition.
//
// Up to 16 rows: see peftkit_nf4.h. More rows: the weight is dequantized into a scratch and cuBLAS multiplies; update and
// bias are further columns of the factors, so that the result is rounded once.

#include "peftkit_cuda.h"
#include "peftkit_nf4.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <random>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

using peftkit::nf4::kThreads;
using peftkit::nf4::kTile;
using peftkit::nf4::kUnit;
using peftkit::nf4::kValues;
using peftkit::nf4::kWarps;

constexpr int64_t kFew = 16;
constexpr int64_t kExtra = 32;  // further columns of the factors are a multiple of this, which keeps them aligned

// The weight, rounded to T, rows `stride` apart; a block of threads a row.
template <class T>
__global__ void __launch_bounds__(kThreads) dequantize(const uint8_t* __restrict__ codes,
                                                       const float* __restrict__ sizes, int64_t height, int64_t columns,
                                                       int shift, T* __restrict__ out, int64_t stride) {
  __shared__ float values[16][32];
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i / 32][i % 32] = kValues[i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int64_t row = blockIdx.x; row < height; row += gridDim.x) {
    const int64_t start = row * columns;
    if (columns % 8 == 0 && stride % 8 == 0) {
      struct alignas(16) Eight {
        T each[8];
      };
      for (int64_t i = threadIdx.x * 8; i < columns; i += kThreads * 8) {
        const uint32_t eight = *reinterpret_cast<const uint32_t*>(codes + (start + i) / 2);
        const float size = sizes[(start + i) >> shift];
        Eight found;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          // The earlier code stands in the upper half of its byte.
          const int code = (eight >> (8 * (k / 2) + (k % 2 ? 0 : 4))) & 15;
          found.each[k] = peftkit::narrow<T>(__fmul_rn(values[code][lane], size));
        }
        *reinterpret_cast<Eight*>(out + row * stride + i) = found;
      }
    } else {
      for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
        const int64_t flat = start + i;
        const int code = flat % 2 ? codes[flat / 2] & 15 : codes[flat / 2] >> 4;
        out[row * stride + i] = peftkit::narrow<T>(__fmul_rn(values[code][lane], sizes[flat >> shift]));
      }
    }
  }
}

// to[i * stride + k] = scale * from[i * columns + k], rounded.
template <class T, class F>
__global__ void __launch_bounds__(kThreads) place(const F* __restrict__ from, int64_t rows, int64_t columns, float scale,
                                                  T* __restrict__ to, int64_t stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * columns) return;
  to[at / columns * stride + at % columns] = peftkit::narrow<T>(scale * peftkit::widen(from[at]));
}

template <class T>
__global__ void __launch_bounds__(kThreads) set_column(T* __restrict__ to, int64_t rows, int64_t stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < rows) to[at * stride] = peftkit::narrow<T>(1.0f);
}

struct Weight {
  const uint8_t* codes;
  const float* sizes;
  int64_t rows, columns;
  int shift;
};

Weight weight_of(const Tensor& codes, const Tensor& sizes, int64_t rows, int64_t columns, int64_t block) {
  STD_TORCH_CHECK(block >= 32 && (block & (block - 1)) == 0 && codes.is_contiguous() && sizes.is_contiguous() &&
                      codes.scalar_type() == ScalarType::Byte && sizes.scalar_type() == ScalarType::Float &&
                      codes.numel() == (rows * columns + 1) / 2 && sizes.numel() == (rows * columns + block - 1) / block,
                  "nf4_linear: expected contiguous uint8 codes, two a byte, and a float32 size for each block");
  int shift = 0;
  while ((int64_t{1} << shift) < block) ++shift;
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const float*>(sizes.const_data_ptr()), rows,
          columns, shift};
}

void check(const Tensor& x, const Weight& weight, bool forward, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& down, const std::optional<Tensor>& up) {
  STD_TORCH_CHECK(x.is_contiguous() && x.size(1) == (forward ? weight.columns : weight.rows),
                  "nf4_linear: compiled code takes a contiguous matrix that fits the weight");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == weight.rows),
                  "nf4_linear: expected a contiguous bias (out,)");
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "nf4_linear: expected down and up, or neither");
  STD_TORCH_CHECK(!down || (down->dim() == 2 && up->dim() == 2 && down->is_contiguous() && up->is_contiguous() &&
                            down->size(1) == weight.columns && up->size(0) == weight.rows &&
                            down->size(0) == up->size(1)),
                  "nf4_linear: expected contiguous down (r, in) and up (out, r)");
}

unsigned grid_of(int64_t items, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>((items + each - 1) / each, 1), 1 << 20));
}

// Blocks that fill the GPU: each builds a table once and then works on many rows.
unsigned resident(const Tensor& on, int64_t items) {
  int units = 0;
  cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, on.get_device_index());
  return grid_of(std::min<int64_t>(items, static_cast<int64_t>(std::max(units, 1)) * 6 * kWarps), kWarps);
}

template <class T, class F, int kRows>
void launch(const Tensor& x, int64_t first, const Weight& weight, const float* bias, const float* inner, const F* up,
            int64_t rank, T* out, cudaStream_t stream) {
  const unsigned blocks = resident(x, (weight.rows + peftkit::nf4::kWeights - 1) / peftkit::nf4::kWeights);
  peftkit::nf4::multiply<T, F, kRows><<<blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(x.const_data_ptr()) + first * weight.columns, weight.codes, weight.sizes, weight.rows,
      weight.columns, weight.shift, bias, inner + first * rank, up, rank, out + first * weight.rows);
}

// Different for every launch, and from what memory happens to hold.
unsigned long long next_token() {
  static std::atomic<uint64_t> count{uint64_t{std::random_device{}()} << 32 | std::random_device{}()};
  uint64_t bits = count.fetch_add(0x9E3779B97F4A7C15ull);
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return bits ^ (bits >> 31);
}

template <class T, class F, int kGroups>
void launch_tensor_cores(const Tensor& x, const Weight& weight, const float* bias, const F* down, const F* up,
                         int64_t rank, float scale, T* out, cudaStream_t stream) {
  const auto kernel = &peftkit::nf4::on_tensor_cores<T, F, kGroups>;
  int units = 0, each = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0));
  // As many blocks as fit at once beside the makers, and as many tiles for each.
  const int makers = static_cast<int>(std::min<int64_t>(rank, peftkit::nf4::kMakers));
  const int64_t tiles = (weight.rows + kTile - 1) / kTile;
  const int64_t fitting = std::max<int64_t>(static_cast<int64_t>(units) * std::max(each, 1) - makers, 1);
  const int64_t turns = (tiles + fitting - 1) / fitting, blocks = (tiles + turns - 1) / turns;
  const int64_t rows = x.size(0), signals = blocks * makers;
  Tensor scratch =
      torch::stable::new_empty(x, {2 * signals + rows * rank + 1}, std::make_optional(ScalarType::Float));
  auto* first = static_cast<unsigned long long*>(scratch.mutable_data_ptr());
  const peftkit::nf4::Update<F> update{down, up, reinterpret_cast<float*>(first + signals), first, next_token(), rank, scale, makers};
  kernel<<<static_cast<unsigned>(blocks + makers), kThreads, 0, stream>>>(
      static_cast<const T*>(x.const_data_ptr()), weight.codes, weight.sizes, static_cast<int>(rows), weight.rows,
      weight.columns, weight.shift, bias, update, out);
}

bool starts_at(const void* address, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <class T, class F>
void few(const Tensor& x, const Weight& weight, const float* bias, const std::optional<Tensor>& down,
         const std::optional<Tensor>& up, float scale, T* out, cudaStream_t stream) {
  const int64_t rows = x.size(0), rank = down ? down->size(0) : 0;
  const F* one = rank ? static_cast<const F*>(down->const_data_ptr()) : nullptr;
  const F* other = rank ? static_cast<const F*>(up->const_data_ptr()) : nullptr;
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  if constexpr (!std::is_same_v<T, float>) {
    int major = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
    if (major >= 8 && weight.columns % kUnit == 0 && (1 << weight.shift) >= kUnit && starts_at(from, 16) &&
        starts_at(one, 16) && starts_at(weight.codes, 8)) {
      if (rows <= 8) {
        launch_tensor_cores<T, F, 1>(x, weight, bias, one, other, rank, scale, out, stream);
      } else {
        launch_tensor_cores<T, F, 2>(x, weight, bias, one, other, rank, scale, out, stream);
      }
      return;
    }
  }
  Tensor inner = torch::stable::new_empty(x, {rows * rank + 1}, std::make_optional(ScalarType::Float));
  auto* found = static_cast<float*>(inner.mutable_data_ptr());
  if (rank) {
    peftkit::nf4::project<T, F><<<grid_of(rows * rank, kWarps), kThreads, 0, stream>>>(from, one, rows, weight.columns, rank, scale,
                                                                         found);
  }
  if (weight.columns % 8 || !starts_at(from, 16) || !starts_at(weight.codes, 4)) {
    peftkit::nf4::multiply_any<T, F><<<resident(x, rows * weight.rows), kThreads, 0, stream>>>(
        from, weight.codes, weight.sizes, rows, weight.rows, weight.columns, weight.shift, bias, found, other, rank, out);
    return;
  }
  for (int64_t first = 0; first < rows;) {
    const int64_t taken = rows - first >= 4 ? 4 : 1;
    if (taken == 4) {
      launch<T, F, 4>(x, first, weight, bias, found, other, rank, out, stream);
    } else {
      launch<T, F, 1>(x, first, weight, bias, found, other, rank, out, stream);
    }
    first += taken;
  }
}

void copy_columns(const Tensor& from, int64_t columns, void* to, int64_t stride, int64_t element, cudaStream_t stream) {
  if (from.numel() == 0) return;
  const cudaError_t error = cudaMemcpy2DAsync(to, stride * element, from.const_data_ptr(), columns * element,
                                              columns * element, from.size(0), cudaMemcpyDeviceToDevice, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "nf4_linear: ", cudaGetErrorString(error));
}

template <class T>
void place_any(const Tensor& from, int64_t rows, int64_t columns, float scale, T* to, int64_t stride,
               cudaStream_t stream) {
  if (rows * columns == 0) return;
  peftkit::with_type(from.scalar_type(), "nf4_linear", [&](auto* tag) {
    using F = std::remove_pointer_t<decltype(tag)>;
    place<T, F><<<grid_of(rows * columns, kThreads), kThreads, 0, stream>>>(
        static_cast<const F*>(from.const_data_ptr()), rows, columns, scale, to, stride);
  });
}

template <class T>
void clear_columns(T* to, int64_t rows, int64_t columns, int64_t stride, cudaStream_t stream) {
  const cudaError_t error = cudaMemset2DAsync(to, stride * sizeof(T), 0, columns * sizeof(T), rows, stream);
  STD_TORCH_CHECK(error == cudaSuccess, "nf4_linear: ", cudaGetErrorString(error));
}

int64_t padded(int64_t count) { return (count + kExtra - 1) / kExtra * kExtra; }

// (rows, columns + extra): x on the left, zeros on the right.
template <class T>
Tensor widened(const Tensor& x, int64_t extra, cudaStream_t stream) {
  if (extra == 0) return x;
  const int64_t stride = x.size(1) + extra;
  Tensor out = torch::stable::new_empty(x, {x.size(0), stride});
  auto* to = static_cast<T*>(out.mutable_data_ptr());
  copy_columns(x, x.size(1), to, stride, sizeof(T), stream);
  clear_columns(to + x.size(1), x.size(0), extra, stride, stream);
  return out;
}

template <class T>
Tensor many(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& down,
            const std::optional<Tensor>& up, float scale, cudaStream_t stream) {
  const int64_t rows = x.size(0), columns = weight.columns, rank = down ? down->size(0) : 0;
  const int64_t extra = rank || bias ? padded(rank + (bias ? 1 : 0)) : 0, stride = columns + extra;
  Tensor left = widened<T>(x, extra, stream);
  Tensor right = torch::stable::new_empty(x, {weight.rows, stride});
  auto* to = static_cast<T*>(right.mutable_data_ptr());
  dequantize<T><<<grid_of(weight.rows, 1), kThreads, 0, stream>>>(weight.codes, weight.sizes, weight.rows, columns,
                                                                  weight.shift, to, stride);
  if (extra) {
    auto* own = static_cast<T*>(left.mutable_data_ptr()) + columns;
    clear_columns(to + columns, weight.rows, extra, stride, stream);
    if (rank) {
      const Tensor inner =
          torch::stable::matmul(x, torch::stable::transpose(torch::stable::to(*down, x.scalar_type()), 0, 1));
      copy_columns(inner, rank, own, stride, sizeof(T), stream);
      place_any<T>(*up, weight.rows, rank, scale, to + columns, stride, stream);
    }
    if (bias) {
      set_column<T><<<grid_of(rows, kThreads), kThreads, 0, stream>>>(own + rank, rows, stride);
      place_any<T>(*bias, weight.rows, 1, 1.0f, to + columns + rank, stride, stream);
    }
  }
  return torch::stable::matmul(left, torch::stable::transpose(right, 0, 1));
}

template <class T>
Tensor gradient(const Tensor& grad, const Weight& weight, const std::optional<Tensor>& down,
                const std::optional<Tensor>& up, float scale, cudaStream_t stream) {
  const int64_t columns = weight.columns, rank = down ? down->size(0) : 0, extra = rank ? padded(rank) : 0;
  Tensor left = widened<T>(grad, extra, stream);
  Tensor right = torch::stable::new_empty(grad, {weight.rows + extra, columns});
  auto* to = static_cast<T*>(right.mutable_data_ptr());
  dequantize<T><<<grid_of(weight.rows, 1), kThreads, 0, stream>>>(weight.codes, weight.sizes, weight.rows, columns,
                                                                  weight.shift, to, columns);
  if (rank) {
    const Tensor inner = torch::stable::matmul(grad, torch::stable::to(*up, grad.scalar_type()));
    copy_columns(inner, rank, static_cast<T*>(left.mutable_data_ptr()) + weight.rows, weight.rows + extra, sizeof(T),
                 stream);
    T* rest = to + weight.rows * columns;
    clear_columns(rest, extra, columns, columns, stream);
    place_any<T>(*down, rank, columns, scale, rest, columns, stream);
  }
  return torch::stable::matmul(left, right);
}

Tensor nf4_linear(Tensor x, Tensor codes, Tensor sizes, int64_t height, int64_t block, std::optional<Tensor> bias,
                  std::optional<Tensor> down, std::optional<Tensor> up, double scale) {
  STD_TORCH_CHECK(x.dim() == 2, "nf4_linear: compiled code takes a matrix");
  const Weight weight = weight_of(codes, sizes, height, x.size(1), block);
  check(x, weight, true, bias, down, up);
  Tensor out = torch::stable::new_empty(x, {x.size(0), height});
  if (out.numel() == 0) return out;
  const peftkit::OnDevice device(x);
  const float by = static_cast<float>(scale);
  peftkit::with_type(x.scalar_type(), "nf4_linear", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (x.size(0) > kFew) {
      out = many<T>(x, weight, bias, down, up, by, device.stream());
      return;
    }
    // Factors and bias in the dtype of x or in float32: two kernels a dtype and not nine.
    const auto suits = [&](const std::optional<Tensor>& t) {
      return !t || t->scalar_type() == x.scalar_type() || t->scalar_type() == ScalarType::Float;
    };
    const ScalarType wide = ScalarType::Float;
    if (down && !(suits(down) && suits(up) && down->scalar_type() == up->scalar_type())) {
      down = torch::stable::to(*down, wide);
      up = torch::stable::to(*up, wide);
    }
    const std::optional<Tensor> own = bias ? std::make_optional(torch::stable::to(*bias, wide)) : std::nullopt;
    const float* offset = own ? static_cast<const float*>(own->const_data_ptr()) : nullptr;
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    if (down && down->scalar_type() == wide) {
      few<T, float>(x, weight, offset, down, up, by, to, device.stream());
    } else {
      few<T, T>(x, weight, offset, down, up, by, to, device.stream());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor nf4_linear_grad(Tensor grad, Tensor codes, Tensor sizes, int64_t width, int64_t block,
                       std::optional<Tensor> down, std::optional<Tensor> up, double scale) {
  STD_TORCH_CHECK(grad.dim() == 2, "nf4_linear: compiled code takes a matrix");
  const Weight weight = weight_of(codes, sizes, grad.size(1), width, block);
  check(grad, weight, false, std::nullopt, down, up);
  Tensor out = torch::stable::new_zeros(grad, {grad.size(0), width});
  if (out.numel() == 0 || weight.rows == 0) return out;
  const peftkit::OnDevice device(grad);
  peftkit::with_type(grad.scalar_type(), "nf4_linear", [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    out = gradient<T>(grad, weight, down, up, static_cast<float>(scale), device.stream());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CUDA, library) {
  library.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  library.impl("nf4_linear_grad", TORCH_BOX(&nf4_linear_grad));
}
