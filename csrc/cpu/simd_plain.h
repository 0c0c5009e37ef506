// The vectors that kernels are written on, in plain C++ for any processor.
//
// F and I hold kW floats and int32; A is what the first operand of `dot` is widened to: the stored
// code + kShift. `dot` multiplies kGroup neighbours at once, for up to kMr rows and kNr vectors of
// columns; its rows are a multiple of kRowUnit, its length one of kStep, by way of padding. It works
// while a `Tiles` of the thread lives, and where kOverlaps does steps of a Meanwhile in between.
// GEMMs cut their results into tiles of kMr rows and kTileColumns.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace erq {
namespace ERQ_VARIANT {

constexpr int kW = 8, kMr = 4, kNr = 2, kGroup = 1, kShift = 0;
constexpr int kRowUnit = 1, kStep = kGroup, kTaskRows = 48, kScoreRows = kMr, kTileColumns = kNr * kW;
constexpr bool kOverlaps = false;
using A = int16_t;

struct F {
  float v[kW];
};
struct I {
  int32_t v[kW];
};

template <typename T, typename Op>
inline T each(Op op) {
  T r;
  for (int i = 0; i < kW; ++i) r.v[i] = op(i);
  return r;
}

inline F load(const float *p) {
  return each<F>([&](int i) { return p[i]; });
}
inline void store(float *p, F x) { memcpy(p, x.v, sizeof x.v); }
inline I load(const int32_t *p) {
  return each<I>([&](int i) { return p[i]; });
}
inline F set(float x) {
  return each<F>([&](int) { return x; });
}
inline I set(int32_t x) {
  return each<I>([&](int) { return x; });
}
inline F add(F a, F b) {
  return each<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I add(I a, I b) {
  return each<I>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I max(I a, I b) {
  return each<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F sub(F a, F b) {
  return each<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return each<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F fma(F a, F b, F c) { return add(mul(a, b), c); }
inline F fnma(F a, F b, F c) { return sub(c, mul(a, b)); }
// Of two operands of which one is NaN, the second, as x86 has it.
inline F min(F a, F b) {
  return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F max(F a, F b) {
  return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F abs(F a) {
  return each<F>([&](int i) { return fabsf(a.v[i]); });
}
inline F to_float(I a) {
  return each<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
inline I to_int(F a) {
  return each<I>([&](int i) { return static_cast<int32_t>(nearbyintf(a.v[i])); });
}
inline I bits_of(F a) {
  I r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
// a · 2^n by the low bits of n; the result must be a normal number.
inline F scale2(F a, I n) {
  I r = bits_of(a);
  for (int i = 0; i < kW; ++i)
    r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(r.v[i]) + (static_cast<uint32_t>(n.v[i]) << 23));
  F y;
  memcpy(y.v, r.v, sizeof y.v);
  return y;
}
// The first n of a, then those of rest.
inline F first_of(F a, int64_t n, F rest) {
  return each<F>([&](int i) { return i < n ? a.v[i] : rest.v[i]; });
}
inline float sum(F a) {
  float s = 0.0f;
  for (int i = 0; i < kW; ++i) s += a.v[i];
  return s;
}
inline float max(F a) {
  float m = a.v[0];
  for (int i = 1; i < kW; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline int32_t max(I a) {
  int32_t m = a.v[0];
  for (int i = 1; i < kW; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
// Looks index mod 32 up.
struct Table {
  const float *t;
  explicit Table(const float *from) : t(from) {}
  F operator[](I index) const {
    return each<F>([&](int i) { return t[index.v[i] & 31]; });
  }
};

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return as_float(sign | ((rest << 13) + (112u << 23)));
  return as_float(sign | as_bits(static_cast<float>(rest) * 0x1p-24f));
}
inline uint16_t float_to_half(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000;
  const float a = fabsf(x);
  if (a != a) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // Below 2^-14 halves are multiples of 2^-24.
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(a * 0x1p24f)));
  const uint32_t bits = as_bits(a), rounded = bits + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
inline F load_half(const uint16_t *p) {
  return each<F>([&](int i) { return half_to_float(p[i]); });
}
inline void store_half(uint16_t *p, F x) {
  for (int i = 0; i < kW; ++i) p[i] = float_to_half(x.v[i]);
}
inline F load_bfloat16(const uint16_t *p) {
  return each<F>([&](int i) { return as_float(uint32_t{p[i]} << 16); });
}
inline void store_bfloat16(uint16_t *p, F x) {
  for (int i = 0; i < kW; ++i) {
    const uint32_t bits = as_bits(x.v[i]);
    const bool nan = x.v[i] != x.v[i];
    p[i] = static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
// Low bytes.
inline void store_bytes(int8_t *p, I x) {
  for (int i = 0; i < kW; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
inline F load_bytes(const uint8_t *p) {
  return each<F>([&](int i) { return static_cast<float>(p[i]); });
}

template <typename From>
inline void widen(const From *from, A *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// to[i] = table[from[i]], `bits` of which count.
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

// The i-th group of `bits` bits of a word as its i-th byte, eight of them.
inline uint64_t spread(uint64_t word, int bits) {
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out |= (word >> (i * bits) & ((1u << bits) - 1)) << (8 * i);
  return out;
}
// And back.
inline uint64_t gather_bits(uint64_t bytes, int bits) {
  uint64_t out = 0;
  for (int i = 0; i < 8; ++i) out |= (bytes >> (8 * i) & ((1u << bits) - 1)) << (i * bits);
  return out;
}

// out[r][c] = init[c] + Σ a[r][·] b[·][c] over `groups` groups of kGroup; `ldb` bytes from group to
// group.
template <int MR, int NR>
void dot(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
         const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &) {
  int32_t acc[MR][NR * kW];
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NR * kW; ++c) acc[r][c] = init[c];
  for (int64_t g = 0; g < groups; ++g, b += ldb)
    for (int r = 0; r < MR; ++r)
      for (int c = 0; c < NR * kW; ++c) acc[r][c] += a[r * lda + g] * b[c];
  for (int r = 0; r < MR; ++r) memcpy(out + r * ldo, acc[r], sizeof acc[r]);
}

}  // namespace ERQ_VARIANT
}  // namespace erq
