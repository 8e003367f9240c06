// Merging so that it can be undone exactly, undoing it, and checksums, on a GPU; see merge_lora's reference.py.
//
// A warp takes a row. What the merge leaves wrong is counted, laid out and then written, so that only the
// sizes of the residual go to the host.
#pragma once

#include "peftkit_cuda.h"

namespace peftkit::undo {

constexpr int kSkip = 255;    // a gap byte of this value passes as many elements and names none
constexpr int kEscape = -128;  // a code of this value takes the element's bits from the escapes
constexpr int kRowWarps = 4;   // of a block
constexpr unsigned kAll = 0xffffffffu;

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;

template <class T>
__device__ inline Bits<T> bits_of(T value) {
  return *reinterpret_cast<const Bits<T>*>(&value);
}

// scale * up @ down at one place, with the bits of `merge`.
template <class Factor>
__device__ inline float change_at(const Factor* __restrict__ down, const Factor* __restrict__ up, float scale,
                                  int64_t columns, int64_t rank, int64_t row, int64_t column) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t k = 0; k < rank; ++k) {
    sum = __fmaf_rn(widen(up[row * rank + k]), widen(down[k * columns + column]), sum);
  }
  return __fmul_rn(sum, scale);
}

// Inclusive sum over the lanes up to one's own.
__device__ inline int sum_before(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAll, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Gap bytes, codes and escapes of each row, (3, rows); with `gaps` also what they are, and the merged weight.
template <class Weight, class Factor, bool kWrite>
__global__ void __launch_bounds__(32 * kRowWarps)
    keep(Weight* __restrict__ weight, const Factor* __restrict__ down, const Factor* __restrict__ up, float scale,
         int64_t rows, int64_t columns, int64_t rank, int* __restrict__ starts, uint8_t* __restrict__ gaps,
         int8_t* __restrict__ codes, Bits<Weight>* __restrict__ escapes) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= rows) return;
  // Of the gap bytes, codes and escapes: where the row's own begin, or how many there are so far.
  int64_t at[3] = {};
  if constexpr (kWrite) {
    for (int i = 0; i < 3; ++i) at[i] = starts[i * (rows + 1) + row];
  }
  int64_t last = -1;  // column of the last element that differed
  for (int64_t first = 0; first < columns; first += 32) {
    const int64_t column = first + lane;
    bool wrong = false;
    Weight before{}, guess{};
    if (column < columns) {
      before = weight[row * columns + column];
      const float change = change_at(down, up, scale, columns, rank, row, column);
      const Weight after = narrow<Weight>(__fadd_rn(widen(before), change));
      guess = narrow<Weight>(__fadd_rn(widen(after), -change));
      wrong = bits_of(before) != bits_of(guess);
      if constexpr (kWrite) weight[row * columns + column] = after;
    }
    const unsigned found = __ballot_sync(kAll, wrong);
    if (found == 0) continue;
    const unsigned earlier = found & ((1u << lane) - 1u);
    const int64_t previous = earlier ? first + 31 - __clz(static_cast<int>(earlier)) : last;
    const int64_t passed = column - previous - 1;
    const int skips = wrong ? static_cast<int>(passed / kSkip) : 0, own = wrong ? skips + 1 : 0;
    const int64_t step = static_cast<int64_t>(bits_of(before)) - static_cast<int64_t>(bits_of(guess));
    const bool escaped = wrong && (step <= kEscape || step > -kEscape - 1);
    const unsigned wide = __ballot_sync(kAll, escaped);
    const int until = sum_before(own, lane);
    if constexpr (kWrite) {
      if (wrong) {
        uint8_t* to = gaps + at[0] + until - own;
        for (int i = 0; i < skips; ++i) to[i] = kSkip;
        to[skips] = static_cast<uint8_t>(passed % kSkip);
        codes[at[1] + __popc(earlier)] = static_cast<int8_t>(escaped ? kEscape : step);
        if (escaped) escapes[at[2] + __popc(wide & ((1u << lane) - 1u))] = bits_of(before);
      }
    }
    at[0] += __shfl_sync(kAll, until, 31);
    at[1] += __popc(found);
    at[2] += __popc(wide);
    last = first + 31 - __clz(static_cast<int>(found));
  }
  if constexpr (!kWrite) {
    if (lane < 3) starts[lane * (rows + 1) + row + 1] = static_cast<int>(lane == 0 ? at[0] : lane == 1 ? at[1] : at[2]);
  }
}

// starts[i][r + 1], the number of row r, becomes the sum up to it; a block an i.
__global__ void __launch_bounds__(32) add_up(int* __restrict__ starts, int64_t rows) {
  const int lane = threadIdx.x;
  int* own = starts + blockIdx.x * (rows + 1);
  int base = 0;
  if (lane == 0) own[0] = 0;
  for (int64_t first = 0; first < rows; first += 32) {
    const int64_t row = first + lane;
    const int until = base + sum_before(row < rows ? own[row + 1] : 0, lane);
    if (row < rows) own[row + 1] = until;
    base = __shfl_sync(kAll, until, 31);
  }
}

// The weight from before the merge, from the merged one. Places outside of the row or of what is kept, which only a damaged
// residual names, are passed over.
template <class Weight, class Factor>
__global__ void __launch_bounds__(32 * kRowWarps)
    restore(Weight* __restrict__ weight, const Factor* __restrict__ down, const Factor* __restrict__ up, float scale,
            int64_t rows, int64_t columns, int64_t rank, const int* __restrict__ starts,
            const uint8_t* __restrict__ gaps, int64_t gap_count, const int8_t* __restrict__ codes, int64_t code_count,
            const Bits<Weight>* __restrict__ escapes, int64_t escape_count) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= rows) return;
  for (int64_t column = lane; column < columns; column += 32) {
    Weight& own = weight[row * columns + column];
    const float change = change_at(down, up, scale, columns, rank, row, column);
    own = narrow<Weight>(__fadd_rn(widen(own), -change));
  }
  __syncwarp();
  auto* bits = reinterpret_cast<Bits<Weight>*>(weight + row * columns);
  const int64_t end = min(static_cast<int64_t>(starts[row + 1]), gap_count);
  int64_t code_at = starts[rows + 1 + row], escape_at = starts[2 * (rows + 1) + row];
  int64_t passed = 0;
  for (int64_t first = max(static_cast<int64_t>(starts[row]), int64_t{0}); first < end; first += 32) {
    const bool inside = first + lane < end;
    const int gap = inside ? gaps[first + lane] : 0;
    const bool names = inside && gap != kSkip;
    const int until = sum_before(!inside ? 0 : names ? gap + 1 : kSkip, lane);
    const unsigned named = __ballot_sync(kAll, names), earlier = (1u << lane) - 1u;
    const int64_t column = passed + until - 1, place = code_at + __popc(named & earlier);
    const bool known = names && column < columns && place >= 0 && place < code_count;
    const int code = known ? codes[place] : 0;
    const unsigned wide = __ballot_sync(kAll, known && code == kEscape);
    if (known) {
      const int64_t from = escape_at + __popc(wide & earlier);
      if (code != kEscape) {
        bits[column] = static_cast<Bits<Weight>>(static_cast<int64_t>(bits[column]) + code);
      } else if (from >= 0 && from < escape_count) {
        bits[column] = escapes[from];
      }
    }
    passed += __shfl_sync(kAll, until, 31);
    code_at += __popc(named);
    escape_at += __popc(wide);
  }
}

// Adds each 8 byte word times its odd number to the sum; words begin anew in each row, whose end is filled up with zeros.
template <class Word>
__global__ void __launch_bounds__(256) add_words(const Word* __restrict__ from, int64_t rows, int64_t columns,
                                                 unsigned long long* __restrict__ sum) {
  constexpr int kEach = 8 / sizeof(Word);
  const int64_t words = (columns + kEach - 1) / kEach, count = rows * words;
  uint64_t own = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * 256) {
    const int64_t row = i / words, first = i % words * kEach;
    uint64_t word = 0;
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
      if (first + c < columns) {
        word |= static_cast<uint64_t>(from[row * columns + first + c])
                << (8 * sizeof(Word) * c);
      }
    }
    own += word * ((static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15ull) | 1);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(kAll, own, step);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, static_cast<unsigned long long>(own));
}

}  // namespace peftkit::undo
