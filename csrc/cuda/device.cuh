// Every PTX instruction and CUDA construct that the kernels use, each behind one function.
//
// With ERQ_EMULATE the same names come from emulate.h and the kernels run on the host. Nothing else
// in csrc/cuda may name a CUDA builtin.
#pragma once

#include <stdint.h>

namespace erq {
struct Grid {
  int x, y = 1, z = 1;
};
}  // namespace erq

#ifdef ERQ_EMULATE
#include "emulate.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ERQ_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ERQ_PARAMS const __grid_constant__
#define ERQ_DEVICE __device__ __forceinline__
#define ERQ_UNROLL _Pragma("unroll")
// Whether a fault is put in, by which the tests see that such a fault is found (emulate.h).
#define ERQ_FAULT(kind) false
#define ERQ_NO_UNROLL _Pragma("unroll 1")

namespace erq {

ERQ_DEVICE int thread_index() { return threadIdx.x; }
ERQ_DEVICE int block_index() { return blockIdx.x; }
ERQ_DEVICE int block_index_y() { return blockIdx.y; }
ERQ_DEVICE int block_index_z() { return blockIdx.z; }

ERQ_DEVICE char *shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

ERQ_DEVICE void barrier() { __syncthreads(); }
ERQ_DEVICE void warp_barrier() { __syncwarp(); }

ERQ_DEVICE bool any_lane(bool value) { return __any_sync(~0u, value); }

// 16 bytes from global to shared memory, asynchronously; zeros if not valid.
ERQ_DEVICE void cp_async_16(char *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

ERQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most `Pending` of this thread's groups are under way.
template <int Pending>
ERQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
ERQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const char *from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
}

#define ERQ_INTEGER_MMA(name, shape, types)                                                  \
  ERQ_DEVICE void name(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {    \
    asm volatile("mma.sync.aligned." shape ".row.col.s32." types ".s32 "                     \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"         \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));        \
  }
ERQ_INTEGER_MMA(mma_u4_s4, "m16n8k64", "u4.s4")
ERQ_INTEGER_MMA(mma_s8_s8, "m16n8k32", "s8.s8")
#undef ERQ_INTEGER_MMA

#define ERQ_FLOAT_MMA(name, type)                                                            \
  ERQ_DEVICE void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));            \
  }
ERQ_FLOAT_MMA(mma_f16, "f16")
ERQ_FLOAT_MMA(mma_bf16, "bf16")
#undef ERQ_FLOAT_MMA

template <class T>
ERQ_DEVICE T load_global(const T *from) {
  return __ldg(from);
}
template <class T>
ERQ_DEVICE void store_global(T *to, T value) {
  *to = value;
}
template <class T>
ERQ_DEVICE T load_shared(const T *from) {
  return *from;
}
template <class T>
ERQ_DEVICE void store_shared(T *to, T value) {
  *to = value;
}

// Global memory through which blocks of one launch speak to one another, past the caches of their
// multiprocessors. `publish`; barrier; one thread's `count_arrival`; barrier; `load_published`: the
// last block to arrive then reads what all of them published.
template <class T>
ERQ_DEVICE void publish(T *to, T value) {
  __stcg(to, value);
}
template <class T>
ERQ_DEVICE T load_published(const T *from) {
  return __ldcg(from);
}
// Whether `count` - 1 others came before; the counter goes from `count` - 1 back to 0.
ERQ_DEVICE bool count_arrival(uint32_t *counter, uint32_t count) {
  __threadfence();  // what the block published comes before
  const bool is_last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();  // what it reads comes after
  return is_last;
}

ERQ_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
ERQ_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
ERQ_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
ERQ_DEVICE uint16_t float_to_bfloat16(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
ERQ_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
ERQ_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// (low half, high half) of a - b, two fp16 each.
ERQ_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
  __half2 x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  memcpy(&a, &x, 4);
  return a;
}

// The 32 bits that start at bit `shift` of high:low, shift 0..31.
ERQ_DEVICE uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t shift) {
  return __funnelshift_r(low, high, shift);
}

// chosen ? a : b. In PTX: of a chain of ?: over registers the compiler makes an array in memory.
ERQ_DEVICE uint32_t select(bool chosen, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; selp.b32 %0, %1, %2, p; }"
      : "=r"(result)
      : "r"(a), "r"(b), "r"(static_cast<uint32_t>(chosen)));
  return result;
}

inline const char *begin_call(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char *multiprocessors(int device, int *count) {
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Null, or why the kernel was not launched.
template <class Params>
const char *launch(void (*kernel)(Params), Grid grid, int threads, int shared_bytes, void *stream,
                   const Params &params) {
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace erq

#endif
