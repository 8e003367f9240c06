// Tensors to 4-bit and 8-bit codes in blocks and back; see reference.py for the definition.
//
// A code is found by comparing with the points between values, never by arithmetic that could round another way, so that
// codes are those of the reference bit for bit.

#include "peftkit_cpu.h"

#include <algorithm>
#include <tuple>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define PEFTKIT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#endif

namespace {

using peftkit::ScalarType;
using peftkit::Tensor;

constexpr float kSmallest = 1e-38f;  // the least size that a block is scaled by
constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

struct Format4 {
  float values[16];    // of the codes
  float between[16];   // points between neighbouring values, ascending; the last one is not used
  int32_t order[16];   // code of the value of that rank
};

constexpr Format4 kNormal = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
constexpr Format4 kFloat = {
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, 0.0f, -0.0625f / 12, -8.0f / 12, -1.0f,
     -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
    {},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}};

constexpr Format4 with_points(Format4 format) {
  for (int i = 0; i < 15; ++i) {
    format.between[i] = (format.values[format.order[i]] + format.values[format.order[i + 1]]) / 2;
  }
  return format;
}
constexpr Format4 kFormats[2] = {with_points(kNormal), with_points(kFloat)};

const Format4& format_of(int64_t kind) {
  STD_TORCH_CHECK(kind == 0 || kind == 1, "quantize_blockwise: kind is ", kind, "; expected 0 (nf4) or 1 (fp4)");
  return kFormats[kind];
}

void check_block(int64_t block) {
  STD_TORCH_CHECK(block >= 32 && block <= 4096 && (block & (block - 1)) == 0, "quantize_blockwise: block is ", block,
                  "; expected a power of two from 32 to 4096");
}

bool has_avx512() {
#ifdef PEFTKIT_AVX512
  static const bool found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return found;
#else
  return false;
#endif
}

// Any processor ---------------------------------------------------------------------------------------------------------

// The largest size in a block. Sizes are compared as integers, in whose order a NaN is the largest.
template <class Format>
PEFTKIT_CLONES float largest(const typename Format::Bits* x, int64_t count) {
  using Bits = typename Format::Bits;
  Bits most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Bits size = x[i] & static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);
    most = std::max(most, size);
  }
  return Format::load(most);
}

// Ranks of the scaled values: how many points they are beyond. A NaN is beyond all.
template <class Format, bool whole>
PEFTKIT_CLONES void ranks(const typename Format::Bits* x, int64_t count, float by, const float* between, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = whole ? Format::load(x[i]) * by : Format::load(x[i]) / by;
    int32_t rank = 0;
    for (int k = 0; k < 15; ++k) rank += !(value <= between[k]);
    out[i] = static_cast<uint8_t>(rank);
  }
}

// One block; the last one of a tensor, where it is short, is divided by its size and not multiplied by the inverse.
template <class Format>
float quantize_block(const typename Format::Bits* x, int64_t count, bool whole, const Format4& format, uint8_t* codes) {
  uint8_t rank[4097];
  float size = largest<Format>(x, count);
  const float by = size < kSmallest ? kSmallest : size;
  if (whole) {
    ranks<Format, true>(x, count, 1.0f / by, format.between, rank);
  } else {
    ranks<Format, false>(x, count, by, format.between, rank);
    size = by;
  }
  for (int64_t i = 0; i < count / 2; ++i) {
    codes[i] = static_cast<uint8_t>(format.order[rank[2 * i]] << 4 | format.order[rank[2 * i + 1]]);
  }
  // A code of zero fills the last byte.
  if (count % 2) codes[count / 2] = static_cast<uint8_t>(format.order[rank[count - 1]] << 4 | format.order[7]);
  return size;
}

template <class Format>
void dequantize_block(const uint8_t* codes, int64_t count, float size, const Format4& format,
                      typename Format::Bits* out) {
  typename Format::Bits scaled[16];
  for (int i = 0; i < 16; ++i) scaled[i] = Format::store(format.values[i] * size);
  for (int64_t i = 0; i < count / 2; ++i) {
    out[2 * i] = scaled[codes[i] >> 4];
    out[2 * i + 1] = scaled[codes[i] & 15];
  }
  if (count % 2) out[count - 1] = scaled[codes[count / 2] >> 4];
}

template <class Format>
PEFTKIT_CLONES void to_int8(const typename Format::Bits* x, int64_t count, float by, int8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = __builtin_rintf(Format::load(x[i]) * by * 127.0f);
    // False for a NaN too.
    const float held = value >= -127.0f ? value : (value < -127.0f ? -127.0f : 0.0f);
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(held > 127.0f ? 127.0f : held));
  }
}

template <class Format>
PEFTKIT_CLONES void from_int8(const int8_t* codes, int64_t count, float step, typename Format::Bits* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Format::store(static_cast<float>(codes[i]) * step);
}

// AVX-512 ---------------------------------------------------------------------------------------------------------------

#ifdef PEFTKIT_AVX512

template <class Format>
PEFTKIT_AVX512 inline float largest512(const typename Format::Bits* x, int64_t count) {
  if constexpr (sizeof(typename Format::Bits) == 2) {
    const __m512i sizes = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 32) {
      most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(x + i), sizes));
    }
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The instruction finds the least one, so it is asked about the complements.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)));
    return Format::load(static_cast<uint16_t>(~_mm_extract_epi16(least, 0)));
  } else {
    const __m512i sizes = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), sizes));
    }
    return Format::load(_mm512_reduce_max_epu32(most));
  }
}

// Of 32 elements those at even and those at odd places.
template <class Format>
PEFTKIT_AVX512 inline void split(const typename Format::Bits* x, __m512& even, __m512& odd) {
  if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
    const __m512i both = _mm512_loadu_si512(x);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  } else {
    __m512 low, high;
    if constexpr (std::is_same_v<Format, peftkit::Float16>) {
      low = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
      high = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16)));
    } else {
      low = _mm512_loadu_ps(x);
      high = _mm512_loadu_ps(x + 16);
    }
    const __m512i places = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    even = _mm512_permutex2var_ps(low, places, high);
    odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(places, _mm512_set1_epi32(1)), high);
  }
}

// The points between values as a search tree: those that the second, third and fourth comparison look up.
struct Tree {
  __m512 first, second, third, fourth;
};

PEFTKIT_AVX512 inline Tree tree_of(const float* between) {
  const __m512 all = _mm512_loadu_ps(between);
  const __m512i own = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return {_mm512_set1_ps(between[7]), _mm512_permutexvar_ps(_mm512_add_epi32(own, _mm512_set1_epi32(3)), all),
          _mm512_permutexvar_ps(_mm512_add_epi32(own, _mm512_set1_epi32(1)), all), all};
}

PEFTKIT_AVX512 inline __m512i rank_of(__m512 value, const Tree& tree) {
  // "Not at most" and not "more than": a NaN goes to the end.
  __m512i at = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(value, tree.first, _CMP_NLE_UQ), 8);
  __mmask16 beyond = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, tree.second), _CMP_NLE_UQ);
  at = _mm512_mask_add_epi32(at, beyond, at, _mm512_set1_epi32(4));
  beyond = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, tree.third), _CMP_NLE_UQ);
  at = _mm512_mask_add_epi32(at, beyond, at, _mm512_set1_epi32(2));
  beyond = _mm512_cmp_ps_mask(value, _mm512_permutexvar_ps(at, tree.fourth), _CMP_NLE_UQ);
  return _mm512_mask_add_epi32(at, beyond, at, _mm512_set1_epi32(1));
}

template <class Format, bool ordered>
PEFTKIT_AVX512 void quantize512(const typename Format::Bits* x, int64_t blocks, int64_t block, const Format4& format,
                                uint8_t* codes, float* sizes) {
  const Tree tree = tree_of(format.between);
  const __m512i order = _mm512_loadu_si512(format.order);
  for (int64_t b = 0; b < blocks; ++b) {
    const auto* from = x + b * block;
    const float size = largest512<Format>(from, block);
    sizes[b] = size;
    const __m512 by = _mm512_set1_ps(1.0f / (size < kSmallest ? kSmallest : size));
    for (int64_t i = 0; i < block; i += 32) {
      __m512 even, odd;
      split<Format>(from + i, even, odd);
      __m512i high = rank_of(_mm512_mul_ps(even, by), tree), low = rank_of(_mm512_mul_ps(odd, by), tree);
      if constexpr (!ordered) {
        high = _mm512_permutexvar_epi32(high, order);
        low = _mm512_permutexvar_epi32(low, order);
      }
      const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_slli_epi32(high, 4), low));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + (b * block + i) / 2), bytes);
    }
  }
}

// To nearest, ties to even, in the upper half of each lane.
PEFTKIT_AVX512 inline __m512i round_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_and_si512(_mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)),
                          _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
}

template <class Format>
PEFTKIT_AVX512 void dequantize512(const uint8_t* codes, int64_t blocks, int64_t block, const float* sizes,
                                  const Format4& format, typename Format::Bits* out) {
  const __m512 values = _mm512_loadu_ps(format.values);
  const __m512i left = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i right = _mm512_add_epi32(left, _mm512_set1_epi32(8));
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(sizes[b]));
    __m512i even{}, odd{};
    if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
      odd = round_bfloat16(scaled);
      even = _mm512_srli_epi32(odd, 16);
    } else if constexpr (std::is_same_v<Format, peftkit::Float16>) {
      even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      odd = _mm512_slli_epi32(even, 16);
    }
    for (int64_t i = b * block; i < (b + 1) * block; i += 32) {
      const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
      const __m512i high = _mm512_srli_epi32(low, 4);
      if constexpr (sizeof(typename Format::Bits) == 2) {
        // A lookup reads the lowest four bits only.
        const __m512i both = _mm512_or_si512(_mm512_permutexvar_epi32(high, even), _mm512_permutexvar_epi32(low, odd));
        _mm512_storeu_si512(out + i, both);
      } else {
        const __m512 first = _mm512_permutexvar_ps(high, scaled), second = _mm512_permutexvar_ps(low, scaled);
        _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(first, left, second));
        _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(first, right, second));
      }
    }
  }
}

#endif

// Operations ------------------------------------------------------------------------------------------------------------

// Calls work(first block, number of blocks) for whole blocks from several threads; returns the elements left over.
template <class Work>
int64_t each_whole(int64_t count, int64_t block, Work&& work) {
  const int64_t whole = count / block;
  torch::stable::parallel_for(0, whole, std::max<int64_t>(1, kGrain / block),
                              [&](int64_t begin, int64_t end) { work(begin, end - begin); });
  return count % block;
}

std::tuple<Tensor, Tensor> quantize_4bit(Tensor x, int64_t kind, int64_t block) {
  const Format4& format = format_of(kind);
  check_block(block);
  STD_TORCH_CHECK(x.is_contiguous(), "quantize_4bit: compiled code takes contiguous tensors");
  const int64_t count = x.numel(), blocks = (count + block - 1) / block;
  Tensor codes = torch::stable::new_empty(x, {(count + 1) / 2}, std::make_optional(ScalarType::Byte));
  Tensor sizes = torch::stable::new_empty(x, {blocks}, std::make_optional(ScalarType::Float));
  auto* code = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* size = static_cast<float*>(sizes.mutable_data_ptr());
  peftkit::with_format(x.scalar_type(), "quantize_4bit", [&](auto tag) {
    using Format = decltype(tag);
    const auto* from = static_cast<const typename Format::Bits*>(x.const_data_ptr());
    const int64_t left = each_whole(count, block, [&](int64_t first, int64_t number) {
      const int64_t at = first * block;
#ifdef PEFTKIT_AVX512
      if (has_avx512()) {
        const auto run = kind == 0 ? quantize512<Format, true> : quantize512<Format, false>;
        return run(from + at, number, block, format, code + at / 2, size + first);
      }
#endif
      for (int64_t b = 0; b < number; ++b) {
        const int64_t own = at + b * block;
        size[first + b] = quantize_block<Format>(from + own, block, true, format, code + own / 2);
      }
    });
    if (left) {
      const int64_t at = count - left;
      size[blocks - 1] = quantize_block<Format>(from + at, left, false, format, code + at / 2);
    }
  });
  return {codes, sizes};
}

Tensor dequantize_4bit(Tensor codes, Tensor sizes, int64_t kind, int64_t block, int64_t count, ScalarType dtype) {
  const Format4& format = format_of(kind);
  check_block(block);
  STD_TORCH_CHECK(codes.is_contiguous() && sizes.is_contiguous(),
                  "dequantize_4bit: compiled code takes contiguous tensors");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && sizes.scalar_type() == ScalarType::Float && count >= 0 &&
                      codes.numel() == (count + 1) / 2 && sizes.numel() == (count + block - 1) / block,
                  "dequantize_4bit: expected uint8 codes, two a byte, and a float32 size for each block");
  Tensor out = torch::stable::new_empty(codes, {count}, std::make_optional(dtype));
  const auto* code = static_cast<const uint8_t*>(codes.const_data_ptr());
  const auto* size = static_cast<const float*>(sizes.const_data_ptr());
  peftkit::with_format(dtype, "dequantize_4bit", [&](auto tag) {
    using Format = decltype(tag);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    const int64_t left = each_whole(count, block, [&](int64_t first, int64_t number) {
      const int64_t at = first * block;
#ifdef PEFTKIT_AVX512
      if (has_avx512()) {
        return dequantize512<Format>(code + at / 2, number, block, size + first, format, to + at);
      }
#endif
      for (int64_t b = 0; b < number; ++b) {
        const int64_t own = at + b * block;
        dequantize_block<Format>(code + own / 2, block, size[first + b], format, to + own);
      }
    });
    const int64_t at = count - left;
    if (left) dequantize_block<Format>(code + at / 2, left, size[count / block], format, to + at);
  });
  return out;
}

std::tuple<Tensor, Tensor> quantize_int8(Tensor x, int64_t block) {
  check_block(block);
  STD_TORCH_CHECK(x.is_contiguous(), "quantize_int8: compiled code takes contiguous tensors");
  const int64_t count = x.numel(), blocks = (count + block - 1) / block;
  Tensor codes = torch::stable::new_empty(x, {count}, std::make_optional(ScalarType::Char));
  Tensor sizes = torch::stable::new_empty(x, {blocks}, std::make_optional(ScalarType::Float));
  auto* code = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* size = static_cast<float*>(sizes.mutable_data_ptr());
  peftkit::with_format(x.scalar_type(), "quantize_int8", [&](auto tag) {
    using Format = decltype(tag);
    const auto* from = static_cast<const typename Format::Bits*>(x.const_data_ptr());
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t own = std::min(block, count - b * block);
        size[b] = largest<Format>(from + b * block, own);
        to_int8<Format>(from + b * block, own, 1.0f / (size[b] < kSmallest ? kSmallest : size[b]), code + b * block);
      }
    });
  });
  return {codes, sizes};
}

Tensor dequantize_int8(Tensor codes, Tensor sizes, int64_t block, ScalarType dtype) {
  check_block(block);
  STD_TORCH_CHECK(codes.is_contiguous() && sizes.is_contiguous(),
                  "dequantize_int8: compiled code takes contiguous tensors");
  const int64_t count = codes.numel(), blocks = (count + block - 1) / block;
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && sizes.scalar_type() == ScalarType::Float &&
                      sizes.numel() == blocks,
                  "dequantize_int8: expected int8 codes and a float32 size for each block");
  Tensor out = torch::stable::new_empty(codes, {count}, std::make_optional(dtype));
  const auto* code = static_cast<const int8_t*>(codes.const_data_ptr());
  const auto* size = static_cast<const float*>(sizes.const_data_ptr());
  peftkit::with_format(dtype, "dequantize_int8", [&](auto tag) {
    using Format = decltype(tag);
    auto* to = static_cast<typename Format::Bits*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, kGrain / block), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t own = std::min(block, count - b * block);
        from_int8<Format>(code + b * block, own, size[b] / 127.0f, to + b * block);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peftkit, CPU, library) {
  library.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  library.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  library.impl("quantize_int8", TORCH_BOX(&quantize_int8));
  library.impl("dequantize_int8", TORCH_BOX(&dequantize_int8));
}
