// The parts that no variant has of its own: tables, memory, the way from C to a variant.
#include <chrono>
#include <cmath>
#include <cstdlib>

#include "cpu/kernels.h"

namespace erq {
namespace {

struct Memory {
  void *data = nullptr;
  int64_t size = 0;
  ~Memory() { free(data); }
};

thread_local Memory kernel_memory, block_buffers;

void *at_least(Memory &memory, int64_t bytes) {
  if (memory.size < bytes) {
    free(memory.data);
    const int64_t size = (bytes + 4095) / 4096 * 4096;
    memory.data = aligned_alloc(64, static_cast<size_t>(size));
    if (memory.data == nullptr) abort();
    memory.size = size;
  }
  return memory.data;
}

double tail(int64_t act, double a) {
  if (act == ERQ_ACT_GELU) return 0.5 * erfc(a * 0.70710678118654752440);
  const double u = 0.79788456080286535588 * (a + 0.044715 * a * a * a);
  return 1.0 / (1.0 + exp(2.0 * u));
}

struct GeluTable {
  float c[5][32];

  // Interpolation in the Chebyshev nodes of each interval, by Newton's divided differences.
  explicit GeluTable(int64_t act) {
    for (int power = 0; power < 5; ++power) c[power][31] = 0.0f;
    for (int i = 0; i < 31; ++i) {
      double node[5], d[5];
      for (int j = 0; j < 5; ++j) {
        node[j] = 0.5 * cos(3.14159265358979323846 * (j + 0.5) / 5) / kGeluSteps;
        // Below 0, in half of the first interval, q goes on as the function it is.
        d[j] = tail(act, i / static_cast<double>(kGeluSteps) + node[j]);
      }
      for (int order = 1; order < 5; ++order)
        for (int j = 4; j >= order; --j) d[j] = (d[j] - d[j - 1]) / (node[j] - node[j - order]);
      double p[5] = {d[4], 0, 0, 0, 0};
      for (int j = 3; j >= 0; --j) {
        for (int power = 4; power > 0; --power) p[power] = p[power - 1] - node[j] * p[power];
        p[0] = d[j] - node[j] * p[0];
      }
      for (int power = 0; power < 5; ++power) c[power][i] = static_cast<float>(p[power]);
    }
  }
};

const Kernels &kernels(int64_t variant) {
#if defined(__x86_64__)
  if (variant == ERQ_AMX) return amx::kernels;
  if (variant == ERQ_AVX512_VNNI) return avx512::kernels;
  if (variant == ERQ_AVX2) return avx2::kernels;
#endif
  (void)variant;
  return plain::kernels;
}

}  // namespace

void *thread_memory(int64_t bytes) { return at_least(kernel_memory, bytes); }
void *block_memory(int64_t bytes) { return at_least(block_buffers, bytes); }

int64_t Clock::now() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void Clock::lap() {
  if (part_ == nullptr) return;
  const int64_t time = now();
  __atomic_fetch_add(part_++, time - last_, __ATOMIC_RELAXED);
  last_ = time;
}

const float *gelu_table(int64_t act) {
  static const GeluTable erf(ERQ_ACT_GELU), tanh(ERQ_ACT_GELU_TANH);
  return act == ERQ_ACT_GELU ? erf.c[0] : tanh.c[0];
}

}  // namespace erq

extern "C" {

int64_t erq_cpu_packed_bytes(int64_t n, int64_t k, int64_t split, int64_t variant) {
  return erq::kernels(variant).packed_bytes(n, k, split);
}
void erq_cpu_pack_weight(const ErqPackWeight *a) { erq::kernels(a->variant).pack_weight(*a); }
void erq_cpu_qlinear(const ErqQlinear *a) { erq::kernels(a->variant).qlinear(*a); }
int32_t erq_cpu_layer_norm_quantize(const ErqLayerNorm *a) {
  return erq::kernels(a->variant).layer_norm_quantize(*a);
}
void erq_cpu_quantize(const ErqQuantize *a) { erq::kernels(a->variant).quantize(*a); }
void erq_cpu_attention(const ErqAttention *a) { erq::kernels(a->variant).attention(*a); }
void erq_cpu_dequant_linear(const ErqDequantLinear *a) {
  erq::kernels(a->variant).dequant_linear(*a);
}
void erq_cpu_pack(const ErqStream *a) { erq::kernels(a->variant).pack(*a); }
void erq_cpu_unpack(const ErqStream *a) { erq::kernels(a->variant).unpack(*a); }
int32_t erq_cpu_block(const ErqBlock *a) { return erq::kernels(a->norm1.variant).block(*a); }
}
