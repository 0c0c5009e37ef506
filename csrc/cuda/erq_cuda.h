/* Plain C interface of the CUDA kernels: no torch, no C++, loaded by erq_kernels/_cuda.py.
 *
 * Every function returns 0, or not 0 after leaving a sentence for erq_cuda_error(). Pointers are
 * device memory; vectors are contiguous; a null pointer leaves a part of the epilogue out. Kernels
 * are launched on `stream` (a cudaStream_t) of `device` and not waited for.
 */
#ifndef ERQ_CUDA_H
#define ERQ_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ERQ_CUDA_API __attribute__((visibility("default")))

/* Changes with every change of this header. */
#define ERQ_CUDA_ABI 2

/* Of erq_cuda_dequant_linear_args.arrived. */
#define ERQ_CUDA_COUNTERS 1024

enum erq_cuda_type { ERQ_F32, ERQ_F16, ERQ_BF16, ERQ_CODES8, ERQ_CODES4 };
enum erq_cuda_operands { ERQ_S8_S8, ERQ_U4_S4 };
enum erq_cuda_activation { ERQ_NONE, ERQ_GELU, ERQ_GELU_TANH };

/* y = act(acc1 * scale + acc2 * scale2 + bias) * layer_scale + residual, then a cast or codes;
 * acc1 and acc2 are sums over columns 0..split-1 and split..k-1 of x * (weight + offset).
 */
typedef struct {
  const void *x;      /* [m, k] int8, or packed 4-bit codes 0..15, column 2j in the low half */
  const void *weight; /* [n, k] int8, or packed 4-bit two's complement -8..7 */
  int64_t x_stride;   /* bytes from row to row; both strides and bases multiples of 16 */
  int64_t weight_stride;
  const int32_t *offset; /* [segments, n] added to every 4-bit weight of a row, or null */
  const float *scale;    /* [n] */
  const float *scale2;   /* [n], or null: one segment, split == k */
  const float *bias;     /* [n] */
  const float *layer_scale; /* [n] or null */
  const void *residual;     /* [m, n] of residual_type, or null */
  int64_t residual_stride;  /* elements from row to row */
  const float *out_inv_scale;    /* [] or [n]; with codes only */
  const int32_t *out_zero_point; /* the same shape */
  void *out;                     /* [m, n] contiguous; ERQ_CODES4: [m, n/2] bytes, n even */
  int32_t m, n, k, split;        /* k and split whole 16-byte pieces of a row */
  int32_t operands, activation, residual_type, out_type;
  int32_t out_bits, out_per_column;
  int32_t tile; /* index into the tile table, or -1: chosen by size */
} erq_cuda_qlinear_args;

/* y = x * W^T + bias, W read from the dense bit stream of its codes [n, k];
 * W = (code - zero_point) * scale, in `columns` (code - zero_point2) * scale2.
 *
 * With splits > 1, so many blocks share the sums of 16 outputs: each writes its part to `partial`, and
 * the last to arrive adds the parts in their order, so that results do not depend on who was last.
 * Nobody else may use `partial` and `arrived` until the kernel has run; `arrived` is zero again then.
 */
typedef struct {
  const void *x;         /* [m, k] of type, rows multiples of 16 bytes apart */
  const void *packed;    /* code i starts at bit i * bits; 16-byte aligned */
  const float *scale;    /* [n] */
  const float *scale2;   /* [n] or null */
  const int32_t *zero_point;  /* [n] */
  const int32_t *zero_point2; /* [n] or null */
  const int64_t *columns;     /* [n_columns], or null with scale2 */
  const float *bias;          /* [n] or null */
  void *out;                  /* [m, n] of type, contiguous */
  int64_t x_stride;           /* elements from row to row */
  int32_t m, n, k, n_columns; /* k a multiple of 32 */
  int32_t bits, type;
  int32_t splits;    /* 1..n of K, as erq_cuda_dequant_linear_splits() says, or another number */
  float *partial;    /* [splits, m, n rounded up to 16], 16-byte aligned; null with splits == 1 */
  uint32_t *arrived; /* [ERQ_CUDA_COUNTERS] zeros; null with splits == 1 */
} erq_cuda_dequant_linear_args;

ERQ_CUDA_API int erq_cuda_abi(void);

/* 1 if this library runs on the host (the emulation of the tests), 0 if it needs a device. */
ERQ_CUDA_API int erq_cuda_is_emulated(void);

/* What went wrong in this thread's last call that did not return 0. */
ERQ_CUDA_API const char *erq_cuda_error(void);

ERQ_CUDA_API int erq_cuda_qlinear(const erq_cuda_qlinear_args *args, int device, void *stream);
ERQ_CUDA_API int erq_cuda_dequant_linear(const erq_cuda_dequant_linear_args *args, int device,
                                         void *stream);

/* Into how many parts K is best cut, 1 or more; 0: no such device. */
ERQ_CUDA_API int erq_cuda_dequant_linear_splits(int32_t m, int32_t n, int32_t k, int device);

#ifdef __cplusplus
}
#endif

#endif
