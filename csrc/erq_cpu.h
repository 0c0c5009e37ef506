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
#define ERQ_CPU_ABI 1
ERQ_API int32_t erq_cpu_abi(void);

/* Instruction sets that kernels are written for, from the plainest. */
enum { ERQ_PLAIN = 0, ERQ_AVX2 = 1, ERQ_AVX512_VNNI = 2 };

/* The best of them that this processor and operating system run and this build has. */
ERQ_API int32_t erq_cpu_best_variant(void);

/* GOMP_parallel of the OpenMP runtime that the process already has, so that its threads are shared;
 * without one (null), a call with threads > 1 starts and joins its own. */
ERQ_API void erq_cpu_set_parallel(void *gomp_parallel);

#ifdef __cplusplus
}
#endif

#endif
