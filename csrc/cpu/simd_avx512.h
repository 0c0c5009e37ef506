// Vectors with AVX-512. Names as in simd_plain.h; `dot` is in dot_vnni.h and dot_amx.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace erq {
namespace ERQ_VARIANT {

using F = __m512;
using I = __m512i;
using A = uint8_t;

constexpr int kW = 16, kNr = 4, kGroup = 4, kShift = 128;

inline F load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, F x) { _mm512_storeu_ps(p, x); }
inline I load(const int32_t *p) { return _mm512_loadu_si512(p); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline I set(int32_t x) { return _mm512_set1_epi32(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F round_even(F a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline I bits_of(F a) { return _mm512_castps_si512(a); }
inline F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float max(F a) { return _mm512_reduce_max_ps(a); }

struct Table {
  F low, high;
  explicit Table(const float *t) : low(_mm512_loadu_ps(t)), high(_mm512_loadu_ps(t + 16)) {}
  F operator[](I index) const { return _mm512_permutex2var_ps(low, index, high); }
};

inline F load_half(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline void store_half(uint16_t *p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_bfloat16(const uint16_t *p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline void store_bfloat16(uint16_t *p, F x) {
  const I bits = _mm512_castps_si512(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
inline void store_bytes(int8_t *p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(x));
}
inline F load_bytes(const uint8_t *p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(x));
}

// Codes as the first operand of `dot`: stored code + kShift.
inline void widen(const int8_t *from, A *to, int64_t n) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    _mm512_storeu_si512(to + i, _mm512_xor_si512(_mm512_loadu_si512(from + i), flip));
  const __mmask64 rest = (uint64_t{1} << (n - i)) - 1;
  _mm512_mask_storeu_epi8(to + i, rest,
                          _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, from + i), flip));
}

// to[i] = table[from[i]]; from and to have room for a whole vector at the end.
inline void look_up(const uint8_t *from, uint8_t *to, int64_t n, const uint8_t *table, int bits) {
  const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
  for (int64_t i = 0; i < n; i += 64) {
    const __m512i code = _mm512_loadu_si512(from + i);
    __m512i x;
    if (bits <= 6) {
      x = _mm512_permutexvar_epi8(code, t0);
    } else {
      x = _mm512_permutex2var_epi8(t0, code, t1);
      if (bits > 7)
        x = _mm512_mask_mov_epi8(x, _mm512_movepi8_mask(code),
                                 _mm512_permutex2var_epi8(t2, code, t3));
    }
    _mm512_storeu_si512(to + i, x);
  }
}

// to[i] = from[index of i]; `low` are the indices' low seven bits, `high` the others. from and to
// have room for whole vectors at the end; from holds at most 128 · 256 bytes.
constexpr bool kHasGather = true;
inline void gather_bytes(const int8_t *from, int64_t from_size, const uint8_t *low,
                         const uint8_t *high, int8_t *to, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    const __m512i index = _mm512_loadu_si512(low + i), part = _mm512_loadu_si512(high + i);
    __m512i x = _mm512_permutex2var_epi8(_mm512_loadu_si512(from), index,
                                         _mm512_loadu_si512(from + 64));
    for (int64_t j = 1; j * 128 < from_size; ++j) {
      const __m512i y = _mm512_permutex2var_epi8(_mm512_loadu_si512(from + j * 128), index,
                                                 _mm512_loadu_si512(from + j * 128 + 64));
      const __mmask64 here = _mm512_cmpeq_epi8_mask(part, _mm512_set1_epi8(static_cast<char>(j)));
      x = _mm512_mask_mov_epi8(x, here, y);
    }
    _mm512_storeu_si512(to + i, x);
  }
}

inline int32_t sum_bytes(const uint8_t *p, int64_t n) {
  __m512i s = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 m = n - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - i)) - 1;
    s = _mm512_add_epi64(s, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(m, p + i),
                                            _mm512_setzero_si512()));
  }
  return static_cast<int32_t>(_mm512_reduce_add_epi64(s));
}

inline uint64_t spread(uint64_t word, int bits) {
  return _pdep_u64(word, ((uint64_t{1} << bits) - 1) * 0x0101010101010101ull);
}
inline uint64_t gather_bits(uint64_t bytes, int bits) {
  return _pext_u64(bytes, ((uint64_t{1} << bits) - 1) * 0x0101010101010101ull);
}

}  // namespace ERQ_VARIANT
}  // namespace erq
