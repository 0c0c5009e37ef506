"""Runs ops on the library built from csrc/cpu and registers them with `dispatch` as "cpu".

The library is plain C (csrc/erq_cpu.h) and is loaded on the first call that could run there. Its
instruction set is the processor's best; ERQ_CPU_VARIANT=plain, avx2, avx512 or amx forces one for
the process, `use_variant` for a stretch of code. It works on as many threads as torch does.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from erq_kernels import dispatch, formats, reference

VARIANTS = ("plain", "avx2", "avx512", "amx")
"""Instruction sets, in the order of csrc/erq_cpu.h."""

# Of what is allocated here, also where another default device is set.
_CPU = torch.device("cpu")

PATH = Path(__file__).with_name("liberq_cpu.so")
_ABI = 2

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CODES = 3
_ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}
# Rows up to which a packed weight is decoded as it is multiplied; more rows pay for a decoded one.
_FEW_ROWS = 16

# The structs of csrc/erq_cpu.h: every field takes 8 bytes.
_NO_QUANTIZER = (0, 0, 0, 2)
_PACK_WEIGHT = struct.Struct("6q")
_QLINEAR = struct.Struct("23q")
_LAYER_NORM = struct.Struct("7qd9q")
_QUANTIZE = struct.Struct("11q")
_ATTENTION = struct.Struct("39q")
_DEQUANT_LINEAR = struct.Struct("17q")
_STREAM = struct.Struct("6q")
_BLOCK_TAIL = struct.Struct("5q")


@dataclass(frozen=True)
class _Library:
    """The loaded library: its functions take the bytes of their struct."""

    pack_weight: Callable[[bytes], None]
    packed_bytes: Callable[[int, int, int, int], int]
    qlinear: Callable[[bytes], None]
    layer_norm_quantize: Callable[[bytes], int]
    quantize: Callable[[bytes], None]
    attention: Callable[[bytes], None]
    dequant_linear: Callable[[bytes], None]
    pack: Callable[[bytes], None]
    unpack: Callable[[bytes], None]
    block: Callable[[bytes], int]
    set_parallel: Callable[[int], None]
    compare: Callable[[int, int, int], int]
    best_variant: int


def _openmp_parallel() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch brought, or 0.

    GNU's, LLVM's and Intel's have it. Its threads are those torch computes on, so that the two do
    not compete for the processor.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return 0
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    found = [p for p in sorted(paths) if Path(p).name.startswith(("libgomp", "libomp", "libiomp"))]
    for path in sorted(found, key=lambda p: "/torch/" not in p):
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


@cache
def _load() -> _Library | str:
    """The library, or the reason there is none."""
    if not PATH.is_file():
        return (
            f"{PATH.name} is not built: install erq where a C++ compiler is, or run "
            "python csrc/build.py"
        )
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"{PATH.name} does not load: {error}"
    abi = library.erq_cpu_abi()
    if abi != _ABI:
        return f"{PATH.name} has interface {abi}, this code needs {_ABI}: build it again"
    library.erq_cpu_set_parallel.argtypes = [ctypes.c_void_p]
    library.erq_cpu_set_parallel.restype = None
    library.erq_cpu_set_parallel(_openmp_parallel())
    library.erq_cpu_packed_bytes.argtypes = [ctypes.c_int64] * 4
    library.erq_cpu_packed_bytes.restype = ctypes.c_int64
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    functions = {}
    for name in (
        "pack_weight", "qlinear", "layer_norm_quantize", "quantize", "attention", "dequant_linear",
        "pack", "unpack", "block",
    ):  # fmt: skip
        function = functions[name] = getattr(library, f"erq_cpu_{name}")
        function.argtypes = [ctypes.c_char_p]
        function.restype = ctypes.c_int32 if name in ("layer_norm_quantize", "block") else None
    return _Library(
        packed_bytes=library.erq_cpu_packed_bytes,
        set_parallel=library.erq_cpu_set_parallel,
        compare=compare,
        best_variant=library.erq_cpu_best_variant(),
        **functions,
    )


_forced_variant: str | None = None


def variant() -> str:
    """The instruction set that kernels run with.

    Raises:
        RuntimeError: there is no library.
        ValueError: ERQ_CPU_VARIANT is none that this processor has.
    """
    return VARIANTS[_variant_index()]


def supported_variants() -> tuple[str, ...]:
    """The instruction sets that this processor runs; empty without the library."""
    library = _load()
    return () if isinstance(library, str) else VARIANTS[: library.best_variant + 1]


@contextmanager
def use_variant(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set, in every thread, while the context is open.

    Raises:
        ValueError: none that this processor has.
    """
    global _forced_variant
    before, _forced_variant = _forced_variant, _check_variant(name)
    try:
        yield
    finally:
        _forced_variant = before


def _check_variant(name: str) -> str:
    if name not in supported_variants():
        raise ValueError(
            f"unknown or unsupported CPU variant {name!r}; this processor runs "
            f"{', '.join(supported_variants()) or 'none'}"
        )
    return name


@cache
def _default_variant() -> int:
    name = os.environ.get("ERQ_CPU_VARIANT")
    return VARIANTS.index(_check_variant(name) if name else supported_variants()[-1])


def _variant_index() -> int:
    _library()
    return _default_variant() if _forced_variant is None else VARIANTS.index(_forced_variant)


def _library() -> _Library:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def _rows_in_place(x: Tensor) -> Tensor:
    """x with neighbouring columns, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _quantizer(
    inv_scale: Tensor | None, zero_point: Tensor | None, bits: int
) -> tuple[tuple[int, int, int, int], tuple[Tensor, Tensor] | None]:
    """The struct's fields, and the tensors that must live as long as they are used."""
    if inv_scale is None or zero_point is None:
        return _NO_QUANTIZER, None
    inv_scale, zero_point = inv_scale.contiguous(), zero_point.contiguous()
    fields = (inv_scale.data_ptr(), zero_point.data_ptr(), inv_scale.dim(), bits)
    return fields, (inv_scale, zero_point)


@dataclass(frozen=True)
class _PackedWeight:
    """A weight as the GEMM reads it.

    Args:
        source: the tensor it was made of. state: what must be unchanged for it to be valid.
        original: a copy of a source that does not count its changes (an inference tensor), else
            None.
    """

    source: weakref.ref[Tensor]
    state: tuple[Any, ...]
    original: Tensor | None
    packed: Tensor


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two int8 matrices of one shape hold the same; torch.equal takes ten times as long."""
    b = b.contiguous()
    return _library().compare(a.data_ptr(), b.data_ptr(), b.numel()) == 0


# id of the source → its packed form; an entry goes with its source.
_packed_weights: dict[int, _PackedWeight] = {}


def _packed_weight(weight: Tensor, split: int, instructions: int) -> Tensor:
    """The weight in the layout of `instructions`, made once and again after a change."""
    counted = not weight.is_inference()
    version = weight._version if counted else 0
    state = (version, weight.data_ptr(), split, instructions)
    key = id(weight)
    entry = _packed_weights.get(key)
    if (
        entry is not None
        and entry.state == state
        and entry.source() is weight
        and (entry.original is None or _same_bytes(entry.original, weight))
    ):
        return entry.packed
    library = _library()
    n, k = weight.shape
    rows = weight.contiguous()
    size = library.packed_bytes(n, k, split, instructions)
    packed = torch.empty(size, dtype=torch.uint8, device=_CPU)
    library.pack_weight(
        _PACK_WEIGHT.pack(rows.data_ptr(), n, k, split, packed.data_ptr(), instructions)
    )

    def forget(source: weakref.ref[Tensor]) -> None:
        current = _packed_weights.get(key)
        if current is not None and current.source is source:
            del _packed_weights[key]

    original = None if counted else weight.clone(memory_format=torch.contiguous_format)
    source = weakref.ref(weight, forget)
    _packed_weights[key] = _PackedWeight(source, state, original, packed)
    return packed


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
    """`reference.qlinear` with the weight packed once, as long as the tensor lives; 4-bit operands
    and results are refused (`_why_not`).
    """
    x = _rows_in_place(x)
    m, n = x.shape[0], weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype if out_inv_scale is None else torch.int8, device=_CPU)
    fields, held = _qlinear_fields(
        weight, scale, scale2, split, bias, act, layer_scale, residual, out_dtype,
        out_inv_scale, out_zero_point, out_bits, x, out,
    )  # fmt: skip
    _library().qlinear(fields)
    del held
    return out


def _qlinear_fields(
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
    x: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[bytes, Any]:
    """The struct of a call that writes `out`, and what must live as long as it is used."""
    instructions = _variant_index()
    n, k = weight.shape
    packed = _packed_weight(weight, split, instructions)
    quantizer, held = _quantizer(out_inv_scale, out_zero_point, out_bits)
    scale, bias = scale.contiguous(), bias.contiguous()
    scale2 = None if scale2 is None else scale2.contiguous()
    layer_scale = None if layer_scale is None else layer_scale.contiguous()
    residual_stride = residual_type = 0
    if residual is not None:
        residual = _rows_in_place(residual)
        residual_stride, residual_type = residual.stride(0), _TYPES[residual.dtype]
    m, x_stride = (0, 0) if x is None else (x.shape[0], x.stride(0))
    fields = _QLINEAR.pack(
        _address(x), x_stride, packed.data_ptr(), m, n, k, split, scale.data_ptr(),
        _address(scale2), bias.data_ptr(), _ACTIVATIONS[act], _address(layer_scale),
        _address(residual), residual_stride, residual_type, _address(out),
        _CODES if held else _TYPES[out_dtype], *quantizer, torch.get_num_threads(), instructions,
    )  # fmt: skip
    return fields, (packed, held, scale, scale2, bias, layer_scale, residual)


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
    """`reference.qlinear_packed`: the weight is unpacked for the call and given up after it."""
    codes = unpack(packed.reshape(-1), w_bits, (packed.shape[0], x.shape[1]))
    weight, split = reference.center_ordered(codes, k, outliers, w_zero_point, w_zero_point2)
    return qlinear(
        x, weight, scale, scale2, split, bias, act, layer_scale, residual, out_dtype,
        out_inv_scale, out_zero_point, out_bits,
    )  # fmt: skip


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
    """`reference.layer_norm_quantize`.

    Raises:
        ValueError: order names a channel that x does not have.
    """
    x = _rows_in_place(x)
    columns = x.shape[1] if order is None else order.shape[0]
    out = torch.empty((x.shape[0], columns), dtype=torch.int8, device=_CPU)
    fields, held = _layer_norm_fields(x, weight, bias, eps, inv_scale, zero_point, bits, order, out)
    wrong = _library().layer_norm_quantize(fields)
    del held
    if wrong:
        raise ValueError(f"order must name channels 0..{x.shape[1] - 1}")
    return out


def _layer_norm_fields(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inv_scale: Tensor,
    zero_point: Tensor,
    bits: int,
    order: Tensor | None,
    out: Tensor | None = None,
) -> tuple[bytes, Any]:
    """As `_qlinear_fields`."""
    m, k = x.shape
    weight, bias = weight.contiguous(), bias.contiguous()
    quantizer, held = _quantizer(inv_scale, zero_point, bits)
    order = None if order is None else order.contiguous()
    columns = k if order is None else order.shape[0]
    fields = _LAYER_NORM.pack(
        x.data_ptr(), x.stride(0), _TYPES[x.dtype], m, k, weight.data_ptr(), bias.data_ptr(),
        eps, *quantizer, _address(order), columns, _address(out), torch.get_num_threads(),
        _variant_index(),
    )  # fmt: skip
    return fields, (weight, bias, held, order)


def quantize(
    x: Tensor, inv_scale: Tensor, zero_point: Tensor, bits: int, out_packed: bool = False
) -> Tensor:
    """`reference.quantize`."""
    library, instructions = _library(), _variant_index()
    x = x.contiguous()
    quantizer, held = _quantizer(inv_scale, zero_point, bits)
    k = x.shape[-1] if inv_scale.dim() else x.numel()
    m = x.numel() // k if k else 0
    out = torch.empty(x.shape, dtype=torch.int8, device=_CPU)
    library.quantize(
        _QUANTIZE.pack(
            x.data_ptr(), _TYPES[x.dtype], m, k, *quantizer, out.data_ptr(),
            torch.get_num_threads(), instructions,
        )
    )  # fmt: skip
    del held
    return out


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
    """`reference.qattention`; codes equal but where exp and log round differently."""
    b, h, t, d = q.shape
    q, k, v = _rows_in_place(q), _rows_in_place(k), _rows_in_place(v)
    dtype = torch.float32 if out_inv_scale is None else torch.int8
    out = torch.empty((b, t, h, d), dtype=dtype, device=_CPU)
    fields, held = _attention_fields(
        q, k, v, q_zero_point, k_zero_point, v_zero_point, score_scale, p_inv_scale, value_scale,
        qk_bits, av_bits, zero_last, bias, out_inv_scale, out_zero_point, out_bits, out,
    )  # fmt: skip
    _library().attention(fields)
    del held
    return out


def _attention_fields(
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
    out: Tensor | None = None,
) -> tuple[bytes, Any]:
    """As `_qlinear_fields`."""
    b, h, t, d = q.shape
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    bias_batches = 1
    if bias is not None:
        bias_batches = bias.shape[0] if bias.dim() == 4 else 1
        bias = bias.float().expand(bias_batches, h, t, t)
        bias_strides = bias.stride()
    quantizer, held = _quantizer(out_inv_scale, out_zero_point, out_bits)
    fields = _ATTENTION.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], b, h, t, d, q_zero_point.data_ptr(), k_zero_point.data_ptr(),
        v_zero_point.data_ptr(), score_scale.data_ptr(), _address(p_inv_scale),
        value_scale.data_ptr(), qk_bits, av_bits, zero_last, _address(bias), *bias_strides,
        bias_batches, _address(out), _CODES if held else 0, *quantizer,
        torch.get_num_threads(), _variant_index(),
    )  # fmt: skip
    return fields, (bias, held)


@dataclass(frozen=True)
class BlockArguments:
    """What the ops of a transformer block take after their first operands.

    Args:
        norm1, norm2: of `layer_norm_quantize`, in its order. attention: of `qattention`, in its
            order. qkv, proj, fc1, fc2: of `qlinear`, by name, without residual and out_dtype.
        heads, head_dim: of q, k and v.
    """

    norm1: tuple[Any, ...]
    qkv: dict[str, Any]
    attention: tuple[Any, ...]
    proj: dict[str, Any]
    norm2: tuple[Any, ...]
    fc1: dict[str, Any]
    fc2: dict[str, Any]
    heads: int
    head_dim: int


BLOCK_PARTS = ("norm1", "qkv", "attention", "proj", "norm2", "fc1", "fc2")

# Where `block` adds its parts' nanoseconds, over all threads: int64 [7].
_block_times: Tensor | None = None


@contextmanager
def timed_blocks() -> Iterator[Tensor]:
    """int64 [7], to which every `block` in the context adds the nanoseconds of BLOCK_PARTS, over
    all threads."""
    global _block_times
    before, _block_times = _block_times, torch.zeros(len(BLOCK_PARTS), dtype=torch.int64)
    try:
        yield _block_times
    finally:
        _block_times = before


def block(x: Tensor, a: BlockArguments) -> Tensor:
    """A pre-norm transformer block in one call, to the results of its seven ops one by one.

    Args:
        x: float [B, T, C]; its width and dtype are of the block, and every op can run here.

    Returns:
        As x.

    Raises:
        ValueError: an order names a channel that x does not have, or widths that do not fit each
            other.
    """
    x = x.contiguous()
    images, tokens, width = x.shape
    rows = x.view(-1, width)
    # Operands between the parts are the library's own: these stand for them.
    head = torch.empty(1, dtype=torch.int8, device=_CPU).expand(1, a.heads, tokens, a.head_dim)
    parts = (
        _layer_norm_fields(rows, *a.norm1),
        _qlinear_fields(**a.qkv),
        _attention_fields(head, head, head, *a.attention),
        _qlinear_fields(**a.proj, out_dtype=x.dtype),
        _layer_norm_fields(rows, *a.norm2),
        _qlinear_fields(**a.fc1),
        _qlinear_fields(**a.fc2, out_dtype=x.dtype),
    )
    out = torch.empty_like(x)
    tail = _BLOCK_TAIL.pack(
        x.data_ptr(), out.data_ptr(), images, _address(_block_times), torch.get_num_threads()
    )
    wrong = _library().block(b"".join([*(fields for fields, _ in parts), tail]))
    if wrong == 1:
        raise ValueError(f"order must name channels 0..{width - 1}")
    if wrong:
        raise ValueError(f"the widths of the block's parts do not fit x {list(x.shape)}")
    return out


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
    """`reference.dequant_linear`: few rows at once with decoding, many on the decoded weight.

    Raises:
        ValueError: columns names a channel that x does not have.
    """
    library, instructions = _library(), _variant_index()
    m, k = x.shape
    n = scale.shape[0]
    rows = x.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    kept = [
        None if p is None else p.contiguous()
        for p in (packed, scale, zero_point, scale2, zero_point2, columns)
    ]
    if columns is not None:
        reference.check_channels("columns", columns, k)
    is_few = 0 < m <= _FEW_ROWS and k > 0
    out = torch.empty((m, n) if is_few else (n, k), device=_CPU)
    stream, *params = (_address(p) for p in kept)
    library.dequant_linear(
        _DEQUANT_LINEAR.pack(
            stream, packed.numel(), bits, n, k, *params, 0 if columns is None else columns.numel(),
            rows.data_ptr() if is_few else 0, m, _address(bias), out.data_ptr(),
            torch.get_num_threads(), instructions,
        )
    )  # fmt: skip
    if not is_few:
        out = F.linear(rows, out, bias)
    return out.to(x.dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`formats.pack`.

    Raises:
        ValueError: a code outside its range.
    """
    formats.check_range(codes, bits)
    flat = codes.to(torch.uint8).reshape(-1).contiguous()
    packed = torch.empty(formats.packed_size(flat.numel(), bits), dtype=torch.uint8, device=_CPU)
    library, instructions, threads = _library(), _variant_index(), torch.get_num_threads()
    library.pack(
        _STREAM.pack(flat.data_ptr(), packed.data_ptr(), flat.numel(), bits, threads, instructions)
    )
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """`formats.unpack`.

    Raises:
        ValueError: a stream whose length does not fit the shape.
    """
    formats.check_stream(packed, bits, prod(shape))
    packed = packed.contiguous()
    codes = torch.empty(shape, dtype=torch.uint8, device=_CPU)
    library, instructions, threads = _library(), _variant_index(), torch.get_num_threads()
    library.unpack(
        _STREAM.pack(
            packed.data_ptr(), codes.data_ptr(), codes.numel(), bits, threads, instructions
        )
    )
    return codes


def repack(
    packed: Tensor,
    bits: int,
    k: int,
    zero_point: Tensor,
    zero_point2: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`formats.repack`; the order of `qlinear`'s own weight is made by its first call."""
    codes = unpack(packed, bits, (zero_point.shape[0], k))
    return formats.center(codes, bits, zero_point, zero_point2, columns)


# op → place of `out_packed` among its arguments.
_OUT_PACKED = {"quantize": 4, "layer_norm_quantize": 8, "qlinear": 14, "qattention": 16}


def _why_not(op: str, *args: Any, **kwargs: Any) -> str | None:
    library = _load()
    if isinstance(library, str):
        return library
    first = args[0] if args else next(iter(kwargs.values()))  # all of a call are on one device
    if not first.is_cpu:
        return f"needs tensors on the CPU, got one on {first.device}"
    place = _OUT_PACKED.get(op, len(args))
    gives_packed = args[place] if len(args) > place else kwargs.get("out_packed")
    if gives_packed or (op == "qlinear" and first.dtype == torch.uint8):
        return "codes are int8 here, not packed: the CPU has no 4-bit products"
    return _REFUSALS[op](*args, **kwargs)


def _float_reason(name: str, dtype: torch.dtype) -> str | None:
    if dtype in _TYPES:
        return None
    return f"{name} must be float16, bfloat16 or float32, got {dtype}"


def _x_reason(x: Tensor, *_: Any, **__: Any) -> str | None:
    return _float_reason("x", x.dtype)


def _qlinear_reason(
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
    *_: Any,
    **__: Any,
) -> str | None:
    vectors = (("scale", scale), ("scale2", scale2), ("bias", bias), ("layer_scale", layer_scale))
    for name, vector in vectors:
        if vector is not None and vector.dtype != torch.float32:
            return f"{name} must be float32, got {vector.dtype}"
    if residual is not None and residual.dtype not in _TYPES:
        return _float_reason("residual", residual.dtype)
    return None if out_inv_scale is not None else _float_reason("out_dtype", out_dtype)


def _qlinear_packed_reason(
    x: Tensor,
    packed: Tensor,
    w_bits: int,
    k: int,
    outliers: int,
    w_zero_point: Tensor,
    w_zero_point2: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    scale, scale2, *rest = args or (kwargs.pop("scale"), kwargs.pop("scale2"))
    return _qlinear_reason(x, packed, scale, scale2, k, *rest, **kwargs)


def _block_reason(x: Tensor, *_: Any, **__: Any) -> str | None:
    if x.dim() != 3:
        return f"x must be [B, T, C], got {list(x.shape)}"
    return _x_reason(x)


def _no_reason(*_: Any, **__: Any) -> str | None:
    return None


_REFUSALS: dict[str, Callable[..., str | None]] = {
    "qlinear": _qlinear_reason,
    "qlinear_packed": _qlinear_packed_reason,
    "layer_norm_quantize": _x_reason,
    "quantize": _x_reason,
    "qattention": _no_reason,
    "dequant_linear": _x_reason,
    "pack": _no_reason,
    "unpack": _no_reason,
    "repack": _no_reason,
    "block": _block_reason,
}
_RUN: dict[str, Callable[..., Tensor]] = {
    "qlinear": qlinear,
    "qlinear_packed": qlinear_packed,
    "layer_norm_quantize": layer_norm_quantize,
    "quantize": quantize,
    "qattention": qattention,
    "dequant_linear": dequant_linear,
    "pack": pack,
    "unpack": unpack,
    "repack": repack,
    "block": block,
}
for _op, _run in _RUN.items():
    dispatch.register(_op, "cpu", _run, partial(_why_not, _op))
