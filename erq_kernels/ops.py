"""THE contract: every op's schema, argument checks, shape function and meaning.

Each op is registered once as `torch.ops.erq.<name>` and dispatched by `erq_kernels.dispatch`; the
last argument `backend` forces one. The arithmetic is defined in `erq_kernels.reference`, layouts in
`erq_kernels.formats`. All tensors of one call live on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor

from erq_kernels import dispatch, formats, reference

ACTIVATIONS = ("none", "gelu", "gelu_tanh")
OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _run(op: str, backend: str, *args: Any) -> Tensor:
    """The op on the selected backend; row-major, as the shape functions promise, in any case."""
    result: Tensor = dispatch.call(op, backend, *args)
    return result.contiguous()


class _Op:
    """A function as the torch op `erq::<its name>`, called past torch's dispatcher where that only
    costs time (some 20 µs a call): where nothing records, traces, transforms or profiles.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        update_wrapper(self, run)
        self._run = run
        self._op = torch.library.custom_op(f"erq::{run.__name__}", run, mutates_args=())

    def register_fake(self, fake: Callable[..., Tensor]) -> None:
        """Register the shape function; as it is what runs for tensors on several devices if one of
        them is meta, which would then give what its memory holds, that is refused here."""

        def checked(*args: Any, **kwargs: Any) -> Tensor:
            _check_device(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
            return fake(*args, **kwargs)

        self._op.register_fake(checked)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if type(first) is Tensor and not first.is_meta and is_plain_eager():
            return self._run(*args, **kwargs)
        return self._op(*args, **kwargs)


def is_plain_eager() -> bool:
    """Whether an op called now is only to be run."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_codes(name: str, x: Tensor, dim: int | None = None) -> None:
    if x.dtype != torch.int8:
        raise ValueError(f"{name} must hold int8 codes, got {x.dtype}")
    if dim is not None and x.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got {list(x.shape)}")


def _check_bits(bits: int, lowest: int = 2) -> None:
    if not lowest <= bits <= 8:
        raise ValueError(f"bits must be from {lowest} to 8, got {bits}")


def _check_float(name: str, x: Tensor | None, *shape: int) -> None:
    if x is not None and not (x.is_floating_point() and x.shape == shape):
        raise ValueError(f"{name} must be float {list(shape)}, got {x.dtype} {list(x.shape)}")


def _check_vector(
    name: str, x: Tensor | None, rows: int, dtype: torch.dtype = torch.float32
) -> None:
    if x is not None and not (x.dtype == dtype and x.shape == (rows,)):
        raise ValueError(f"{name} must be {dtype} [{rows}], got {x.dtype} {list(x.shape)}")


def _check_scalar(name: str, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    if not (x.dtype == dtype and x.dim() == 0):
        raise ValueError(f"{name} must be {dtype} [], got {x.dtype} {list(x.shape)}")


def _check_quantizer(inv_scale: Tensor, zero_point: Tensor, columns: int, name: str) -> None:
    if not (inv_scale.dtype == torch.float32 and zero_point.dtype == torch.int32):
        raise ValueError(
            f"{name}: inv_scale must be float32 and zero_point int32, got {inv_scale.dtype} and "
            f"{zero_point.dtype}"
        )
    if not (inv_scale.shape == zero_point.shape and inv_scale.shape in ((), (columns,))):
        raise ValueError(
            f"{name}: inv_scale and zero_point must both be [] or [{columns}], got "
            f"{list(inv_scale.shape)} and {list(zero_point.shape)}"
        )


def _check_output_quantizer(
    inv_scale: Tensor | None, zero_point: Tensor | None, bits: int, columns: int, op: str
) -> None:
    if inv_scale is None or zero_point is None:
        _require(
            inv_scale is None and zero_point is None,
            f"{op}: out_inv_scale and out_zero_point come together",
        )
        return
    _check_bits(bits)
    _check_quantizer(inv_scale, zero_point, columns, f"{op}'s output")


def _check_epilogue(
    act: str, residual: Tensor | None, out_dtype: torch.dtype, rows: int, columns: int
) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    _check_float("residual", residual, rows, columns)
    if out_dtype not in OUT_DTYPES:
        raise ValueError(
            f"out_dtype must be one of {', '.join(map(str, OUT_DTYPES))}, got {out_dtype}"
        )


def _check_packed_output(
    out_packed: bool, out_inv_scale: Tensor | None, bits: int, columns: int
) -> None:
    if not isinstance(out_packed, bool):
        raise ValueError(f"out_packed must be True or False, got {out_packed!r}")
    if not out_packed:
        return
    if out_inv_scale is None:
        raise ValueError("out_packed takes codes: give a quantizer of the result")
    if bits > 4 or columns % 2:
        raise ValueError(
            "out_packed takes codes of at most 4 bits and an even number of columns, got "
            f"{bits} bits and {columns} columns"
        )


def _empty_codes(x: Tensor, shape: Sequence[int], packed: bool) -> Tensor:
    """What an op that gives codes of `shape` gives, on x's device."""
    if packed:
        return x.new_empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    return x.new_empty(tuple(shape), dtype=torch.int8)


def _check_strided(x: Tensor) -> None:
    if x.layout is not torch.strided:
        raise ValueError(f"tensors must be dense (torch.strided), got one of {x.layout}")


def _check_device(x: Tensor, *others: Tensor | None) -> None:
    index = x.get_device()  # an int, −1 for the CPU and others alike: cheaper than the device
    is_known = index >= 0 or x.is_cpu
    _check_strided(x)
    for other in others:
        if other is not None:
            _check_strided(other)
        if other is None:
            continue
        if is_known and other.get_device() == index and (index >= 0 or other.is_cpu):
            continue
        if other.device != x.device:
            raise ValueError(
                f"all tensors of one call live on one device, got {x.device} and {other.device}"
            )


@_Op
def quantize(
    x: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out_packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Codes of a float tensor; see `reference.quantize`.

    Args:
        x: float [..., C]; what is NaN gets some code, since codes have none (the deployed modules
            mark their results). inv_scale: fp32 [] or [C]. zero_point: int32, same shape.
        bits: 2..8.

    Returns:
        int8 [..., C], or uint8 [..., C / 2] if out_packed (`formats.pack_nibbles`).

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_bits(bits)
    _require(x.is_floating_point(), f"quantize takes a float tensor, got {x.dtype}")
    _check_quantizer(inv_scale, zero_point, x.shape[-1] if x.dim() else 1, "quantize")
    _check_packed_output(out_packed, inv_scale, bits, x.shape[-1] if x.dim() else 1)
    _check_device(x, inv_scale, zero_point)
    return _run("quantize", backend, x, inv_scale, zero_point, bits, out_packed)


@quantize.register_fake
def _(
    x: Tensor,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    out_packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    return _empty_codes(x, x.shape, out_packed)


@_Op
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
    backend: str = "auto",
) -> Tensor:
    """LayerNorm, then codes, in the next GEMM's column order; see `reference.layer_norm_quantize`.

    Args:
        x: float [M, K]. weight, bias: fp32 [K]. eps: > 0. order: int64 [K'], position → input
            channel, or None for natural order.

    Returns:
        int8 [M, K'], K' = K without an order; or uint8 [M, K' / 2] if out_packed.

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_bits(bits)
    if not (x.is_floating_point() and x.dim() == 2):
        raise ValueError(f"layer_norm_quantize takes a float [M, K], got {x.dtype} {list(x.shape)}")
    k = x.shape[1]
    _require(weight is not None and bias is not None, "weight and bias must be tensors, got None")
    _check_vector("weight", weight, k)
    _check_vector("bias", bias, k)
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be finite and > 0, got {eps}")
    if order is not None:
        _check_vector("order", order, order.numel(), torch.int64)
    _check_quantizer(inv_scale, zero_point, k, "layer_norm_quantize")
    _check_device(x, weight, bias, inv_scale, zero_point, order)
    _check_packed_output(out_packed, inv_scale, bits, k if order is None else order.numel())
    args = (x, weight, bias, eps, inv_scale, zero_point, bits, order, out_packed)
    return _run("layer_norm_quantize", backend, *args)


@layer_norm_quantize.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None = None,
    out_packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    columns = x.shape[1] if order is None else order.shape[0]
    return _empty_codes(x, (x.shape[0], columns), out_packed)


@_Op
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
    out_dtype: torch.dtype | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    weight_offset: Tensor | None = None,
    out_packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Integer GEMM over two K segments with its epilogue; see `reference.qlinear`.

    Args:
        x: int8 codes [M, K], columns in GEMM order. weight: int8 [N, K]. Or both packed, uint8
            [M, K / 2] and [N, K / 2] (`formats.pack_nibbles`, `formats.pack_weight`).
        scale, scale2, bias, layer_scale: fp32 [N]. split: length of the first K segment.
        residual: float [M, N]. out_dtype: float16, bfloat16 or float32; None: float32. (A default
            dtype in the schema is a number to AOTInductor, which then cannot load its package.)
        out_inv_scale, out_zero_point, out_bits: quantizer of the result, [] or [N].
        weight_offset: int32 [segments, N], packed operands only. out_packed: codes of at most 4
            bits leave packed.

    Returns:
        [M, N] of out_dtype, or int8 codes, or uint8 [M, N / 2].

    Raises:
        ValueError: an argument that is not the above.
    """
    packed = x.dtype == torch.uint8
    if packed:
        if not (x.dim() == 2 and weight.dim() == 2 and weight.dtype == torch.uint8):
            raise ValueError(
                f"packed x goes with packed weight, uint8 [M, K / 2] and [N, K / 2], got "
                f"{list(x.shape)} and {weight.dtype} {list(weight.shape)}"
            )
        if split % 2:
            raise ValueError(f"a packed segment has an even length, got {split}")
    else:
        _check_codes("x", x, 2)
        _check_codes("weight", weight, 2)
    n, k = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns, weight {weight.shape[1]}")
    if weight_offset is not None:
        shape = (1 if scale2 is None else 2, n)
        if not (packed and weight_offset.dtype == torch.int32 and weight_offset.shape == shape):
            raise ValueError(
                f"weight_offset goes with packed operands and must be int32 {list(shape)}, got "
                f"{weight_offset.dtype} {list(weight_offset.shape)}"
            )
    _require(bias is not None, f"bias must be float32 [{n}], zeros for none, got None")
    vectors = {"scale": scale, "scale2": scale2, "bias": bias, "layer_scale": layer_scale}
    for name, vector in vectors.items():
        _check_vector(name, vector, n)
    if not (0 < split < k if scale2 is not None else split == k):
        raise ValueError(
            f"split must lie inside 1..{k - 1} with scale2 and be {k} without, got {split}"
        )
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    _check_epilogue(act, residual, out_dtype, x.shape[0], n)
    _check_output_quantizer(out_inv_scale, out_zero_point, out_bits, n, "qlinear")
    _check_packed_output(out_packed, out_inv_scale, out_bits, n)
    _check_device(
        x, weight, *vectors.values(), residual, out_inv_scale, out_zero_point, weight_offset
    )
    args = (
        x, weight, scale, scale2, split, bias, act, layer_scale, residual, out_dtype,
        out_inv_scale, out_zero_point, out_bits, weight_offset, out_packed,
    )  # fmt: skip
    return _run("qlinear", backend, *args)


@qlinear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    split: int,
    bias: Tensor,
    act: str = "none",
    layer_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    weight_offset: Tensor | None = None,
    out_packed: bool = False,
    backend: str = "auto",
) -> Tensor:
    shape = (x.shape[0], weight.shape[0])
    if out_inv_scale is not None:
        return _empty_codes(x, shape, out_packed)
    return torch.empty(shape, dtype=out_dtype or torch.float32, device=x.device)


@_Op
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
    out_dtype: torch.dtype | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    backend: str = "auto",
) -> Tensor:
    """`qlinear` on a weight that stays packed; see `reference.qlinear_packed`.

    Args:
        x: int8 codes [M, K'], columns in GEMM order.
        packed: uint8 [N, K' · w_bits / 8] of `formats.order_packed`. w_bits: 2..8.
        k: input channels. outliers: those of the first of two segments, or 0.
        w_zero_point, w_zero_point2: int32 [N] of the segments; code − zero point has to fit int8,
            which is not checked here (`formats.check_centered`).
        others: as `qlinear`.

    Returns:
        [M, N] of out_dtype, or int8 codes.

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_codes("x", x, 2)
    _check_bits(w_bits)
    n = scale.numel()
    _require(
        0 <= outliers < max(k, 1), f"outliers must lie inside 0..{max(k, 1) - 1}, got {outliers}"
    )
    columns = formats.repacked_columns(k, outliers)
    _require(
        x.shape[1] == columns,
        f"x must have the {columns} columns of {k} channels, {outliers} of them outliers, in GEMM "
        f"order, got {x.shape[1]}",
    )
    _require(
        packed.dtype == torch.uint8 and tuple(packed.shape) == (n, columns * w_bits // 8),
        f"packed must be uint8 {[n, columns * w_bits // 8]}, got {packed.dtype} "
        f"{list(packed.shape)}",
    )
    _require(bias is not None, f"bias must be float32 [{n}], zeros for none, got None")
    vectors = {"scale": scale, "scale2": scale2, "bias": bias, "layer_scale": layer_scale}
    for name, vector in vectors.items():
        _check_vector(name, vector, n)
    _check_vector("w_zero_point", w_zero_point, n, torch.int32)
    _check_vector("w_zero_point2", w_zero_point2, n, torch.int32)
    dual = [outliers > 0, scale2 is not None, w_zero_point2 is not None]
    _require(all(dual) or not any(dual), "outliers, scale2 and w_zero_point2 come together")
    out_dtype = torch.float32 if out_dtype is None else out_dtype
    _check_epilogue(act, residual, out_dtype, x.shape[0], n)
    _check_output_quantizer(out_inv_scale, out_zero_point, out_bits, n, "qlinear_packed")
    _check_device(
        x, packed, *vectors.values(), w_zero_point, w_zero_point2, residual, out_inv_scale,
        out_zero_point,
    )  # fmt: skip
    args = (
        x, packed, w_bits, k, outliers, w_zero_point, w_zero_point2, scale, scale2, bias, act,
        layer_scale, residual, out_dtype, out_inv_scale, out_zero_point, out_bits,
    )  # fmt: skip
    return _run("qlinear_packed", backend, *args)


@qlinear_packed.register_fake
def _(
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
    out_dtype: torch.dtype | None = None,
    out_inv_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_bits: int = 0,
    backend: str = "auto",
) -> Tensor:
    dtype = (out_dtype or torch.float32) if out_inv_scale is None else torch.int8
    return torch.empty((x.shape[0], packed.shape[0]), dtype=dtype, device=x.device)


@_Op
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
    backend: str = "auto",
) -> Tensor:
    """Attention on codes; see `reference.qattention`.

    Args:
        q, k, v: int8 codes [B, H, T, D]. zero points: int32 [], below 2**12 in magnitude, so that
            sums stay inside int32; values are not looked at. scales: fp32 []; without
            p_inv_scale the probabilities stay float. bias: float, broadcastable to [n, H, T, T]
            where n divides B: entry i of the batch gets bias[i % n].

    Returns:
        fp32 [B, T, H, D]; with out_inv_scale int8 codes, or packed uint8 [B, T, H, D / 2].

    Raises:
        ValueError: an argument that is not the above.
    """
    for name, codes in (("q", q), ("k", k), ("v", v)):
        _check_codes(name, codes, 4)
        if codes.shape != q.shape:
            raise ValueError(
                f"q, k and v must have one shape, got {list(q.shape)} and {list(codes.shape)}"
            )
    _check_bits(qk_bits)
    _check_bits(av_bits)
    zero_points = {"q": q_zero_point, "k": k_zero_point, "v": v_zero_point}
    for name, zero_point in zero_points.items():
        _check_scalar(f"{name}_zero_point", zero_point, torch.int32)
    scales = {"score_scale": score_scale, "p_inv_scale": p_inv_scale, "value_scale": value_scale}
    for name, scale in scales.items():
        if scale is not None:
            _check_scalar(name, scale)
    if bias is not None:
        shape = (*q.shape[:3], q.shape[2])
        batches = bias.shape[0] if bias.dim() == 4 else 1
        _require(
            bias.is_floating_point()
            and bias.dim() <= 4
            and all(b in (1, s) for b, s in zip(bias.shape[:-4:-1], shape[:0:-1], strict=False))
            and (batches == 1 or (batches > 0 and shape[0] % batches == 0)),
            f"bias must be float and broadcast to {list(shape)}, or its first dimension divide "
            f"{shape[0]}, got {bias.dtype} {list(bias.shape)}",
        )
    _check_output_quantizer(out_inv_scale, out_zero_point, out_bits, q.shape[-1], "qattention")
    _check_packed_output(out_packed, out_inv_scale, out_bits, q.shape[-1])
    _check_device(
        q, k, v, *zero_points.values(), *scales.values(), bias, out_inv_scale, out_zero_point
    )
    args = (
        q, k, v, q_zero_point, k_zero_point, v_zero_point, score_scale, p_inv_scale, value_scale,
        qk_bits, av_bits, zero_last, bias, out_inv_scale, out_zero_point, out_bits,
        out_packed,
    )  # fmt: skip
    return _run("qattention", backend, *args)


@qattention.register_fake
def _(
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
    backend: str = "auto",
) -> Tensor:
    b, h, t, d = q.shape
    if out_inv_scale is not None:
        return _empty_codes(q, (b, t, h, d), out_packed)
    return torch.empty((b, t, h, d), device=q.device)


@_Op
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
    backend: str = "auto",
) -> Tensor:
    """Weight-only linear layer on packed codes; see `reference.dequant_linear`.

    Args:
        x: float [M, K]. packed: uint8 dense bit stream of codes [N, K].
        scale, zero_point: fp32 / int32 [N]; scale2, zero_point2: those of `columns`, int64 [S].
        bias: fp32 [N].

    Returns:
        [M, N] of x's dtype.

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_bits(bits)
    _require(
        x.is_floating_point() and x.dim() == 2,
        f"dequant_linear takes a float [M, K], got {x.dtype} {list(x.shape)}",
    )
    k, n = x.shape[1], scale.numel()
    size = formats.packed_size(n * k, bits)
    _require(
        packed.dtype == torch.uint8 and packed.dim() > 0 and packed.numel() == size,
        f"packed must hold {n}×{k} codes of {bits} bits in {size} bytes, got "
        f"{packed.numel()} of {packed.dtype}",
    )
    _check_vector("scale", scale, n)
    _check_vector("scale2", scale2, n)
    _check_vector("zero_point", zero_point, n, torch.int32)
    _check_vector("zero_point2", zero_point2, n, torch.int32)
    _check_vector("bias", bias, n)
    dual = [t is not None for t in (scale2, zero_point2, columns)]
    _require(all(dual) or not any(dual), "scale2, zero_point2 and columns come together")
    if columns is not None:
        _check_vector("columns", columns, columns.numel(), torch.int64)
        _require(0 < columns.numel() < k, f"columns must name 1..{k - 1} of {k} columns")
    _check_device(x, packed, scale, zero_point, scale2, zero_point2, columns, bias)
    args = (x, packed, bits, scale, zero_point, scale2, zero_point2, columns, bias)
    return _run("dequant_linear", backend, *args)


@dequant_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    bits: int,
    scale: Tensor,
    zero_point: Tensor,
    scale2: Tensor | None = None,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]))


@_Op
def pack(codes: Tensor, bits: int, backend: str = "auto") -> Tensor:
    """Dense bit stream of codes; see `formats.pack`.

    Args:
        codes: integers of any shape in 0..2**bits − 1. bits: 1..8.

    Returns:
        uint8 [ceil(numel · bits / 8)].

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_bits(bits, lowest=1)
    _require(
        not (codes.is_floating_point() or codes.is_complex()),
        f"codes must be integers, got {codes.dtype}",
    )
    _check_device(codes)
    return _run("pack", backend, codes, bits)


@pack.register_fake
def _(codes: Tensor, bits: int, backend: str = "auto") -> Tensor:
    size = formats.packed_size(codes.numel(), bits)
    return torch.empty(size, dtype=torch.uint8, device=codes.device)


@_Op
def unpack(packed: Tensor, bits: int, shape: Sequence[int], backend: str = "auto") -> Tensor:
    """Codes of a dense bit stream; see `formats.unpack`.

    Args:
        packed: uint8 [ceil(prod(shape) · bits / 8)]. bits: 1..8.

    Returns:
        uint8 codes of `shape`.

    Raises:
        ValueError: an argument that is not the above.
    """
    _check_bits(bits, lowest=1)
    _require(all(n >= 0 for n in shape), f"shape must be sizes >= 0, got {list(shape)}")
    _check_device(packed)
    return _run("unpack", backend, packed, bits, tuple(shape))


@unpack.register_fake
def _(packed: Tensor, bits: int, shape: Sequence[int], backend: str = "auto") -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.uint8, device=packed.device)


@_Op
def repack(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bit stream of a weight → the layout that `qlinear` reads; see `formats.repack`.

    Args:
        packed: uint8 dense bit stream of codes [N, k]. bits: 2..8.
        zero_point: int32 [N]; zero_point2: that of `columns`, int64 [S] sorted.

    Returns:
        int8 [N, K'], code − zero_point in the order of `formats.k_order`, 0 at padding.

    Raises:
        ValueError: an argument that is not the above; a code − zero_point outside int8.
    """
    _check_bits(bits)
    n = zero_point.numel()
    size = formats.packed_size(n * k, bits)
    _require(
        packed.dtype == torch.uint8 and packed.dim() > 0 and packed.numel() == size,
        f"packed must hold {n}×{k} codes of {bits} bits in {size} bytes, got "
        f"{packed.numel()} of {packed.dtype}",
    )
    _check_vector("zero_point", zero_point, n, torch.int32)
    _check_vector("zero_point2", zero_point2, n, torch.int32)
    _require((zero_point2 is None) == (columns is None), "zero_point2 and columns come together")
    _check_device(packed, zero_point, zero_point2, columns)
    if columns is not None:
        _check_vector("columns", columns, columns.numel(), torch.int64)
        _require(0 < columns.numel() < k, f"columns must name 1..{k - 1} of {k} columns")
        inside = bool((columns >= 0).all() & (columns < k).all() & (columns.diff() > 0).all())
        _require(inside, f"columns must be sorted, distinct and inside 0..{k - 1}")
    formats.check_centered(
        lambda: formats.unpack(packed, bits, (n, k)), bits, zero_point, zero_point2, columns
    )
    return _run("repack", backend, packed, bits, k, zero_point, zero_point2, columns)


@repack.register_fake
def _(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    outliers = 0 if columns is None else columns.shape[0]
    shape = (zero_point.shape[0], formats.repacked_columns(k, outliers))
    return torch.empty(shape, dtype=torch.int8, device=packed.device)


def _always(*_: Any, **__: Any) -> str | None:
    return None


_REFERENCE: dict[str, Callable[..., Any]] = {
    "quantize": reference.quantize,
    "layer_norm_quantize": reference.layer_norm_quantize,
    "qlinear": reference.qlinear,
    "qlinear_packed": reference.qlinear_packed,
    "qattention": reference.qattention,
    "dequant_linear": reference.dequant_linear,
    "pack": formats.pack,
    "unpack": formats.unpack,
    "repack": formats.repack,
}
for _name, _reference in _REFERENCE.items():
    dispatch.register(_name, "reference", _reference, _always)
