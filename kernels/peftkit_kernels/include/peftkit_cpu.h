// What the CPU code of several operations shares: number formats, errors, and loops that exist for several processors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// The same loop for AVX-512, AVX2 and any x86-64; the loader picks one when the library is opened. Elsewhere: as it is.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(PEFTKIT_NO_CLONES)
#define PEFTKIT_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PEFTKIT_CLONES
#endif

namespace peftkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bits of the widest vectors to use: 512, 256 or 0, for checks of what other processors run.
#ifndef PEFTKIT_WIDEST
#define PEFTKIT_WIDEST 512
#endif

// The instructions of this processor that code here is written for.
struct Cpu {
  bool avx2 = false;  // with fused multiply-adds and float16
  bool avx512 = false;
  bool avx512bf16 = false;
  bool avx512fp16 = false;
  bool avx512vnni = false;
};

inline const Cpu& cpu() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Cpu found = [] {
    Cpu own;
    own.avx2 = PEFTKIT_WIDEST >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    own.avx512 = PEFTKIT_WIDEST >= 512 && own.avx2 && __builtin_cpu_supports("avx512f") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512dq");
    own.avx512bf16 = own.avx512 && __builtin_cpu_supports("avx512bf16");
    own.avx512fp16 = own.avx512 && __builtin_cpu_supports("avx512fp16");
    own.avx512vnni = own.avx512 && __builtin_cpu_supports("avx512vnni");
    return own;
  }();
#else
  static const Cpu found{};
#endif
  return found;
}

inline float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// To nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(nan ? ((bits >> 16) | 0x40u) : rounded);
}

inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  // The exponent is moved by multiplication, which also makes subnormal numbers normal.
  const float moved = std::bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(moved) | special);
}

// To nearest, ties to even; too large becomes infinite, a NaN stays one.
inline uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  // Normal: rounded in integers. Subnormal: rounded by adding a number whose last bit is worth 2^-24.
  const uint32_t normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  const uint32_t finite = size < 0x38800000u ? tiny : normal;
  const uint32_t large = size > 0x7f800000u ? (0x7e00u | ((size >> 13) & 0x3ffu)) : 0x7c00u;
  return static_cast<uint16_t>(sign | (size >= 0x477ff000u ? large : finite));
}

// A number format as storage: its bits and the conversions from and to float.
struct Float32 {
  using Bits = uint32_t;
  static float load(Bits bits) { return std::bit_cast<float>(bits); }
  static Bits store(float value) { return std::bit_cast<Bits>(value); }
};
struct Bfloat16 {
  using Bits = uint16_t;
  static float load(Bits bits) { return from_bfloat16(bits); }
  static Bits store(float value) { return to_bfloat16(value); }
};
struct Float16 {
  using Bits = uint16_t;
  static float load(Bits bits) { return from_float16(bits); }
  static Bits store(float value) { return to_float16(value); }
};

template <class Format>
using Bits = typename Format::Bits;

// Calls `use` with the format of a dtype.
template <class Use>
auto with_format(ScalarType type, const char* name, Use&& use) {
  switch (type) {
    case ScalarType::Float:
      return use(Float32{});
    case ScalarType::BFloat16:
      return use(Bfloat16{});
    case ScalarType::Half:
      return use(Float16{});
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
      return use(Float32{});
  }
}

template <class Format>
PEFTKIT_CLONES void widen(const typename Format::Bits* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = Format::load(from[i]);
}

// A whole tensor as floats.
inline std::vector<float> floats(const Tensor& tensor) {
  std::vector<float> out(tensor.numel());
  with_format(tensor.scalar_type(), "peftkit", [&](auto tag) {
    using Format = decltype(tag);
    widen<Format>(static_cast<const typename Format::Bits*>(tensor.const_data_ptr()), out.data(), tensor.numel());
  });
  return out;
}

// Bit i: whether a[i] != b[i], for up to 32 elements; the loop becomes a few comparisons of whole vectors.
template <class Bits>
inline uint32_t differing_portable(const Bits* a, const Bits* b, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count && i < 32; ++i) found |= static_cast<uint32_t>(a[i] != b[i]) << i;
  return found;
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw"))) inline uint32_t differing_avx512(const uint16_t* a, const uint16_t* b) {
  return _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
}
__attribute__((target("avx512f,avx512bw"))) inline uint32_t differing_avx512(const uint32_t* a, const uint32_t* b) {
  const uint32_t low = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
  const uint32_t high = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(a + 16), _mm512_loadu_si512(b + 16));
  return low | high << 16;
}
#endif

template <class Bits>
inline uint32_t differing(const Bits* a, const Bits* b, int64_t count) {
#if defined(__x86_64__)
  if (count >= 32 && cpu().avx512) return differing_avx512(a, b);
#endif
  return differing_portable(a, b, count);
}

}  // namespace peftkit
