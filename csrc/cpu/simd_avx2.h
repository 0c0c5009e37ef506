// Vectors and the integer dot product with AVX2. Names as in simd_plain.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace erq {
namespace ERQ_VARIANT {

using F = __m256;
using I = __m256i;
using A = int16_t;

// Bytes would have to be multiplied by vpmaddubsw, which saturates; 16-bit pairs are exact.
constexpr int kW = 8, kMr = 6, kNr = 2, kGroup = 2, kShift = 0;
constexpr int kRowUnit = 1, kStep = kGroup, kTaskRows = 48, kScoreRows = kMr, kTileColumns = kNr * kW;
constexpr bool kOverlaps = false;

inline F load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, F x) { _mm256_storeu_ps(p, x); }
inline I load(const int32_t *p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
}
inline F set(float x) { return _mm256_set1_ps(x); }
inline I set(int32_t x) { return _mm256_set1_epi32(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline I add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I max(I a, I b) { return _mm256_max_epi32(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
inline I bits_of(F a) { return _mm256_castps_si256(a); }
inline F scale2(F a, I n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(bits_of(a), _mm256_slli_epi32(n, 23)));
}
inline F first_of(F a, int64_t n, F rest) {
  const I place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const I kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), place);
  return _mm256_blendv_ps(rest, a, _mm256_castsi256_ps(kept));
}
inline float sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max(F a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline int32_t max(I a) {
  int32_t v[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(v), a);
  int32_t m = v[0];
  for (int i = 1; i < 8; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

struct Table {
  const float *t;
  explicit Table(const float *from) : t(from) {}
  F operator[](I index) const {
    return _mm256_i32gather_ps(t, _mm256_and_si256(index, _mm256_set1_epi32(31)), 4);
  }
};

inline F load_half(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
inline void store_half(uint16_t *p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_bfloat16(const uint16_t *p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
// Low halves of eight whole numbers in 0..65535.
inline __m128i low_halves(I x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
inline void store_bfloat16(uint16_t *p, F x) {
  const I bits = _mm256_castps_si256(x);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const I rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const F nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const F result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                    _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                   low_halves(_mm256_srli_epi32(_mm256_castps_si256(result), 16)));
}
inline void store_bytes(int8_t *p, I x) {
  const __m128i halves = low_halves(_mm256_and_si256(x, _mm256_set1_epi32(255)));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(p), _mm_packus_epi16(halves, halves));
}
inline F load_bytes(const uint8_t *p) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x));
}

template <typename From>
inline void widen(const From *from, A *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

inline void look_up(const uint8_t *from, A *to, int64_t n, const uint8_t *table, int) {
  for (int64_t i = 0; i < n; ++i) to[i] = table[from[i]];
}

struct Tiles {};

constexpr bool kHasGather = false;
inline void gather_bytes(const int8_t *, int64_t, const uint8_t *, const uint8_t *, int8_t *,
                         int64_t) {}

constexpr bool kHasInterleave = false;
inline void interleave_columns(const int8_t *, int64_t, int64_t, int64_t, int64_t, int8_t *,
                               int64_t, int32_t *) {}
inline void interleave_rows(const int8_t *, int64_t, int64_t, int64_t, int64_t, int8_t *) {}

inline int32_t sum_bytes(const A *p, int64_t n) {
  int32_t s = 0;
  for (int64_t i = 0; i < n; ++i) s += p[i];
  return s;
}

inline uint64_t spread(uint64_t word, int bits) {
  return _pdep_u64(word, ((uint64_t{1} << bits) - 1) * 0x0101010101010101ull);
}
inline uint64_t gather_bits(uint64_t bytes, int bits) {
  return _pext_u64(bytes, ((uint64_t{1} << bits) - 1) * 0x0101010101010101ull);
}

template <int MR, int NR>
void dot(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
         const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &) {
  __m256i acc[MR][NR];
#pragma GCC unroll 8
  for (int c = 0; c < NR; ++c) {
    const __m256i first = load(init + 8 * c);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) acc[r][c] = first;
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m256i w[NR];
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c)
      w[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b + 16 * c)));
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a + r * lda, 4);
      const __m256i x = _mm256_set1_epi32(pair);
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c)
        acc[r][c] = _mm256_add_epi32(acc[r][c], _mm256_madd_epi16(x, w[c]));
    }
    a += 2;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c)
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + r * ldo + 8 * c), acc[r][c]);
}

}  // namespace ERQ_VARIANT
}  // namespace erq
