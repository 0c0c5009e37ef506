"""Float arithmetic that the kernels share, in the operations and the order of
`erq_kernels.reference`.

Launch every kernel that calls these with `enable_fp_fusion=False`: a multiply contracted with the
following add rounds once where torch rounds twice, which moves codes that lie on a rounding
boundary.
"""

import triton
import triton.language as tl

# 1.5 · 2**23: between 2**23 and 2**24 fp32 holds exactly the whole numbers, so adding this to a
# value within ±2**22 rounds it to one, halves to even, and leaves it in the low bits of the sum.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TANH_SCALE = tl.constexpr(0.7978845608028654)  # √(2/π)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def quantize_to_int8(y, inv_scale, zero_point, BITS: tl.constexpr):
    """Stored int8 codes of fp32 y, equal to `reference.quantize` for |zero_point| < 2**22 − 256.

    inv_scale is fp32, zero_point int32; both scalars or broadcastable to y.
    """
    # Rounding commutes with a clamp to whole bounds, and after the clamp the sum below is exact.
    low = (-zero_point).to(tl.float32)
    high = (2**BITS - 1 - zero_point).to(tl.float32)
    y = tl.minimum(tl.maximum(y * inv_scale, low), high)
    rounded = (y + _MAGIC).to(tl.int32, bitcast=True)
    offset: tl.constexpr = 128 if BITS == 8 else 0  # formats.code_offset
    return (rounded + (zero_point - (_MAGIC_BITS + offset))).to(tl.int8)


@triton.jit
def pack_pairs(codes):
    """uint8 [R, C / 2] of 4-bit codes [R, C], as `formats.pack_nibbles`."""
    pairs = tl.reshape(codes.to(tl.int32), (codes.shape[0], codes.shape[1] // 2, 2))
    low, high = tl.split(pairs)
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def gelu(x):
    """x · Φ(x) through erf."""
    return x * 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_tanh(x):
    """GELU's tanh form; ½(1 + tanh u) is written as 1 / (1 + exp(−2u)), free of cancellation."""
    u = _TANH_SCALE * (x + _TANH_CUBIC * (x * x * x))
    return x / (1.0 + tl.exp(-2.0 * u))
