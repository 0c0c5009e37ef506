"""Every op in exact torch: the definition that all kernels are held to.

Integer parts are exact on every device. Float epilogues are fp32, in the order written here.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from erq_kernels.formats import (
    K_ALIGN,
    code_offset,
    pack_nibbles,
    unpack,
    unpack_nibbles,
    unpack_weight,
)

SQRT2 = 2.0**0.5
# Largest magnitude up to which fp32 holds every integer.
_FP32_EXACT = 1 << 24


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch._int_mm is exact on this CPU.

    Pre-VNNI instructions add pairs of products in 16 bits and saturate; the largest operands show
    it.
    """
    a = torch.full((32, 64), 127, dtype=torch.int8)
    b = torch.full((64, 32), -128, dtype=torch.int8)
    try:
        return bool((torch._int_mm(a, b) == -127 * 128 * 64).all())
    except RuntimeError:
        return False


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ bᵀ over int8, exact in int32.

    Args:
        a: int8 [M, K]. b: int8 [N, K].

    Returns:
        int32 [M, N].
    """
    if a.device.type == "cpu" and _int_mm_is_exact():
        # Of overlapping rows, as expand gives, torch._int_mm reads others.
        rows = b if b.stride() == (b.stride(0), 1) and b.stride(0) >= b.shape[1] else b.contiguous()
        return torch._int_mm(a.contiguous(), rows.t())
    # |a·b| summed over K stays below 2**14 · K, far inside fp64's 2**53.
    return (a.double() @ b.double().t()).to(torch.int32)


def quantize(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int, out_packed: bool = False
) -> Tensor:
    """Codes of a float tensor: clamp(round(x · inv_scale) + zero_point, 0, 2**bits − 1).

    Args:
        x: float [..., C].
        inv_scale: fp32 [] or [C], 1 / scale.
        zero_point: int32, same shape as inv_scale.
        bits: 2..8.
        out_packed: two codes of at most 4 bits to a byte (`formats.pack_nibbles`), C even.

    Returns:
        int8 [..., C]; at 8 bits the code − 128 (`formats.code_offset`). Or uint8 [..., C / 2].
    """
    code = (x.float() * inv_scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    codes = code.sub_(code_offset(bits)).to(torch.int8)
    return pack_nibbles(codes) if out_packed else codes


def check_channels(name: str, index: Tensor, k: int) -> None:
    """Raise ValueError unless `index` names channels 0..k − 1; on a GPU, where that waits for the
    device, whoever makes the index sees to it."""
    if index.is_cpu and index.numel():
        low, high = (int(i) for i in index.aminmax())
        if low < 0 or high >= k:
            raise ValueError(f"{name} must name channels 0..{k - 1}, got {low}..{high}")


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
    out_packed: bool = False,
) -> Tensor:
    """LayerNorm over the last dimension, then `quantize`, in the column order of the next GEMM.

    Args:
        x: float [M, K].
        weight, bias: fp32 [K].
        order: int64 [K'], position → input channel (`formats.k_order`), or None for natural order.

    Returns:
        int8 codes [M, K'], or uint8 [M, K' / 2] of packed ones.
    """
    y = F.layer_norm(x.float(), (x.shape[-1],), weight, bias, eps)
    codes = quantize(y, inv_scale, zero_point, bits)
    if order is not None:
        check_channels("order", order, x.shape[-1])
        codes = codes.index_select(-1, order)
    return pack_nibbles(codes) if out_packed else codes


def qlinear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    split: int,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    weight_offset: Tensor | None = None,
    out_packed: bool = False,
) -> Tensor:
    """y = act(acc₁·scale + acc₂·scale2 + bias) · layer_scale + residual, acc over two K segments.

    Args:
        x: int8 codes [M, K], columns in GEMM order (`formats.k_order`).
        weight: int8 [N, K], code − zero_point, same column order.
        scale: fp32 [N], activation scale times weight scale, of columns 0..split−1.
        scale2: fp32 [N] of columns split..K−1; None if split == K.
        split: length of the first segment.
        bias: fp32 [N] with the activation zero point folded in.
        act: none, gelu (erf) or gelu_tanh.
        layer_scale: fp32 [N] or None.
        residual: float [M, N] or None.
        out_dtype: dtype of a float result.
        out_inv_scale, out_zero_point, out_bits: if given, quantize the result (per tensor, or per
            output column [N]).
        weight_offset: with packed operands (`formats.pack_weight`), what is added to them.
        out_packed: codes leave packed, two to a byte (`formats.pack_nibbles`).

    Packed operands are x uint8 [M, K / 2] of 4-bit codes and weight uint8 [N, K / 2].

    Returns:
        [M, N] of out_dtype, int8 codes, or uint8 [M, N / 2] of packed codes.
    """
    if x.dtype == torch.uint8:
        x, weight = unpack_nibbles(x), unpack_weight(weight, weight_offset, split)
    if scale2 is None:
        y = int_matmul(x, weight).float().mul_(scale)
    else:
        y = int_matmul(x[:, :split], weight[:, :split]).float().mul_(scale)
        y += int_matmul(x[:, split:], weight[:, split:]).float().mul_(scale2)
    y += bias
    if act != "none":
        y = F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
    if layer_scale is not None:
        y = y * layer_scale
    if residual is not None:
        y = residual.float() + y
    if out_inv_scale is None:
        return y.to(out_dtype)
    assert out_zero_point is not None
    return quantize(y, out_inv_scale, out_zero_point, out_bits, out_packed)


def qlinear_packed(
    x: Tensor,
    packed: Tensor,
    w_bits: int,
    k: int,
    outliers: int,
    w_zero_point: Tensor,
    w_zero_point2: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
) -> Tensor:
    """`qlinear` on a weight that stays packed, code − zero_point formed on the way.

    Args:
        x, scale, scale2, bias and what follows: as `qlinear`.
        packed: uint8 [N, K' · w_bits / 8], rows of `formats.order_packed`.
        k: input channels without padding. outliers: how many make the first segment, or 0.
        w_zero_point: int32 [N] of the first segment. w_zero_point2: of the second, or None.
    """
    codes = unpack(packed.reshape(-1), w_bits, (packed.shape[0], x.shape[1]))
    weight, split = center_ordered(codes, k, outliers, w_zero_point, w_zero_point2)
    return qlinear(
        x, weight, scale, scale2, split, bias, act, layer_scale, residual, out_dtype,
        out_inv_scale, out_zero_point, out_bits,
    )  # fmt: skip


def center_ordered(
    codes: Tensor, k: int, outliers: int, zero_point: Tensor, zero_point2: Tensor | None
) -> tuple[Tensor, int]:
    """(int8 weight [N, K'], length of its first segment) of codes [N, K'] in GEMM order.

    Args:
        codes: any at padding. k, outliers, zero_point, zero_point2: as `qlinear_packed`.
    """
    split = -(-outliers // K_ALIGN) * K_ALIGN if outliers else codes.shape[1]
    weight = codes.to(torch.int32) - zero_point[:, None]
    weight[:, outliers or k : split] = 0
    if zero_point2 is not None:
        weight[:, split:] = codes[:, split:].to(torch.int32) - zero_point2[:, None]
        weight[:, split + k - outliers :] = 0
    return weight.to(torch.int8), split


def _centered(codes: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """code − zero_point of stored int8 codes, as fp32."""
    return codes.float() - (zero_point - code_offset(bits))


def _exact_bmm(a: Tensor, b: Tensor, bound: float) -> Tensor:
    """Batched a @ b of whole numbers whose sums stay below `bound`, not rounded if it can be."""
    if bound < _FP32_EXACT:
        return a @ b
    return (a.double() @ b.double()).float()


def attention_scores(
    q: Tensor,
    k: Tensor,
    q_zero_point: Tensor,
    k_zero_point: Tensor,
    bits: tuple[int, int],
    scale: Tensor,
) -> Tensor:
    """scale · Σ_d (q − z_q)(k − z_k) from codes.

    Args:
        q, k: int8 codes [..., T, D].
        scale: fp32 [], product of q's scale, k's scale and the softmax temperature.

    Returns:
        fp32 [..., T, T].
    """
    a, b = _centered(q, q_zero_point, bits[0]), _centered(k, k_zero_point, bits[1])
    bound = float(a.abs().max()) * float(b.abs().max()) * q.shape[-1] if q.numel() else 0.0
    return _exact_bmm(a, b.transpose(-1, -2), bound) * scale


def quantize_softmax(p: Tensor, inv_scale: Tensor, bits: int) -> Tensor:
    """Log-√2 codes of probabilities: clamp(round(−2 log2(p · inv_scale)), 0, 2**bits − 1).

    Args:
        p: fp32 >= 0. inv_scale: fp32 [].

    Returns:
        uint8 of p's shape.
    """
    return torch.log2(p * inv_scale).mul_(-2.0).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def attention_values(
    p: Tensor,
    v: Tensor,
    v_zero_point: Tensor,
    p_bits: int,
    v_bits: int,
    zero_last: bool,
    scale: Tensor,
) -> Tensor:
    """scale · (E + √2 F): attention output from log-√2 codes and v codes.

    E sums v' over even codes k with weight 2^(−k/2), F over odd ones with 2^(−(k+1)/2): both are
    whole multiples of 2^(−2^(b−1)), so up to 6 bits they are exact, up to 4 bits even in fp32.

    Args:
        p: uint8 log-√2 codes [..., T, T].
        v: int8 codes [..., T, D].
        zero_last: whether the last code means 0.
        scale: fp32 [], softmax scale times v's scale.

    Returns:
        fp32 [..., T, D].
    """
    levels = 2**p_bits
    code = torch.arange(levels, device=v.device)
    half = torch.exp2(-((code + 1) // 2).double())
    if zero_last:
        half[-1] = 0.0
    even = torch.where(code % 2 == 0, half, torch.zeros_like(half)).float()
    odd = torch.where(code % 2 == 1, half, torch.zeros_like(half)).float()
    values = _centered(v, v_zero_point, v_bits)
    bound = 0.0
    if v.numel():
        bound = float(values.abs().max()) * v.shape[-2] * 2.0 ** (levels // 2)
    index = p.long()
    e = _exact_bmm(even[index], values, bound)
    f = _exact_bmm(odd[index], values, bound)
    return (e + SQRT2 * f) * scale


def batch_bias(bias: Tensor, batch: int) -> Tensor:
    """The bias of every entry of a batch, from one for every n of them; see `qattention`."""
    bias = bias.float()
    if bias.dim() < 4 or len(bias) in (1, batch):
        return bias
    return bias.repeat(batch // len(bias), 1, 1, 1)


def qattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_zero_point: Tensor,
    k_zero_point: Tensor,
    v_zero_point: Tensor,
    score_scale: Tensor,
    p_inv_scale: Tensor | None,
    value_scale: Tensor,
    qk_bits: int,
    av_bits: int,
    zero_last: bool = True,
    bias: Tensor | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    out_packed: bool = False,
) -> Tensor:
    """Attention on codes: integer QKᵀ, softmax, log-√2 codes, integer PV, optional output codes.

    Args:
        q, k, v: int8 codes [B, H, T, D].
        score_scale: fp32 [], s_q · s_k · temperature.
        p_inv_scale: fp32 [], 1 / s_p of the log-√2 quantizer, or None: probabilities stay float.
        value_scale: fp32 [], s_p · s_v, or s_v without a quantizer of the probabilities.
        qk_bits, av_bits: widths of q and k, and of softmax codes and v.
        bias: float, broadcastable to [n, H, T, T] (relative position bias plus mask), or None; n
            divides B and its entries serve every n of the batch in turn: n windows of each image.

    Returns:
        fp32 [B, T, H, D], the rows of the next GEMM, or codes if out_inv_scale is
            given: int8, or packed, uint8 [B, T, H, D / 2].
    """
    scores = attention_scores(q, k, q_zero_point, k_zero_point, (qk_bits, qk_bits), score_scale)
    if bias is not None:
        scores = scores + batch_bias(bias, len(q))
    probabilities = scores.softmax(dim=-1)
    if p_inv_scale is None:
        y = (probabilities @ _centered(v, v_zero_point, av_bits)) * value_scale
    else:
        p = quantize_softmax(probabilities, p_inv_scale, av_bits)
        y = attention_values(p, v, v_zero_point, av_bits, av_bits, zero_last, value_scale)
    y = y.transpose(1, 2)
    if out_inv_scale is None:
        return y
    assert out_zero_point is not None
    return quantize(y, out_inv_scale, out_zero_point, out_bits, out_packed)


def dequantize_weight(
    packed: Tensor,
    bits: int,
    shape: tuple[int, int],
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None = None,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """fp32 weight [N, K] of a packed matrix; `columns` (outliers) have scale2, zero_point2."""
    codes = unpack(packed, bits, shape).to(torch.int32)
    s = scale[:, None].expand(shape)
    z = zero_point[:, None].expand(shape)
    if columns is not None:
        assert scale2 is not None and zero_point2 is not None
        check_channels("columns", columns, shape[1])
        s, z = s.clone(), z.clone()
        s[:, columns] = scale2[:, None]
        z[:, columns] = zero_point2[:, None]
    return (codes - z).float() * s


def dequant_linear(
    x: Tensor,
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None = None,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ Wᵀ + bias with W read from its packed codes; activations stay float.

    Args:
        x: float [M, K].
        packed: uint8 dense bit stream of the codes [N, K].
        scale, zero_point: fp32 / int32 [N]; scale2, zero_point2 the same for `columns`, or None.

    Returns:
        [M, N] of x's dtype; products and sums in fp32.
    """
    weight = dequantize_weight(
        packed, bits, (scale.shape[0], x.shape[-1]), scale, zero_point, scale2, zero_point2, columns
    )
    return F.linear(x.float(), weight, bias).to(x.dtype)
