// A frozen linear layer with a low-rank update; see reference.py for the definition.
//
// Products go to the library that torch uses. What surrounds them is here: factors are cast and scaled in one pass,
// elements are dropped in one, gradients are scaled, turned and cast in one. For a few rows the update is computed here
// too, from the factors as they are stored: casting them would cost more than multiplying with them.

#include "peftkit_bfloat16.h"
#include "peftkit_cpu.h"
#include "peftkit_wide.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kFew = 4;           // rows up to which the update is computed here
constexpr int64_t kStreamed = 2;      // rows of 16 bits up to which the library is as fast as the memory everywhere
constexpr int64_t kFewHalves = 32;    // rows up to which all is, where bfloat16 can be multiplied
constexpr int64_t kGrain = 1 << 15;   // elements a thread takes at the least
constexpr int64_t kLevels = 1 << 16;  // of the probabilities

using Seed = std::optional<Tensor>;

struct Chance {
  uint32_t threshold = 0;  // the least 16 bits that are kept
  uint64_t seed = 0;
  double gain;

  Chance(double scale, double probability, const Seed& given) : gain(scale) {
    threshold = static_cast<uint32_t>(probability * static_cast<double>(kLevels) + 0.5);
    const double share = 1.0 - static_cast<double>(threshold) / static_cast<double>(kLevels);
    gain = share > 0.0 ? scale / share : 0.0;
    if (given.has_value()) seed = static_cast<uint64_t>(*static_cast<const int64_t*>(given->const_data_ptr()));
    if (!given.has_value()) threshold = 0;
  }
  bool drops() const { return threshold > 0; }
};

// Places [4 * first, 4 * last), or up to `count`, of `from` with zeros where they are dropped.
template <class Bits>
PEFTKIT_CLONES void drop(const Bits* from, Bits* to, int64_t first, int64_t last, int64_t count, uint64_t seed,
                         uint32_t threshold) {
  const int64_t whole = std::min(last, count / 4);
  for (int64_t group = first; group < last; ++group) {
    uint64_t bits = seed + (static_cast<uint64_t>(group) + 1) * 0x9E3779B97F4A7C15ull;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    bits ^= bits >> 31;
    const int64_t at = group * 4, end = group < whole ? 4 : count - at;
    for (int64_t lane = 0; lane < end; ++lane) {
      const bool stays = ((bits >> (16 * lane)) & 0xffffu) >= threshold;
      to[at + lane] = stays ? from[at + lane] : Bits(0);
    }
  }
}

// Rows [first, first + count) of a matrix, of which `values` holds just these, with zeros where they are dropped.
void drop_rows(float* values, int64_t first, int64_t count, int64_t width, const Chance& chance) {
  auto* bits = reinterpret_cast<uint32_t*>(values);
  const int64_t begin = first * width, end = begin + count * width;
  torch::stable::parallel_for(begin / 4, (end + 3) / 4, kGrain / 4, [&](int64_t from, int64_t to) {
    for (int64_t group = from; group < to; ++group) {
      uint32_t held[4] = {}, kept[4];
      const int64_t low = std::max(group * 4, begin), high = std::min(group * 4 + 4, end);
      for (int64_t i = low; i < high; ++i) held[i - group * 4] = bits[i - begin];
      // The group by itself, as the first of a draw that starts where it stands.
      const uint64_t seed = chance.seed + static_cast<uint64_t>(group) * 0x9E3779B97F4A7C15ull;
      drop<uint32_t>(held, kept, 0, 1, 4, seed, chance.threshold);
      for (int64_t i = low; i < high; ++i) bits[i - begin] = kept[i - group * 4];
    }
  });
}

// What is multiplied: x itself, or a copy with zeros.
Tensor dropped_of(const Tensor& x, const Chance& chance) {
  Tensor out = torch::stable::empty_like(x);
  const int64_t count = x.numel(), groups = (count + 3) / 4;
  peftkit::with_format(x.scalar_type(), "lora_linear", [&](auto format) {
    using Bits = typename decltype(format)::Bits;
    const auto* from = static_cast<const Bits*>(x.const_data_ptr());
    auto* to = static_cast<Bits*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, groups, kGrain / 4, [&](int64_t begin, int64_t end) {
      drop<Bits>(from, to, begin, end, count, chance.seed, chance.threshold);
    });
  });
  return out;
}

// to[i] += from[i] where it is kept.
template <class Format>
PEFTKIT_CLONES void add(typename Format::Bits* to, const typename Format::Bits* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Format::store(Format::load(to[i]) + Format::load(from[i]));
}

template <class From, class To>
PEFTKIT_CLONES void cast(const typename From::Bits* from, typename To::Bits* to, float by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = To::store(From::load(from[i]) * by);
}

using peftkit::widen;

// by * factor in another dtype, rounded once; the factor itself where nothing changes, unless a copy is asked for.
Tensor scaled(const Tensor& factor, ScalarType type, double by, bool always = false) {
  if (factor.scalar_type() == type && by == 1.0 && !always) return factor;
  Tensor out = torch::stable::new_empty(factor, {factor.size(0), factor.size(1)}, std::make_optional(type));
  const int64_t count = factor.numel();
  peftkit::with_format(factor.scalar_type(), "lora_linear", [&](auto source) {
    peftkit::with_format(type, "lora_linear", [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      const auto* from = static_cast<const typename From::Bits*>(factor.const_data_ptr());
      auto* to = static_cast<typename To::Bits*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
        cast<From, To>(from + begin, to + begin, static_cast<float>(by), end - begin);
      });
    });
  });
  return out;
}

// by * from in another dtype; (rows, columns) becomes (columns, rows) where `turn` says so.
Tensor finished(const Tensor& from, ScalarType type, double by, bool turn) {
  if (!turn) return scaled(from, type, by);
  const int64_t rows = from.size(0), columns = from.size(1);
  Tensor out = torch::stable::new_empty(from, {columns, rows}, std::make_optional(type));
  peftkit::with_format(from.scalar_type(), "lora_linear", [&](auto source) {
    peftkit::with_format(type, "lora_linear", [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      const auto* own = static_cast<const typename From::Bits*>(from.const_data_ptr());
      auto* to = static_cast<typename To::Bits*>(out.mutable_data_ptr());
      const float factor = static_cast<float>(by);
      torch::stable::parallel_for(0, columns, std::max<int64_t>(1, kGrain / (rows + 1)), [&](int64_t begin, int64_t end) {
        constexpr int64_t kBlock = 64;
        float block[kBlock];
        for (int64_t first = begin; first < end; first += kBlock) {
          const int64_t count = std::min(kBlock, end - first);
          for (int64_t row = 0; row < rows; ++row) {
            widen<From>(own + row * columns + first, block, count);
            for (int64_t i = 0; i < count; ++i) to[(first + i) * rows + row] = To::store(block[i] * factor);
          }
        }
      });
    });
  });
  return out;
}

// A gradient in float as a tensor like its factor; `turn`: it is (columns, rows).
Tensor stored(std::vector<float>& values, const Tensor& like, bool turn) {
  const int64_t rows = turn ? like.size(1) : like.size(0), columns = turn ? like.size(0) : like.size(1);
  const Tensor from = peftkit::wide::viewed(values.data(), rows, columns, columns, like);
  return turn ? finished(from, like.scalar_type(), 1.0, true) : scaled(from, like.scalar_type(), 1.0, true);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void add_product(Tensor& to, const Tensor& onto, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), onto.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// As in reference.py.
bool merges(int64_t rows, const Tensor& weight, int64_t rank, ScalarType type) {
  const int64_t out = weight.size(0), width = weight.size(1);
  return type == ScalarType::Float && out * width * (rank + 2) < rows * rank * (out + width);
}

Tensor merged(const Tensor& weight, const Tensor& up, const Tensor& down) {
  Tensor sum = torch::stable::empty_like(weight);
  add_product(sum, weight, up, down);
  return sum;
}

void check(const Tensor& x, const Tensor& weight, const Tensor& down, const Tensor& up) {
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && down.is_contiguous() && up.is_contiguous(),
                  "lora_linear: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && down.dim() == 2 && up.dim() == 2 &&
                      x.size(1) == weight.size(1) && down.size(1) == weight.size(1) && up.size(0) == weight.size(0) &&
                      up.size(1) == down.size(0) && x.scalar_type() == weight.scalar_type() &&
                      up.scalar_type() == down.scalar_type(),
                  "lora_linear: expected x (rows, in), weight (out, in), down (r, in) and up (out, r)");
}

typedef float Lanes __attribute__((vector_size(64)));

PEFTKIT_CLONES float dot(const float* a, const float* b, int64_t count) {
  Lanes first{}, second{};
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    Lanes x0, x1, y0, y1;
    std::memcpy(&x0, a + j, sizeof x0);
    std::memcpy(&x1, a + j + 16, sizeof x1);
    std::memcpy(&y0, b + j, sizeof y0);
    std::memcpy(&y1, b + j + 16, sizeof y1);
    first += x0 * y0;
    second += x1 * y1;
  }
  first += second;
  float total = 0;
  for (; j < count; ++j) total += a[j] * b[j];
  for (int lane = 0; lane < 16; ++lane) total += first[lane];
  return total;
}

// out[i] += sum_k up[i][k] * inner[k] for `count` outputs.
template <class Format>
PEFTKIT_CLONES void add_outputs(typename Format::Bits* out, const float* up, const float* inner, int64_t count,
                                int64_t rank) {
  for (int64_t i = 0; i < count; ++i) {
    float sums[8] = {};
    const float* own = up + i * rank;
    int64_t k = 0;
    for (; k + 8 <= rank; k += 8) {
      for (int lane = 0; lane < 8; ++lane) sums[lane] += own[k + lane] * inner[k + lane];
    }
    float total = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    for (; k < rank; ++k) total += own[k] * inner[k];
    out[i] = Format::store(Format::load(out[i]) + total);
  }
}

// gain * x @ downᵀ in float, (rows, rank).
template <class Factor>
std::vector<float> inner_of(const Tensor& x, const Tensor& down, float gain) {
  const int64_t rows = x.size(0), width = x.size(1), rank = down.size(0);
  const auto* a = static_cast<const typename Factor::Bits*>(down.const_data_ptr());
  const std::vector<float> wide = peftkit::floats(x);
  std::vector<float> inner(rows * rank);
  const int64_t grain = std::max<int64_t>(1, 4 * kGrain / (rows * width + 1));
  torch::stable::parallel_for(0, rank, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> own(width);
    for (int64_t k = begin; k < end; ++k) {
      widen<Factor>(a + k * width, own.data(), width);
      for (int64_t row = 0; row < rows; ++row) {
        inner[row * rank + k] = gain * dot(wide.data() + row * width, own.data(), width);
      }
    }
  });
  return inner;
}

// out += gain * (x @ downᵀ) @ upᵀ for a few rows, the inner product in float.
template <class Format, class Factor>
void add_few(const Tensor& x, const Tensor& down, const Tensor& up, float gain, Tensor& out) {
  const int64_t rows = x.size(0), rank = down.size(0), outputs = up.size(0);
  const auto* b = static_cast<const typename Factor::Bits*>(up.const_data_ptr());
  auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
  const std::vector<float> inner = inner_of<Factor>(x, down, gain);
  torch::stable::parallel_for(0, outputs, std::max<int64_t>(1, 4 * kGrain / (rank + 1)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 64;
    std::vector<float> own(kBlock * rank);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      widen<Factor>(b + first * rank, own.data(), count * rank);
      for (int64_t row = 0; row < rows; ++row) {
        add_outputs<Format>(to + row * outputs + first, own.data(), inner.data() + row * rank, count, rank);
      }
    }
  });
}

// x @ downᵀ in float, (rows, rank), of a few rows.
std::vector<float> inner_of(const peftkit::wide::Matrix& x, const std::vector<float>& down, int64_t rank) {
  const int64_t rows = x.rows, width = x.columns;
  std::vector<float> own(rows * width), inner(rows * rank);
  x.read(0, 0, rows * width, own.data());
  const int64_t grain = std::max<int64_t>(1, 4 * kGrain / (rows * width + 1));
  torch::stable::parallel_for(0, rank, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t row = 0; row < rows; ++row) {
        inner[row * rank + k] = dot(own.data() + row * width, down.data() + k * width, width);
      }
    }
  });
  return inner;
}

#ifdef PEFTKIT_AVX512BF16
// Whether layer and update are computed here, the layer in bfloat16 and all sums in float.
bool in_halves(const Tensor& x) {
  return peftkit::cpu().avx512bf16 && x.scalar_type() == ScalarType::BFloat16 && x.size(0) > 0 &&
         x.size(0) <= kFewHalves && x.size(1) > 0 && x.size(1) % peftkit::rows::kVector == 0;
}

// x @ weightᵀ + bias + gain * (own @ downᵀ) @ upᵀ, rounded once.
Tensor few_halves(const Tensor& x, const Tensor& own, const Tensor& weight, const std::optional<Tensor>& bias,
                  const Tensor& down, const Tensor& up, float gain) {
  const int64_t rows = x.size(0), rank = down.size(0), outputs = weight.size(0);
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs && bias->scalar_type() == x.scalar_type()),
                  "lora_linear: expected a contiguous bias (out,) of the dtype of x");
  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  if (outputs == 0) return out;
  const auto* onto = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  peftkit::with_format(down.scalar_type(), "lora_linear", [&](auto factor) {
    using Factor = decltype(factor);
    const auto* b = static_cast<const typename Factor::Bits*>(up.const_data_ptr());
    const std::vector<float> inner = rank ? inner_of<Factor>(own, down, gain) : std::vector<float>{};
    const auto start = [&](int64_t first, int64_t count, float* sums) {
      if (onto) {
        widen<peftkit::Bfloat16>(onto + first, sums, count);
        for (int64_t row = 1; row < rows; ++row) std::copy_n(sums, count, sums + row * peftkit::rows::kOut);
      }
      if (rank == 0) return;
      float* part = peftkit::scratch<float, 4>(static_cast<size_t>(count * rank));
      widen<Factor>(b + first * rank, part, count * rank);
      peftkit::add_update(inner.data(), rows, rank, part, count, sums);
    };
    peftkit::rows::linear_dense(static_cast<const uint16_t*>(x.const_data_ptr()), rows,
                                {static_cast<const uint16_t*>(weight.const_data_ptr()), outputs, x.size(1)},
                                static_cast<uint16_t*>(out.mutable_data_ptr()), start);
  });
  return out;
}
#endif

namespace wide = peftkit::wide;

// A matrix as it lies in memory, and the low-rank factors in float; `up` times the gain.
struct Operands {
  wide::Matrix weight;
  int64_t rank;
  std::vector<float> down, up;

  Operands(const Tensor& own, const Tensor& own_down, const Tensor& own_up, double gain)
      : weight(own), rank(own_down.size(0)), down(peftkit::floats(own_down)), up(peftkit::floats(own_up)) {
    for (float& value : up) value *= static_cast<float>(gain);
  }
};

// x @ weightᵀ + bias + (own @ downᵀ) @ (gain * up)ᵀ in float32, rounded once.
Tensor forward_wide(const Tensor& x, const Tensor& own, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Tensor& down, const Tensor& up, double gain) {
  const int64_t rows = x.size(0), width = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs),
                  "lora_linear: expected a contiguous bias (out,)");
  Tensor out = torch::stable::new_empty(x, {rows, outputs});
  if (out.numel() == 0) return out;
  Operands operands(weight, down, up, gain);
  const int64_t rank = operands.rank, depth = width + rank;
  const std::vector<float> shift = bias ? peftkit::floats(*bias) : std::vector<float>{};
  const wide::Matrix from(x), given(own);
  peftkit::with_format(x.scalar_type(), "lora_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
#ifdef PEFTKIT_WIDE
    if (rows <= wide::kFew) {
      const std::vector<float> floats = peftkit::floats(x), inner = inner_of(given, operands.down, rank);
      const auto piece = [&](int64_t row, int64_t column, int64_t count, float* at) {
        operands.weight.read(row, column, count, at);
      };
      const auto start = [&](int64_t first, int64_t count, float* sums) {
        for (int64_t row = 0; bias && row < rows; ++row) std::copy_n(&shift[first], count, sums + row * wide::kOut);
        if (rank) peftkit::add_update(inner.data(), rows, rank, &operands.up[first * rank], count, sums);
      };
      const auto finish = [&](int64_t first, int64_t count, const float* sums) {
        for (int64_t row = 0; row < rows; ++row) {
          wide::narrow<Format>(sums + row * wide::kOut, to + row * outputs + first, count);
        }
      };
      wide::few(floats.data(), rows, outputs, width, wide::kPart, piece, start, finish);
      return;
    }
#endif
    const bool same = own.const_data_ptr() == x.const_data_ptr();
    const auto left = [&](int64_t first, int64_t count, float* at) {
      Tensor inner = wide::viewed(at + width, count, rank, depth, x);
      const Tensor read = wide::viewed(at, count, width, depth, x);
      const Tensor turned_down = turned(wide::viewed(operands.down.data(), rank, width, width, x));
      if (rank && !same) {
        given.read_rows(first, count, at, depth);
        wide::multiply(inner, read, turned_down);
      }
      from.read_rows(first, count, at, depth);
      if (rank && same) wide::multiply(inner, read, turned_down);
    };
    const auto right = [&](int64_t first, int64_t count, float* at) {
      wide::for_rows(count, width, [&](int64_t r) {
        operands.weight.read(first + r, 0, width, at + r * depth);
        std::copy_n(operands.up.data() + (first + r) * rank, rank, at + r * depth + width);
      });
    };
    const wide::Sizes sizes{rows, outputs, depth};
    wide::many(x, sizes, left, right, [&](int64_t row, int64_t taken, int64_t first, int64_t count, float* sums) {
      wide::for_rows(taken, count, [&](int64_t i) {
        float* line = sums + i * count;
        for (int64_t r = 0; bias && r < count; ++r) line[r] += shift[first + r];
        wide::narrow<Format>(line, to + (row + i) * outputs + first, count);
      });
    });
  });
  return out;
}

// As `backward`, in float32; what is needed is not empty.
void backward_wide(const Tensor& grad, const Tensor& own, const Tensor& weight, const Tensor& down, const Tensor& up,
                   const Chance& chance, Tensor* grad_x, std::vector<float>* grad_down, std::vector<float>* grad_up) {
  const int64_t rows = grad.size(0), width = weight.size(1), outputs = weight.size(0);
  Operands operands(weight, down, up, chance.gain);
  const int64_t rank = operands.rank;
  // What is dropped is dropped from the update's part before it is added.
  const int64_t inside = chance.drops() ? 0 : rank, depth = outputs + inside;
  const wide::Matrix from(grad), given(own);
  const Tensor of_down = wide::viewed(operands.down.data(), rank, width, width, grad);
  const Tensor of_up = wide::viewed(operands.up.data(), outputs, rank, rank, grad);
  std::vector<float> apart;  // grad (gain U), where it does not stand beside grad, and times D
  std::vector<float> low;
  const auto left = [&](int64_t first, int64_t count, float* at) {
    from.read_rows(first, count, at, depth);
    if (rank == 0) return;
    const Tensor read = wide::viewed(at, count, outputs, depth, grad);
    if (inside == 0) apart.resize(static_cast<size_t>(count * rank));
    Tensor back = inside ? wide::viewed(at + outputs, count, rank, depth, grad)
                         : wide::viewed(apart.data(), count, rank, rank, grad);
    wide::multiply(back, read, of_up);
    if (grad_x && inside == 0) {
      low.resize(static_cast<size_t>(count * width));
      Tensor to = wide::viewed(low.data(), count, width, width, grad);
      wide::multiply(to, back, of_down);
      drop_rows(low.data(), first, count, width, chance);
    }
    if (!grad_down && !grad_up) return;
    float* x = peftkit::scratch<float, 30>(static_cast<size_t>(count * width));
    given.read_rows(first, count, x, width);
    const Tensor seen = wide::viewed(x, count, width, width, grad);
    if (grad_down) {
      Tensor to = wide::viewed(grad_down->data(), rank, width, width, grad);
      wide::multiply(to, turned(back), seen, 1.0);
    }
    if (grad_up) {
      float* held = peftkit::scratch<float, 31>(static_cast<size_t>(count * rank));
      Tensor inner = wide::viewed(held, count, rank, rank, grad);
      wide::multiply(inner, seen, turned(of_down));
      Tensor to = wide::viewed(grad_up->data(), rank, outputs, outputs, grad);
      wide::multiply(to, turned(inner), read, 1.0, chance.gain);
    }
  };
  const auto right = [&](int64_t first, int64_t count, float* at) {
    wide::for_rows(depth, count, [&](int64_t r) {
      if (r < outputs) {
        operands.weight.read(r, first, count, at + r * count);
      } else {
        std::copy_n(operands.down.data() + (r - outputs) * width + first, count, at + r * count);
      }
    });
  };
  const wide::Sizes sizes{rows, grad_x ? width : 0, depth, 32, true};
  peftkit::with_format(grad.scalar_type(), "lora_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = grad_x ? static_cast<typename Format::Bits*>(grad_x->mutable_data_ptr()) : nullptr;
    wide::many(grad, sizes, left, right, [&](int64_t row, int64_t taken, int64_t first, int64_t count, float* sums) {
      wide::for_rows(taken, count, [&](int64_t i) {
        float* line = sums + i * count;
        const float* besides = low.data() + i * width + first;
        for (int64_t r = 0; !low.empty() && r < count; ++r) line[r] += besides[r];
        wide::narrow<Format>(line, to + (row + i) * width + first, count);
      });
    });
  });
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor down, Tensor up, double scale,
               double probability, Seed seed) {
  check(x, weight, down, up);
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), rank = down.size(0);
  const Chance chance(scale, probability, seed);
  if (!chance.drops() && merges(rows, weight, rank, type)) {
    return linear(x, merged(weight, scaled(up, type, chance.gain), scaled(down, type, 1.0)), bias);
  }
#ifdef PEFTKIT_AVX512BF16
  if (in_halves(x)) {
    const Tensor own = chance.drops() ? dropped_of(x, chance) : x;
    return few_halves(x, own, weight, bias, down, up, static_cast<float>(chance.gain));
  }
#endif
  if (wide::pays(type) && rows > kStreamed) {
    return forward_wide(x, chance.drops() ? dropped_of(x, chance) : x, weight, bias, down, up, chance.gain);
  }
  Tensor out = linear(x, weight, bias);
  if (rows == 0 || rank == 0 || out.numel() == 0) return out;
  const Tensor own = chance.drops() ? dropped_of(x, chance) : x;
  if (rows <= kFew) {
    peftkit::with_format(type, "lora_linear", [&](auto format) {
      peftkit::with_format(down.scalar_type(), "lora_linear", [&](auto factor) {
        add_few<decltype(format), decltype(factor)>(own, down, up, static_cast<float>(chance.gain), out);
      });
    });
    return out;
  }
  const Tensor inner = linear(own, scaled(down, type, 1.0), std::nullopt);
  add_product(out, out, inner, turned(scaled(up, type, chance.gain)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor down, Tensor up, double scale,
                                            double probability, Seed seed, bool need_x, bool need_down, bool need_up) {
  check(x, weight, down, up);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.dim() == 2 && grad.size(0) == x.size(0) &&
                      grad.size(1) == weight.size(0) && grad.scalar_type() == x.scalar_type(),
                  "lora_linear: expected a gradient (rows, out) of the dtype of x");
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), rank = down.size(0);
  const Chance chance(scale, probability, seed);
  const auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  if (wide::pays(type)) {
    const Tensor own = chance.drops() && (need_down || need_up) ? dropped_of(x, chance) : x;
    Tensor grad_x = torch::stable::new_empty(x, {need_x ? rows : 0, x.size(1)});
    std::vector<float> grad_down(need_down ? down.numel() : 0), grad_up(need_up ? up.numel() : 0);
    backward_wide(grad, own, weight, down, up, chance, need_x ? &grad_x : nullptr, need_down ? &grad_down : nullptr,
                  need_up ? &grad_up : nullptr);
    return {need_x ? grad_x : none(x), need_down ? stored(grad_down, down, false) : none(down),
            need_up ? stored(grad_up, up, true) : none(up)};
  }
  const bool dense = !chance.drops() && merges(rows, weight, rank, type);
  const Tensor cast_down = scaled(down, type, 1.0), cast_up = scaled(up, type, chance.gain);
  Tensor grad_x = none(x), grad_down = none(down), grad_up = none(up);
  std::optional<Tensor> back, own;
  if (need_down || (need_x && !dense)) back = product(grad, cast_up);
  if (need_down || need_up) own = chance.drops() ? dropped_of(x, chance) : x;
  if (need_x && dense) {
    grad_x = product(grad, merged(weight, cast_up, cast_down));
  } else if (need_x) {
    grad_x = product(grad, weight);
    if (chance.drops()) {
      const Tensor low = dropped_of(product(*back, cast_down), chance);
      peftkit::with_format(type, "lora_linear", [&](auto format) {
        using Format = decltype(format);
        const auto* from = static_cast<const typename Format::Bits*>(low.const_data_ptr());
        auto* to = static_cast<typename Format::Bits*>(grad_x.mutable_data_ptr());
        torch::stable::parallel_for(0, grad_x.numel(), kGrain, [&](int64_t begin, int64_t end) {
          add<Format>(to + begin, from + begin, end - begin);
        });
      });
    } else if (rank > 0) {
      add_product(grad_x, grad_x, *back, cast_down);
    }
  }
  if (need_down) grad_down = finished(product(turned(*back), *own), down.scalar_type(), 1.0, false);
  if (need_up) {
    const Tensor inner = linear(*own, cast_down, std::nullopt);
    grad_up = finished(product(turned(inner), grad), up.scalar_type(), chance.gain, true);
  }
  return {grad_x, grad_down, grad_up};
}

Tensor dropped(Tensor x, double probability, Seed seed) {
  STD_TORCH_CHECK(x.is_contiguous(), "lora_dropped: compiled code takes contiguous tensors");
  return dropped_of(x, Chance(1.0, probability, seed));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("lora_forward", TORCH_BOX(&forward));
  library.impl("lora_backward", TORCH_BOX(&backward));
  library.impl("lora_dropped", TORCH_BOX(&dropped));
}
