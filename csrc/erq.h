/* The C interface of erq's native libraries, for callers other than Python.
 *
 * liberq_cpu.so has the functions of erq_cpu.h, liberq_cuda.so those of cuda/erq_cuda.h. Neither
 * needs torch; what an op computes is defined in erq_kernels/reference.py.
 */
#ifndef ERQ_H
#define ERQ_H

#include "cuda/erq_cuda.h"
#include "erq_cpu.h"

#endif
