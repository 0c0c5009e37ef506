// The integer dot product with AVX-512 VNNI.
#pragma once

namespace erq {
namespace ERQ_VARIANT {

constexpr int kMr = 6, kRowUnit = 1, kStep = kGroup, kTaskRows = 48, kScoreRows = kMr, kTileColumns = kNr * kW;
constexpr bool kOverlaps = false;

struct Tiles {};

// out[r][c] = init[c] + Σ a[r][·] b[·][c] over `groups` groups of kGroup.
template <int MR, int NR>
void dot(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
         const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &) {
  __m512i acc[MR][NR];
#pragma GCC unroll 8
  for (int c = 0; c < NR; ++c) {
    const __m512i first = _mm512_loadu_si512(init + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) acc[r][c] = first;
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512i w[NR];
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) w[c] = _mm512_loadu_si512(b + 64 * c);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t word;
      __builtin_memcpy(&word, a + r * lda, 4);
      const __m512i x = _mm512_set1_epi32(word);
#pragma GCC unroll 8
      for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], x, w[c]);
    }
    a += 4;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < NR; ++c) _mm512_storeu_si512(out + r * ldo + 16 * c, acc[r][c]);
}

}  // namespace ERQ_VARIANT
}  // namespace erq
