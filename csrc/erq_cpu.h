/* The CPU kernels of erq: a plain C interface, loaded with ctypes by erq_kernels/_cpu.py.
 *
 * All pointers are to plain memory of the stated element type, row-major; strides count elements.
 * Every function is safe to call from several threads at once. `threads` is how many threads one
 * call may use, the caller included. Arithmetic: erq_kernels/reference.py.
 */
#ifndef ERQ_CPU_H
#define ERQ_CPU_H

#include <stdint.h>

#if defined(__GNUC__)
#define ERQ_API __attribute__((visibility("default")))
#else
#define ERQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of this interface. */
#define ERQ_CPU_ABI 2
ERQ_API int32_t erq_cpu_abi(void);

/* Instruction sets that kernels are written for, from the plainest. */
enum { ERQ_PLAIN = 0, ERQ_AVX2 = 1, ERQ_AVX512_VNNI = 2, ERQ_AMX = 3 };

/* The best of them that this processor and operating system run and this build has. */
ERQ_API int32_t erq_cpu_best_variant(void);

/* GOMP_parallel of the OpenMP runtime that the process already has, so that its threads are shared;
 * without one (null), a call with threads > 1 starts and joins its own. */
ERQ_API void erq_cpu_set_parallel(void *gomp_parallel);

/* Element types of float tensors, and codes. */
enum { ERQ_FLOAT32 = 0, ERQ_FLOAT16 = 1, ERQ_BFLOAT16 = 2, ERQ_CODES = 3 };

enum { ERQ_ACT_NONE = 0, ERQ_ACT_GELU = 1, ERQ_ACT_GELU_TANH = 2 };

/* Every field of the structs below is 8 bytes wide. `variant` is one of the instruction sets. */

/* Codes of a float: clamp(round(x · inv_scale) + zero_point, 0, 2^bits − 1), − 128 at 8 bits. */
typedef struct {
  const float *inv_scale;
  const int32_t *zero_point;
  int64_t is_per_column; /* else both are one element */
  int64_t bits;
} ErqQuantizer;

/* The weight [n, k] of a GEMM in the order that a variant reads it. */
typedef struct {
  const int8_t *weight;
  int64_t n, k, split; /* k columns in segments of split and k − split */
  void *packed;        /* erq_cpu_packed_bytes, aligned to 64 */
  int64_t variant;
} ErqPackWeight;
ERQ_API int64_t erq_cpu_packed_bytes(int64_t n, int64_t k, int64_t split, int64_t variant);
ERQ_API void erq_cpu_pack_weight(const ErqPackWeight *args);

/* out = act(x₁w₁ᵀ · scale + x₂w₂ᵀ · scale2 + bias) · layer_scale + residual, or its codes. */
typedef struct {
  const int8_t *x; /* [m, k], rows x_stride apart */
  int64_t x_stride;
  const void *packed; /* of this variant */
  int64_t m, n, k, split;
  const float *scale, *scale2; /* [n]; scale2 only if split < k */
  const float *bias;           /* [n] */
  int64_t act;
  const float *layer_scale; /* [n] or null */
  const void *residual;     /* [m, n], rows residual_stride apart, or null */
  int64_t residual_stride, residual_type;
  void *out; /* [m, n] */
  int64_t out_type;
  ErqQuantizer quantizer; /* of the result, if out_type is ERQ_CODES */
  int64_t threads, variant;
} ErqQlinear;
ERQ_API void erq_cpu_qlinear(const ErqQlinear *args);

/* Codes of LayerNorm(x), column i of the result from channel order[i]. */
typedef struct {
  const void *x; /* [m, k], rows x_stride apart */
  int64_t x_stride, x_type, m, k;
  const float *weight, *bias; /* [k] */
  double eps;
  ErqQuantizer quantizer; /* columns: the k channels */
  const int64_t *order;   /* [columns], or null: columns = k */
  int64_t columns;
  int8_t *out; /* [m, columns] */
  int64_t threads, variant;
} ErqLayerNorm;
/* 0, or 1 if `order` names a channel that x does not have. */
ERQ_API int32_t erq_cpu_layer_norm_quantize(const ErqLayerNorm *args);

/* Codes of x. */
typedef struct {
  const void *x; /* [m, k] */
  int64_t x_type, m, k;
  ErqQuantizer quantizer;
  int8_t *out; /* [m, k] */
  int64_t threads, variant;
} ErqQuantize;
ERQ_API void erq_cpu_quantize(const ErqQuantize *args);

/* Attention on codes of [b, h, t, d]; elements of d are neighbours. */
typedef struct {
  const int8_t *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3]; /* of b, h and t */
  int64_t b, h, t, d;
  const int32_t *q_zero_point, *k_zero_point, *v_zero_point;
  const float *score_scale, *p_inv_scale, *value_scale; /* p_inv_scale null: float probabilities */
  int64_t qk_bits, av_bits, zero_last;
  const float *bias; /* added to the scores, or null: that of b modulo bias_batches */
  int64_t bias_strides[4], bias_batches;
  void *out; /* [b, t, h, d] */
  int64_t out_type; /* ERQ_FLOAT32 or ERQ_CODES */
  ErqQuantizer quantizer; /* columns: the d of each head */
  int64_t threads, variant;
} ErqAttention;
ERQ_API void erq_cpu_attention(const ErqAttention *args);

/* Values of packed codes [n, k]: (code − zero_point) · scale; those of `columns` with scale2 and
 * zero_point2. With x they are multiplied at once: out[m, n] = x wᵀ + bias; without, out is w. */
typedef struct {
  const uint8_t *packed;
  int64_t packed_bytes, bits, n, k;
  const float *scale;
  const int32_t *zero_point;
  const float *scale2;
  const int32_t *zero_point2;
  const int64_t *columns;
  int64_t column_count;
  const float *x; /* [m, k] or null */
  int64_t m;
  const float *bias; /* [n] or null */
  float *out;
  int64_t threads, variant;
} ErqDequantLinear;
ERQ_API void erq_cpu_dequant_linear(const ErqDequantLinear *args);

/* The dense bit stream of `count` codes, the first in the lowest bits, and back. */
typedef struct {
  const uint8_t *from;
  uint8_t *to;
  int64_t count, bits, threads, variant;
} ErqStream;
ERQ_API void erq_cpu_pack(const ErqStream *args);
ERQ_API void erq_cpu_unpack(const ErqStream *args);

/* A pre-norm transformer block on codes: y = x + proj(attention(qkv(norm1(x)))), out = y +
 * fc2(fc1(norm2(y))), each part an op above. Of the parts' arguments the rows (m, b), operands,
 * residuals, results, strides and threads are not read: they follow from each other. qkv, attention
 * and fc1 give codes, qkv in columns of [3, h, d]; proj and fc2 give the type of x, norm1.x_type. */
typedef struct {
  ErqLayerNorm norm1;
  ErqQlinear qkv;
  ErqAttention attention;
  ErqQlinear proj;
  ErqLayerNorm norm2;
  ErqQlinear fc1, fc2;
  const void *x; /* [images · attention.t, norm1.k] */
  void *out;     /* as x */
  int64_t images;
  int64_t *nanoseconds; /* [7], or null: to which the time of each part is added, over all threads */
  int64_t threads;
} ErqBlock;
/* 0, or 1 if an `order` names a channel that x does not have, or 2 if the widths of two parts do not
 * fit. */
ERQ_API int32_t erq_cpu_block(const ErqBlock *args);

#ifdef __cplusplus
}
#endif

#endif
