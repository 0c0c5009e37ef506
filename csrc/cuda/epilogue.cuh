// From int32 sums to a result: the operations of erq_kernels/reference.py in its order, each rounded
// to fp32. Compiled without contraction to fused multiply-add (-fmad=false, -ffp-contract=off).
#pragma once

#include <math.h>

#include "device.cuh"
#include "erq_cuda.h"
#include "vectors.cuh"

namespace erq {

// Which accesses of 4 neighbouring columns may be one load or store.
struct Alignment {
  bool vectors, residual, out;
};

ERQ_DEVICE float gelu(float x) { return x * 0.5f * (1.0f + erff(x * 0.70710678118654752f)); }

// 1/2 (1 + tanh u) is written as 1 / (1 + exp(-2u)), which does not cancel.
ERQ_DEVICE float gelu_tanh(float x) {
  const float u = 0.79788456080286536f * (x + 0.044715f * (x * x * x));
  return x / (1.0f + expf(-2.0f * u));
}

// What the epilogue knows of a lane's 4 columns.
template <bool Dual, bool Offset>
struct Columns {
  float scale[4], scale2[4], bias[4], layer_scale[4], inv_scale[4], zero_point[4];
  int32_t offset[2][4];

  ERQ_DEVICE void load(const erq_cuda_qlinear_args &a, const Alignment &aligned, int column) {
    load_four<float4>(scale, a.scale, column, a.n, aligned.vectors, 0.0f);
    if constexpr (Dual) load_four<float4>(scale2, a.scale2, column, a.n, aligned.vectors, 0.0f);
    load_four<float4>(bias, a.bias, column, a.n, aligned.vectors, 0.0f);
    if (a.layer_scale)
      load_four<float4>(layer_scale, a.layer_scale, column, a.n, aligned.vectors, 0.0f);
    if (a.out_inv_scale) {
      int32_t zero[4];
      if (a.out_per_column) {
        load_four<float4>(inv_scale, a.out_inv_scale, column, a.n, aligned.vectors, 0.0f);
        load_four<int4>(zero, a.out_zero_point, column, a.n, aligned.vectors, 0);
      } else {
        ERQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          inv_scale[e] = load_global(a.out_inv_scale);
          zero[e] = load_global(a.out_zero_point);
        }
      }
      ERQ_UNROLL
      for (int e = 0; e < 4; ++e) zero_point[e] = static_cast<float>(zero[e]);
    }
    if constexpr (Offset) {
      ERQ_UNROLL
      for (int s = 0; s < (Dual ? 2 : 1); ++s)
        load_four<int4>(offset[s], a.offset + static_cast<int64_t>(s) * a.n, column, a.n,
                        aligned.vectors, 0);
    }
  }

  ERQ_DEVICE void add_offset(int4 &sum, int32_t row_sum, int segment) const {
    sum.x += row_sum * offset[segment][0];
    sum.y += row_sum * offset[segment][1];
    sum.z += row_sum * offset[segment][2];
    sum.w += row_sum * offset[segment][3];
  }
};

ERQ_DEVICE float read_float(const void *from, int type, int64_t i) {
  if (type == ERQ_F32) return load_global(static_cast<const float *>(from) + i);
  const uint16_t bits = load_global(static_cast<const uint16_t *>(from) + i);
  return type == ERQ_F16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

ERQ_DEVICE void load_residual(float (&r)[4], const erq_cuda_qlinear_args &a, bool aligned, int row,
                              int column) {
  const int64_t at = row * a.residual_stride + column;
  if (!aligned || column + 4 > a.n) {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e)
      r[e] = column + e < a.n ? read_float(a.residual, a.residual_type, at + e) : 0.0f;
  } else if (a.residual_type == ERQ_F32) {
    const float4 v = load_global(
        reinterpret_cast<const float4 *>(static_cast<const float *>(a.residual) + at));
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  } else {
    const uint2 v = load_global(
        reinterpret_cast<const uint2 *>(static_cast<const uint16_t *>(a.residual) + at));
    const uint32_t bits[4] = {v.x & 0xFFFF, v.x >> 16, v.y & 0xFFFF, v.y >> 16};
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e)
      r[e] = a.residual_type == ERQ_F16 ? half_to_float(bits[e]) : bfloat16_to_float(bits[e]);
  }
}

ERQ_DEVICE void store_codes(const erq_cuda_qlinear_args &a, bool aligned, int row, int column,
                            const uint32_t (&code)[4]) {
  const bool whole = aligned && column + 4 <= a.n;
  if (a.out_type == ERQ_CODES8) {
    uint8_t *out = static_cast<uint8_t *>(a.out) + static_cast<int64_t>(row) * a.n + column;
    if (whole) {
      store_global(reinterpret_cast<uint32_t *>(out),
                   code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24);
      return;
    }
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e)
      if (column + e < a.n) store_global(out + e, static_cast<uint8_t>(code[e]));
    return;
  }
  uint8_t *out = static_cast<uint8_t *>(a.out) + static_cast<int64_t>(row) * (a.n / 2) + column / 2;
  const uint32_t low = code[0] | code[1] << 4, high = code[2] | code[3] << 4;
  if (whole) {
    store_global(reinterpret_cast<uint16_t *>(out), static_cast<uint16_t>(low | high << 8));
    return;
  }
  if (column < a.n) store_global(out, static_cast<uint8_t>(low));
  if (column + 2 < a.n) store_global(out + 1, static_cast<uint8_t>(high));
}

// The result of 4 columns of one row from the sums of both segments.
template <bool Dual, bool Offset>
ERQ_DEVICE void finish_row(const erq_cuda_qlinear_args &a, const Alignment &aligned,
                           const Columns<Dual, Offset> &columns, int row, int column,
                           const int4 &sum, const int4 &sum2) {
  const int32_t first[4] = {sum.x, sum.y, sum.z, sum.w};
  const int32_t second[4] = {sum2.x, sum2.y, sum2.z, sum2.w};
  float y[4];
  ERQ_UNROLL
  for (int e = 0; e < 4; ++e) {
    y[e] = static_cast<float>(first[e]) * columns.scale[e];
    if constexpr (Dual) y[e] += static_cast<float>(second[e]) * columns.scale2[e];
    y[e] += columns.bias[e];
  }
  if (a.activation == ERQ_GELU) {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) y[e] = gelu(y[e]);
  } else if (a.activation == ERQ_GELU_TANH) {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) y[e] = gelu_tanh(y[e]);
  }
  if (a.layer_scale) {
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) y[e] *= columns.layer_scale[e];
  }
  if (a.residual) {
    float r[4];
    load_residual(r, a, aligned.residual, row, column);
    ERQ_UNROLL
    for (int e = 0; e < 4; ++e) y[e] = r[e] + y[e];
  }
  if (!a.out_inv_scale) {
    store_floats(a.out, a.out_type, a.n, aligned.out, row, column, y);
    return;
  }
  const float top = static_cast<float>((1 << a.out_bits) - 1);
  // formats.code_offset: int8 holds an 8-bit code - 128, which is the code with its top bit turned.
  const uint32_t flip = a.out_bits == 8 ? 128 : 0;
  uint32_t code[4];
  ERQ_UNROLL
  for (int e = 0; e < 4; ++e) {
    const float q = rintf(y[e] * columns.inv_scale[e]) + columns.zero_point[e];
    code[e] = static_cast<uint32_t>(fminf(fmaxf(q, 0.0f), top)) ^ flip;
  }
  store_codes(a, aligned.out, row, column, code);
}

}  // namespace erq
