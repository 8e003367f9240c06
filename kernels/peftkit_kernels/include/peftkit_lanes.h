// Vectors of float32 for one kind of processor: 16 lanes, 8 lanes, or 8 in plain C++.
//
// For files that include themselves once a kind: no guard, to be included inside a namespace of the pass, with
// PEFTKIT_PASS (512, 256 or 0), PEFTKIT_TARGET and PEFTKIT_INLINE defined, and Bits<Format> known.

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

#endif
