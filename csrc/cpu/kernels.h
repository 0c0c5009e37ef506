// What each variant provides; erq_cpu.h says what it does.
#pragma once

#include "erq_cpu.h"

namespace erq {

struct Kernels {
  int64_t (*packed_bytes)(int64_t n, int64_t k, int64_t split);
  void (*pack_weight)(const ErqPackWeight &);
  void (*qlinear)(const ErqQlinear &);
  int32_t (*layer_norm_quantize)(const ErqLayerNorm &);
  void (*quantize)(const ErqQuantize &);
  void (*attention)(const ErqAttention &);
  void (*dequant_linear)(const ErqDequantLinear &);
  void (*pack)(const ErqStream &);
  void (*unpack)(const ErqStream &);
  int32_t (*block)(const ErqBlock &);
};

namespace plain {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

// Work that a dot product leaves room for: `rows` rows of something, `quota` of them at each step.
struct Meanwhile {
  void (*run)(const void *context, int64_t first, int64_t last) = nullptr;
  const void *context = nullptr;
  int64_t rows = 0, quota = 1, done = 0;

  void advance(int64_t count) {
    const int64_t last = rows - done < count ? rows : done + count;
    if (done == last) return;
    run(context, done, last);
    done = last;
  }
  void step() { advance(quota); }
  void complete() { advance(rows); }
};

// Memory of the calling thread, aligned to 64 bytes, valid until its next call; grows as needed and
// is freed with the thread.
void *thread_memory(int64_t bytes);

// As thread_memory, another piece: what a block keeps between its kernels, which use the former.
void *block_memory(int64_t bytes);

// Adds the time of part after part to nanoseconds[0], [1], …; does nothing without them.
class Clock {
 public:
  explicit Clock(int64_t *nanoseconds) : part_(nanoseconds) {
    if (part_ != nullptr) last_ = now();
  }
  void lap();

 private:
  static int64_t now();
  int64_t *part_;
  int64_t last_ = 0;
};

// Coefficients [5][32] of q on 32 intervals: x · Φ(x) = max(x, 0) − |x| · q(|x|). Interval i is
// |x| = (i ± 1/2) / kGeluSteps; its polynomial's variable is |x| − i / kGeluSteps, lowest power
// first. The last one, which larger |x| take as well by way of kGeluEnd, is 0: q is below 1e-14.
// A sum with kGeluMagic is a multiple of 1 / kGeluSteps whose lowest bits are i.
constexpr float kGeluSteps = 4.0f, kGeluEnd = 7.75f, kGeluMagic = 3145728.0f;
const float *gelu_table(int64_t act);

}  // namespace erq
