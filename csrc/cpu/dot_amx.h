// The integer dot product with AMX: tiles of 16 rows of 64 bytes.
#pragma once

namespace erq {
namespace ERQ_VARIANT {

constexpr int kMr = 32, kRowUnit = 16, kStep = 64, kTaskRows = 256, kScoreRows = 16, kTileColumns = 32;
// Tile products run beside vector instructions: an epilogue costs little in between.
constexpr bool kOverlaps = true;

// All eight tiles at their full size while one lives; the thread's tiles are free again after it.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles &) = delete;
  Tiles &operator=(const Tiles &) = delete;
};

// 16 · MR rows by 16 · NC columns, NC = 1 or 2: sums in tiles 0 to 3, rows in 4 and 5, columns in 6
// and 7. A stride of 0 loads `init` into every row.
template <int MR, int NC>
inline void dot_tiles(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
                      const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &meanwhile) {
  _tile_loadd(0, init, 0);
  if constexpr (NC == 2) _tile_loadd(1, init + 16, 0);
  if constexpr (MR == 2) _tile_loadd(2, init, 0);
  if constexpr (MR == 2 && NC == 2) _tile_loadd(3, init + 16, 0);
  for (int64_t g = 0; g < groups; g += 16) {
    const int8_t *columns = b + g * ldb;
    const A *rows = a + g * kGroup;
    _tile_loadd(6, columns, ldb);
    _tile_loadd(4, rows, lda);
    _tile_dpbusd(0, 4, 6);
    if constexpr (NC == 2) {
      _tile_loadd(7, columns + 64, ldb);
      _tile_dpbusd(1, 4, 7);
    }
    if constexpr (MR == 2) {
      _tile_loadd(5, rows + 16 * lda, lda);
      _tile_dpbusd(2, 5, 6);
      if constexpr (NC == 2) _tile_dpbusd(3, 5, 7);
    }
    meanwhile.step();
  }
  _tile_stored(0, out, ldo * 4);
  if constexpr (NC == 2) _tile_stored(1, out + 16, ldo * 4);
  if constexpr (MR == 2) _tile_stored(2, out + 16 * ldo, ldo * 4);
  if constexpr (MR == 2 && NC == 2) _tile_stored(3, out + 16 * ldo + 16, ldo * 4);
}

// 16 rows by 64 columns: sums in tiles 0 to 3, rows in 4, columns in 5 to 7.
inline void dot_row_of_tiles(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
                             const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &meanwhile) {
  _tile_loadd(0, init, 0);
  _tile_loadd(1, init + 16, 0);
  _tile_loadd(2, init + 32, 0);
  _tile_loadd(3, init + 48, 0);
  for (int64_t g = 0; g < groups; g += 16) {
    const int8_t *columns = b + g * ldb;
    _tile_loadd(4, a + g * kGroup, lda);
    _tile_loadd(5, columns, ldb);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, columns + 64, ldb);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, columns + 128, ldb);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, columns + 192, ldb);
    _tile_dpbusd(3, 4, 5);
    meanwhile.step();
  }
  _tile_stored(0, out, ldo * 4);
  _tile_stored(1, out + 16, ldo * 4);
  _tile_stored(2, out + 32, ldo * 4);
  _tile_stored(3, out + 48, ldo * 4);
}

// As in dot_vnni.h, but 16 · MR rows, all of which can be read and written.
template <int MR, int NR>
void dot(int64_t groups, const A *a, int64_t lda, const int8_t *b, int64_t ldb,
         const int32_t *init, int32_t *out, int64_t ldo, Meanwhile &meanwhile) {
  if constexpr (MR == 1 && NR == 4) {
    dot_row_of_tiles(groups, a, lda, b, ldb, init, out, ldo, meanwhile);
    return;
  }
  if constexpr (NR >= 2) dot_tiles<MR, 2>(groups, a, lda, b, ldb, init, out, ldo, meanwhile);
  if constexpr (NR == 4)
    dot_tiles<MR, 2>(groups, a, lda, b + 128, ldb, init + 32, out + 32, ldo, meanwhile);
  if constexpr (NR % 2)
    dot_tiles<MR, 1>(groups, a, lda, b + 64 * (NR - 1), ldb, init + 16 * (NR - 1),
                     out + 16 * (NR - 1), ldo, meanwhile);
}

}  // namespace ERQ_VARIANT
}  // namespace erq
