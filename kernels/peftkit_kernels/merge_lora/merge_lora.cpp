// weight + scale * up @ down in place, what undoes it, and undoing it; see reference.py for the definition.
//
// Rows are worked on in groups that share the factors in cache. The sums are chains of fused multiply-adds, one rank after
// the other, as in the reference, so that the bits are those of every other implementation.

#ifndef PEFTKIT_PASS

#include "peftkit_cpu.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>

namespace {

using peftkit::Bits;
using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kRows = 8;       // rows of a group
constexpr int64_t kColumns = 32;   // columns of a tile
constexpr int64_t kStretch = 512;  // columns that are looked through for what subtracting gets wrong
constexpr int64_t kAhead = 512;    // columns that are asked for before they are read
constexpr uint8_t kSkips = 255;
constexpr int8_t kEscape = -128;
constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15ull;

// What is done with scale * up @ down: it is added; it is subtracted; it is added, and the weight from before and what
// subtracting would make of the sum are kept.
enum class Mode { add, subtract, reversible };

// A group of rows of the weight, `columns` of them from some column on.
template <class Format>
struct Group {
  Bits<Format>* weight;
  int64_t stride, rows, columns;
  bool more;  // whether another group follows in memory
  Bits<Format>*own, *guess;  // (kRows, kStretch), for Mode::reversible
};

}  // namespace

#define PEFTKIT_FILE "../merge_lora/merge_lora.cpp"
#include "peftkit_passes.h"

namespace {

// The sum over the 8 byte words of a row, zeros after its end, of word * ((place * m) | 1).
template <class Number>
PEFTKIT_CLONES uint64_t checksum(const Number* values, uint64_t first, int64_t count) {
  constexpr int64_t each = sizeof(uint64_t) / sizeof(Number);
  const int64_t words = count / each;
  uint64_t sum = 0, word;
  for (int64_t i = 0; i < words; ++i) {
    std::memcpy(&word, values + i * each, sizeof word);
    sum += word * (((first + static_cast<uint64_t>(i)) * kMultiplier) | 1);
  }
  if (count % each) {
    word = 0;
    std::memcpy(&word, values + words * each, static_cast<size_t>(count % each) * sizeof(Number));
    sum += word * (((first + static_cast<uint64_t>(words)) * kMultiplier) | 1);
  }
  return sum;
}

// Words of a row.
template <class Number>
uint64_t words_of(int64_t columns) {
  constexpr int64_t each = sizeof(uint64_t) / sizeof(Number);
  return static_cast<uint64_t>((columns + each - 1) / each);
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
        up(peftkit::floats(wide_up)) {
    const std::vector<float> flat = peftkit::floats(down);
    for (int64_t k = 0; k < rank; ++k) {
      for (int64_t j = 0; j < columns; j += kColumns) {
        std::copy_n(flat.data() + k * columns + j, std::min(kColumns, columns - j), tiles.data() + j * rank + k * kColumns);
      }
    }
  }

  // Applies scale * up @ down to the group, whose first element is that of a row and column.
  template <Mode kMode, class Format>
  void apply(int64_t row, int64_t column, const Group<Format>& group) const {
    // By rank and then by row, so that what one step needs lies together.
    static thread_local std::vector<float> turned;
    turned.assign(static_cast<size_t>(kRows * rank), 0.0f);
    for (int64_t i = 0; i < group.rows; ++i) {
      for (int64_t k = 0; k < rank; ++k) turned[k * kRows + i] = up[(row + i) * rank + k];
    }
    PEFTKIT_RUN(apply<Format, kMode>(group, tiles.data() + column * rank, turned.data(), rank, scale));
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
                                for (int64_t group = begin; group < end; ++group) {
                                  work(group * kRows, std::min(kRows, rows - group * kRows), group + 1 < end);
                                }
                              });
}

void merge(Tensor weight, Tensor down, Tensor up, double scale) {
  check(weight, down, up);
  const Factors factors(down, up, scale);
  const int64_t columns = factors.columns;
  peftkit::with_format(weight.scalar_type(), "merge_lora_", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<Bits<Format>*>(weight.mutable_data_ptr());
    each_group(weight.size(0), columns, [&](int64_t first, int64_t rows, bool more) {
      factors.apply<Mode::add, Format>(first, 0, {to + first * columns, columns, rows, columns, more, nullptr, nullptr});
    });
  });
}

// What one row needs beside the factors, in the order of the columns.
template <class Number>
struct RowResidual {
  std::vector<uint8_t> gaps;
  std::vector<int8_t> codes;
  std::vector<Number> escapes;
  int64_t last = -1;  // the column named last

  // Takes the columns from `column` on; a row's stretches come in their order.
  void take(const Number* own, const Number* guess, int64_t column, int64_t count) {
    for (int64_t base = 0; base < count; base += 32) {
      for (uint32_t wrong = peftkit::differing(own + base, guess + base, count - base); wrong; wrong &= wrong - 1) {
        const int64_t i = base + std::countr_zero(wrong);
        int64_t passed = column + i - last - 1;
        for (; passed >= kSkips; passed -= kSkips) gaps.push_back(kSkips);
        gaps.push_back(static_cast<uint8_t>(passed));
        const int64_t step = static_cast<int64_t>(static_cast<std::make_signed_t<Number>>(own[i])) -
                             static_cast<int64_t>(static_cast<std::make_signed_t<Number>>(guess[i]));
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
    using Number = typename Format::Bits;
    auto* to = static_cast<Number*>(weight.mutable_data_ptr());
    std::vector<RowResidual<Number>> found(rows);
    std::vector<uint64_t> sums(rows);
    each_group(rows, columns, [&](int64_t first, int64_t count, bool more) {
      std::vector<Number> own(kRows * kStretch), guess(kRows * kStretch);
      for (int64_t row = first; row < first + count; ++row) {
        sums[row] = checksum<Number>(to + row * columns, static_cast<uint64_t>(row) * words_of<Number>(columns), columns);
      }
      for (int64_t column = 0; column < columns; column += kStretch) {
        const int64_t width = std::min(kStretch, columns - column);
        factors.apply<Mode::reversible, Format>(
            first, column, {to + first * columns + column, columns, count, width, more, own.data(), guess.data()});
        for (int64_t i = 0; i < count; ++i) {
          found[first + i].take(own.data() + i * kStretch, guess.data() + i * kStretch, column, width);
        }
      }
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
    const ScalarType wide = sizeof(Number) == 2 ? ScalarType::Short : ScalarType::Int;
    Tensor escapes = torch::stable::new_empty(weight, {begins[2][rows]}, std::make_optional(wide));
    auto* gap = static_cast<uint8_t*>(gaps.mutable_data_ptr());
    auto* code = static_cast<int8_t*>(codes.mutable_data_ptr());
    auto* escape = static_cast<Number*>(escapes.mutable_data_ptr());
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
    using Number = typename Format::Bits;
    auto* to = static_cast<Number*>(weight.mutable_data_ptr());
    const auto* gap = static_cast<const uint8_t*>(gaps.const_data_ptr());
    const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
    const auto* escape = static_cast<const Number*>(escapes.const_data_ptr());
    std::vector<uint64_t> sums(rows);
    each_group(rows, columns, [&](int64_t first, int64_t count, bool more) {
      factors.apply<Mode::subtract, Format>(first, 0, {to + first * columns, columns, count, columns, more, nullptr, nullptr});
      for (int64_t row = first; row < first + count; ++row) {
        Number* own = to + row * columns;
        int64_t place = -1;
        const int8_t* next = code + start[rows + 1 + row];
        const int8_t* last = code + start[rows + 1 + row + 1];
        const Number* raw = escape + start[2 * (rows + 1) + row];
        const Number* raw_end = escape + start[2 * (rows + 1) + row + 1];
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
            own[place] = static_cast<Number>(own[place] + static_cast<Number>(static_cast<std::make_signed_t<Number>>(step)));
          } else if (raw != raw_end) {
            own[place] = *raw++;
          }
        }
        sums[row] = checksum<Number>(own, static_cast<uint64_t>(row) * words_of<Number>(columns), columns);
      }
    });
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    return sum_of(weight, sum);
  });
}

// The same sum over the rows of a whole matrix.
Tensor checksum_of(Tensor tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.dim() == 2, "checksum: compiled code takes contiguous matrices");
  return peftkit::with_format(tensor.scalar_type(), "checksum", [&](auto format) {
    using Number = typename decltype(format)::Bits;
    const auto* from = static_cast<const Number*>(tensor.const_data_ptr());
    const int64_t rows = tensor.size(0), columns = tensor.size(1);
    std::vector<uint64_t> sums(rows);
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, (1 << 16) / (columns + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        sums[row] = checksum<Number>(from + row * columns, static_cast<uint64_t>(row) * words_of<Number>(columns), columns);
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

#else  // one pass: the kernels for one kind of processor

namespace {
namespace PEFTKIT_NAME {

#include "peftkit_lanes.h"

// a * b + c, rounded once.
PEFTKIT_TARGET PEFTKIT_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
#if PEFTKIT_PASS != 0
  return fma(a, b, c);
#else
  for (int64_t i = 0; i < kLanes; ++i) c.of[i] = std::fma(a.of[i], b.of[i], c.of[i]);
  return c;
#endif
}

// What is done with two vectors of scale * up @ down at one place of the weight.
template <class Format, Mode kMode>
PEFTKIT_TARGET PEFTKIT_INLINE void use(Bits<Format>* weight, Bits<Format>* own, Bits<Format>* guess, Lanes a, Lanes b) {
  const Lanes first = take<Format>(weight), second = take<Format>(weight + kLanes);
  if constexpr (kMode == Mode::subtract) {
    give<Format>(weight, minus(first, a), minus(second, b));
    return;
  }
  if constexpr (kMode == Mode::reversible) std::memcpy(own, weight, 2 * kLanes * sizeof *own);
  give<Format>(weight, plus(first, a), plus(second, b));
  if constexpr (kMode == Mode::reversible) {
    give<Format>(guess, minus(take<Format>(weight), a), minus(take<Format>(weight + kLanes), b));
  }
}

constexpr int64_t kBlock = PEFTKIT_PASS == 512 ? kRows : 4;  // rows whose sums stay in registers

// `tiles` holds (columns / 32, rank, 32), `up` (rank, kRows).
template <class Format, Mode kMode>
PEFTKIT_TARGET void apply(const Group<Format>& group, const float* tiles, const float* up, int64_t rank, float scale) {
  const Lanes by = all(scale);
  for (int64_t column = 0; column < group.columns; column += kColumns) {
    const float* tile = tiles + column * rank;
    const int64_t width = std::min(kColumns, group.columns - column);
    // The rows are read in turns, which the processor's own prefetching does not follow.
    const bool next = column + kAhead >= group.columns;
    const int64_t ahead = column + kAhead - (next ? group.columns : 0);
    if (ahead < group.columns && (!next || group.more)) {
      const Bits<Format>* from = group.weight + (next ? kRows * group.stride : 0) + ahead;
      for (int64_t row = 0; row < group.rows; ++row) {
        const char* line = reinterpret_cast<const char*>(from + row * group.stride);
        for (size_t part = 0; part < kColumns * sizeof *from; part += 64) __builtin_prefetch(line + part);
      }
    }
    for (int64_t row = 0; row < group.rows; row += kBlock) {
      for (int64_t part = 0; part < width; part += 2 * kLanes) {
        Lanes sums[kBlock][2];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kBlock; ++i) sums[i][0] = sums[i][1] = zero();
        for (int64_t k = 0; k < rank; ++k) {
          const Lanes first = take_float(tile + k * kColumns + part);
          const Lanes second = take_float(tile + k * kColumns + part + kLanes);
#pragma GCC unroll 8
          for (int64_t i = 0; i < kBlock; ++i) {
            const Lanes own = all(up[k * kRows + row + i]);
            sums[i][0] = fused(own, first, sums[i][0]);
            sums[i][1] = fused(own, second, sums[i][1]);
          }
        }
#pragma GCC unroll 8
        for (int64_t i = 0; i < kBlock; ++i) {
          if (row + i >= group.rows) break;
          const Lanes first = times(sums[i][0], by), second = times(sums[i][1], by);
          Bits<Format>* own = group.weight + (row + i) * group.stride + column + part;
          Bits<Format>*before = nullptr, *guess = nullptr;
          if constexpr (kMode == Mode::reversible) {
            before = group.own + (row + i) * kStretch + column + part;
            guess = group.guess + (row + i) * kStretch + column + part;
          }
          const int64_t count = std::min(2 * kLanes, width - part);
          if (count == 2 * kLanes) {
            use<Format, kMode>(own, before, guess, first, second);
            continue;
          }
          Bits<Format> held[3][2 * kLanes] = {};
          std::copy_n(own, count, held[0]);
          use<Format, kMode>(held[0], held[1], held[2], first, second);
          std::copy_n(held[0], count, own);
          if constexpr (kMode == Mode::reversible) {
            std::copy_n(held[1], count, before);
            std::copy_n(held[2], count, guess);
          }
        }
      }
    }
  }
}

}  // namespace PEFTKIT_NAME
}  // namespace

#endif
