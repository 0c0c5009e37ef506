// The C interface: checks the arguments, chooses a tile, launches, and keeps what went wrong.
#include <stdio.h>

#include "dequant_linear.cuh"
#include "erq_cuda.h"
#include "qlinear.cuh"

namespace erq {
namespace {

thread_local char error_text[256] = "no error";

int fail(const char *op, const char *reason) {
  snprintf(error_text, sizeof error_text, "%s: %s", op, reason);
  return 1;
}

bool is_aligned(const void *pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

int64_t type_bytes(int type) { return type == ERQ_F32 ? 4 : type == ERQ_CODES8 ? 1 : 2; }

// The bits that mark outliers fill 96 KB of shared memory.
constexpr int kMostColumns = 96 * 1024 * 8;

// More blocks than this have no need of a split.
constexpr int kMostSplitTiles = ERQ_CUDA_COUNTERS;

// Offsets within a tile of 128 rows fit 32 bits.
constexpr int64_t kLongestRow = 1 << 24;

int ceil_div(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) + b - 1) / b); }

// The largest tile that leaves no multiprocessor idle, else the smallest.
int choose_tile(int m, int n, bool dual, int multiprocessors) {
  for (int tile = dual ? 1 : 0; tile < kTileCount - 1; ++tile) {
    const TileSize size = kTiles[tile];
    const int64_t count = static_cast<int64_t>(ceil_div(m, size.m)) * ceil_div(n, size.n);
    if (count >= multiprocessors && ceil_div(n, size.n) * size.n <= n + n / 7) return tile;
  }
  return kTileCount - 1;
}

const char *check(const erq_cuda_qlinear_args &a) {
  const int per_byte = a.operands == ERQ_U4_S4 ? 2 : 1;
  if (a.operands != ERQ_S8_S8 && a.operands != ERQ_U4_S4) return "unknown operands";
  if (a.m < 0 || a.n < 0 || a.k < 0 || a.split < 0 || a.split > a.k) return "negative size";
  if (a.k % (16 * per_byte) || a.split % (16 * per_byte))
    return "k and split must be whole 16-byte pieces of a row";
  if (!is_aligned(a.x, 16) || !is_aligned(a.weight, 16) || a.x_stride % 16 || a.weight_stride % 16)
    return "rows of x and weight must begin at multiples of 16 bytes";
  if (a.x_stride < 0 || a.x_stride > kLongestRow || a.weight_stride < 0 ||
      a.weight_stride > kLongestRow)
    return "rows of x and weight must be at most 16 MB apart";
  if (a.scale2 ? a.split == 0 || a.split == a.k : a.split != a.k)
    return "a second scale goes with a second segment";
  if (a.offset && a.operands != ERQ_U4_S4) return "only 4-bit weights have offsets";
  if (a.out_type < ERQ_F32 || a.out_type > ERQ_CODES4) return "unknown out_type";
  const bool codes = a.out_type == ERQ_CODES8 || a.out_type == ERQ_CODES4;
  if (codes != (a.out_inv_scale != nullptr) || codes != (a.out_zero_point != nullptr))
    return "codes and a quantizer come together";
  if (codes && (a.out_bits < 1 || a.out_bits > (a.out_type == ERQ_CODES4 ? 4 : 8)))
    return "out_bits do not fit out_type";
  if (a.out_type == ERQ_CODES4 && a.n % 2) return "packed codes need an even n";
  if (a.tile < -1 || a.tile >= kTileCount) return "unknown tile";
  return nullptr;
}

Alignment find_alignment(const erq_cuda_qlinear_args &a) {
  Alignment aligned;
  aligned.vectors = a.n % 4 == 0;
  for (const void *vector :
       {static_cast<const void *>(a.scale), static_cast<const void *>(a.scale2),
        static_cast<const void *>(a.bias), static_cast<const void *>(a.layer_scale),
        static_cast<const void *>(a.out_inv_scale), static_cast<const void *>(a.out_zero_point),
        static_cast<const void *>(a.offset)})
    // A quantizer of the whole tensor is read alone.
    if (a.out_per_column || (vector != a.out_inv_scale && vector != a.out_zero_point))
      aligned.vectors = aligned.vectors && is_aligned(vector, 16);
  aligned.residual = a.residual_stride % 4 == 0 &&
                     is_aligned(a.residual, 4 * type_bytes(a.residual_type));
  const int out_bytes = a.out_type == ERQ_CODES4 ? 2 : 4 * type_bytes(a.out_type);
  aligned.out = a.n % 4 == 0 && is_aligned(a.out, out_bytes);
  return aligned;
}

const char *run_qlinear(const erq_cuda_qlinear_args &a, int device, void *stream) {
  if (const char *reason = check(a)) return reason;
  if (a.m == 0 || a.n == 0) return nullptr;
  if (const char *reason = begin_call(device)) return reason;
  int tile = a.tile;
  if (tile < 0) {
    int count = 0;
    if (const char *reason = multiprocessors(device, &count)) return reason;
    tile = choose_tile(a.m, a.n, a.scale2 != nullptr, count);
  }
  QlinearParams p;
  p.a = a;
  p.tiles_m = ceil_div(a.m, kTiles[tile].m);
  p.tiles_n = ceil_div(a.n, kTiles[tile].n);
  if (static_cast<int64_t>(p.tiles_m) * p.tiles_n > INT32_MAX) return "more tiles than a grid has";
  const int per_byte = a.operands == ERQ_U4_S4 ? 2 : 1;
  p.k_bytes = a.k / per_byte;
  p.split_bytes = a.split / per_byte;
  p.aligned = find_alignment(a);
  return a.operands == ERQ_U4_S4 ? launch_s4(tile, p, stream) : launch_s8(tile, p, stream);
}

// Of 16 outputs and 8 or 64 rows of x, with a block each where K is not split.
int64_t count_dequant_tiles(int m, int n) {
  return static_cast<int64_t>(ceil_div(n, kDequantRows)) * ceil_div(m, 8 * dequant_tiles(m));
}

// As many as give every multiprocessor a block, unless warps would have no step of K then.
const char *choose_splits(int m, int n, int k, int device, int *splits) {
  int count = 0;
  if (const char *reason = multiprocessors(device, &count)) return reason;
  const int most = ceil_div(k, kShortStep * kDequantWarps);
  const int64_t tiles = count_dequant_tiles(m, n);
  if (tiles == 0 || tiles > kMostSplitTiles) {
    *splits = 1;
    return nullptr;
  }
  const int wanted = ceil_div(count, static_cast<int>(tiles));
  *splits = most < 1 ? 1 : wanted < most ? wanted : most;
  return nullptr;
}

const char *run_dequant_linear(const erq_cuda_dequant_linear_args &a, int device, void *stream) {
  if (a.m < 0 || a.n < 0 || a.k < 0) return "negative size";
  if (a.k % 32) return "k must be a multiple of 32";
  if (a.k > kMostColumns) return "k must be at most 786432";
  if (a.bits < 2 || a.bits > 8) return "bits must be from 2 to 8";
  if (a.type != ERQ_F32 && a.type != ERQ_F16 && a.type != ERQ_BF16) return "unknown type";
  if ((a.scale2 != nullptr) != (a.zero_point2 != nullptr) ||
      (a.scale2 != nullptr) != (a.n_columns > 0) || (a.n_columns > 0 && !a.columns))
    return "scale2, zero_point2 and columns come together";
  if (!is_aligned(a.packed, 16) || !is_aligned(a.x, 16) || a.x_stride * type_bytes(a.type) % 16)
    return "packed codes and rows of x must begin at multiples of 16 bytes";
  if (a.splits < 1 || a.splits > kMostSplits) return "splits must be from 1 to 1024";
  if (a.m == 0 || a.n == 0) return nullptr;
  if (a.splits > 1) {
    if (!a.partial || !is_aligned(a.partial, 16) || !a.arrived)
      return "a split K needs partial, 16-byte aligned, and arrived";
    if (count_dequant_tiles(a.m, a.n) > kMostSplitTiles)
      return "so many outputs have more tiles than ERQ_CUDA_COUNTERS: splits must be 1";
  }
  if (const char *reason = begin_call(device)) return reason;
  DequantParams p;
  p.a = a;
  // Short steps where long ones would leave warps idle, or would not end with K.
  const bool is_long = a.k % kUnit == 0 && a.k / kLongStep >= kDequantWarps * a.splits;
  p.groups = is_long ? kUnitGroups : 1;
  p.vectors = a.n % 4 == 0 && is_aligned(a.scale, 16) && is_aligned(a.scale2, 16) &&
              is_aligned(a.bias, 16);
  p.out = a.n % 4 == 0 && is_aligned(a.out, 4 * type_bytes(a.type));
  switch (a.type) {
    case ERQ_F16: return launch_dequant_f16(p, stream);
    case ERQ_BF16: return launch_dequant_bf16(p, stream);
    default: return launch_dequant_f32(p, stream);
  }
}

}  // namespace
}  // namespace erq

extern "C" {

int erq_cuda_abi(void) { return ERQ_CUDA_ABI; }

int erq_cuda_is_emulated(void) {
#ifdef ERQ_EMULATE
  return 1;
#else
  return 0;
#endif
}

const char *erq_cuda_error(void) { return erq::error_text; }

int erq_cuda_qlinear(const erq_cuda_qlinear_args *args, int device, void *stream) {
  const char *reason = erq::run_qlinear(*args, device, stream);
  return reason ? erq::fail("qlinear", reason) : 0;
}

int erq_cuda_dequant_linear_splits(int32_t m, int32_t n, int32_t k, int device) {
  int splits = 0;
  const char *reason = m < 0 || n < 0 || k < 0
                           ? "negative size"
                           : erq::choose_splits(m, n, k, device, &splits);
  return reason ? erq::fail("dequant_linear", reason), 0 : splits;
}

int erq_cuda_dequant_linear(const erq_cuda_dequant_linear_args *args, int device, void *stream) {
  const char *reason = erq::run_dequant_linear(*args, device, stream);
  return reason ? erq::fail("dequant_linear", reason) : 0;
}

}  // extern "C"
