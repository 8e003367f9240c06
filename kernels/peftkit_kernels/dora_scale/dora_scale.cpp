// Norms of the rows of weight + scale * up @ down; see reference.py for the definition.
//
// Groups of rows are converted to float a panel of columns at a time, and multiplied with the panel of `down` while both
// are in the first cache. Sums run in float over one panel and go on in double from panel to panel, so that the bound on
// their error is a small constant. A row whose terms cancel beyond that bound is formed in double.

#include "peftkit_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kRows = 4;     // rows of a block
constexpr int64_t kGroup = 8;    // rows that share a panel of `down` in the first cache
constexpr int64_t kRanks = 4;    // ranks of a block
constexpr int64_t kPanel = 512;  // columns of a panel
constexpr double kTolerance = 4e-6;

typedef float Half __attribute__((vector_size(32)));
typedef double Wide __attribute__((vector_size(64)));
constexpr int64_t kWide = 8;

template <int Lanes>
struct Vector {
  typedef float Type __attribute__((vector_size(Lanes * 4)));
};

// sums[row][rank] += panel[row] . down[rank] for kRows rows and kRanks ranks of one panel, in 8 lanes each.
template <int Lanes>
inline __attribute__((always_inline)) void dots_of(const float* panel, const float* down, double* sums, int64_t stride) {
  using Lane = typename Vector<Lanes>::Type;
  Lane total[kRows][kRanks] = {};
  for (int64_t j = 0; j < kPanel; j += Lanes) {
    Lane own[kRows], other;
#pragma GCC unroll 4
    for (int64_t row = 0; row < kRows; ++row) std::memcpy(&own[row], panel + row * kPanel + j, sizeof(Lane));
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRanks; ++k) {
      std::memcpy(&other, down + k * kPanel + j, sizeof(Lane));
#pragma GCC unroll 4
      for (int64_t row = 0; row < kRows; ++row) total[row][k] += own[row] * other;
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kRanks; ++k) {
      double* to = sums + (row * stride + k) * kWide;
      Half parts[Lanes / kWide];
      Wide sum;
      std::memcpy(parts, &total[row][k], sizeof parts);
      std::memcpy(&sum, to, sizeof sum);
      for (const Half& part : parts) sum += __builtin_convertvector(part, Wide);
      std::memcpy(to, &sum, sizeof sum);
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512dq,avx512vl,fma"))) void dots_avx512(const float* panel, const float* down,
                                                                          double* sums, int64_t stride) {
  dots_of<16>(panel, down, sums, stride);
}
__attribute__((target("avx2,fma"))) void dots_avx2(const float* panel, const float* down, double* sums,
                                                   int64_t stride) {
  dots_of<8>(panel, down, sums, stride);
}
#endif
void dots_portable(const float* panel, const float* down, double* sums, int64_t stride) {
  dots_of<8>(panel, down, sums, stride);
}

using Dots = void (*)(const float*, const float*, double*, int64_t);

Dots chosen() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return dots_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return dots_avx2;
#endif
  return dots_portable;
}

template <class Format>
PEFTKIT_CLONES void widen(const typename Format::Bits* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Format::load(from[i]);
}

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

std::vector<float> floats(const Tensor& tensor) {
  std::vector<float> out(tensor.numel());
  peftkit::with_format(tensor.scalar_type(), "dora_scale", [&](auto format) {
    using Format = decltype(format);
    widen<Format>(static_cast<const typename Format::Bits*>(tensor.const_data_ptr()), out.data(),
                  static_cast<int64_t>(out.size()));
  });
  return out;
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
        widen<Format>(from + row * columns, own.data(), columns);
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
  const std::vector<float> flat = floats(down), wide_up = floats(up);
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
        double sums[8] = {};
        const float *a = flat.data() + k * columns, *b = flat.data() + l * columns;
        int64_t j = 0;
        for (; j + 8 <= columns; j += 8) {
          for (int lane = 0; lane < 8; ++lane) {
            sums[lane] += static_cast<double>(a[j + lane]) * static_cast<double>(b[j + lane]);
          }
        }
        for (; j < columns; ++j) sums[0] += static_cast<double>(a[j]) * static_cast<double>(b[j]);
        double total = 0;
        for (double sum : sums) total += sum;
        gram[k * rank + l] = gram[l * rank + k] = total;
      }
    }
  });
  for (int64_t k = 0; k < rank; ++k) norms[k] = std::sqrt(gram[k * rank + k]);
  static const Dots dots = chosen();
  // A sum of kPanel terms in lanes of 8 at the least makes kPanel / 8 roundings.
  const double unit = std::numeric_limits<float>::epsilon() / 2;
  const double roundings = static_cast<double>(std::min(columns, kPanel) / 8 + 1);
  peftkit::with_format(weight.scalar_type(), "dora_norms", [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(weight.const_data_ptr());
    const int64_t groups = (rows + kGroup - 1) / kGroup;
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 65536 / (columns * (rank + 1) + 1)),
                                [&](int64_t begin, int64_t end) {
      Lines<float> panel(kGroup * kPanel);
      Lines<double> sums(kGroup * padded * kWide);
      std::vector<double> direct, by(rank), scratch(rank);
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kGroup, count = std::min(kGroup, rows - first);
        std::fill_n(sums.data(), kGroup * padded * kWide, 0.0);
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t width = std::min(kPanel, columns - p * kPanel);
          for (int64_t row = 0; row < count; ++row) {
            widen<Format>(from + (first + row) * columns + p * kPanel, panel.data() + row * kPanel, width);
            std::fill(panel.data() + row * kPanel + width, panel.data() + (row + 1) * kPanel, 0.0f);
            // The rows are read in turns of a panel, which the processor's own prefetching does not follow.
            const auto* next = from + (first + row) * columns + (p + 1) * kPanel;
            const int64_t ahead = std::min(kPanel, columns - (p + 1) * kPanel);
            for (int64_t j = 0; j < ahead; j += 64 / static_cast<int64_t>(sizeof *next)) __builtin_prefetch(next + j);
          }
          for (int64_t k = 0; k < padded; k += kRanks) {
            for (int64_t row = 0; row < count; row += kRows) {
              dots(panel.data() + row * kPanel, tiles.data() + (p * padded + k) * kPanel,
                   sums.data() + (row * padded + k) * kWide, padded);
            }
          }
        }
        for (int64_t row = 0; row < count; ++row) {
          const float* factor = wide_up.data() + (first + row) * rank;
          const double own = static_cast<double>(own_squares[first + row]);
          double cross = 0, reach = 0;
          for (int64_t k = 0; k < rank; ++k) {
            const double* lanes = sums.data() + (row * padded + k) * kWide;
            const double inner = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
                                 ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
            by[k] = scale * static_cast<double>(factor[k]);
            cross += by[k] * inner;
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
