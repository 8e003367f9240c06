// Norms of the rows of weight + scale * up @ down; see reference.py for the definition.
//
// Groups of rows are converted to float a panel of columns at a time, and multiplied with the panel of `down` while both
// are in the first cache. Sums run in float over a few panels and go on in double, so that the bound on their error is a
// small constant. A row whose terms cancel beyond that bound is formed in double.

#ifndef PEFTKIT_PASS

#include "peftkit_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

namespace {

using peftkit::Bits;
using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kGroup = 8;     // rows that share a panel of `down` in the first cache
constexpr int64_t kRanks = 4;     // ranks of a block
constexpr int64_t kPanel = 256;   // columns of a panel
constexpr int64_t kTerms = 64;    // additions to one sum in float before it goes on in double
constexpr int64_t kMostLanes = 16;
constexpr double kTolerance = 4e-6;

typedef double Wide __attribute__((vector_size(64)));

// A group of rows and what it is multiplied with, and the memory to do so in.
template <class Format>
struct Group {
  const Bits<Format>* weight;
  int64_t columns, rows;
  bool more;           // whether another group follows in memory
  const float* tiles;  // (panels, padded, kPanel), zero beyond the ranks and columns
  int64_t padded;      // ranks, to a multiple of kRanks
  float* panel;        // (kGroup, kPanel)
  float* sums;         // (kGroup, padded, kMostLanes)
  double* totals;      // (kGroup, padded), the result
};

}  // namespace

#define PEFTKIT_FILE "../dora_scale/dora_scale.cpp"
#include "peftkit_passes.h"

namespace {

// In double, from numbers that are float exactly.
PEFTKIT_CLONES double square_sum(const float* values, int64_t count) {
  Wide sums[4] = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int part = 0; part < 4; ++part) {
      Wide value;
      for (int lane = 0; lane < 8; ++lane) value[lane] = static_cast<double>(values[i + part * 8 + lane]);
      sums[part] += value * value;
    }
  }
  double total = 0;
  for (; i < count; ++i) total += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  const Wide all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (int lane = 0; lane < 8; ++lane) total += all[lane];
  return total;
}

PEFTKIT_CLONES void add_scaled(double* to, const float* from, double by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += by * static_cast<double>(from[i]);
}

PEFTKIT_CLONES double square_sum_wide(const double* values, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += values[i + lane] * values[i + lane];
  }
  double total = 0;
  for (; i < count; ++i) total += values[i] * values[i];
  for (double sum : sums) total += sum;
  return total;
}

// Numbers that begin at a cache line, zero at first: a wide load that crosses lines counts twice.
template <class Number>
class Lines {
 public:
  explicit Lines(int64_t count) : own_(count + 64 / sizeof(Number), Number(0)) {
    const auto address = reinterpret_cast<uintptr_t>(own_.data());
    first_ = own_.data() + ((64 - address % 64) % 64) / sizeof(Number);
  }
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  Number* data() { return first_; }

 private:
  std::vector<Number> own_;
  Number* first_;
};

// by gram byᵀ; the inner loop makes no sum, so that it needs no order.
PEFTKIT_CLONES double quadratic(const double* gram, const double* by, double* scratch, int64_t rank) {
  for (int64_t l = 0; l < rank; ++l) scratch[l] = 0;
  for (int64_t k = 0; k < rank; ++k) {
    const double own = by[k];
    for (int64_t l = 0; l < rank; ++l) scratch[l] += own * gram[k * rank + l];
  }
  double total = 0;
  for (int64_t l = 0; l < rank; ++l) total += scratch[l] * by[l];
  return total;
}

PEFTKIT_CLONES double product(const float* a, const float* b, int64_t count) {
  double sums[16] = {};
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    for (int lane = 0; lane < 16; ++lane) sums[lane] += static_cast<double>(a[j + lane]) * static_cast<double>(b[j + lane]);
  }
  double total = 0;
  for (; j < count; ++j) total += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  for (double sum : sums) total += sum;
  return total;
}

Tensor row_squares(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "row_squares: expected a contiguous matrix");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {rows}, std::make_optional(ScalarType::Float));
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  peftkit::with_format(weight.scalar_type(), "row_squares", [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(weight.const_data_ptr());
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 32768 / (columns + 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> own(columns);
      for (int64_t row = begin; row < end; ++row) {
        peftkit::widen<Format>(from + row * columns, own.data(), columns);
        to[row] = static_cast<float>(square_sum(own.data(), columns));
      }
    });
  });
  return out;
}

Tensor dora_norms(Tensor weight, Tensor squared, Tensor down, Tensor up, double scale) {
  STD_TORCH_CHECK(weight.is_contiguous() && squared.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "dora_norms: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 && down.size(0) == up.size(1) &&
                      weight.size(0) == up.size(0) && weight.size(1) == down.size(1) &&
                      squared.numel() == weight.size(0) && squared.scalar_type() == ScalarType::Float,
                  "dora_norms: expected weight (out, in), squared (out,) in float32, down (r, in) and up (out, r)");
  const int64_t rows = weight.size(0), columns = weight.size(1), rank = down.size(0);
  const int64_t padded = (rank + kRanks - 1) / kRanks * kRanks, panels = (columns + kPanel - 1) / kPanel;
  Tensor out = torch::stable::new_empty(weight, {rows}, std::make_optional(ScalarType::Float));
  if (rows == 0) return out;
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const auto* own_squares = static_cast<const float*>(squared.const_data_ptr());
  const std::vector<float> flat = peftkit::floats(down), wide_up = peftkit::floats(up);
  // (panels, padded, kPanel), zero beyond the ranks and columns.
  Lines<float> tiles(panels * padded * kPanel);
  std::vector<double> norms(rank), gram(rank * rank);
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t p = 0; p < panels; ++p) {
      std::copy_n(flat.data() + k * columns + p * kPanel, std::min(kPanel, columns - p * kPanel),
                  tiles.data() + (p * padded + k) * kPanel);
    }
  }
  torch::stable::parallel_for(0, rank, std::max<int64_t>(1, 16384 / (rank * columns + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t l = 0; l <= k; ++l) {
        gram[k * rank + l] = gram[l * rank + k] = product(flat.data() + k * columns, flat.data() + l * columns, columns);
      }
    }
  });
  for (int64_t k = 0; k < rank; ++k) norms[k] = std::sqrt(gram[k * rank + k]);
  // Lanes of 8 at the least, and their sum.
  const double unit = std::numeric_limits<float>::epsilon() / 2;
  const double roundings = static_cast<double>(std::min(columns / 8 + 1, kTerms) + 5);
  peftkit::with_format(weight.scalar_type(), "dora_norms", [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(weight.const_data_ptr());
    const int64_t groups = (rows + kGroup - 1) / kGroup;
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 65536 / (columns * (rank + 1) + 1)),
                                [&](int64_t begin, int64_t end) {
      Lines<float> panel(kGroup * kPanel), sums(kGroup * padded * kMostLanes);
      std::vector<double> totals(kGroup * padded), direct, by(rank), scratch(rank);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kGroup, count = std::min(kGroup, rows - first);
        PEFTKIT_RUN(dots<Format>({from + first * columns, columns, count, group + 1 < end, tiles.data(), padded,
                                  panel.data(), sums.data(), totals.data()}));
        for (int64_t row = 0; row < count; ++row) {
          const float* factor = wide_up.data() + (first + row) * rank;
          const double own = static_cast<double>(own_squares[first + row]);
          double cross = 0, reach = 0;
          for (int64_t k = 0; k < rank; ++k) {
            by[k] = scale * static_cast<double>(factor[k]);
            cross += by[k] * totals[row * padded + k];
            reach += std::abs(by[k]) * norms[k];
          }
          const double square = quadratic(gram.data(), by.data(), scratch.data(), rank);
          double total = own + 2 * cross + square;
          const double error = unit * (own + 2 * roundings * reach * std::sqrt(own));
          // Written so that a NaN goes on as it is.
          if (error > 2 * kTolerance * total) {
            direct.resize(columns);
            for (int64_t j = 0; j < columns; ++j) {
              direct[j] = static_cast<double>(Format::load(from[(first + row) * columns + j]));
            }
            for (int64_t k = 0; k < rank; ++k) {
              add_scaled(direct.data(), flat.data() + k * columns, by[k], columns);
            }
            total = square_sum_wide(direct.data(), columns);
          }
          to[first + row] = static_cast<float>(std::sqrt(total));
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("row_squares", TORCH_BOX(&row_squares));
  library.impl("dora_norms", TORCH_BOX(&dora_norms));
}

#else  // one pass: the kernels for one kind of processor

namespace {
namespace PEFTKIT_NAME {

#include "peftkit_lanes.h"

constexpr int64_t kBlock = PEFTKIT_PASS == 512 ? 4 : 2;  // rows of a block, whose sums stay in registers
constexpr int64_t kFlush = kTerms * kLanes / kPanel;     // panels after which sums go on in double

// sums[row][k] += panel[row] . down[k] for kBlock rows and kRanks ranks of one panel, in the lanes of a vector each.
PEFTKIT_TARGET PEFTKIT_INLINE void block(const float* panel, const float* down, float* sums, int64_t padded) {
  Lanes total[kBlock][kRanks];
#pragma GCC unroll 4
  for (int64_t row = 0; row < kBlock; ++row) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRanks; ++k) total[row][k] = take_float(sums + (row * padded + k) * kMostLanes);
  }
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    Lanes own[kBlock];
#pragma GCC unroll 4
    for (int64_t row = 0; row < kBlock; ++row) own[row] = take_float(panel + row * kPanel + j);
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRanks; ++k) {
      const Lanes other = take_float(down + k * kPanel + j);
#pragma GCC unroll 4
      for (int64_t row = 0; row < kBlock; ++row) total[row][k] = fma(own[row], other, total[row][k]);
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < kBlock; ++row) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRanks; ++k) put(sums + (row * padded + k) * kMostLanes, total[row][k]);
  }
}

template <class Format>
PEFTKIT_TARGET PEFTKIT_INLINE void widen(const Bits<Format>* from, float* to, int64_t count) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) put(to + j, take<Format>(from + j));
  for (; j < count; ++j) to[j] = Format::load(from[j]);
  std::fill(to + count, to + kPanel, 0.0f);
}

// The products of all rows of the group with all of `down`.
template <class Format>
PEFTKIT_TARGET void dots(const Group<Format>& group) {
  const int64_t panels = (group.columns + kPanel - 1) / kPanel;
  const int64_t blocks = (group.rows + kBlock - 1) / kBlock * kBlock, places = kGroup * group.padded;
  std::fill_n(group.totals, places, 0.0);
  std::fill_n(group.sums, places * kMostLanes, 0.0f);
  std::fill_n(group.panel, kGroup * kPanel, 0.0f);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * kPanel, width = std::min(kPanel, group.columns - first);
    for (int64_t row = 0; row < group.rows; ++row) {
      const Bits<Format>* own = group.weight + row * group.columns;
      widen<Format>(own + first, group.panel + row * kPanel, width);
      // The rows are read in turns of a panel, which the processor's own prefetching does not follow.
      const bool last = p + 1 == panels;
      if (last && !group.more) continue;
      const Bits<Format>* next = last ? own + kGroup * group.columns : own + first + kPanel;
      const int64_t ahead = std::min(kPanel, group.columns - (last ? 0 : first + kPanel));
      for (int64_t j = 0; j < ahead; j += 64 / static_cast<int64_t>(sizeof *next)) __builtin_prefetch(next + j);
    }
    const float* down = group.tiles + p * group.padded * kPanel;
    for (int64_t k = 0; k < group.padded; k += kRanks) {
      for (int64_t row = 0; row < blocks; row += kBlock) {
        block(group.panel + row * kPanel, down + k * kPanel, group.sums + (row * group.padded + k) * kMostLanes,
              group.padded);
      }
    }
    if ((p + 1) % kFlush && p + 1 < panels) continue;
    for (int64_t place = 0; place < blocks * group.padded; ++place) {
      group.totals[place] += static_cast<double>(total(take_float(group.sums + place * kMostLanes)));
      put(group.sums + place * kMostLanes, zero());
    }
  }
}

}  // namespace PEFTKIT_NAME
}  // namespace

#endif
