// qlinear: integer GEMM over two K segments with its whole epilogue, 4-bit or 8-bit operands.
//
// Both widths are one kernel: mma.m16n8k64 on 4-bit values and mma.m16n8k32 on 8-bit ones read the
// same bytes into the same registers, 32 bytes of K at a time. All of K is counted in bytes here.
//
// Grid: one block per output tile kM x kN, in columns of kGroup tiles of M, so that neighbours meet
// in L2. A block: kWarpsM x kWarpsN warps that share the tile; a pipeline of kStages tiles of 64
// bytes of K, filled by cp.async; then, 16 rows of a warp at a time, the sums go through shared
// memory so that a lane finishes 4 neighbouring columns and stores them at once.
//
// Shared memory: a tile row is four 16-byte pieces; piece c of row r lies at c ^ (r / 2 % 4). Eight
// rows of one piece, which is what ldmatrix reads at a time, and the two whole rows that eight
// cp.async write, then cover all 32 banks once. The sums' rows are 8 words more than a multiple of 32
// apart: four rows of eight words, one 8-byte store of half a warp, cover all banks, and a 16-byte
// load of eight lanes is 32 words in a row.
//
// Offsets: 4-bit weights of a row are stored as weight - offset where the weights do not fit -8..7;
// sum(x * (w + offset)) = sum(x * w) + offset * sum(x). The row sums of x come from one more mma by
// ones per 16 rows, shared among the warps that have those rows. Everything is exact in int32.
#pragma once

#include "device.cuh"
#include "epilogue.cuh"
#include "erq_cuda.h"

namespace erq {

constexpr int kTileBytes = 64;  // of K in a pipeline stage
constexpr int kStepBytes = 32;  // of K in an mma
constexpr int kGroup = 8;
struct QlinearParams {
  erq_cuda_qlinear_args a;
  int tiles_m, tiles_n;
  int k_bytes, split_bytes;
  Alignment aligned;
};

template <bool FourBit_, int BM_, int BN_, int WarpsM_, int WarpsN_, int Stages_, int Blocks_,
          bool Dual_, bool Offset_>
struct Tile {
  static constexpr bool kFourBit = FourBit_, kDual = Dual_, kOffset = Offset_;
  static constexpr int kM = BM_, kN = BN_, kWarpsM = WarpsM_, kWarpsN = WarpsN_;
  static constexpr int kStages = Stages_, kBlocks = Blocks_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kCopyRows = kThreads / 4;  // that all threads copy at a time
  static constexpr int kWarpN = kN / kWarpsN;
  static constexpr int kMmaM = kM / kWarpsM / 16, kMmaN = kWarpN / 8;
  static constexpr int kSegments = kDual ? 2 : 1;
  static constexpr int kStageBytes = (kM + kN) * kTileBytes;
  static constexpr int kSumStride = kWarpN + 8;      // words
  static constexpr int kWarpSums = 16 * kSumStride;  // words, per segment
  static constexpr int kRowLanes = kWarpN / 4;       // that finish a row of a warp
  // Of its 16-row parts, those whose sums of x a warp takes.
  static constexpr int kSumParts = (kMmaM + kWarpsN - 1) / kWarpsN;
  static constexpr int kSumBytes = kThreads / 32 * kSegments * kWarpSums * 4;
  static constexpr int kEndBytes = kSumBytes + (kOffset ? kSegments * kM * 4 : 0);
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kEndBytes ? kStages * kStageBytes : kEndBytes;
  static_assert(kN == kWarpsN * kMmaN * 8 && kM == kWarpsM * kMmaM * 16, "warps cover the tile");
  static_assert(kMmaN % 2 == 0 && 32 % kRowLanes == 0, "whole ldmatrix, whole rows");
  static_assert(kM % kCopyRows == 0 && kN % kCopyRows == 0, "whole rounds of copies");
  static_assert(kCopyRows % 8 == 0, "the swizzle repeats");
  static_assert(kMmaM % kSumParts == 0, "a warp takes all of its row sums or none");
};

ERQ_DEVICE int swizzle(int row, int piece) {
  if (ERQ_FAULT(kSwizzle)) return row * kTileBytes + piece * 16;
  return row * kTileBytes + ((piece ^ (row >> 1 & 3)) << 4);
}

template <class T>
struct QlinearBlock {
  const QlinearParams &p;
  char *memory;
  int thread, lane, warp_m, warp_n;
  int row0, col0;      // of the block's tile
  int tiles1, tiles;   // pipeline tiles of the first segment, of both
  uint32_t x_rows[T::kM / T::kCopyRows], weight_rows[T::kN / T::kCopyRows];
  int32_t acc[T::kSegments][T::kMmaM][T::kMmaN][4];
  int32_t sums[T::kSegments][T::kSumParts][4];  // of x, over parts kSumParts * warp_n + 0, 1, ...

  ERQ_DEVICE explicit QlinearBlock(const QlinearParams &params) : p(params) {
    memory = shared_memory();
    thread = thread_index();
    lane = thread % 32;
    warp_m = thread / 32 / T::kWarpsN;
    warp_n = thread / 32 % T::kWarpsN;
    const int per_group = kGroup * p.tiles_n;
    const int top = block_index() / per_group * kGroup;
    const int height = p.tiles_m - top < kGroup ? p.tiles_m - top : kGroup;
    const int within = block_index() % per_group;
    row0 = (top + within % height) * T::kM;
    col0 = within / height * T::kN;
    find_rows<T::kM>(x_rows, p.a.x_stride, row0, p.a.m);
    find_rows<T::kN>(weight_rows, p.a.weight_stride, col0, p.a.n);
    tiles1 = (p.split_bytes + kTileBytes - 1) / kTileBytes;
    tiles = tiles1 + (p.k_bytes - p.split_bytes + kTileBytes - 1) / kTileBytes;
  }

  // First byte of K of a pipeline tile, and where its segment ends.
  ERQ_DEVICE int tile_begin(int tile) const {
    if (!T::kDual || tile < tiles1) return tile * kTileBytes;
    return p.split_bytes + (tile - tiles1) * kTileBytes;
  }
  ERQ_DEVICE int tile_end(int tile) const {
    return !T::kDual || tile >= tiles1 ? p.k_bytes : p.split_bytes;
  }

  // Where this thread's copies of a tile begin, relative to the tile's first row. Rows over the edge
  // repeat the last real one: in bounds, and never stored.
  template <int Rows>
  ERQ_DEVICE void find_rows(uint32_t (&offset)[Rows / T::kCopyRows], int64_t stride, int first,
                            int count) const {
    ERQ_UNROLL
    for (int i = 0; i < Rows / T::kCopyRows; ++i) {
      const int row = thread / 4 + i * T::kCopyRows;
      const int real = first + row < count ? row : count - 1 - first;
      offset[i] = static_cast<uint32_t>(stride) * real + thread % 4 * 16;
    }
  }

  template <int Rows>
  ERQ_DEVICE void load_rows(char *to, const void *from, int64_t stride, int first, int begin,
                            bool inside, const uint32_t (&offset)[Rows / T::kCopyRows]) const {
    const char *base = static_cast<const char *>(from) + first * stride;  // the block's
    if (inside) base += begin;  // nothing is read otherwise, but nothing may point beyond the end
    to += swizzle(thread / 4, thread % 4);
    ERQ_UNROLL
    for (int i = 0; i < Rows / T::kCopyRows; ++i)
      // The swizzle repeats every 8 rows.
      cp_async_16(to + i * T::kCopyRows * kTileBytes, base + offset[i], inside);
  }

  ERQ_DEVICE void load_tile(int tile) {
    if (tile < tiles) {
      char *to = memory + tile % T::kStages * T::kStageBytes;
      const int begin = tile_begin(tile);
      const bool inside = begin + thread % 4 * 16 < tile_end(tile);
      load_rows<T::kM>(to, p.a.x, p.a.x_stride, row0, begin, inside, x_rows);
      load_rows<T::kN>(to + T::kM * kTileBytes, p.a.weight, p.a.weight_stride, col0, begin, inside,
                       weight_rows);
    }
    cp_async_commit();  // an empty group too: the waits count groups
  }

  static ERQ_DEVICE void multiply(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (T::kFourBit)
      mma_u4_s4(d, a, b);
    else
      mma_s8_s8(d, a, b);
  }

  ERQ_DEVICE bool takes_row_sums() const { return warp_n * T::kSumParts < T::kMmaM; }

  template <int Segment>
  ERQ_DEVICE void multiply_tile(int tile) {
    const char *a_tile = memory + tile % T::kStages * T::kStageBytes;
    const char *b_tile = a_tile + T::kM * kTileBytes;
    const int valid = tile_end(tile) - tile_begin(tile);
    ERQ_UNROLL
    for (int step = 0; step < kTileBytes / kStepBytes; ++step) {
      if (step * kStepBytes >= valid) break;
      uint32_t a[T::kMmaM][4];
      ERQ_UNROLL
      for (int i = 0; i < T::kMmaM; ++i) {
        // Matrices: upper rows, lower rows of the first 16 bytes, then of the next 16.
        const int row = (warp_m * T::kMmaM + i) * 16 + lane % 16;
        ldmatrix_x4(a[i], a_tile + swizzle(row, step * 2 + lane / 16));
        if (ERQ_FAULT(kFragment)) {
          const uint32_t other = a[i][1];
          a[i][1] = a[i][2];
          a[i][2] = other;
        }
      }
      ERQ_UNROLL
      for (int j = 0; j < T::kMmaN; j += 2) {
        // Matrices: both 16-byte pieces of 8 columns, then of the next 8.
        uint32_t b[4];
        const int column = warp_n * T::kWarpN + j * 8 + lane % 8 + lane / 16 * 8;
        ldmatrix_x4(b, b_tile + swizzle(column, step * 2 + lane / 8 % 2));
        const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
        ERQ_UNROLL
        for (int i = 0; i < T::kMmaM; ++i) {
          multiply(acc[Segment][i][j], a[i], left);
          multiply(acc[Segment][i][j + 1], a[i], right);
        }
      }
      if constexpr (T::kOffset) {
        const uint32_t ones[2] = {0x11111111u, 0x11111111u};
        if (takes_row_sums()) {
          ERQ_UNROLL
          for (int part = 0; part < T::kSumParts; ++part) {
            uint32_t mine[4];
            ERQ_UNROLL
            for (int e = 0; e < 4; ++e) {
              mine[e] = a[part][e];
              ERQ_UNROLL
              for (int i = part + T::kSumParts; i < T::kMmaM; i += T::kSumParts)
                mine[e] = select(i == T::kSumParts * warp_n + part, a[i][e], mine[e]);
            }
            multiply(sums[Segment][part], mine, ones);
          }
        }
      }
    }
  }

  template <int Segment>
  ERQ_DEVICE void run_tiles(int first, int last) {
    for (int tile = first; tile < last; ++tile) {
      // This tile has landed, and everyone is done with the one whose place the next one takes.
      if (ERQ_FAULT(kPipeline))
        cp_async_wait<T::kStages - 1>();
      else
        cp_async_wait<T::kStages - 2>();
      if (!ERQ_FAULT(kBarrier)) barrier();
      load_tile(tile + T::kStages - 1);
      multiply_tile<Segment>(tile);
    }
  }

  ERQ_DEVICE void run() {
    ERQ_UNROLL
    for (int s = 0; s < T::kSegments; ++s) {
      ERQ_UNROLL
      for (int part = 0; part < T::kSumParts; ++part)
        ERQ_UNROLL
        for (int e = 0; e < 4; ++e) sums[s][part][e] = 0;
      ERQ_UNROLL
      for (int i = 0; i < T::kMmaM; ++i)
        ERQ_UNROLL
        for (int j = 0; j < T::kMmaN; ++j)
          ERQ_UNROLL
          for (int e = 0; e < 4; ++e) acc[s][i][j][e] = 0;
    }
    ERQ_UNROLL
    for (int s = 0; s < T::kStages - 1; ++s) load_tile(s);
    run_tiles<0>(0, tiles1);
    if constexpr (T::kDual) run_tiles<1>(tiles1, tiles);
    cp_async_wait<0>();
    barrier();  // the tiles' memory is free
    finish();
  }

  ERQ_DEVICE int32_t *row_sums(int segment) const {
    return reinterpret_cast<int32_t *>(memory + T::kSumBytes) + segment * T::kM;
  }

  ERQ_DEVICE void store_row_sums() {
    if (takes_row_sums() && lane % 4 == 0) {
      ERQ_UNROLL
      for (int part = 0; part < T::kSumParts; ++part) {
        const int row = (warp_m * T::kMmaM + warp_n * T::kSumParts + part) * 16 + lane / 4;
        ERQ_UNROLL
        for (int s = 0; s < T::kSegments; ++s) {
          store_shared(row_sums(s) + row, sums[s][part][0]);
          store_shared(row_sums(s) + row + 8, sums[s][part][2]);
        }
      }
    }
    barrier();
  }

  // Sums of 16 rows from the mma's registers into this warp's part of shared memory.
  ERQ_DEVICE void spread(const int32_t (&tile)[T::kMmaN][4], int32_t *to) {
    ERQ_UNROLL
    for (int j = 0; j < T::kMmaN; ++j) {
      int32_t *at = to + lane / 4 * T::kSumStride + j * 8 + lane % 4 * 2;
      store_shared(reinterpret_cast<int2 *>(at), make_int2(tile[j][0], tile[j][1]));
      store_shared(reinterpret_cast<int2 *>(at + 8 * T::kSumStride),
                   make_int2(tile[j][2], tile[j][3]));
    }
  }

  ERQ_DEVICE void finish() {
    if constexpr (T::kOffset) store_row_sums();
    int32_t *sum = reinterpret_cast<int32_t *>(memory) +
                   thread / 32 * (T::kSegments * T::kWarpSums);
    const int column = col0 + warp_n * T::kWarpN + lane % T::kRowLanes * 4;
    ERQ_NO_UNROLL
    for (int i = 0; i < T::kMmaM; ++i) {
      warp_barrier();  // the rows before have been read
      ERQ_UNROLL
      for (int chosen = 0; chosen < T::kMmaM; ++chosen) {
        if (chosen != i) continue;  // registers have no index at run time
        ERQ_UNROLL
        for (int s = 0; s < T::kSegments; ++s) spread(acc[s][chosen], sum + s * T::kWarpSums);
      }
      warp_barrier();
      // Read again for every 16 rows: the registers are needed by the sums that wait.
      Columns<T::kDual, T::kOffset> columns;
      columns.load(p.a, p.aligned, column);
      ERQ_NO_UNROLL
      for (int r = lane / T::kRowLanes; r < 16; r += 32 / T::kRowLanes) {
        const int row = (warp_m * T::kMmaM + i) * 16 + r;
        const int32_t *at = sum + r * T::kSumStride + lane % T::kRowLanes * 4;
        int4 first = load_shared(reinterpret_cast<const int4 *>(at));
        int4 second = make_int4(0, 0, 0, 0);
        if constexpr (T::kDual)
          second = load_shared(reinterpret_cast<const int4 *>(at + T::kWarpSums));
        if constexpr (T::kOffset) {
          columns.add_offset(first, load_shared(row_sums(0) + row), 0);
          if constexpr (T::kDual) columns.add_offset(second, load_shared(row_sums(1) + row), 1);
        }
        if (row0 + row < p.a.m)
          finish_row(p.a, p.aligned, columns, row0 + row, column, first, second);
      }
    }
  }
};

// The second parameter is for bench/static_cuda.py, which reads it from the kernel's name.
template <class T, int SharedBytes = T::kSharedBytes>
ERQ_KERNEL(T::kThreads, T::kBlocks) qlinear_kernel(ERQ_PARAMS QlinearParams p) {
  QlinearBlock<T>(p).run();
}

struct TileSize {
  int m, n;
};

// Largest first.
constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {64, 64}, {32, 64}};
constexpr int kTileCount = 4;

template <bool FourBit, bool Dual, bool Offset>
const char *launch_tile(int tile, const QlinearParams &p, void *stream) {
  const int grid = p.tiles_m * p.tiles_n;
  switch (tile) {
    case 0:
      if constexpr (Dual) return "the 128x128 tile has no room for the sums of two segments";
      else {
        using T = Tile<FourBit, 128, 128, 2, 2, 3, 2, false, Offset>;
        return launch(qlinear_kernel<T>, {grid}, T::kThreads, T::kSharedBytes, stream, p);
      }
    case 1: {
      using T = Tile<FourBit, 64, 128, 2, 2, 4, 2, Dual, Offset>;
      return launch(qlinear_kernel<T>, {grid}, T::kThreads, T::kSharedBytes, stream, p);
    }
    case 2: {
      using T = Tile<FourBit, 64, 64, 2, 2, 4, 3, Dual, Offset>;
      return launch(qlinear_kernel<T>, {grid}, T::kThreads, T::kSharedBytes, stream, p);
    }
    default: {
      using T = Tile<FourBit, 32, 64, 2, 2, 4, 4, Dual, Offset>;
      return launch(qlinear_kernel<T>, {grid}, T::kThreads, T::kSharedBytes, stream, p);
    }
  }
}

// Defined in qlinear_s4.cu and qlinear_s8.cu, which compile side by side.
const char *launch_s4(int tile, const QlinearParams &p, void *stream);
const char *launch_s8(int tile, const QlinearParams &p, void *stream);

}  // namespace erq
