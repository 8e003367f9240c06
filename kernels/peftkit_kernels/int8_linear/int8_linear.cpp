// A linear layer with an 8-bit weight; see reference.py for the definition.
//
// For a few rows the integer products are made here, straight from the weight as it is stored; for many they go to the
// library that torch uses. Quantizing, and scaling, shifting and rounding the sums, are one pass each.

#include "peftkit_cpu.h"
#include "peftkit_wide.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PEFTKIT_VNNI 1
#endif

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kFew = 4;
constexpr int64_t kGrain = 1 << 15;
constexpr int64_t kPanel = 1024;  // outputs, or inputs in the backward pass, dequantized at a time
constexpr float kLargest = 127.0f;

using peftkit::widen;
namespace wide = peftkit::wide;

// The largest magnitude of finite numbers; as integers, whose order is that of the magnitudes.
PEFTKIT_CLONES float largest_of(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return std::bit_cast<float>(largest);
}

PEFTKIT_CLONES void encode(const float* values, uint8_t* codes, float inverse, int32_t shift, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float code = __builtin_rintf(values[i] * inverse);
    code = code > kLargest ? kLargest : code;
    code = code < -kLargest ? -kLargest : code;
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code) + shift);
  }
}

// Codes of rows, plus `shift`, and their scales.
void quantize(const Tensor& x, uint8_t* codes, float* scales, int32_t shift) {
  const int64_t rows = x.size(0), width = x.size(1);
  peftkit::with_format(x.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::Bits*>(x.const_data_ptr());
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (width + 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> own(width);
      for (int64_t row = begin; row < end; ++row) {
        widen<Format>(from + row * width, own.data(), width);
        const float largest = largest_of(own.data(), width);
        const float inverse = largest > 0.0f ? std::min(kLargest / largest, std::numeric_limits<float>::max()) : 0.0f;
        encode(own.data(), codes + row * width, inverse, shift, width);
        scales[row] = largest / kLargest;
      }
    });
  });
}

using Products = void (*)(const uint8_t* codes, const int8_t* weight, int32_t* sums, int64_t rows, int64_t width,
                          int64_t outputs, int64_t stride);

PEFTKIT_CLONES int32_t dot(const int8_t* a, const int8_t* b, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<int32_t>(a[i]) * static_cast<int32_t>(b[i]);
  return sum;
}

// Signed codes.
void products_plain(const uint8_t* codes, const int8_t* weight, int32_t* sums, int64_t rows, int64_t width,
                    int64_t outputs, int64_t stride) {
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t row = 0; row < rows; ++row) {
      sums[row * stride + output] =
          dot(reinterpret_cast<const int8_t*>(codes) + row * width, weight + output * width, width);
    }
  }
}

#ifdef PEFTKIT_VNNI
// Codes plus 128; what that adds, 128 times the sum of the weight's row, is taken off in the end.
template <int Rows, int Outputs>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void tile(const uint8_t* codes, const int8_t* weight,
                                                                          int32_t* sums, int64_t width,
                                                                          int64_t stride) {
  __m512i total[Rows][Outputs], own[Outputs];
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 4
  for (int output = 0; output < Outputs; ++output) {
    own[output] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) total[row][output] = _mm512_setzero_si512();
  }
  for (int64_t j = 0; j < width; j += 64) {
    const int64_t left = width - j;
    const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
    __m512i x[Rows];
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) x[row] = _mm512_maskz_loadu_epi8(mask, codes + row * width + j);
#pragma GCC unroll 4
    for (int output = 0; output < Outputs; ++output) {
      const __m512i w = _mm512_maskz_loadu_epi8(mask, weight + output * width + j);
      own[output] = _mm512_dpbusd_epi32(own[output], ones, w);
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) total[row][output] = _mm512_dpbusd_epi32(total[row][output], x[row], w);
    }
  }
#pragma GCC unroll 4
  for (int output = 0; output < Outputs; ++output) {
    const int32_t excess = 128 * _mm512_reduce_add_epi32(own[output]);
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
      sums[row * stride + output] = _mm512_reduce_add_epi32(total[row][output]) - excess;
    }
  }
}

template <int Rows>
void products_of(const uint8_t* codes, const int8_t* weight, int32_t* sums, int64_t width, int64_t outputs,
                 int64_t stride) {
  int64_t output = 0;
  for (; output + 4 <= outputs; output += 4) tile<Rows, 4>(codes, weight + output * width, sums + output, width, stride);
  for (; output < outputs; ++output) tile<Rows, 1>(codes, weight + output * width, sums + output, width, stride);
}

void products_vnni(const uint8_t* codes, const int8_t* weight, int32_t* sums, int64_t rows, int64_t width,
                   int64_t outputs, int64_t stride) {
  switch (rows) {
    case 1:
      return products_of<1>(codes, weight, sums, width, outputs, stride);
    case 2:
      return products_of<2>(codes, weight, sums, width, outputs, stride);
    case 3:
      return products_of<3>(codes, weight, sums, width, outputs, stride);
    default:
      return products_of<4>(codes, weight, sums, width, outputs, stride);
  }
}

bool has_vnni() { return peftkit::cpu().avx512vnni; }
#else
bool has_vnni() { return false; }
#endif

#ifdef PEFTKIT_WIDE

// Products of many rows in 16 bits, whose pairs are added in 32, where no instruction multiplies bytes. Tiles of the
// weight are widened and multiplied with a block of rows, of which a part stays in the nearer caches.
#ifndef PEFTKIT_SMALL_PARTS
constexpr int64_t kBlock = 48;     // rows
constexpr int64_t kPart = 1024;    // columns
#else
constexpr int64_t kBlock = 8;
constexpr int64_t kPart = 32;
#endif
constexpr int64_t kOutputs = 4;    // of a tile
constexpr int64_t kGroup = 32;     // outputs whose sums are kept together
constexpr int64_t kTogether = 2;   // rows that are multiplied together
constexpr int64_t kLanes = 16;     // numbers of a vector

PEFTKIT_CLONES void widen_codes(const int8_t* from, int16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// sums[m * kGroup + r] += x_m . w_r of `width` numbers, a multiple of kLanes, in rows of kPart.
template <int kRows>
PEFTKIT_WIDE void block16(const int16_t* x, const int16_t* w, int64_t width, int32_t* sums) {
  __m256i total[kRows][kOutputs];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < kOutputs; ++r) total[m][r] = _mm256_setzero_si256();
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    __m256i own[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) own[m] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * kPart + j));
#pragma GCC unroll 4
    for (int r = 0; r < kOutputs; ++r) {
      const __m256i piece = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + r * kPart + j));
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        total[m][r] = _mm256_add_epi32(total[m][r], _mm256_madd_epi16(own[m], piece));
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
    const __m256i a = _mm256_hadd_epi32(total[m][0], total[m][1]), b = _mm256_hadd_epi32(total[m][2], total[m][3]);
    const __m256i c = _mm256_hadd_epi32(a, b);
    auto* to = reinterpret_cast<__m128i*>(sums + m * kGroup);
    const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
    _mm_storeu_si128(to, _mm_add_epi32(_mm_loadu_si128(to), all));
  }
}

// sums (rows, outputs) of signed codes.
void products_wide(const int8_t* codes, const int8_t* weight, int32_t* sums, int64_t rows, int64_t width,
                   int64_t outputs) {
  // Rows lie part by part: rows of whole pages would share the same few places of a cache.
  const int64_t groups = (outputs + kGroup - 1) / kGroup, parts = (width + kPart - 1) / kPart;
  int16_t* x = peftkit::scratch<int16_t, 40>(static_cast<size_t>(std::min(rows, kBlock) * parts * kPart));
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t taken = std::min(kBlock, rows - row);
    wide::for_rows(taken, width, [&](int64_t m) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t column = part * kPart, count = std::min(kPart, width - column);
        int16_t* to = x + (part * taken + m) * kPart;
        widen_codes(codes + (row + m) * width + column, to, count);
        std::fill(to + count, to + kPart, int16_t{0});
      }
    });
    const int64_t grain = std::max<int64_t>(1, kGrain / (kGroup * width + 1));
    torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      int16_t* tile = peftkit::scratch<int16_t, 41>(static_cast<size_t>(kOutputs * kPart));
      int32_t held[kBlock * kGroup];
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * kGroup, count = std::min(kGroup, outputs - first);
        std::fill_n(held, taken * kGroup, 0);
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t column = part * kPart, numbers = std::min(kPart, width - column);
          const int64_t padded = (numbers + kLanes - 1) / kLanes * kLanes;
          for (int64_t r = 0; r < count; r += kOutputs) {
            for (int64_t i = 0; i < kOutputs; ++i) {
              int16_t* to = tile + i * kPart;
              widen_codes(weight + std::min(first + r + i, outputs - 1) * width + column, to, numbers);
              std::fill(to + numbers, to + padded, int16_t{0});
            }
            for (int64_t m = 0; m < taken; m += kTogether) {
              const int16_t* own = x + (part * taken + m) * kPart;
              int32_t* to = held + m * kGroup + r;
              if (taken - m == 1) {
                block16<1>(own, tile, padded, to);
              } else {
                block16<kTogether>(own, tile, padded, to);
              }
            }
          }
        }
        for (int64_t m = 0; m < taken; ++m) {
          std::copy_n(held + m * kGroup, count, sums + (row + m) * outputs + first);
        }
      }
    });
  }
}

bool multiplies_wide() { return peftkit::cpu().avx2 && !peftkit::cpu().avx512; }

#endif

// sums * (row_scale * weight_scale) + bias for one row, rounded once.
template <class Format, class Sum>
PEFTKIT_CLONES void finish_row(const Sum* sums, float row_scale, const float* weight_scale, const float* bias,
                               typename Format::Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = Format::store(static_cast<float>(sums[i]) * (row_scale * weight_scale[i]) + bias[i]);
  }
}

std::vector<float> shifts(const std::optional<Tensor>& bias, int64_t count) {
  std::vector<float> out(count, 0.0f);
  if (bias.has_value()) {
    peftkit::with_format(bias->scalar_type(), "int8_linear", [&](auto format) {
      using Format = decltype(format);
      widen<Format>(static_cast<const typename Format::Bits*>(bias->const_data_ptr()), out.data(), count);
    });
  }
  return out;
}

template <class Sum>
void finish_rows(const Sum* sums, int64_t rows, const float* row_scale, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, Tensor& out) {
  const int64_t count = weight_scale.numel();
  const std::vector<float> shift = shifts(bias, count);
  const auto* scale = static_cast<const float*>(weight_scale.const_data_ptr());
  peftkit::with_format(out.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (count + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        finish_row<Format, Sum>(sums + row * count, row_scale[row], scale, shift.data(), to + row * count, count);
      }
    });
  });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor product(const char* name, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor turned(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

template <class From, class To>
PEFTKIT_CLONES void cast(const typename From::Bits* from, typename To::Bits* to, float by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = To::store(From::load(from[i]) * by);
}

Tensor scaled(const Tensor& factor, ScalarType type, double by) {
  if (factor.scalar_type() == type && by == 1.0) return factor;
  Tensor out = torch::stable::new_empty(factor, {factor.size(0), factor.size(1)}, std::make_optional(type));
  peftkit::with_format(factor.scalar_type(), "int8_linear", [&](auto source) {
    peftkit::with_format(type, "int8_linear", [&](auto target) {
      using From = decltype(source);
      using To = decltype(target);
      cast<From, To>(static_cast<const typename From::Bits*>(factor.const_data_ptr()),
                     static_cast<typename To::Bits*>(out.mutable_data_ptr()), static_cast<float>(by), factor.numel());
    });
  });
  return out;
}

// Rows [first, first + count) and columns [left, left + width) of the weight in another dtype.
template <class Format>
PEFTKIT_CLONES void decode(const int8_t* codes, float scale, typename Format::Bits* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = Format::store(static_cast<float>(codes[i]) * scale);
}

void panel_of(const Tensor& weight, const Tensor& weight_scale, int64_t first, int64_t count, int64_t left,
              int64_t width, Tensor& out) {
  const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr());
  const auto* scale = static_cast<const float*>(weight_scale.const_data_ptr());
  const int64_t stride = weight.size(1);
  peftkit::with_format(out.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / (width + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        decode<Format>(codes + (first + row) * stride + left, scale[first + row], to + row * width, width);
      }
    });
  });
}

// `from`, (rows, width), into columns [left, left + width) of `to`.
void place(const Tensor& from, Tensor& to, int64_t left) {
  Tensor part = torch::stable::narrow(to, 1, left, from.size(1));
  torch::stable::copy_(part, from);
}

using Dot = float (*)(const float* a, const int8_t* codes, int64_t count);

PEFTKIT_CLONES float dot_plain(const float* a, const int8_t* codes, int64_t count) {
  float sums[16] = {};
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    for (int lane = 0; lane < 16; ++lane) sums[lane] += a[j + lane] * static_cast<float>(codes[j + lane]);
  }
  float total = 0;
  for (; j < count; ++j) total += a[j] * static_cast<float>(codes[j]);
  for (float sum : sums) total += sum;
  return total;
}

#ifdef PEFTKIT_VNNI
__attribute__((target("avx512f,avx512bw,avx512vl"))) float dot_avx512(const float* a, const int8_t* codes,
                                                                      int64_t count) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t j = 0;
  for (; j + 64 <= count; j += 64) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + j + part * 16));
      const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(own));
      sums[part] = _mm512_fmadd_ps(_mm512_loadu_ps(a + j + part * 16), wide, sums[part]);
    }
  }
  for (; j < count; j += 16) {
    const int64_t left = count - j;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const __m512 wide = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes + j)));
    sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a + j), wide, sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}
#endif

void weight_only_few(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                     const std::optional<Tensor>& bias, Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), count = weight.size(0);
  std::vector<float> own(rows * width), sums(rows * count);
  peftkit::with_format(x.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    widen<Format>(static_cast<const typename Format::Bits*>(x.const_data_ptr()), own.data(), rows * width);
  });
  const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr());
  Dot dot_wide = dot_plain;
#ifdef PEFTKIT_VNNI
  if (has_vnni()) dot_wide = dot_avx512;
#endif
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / (width + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t output = begin; output < end; ++output) {
      for (int64_t row = 0; row < rows; ++row) {
        sums[row * count + output] = dot_wide(own.data() + row * width, codes + output * width, width);
      }
    }
  });
  const std::vector<float> one(rows, 1.0f);
  finish_rows(sums.data(), rows, one.data(), weight_scale, bias, out);
}

// Writes columns [left, left + width) of a row of the weight as float.
void decode_row(const Tensor& weight, const Tensor& weight_scale, int64_t row, int64_t left, int64_t width, float* to) {
  const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr()) + row * weight.size(1) + left;
  const float scale = static_cast<const float*>(weight_scale.const_data_ptr())[row];
  decode<peftkit::Float32>(codes, scale, reinterpret_cast<uint32_t*>(to), width);
}

void weight_only_wide(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), count = weight.size(0);
  const std::vector<float> shift = shifts(bias, count);
  const wide::Matrix from(x);
  peftkit::with_format(x.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
#ifdef PEFTKIT_WIDE
    if (rows <= wide::kFew) {
      const std::vector<float> own = peftkit::floats(x);
      const auto piece = [&](int64_t row, int64_t column, int64_t numbers, float* at) {
        decode_row(weight, weight_scale, row, column, numbers, at);
      };
      const auto start = [&](int64_t first, int64_t outputs, float* sums) {
        for (int64_t row = 0; row < rows; ++row) std::copy_n(&shift[first], outputs, sums + row * wide::kOut);
      };
      const auto finish = [&](int64_t first, int64_t outputs, const float* sums) {
        for (int64_t row = 0; row < rows; ++row) {
          wide::narrow<Format>(sums + row * wide::kOut, to + row * count + first, outputs);
        }
      };
      wide::few(own.data(), rows, count, width, wide::kPart, piece, start, finish);
      return;
    }
#endif
    const auto left = [&](int64_t first, int64_t taken, float* at) {
      from.read_rows(first, taken, at, width);
    };
    const auto right = [&](int64_t first, int64_t outputs, float* at) {
      wide::for_rows(outputs, width, [&](int64_t r) {
        decode_row(weight, weight_scale, first + r, 0, width, at + r * width);
      });
    };
    const auto finish = [&](int64_t row, int64_t taken, int64_t first, int64_t outputs, float* sums) {
      wide::for_rows(taken, outputs, [&](int64_t i) {
        for (int64_t r = 0; r < outputs; ++r) sums[i * outputs + r] += shift[first + r];
        wide::narrow<Format>(sums + i * outputs, to + (row + i) * count + first, outputs);
      });
    };
    wide::many(x, {rows, count, width}, left, right, finish);
  });
}

void check(const Tensor& rows, const Tensor& weight, const Tensor& weight_scale, int64_t width) {
  STD_TORCH_CHECK(rows.is_contiguous() && weight.is_contiguous() && weight_scale.is_contiguous(),
                  "int8_linear: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 2 && rows.size(1) == width &&
                      weight_scale.numel() == weight.size(0) && weight.scalar_type() == ScalarType::Char &&
                      weight_scale.scalar_type() == ScalarType::Float,
                  "int8_linear: expected an int8 weight (out, in), weight_scale (out,) in float32 and rows that fit");
}

Tensor forward(Tensor x, Tensor weight, Tensor weight_scale, std::optional<Tensor> bias, std::optional<Tensor> down,
               std::optional<Tensor> up, double scale, bool dynamic) {
  check(x, weight, weight_scale, weight.size(1));
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), width = x.size(1), count = weight.size(0);
  Tensor out = torch::stable::new_empty(x, {rows, count});
  if (rows == 0 || count == 0) return out;
  if (dynamic) {
    const bool few = rows <= kFew, shifted = few && has_vnni();
    Tensor codes = torch::stable::new_empty(x, {rows, width}, std::make_optional(ScalarType::Char));
    std::vector<float> scales(rows);
    auto* own = static_cast<uint8_t*>(codes.mutable_data_ptr());
    quantize(x, own, scales.data(), shifted ? 128 : 0);
    if (few || width == 0) {
      std::vector<int32_t> sums(rows * count);
      Products products = products_plain;
#ifdef PEFTKIT_VNNI
      if (shifted) products = products_vnni;
#endif
      const auto* from = static_cast<const int8_t*>(weight.const_data_ptr());
      const int64_t groups = (count + 3) / 4;
      torch::stable::parallel_for(0, groups, std::max<int64_t>(1, kGrain / (width + 1)), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * 4, last = std::min(end * 4, count);
        products(own, from + first * width, sums.data() + first, rows, width, last - first, count);
      });
      finish_rows(sums.data(), rows, scales.data(), weight_scale, bias, out);
#ifdef PEFTKIT_WIDE
    } else if (multiplies_wide()) {
      std::vector<int32_t> sums(rows * count);
      products_wide(reinterpret_cast<const int8_t*>(own), static_cast<const int8_t*>(weight.const_data_ptr()),
                    sums.data(), rows, width, count);
      finish_rows(sums.data(), rows, scales.data(), weight_scale, bias, out);
#endif
    } else {
      const Tensor sums = product("aten::_int_mm", codes, turned(weight));
      finish_rows(static_cast<const int32_t*>(sums.const_data_ptr()), rows, scales.data(), weight_scale, bias, out);
    }
  } else if (rows <= kFew) {
    weight_only_few(x, weight, weight_scale, bias, out);
  } else if (wide::pays(type)) {
    weight_only_wide(x, weight, weight_scale, bias, out);
  } else {
    const int64_t most = std::min(kPanel, count);
    Tensor scratch = torch::stable::new_empty(x, {most, width});
    for (int64_t first = 0; first < count; first += most) {
      const int64_t part = std::min(most, count - first);
      Tensor panel = torch::stable::narrow(scratch, 0, 0, part);
      panel_of(weight, weight_scale, first, part, 0, width, panel);
      std::optional<Tensor> shift;
      if (bias.has_value()) shift = torch::stable::narrow(*bias, 0, first, part);
      place(linear(x, panel, shift), out, first);
    }
  }
  if (down.has_value() && up.has_value() && down->size(0) > 0) {
    STD_TORCH_CHECK(down->is_contiguous() && up->is_contiguous() && down->size(1) == width && up->size(0) == count &&
                        up->size(1) == down->size(0),
                    "int8_linear: expected contiguous down (r, in) and up (out, r)");
    if (wide::pays(type)) {
      wide::add_low_rank(out, x, *down, *up, scale);
      return out;
    }
    const Tensor inner = linear(x, scaled(*down, type, 1.0), std::nullopt);
    const Tensor by = turned(scaled(*up, type, scale));
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), inner.get(), by.get(), 1.0, 1.0));
  }
  return out;
}

void backward_wide(const Tensor& grad, const Tensor& weight, const Tensor& weight_scale, Tensor& out) {
  const int64_t rows = grad.size(0), count = weight.size(0), width = weight.size(1);
  const wide::Matrix from(grad);
  peftkit::with_format(grad.scalar_type(), "int8_linear", [&](auto format) {
    using Format = decltype(format);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    const auto left = [&](int64_t first, int64_t taken, float* at) {
      from.read_rows(first, taken, at, count);
    };
    const auto right = [&](int64_t first, int64_t inputs, float* at) {
      wide::for_rows(count, inputs, [&](int64_t r) {
        decode_row(weight, weight_scale, r, first, inputs, at + r * inputs);
      });
    };
    const auto finish = [&](int64_t row, int64_t taken, int64_t first, int64_t inputs, float* sums) {
      wide::for_rows(taken, inputs, [&](int64_t i) {
        wide::narrow<Format>(sums + i * inputs, to + (row + i) * width + first, inputs);
      });
    };
    wide::many(grad, {rows, width, count, 32, true}, left, right, finish);
  });
}

Tensor backward(Tensor grad, Tensor weight, Tensor weight_scale) {
  check(grad, weight, weight_scale, weight.size(0));
  const int64_t count = weight.size(0), width = weight.size(1), most = std::min(kPanel, width);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), width});
  if (grad.size(0) == 0 || width == 0) return out;
  if (wide::pays(grad.scalar_type())) {
    backward_wide(grad, weight, weight_scale, out);
    return out;
  }
  for (int64_t left = 0; left < width; left += most) {
    const int64_t part = std::min(most, width - left);
    Tensor panel = torch::stable::new_empty(grad, {count, part});
    panel_of(weight, weight_scale, 0, count, left, part, panel);
    place(product("aten::mm", grad, panel), out, left);
  }
  return out;
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, bool shifted) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "int8_quantize_rows: expected a contiguous matrix");
  const ScalarType type = shifted ? ScalarType::Byte : ScalarType::Char;
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1)}, std::make_optional(type));
  Tensor scales = torch::stable::new_empty(x, {x.size(0)}, std::make_optional(ScalarType::Float));
  quantize(x, static_cast<uint8_t*>(codes.mutable_data_ptr()), static_cast<float*>(scales.mutable_data_ptr()),
           shifted ? 128 : 0);
  return {codes, scales};
}

Tensor finish(Tensor sums, Tensor row_scale, Tensor weight_scale, std::optional<Tensor> bias, Tensor like) {
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && row_scale.is_contiguous() && weight_scale.is_contiguous() &&
                      row_scale.numel() == sums.size(0) && weight_scale.numel() == sums.size(1) &&
                      row_scale.scalar_type() == ScalarType::Float && weight_scale.scalar_type() == ScalarType::Float,
                  "int8_finish: expected sums (rows, out) and float32 scales (rows,) and (out,)");
  Tensor out = torch::stable::new_empty(like, {sums.size(0), sums.size(1)});
  const auto* scale = static_cast<const float*>(row_scale.const_data_ptr());
  if (sums.scalar_type() == ScalarType::Int) {
    finish_rows(static_cast<const int32_t*>(sums.const_data_ptr()), sums.size(0), scale, weight_scale, bias, out);
  } else {
    STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float, "int8_finish: expected int32 or float32 sums");
    finish_rows(static_cast<const float*>(sums.const_data_ptr()), sums.size(0), scale, weight_scale, bias, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("int8_forward", TORCH_BOX(&forward));
  library.impl("int8_backward", TORCH_BOX(&backward));
  library.impl("int8_quantize_rows", TORCH_BOX(&quantize_rows));
  library.impl("int8_finish", TORCH_BOX(&finish));
}
