// Four neighbouring elements at a time: one access where it is aligned, else one by one.
#pragma once

#include "device.cuh"
#include "erq_cuda.h"

namespace erq {

// 4 neighbouring elements of a vector [n]; `rest` beyond its end.
template <class V, class T>
ERQ_DEVICE void load_four(T (&to)[4], const T *from, int column, int n, bool aligned, T rest) {
  if (aligned && column + 4 <= n) {
    const V v = load_global(reinterpret_cast<const V *>(from + column));
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) to[e] = column + e < n ? load_global(from + column + e) : rest;
  }
}

// 4 neighbouring results of one row of [m, n].
ERQ_DEVICE void store_floats(void *to, int type, int n, bool aligned, int row, int column,
                             const float (&y)[4]) {
  const int64_t at = static_cast<int64_t>(row) * n + column;
  const bool whole = aligned && column + 4 <= n;
  if (type == ERQ_F32) {
    float *out = static_cast<float *>(to) + at;
    if (whole) {
      store_global(reinterpret_cast<float4 *>(out), make_float4(y[0], y[1], y[2], y[3]));
      return;
    }
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e)
      if (column + e < n) store_global(out + e, y[e]);
    return;
  }
  uint16_t *out = static_cast<uint16_t *>(to) + at;
  uint32_t bits[4];
  ERQ_UNROLL
  for (int e = 0; e < 4; ++e)
    bits[e] = type == ERQ_F16 ? float_to_half(y[e]) : float_to_bfloat16(y[e]);
  if (whole) {
    store_global(reinterpret_cast<uint2 *>(out),
                 make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16));
    return;
  }
  ERQ_UNROLL
  for (int e = 0; e < 4; ++e)
    if (column + e < n) store_global(out + e, static_cast<uint16_t>(bits[e]));
}

}  // namespace erq
