// A linear layer whose weight is in NF4, with a low-rank update; see reference.py for the definition.
//
// Few rows: codes are looked up in registers and multiplied where they are, and the low-rank part is added to the same
// sums. Many rows: panels of the weight are dequantized into a scratch that stays in cache and go to the library's
// product; the low-rank update and the bias are further columns of the factors of that product, so that the result is
// rounded once.

#include "peftkit_bfloat16.h"
#include "peftkit_cpu.h"
#include "peftkit_wide.h"

#include <algorithm>
#include <optional>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PEFTKIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define PEFTKIT_AVX2 __attribute__((target("avx2")))
#endif

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr int64_t kFew = 16;                   // rows up to which weights are multiplied where they are looked up
constexpr int64_t kVeryFew = 3;                // the same where tiles of them are multiplied in bfloat16,
constexpr int64_t kSome = 128;                 // which happens up to so many rows
constexpr int64_t kGroup = 8;                  // rows of x that share a lookup
constexpr int64_t kPanelBytes = 4 << 20;       // of dequantized weights
constexpr int64_t kAhead = 4096;               // bytes of codes that are asked for before they are read
constexpr int64_t kRowBytes = 32 << 10;        // of a part of x that stays in the nearest cache
constexpr int64_t kGrain = 1 << 16;            // weights that are worth a thread

constexpr float kValues[16] = {-1.0f,
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

struct Weight {
  const uint8_t* codes;
  const float* sizes;
  int64_t rows, columns, block;

  // Whether rows start with a block.
  bool aligned() const { return columns % block == 0; }
};

using peftkit::scratch;

// Dequantizing ----------------------------------------------------------------------------------------------------------

template <class Format>
void dequantize_any(const Weight& weight, int64_t first, int64_t count, typename Format::Bits* out) {
  typename Format::Bits scaled[16] = {};
  int64_t end = first;  // of the block whose values are in `scaled`
  for (int64_t i = first; i < first + count; ++i) {
    if (i >= end) {
      const float size = weight.sizes[i / weight.block];
      for (int k = 0; k < 16; ++k) scaled[k] = Format::store(kValues[k] * size);
      end = (i / weight.block + 1) * weight.block;
    }
    *out++ = scaled[i % 2 ? weight.codes[i / 2] & 15 : weight.codes[i / 2] >> 4];
  }
}

#ifdef PEFTKIT_AVX512

// To nearest, ties to even, in the upper half of each lane.
PEFTKIT_AVX512 inline __m512i round_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_and_si512(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)),
                          _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

PEFTKIT_AVX512 inline __m512i load_codes(const uint8_t* codes) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// From the start of a block on, a multiple of 32.
template <class Format>
PEFTKIT_AVX512 void dequantize512(const Weight& weight, int64_t first, int64_t count, typename Format::Bits* out) {
  const __m512 values = _mm512_loadu_ps(kValues);
  const __m512i left = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(8));
  const float* size = weight.sizes + first / weight.block;
  const uint8_t* codes = weight.codes + first / 2;
  for (int64_t i = 0; i < count; ++size) {
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(*size));
    __m512i even{}, odd{};
    if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
      odd = round_bfloat16(scaled);
      even = _mm512_srli_epi32(odd, 16);
    } else if constexpr (std::is_same_v<Format, peftkit::Float16>) {
      even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      odd = _mm512_slli_epi32(even, 16);
    }
    const int64_t end = std::min(i + weight.block, count);
    for (; i < end; i += 32) {
      const __m512i low = load_codes(codes + i / 2), high = _mm512_srli_epi32(low, 4);
      if constexpr (sizeof(typename Format::Bits) == 2) {
        // A lookup reads the lowest four bits only.
        const __m512i both = _mm512_or_si512(_mm512_permutexvar_epi32(high, even), _mm512_permutexvar_epi32(low, odd));
        _mm512_storeu_si512(out + i, both);
      } else {
        const __m512 a = _mm512_permutexvar_ps(high, scaled), b = _mm512_permutexvar_ps(low, scaled);
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(a, left, b));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(a, right, b));
      }
    }
  }
}

#endif

#ifdef PEFTKIT_AVX512

// Entries of a table of 16 that the lowest four bits of each lane name; a lookup itself reads three of them.
PEFTKIT_AVX2 inline __m256i look_up(__m256i low, __m256i high, __m256i at) {
  const __m256i a = _mm256_permutevar8x32_epi32(low, at), b = _mm256_permutevar8x32_epi32(high, at);
  const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), fourth));
}

// From the start of a block on, a multiple of 32.
template <class Format>
PEFTKIT_AVX2 void dequantize256(const Weight& weight, int64_t first, int64_t count, typename Format::Bits* out) {
  using Bits = typename Format::Bits;
  const float* size = weight.sizes + first / weight.block;
  const uint8_t* codes = weight.codes + first / 2;
  for (int64_t i = 0; i < count; ++size) {
    alignas(32) uint32_t table[16];
    for (int k = 0; k < 16; ++k) table[k] = Format::store(kValues[k] * *size);
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + 8));
    const int64_t end = std::min(i + weight.block, count);
    for (; i < end; i += 16) {
      const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
      const __m256i even = look_up(low, high, _mm256_srli_epi32(both, 4)), odd = look_up(low, high, both);
      auto* to = reinterpret_cast<__m256i*>(out + i);
      if constexpr (sizeof(Bits) == 2) {
        _mm256_storeu_si256(to, _mm256_or_si256(even, _mm256_slli_epi32(odd, 16)));
      } else {
        const __m256i a = _mm256_unpacklo_epi32(even, odd), b = _mm256_unpackhi_epi32(even, odd);
        _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
      }
    }
  }
}

#endif

// Weights `first` to `first + count`, row after row.
template <class Format>
void dequantize(const Weight& weight, int64_t first, int64_t count, typename Format::Bits* out) {
#ifdef PEFTKIT_AVX512
  if (peftkit::cpu().avx2 && first % weight.block == 0) {
    const int64_t whole = count / 32 * 32;
    if (peftkit::cpu().avx512) {
      dequantize512<Format>(weight, first, whole, out);
    } else {
      dequantize256<Format>(weight, first, whole, out);
    }
    first += whole;
    out += whole;
    count -= whole;
  }
#endif
  dequantize_any<Format>(weight, first, count, out);
}

// Few rows --------------------------------------------------------------------------------------------------------------

typedef float Lanes __attribute__((vector_size(64)));

PEFTKIT_CLONES float dot(const float* a, const float* b, int64_t count) {
  Lanes sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int part = 0; part < 4; ++part) {
      Lanes left, right;
      std::memcpy(&left, a + i + 16 * part, sizeof left);
      std::memcpy(&right, b + i + 16 * part, sizeof right);
      sums[part] += left * right;
    }
  }
  const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int lane = 0; lane < 16; ++lane) sum += all[lane];
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

std::vector<float> floats(const std::optional<Tensor>& tensor) {
  return tensor ? peftkit::floats(*tensor) : std::vector<float>{};
}

// A factor of the update or a bias, read as floats piece by piece.
struct Factor {
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;

  explicit Factor(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    data = tensor->const_data_ptr();
    type = tensor->scalar_type();
  }
  void read(int64_t first, int64_t count, float* to) const {
    peftkit::with_format(type, "nf4_linear", [&](auto tag) {
      using Format = decltype(tag);
      peftkit::widen<Format>(static_cast<const typename Format::Bits*>(data) + first, to, count);
    });
  }
};

#ifdef PEFTKIT_AVX512

// sums[m][r] = x_m . w_r for `kRows` rows of x, in float, of every 32 numbers first those at even places, and `kWeights`
// rows of the weight.
template <int kRows, int kWeights>
PEFTKIT_AVX512 void products(const float* x, const Weight& weight, int64_t row, float* sums) {
  const int64_t columns = weight.columns, block = weight.block;
  const __m512 values = _mm512_loadu_ps(kValues);
  // One row has its sums in two parts, for additions that do not wait for each other.
  constexpr int kParts = kRows == 1 ? 2 : 1;
  __m512 total[kRows * kParts][kWeights];
#pragma GCC unroll 8
  for (int m = 0; m < kRows * kParts; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) total[m][r] = _mm512_setzero_ps();
  }
  const uint8_t* codes = weight.codes + row * columns / 2;
  const float* sizes = weight.sizes + row * columns / block;
  for (int64_t b = 0; b < columns / block; ++b) {
    __m512 table[kWeights];
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) {
      table[r] = _mm512_mul_ps(values, _mm512_set1_ps(sizes[r * (columns / block) + b]));
    }
    for (int64_t i = b * block; i < (b + 1) * block; i += 32) {
      __m512 even[kWeights], odd[kWeights];
#pragma GCC unroll 8
      for (int r = 0; r < kWeights; ++r) {
        const __m512i low = load_codes(codes + (r * columns + i) / 2);
        even[r] = _mm512_permutexvar_ps(_mm512_srli_epi32(low, 4), table[r]);
        odd[r] = _mm512_permutexvar_ps(low, table[r]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        const __m512 first = _mm512_loadu_ps(x + m * columns + i), second = _mm512_loadu_ps(x + m * columns + i + 16);
#pragma GCC unroll 8
        for (int r = 0; r < kWeights; ++r) {
          total[m][r] = _mm512_fmadd_ps(first, even[r], total[m][r]);
          __m512& other = total[m + kParts - 1][r];
          other = _mm512_fmadd_ps(second, odd[r], other);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) {
      if constexpr (kParts == 2) total[m][r] = _mm512_add_ps(total[m][r], total[m + 1][r]);
      sums[m * kWeights + r] = _mm512_reduce_add_ps(total[m][r]);
    }
  }
}

// The order of 128 numbers of a bfloat16 row, as four vectors that lie `step` apart, for lookups a byte at a time: first
// those at even places, and of each the numbers of four groups of 32, eight at a time.
void order_bf16(const uint16_t* from, uint16_t* to, int64_t step) {
  for (int64_t part = 0; part < 4; ++part) {
    for (int64_t lane = 0; lane < 4; ++lane) {
      const uint16_t* own = from + 32 * lane + 16 * (part % 2) + part / 2;
      for (int64_t k = 0; k < 8; ++k) to[part * step + 8 * lane + k] = own[2 * k];
    }
  }
}

// Lookups of 128 codes in such an order.
struct Lookup {
  __m512 values;
  __m512i nibble, bytes, lower, upper;
};

PEFTKIT_AVX512BF16 inline Lookup lookup() {
  return {_mm512_loadu_ps(kValues), _mm512_set1_epi8(15),
          // In each half of a register 16 numbers to their lower bytes, twice, and to their upper ones.
          _mm512_broadcast_i32x4(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0)),
          _mm512_set_epi64(6, 4, 6, 4, 2, 0, 2, 0), _mm512_set_epi64(7, 5, 7, 5, 3, 1, 3, 1)};
}

// The scaled values of codes are rounded to bfloat16 and looked up a byte at a time; `first` and `second` are the sizes of
// the halves; codes `ahead` are asked for.
PEFTKIT_AVX512BF16 inline __attribute__((always_inline)) void look_up_128(const Lookup& table, const uint8_t* codes,
                                                                          int64_t ahead, float first, float second,
                                                                          __m512bh (&own)[4]) {
  const __m512 a = _mm512_mul_ps(table.values, _mm512_set1_ps(first));
  const __m512 b = _mm512_mul_ps(table.values, _mm512_set1_ps(second));
  const __m512i rounded = _mm512_shuffle_epi8(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)), table.bytes);
  const __m512i low = _mm512_permutexvar_epi64(table.lower, rounded);
  const __m512i high = _mm512_permutexvar_epi64(table.upper, rounded);
  // Rows are too short for the processor to find out that they follow each other.
  _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
  const __m512i both = _mm512_loadu_si512(codes);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi16(both, 4), table.nibble);
  const __m512i odd = _mm512_and_si512(both, table.nibble);
  const __m512i even_low = _mm512_shuffle_epi8(low, even), even_high = _mm512_shuffle_epi8(high, even);
  const __m512i odd_low = _mm512_shuffle_epi8(low, odd), odd_high = _mm512_shuffle_epi8(high, odd);
  own[0] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(even_low, even_high));
  own[1] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(even_low, even_high));
  own[2] = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi8(odd_low, odd_high));
  own[3] = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi8(odd_low, odd_high));
}

// A weight as the source of tiles in bfloat16.
struct Tiles {
  static constexpr bool kReads = false;
  const Weight& weight;
  int64_t height, columns;

  PEFTKIT_AVX512BF16 int64_t tile(int64_t row, int64_t column, int64_t width, int64_t next, uint16_t* panel,
                                  const uint16_t** w) const {
    using peftkit::rows::kTile, peftkit::rows::kVector;
    const Lookup table = lookup();
    const int shift = __builtin_ctzll(static_cast<uint64_t>(weight.block));
    for (int64_t r = 0; r < kTile; ++r) {
      uint16_t* to = panel + r * kVector;
      w[r] = to;
      const int64_t first = std::min(row + r, height - 1) * columns + column;
      const uint8_t* codes = weight.codes + first / 2;
      const int64_t ahead = next < 0 ? 0 : next + r * columns - first;
      for (int64_t i = 0; i < width; i += 128) {
        __m512bh own[4];
        const int64_t at = first + i;
        _mm_prefetch(reinterpret_cast<const char*>(weight.sizes + ((at + ahead) >> shift)), _MM_HINT_T0);
        look_up_128(table, codes + i / 2, ahead / 2, weight.sizes[at >> shift], weight.sizes[(at + 64) >> shift], own);
        for (int64_t part = 0; part < 4; ++part) {
          _mm512_store_si512(to + (i + kVector * part) * kTile, reinterpret_cast<__m512i>(own[part]));
        }
      }
    }
    return kTile * kVector;
  }
};

// The same as `products` for bfloat16 rows ordered as above, of a multiple of 128 columns in blocks of 64 or more.
template <int kRows, int kWeights>
PEFTKIT_AVX512BF16 void products_bf16(const uint16_t* x, const Weight& weight, int64_t row, int64_t begin, int64_t end,
                                      float* sums) {
  const int64_t columns = weight.columns, blocks = columns / weight.block;
  const int shift = __builtin_ctzll(static_cast<uint64_t>(weight.block));
  const Lookup table = lookup();
  // Few rows have their sums in two parts, for additions that do not wait for each other.
  constexpr int kParts = kRows <= 3 ? 2 : 1;
  __m512 total[kRows * kParts][kWeights];
#pragma GCC unroll 8
  for (int m = 0; m < kRows * kParts; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) total[m][r] = _mm512_setzero_ps();
  }
  const uint8_t* codes = weight.codes + row * columns / 2;
  const float* sizes = weight.sizes + row * blocks;
  for (int64_t i = begin; i < end; i += 128) {
    __m512bh own[kWeights][4];
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) {
      const float* size = sizes + r * blocks;
      _mm_prefetch(reinterpret_cast<const char*>(size + ((i + 2 * kAhead) >> shift)), _MM_HINT_T0);
      look_up_128(table, codes + (r * columns + i) / 2, kAhead, size[i >> shift], size[(i + 64) >> shift], own[r]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int part = 0; part < 4; ++part) {
        const __m512bh piece = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + m * columns + i + 32 * part));
#pragma GCC unroll 8
        for (int r = 0; r < kWeights; ++r) {
          __m512& sum = total[m * kParts + part % kParts][r];
          sum = _mm512_dpbf16_ps(sum, piece, own[r][part]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < kWeights; ++r) {
      __m512 sum = total[m * kParts][r];
      if constexpr (kParts == 2) sum = _mm512_add_ps(sum, total[m * kParts + 1][r]);
      sums[m * kWeights + r] = _mm512_reduce_add_ps(sum);
    }
  }
}

PEFTKIT_AVX512BF16 float dot_bf16(const uint16_t* a, const uint16_t* b, int64_t count) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < count; i += 64) {
    for (int part = 0; part < 2; ++part) {
      sums[part] = _mm512_dpbf16_ps(sums[part], reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + i + 32 * part)),
                                    reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + i + 32 * part)));
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

// Calls run<rows, weights>(...) for numbers that are known at run time.
template <int kWeights, class Run>
void with_rows(int64_t rows, Run&& run) {
  switch (rows) {
    case 1: return run.template operator()<1, kWeights>();
    case 2: return run.template operator()<2, kWeights>();
    case 3: return run.template operator()<3, kWeights>();
    case 4: return run.template operator()<4, kWeights>();
    case 5: return run.template operator()<5, kWeights>();
    case 6: return run.template operator()<6, kWeights>();
    case 7: return run.template operator()<7, kWeights>();
    default: return run.template operator()<8, kWeights>();
  }
}

// Adds x . w to out[m * stride + r] for the weight's rows [row, row + count); `rows` of x.
template <class X>
void multiply(const X* x, int64_t rows, const Weight& weight, int64_t row, int64_t count, float* out, int64_t stride) {
  const int64_t columns = weight.columns, groups = (rows + kGroup - 1) / kGroup;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t m = group * rows / groups, taken = (group + 1) * rows / groups - m;
    const int64_t part = std::is_same_v<X, float> ? columns : std::max<int64_t>(kRowBytes / (2 * taken) / 128 * 128, 128);
    for (int64_t begin = 0; begin < columns; begin += part) {
      const int64_t end = std::min(begin + part, columns);
      for (int64_t r = 0; r < count;) {
        float sums[2 * kGroup];
        const auto run = [&]<int kRows, int kWeights>() {
          if constexpr (std::is_same_v<X, float>) {
            products<kRows, kWeights>(x + m * columns, weight, row + r, sums);
          } else {
            products_bf16<kRows, kWeights>(x + m * columns, weight, row + r, begin, end, sums);
          }
        };
        const int64_t wide = count - r >= 2 ? 2 : 1;
        if (wide == 2) {
          with_rows<2>(taken, run);
        } else {
          with_rows<1>(taken, run);
        }
        for (int64_t i = 0; i < taken; ++i) {
          for (int64_t j = 0; j < wide; ++j) out[(m + i) * stride + r + j] += sums[i * wide + j];
        }
        r += wide;
      }
    }
  }
}

// Of every 32 numbers first those at even places, then those at odd ones.
PEFTKIT_CLONES void split(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t k = 0; k < 16; ++k) {
      to[i + k] = from[i + 2 * k];
      to[i + 16 + k] = from[i + 2 * k + 1];
    }
  }
}

#endif

// What the sums of a few rows start with: the bias, and the low-rank update.
struct Start {
  static constexpr int64_t kTile = 32;  // rows of the weight whose results are kept together
  Factor bias, up;
  int64_t rows, rank = 0;
  std::vector<float> inner;  // scale * x downᵀ, (rows, rank)

  Start(int64_t count, const std::optional<Tensor>& own_bias, const std::optional<Tensor>& own_up)
      : bias(own_bias), up(own_up), rows(count) {}

  template <class Format>
  void multiply(const typename Format::Bits* x, int64_t columns, const Tensor& down, float scale, bool halves) {
    rank = down.size(0);
    inner.resize(static_cast<size_t>(rows * rank));
    const Factor own(down);
    const bool narrow = halves && own.type == ScalarType::BFloat16;
    std::vector<float> wide(narrow ? 0 : rows * columns);
    if (!narrow) peftkit::widen<Format>(x, wide.data(), rows * columns);
    torch::stable::parallel_for(0, rank, std::max<int64_t>(1, kGrain / (rows * columns + 1)), [&](int64_t begin, int64_t end) {
      std::vector<float> line(narrow ? 0 : columns);
      for (int64_t k = begin; k < end; ++k) {
#ifdef PEFTKIT_AVX512
        if (narrow) {
          const auto* from = static_cast<const uint16_t*>(own.data) + k * columns;
          if constexpr (sizeof *x == 2) {
            for (int64_t m = 0; m < rows; ++m) inner[m * rank + k] = scale * dot_bf16(x + m * columns, from, columns);
          }
          continue;
        }
#endif
        own.read(k * columns, columns, line.data());
        for (int64_t m = 0; m < rows; ++m) inner[m * rank + k] = scale * dot(wide.data() + m * columns, line.data(), columns);
      }
    });
  }

  // Of the weight's rows from `first` on, `count` of them.
  void operator()(int64_t first, int64_t count, float* sums) const {
    if (bias.data) {
      bias.read(first, count, sums);
      for (int64_t m = 1; m < rows; ++m) std::copy_n(sums, count, sums + m * kTile);
    }
    if (rank == 0) return;
    float* part = scratch<float, 4>(static_cast<size_t>(rank * kTile));
    up.read(first * rank, count * rank, part);
    peftkit::add_update(inner.data(), rows, rank, part, count, sums);
  }
};

// Whether bfloat16 rows can be multiplied with the weight in bfloat16.
bool in_halves(const Weight& weight) {
  return peftkit::cpu().avx512bf16 && weight.aligned() && weight.columns % 128 == 0 && weight.block >= 64;
}

template <class Format>
void few(const typename Format::Bits* x, int64_t rows, const Weight& weight, const std::optional<Tensor>& bias,
         const std::optional<Tensor>& down, const std::optional<Tensor>& up, float scale,
         typename Format::Bits* out) {
  using Bits = typename Format::Bits;
  const int64_t columns = weight.columns;
  bool floating = false, halves = false;  // which of the products above is used, if one is
#ifdef PEFTKIT_AVX512
  halves = std::is_same_v<Format, peftkit::Bfloat16> && in_halves(weight);
  floating = !halves && peftkit::cpu().avx512 && weight.aligned();
#endif
  Start start(rows, bias, up);
  if (down) start.multiply<Format>(x, columns, *down, scale, halves);
#ifdef PEFTKIT_AVX512
  if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
    if (halves && rows > kVeryFew) {
      const uint16_t* own = peftkit::rows::packed<128>(x, rows, columns, order_bf16);
      peftkit::rows::linear(own, rows, Tiles{weight, weight.rows, columns}, out, start);
      return;
    }
  }
#endif
  std::vector<float> wide(halves ? 0 : rows * columns);
  if (!halves) peftkit::widen<Format>(x, wide.data(), rows * columns);
  const auto stored = [&](int64_t first, int64_t count, const float* sums) {
    for (int64_t m = 0; m < rows; ++m) {
      peftkit::wide::narrow<Format>(sums + m * Start::kTile, out + m * weight.rows + first, count);
    }
  };
#ifdef PEFTKIT_AVX512
  if (!halves && !floating && peftkit::cpu().avx2) {
    const int64_t part = std::max(peftkit::wide::kPart, weight.block);
    const auto piece = [&](int64_t row, int64_t column, int64_t count, float* to) {
      dequantize<peftkit::Float32>(weight, row * columns + column, count, reinterpret_cast<uint32_t*>(to));
    };
    peftkit::wide::few(wide.data(), rows, weight.rows, columns, part, piece, start, stored);
    return;
  }
  // In memory that starts with a cache line: a load that crosses two of them takes twice as long.
  uint16_t* ordered = nullptr;
  float* apart = nullptr;
  if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
    if (halves) {
      ordered = scratch<uint16_t>(rows * columns);
      for (int64_t i = 0; i < rows * columns; i += 128) order_bf16(x + i, ordered + i, 32);
    }
  }
  if (floating) split(wide.data(), rows * columns, apart = scratch<float>(rows * columns));
#endif
  constexpr int64_t tile = Start::kTile;
  const int64_t tiles = (weight.rows + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, kGrain / (tile * std::max<int64_t>(columns, 1)));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    float sums[kFew * tile];
    std::vector<float> row(halves || floating ? 0 : columns);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * tile, count = std::min(tile, weight.rows - first);
      std::fill_n(sums, rows * tile, 0.0f);
      start(first, count, sums);
#ifdef PEFTKIT_AVX512
      if (halves) {
        multiply(ordered, rows, weight, first, count, sums, tile);
      } else if (floating) {
        multiply(apart, rows, weight, first, count, sums, tile);
      }
#endif
      if (!halves && !floating) {
        for (int64_t r = 0; r < count; ++r) {
          dequantize<peftkit::Float32>(weight, (first + r) * columns, columns, reinterpret_cast<uint32_t*>(row.data()));
          for (int64_t m = 0; m < rows; ++m) sums[m * tile + r] += dot(wide.data() + m * columns, row.data(), columns);
        }
      }
      stored(first, count, sums);
    }
  });
}

// Many rows -------------------------------------------------------------------------------------------------------------

template <class Format>
void copy_rows(const typename Format::Bits* from, int64_t rows, int64_t count, int64_t from_stride,
               typename Format::Bits* to, int64_t to_stride) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(count, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  std::copy_n(from + i * from_stride, count, to + i * to_stride);
                                }
                              });
}

Tensor matrix_of(void* data, int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  return torch::stable::from_blob(data, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2),
                                  torch::headeronly::IntHeaderOnlyArrayRef(strides, 2), like.device(),
                                  like.scalar_type());
}

// (rows, columns + extra) with `x` on the left and columns of zeros on the right.
template <class Format>
Tensor widened(const Tensor& x, int64_t extra) {
  const int64_t rows = x.size(0), columns = x.size(1);
  if (extra == 0) return x;
  Tensor out = torch::stable::new_empty(x, {rows, columns + extra});
  auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
  copy_rows<Format>(static_cast<const typename Format::Bits*>(x.const_data_ptr()), rows, columns, columns, to,
                    columns + extra);
  for (int64_t i = 0; i < rows; ++i) {
    std::fill_n(to + i * (columns + extra) + columns, extra, typename Format::Bits{0});
  }
  return out;
}

// Writes scale * from (rows, count), rounded, to columns of `to`.
template <class Format>
void place(const std::vector<float>& from, int64_t first, int64_t rows, int64_t count, float scale,
           typename Format::Bits* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < count; ++k) to[i * stride + k] = Format::store(scale * from[(first + i) * count + k]);
  }
}

// The same products in float32, which is faster on some processors.
template <class Format>
void many_wide(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& down, const std::optional<Tensor>& up, float scale,
               typename Format::Bits* out) {
  namespace wide = peftkit::wide;
  const int64_t columns = weight.columns, rank = down ? down->size(0) : 0, depth = columns + rank;
  const wide::Matrix own(x);
  std::vector<float> own_bias = floats(bias), own_down = floats(down), own_up = floats(up);
  for (float& value : own_up) value *= scale;
  const auto left = [&](int64_t first, int64_t count, float* to) {
    own.read_rows(first, count, to, depth);
    if (rank == 0) return;
    Tensor inner = wide::viewed(to + columns, count, rank, depth, x);
    wide::multiply(inner, wide::viewed(to, count, columns, depth, x),
                   wide::turned(wide::viewed(own_down.data(), rank, columns, columns, x)));
  };
  const auto right = [&](int64_t first, int64_t count, float* to) {
    wide::for_rows(count, columns, [&](int64_t r) {
      float* row = to + r * depth;
      dequantize<peftkit::Float32>(weight, (first + r) * columns, columns, reinterpret_cast<uint32_t*>(row));
      std::copy_n(own_up.data() + (first + r) * rank, rank, row + columns);
    });
  };
  wide::many(x, {x.size(0), weight.rows, depth}, left, right,
             [&](int64_t row, int64_t taken, int64_t first, int64_t count, float* sums) {
               wide::for_rows(taken, count, [&](int64_t i) {
                 float* line = sums + i * count;
                 if (bias) {
                   for (int64_t r = 0; r < count; ++r) line[r] += own_bias[first + r];
                 }
                 wide::narrow<Format>(line, out + (row + i) * weight.rows + first, count);
               });
             });
}

template <class Format>
void gradient_wide(const Tensor& grad, const Weight& weight, const std::optional<Tensor>& down,
                   const std::optional<Tensor>& up, float scale, typename Format::Bits* out) {
  namespace wide = peftkit::wide;
  const int64_t columns = weight.columns, height = weight.rows, rank = down ? down->size(0) : 0, depth = height + rank;
  const wide::Matrix own(grad);
  std::vector<float> own_down = floats(down), own_up = floats(up);
  for (float& value : own_up) value *= scale;
  const auto left = [&](int64_t first, int64_t count, float* to) {
    own.read_rows(first, count, to, depth);
    if (rank == 0) return;
    Tensor inner = wide::viewed(to + height, count, rank, depth, grad);
    wide::multiply(inner, wide::viewed(to, count, height, depth, grad),
                   wide::viewed(own_up.data(), height, rank, rank, grad));
  };
  const auto right = [&](int64_t first, int64_t count, float* to) {
    wide::for_rows(height, count, [&](int64_t r) {
      dequantize<peftkit::Float32>(weight, r * columns + first, count, reinterpret_cast<uint32_t*>(to + r * count));
    });
    for (int64_t k = 0; k < rank; ++k) {
      std::copy_n(own_down.data() + k * columns + first, count, to + (height + k) * count);
    }
  };
  const wide::Sizes sizes{grad.size(0), columns, depth, std::max<int64_t>(weight.block, 32), true};
  wide::many(grad, sizes, left, right, [&](int64_t row, int64_t taken, int64_t first, int64_t count, float* sums) {
    wide::for_rows(taken, count, [&](int64_t i) {
      wide::narrow<Format>(sums + i * count, out + (row + i) * columns + first, count);
    });
  });
}

// The extra columns of the factors are a multiple of this, for the library's sake.
int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

template <class Format>
void many(const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& down,
          const std::optional<Tensor>& up, float scale, typename Format::Bits* out) {
  using Bits = typename Format::Bits;
  const int64_t rows = x.size(0), columns = weight.columns, rank = down ? down->size(0) : 0;
  const int64_t extra = rank || bias ? padded(rank + (bias ? 1 : 0)) : 0, stride = columns + extra;
  const std::vector<float> own_bias = floats(bias), own_up = floats(up);
  Tensor left = widened<Format>(x, extra);
  if (extra) {
    auto* to = static_cast<Bits*>(left.mutable_data_ptr()) + columns;
    if (rank) {
      const Tensor inner = torch::stable::matmul(x, torch::stable::transpose(torch::stable::to(*down, x.scalar_type()), 0, 1));
      copy_rows<Format>(static_cast<const Bits*>(inner.const_data_ptr()), rows, rank, rank, to, stride);
    }
    if (bias) {
      for (int64_t i = 0; i < rows; ++i) to[i * stride + rank] = Format::store(1.0f);
    }
  }
  int64_t panel = kPanelBytes / static_cast<int64_t>(sizeof(Bits) * std::max<int64_t>(stride, 1)) / 32 * 32;
  panel = std::min(std::max<int64_t>(panel, 32), weight.rows);
  Bits* held = scratch<Bits>(static_cast<size_t>(panel * stride));
  for (int64_t first = 0; first < weight.rows; first += panel) {
    const int64_t count = std::min(panel, weight.rows - first);
    torch::stable::parallel_for(
        0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            dequantize<Format>(weight, (first + r) * columns, columns, held + r * stride);
            if (extra == 0) continue;
            Bits* rest = held + r * stride + columns;
            std::fill_n(rest, extra, Bits{0});
            if (rank) place<Format>(own_up, first + r, 1, rank, scale, rest, stride);
            if (bias) rest[rank] = Format::store(own_bias[first + r]);
          }
        });
    const Tensor right = matrix_of(held, count, stride, x);
    const Tensor part = torch::stable::matmul(left, torch::stable::transpose(right, 0, 1));
    copy_rows<Format>(static_cast<const Bits*>(part.const_data_ptr()), rows, count, count, out + first, weight.rows);
  }
}

template <class Format>
void gradient(const Tensor& grad, const Weight& weight, const std::optional<Tensor>& down,
              const std::optional<Tensor>& up, float scale, typename Format::Bits* out) {
  using Bits = typename Format::Bits;
  const int64_t rows = grad.size(0), columns = weight.columns, rank = down ? down->size(0) : 0;
  const int64_t extra = rank ? padded(rank) : 0, height = weight.rows + extra;
  const std::vector<float> own_down = floats(down);
  Tensor left = widened<Format>(grad, extra);
  if (rank) {
    const Tensor inner = torch::stable::matmul(grad, torch::stable::to(*up, grad.scalar_type()));
    auto* to = static_cast<Bits*>(left.mutable_data_ptr()) + weight.rows;
    copy_rows<Format>(static_cast<const Bits*>(inner.const_data_ptr()), rows, rank, rank, to, height);
  }
  // Panels of columns: each result is summed over all of the weight's rows before it is rounded.
  const int64_t unit = std::max<int64_t>(weight.block, 32);
  int64_t panel = kPanelBytes / static_cast<int64_t>(sizeof(Bits) * std::max<int64_t>(height, 1)) / unit * unit;
  panel = std::min(std::max<int64_t>(panel, unit), columns);
  Bits* held = scratch<Bits>(static_cast<size_t>(panel * height));
  for (int64_t first = 0; first < columns; first += panel) {
    const int64_t count = std::min(panel, columns - first);
    torch::stable::parallel_for(
        0, height, std::max<int64_t>(1, kGrain / std::max<int64_t>(count, 1)), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r) {
            Bits* to = held + r * count;
            if (r < weight.rows) {
              dequantize<Format>(weight, r * columns + first, count, to);
            } else if (r < weight.rows + rank) {
              const float* from = own_down.data() + (r - weight.rows) * columns + first;
              for (int64_t k = 0; k < count; ++k) to[k] = Format::store(scale * from[k]);
            } else {
              std::fill_n(to, count, Bits{0});
            }
          }
        });
    const Tensor part = torch::stable::matmul(left, matrix_of(held, height, count, grad));
    copy_rows<Format>(static_cast<const Bits*>(part.const_data_ptr()), rows, count, count, out + first, columns);
  }
}

// Operations ------------------------------------------------------------------------------------------------------------

Weight weight_of(const Tensor& codes, const Tensor& sizes, int64_t rows, int64_t columns, int64_t block) {
  STD_TORCH_CHECK(block >= 32 && block % 32 == 0 && rows >= 0 && columns >= 0 && codes.is_contiguous() &&
                      sizes.is_contiguous() && codes.scalar_type() == ScalarType::Byte &&
                      sizes.scalar_type() == ScalarType::Float && codes.numel() == (rows * columns + 1) / 2 &&
                      sizes.numel() == (rows * columns + block - 1) / block,
                  "nf4_linear: expected contiguous uint8 codes, two a byte, and a float32 size for each block");
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), static_cast<const float*>(sizes.const_data_ptr()), rows,
          columns, block};
}

void check(const Tensor& x, const Weight& weight, bool forward, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& down, const std::optional<Tensor>& up) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.size(1) == (forward ? weight.columns : weight.rows),
                  "nf4_linear: compiled code takes a contiguous matrix that fits the weight");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == weight.rows),
                  "nf4_linear: expected a contiguous bias (out,)");
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "nf4_linear: expected down and up, or neither");
  STD_TORCH_CHECK(!down || (down->dim() == 2 && up->dim() == 2 && down->is_contiguous() && up->is_contiguous() &&
                            down->size(1) == weight.columns && up->size(0) == weight.rows &&
                            down->size(0) == up->size(1)),
                  "nf4_linear: expected contiguous down (r, in) and up (out, r)");
}

Tensor nf4_linear(Tensor x, Tensor codes, Tensor sizes, int64_t height, int64_t block, std::optional<Tensor> bias,
                  std::optional<Tensor> down, std::optional<Tensor> up, double scale) {
  STD_TORCH_CHECK(x.dim() == 2, "nf4_linear: compiled code takes a matrix");
  const Weight weight = weight_of(codes, sizes, height, x.size(1), block);
  check(x, weight, true, bias, down, up);
  Tensor out = torch::stable::new_empty(x, {x.size(0), height});
  if (out.numel() == 0) return out;
  peftkit::with_format(x.scalar_type(), "nf4_linear", [&](auto tag) {
    using Format = decltype(tag);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    const bool halves = std::is_same_v<Format, peftkit::Bfloat16> && in_halves(weight);
    const bool tiles = peftkit::cpu().avx2 && !peftkit::cpu().avx512;
    if (x.size(0) <= (halves ? kSome : tiles ? peftkit::wide::kFew : kFew)) {
      few<Format>(static_cast<const typename Format::Bits*>(x.const_data_ptr()), x.size(0), weight, bias, down, up,
                  static_cast<float>(scale), to);
    } else if (peftkit::wide::pays(x.scalar_type())) {
      many_wide<Format>(x, weight, bias, down, up, static_cast<float>(scale), to);
    } else {
      many<Format>(x, weight, bias, down, up, static_cast<float>(scale), to);
    }
  });
  return out;
}

Tensor nf4_linear_grad(Tensor grad, Tensor codes, Tensor sizes, int64_t width, int64_t block,
                       std::optional<Tensor> down, std::optional<Tensor> up, double scale) {
  STD_TORCH_CHECK(grad.dim() == 2, "nf4_linear: compiled code takes a matrix");
  const Weight weight = weight_of(codes, sizes, grad.size(1), width, block);
  check(grad, weight, false, std::nullopt, down, up);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), width});
  if (out.numel() == 0) return out;
  peftkit::with_format(grad.scalar_type(), "nf4_linear", [&](auto tag) {
    using Format = decltype(tag);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    if (peftkit::wide::pays(grad.scalar_type())) {
      gradient_wide<Format>(grad, weight, down, up, static_cast<float>(scale), to);
    } else {
      gradient<Format>(grad, weight, down, up, static_cast<float>(scale), to);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("nf4_linear", TORCH_BOX(&nf4_linear));
  library.impl("nf4_linear_grad", TORCH_BOX(&nf4_linear_grad));
}
