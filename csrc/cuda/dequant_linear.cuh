// dequant_linear: x W^T + bias for few rows of x, W read once from its packed codes of 2..8 bits.
//
// Grid: (16 rows of W, 8 or 64 rows of x, a part of K). The four warps of a block share its outputs
// and cut its part of K: step s of K belongs to warp s mod 4 of part s / 4 mod splits, and of a step
// each lane of a group of four has a unit of 128 codes, or of 32 where K is too short to give every
// warp a step of 512. A lane reads its unit of rows g and g + 8 of W, 16 bytes at a time (units of 32
// of odd widths: 8 or 4), and the same columns of row g of x. The product does not care for the order
// of K, so four neighbouring codes of each lane are one mma.m16n8k16 (W is its A, x its B): nothing
// passes through shared memory or between lanes before the end, where the warps' sums are added in a
// fixed order. Parts of K meet in global memory: every block publishes its sums, and the last of a
// tile to do so adds them in the order of K, so the result does not depend on which one it was.
//
// Codes become 16-bit floats by bits: fp16 holds 1024 + code as 0x6400 | code, fp32 holds
// 2^23 + code as 0x4B000000 | code; then code - zero_point is one subtraction, exact, as is its 16-bit
// form for |code - zero_point| <= 256 (int8 of a deployed layer). Scales multiply the fp32 sums, one
// sum per scale. fp32 x is cut into three bf16 values that add up to it exactly, so its products are
// exact too.
#pragma once

#include "device.cuh"
#include "erq_cuda.h"
#include "vectors.cuh"

namespace erq {

constexpr int kUnitGroups = 4;  // of 32 codes, `bits` words each
constexpr int kUnit = 32 * kUnitGroups;
constexpr int kShortStep = 4 * 32, kLongStep = 4 * kUnit;  // columns of a warp
constexpr int kMostSplits = 1024;
constexpr int kDequantWarps = 4;
constexpr int kDequantThreads = 32 * kDequantWarps;
constexpr int kDequantRows = 16;  // of W
constexpr int kPartStride = kDequantRows + 4;  // words; see `finish`

struct DequantParams {
  erq_cuda_dequant_linear_args a;
  int groups;  // in a lane's unit: 1, or kUnitGroups, then K is a multiple of kUnit
  bool vectors, out;  // 4 neighbours of a vector, or of the result, are one access
};

struct F16 {
  static constexpr int kType = ERQ_F16, kParts = 1, kBytes = 2;
};
struct Bf16 {
  static constexpr int kType = ERQ_BF16, kParts = 1, kBytes = 2;
};
struct F32 {
  static constexpr int kType = ERQ_F32, kParts = 3, kBytes = 4;
};

template <int Bits, class X, int Tiles>
struct DequantBlock {
  static constexpr int kWords = kUnitGroups * Bits;
  static constexpr int kSharedBytes = 2 * kDequantWarps * Tiles * 8 * kPartStride * 4;

  const DequantParams &p;
  char *memory;
  int warp, group, in_group;  // lane = 4 group + in_group
  int n0, m0, part_of_k;
  uint32_t zero[2][2];  // what turns codes of row 8 h + group into numbers, of both quantizers
  float acc[Tiles][4], acc2[Tiles][4];

  ERQ_DEVICE explicit DequantBlock(const DequantParams &params) : p(params) {
    memory = shared_memory();
    warp = thread_index() / 32;
    group = thread_index() % 32 / 4;
    in_group = thread_index() % 4;
    n0 = block_index() * kDequantRows;
    m0 = block_index_y() * Tiles * 8;
    part_of_k = block_index_z();
    ERQ_UNROLL
    for (int i = 0; i < Tiles; ++i)
      ERQ_UNROLL
      for (int e = 0; e < 4; ++e) acc[i][e] = acc2[i][e] = 0.0f;
  }

  ERQ_DEVICE bool is_dual() const { return p.a.scale2 != nullptr; }
  ERQ_DEVICE uint32_t *outliers() const { return reinterpret_cast<uint32_t *>(memory); }

  // A bit per column of K that has the second scale.
  ERQ_DEVICE void mark_outliers() {
    for (int word = thread_index(); word < p.a.k / 32; word += kDequantThreads) {
      uint32_t bits = 0;
      for (int i = 0; i < p.a.n_columns; ++i) {
        const int column = static_cast<int>(load_global(p.a.columns + i));
        if (column >> 5 == word) bits |= 1u << (column & 31);
      }
      store_shared(outliers() + word, bits);
    }
    barrier();
  }

  static ERQ_DEVICE uint32_t describe_zero(int32_t zero_point) {
    if constexpr (X::kType == ERQ_F16) {
      const uint32_t half = float_to_half(static_cast<float>(1024 + zero_point));
      return half | half << 16;
    }
    return as_bits(static_cast<float>(8388608 + zero_point));
  }

  ERQ_DEVICE void load_zeros() {
    ERQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int n = n0 + 8 * h + group;
      const bool real = n < p.a.n;
      zero[0][h] = describe_zero(real ? load_global(p.a.zero_point + n) : 0);
      zero[1][h] = describe_zero(real && is_dual() ? load_global(p.a.zero_point2 + n) : 0);
    }
  }

  // The words of a unit of row n; 0 beyond the edges.
  ERQ_DEVICE void load_codes(uint32_t (&w)[kWords], int n, int unit) const {
    ERQ_UNROLL
    for (int i = 0; i < kWords; ++i) w[i] = 0;
    if (n >= p.a.n || unit * p.groups * 32 >= p.a.k) return;
    const uint32_t *from = static_cast<const uint32_t *>(p.a.packed) +
                           (static_cast<int64_t>(n) * (p.a.k / 32) + unit * p.groups) * Bits;
    if (p.groups == kUnitGroups)
      load_words<kWords>(w, from);
    else
      load_words<Bits>(w, from);
  }

  // `Count` words that begin at a multiple of `Count` words.
  template <int Count>
  static ERQ_DEVICE void load_words(uint32_t (&w)[kWords], const uint32_t *from) {
    ERQ_UNROLL
    for (int i = 0; i < Count; i += Count % 4 == 0 ? 4 : Count % 2 == 0 ? 2 : 1) {
      if constexpr (Count % 4 == 0) {
        const uint4 v = load_global(reinterpret_cast<const uint4 *>(from + i));
        w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
      } else if constexpr (Count % 2 == 0) {
        const uint2 v = load_global(reinterpret_cast<const uint2 *>(from + i));
        w[i] = v.x, w[i + 1] = v.y;
      } else {
        w[i] = load_global(from + i);
      }
    }
  }

  template <int I>
  static ERQ_DEVICE uint32_t code(const uint32_t (&w)[kWords]) {
    constexpr int kBit = I * Bits, kWord = kBit / 32, kShift = kBit % 32;
    constexpr uint32_t kMask = (1u << Bits) - 1;
    if constexpr (kShift + Bits <= 32)
      return w[kWord] >> kShift & kMask;
    else
      return funnel_shift(w[kWord], w[kWord + 1], kShift) & kMask;
  }

  // Two codes as 16-bit floats, minus the zero point.
  static ERQ_DEVICE uint32_t decode(uint32_t low, uint32_t high, uint32_t zero) {
    if constexpr (X::kType == ERQ_F16) {
      return subtract_half2(0x64006400u | low | high << 16, zero);
    } else {
      const float shift = as_float(zero);
      const uint32_t a = float_to_bfloat16(as_float(0x4B000000u | low) - shift);
      const uint32_t b = float_to_bfloat16(as_float(0x4B000000u | high) - shift);
      return a | b << 16;
    }
  }

  // 8 neighbours of a row of x as 16-bit pairs, each cut into kParts terms.
  static ERQ_DEVICE void load_x(uint32_t (&pairs)[X::kParts][4], const char *from, bool valid) {
    if constexpr (X::kType != ERQ_F32) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (valid) v = load_global(reinterpret_cast<const uint4 *>(from));
      pairs[0][0] = v.x, pairs[0][1] = v.y, pairs[0][2] = v.z, pairs[0][3] = v.w;
    } else {
      float4 v[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
      if (valid) {
        v[0] = load_global(reinterpret_cast<const float4 *>(from));
        v[1] = load_global(reinterpret_cast<const float4 *>(from) + 1);
      }
      float rest[8] = {v[0].x, v[0].y, v[0].z, v[0].w, v[1].x, v[1].y, v[1].z, v[1].w};
      ERQ_UNROLL
      for (int part = 0; part < X::kParts; ++part)
        ERQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          // The upper 16 bits of fp32 are bf16; what they leave has 8 bits less, three times over.
          const uint32_t low = as_bits(rest[2 * i]), high = as_bits(rest[2 * i + 1]);
          pairs[part][i] = low >> 16 | (high & 0xFFFF0000u);
          rest[2 * i] -= as_float(low & 0xFFFF0000u);
          rest[2 * i + 1] -= as_float(high & 0xFFFF0000u);
        }
    }
  }

  static ERQ_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (X::kType == ERQ_F16)
      mma_f16(d, a, b0, b1);
    else
      mma_bf16(d, a, b0, b1);
  }

  // A of one mma: codes 4 Step .. 4 Step + 3 of both rows.
  template <int Step>
  ERQ_DEVICE void decode_step(uint32_t (&a)[4], const uint32_t (&w)[2][kWords], int which) const {
    ERQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      a[h] = decode(code<4 * Step>(w[h]), code<4 * Step + 1>(w[h]), zero[which][h]);
      a[h + 2] = decode(code<4 * Step + 2>(w[h]), code<4 * Step + 3>(w[h]), zero[which][h]);
    }
  }

  static ERQ_DEVICE uint32_t both_halves(uint32_t two_bits) {
    return (two_bits & 1 ? 0xFFFFu : 0) | (two_bits & 2 ? 0xFFFF0000u : 0);
  }

  // Codes 8 Octet .. 8 Octet + 7 of the 32 that begin at column `k0`, for every row of x.
  template <int Octet>
  ERQ_DEVICE void multiply_octet(const uint32_t (&w)[2][kWords], uint32_t marks, bool has_outliers,
                                 int k0) {
    uint32_t a[2][4], a2[2][4];
    decode_step<2 * Octet>(a[0], w, 0);
    decode_step<2 * Octet + 1>(a[1], w, 0);
    if (has_outliers) {
      decode_step<2 * Octet>(a2[0], w, 1);
      decode_step<2 * Octet + 1>(a2[1], w, 1);
      ERQ_UNROLL
      for (int s = 0; s < 2; ++s)
        ERQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t mark = both_halves(marks >> (Octet * 8 + s * 4 + i / 2 * 2));
          a[s][i] &= ~mark;
          a2[s][i] &= mark;
        }
    }
    const int k = k0 + Octet * 8;
    ERQ_UNROLL
    for (int tile = 0; tile < Tiles; ++tile) {
      if (m0 + tile * 8 >= p.a.m) break;
      const int m = m0 + tile * 8 + group;
      const bool valid = m < p.a.m && k < p.a.k;
      const char *x = static_cast<const char *>(p.a.x);
      if (valid) x += (m * p.a.x_stride + k) * X::kBytes;
      uint32_t pairs[X::kParts][4];
      load_x(pairs, x, valid);
      ERQ_UNROLL
      for (int s = 0; s < 2; ++s)
        ERQ_UNROLL
        for (int part = X::kParts - 1; part >= 0; --part) {
          multiply(acc[tile], a[s], pairs[part][2 * s], pairs[part][2 * s + 1]);
          if (has_outliers)
            multiply(acc2[tile], a2[s], pairs[part][2 * s], pairs[part][2 * s + 1]);
        }
    }
  }

  // A unit is a loop over its groups of 32 codes, each of which the shift brings to the front:
  // registers have no index at run time, and four copies of the code would be large.
  ERQ_DEVICE void multiply_unit(uint32_t (&w)[2][kWords], uint32_t (&marks)[4], bool has_outliers,
                                int unit) {
    ERQ_NO_UNROLL
    for (int group32 = 0; group32 < p.groups; ++group32) {
      const int k = (unit * p.groups + group32) * 32;
      multiply_octet<0>(w, marks[0], has_outliers, k);
      multiply_octet<1>(w, marks[0], has_outliers, k);
      multiply_octet<2>(w, marks[0], has_outliers, k);
      multiply_octet<3>(w, marks[0], has_outliers, k);
      ERQ_UNROLL
      for (int h = 0; h < 2; ++h)
        ERQ_UNROLL
        for (int i = 0; i + Bits < kWords; ++i) w[h][i] = w[h][i + Bits];
      ERQ_UNROLL
      for (int i = 0; i + 1 < kUnitGroups; ++i) marks[i] = marks[i + 1];
    }
  }

  ERQ_DEVICE void run() {
    if (is_dual()) mark_outliers();
    load_zeros();
    const int steps = (p.a.k / 32 + 4 * p.groups - 1) / (4 * p.groups);
    for (int step = part_of_k * kDequantWarps + warp; step < steps;
         step += p.a.splits * kDequantWarps) {
      const int unit = 4 * step + in_group;
      uint32_t w[2][kWords];
      load_codes(w[0], n0 + group, unit);
      load_codes(w[1], n0 + 8 + group, unit);
      uint32_t marks[4] = {0, 0, 0, 0};
      bool has_outliers = false;
      if (is_dual()) {
        ERQ_UNROLL
        for (int i = 0; i < 4; ++i)
          if (i < p.groups && unit * p.groups + i < p.a.k / 32)
            marks[i] = load_shared(outliers() + unit * p.groups + i);
        has_outliers = any_lane((marks[0] | marks[1] | marks[2] | marks[3]) != 0);
      }
      multiply_unit(w, marks, has_outliers, unit);
    }
    finish();
  }

  ERQ_DEVICE float *part(int of_warp, int which) const {
    return reinterpret_cast<float *>(memory) +
           (of_warp * 2 + which) * (Tiles * 8 * kPartStride);
  }

  // Rows of sums are 20 words apart: the four pairs of rows that a warp stores at once begin 8 banks
  // from one another, and rows m and m + 4, read at once, 16.
  ERQ_DEVICE void finish() {
    barrier();  // the outliers' bits are no longer read
    ERQ_UNROLL
    for (int tile = 0; tile < Tiles; ++tile)
      ERQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int at = (tile * 8 + in_group * 2 + e % 2) * kPartStride + group + e / 2 * 8;
        store_shared(part(warp, 0) + at, acc[tile][e]);
        if (is_dual()) store_shared(part(warp, 1) + at, acc2[tile][e]);
      }
    barrier();
    const int lane = thread_index() % 32;
    const int n = n0 + lane % 4 * 4;
    float scale[4], scale2[4], bias[4];
    load_four<float4>(scale, p.a.scale, n, p.a.n, p.vectors, 0.0f);
    if (is_dual()) load_four<float4>(scale2, p.a.scale2, n, p.a.n, p.vectors, 0.0f);
    if (p.a.bias) load_four<float4>(bias, p.a.bias, n, p.a.n, p.vectors, 0.0f);
    for (int tile = warp; tile < Tiles; tile += kDequantWarps) {
      const int row = tile * 8 + lane / 8 + lane / 4 % 2 * 4;
      float y[4];
      add_parts(y, 0, row * kPartStride + lane % 4 * 4);
      ERQ_UNROLL
      for (int e = 0; e < 4; ++e) y[e] *= scale[e];
      if (is_dual()) {
        float y2[4];
        add_parts(y2, 1, row * kPartStride + lane % 4 * 4);
        ERQ_UNROLL
        for (int e = 0; e < 4; ++e) y[e] += y2[e] * scale2[e];
      }
      if (p.a.splits == 1)
        store(y, bias, row, n);
      else if (m0 + row < p.a.m)
        publish(partial(part_of_k, row, n), make_float4(y[0], y[1], y[2], y[3]));
    }
    if (p.a.splits == 1 || !is_last_of_tile()) return;
    for (int tile = warp; tile < Tiles; tile += kDequantWarps) {
      const int row = tile * 8 + lane / 8 + lane / 4 % 2 * 4;
      if (m0 + row >= p.a.m) continue;
      float y[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int part = ERQ_FAULT(kPartial) ? 1 : 0; part < p.a.splits; ++part) {
        const float4 v = load_published(partial(part, row, n));
        y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
      }
      store(y, bias, row, n);
    }
  }

  ERQ_DEVICE void store(float (&y)[4], const float (&bias)[4], int row, int n) const {
    if (p.a.bias) {
      ERQ_UNROLL
      for (int e = 0; e < 4; ++e) y[e] += bias[e];
    }
    if (m0 + row < p.a.m) store_floats(p.a.out, X::kType, p.a.n, p.out, m0 + row, n, y);
  }

  // Sums of outputs n .. n + 3 over a part of K.
  ERQ_DEVICE float4 *partial(int part, int row, int n) const {
    const int64_t width = (p.a.n + kDequantRows - 1) / kDequantRows * kDequantRows;
    return reinterpret_cast<float4 *>(
        p.a.partial + (static_cast<int64_t>(part) * p.a.m + m0 + row) * width + n);
  }

  // Whether all other parts of K have been published.
  ERQ_DEVICE bool is_last_of_tile() const {
    if (!ERQ_FAULT(kArrivalBarrier)) barrier();  // the whole block has published
    uint32_t *is_last = reinterpret_cast<uint32_t *>(memory);
    if (thread_index() == 0) {
      const int tiles_n = (p.a.n + kDequantRows - 1) / kDequantRows;
      uint32_t *counter = p.a.arrived + block_index_y() * tiles_n + block_index();
      const bool last = ERQ_FAULT(kCounter) ? part_of_k == p.a.splits - 1
                                            : count_arrival(counter, p.a.splits);
      store_shared(is_last, last ? 1u : 0u);
    }
    barrier();
    return load_shared(is_last) != 0;
  }

  ERQ_DEVICE void add_parts(float (&y)[4], int which, int at) const {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) y[e] = 0.0f;
    ERQ_UNROLL
    for (int w = 0; w < kDequantWarps; ++w) {
      const float4 v = load_shared(reinterpret_cast<const float4 *>(part(w, which) + at));
      y[0] += v.x, y[1] += v.y, y[2] += v.z, y[3] += v.w;
    }
  }
};

// The last parameter is for bench/static_cuda.py, which reads it from the kernel's name.
template <int Bits, class X, int Tiles,
          int SharedBytes = DequantBlock<Bits, X, Tiles>::kSharedBytes>
ERQ_KERNEL(kDequantThreads, Tiles == 1 ? 3 : 2) dequant_linear_kernel(ERQ_PARAMS DequantParams p) {
  DequantBlock<Bits, X, Tiles>(p).run();
}

template <int Bits, class X, int Tiles>
const char *launch_dequant(const DequantParams &p, void *stream) {
  using Block = DequantBlock<Bits, X, Tiles>;
  const int marks = p.a.k / 32 * 4;
  const int bytes = marks > Block::kSharedBytes ? marks : Block::kSharedBytes;
  const Grid grid = {(p.a.n + kDequantRows - 1) / kDequantRows,
                     (p.a.m + Tiles * 8 - 1) / (Tiles * 8), p.a.splits};
  return launch(dequant_linear_kernel<Bits, X, Tiles>, grid, kDequantThreads, bytes, stream, p);
}

// Of 8 rows of x, in a block: one row, or a few, need an eighth of the registers.
inline int dequant_tiles(int m) { return m <= 8 ? 1 : 8; }

template <class X, int Bits = 2>
const char *launch_dequant_bits(const DequantParams &p, void *stream) {
  if constexpr (Bits <= 8) {
    if (p.a.bits == Bits)
      return dequant_tiles(p.a.m) == 1 ? launch_dequant<Bits, X, 1>(p, stream)
                                       : launch_dequant<Bits, X, 8>(p, stream);
    return launch_dequant_bits<X, Bits + 1>(p, stream);
  }
  return "bits must be from 2 to 8";
}

// Defined in a file each, which compile side by side.
const char *launch_dequant_f16(const DequantParams &p, void *stream);
const char *launch_dequant_bf16(const DequantParams &p, void *stream);
const char *launch_dequant_f32(const DequantParams &p, void *stream);

}  // namespace erq
