// Products of 16-bit numbers on processors that multiply float32 faster: parts of both sides are widened into memory
// that stays in cache, multiplied as float32, and sums are rounded once.
//
// Few rows: tiles of the weight are multiplied here with all rows while they are in the nearest cache. Many rows: blocks
// of rows and panels of the weight go to the library's float32 product.
#pragma once

#include "peftkit_bfloat16.h"
#include "peftkit_cpu.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

namespace peftkit::wide {

#if defined(__x86_64__) && defined(__GNUC__)
#define PEFTKIT_WIDE __attribute__((target("avx2,fma,f16c")))
#endif

constexpr int64_t kFew = 32;             // rows up to which tiles are multiplied here
constexpr int64_t kOut = 32;             // outputs whose sums are kept together
constexpr int64_t kTile = 4;             // outputs that are multiplied together
constexpr int64_t kMost = 3;             // rows that are multiplied together
constexpr int64_t kVector = 8;           // numbers in a vector
constexpr int64_t kGrain = 1 << 16;      // numbers that are worth a thread
#ifndef PEFTKIT_SMALL_PARTS
constexpr int64_t kPart = 1024;           // numbers of a row in a tile
constexpr int64_t kBlockBytes = 8 << 20;  // of rows that are multiplied together
constexpr int64_t kPanelBytes = 4 << 20;  // of the weight, likewise, for each thread
#else
// For checks: small problems have several of each, too.
constexpr int64_t kPart = 32;
constexpr int64_t kBlockBytes = 1 << 10;
constexpr int64_t kPanelBytes = 1 << 10;
#endif

// Whether a product of numbers of that type is faster in float32. The library multiplies bfloat16 well where there is
// AVX-512, and float16 where there is AVX-512 for it.
inline bool pays(ScalarType type) {
#ifdef PEFTKIT_WIDE
  if (!cpu().avx2) return false;
  return type == ScalarType::BFloat16 ? !cpu().avx512 : type == ScalarType::Half && !cpu().avx512fp16;
#else
  return false;
#endif
}

// Calls each(i) for rows of a matrix of `width` columns, on as many threads as it is worth.
template <class Each>
void for_rows(int64_t rows, int64_t width, Each&& each) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (width + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) each(i);
  });
}

// A matrix (rows, columns) that lies in memory, read as float32 piece by piece.
struct Matrix {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  int64_t rows = 0, columns = 0;

  explicit Matrix(const Tensor& tensor)
      : data(tensor.const_data_ptr()), type(tensor.scalar_type()), rows(tensor.size(0)), columns(tensor.size(1)) {}

  void read(int64_t row, int64_t column, int64_t count, float* to) const {
    with_format(type, "peftkit", [&](auto tag) {
      using Format = decltype(tag);
      widen<Format>(static_cast<const typename Format::Bits*>(data) + row * columns + column, to, count);
    });
  }

  // Whole rows [first, first + count), `stride` apart.
  void read_rows(int64_t first, int64_t count, float* to, int64_t stride) const {
    for_rows(count, columns, [&](int64_t i) { read(first + i, 0, columns, to + i * stride); });
  }
};

inline Tensor viewed(float* data, int64_t rows, int64_t columns, int64_t stride, const Tensor& like) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {stride, 1};
  return torch::stable::from_blob(data, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2),
                                  torch::headeronly::IntHeaderOnlyArrayRef(strides, 2), like.device(),
                                  ScalarType::Float);
}

inline Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// to = beta * to + alpha * a b.
inline void multiply(Tensor& to, const Tensor& a, const Tensor& b, double beta = 0.0, double alpha = 1.0) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), a.get(), b.get(), beta, alpha));
}

template <class Format>
PEFTKIT_CLONES void narrow(const float* from, typename Format::Bits* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Format::store(from[i]);
}

#ifdef PEFTKIT_WIDE

// sums[m * kOut + r] += x_m . w_r for kRows rows of x and kTile of a tile, `step` apart, both of whole vectors.
template <int kRows>
PEFTKIT_WIDE void block(const float* x, const float* w, int64_t step, int64_t width, float* sums) {
  __m256 total[kRows][kTile];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) total[m][r] = _mm256_setzero_ps();
  }
  for (int64_t j = 0; j < width; j += kVector) {
    __m256 own[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) own[m] = _mm256_load_ps(x + m * step + j);
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) {
      const __m256 piece = _mm256_load_ps(w + r * step + j);
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) total[m][r] = _mm256_fmadd_ps(own[m], piece, total[m][r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    const __m256 a = _mm256_hadd_ps(total[m][0], total[m][1]), b = _mm256_hadd_ps(total[m][2], total[m][3]);
    const __m256 c = _mm256_hadd_ps(a, b);
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1));
    float* to = sums + m * kOut;
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), all));
  }
}

inline void block_of(int64_t rows, const float* x, const float* w, int64_t step, int64_t width, float* sums) {
  switch (rows) {
    case 1: return block<1>(x, w, step, width, sums);
    case 2: return block<2>(x, w, step, width, sums);
    default: return block<3>(x, w, step, width, sums);
  }
}

// For x (rows, depth) in float32 with rows at most kFew, and a weight whose pieces `right(row, column, count, to)` writes:
// `finish(first, count, sums)` gets the sums (rows, kOut) of outputs [first, first + count); `start` fills them before.
// Pieces begin at multiples of `part`.
template <class Right, class Start, class Finish>
void few(const float* x, int64_t rows, int64_t height, int64_t depth, int64_t part, Right&& right, Start&& start,
         Finish&& finish) {
  // Rows lie part by part, with a vector between them: rows of whole pages would share the same few places of a cache.
  const int64_t step = part + kVector, parts = (depth + part - 1) / part;
  float* own = scratch<float, 20>(static_cast<size_t>(rows * parts * step));
  for (int64_t i = 0; i < parts; ++i) {
    for (int64_t m = 0; m < rows; ++m) {
      float* to = own + (i * rows + m) * step;
      const int64_t count = std::min(part, depth - i * part);
      std::copy_n(x + m * depth + i * part, count, to);
      std::fill(to + count, to + step, 0.0f);
    }
  }
  const int64_t tiles = (height + kOut - 1) / kOut, grain = std::max<int64_t>(1, kGrain / (kOut * depth + 1));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    float* sums = scratch<float, 21>(static_cast<size_t>(rows * kOut));
    float* tile = scratch<float, 22>(static_cast<size_t>(kTile * step));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kOut, count = std::min(kOut, height - first);
      std::fill_n(sums, rows * kOut, 0.0f);
      start(first, count, sums);
      for (int64_t column = 0; column < depth; column += part) {
        const int64_t width = std::min(part, depth - column), padded = (width + kVector - 1) / kVector * kVector;
        for (int64_t r = 0; r < count; r += kTile) {
          for (int64_t i = 0; i < kTile; ++i) {
            float* to = tile + i * step;
            right(std::min(first + r + i, height - 1), column, width, to);
            std::fill(to + width, to + padded, 0.0f);
          }
          for (int64_t m = 0; m < rows; m += kMost) {
            const float* from = own + (column / part * rows + m) * step;
            block_of(std::min(kMost, rows - m), from, tile, step, padded, sums + m * kOut + r);
          }
        }
      }
      finish(first, count, sums);
    }
  });
}

#endif

// What `many` multiplies.
struct Sizes {
  int64_t rows, height, depth;
  int64_t unit = 32;     // panels begin at multiples of so many outputs
  bool columns = false;  // whether a panel is written as (depth, count) rather than as (count, depth)
};

// out (rows, height) = left (rows, depth) times right, block by block and panel by panel.
//
// `left(first, count, to)` writes rows of the left side, and may call the library. `right(first, count, to)` writes
// outputs [first, first + count). `finish(first_row, rows, first, count, sums)` takes their sums (rows, count).
template <class Left, class Right, class Finish>
void many(const Tensor& like, const Sizes& sizes, Left&& left, Right&& right, Finish&& finish) {
  const auto [rows, height, depth, unit, columns] = sizes;
  const int64_t numbers = std::max<int64_t>(depth, unit);
  const int64_t block = std::min(rows, std::max<int64_t>(kBlockBytes / 4 / numbers, 8));
  const int64_t wanted = std::min(kPanelBytes / 4 / numbers, kBlockBytes / 4 / std::max<int64_t>(block, 1));
  const int64_t panel = std::max<int64_t>(std::min(height, std::max(wanted / unit, int64_t{1}) * unit), 1);
  const int64_t panels = (height + panel - 1) / panel;
  float* own = scratch<float, 23>(static_cast<size_t>(block * depth));
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t taken = std::min(block, rows - row);
    left(row, taken, own);
    // A thread takes whole panels: inside, everything runs on it alone, and none waits for another until the end.
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      float* held = scratch<float, 24>(static_cast<size_t>(panel * depth));
      float* sums = scratch<float, 25>(static_cast<size_t>(taken * panel));
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * panel, count = std::min(panel, height - first);
        right(first, count, held);
        const Tensor a = viewed(own, taken, depth, depth, like);
        const Tensor b = columns ? viewed(held, depth, count, count, like)
                                 : turned(viewed(held, count, depth, depth, like));
        Tensor to = viewed(sums, taken, count, count, like);
        TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), a.get(), b.get()));
        finish(row, taken, first, count, sums);
      }
    });
  }
}

// out (rows, outputs) += gain * (x downᵀ) upᵀ, rounded once; x, down and up contiguous.
inline void add_low_rank(Tensor& out, const Tensor& x, const Tensor& down, const Tensor& up, double gain) {
  const int64_t rows = x.size(0), width = x.size(1), outputs = up.size(0), rank = down.size(0);
  std::vector<float> own_down = floats(down), own_up = floats(up);
  const Matrix from(x);
  const int64_t block = std::min(rows, std::max<int64_t>(kBlockBytes / 4 / std::max({width, outputs, int64_t{1}}), 1));
  std::vector<float> inner(block * rank);
  float* read = scratch<float, 26>(static_cast<size_t>(block * width));
  float* sums = scratch<float, 27>(static_cast<size_t>(block * outputs));
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = std::min(block, rows - row);
    from.read_rows(row, count, read, width);
    Tensor held = viewed(inner.data(), count, rank, rank, x), to = viewed(sums, count, outputs, outputs, x);
    multiply(held, viewed(read, count, width, width, x), turned(viewed(own_down.data(), rank, width, width, x)), 0, gain);
    Matrix(out).read_rows(row, count, sums, outputs);
    multiply(to, held, turned(viewed(own_up.data(), outputs, rank, rank, x)), 1.0);
    with_format(out.scalar_type(), "peftkit", [&](auto tag) {
      using Format = decltype(tag);
      auto* at = static_cast<typename Format::Bits*>(out.mutable_data_ptr()) + row * outputs;
      for_rows(count, outputs, [&](int64_t i) { narrow<Format>(sums + i * outputs, at + i * outputs, outputs); });
    });
  }
}

}  // namespace peftkit::wide
