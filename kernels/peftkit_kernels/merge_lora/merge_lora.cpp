// weight + scale * up @ down in place, what undoes it, and undoing it; see reference.py for the definition.
//
// Rows are worked on in groups that share the factors in cache. The sums are chains of fused multiply-adds, one rank after
// the other, as in the reference, so that the bits are those of every other implementation.

#include "peftkit_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kRows = 8;      // rows of a group
constexpr int64_t kColumns = 32;  // columns of a tile
constexpr int64_t kStretch = 512; // columns whose change is kept at a time
constexpr uint8_t kSkips = 255;
constexpr int8_t kEscape = -128;
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;

typedef float Lanes __attribute__((vector_size(64)));

// out[i][j] = scale * sum_k up[k][i] tiles[j][k] for kRows rows; `tiles` holds (columns / 32, r, 32), `up` (r, rows).
// The compiler fuses the product and the sum of one statement where the processor has the instruction.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(PEFTKIT_NO_CLONES)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
void fused_products(const float* tiles, const float* up, int64_t rank, int64_t columns, float scale, float* out,
                    int64_t stride) {
  for (int64_t tile = 0; tile * kColumns < columns; ++tile) {
    const float* from = tiles + tile * rank * kColumns;
    Lanes low_sums[kRows] = {}, high_sums[kRows] = {};
    for (int64_t k = 0; k < rank; ++k) {
      Lanes low, high;
      std::memcpy(&low, from + k * kColumns, sizeof low);
      std::memcpy(&high, from + k * kColumns + 16, sizeof high);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) {
        const float by = up[k * kRows + row];
        low_sums[row] += by * low;
        high_sums[row] += by * high;
      }
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      float* to = out + row * stride + tile * kColumns;
      const Lanes low = low_sums[row] * scale, high = high_sums[row] * scale;
      std::memcpy(to, &low, sizeof low);
      std::memcpy(to + 16, &high, sizeof high);
    }
  }
}

// The same with the library's fused multiply-add, for processors on which the compiler has none.
void plain_products(const float* tiles, const float* up, int64_t rank, int64_t columns, float scale, float* out,
                    int64_t stride) {
  for (int64_t column = 0; column < columns; ++column) {
    const float* from = tiles + (column / kColumns) * rank * kColumns + column % kColumns;
    for (int64_t row = 0; row < kRows; ++row) {
      float sum = 0;
      for (int64_t k = 0; k < rank; ++k) sum = std::fma(up[k * kRows + row], from[k * kColumns], sum);
      out[row * stride + column] = sum * scale;
    }
  }
}

bool fuses() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
#else
  return false;
#endif
}

template <class Format>
PEFTKIT_CLONES void add(typename Format::Bits* weight, const float* change, int64_t count) {
  for (int64_t i = 0; i < count; ++i) weight[i] = Format::store(Format::load(weight[i]) + change[i]);
}

template <class Format>
PEFTKIT_CLONES void subtract(typename Format::Bits* weight, const float* change, int64_t count) {
  for (int64_t i = 0; i < count; ++i) weight[i] = Format::store(Format::load(weight[i]) - change[i]);
}

// Adds, and writes the weight from before to `own` and what subtracting would give to `guess`.
template <class Format>
PEFTKIT_CLONES void add_and_guess(typename Format::Bits* weight, const float* change, typename Format::Bits* guess,
                                     typename Format::Bits* own, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto before = weight[i];
    const auto after = Format::store(Format::load(before) + change[i]);
    const auto back = Format::store(Format::load(after) - change[i]);
    own[i] = before;
    weight[i] = after;
    guess[i] = back;
  }
}

template <class Bits>
PEFTKIT_CLONES uint64_t checksum(const Bits* values, uint64_t first, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += (static_cast<uint64_t>(values[i]) + 1) * (((first + static_cast<uint64_t>(i)) * kMultiplier) | 1);
  }
  return sum;
}

// A factor as floats, whatever its dtype.
std::vector<float> floats(const Tensor& factor) {
  std::vector<float> out(factor.numel());
  peftkit::with_format(factor.scalar_type(), "merge_lora", [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(factor.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = Format::load(from[i]);
  });
  return out;
}

struct Factors {
  int64_t rank, columns, padded;
  float scale;
  std::vector<float> tiles;  // (padded / 32, rank, 32), zero beyond the columns
  std::vector<float> up;     // (rows, rank)

  Factors(const Tensor& down, const Tensor& wide_up, double by)
      : rank(down.size(0)),
        columns(down.size(1)),
        padded((columns + kColumns - 1) / kColumns * kColumns),
        scale(static_cast<float>(by)),
        tiles(static_cast<size_t>(padded * rank), 0.0f),
        up(floats(wide_up)) {
    const std::vector<float> flat = floats(down);
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t j = 0; j < columns; ++j) {
        tiles[((j / kColumns) * rank + k) * kColumns + j % kColumns] = flat[k * columns + j];
      }
    }
  }

  // Calls use(row, column, count, change) with scale * up @ down for the `rows` rows from `first` on, a stretch of
  // columns at a time, so that what was computed is used while it is in the nearest cache.
  template <class Use>
  void each(int64_t first, int64_t rows, float* change, Use&& use) const {
    // By rank and then by row, so that what one step needs lies together.
    std::vector<float> group(kRows * rank, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < rank; ++k) group[k * kRows + row] = up[(first + row) * rank + k];
    }
    for (int64_t column = 0; column < columns; column += kStretch) {
      const int64_t count = std::min(kStretch, columns - column);
      const auto products = fuses() ? fused_products : plain_products;
      products(tiles.data() + column * rank, group.data(), rank, count, scale, change, kStretch);
      for (int64_t row = 0; row < rows; ++row) use(first + row, column, count, change + row * kStretch);
    }
  }
};

void check(const Tensor& weight, const Tensor& down, const Tensor& up) {
  STD_TORCH_CHECK(weight.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "merge_lora: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 && down.size(0) == up.size(1) &&
                      weight.size(0) == up.size(0) && weight.size(1) == down.size(1),
                  "merge_lora: expected weight (out, in), down (r, in) and up (out, r)");
}

template <class Work>
void each_group(int64_t rows, int64_t columns, Work&& work) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 16384 / (kRows * columns + 1)),
                              [&](int64_t begin, int64_t end) {
                                std::vector<float> change(kRows * kStretch);
                                for (int64_t group = begin; group < end; ++group) {
                                  const int64_t first = group * kRows;
                                  work(first, std::min(kRows, rows - first), change.data());
                                }
                              });
}

void merge(Tensor weight, Tensor down, Tensor up, double scale) {
  check(weight, down, up);
  const Factors factors(down, up, scale);
  const int64_t columns = factors.columns;
  peftkit::with_format(weight.scalar_type(), "merge_lora_", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(weight.mutable_data_ptr());
    each_group(weight.size(0), columns, [&](int64_t first, int64_t rows, float* change) {
      factors.each(first, rows, change, [&](int64_t row, int64_t column, int64_t count, const float* by) {
        add<Format>(to + row * columns + column, by, count);
      });
    });
  });
}

// What one row needs beside the factors, in the order of the columns.
template <class Bits>
struct RowResidual {
  std::vector<uint8_t> gaps;
  std::vector<int8_t> codes;
  std::vector<Bits> escapes;
  int64_t last = -1;  // the column named last

  // Takes the columns from `column` on; a row's stretches come in their order.
  void take(const Bits* own, const Bits* guess, int64_t column, int64_t count) {
    for (int64_t base = 0; base < count; base += 32) {
      for (uint32_t wrong = peftkit::differing(own + base, guess + base, count - base); wrong; wrong &= wrong - 1) {
        const int64_t i = base + std::countr_zero(wrong);
        int64_t passed = column + i - last - 1;
        for (; passed >= kSkips; passed -= kSkips) gaps.push_back(kSkips);
        gaps.push_back(static_cast<uint8_t>(passed));
        const int64_t step = static_cast<int64_t>(static_cast<std::make_signed_t<Bits>>(own[i])) -
                             static_cast<int64_t>(static_cast<std::make_signed_t<Bits>>(guess[i]));
        const bool narrow = step > kEscape && step < -static_cast<int64_t>(kEscape);
        codes.push_back(narrow ? static_cast<int8_t>(step) : kEscape);
        if (!narrow) escapes.push_back(own[i]);
        last = column + i;
      }
    }
  }
};

Tensor sum_of(const Tensor& like, uint64_t sum) {
  Tensor out = torch::stable::new_empty(like, {1}, std::make_optional(ScalarType::Long));
  *static_cast<int64_t*>(out.mutable_data_ptr()) = static_cast<int64_t>(sum);
  return out;
}

using Residual = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Residual merge_reversibly(Tensor weight, Tensor down, Tensor up, double scale) {
  check(weight, down, up);
  const Factors factors(down, up, scale);
  const int64_t rows = weight.size(0), columns = factors.columns;
  return peftkit::with_format(weight.scalar_type(), "merge_lora_reversibly_", [&](auto format) {
    using Format = decltype(format);
    using Bits = typename Format::Bits;
    auto* to = static_cast<Bits*>(weight.mutable_data_ptr());
    std::vector<RowResidual<Bits>> found(rows);
    std::vector<uint64_t> sums(rows);
    each_group(rows, columns, [&](int64_t first, int64_t group, float* change) {
      std::vector<Bits> own(kStretch), guess(kStretch);
      factors.each(first, group, change, [&](int64_t row, int64_t column, int64_t count, const float* by) {
        add_and_guess<Format>(to + row * columns + column, by, guess.data(), own.data(), count);
        sums[row] += checksum<Bits>(own.data(), static_cast<uint64_t>(row * columns + column), count);
        found[row].take(own.data(), guess.data(), column, count);
      });
    });
    Tensor starts = torch::stable::new_empty(weight, {3, rows + 1}, std::make_optional(ScalarType::Int));
    auto* start = static_cast<int32_t*>(starts.mutable_data_ptr());
    int32_t* begins[3] = {start, start + rows + 1, start + 2 * (rows + 1)};
    for (int32_t* begin : begins) begin[0] = 0;
    uint64_t sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const size_t sizes[3] = {found[row].gaps.size(), found[row].codes.size(), found[row].escapes.size()};
      for (int place = 0; place < 3; ++place) {
        STD_TORCH_CHECK(begins[place][row] + sizes[place] < (1ull << 31), "merge_lora: the weight is too large");
        begins[place][row + 1] = begins[place][row] + static_cast<int32_t>(sizes[place]);
      }
      sum += sums[row];
    }
    Tensor gaps = torch::stable::new_empty(weight, {begins[0][rows]}, std::make_optional(ScalarType::Byte));
    Tensor codes = torch::stable::new_empty(weight, {begins[1][rows]}, std::make_optional(ScalarType::Char));
    const ScalarType wide = sizeof(Bits) == 2 ? ScalarType::Short : ScalarType::Int;
    Tensor escapes = torch::stable::new_empty(weight, {begins[2][rows]}, std::make_optional(wide));
    auto* gap = static_cast<uint8_t*>(gaps.mutable_data_ptr());
    auto* code = static_cast<int8_t*>(codes.mutable_data_ptr());
    auto* escape = static_cast<Bits*>(escapes.mutable_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      std::copy(found[row].gaps.begin(), found[row].gaps.end(), gap + begins[0][row]);
      std::copy(found[row].codes.begin(), found[row].codes.end(), code + begins[1][row]);
      std::copy(found[row].escapes.begin(), found[row].escapes.end(), escape + begins[2][row]);
    }
    return Residual(gaps, codes, escapes, starts, sum_of(weight, sum));
  });
}

Tensor unmerge(Tensor weight, Tensor down, Tensor up, double scale, Tensor gaps, Tensor codes, Tensor escapes,
               Tensor starts) {
  check(weight, down, up);
  const int64_t rows = weight.size(0);
  STD_TORCH_CHECK(gaps.is_contiguous() && codes.is_contiguous() && escapes.is_contiguous() && starts.is_contiguous() &&
                      starts.dim() == 2 && starts.size(0) == 3 && starts.size(1) == rows + 1 &&
                      starts.scalar_type() == ScalarType::Int,
                  "unmerge_lora_: the residual is not that of this weight");
  const auto* start = static_cast<const int32_t*>(starts.const_data_ptr());
  const int64_t sizes[3] = {gaps.numel(), codes.numel(), escapes.numel()};
  for (int64_t place = 0; place < 3; ++place) {
    const int32_t* begin = start + place * (rows + 1);
    bool fits = begin[0] == 0 && begin[rows] == sizes[place];
    for (int64_t row = 0; row < rows; ++row) fits = fits && begin[row] <= begin[row + 1];
    STD_TORCH_CHECK(fits, "unmerge_lora_: the residual is damaged: its parts do not have the sizes that it names");
  }
  const Factors factors(down, up, scale);
  const int64_t columns = factors.columns;
  return peftkit::with_format(weight.scalar_type(), "unmerge_lora_", [&](auto format) {
    using Format = decltype(format);
    using Bits = typename Format::Bits;
    auto* to = static_cast<Bits*>(weight.mutable_data_ptr());
    const auto* gap = static_cast<const uint8_t*>(gaps.const_data_ptr());
    const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
    const auto* escape = static_cast<const Bits*>(escapes.const_data_ptr());
    std::vector<uint64_t> sums(rows);
    each_group(rows, columns, [&](int64_t first, int64_t group, float* change) {
      factors.each(first, group, change, [&](int64_t row, int64_t column, int64_t count, const float* by) {
        subtract<Format>(to + row * columns + column, by, count);
      });
      for (int64_t row = first; row < first + group; ++row) {
        Bits* own = to + row * columns;
        int64_t place = -1;
        const int8_t* next = code + start[rows + 1 + row];
        const int8_t* last = code + start[rows + 1 + row + 1];
        const Bits* raw = escape + start[2 * (rows + 1) + row];
        const Bits* raw_end = escape + start[2 * (rows + 1) + row + 1];
        for (int32_t at = start[row]; at < start[row + 1]; ++at) {
          if (gap[at] == kSkips) {
            place += kSkips;
            continue;
          }
          place += gap[at] + 1;
          // A damaged residual must not write outside of the row; the checksum tells that it is damaged.
          if (place >= columns || next == last) break;
          const int8_t step = *next++;
          if (step != kEscape) {
            own[place] = static_cast<Bits>(own[place] + static_cast<Bits>(static_cast<std::make_signed_t<Bits>>(step)));
          } else if (raw != raw_end) {
            own[place] = *raw++;
          }
        }
        sums[row] = checksum<Bits>(own, static_cast<uint64_t>(row * columns), columns);
      }
    });
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    return sum_of(weight, sum);
  });
}

// The same sum over the bits of a whole tensor.
Tensor checksum_of(Tensor tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "checksum: compiled code takes contiguous tensors");
  return peftkit::with_format(tensor.scalar_type(), "checksum", [&](auto format) {
    using Bits = typename decltype(format)::Bits;
    const auto* from = static_cast<const Bits*>(tensor.const_data_ptr());
    constexpr int64_t block = 1 << 16;
    const int64_t count = tensor.numel(), blocks = (count + block - 1) / block;
    std::vector<uint64_t> sums(blocks);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sums[i] = checksum<Bits>(from + i * block, static_cast<uint64_t>(i * block), std::min(block, count - i * block));
      }
    });
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    return sum_of(tensor, sum);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("merge_lora_", TORCH_BOX(&merge));
  library.impl("merge_lora_reversibly_", TORCH_BOX(&merge_reversibly));
  library.impl("unmerge_lora_", TORCH_BOX(&unmerge));
  library.impl("checksum", TORCH_BOX(&checksum_of));
}
