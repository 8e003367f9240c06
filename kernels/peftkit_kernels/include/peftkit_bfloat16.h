// Products of some rows of bfloat16 numbers with the rows of a weight, for processors that multiply bfloat16.
//
// The library's product packs the weight anew for every call, and waits for it; here a tile of the weight is multiplied
// with all rows of x while it is in the nearest cache, and the next one is asked for meanwhile.
#pragma once

#include "peftkit_cpu.h"

#include <algorithm>
#include <memory>

namespace peftkit {

// Memory that a thread keeps between calls, from a cache line on: fresh pages cost more than the work that is done in
// them. `Purpose` tells what must not share it.
template <class Number, int kPurpose = 0>
static Number* scratch(size_t count) {
  constexpr size_t alignment = 64;
  thread_local std::unique_ptr<char[]> held;
  thread_local size_t bytes = 0;
  if (bytes < count * sizeof(Number) + alignment) {
    held.reset();
    bytes = count * sizeof(Number) + alignment;
    held.reset(new char[bytes]);
  }
  const auto at = reinterpret_cast<uintptr_t>(held.get());
  return reinterpret_cast<Number*>((at + alignment - 1) / alignment * alignment);
}

typedef float Lanes16 __attribute__((vector_size(64)));

// sums[m][r] += sum over k of inner[m][k] * up[k][r] for r up to 32.
PEFTKIT_CLONES static void add_turned(const float* inner, int64_t rows, int64_t rank, const float* up, float* sums) {
  for (int64_t m = 0; m < rows; ++m) {
    Lanes16 low, high;
    std::memcpy(&low, sums + 32 * m, sizeof low);
    std::memcpy(&high, sums + 32 * m + 16, sizeof high);
    for (int64_t k = 0; k < rank; ++k) {
      Lanes16 first, second;
      std::memcpy(&first, up + 32 * k, sizeof first);
      std::memcpy(&second, up + 32 * k + 16, sizeof second);
      low += inner[m * rank + k] * first;
      high += inner[m * rank + k] * second;
    }
    std::memcpy(sums + 32 * m, &low, sizeof low);
    std::memcpy(sums + 32 * m + 16, &high, sizeof high);
  }
}

// sums[m][r] += sum over k of inner[m][k] * up[r][k] for `count` of 32 rows of up.
static inline void add_update(const float* inner, int64_t rows, int64_t rank, const float* up, int64_t count,
                              float* sums) {
  constexpr int64_t tile = 32;
  float* turned = scratch<float, 5>(static_cast<size_t>(rank * tile));
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t r = 0; r < count; ++r) turned[k * tile + r] = up[r * rank + k];
    std::fill(turned + k * tile + count, turned + (k + 1) * tile, 0.0f);
  }
  add_turned(inner, rows, rank, turned, sums);
}

}  // namespace peftkit

#if defined(__x86_64__) && defined(__GNUC__)

#define PEFTKIT_AVX512BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx512bf16")))

namespace peftkit::rows {

constexpr int64_t kTile = 4;        // rows of the weight that are multiplied together
constexpr int64_t kMost = 6;        // rows of x that are multiplied together
constexpr int64_t kOut = 32;        // rows of the weight whose results are kept together
constexpr int64_t kPart = 2048;     // columns of a tile
constexpr int64_t kVector = 32;     // numbers in a vector
constexpr int64_t kGrain = 1 << 16; // elements of the weight that are worth a thread

// Rows of x in groups of about as many, at most kMost.
struct Groups {
  int64_t rows;
  int64_t count() const { return (rows + kMost - 1) / kMost; }
  int64_t first(int64_t group) const { return group * rows / count(); }
};

// `order(from, to)` writes the next kOrder columns of a row as vectors of 32 that lie `step` apart.
template <int64_t kOrder, class Order>
uint16_t* packed(const uint16_t* x, int64_t rows, int64_t columns, Order&& order) {
  uint16_t* out = scratch<uint16_t, 1>(static_cast<size_t>(rows * columns));
  const Groups groups{rows};
  const int64_t grain = std::max<int64_t>(1, kGrain / (kMost * columns + 1));
  torch::stable::parallel_for(0, groups.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = groups.first(group), taken = groups.first(group + 1) - first;
      for (int64_t row = 0; row < taken; ++row) {
        const uint16_t* from = x + (first + row) * columns;
        uint16_t* to = out + first * columns + row * kVector;
        for (int64_t j = 0; j < columns; j += kOrder) order(from + j, to + j * taken, taken * kVector);
      }
    }
  });
  return out;
}

// Four sums over the lanes of four vectors.
PEFTKIT_AVX512BF16 inline __m128 totals(const __m512 (&sums)[kTile]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(sums[2], sums[3]), _mm512_unpackhi_ps(sums[2], sums[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  const __m512d low = _mm512_unpacklo_pd(c, d), high = _mm512_unpackhi_pd(c, d);
  const __m512 e = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 f = _mm256_add_ps(_mm512_castps512_ps256(e), _mm512_extractf32x8_ps(e, 1));
  return _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
}

// sums[m][r] += x_m . w_r over `columns`, for kRows rows of x as `packed` leaves them and kTile rows of the weight, whose
// vectors lie `step` apart; asks for kAhead rows of `ahead`, `stride` apart, meanwhile.
template <int kRows, int kAhead>
PEFTKIT_AVX512BF16 void block(const uint16_t* x, const uint16_t* const* w, int64_t step, int64_t columns, float* sums,
                              const uint16_t* ahead, int64_t stride) {
  __m512 total[kRows][kTile];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kTile; ++r) total[m][r] = _mm512_setzero_ps();
  }
  const uint16_t *first = w[0], *second = w[1], *third = w[2], *fourth = w[3];
  for (int64_t j = 0; j < columns; j += kVector) {
    __m512bh own[kTile];
    own[0] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(first));
    own[1] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(second));
    own[2] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(third));
    own[3] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(fourth));
    first += step, second += step, third += step, fourth += step;
#pragma GCC unroll 8
    for (int r = 0; r < kAhead; ++r) _mm_prefetch(reinterpret_cast<const char*>(ahead + r * stride + j), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const __m512bh piece = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + j * kRows + m * kVector));
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) total[m][r] = _mm512_dpbf16_ps(total[m][r], piece, own[r]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    float* to = sums + m * kOut;
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), totals(total[m])));
  }
}

template <int kAhead>
void block_of(int64_t rows, const uint16_t* x, const uint16_t* const* w, int64_t step, int64_t columns, float* sums,
              const uint16_t* ahead, int64_t stride) {
  switch (rows) {
    case 1: return block<1, kAhead>(x, w, step, columns, sums, ahead, stride);
    case 2: return block<2, kAhead>(x, w, step, columns, sums, ahead, stride);
    case 3: return block<3, kAhead>(x, w, step, columns, sums, ahead, stride);
    case 4: return block<4, kAhead>(x, w, step, columns, sums, ahead, stride);
    case 5: return block<5, kAhead>(x, w, step, columns, sums, ahead, stride);
    default: return block<6, kAhead>(x, w, step, columns, sums, ahead, stride);
  }
}

// kOut sums to bfloat16, to nearest and ties to even.
PEFTKIT_AVX512BF16 inline void rounded(const float* sums, int64_t count, uint16_t* to) {
  uint16_t held[kOut];
  for (int64_t r = 0; r < kOut; ++r) held[r] = to_bfloat16(sums[r]);
  std::memcpy(to, held, static_cast<size_t>(count) * sizeof *to);
}

// A weight (height, columns) in bfloat16 as it lies in memory.
struct Dense {
  static constexpr bool kReads = true;  // whether its tiles are read where they are
  const uint16_t* weight;
  int64_t height, columns;

  int64_t tile(int64_t row, int64_t column, int64_t, int64_t, uint16_t*, const uint16_t** w) const {
    for (int64_t r = 0; r < kTile; ++r) w[r] = weight + std::min(row + r, height - 1) * columns + column;
    return kVector;
  }
};

// out = x wᵀ + what `start(first, count, sums)` leaves in the sums (rows, kOut) of the weight's rows from `first` on,
// rounded once. `x` is packed; a `weight` gives its tiles as pointers to kTile rows, whose vectors lie that far apart, and
// is told where the next one begins, or -1.
template <class Weight, class Start>
void linear(const uint16_t* x, int64_t rows, const Weight& weight, uint16_t* out, Start&& start) {
  const int64_t height = weight.height, columns = weight.columns;
  const int64_t tiles = (height + kOut - 1) / kOut, grain = std::max<int64_t>(1, kGrain / (kOut * columns + 1));
  const Groups groups{rows};
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    float* sums = scratch<float, 2>(static_cast<size_t>(rows * kOut));
    uint16_t* panel = scratch<uint16_t, 3>(static_cast<size_t>(kTile * kPart));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kOut, count = std::min(kOut, height - first);
      std::fill_n(sums, rows * kOut, 0.0f);
      start(first, count, sums);
      for (int64_t column = 0; column < columns; column += kPart) {
        const int64_t width = std::min(kPart, columns - column);
        for (int64_t r = 0; r < count; r += kTile) {
          // What is multiplied next: the rows below, or those of the next columns.
          const bool below = r + kTile < count, beside = column + kPart < columns;
          int64_t next = below ? (first + r + kTile) * columns + column : beside ? first * columns + column + kPart
                                                                                 : (first + kOut) * columns;
          if (next + (kTile - 1) * columns + width > height * columns) next = -1;
          const uint16_t* w[kTile];
          const int64_t step = weight.tile(first + r, column, width, next, panel, w);
          const uint16_t* ahead = nullptr;
          if constexpr (Weight::kReads) ahead = next < 0 ? nullptr : weight.weight + next;
          for (int64_t group = 0; group < groups.count(); ++group) {
            const int64_t m = groups.first(group), taken = groups.first(group + 1) - m;
            const uint16_t* own = x + m * columns + column * taken;
            float* to = sums + m * kOut + r;
            // Each group asks for its share of the four rows.
            if (ahead == nullptr || group >= kTile) {
              block_of<0>(taken, own, w, step, width, to, nullptr, 0);
            } else if (groups.count() >= kTile) {
              block_of<1>(taken, own, w, step, width, to, ahead + group * columns, columns);
            } else if (groups.count() >= 2) {
              if (group < 2) {
                block_of<2>(taken, own, w, step, width, to, ahead + 2 * group * columns, columns);
              } else {
                block_of<0>(taken, own, w, step, width, to, nullptr, 0);
              }
            } else {
              block_of<4>(taken, own, w, step, width, to, ahead, columns);
            }
          }
        }
      }
      for (int64_t m = 0; m < rows; ++m) rounded(sums + m * kOut, count, out + m * height + first);
    }
  });
}

// The same from rows as they lie in memory, of a multiple of 32 columns.
template <class Start>
void linear_dense(const uint16_t* x, int64_t rows, const Dense& weight, uint16_t* out, Start&& start) {
  const uint16_t* own = packed<kVector>(x, rows, weight.columns, [](const uint16_t* from, uint16_t* to, int64_t) {
    std::memcpy(to, from, kVector * sizeof *to);
  });
  linear(own, rows, weight, out, start);
}

}  // namespace peftkit::rows

#endif
