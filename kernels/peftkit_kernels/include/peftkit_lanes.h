// Vectors of float32 for one kind of processor: 16 lanes, 8 lanes, or 8 in plain C++.
//
// For files that include themselves once a kind: no guard, to be included inside a namespace of the pass, with
// PEFTKIT_PASS (512, 256 or 0), PEFTKIT_TARGET and PEFTKIT_INLINE defined (peftkit_passes.h), and Bits<Format> known.

#if PEFTKIT_PASS == 512

using Lanes = __m512;
constexpr int64_t kLanes = 16;

PEFTKIT_TARGET PEFTKIT_INLINE Lanes zero() { return _mm512_setzero_ps(); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes all(float value) { return _mm512_set1_ps(value); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
PEFTKIT_TARGET PEFTKIT_INLINE float total(Lanes a) { return _mm512_reduce_add_ps(a); }
PEFTKIT_TARGET PEFTKIT_INLINE void put(float* to, Lanes a) { _mm512_storeu_ps(to, a); }
template <class Format>
PEFTKIT_TARGET PEFTKIT_INLINE Lanes take(const Bits<Format>* from) {
  if constexpr (std::is_same_v<Format, peftkit::Float32>) {
    return _mm512_loadu_ps(from);
  } else {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    } else {
      return _mm512_cvtph_ps(bits);
    }
  }
}
PEFTKIT_TARGET PEFTKIT_INLINE Lanes take_float(const float* from) { return _mm512_loadu_ps(from); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
// A product that is rounded, whatever is done with it next.
PEFTKIT_TARGET PEFTKIT_INLINE Lanes times(Lanes a, Lanes b) {
  Lanes out = _mm512_mul_ps(a, b);
  asm("" : "+v"(out));
  return out;
}
// To nearest bfloat16, ties to even, in the upper half of each lane.
PEFTKIT_TARGET PEFTKIT_INLINE __m512i in_bfloat16(Lanes value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
// Rounds and writes two times kLanes numbers.
template <class Format>
PEFTKIT_TARGET PEFTKIT_INLINE void give(Bits<Format>* to, Lanes a, Lanes b) {
  if constexpr (std::is_same_v<Format, peftkit::Float32>) {
    _mm512_storeu_ps(to, a);
    _mm512_storeu_ps(to + 16, b);
  } else if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                                           25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(in_bfloat16(a), upper, in_bfloat16(b)));
  } else {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(a, nearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm512_cvtps_ph(b, nearest));
  }
}

#elif PEFTKIT_PASS == 256

using Lanes = __m256;
constexpr int64_t kLanes = 8;

PEFTKIT_TARGET PEFTKIT_INLINE Lanes zero() { return _mm256_setzero_ps(); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes all(float value) { return _mm256_set1_ps(value); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
PEFTKIT_TARGET PEFTKIT_INLINE float total(Lanes a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
PEFTKIT_TARGET PEFTKIT_INLINE void put(float* to, Lanes a) { _mm256_storeu_ps(to, a); }
template <class Format>
PEFTKIT_TARGET PEFTKIT_INLINE Lanes take(const Bits<Format>* from) {
  if constexpr (std::is_same_v<Format, peftkit::Float32>) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  } else {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    } else {
      return _mm256_cvtph_ps(bits);
    }
  }
}
PEFTKIT_TARGET PEFTKIT_INLINE Lanes take_float(const float* from) { return _mm256_loadu_ps(from); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes plus(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes minus(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
PEFTKIT_TARGET PEFTKIT_INLINE Lanes times(Lanes a, Lanes b) {
  Lanes out = _mm256_mul_ps(a, b);
  asm("" : "+x"(out));
  return out;
}
PEFTKIT_TARGET PEFTKIT_INLINE __m256i in_bfloat16(Lanes value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet),
                                              _mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
}
template <class Format>
PEFTKIT_TARGET PEFTKIT_INLINE void give(Bits<Format>* to, Lanes a, Lanes b) {
  if constexpr (std::is_same_v<Format, peftkit::Float32>) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), a);
    _mm256_storeu_ps(reinterpret_cast<float*>(to + 8), b);
  } else if constexpr (std::is_same_v<Format, peftkit::Bfloat16>) {
    const __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(in_bfloat16(a), 16), _mm256_srli_epi32(in_bfloat16(b), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, 0xd8));
  } else {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(a, nearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(b, nearest));
  }
}

#else

struct Lanes {
  float of[8];
};
constexpr int64_t kLanes = 8;

PEFTKIT_INLINE Lanes zero() { return Lanes{}; }
PEFTKIT_INLINE Lanes all(float value) {
  Lanes out;
  for (float& lane : out.of) lane = value;
  return out;
}
PEFTKIT_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int64_t i = 0; i < kLanes; ++i) c.of[i] += a.of[i] * b.of[i];
  return c;
}
PEFTKIT_INLINE float total(Lanes a) {
  return ((a.of[0] + a.of[4]) + (a.of[1] + a.of[5])) + ((a.of[2] + a.of[6]) + (a.of[3] + a.of[7]));
}
PEFTKIT_INLINE void put(float* to, Lanes a) { std::memcpy(to, a.of, sizeof a.of); }
template <class Format>
PEFTKIT_INLINE Lanes take(const Bits<Format>* from) {
  Lanes out;
  for (int64_t i = 0; i < kLanes; ++i) out.of[i] = Format::load(from[i]);
  return out;
}
PEFTKIT_INLINE Lanes take_float(const float* from) {
  Lanes out;
  std::memcpy(out.of, from, sizeof out.of);
  return out;
}
PEFTKIT_INLINE Lanes plus(Lanes a, Lanes b) {
  for (int64_t i = 0; i < kLanes; ++i) a.of[i] += b.of[i];
  return a;
}
PEFTKIT_INLINE Lanes minus(Lanes a, Lanes b) {
  for (int64_t i = 0; i < kLanes; ++i) a.of[i] -= b.of[i];
  return a;
}
PEFTKIT_INLINE Lanes times(Lanes a, Lanes b) {
  for (int64_t i = 0; i < kLanes; ++i) a.of[i] *= b.of[i];
#if defined(__GNUC__)
  asm volatile("" : : "r"(a.of) : "memory");
#endif
  return a;
}
template <class Format>
PEFTKIT_INLINE void give(Bits<Format>* to, Lanes a, Lanes b) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = Format::store(a.of[i]);
  for (int64_t i = 0; i < kLanes; ++i) to[kLanes + i] = Format::store(b.of[i]);
}

#endif
