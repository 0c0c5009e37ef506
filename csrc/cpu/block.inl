// A transformer block, for one variant: the seven kernels one after another on the same rows.
//
// While there are images for every thread, each takes whole ones, so that nothing waits between the
// kernels and the activations of an image stay in its own second-level cache; what is left over is
// shared kernel by kernel.

namespace erq {
namespace ERQ_VARIANT {

class BlockRun {
 public:
  explicit BlockRun(const ErqBlock &args)
      : b(args),
        type(args.norm1.x_type),
        row_bytes(args.norm1.k * type_size(type)),
        narrow(args.norm1.columns > args.norm2.columns ? args.norm1.columns : args.norm2.columns),
        wide(args.qkv.n > args.fc1.n ? args.qkv.n : args.fc1.n) {
    if (narrow < b.proj.k) narrow = b.proj.k;
  }

  // Images first to first + count − 1, by so many threads.
  void run(int64_t first, int64_t count, int64_t threads) const {
    const int64_t tokens = b.attention.t, m = count * tokens, at = first * tokens * row_bytes;
    const char *x = static_cast<const char *>(b.x) + at;
    char *out = static_cast<char *>(b.out) + at;
    int8_t *codes = nullptr, *hidden = nullptr;
    const auto divide = [&](void *memory) {
      Pieces pieces(memory);
      codes = pieces.take<int8_t>(m * narrow);
      hidden = pieces.take<int8_t>(m * wide);
      return pieces.used();
    };
    divide(block_memory(divide(nullptr)));
    Clock clock(b.nanoseconds);
    normalize(b.norm1, x, m, codes, threads);
    clock.lap();
    multiply(b.qkv, codes, m, nullptr, hidden, threads);
    clock.lap();
    attend(hidden, count, codes, threads);
    clock.lap();
    multiply(b.proj, codes, m, x, out, threads);
    clock.lap();
    normalize(b.norm2, out, m, codes, threads);
    clock.lap();
    multiply(b.fc1, codes, m, nullptr, hidden, threads);
    clock.lap();
    multiply(b.fc2, hidden, m, out, out, threads);
    clock.lap();
  }

 private:
  const ErqBlock &b;
  const int64_t type, row_bytes;
  int64_t narrow, wide;

  void normalize(ErqLayerNorm a, const void *x, int64_t m, int8_t *out, int64_t threads) const {
    a.x = x;
    a.x_stride = a.k;
    a.m = m;
    a.out = out;
    a.threads = threads;
    layer_norm_quantize(a);
  }

  void multiply(ErqQlinear a, const int8_t *x, int64_t m, const void *residual, void *out,
                int64_t threads) const {
    a.x = x;
    a.x_stride = a.k;
    a.m = m;
    a.residual = residual;
    a.residual_stride = a.n;
    a.residual_type = type;
    a.out = out;
    a.threads = threads;
    qlinear(a);
  }

  // Rows of qkv are [3, h, d].
  void attend(const int8_t *qkv, int64_t images, int8_t *out, int64_t threads) const {
    ErqAttention a = b.attention;
    const int64_t width = a.h * a.d;
    a.q = qkv;
    a.k = qkv + width;
    a.v = qkv + 2 * width;
    for (int64_t *strides : {a.q_strides, a.k_strides, a.v_strides}) {
      strides[0] = a.t * 3 * width;
      strides[1] = a.d;
      strides[2] = 3 * width;
    }
    a.b = images;
    a.out = out;
    a.threads = threads;
    attention(a);
  }
};

int32_t block(const ErqBlock &b) {
  const int64_t width = b.norm1.k, heads = b.attention.h * b.attention.d;
  if (b.norm1.columns != b.qkv.k || b.qkv.n != 3 * heads || b.proj.k != heads ||
      b.proj.n != width || b.norm2.k != width || b.norm2.columns != b.fc1.k ||
      b.fc1.n != b.fc2.k || b.fc2.n != width)
    return 2;
  for (const ErqLayerNorm *a : {&b.norm1, &b.norm2})
    for (int64_t i = 0; a->order != nullptr && i < a->columns; ++i)
      if (a->order[i] < 0 || a->order[i] >= a->k) return 1;
  const BlockRun block(b);
  const int64_t shared = b.images % b.threads, alone = b.images - shared;
  parallel_for(alone, static_cast<int>(b.threads), [&](int64_t i) { block.run(i, 1, 1); });
  if (shared) block.run(alone, shared, b.threads);
  return 0;
}

}  // namespace ERQ_VARIANT
}  // namespace erq
