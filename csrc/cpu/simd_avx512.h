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
inline I max(I a, I b) { return _mm512_max_epi32(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline I bits_of(F a) { return _mm512_castps_si512(a); }
inline F scale2(F a, I n) {
  return _mm512_castsi512_ps(_mm512_add_epi32(bits_of(a), _mm512_slli_epi32(n, 23)));
}
inline F first_of(F a, int64_t n, F rest) {
  return _mm512_mask_mov_ps(rest, static_cast<__mmask16>((1u << n) - 1), a);
}
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline float max(F a) { return _mm512_reduce_max_ps(a); }
inline int32_t max(I a) { return _mm512_reduce_max_epi32(a); }

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

// Columns of a panel from 16 rows of `from`, [count, k]: each four bytes of a row become a group,
// groups `ldb` bytes apart; zeros for missing rows and up to `groups`. Adds each row's sum to `sums`.
constexpr bool kHasInterleave = true;
inline void interleave_columns(const int8_t *from, int64_t stride, int64_t count, int64_t k,
                               int64_t groups, int8_t *to, int64_t ldb, int32_t *sums) {
  __m512i total = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; g += 16) {
    const int64_t bytes = k - 4 * g;
    const __mmask64 mask = bytes >= 64 ? ~uint64_t{0} : bytes > 0 ? (uint64_t{1} << bytes) - 1 : 0;
    __m512i x[16], y[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      x[r] = r < count ? _mm512_maskz_loadu_epi8(mask, from + r * stride + 4 * g)
                       : _mm512_setzero_si512();
    // A transposition of 16 × 16 words: pairs, fours, then 128-bit lanes.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
      y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
      x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
      x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
      x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
      y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
      y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
      y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
      x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
      x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
      x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      if (g + j >= groups) break;
      _mm512_storeu_si512(to + (g + j) * ldb, x[j]);
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), x[j]);
    }
  }
  _mm512_storeu_si512(sums, _mm512_add_epi32(total, _mm512_loadu_si512(sums)));
}

// A group of 64 columns from the rows x[0] to x[3], each less `shift`.
inline void interleave_rows(const int8_t *from, int64_t stride, int64_t rows, int64_t columns,
                            int64_t shift, int8_t *to) {
  const __mmask64 mask = columns >= 64 ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
  const __m512i less = _mm512_set1_epi8(static_cast<char>(shift));
  // Lane i takes columns 4i, 16 + 4i, 32 + 4i and 48 + 4i, so that neighbours meet below.
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_setzero_si512();
    if (i >= rows) continue;
    const __m512i row = _mm512_sub_epi8(_mm512_maskz_loadu_epi8(mask, from + i * stride), less);
    x[i] = _mm512_permutexvar_epi32(order, _mm512_maskz_mov_epi8(mask, row));
  }
  const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, c));
  _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(a, c));
  _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(b, d));
  _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(b, d));
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
