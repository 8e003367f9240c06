// A few rows with a weight in NF4 and a low-rank update, on a GPU; see nf4_linear's reference.py for the definition.
//
// From sm_80 on a block takes 16 rows of the weight, and its warps parts of the columns. Two codes at a time are looked up
// in shared memory, where each lane has a table of its own, and what comes out is what the tensor cores take; scales are
// applied to the sums of a block of weights. The low-rank update is part of the same launch: the first thread blocks make
// x down', the others add up weights meanwhile.
#pragma once

#include "peftkit_cuda.h"
#include "peftkit_mma.h"

namespace peftkit::nf4 {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWeights = 2;  // rows of the weight that a warp works on at a time
constexpr int kTile = 16;    // rows of the weight that a block on tensor cores works on at a time
constexpr int kUnit = 64;    // columns that share a scale there
constexpr int kUnits = 4;    // of a warp at a time: a line of 128 bytes of each row
constexpr int kMakers = 32;  // thread blocks that make x down', at most

__constant__ const float kValues[16] = {-1.0f,
                                        -0.6961928009986877f,
                                        -0.5250730514526367f,
                                        -0.39491748809814453f,
                                        -0.28444138169288635f,
                                        -0.18477343022823334f,
                                        -0.09105003625154495f,
                                        0.0f,
                                        0.07958029955625534f,
                                        0.16093020141124725f,
                                        0.24611230194568634f,
                                        0.33791524171829224f,
                                        0.44070982933044434f,
                                        0.5626170039176941f,
                                        0.7229568362236023f,
                                        1.0f};

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Eight numbers that follow each other, as floats.
__device__ inline void read8(const float* from, float* to) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
template <class T>
__device__ inline void read8(const T* from, float* to) {
  const uint4 all = *reinterpret_cast<const uint4*>(from);
  const T* each = reinterpret_cast<const T*>(&all);
#pragma unroll
  for (int k = 0; k < 8; ++k) to[k] = widen(each[k]);
}

// inner[m][k] = scale * x_m . down_k; a warp an element.
template <class T, class F>
__global__ void __launch_bounds__(kThreads) project(const T* __restrict__ x, const F* __restrict__ down, int64_t rows,
                                                    int64_t columns, int64_t rank, float scale,
                                                    float* __restrict__ inner) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= rows * rank) return;
  const T* left = x + at / rank * columns;
  const F* right = down + at % rank * columns;
  float sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % 32; i < columns; i += 32) {
    sum = fmaf(widen(left[i]), widen(right[i]), sum);
  }
  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) inner[at] = scale * sum;
}

// The update and the bias for one element of the result; lanes share the ranks.
template <class F>
__device__ inline float beside(const float* inner, const F* up, int64_t rank, const float* bias, int64_t row) {
  float sum = 0;
  for (int64_t k = threadIdx.x % 32; k < rank; k += 32) sum = fmaf(inner[k], widen(up[row * rank + k]), sum);
  if (bias != nullptr && threadIdx.x % 32 == 0) sum += bias[row];
  return sum;
}

// out[m][n] for kRows rows of x, for GPUs and sizes that tensor cores do not suit; columns are a multiple of 8 and x
// starts at a multiple of 16 bytes.
template <class T, class F, int kRows>
__global__ void __launch_bounds__(kThreads) multiply(const T* __restrict__ x, const uint8_t* __restrict__ codes,
                                                     const float* __restrict__ sizes, int64_t height, int64_t columns,
                                                     int shift, const float* __restrict__ bias,
                                                     const float* __restrict__ inner, const F* __restrict__ up,
                                                     int64_t rank, T* __restrict__ out) {
  __shared__ float values[16][32];
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i / 32][i % 32] = kValues[i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  const int64_t tiles = (height + kWeights - 1) / kWeights;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; tile < tiles;
       tile += static_cast<int64_t>(gridDim.x) * kWarps) {
    float sums[kRows][kWeights] = {};
    int64_t start[kWeights];  // flat place of the row's first weight; a last row that is missing is read twice
#pragma unroll
    for (int r = 0; r < kWeights; ++r) start[r] = min(tile * kWeights + r, height - 1) * columns;
#pragma unroll 2
    for (int64_t i = lane * 8; i < columns; i += 256) {
      float weight[kWeights][8];
#pragma unroll
      for (int r = 0; r < kWeights; ++r) {
        const uint32_t eight = *reinterpret_cast<const uint32_t*>(codes + (start[r] + i) / 2);
        const float size = sizes[(start[r] + i) >> shift];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          // The earlier code stands in the upper half of its byte.
          weight[r][k] = values[(eight >> (8 * (k / 2) + (k % 2 ? 0 : 4))) & 15][lane] * size;
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        float own[8];
        read8(x + m * columns + i, own);
#pragma unroll
        for (int r = 0; r < kWeights; ++r) {
#pragma unroll
          for (int k = 0; k < 8; ++k) sums[m][r] = fmaf(own[k], weight[r][k], sums[m][r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kWeights; ++r) {
      const int64_t row = tile * kWeights + r;
      if (row >= height) break;
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const float all = sum_of_warp(sums[m][r] + beside(inner + m * rank, up, rank, bias, row));
        if (lane == 0) out[m * height + row] = narrow<T>(all);
      }
    }
  }
}

// What the thread blocks of one launch need of the low-rank update, and how they tell each other that x down' is there:
// a maker writes the launch's token into a place of its own for each block that waits, and the block that waits
// overwrites it when it has read it. So nothing has to be cleared before, and a graph can be replayed.
template <class F>
struct Update {
  const F* down;
  const F* up;
  float* inner;  // scale * x down', (rows, rank)
  unsigned long long* signals;  // (blocks that wait, makers)
  unsigned long long token;
  int64_t rank;
  float scale;
  int makers;
};

// A maker's share of x down': every `makers`-th rank, one after the other, all rows of x at once.
template <class T, class F, int kRows>
__device__ void make_inner(const T* __restrict__ x, int rows, int64_t columns, const Update<F>& update, int waiting) {
  __shared__ float heads[kWarps][kRows];
  for (int64_t k = blockIdx.x; k < update.rank; k += update.makers) {
    float sums[kRows] = {};
#pragma unroll 2
    for (int64_t i = threadIdx.x * 8; i < columns; i += kThreads * 8) {
      float by[8];
      read8(update.down + k * columns + i, by);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m >= rows) break;
        float own[8];
        read8(x + m * columns + i, own);
#pragma unroll
        for (int c = 0; c < 8; ++c) sums[m] = fmaf(own[c], by[c], sums[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= rows) break;
      const float sum = sum_of_warp(sums[m]);
      if (threadIdx.x % 32 == 0) heads[threadIdx.x / 32][m] = sum;
    }
    __syncthreads();
    if (threadIdx.x < rows) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += heads[w][threadIdx.x];
      update.inner[threadIdx.x * update.rank + k] = update.scale * sum;
    }
    __syncthreads();
  }
  __threadfence();
  for (int i = threadIdx.x; i < waiting; i += kThreads) {
    *static_cast<volatile unsigned long long*>(update.signals + static_cast<int64_t>(i) * update.makers + blockIdx.x) =
        update.token;
  }
}

// Codes and scales of rows g and g + 8 of a tile in kUnits units.
struct Codes {
  uint2 of[kUnits][2];
  float sizes[kUnits][2];
};

// out[m][n] for up to 8 * kGroups rows of x on tensor cores; columns are a multiple of kUnit, scales of as many or more
// weights, x and down begin at a multiple of 16 bytes and codes of 8.
template <class T, class F, int kGroups>
__global__ void __launch_bounds__(kThreads, 2)
    on_tensor_cores(const T* __restrict__ x, const uint8_t* __restrict__ codes, const float* __restrict__ sizes, int rows,
                    int64_t height, int64_t columns, int shift, const float* __restrict__ bias, Update<F> update,
                    T* __restrict__ out) {
  const int waiting = static_cast<int>(gridDim.x) - update.makers;
  const int own = static_cast<int>(blockIdx.x) - update.makers;
  if (own < 0) {
    make_inner<T, F, 8 * kGroups>(x, rows, columns, update, waiting);
    return;
  }
  __shared__ uint32_t pairs[256][32];  // byte -> the values of its two codes, once a lane: 32 different banks
  __shared__ float parts[kWarps][kTile][8 * kGroups];
  struct alignas(4) Pair {
    T first, second;
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int64_t tiles = (height + kTile - 1) / kTile, units = columns / kUnit;
  Codes ahead{};
  // Rows that are missing in the last tile are the last row again.
  const auto fetch = [&](int64_t tile, int64_t unit) {
    if (tile >= tiles) return;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (unit + j >= units) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t start = min(tile * kTile + g + 8 * half, height - 1) * columns + (unit + j) * kUnit;
        ahead.of[j][half] = __ldg(reinterpret_cast<const uint2*>(codes + start / 2) + q);
        ahead.sizes[j][half] = __ldg(sizes + (start >> shift));
      }
    }
  };
  fetch(own, warp * kUnits);
  for (int i = threadIdx.x; i < 256 * 32; i += kThreads) {
    const Pair pair{narrow<T>(kValues[i / 32 / 16]), narrow<T>(kValues[i / 32 % 16])};
    pairs[i / 32][i % 32] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  __syncthreads();
  // In the end a thread has one element: row `row` of the tile and row `m` of x, and of the ranks every 16th from m on.
  const int row = threadIdx.x / 16, m = threadIdx.x % 16;
  bool there = update.makers == 0;
  for (int64_t tile = own; tile < tiles; tile += waiting) {
    const int64_t output = min(tile * kTile + row, height - 1);
    const F* up = update.up + output * update.rank;
    const float first = m < update.rank ? widen(up[m]) : 0.0f;
    float sums[kGroups][4] = {};
    for (int64_t unit = warp * kUnits; unit < units; unit += kWarps * kUnits) {
      const Codes now = ahead;
      if (unit + kWarps * kUnits < units) {
        fetch(tile, unit + kWarps * kUnits);
      } else {
        fetch(tile + waiting, warp * kUnits);
      }
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        if (unit + j >= units) break;
        // A lane takes 16 neighbouring columns; the depth of a product is in whatever order, as long as x has the same.
        uint4 left[kGroups][2];
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          left[group][0] = left[group][1] = uint4{0, 0, 0, 0};
          if (8 * group + g < rows) {
            const T* from = x + (8 * group + g) * columns + (unit + j) * kUnit + 16 * q;
            left[group][0] = __ldg(reinterpret_cast<const uint4*>(from));
            left[group][1] = __ldg(reinterpret_cast<const uint4*>(from) + 1);
          }
        }
        float found[kGroups][4] = {};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint32_t upper = step < 2 ? now.of[j][0].x : now.of[j][0].y;
          const uint32_t lower = step < 2 ? now.of[j][1].x : now.of[j][1].y;
          const int at = step % 2 * 16;
          const uint32_t weight[4] = {pairs[(upper >> at) & 255][lane], pairs[(lower >> at) & 255][lane],
                                      pairs[(upper >> (at + 8)) & 255][lane], pairs[(lower >> (at + 8)) & 255][lane]};
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const uint4 four = left[group][step / 2];
            const uint32_t by[2] = {step % 2 ? four.z : four.x, step % 2 ? four.w : four.y};
            multiply_add<T>(found[group], weight, by);
          }
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[group][i] = fmaf(now.sizes[j][i / 2], found[group][i], sums[group][i]);
        }
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) parts[warp][g + i / 2 * 8][8 * group + 2 * q + i % 2] = sums[group][i];
    }
    if (!there && threadIdx.x < update.makers) {
      const volatile unsigned long long* signal = update.signals + static_cast<int64_t>(own) * update.makers + threadIdx.x;
      while (*signal != update.token) __nanosleep(20);
      __threadfence();
    }
    there = true;
    __syncthreads();
    float value = 0;
    if (update.rank) {
      for (int other = 0; other < rows; ++other) {
        // Not through the read-only cache: other blocks write it while this one runs.
        const float* inner = update.inner + other * update.rank;
        float sum = m < update.rank ? first * __ldcg(inner + m) : 0.0f;
        for (int64_t k = m + 16; k < update.rank; k += 16) sum = fmaf(widen(up[k]), __ldcg(inner + k), sum);
#pragma unroll
        for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (other == m) value = sum;
      }
    }
    if (m < rows && tile * kTile + row < height) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += parts[w][row][m];
      if (bias != nullptr) value += bias[output];
      out[m * height + output] = narrow<T>(value);
    }
    __syncthreads();
  }
  if (threadIdx.x < update.makers) update.signals[static_cast<int64_t>(own) * update.makers + threadIdx.x] = ~update.token;
}

// The same for any number of columns and any start; a warp an element.
template <class T, class F>
__global__ void __launch_bounds__(kThreads) multiply_any(const T* __restrict__ x, const uint8_t* __restrict__ codes,
                                                         const float* __restrict__ sizes, int64_t rows, int64_t height,
                                                         int64_t columns, int shift, const float* __restrict__ bias,
                                                         const float* __restrict__ inner, const F* __restrict__ up,
                                                         int64_t rank, T* __restrict__ out) {
  __shared__ float values[16][32];
  for (int i = threadIdx.x; i < 16 * 32; i += kThreads) values[i / 32][i % 32] = kValues[i / 32];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; at < rows * height;
       at += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t m = at / height, row = at % height;
    float sum = beside(inner + m * rank, up, rank, bias, row);
    for (int64_t i = lane; i < columns; i += 32) {
      const int64_t flat = row * columns + i;
      const int code = flat % 2 ? codes[flat / 2] & 15 : codes[flat / 2] >> 4;
      sum = fmaf(widen(x[m * columns + i]), values[code][lane] * sizes[flat >> shift], sum);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) out[at] = narrow<T>(sum);
  }
}

}  // namespace peftkit::nf4
