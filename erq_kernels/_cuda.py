"""Registers the kernels of csrc/cuda with `dispatch`: a plain C library, loaded by ctypes.

The library is erq_kernels/liberq_cuda.so (csrc/build.py), or the file that ERQ_CUDA_LIBRARY names.
It may be the emulated build, in which the same kernel sources run on the host: then it takes
tensors on the CPU. docs/cuda.md describes the kernels and what is known of them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erq_kernels import dispatch

ABI = 2  # ERQ_CUDA_ABI of csrc/cuda/erq_cuda.h

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum erq_cuda_type
_CODES8, _CODES4 = 3, 4
_S8_S8, _U4_S4 = 0, 1  # enum erq_cuda_operands
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}  # enum erq_cuda_activation

MOST_ROWS = 64
"""`dequant_linear` is made for so many rows of x; more are a matter for a tiled kernel."""


class CudaError(RuntimeError):
    """A CUDA call failed, or the library refused its arguments; the message is its text."""


class QlinearArgs(ctypes.Structure):
    """`erq_cuda_qlinear_args`, field by field."""

    _fields_ = (
        *((n, c_void_p) for n in ("x", "weight")),
        *((n, c_int64) for n in ("x_stride", "weight_stride")),
        *((n, c_void_p) for n in ("offset", "scale", "scale2", "bias", "layer_scale", "residual")),
        ("residual_stride", c_int64),
        *((n, c_void_p) for n in ("out_inv_scale", "out_zero_point", "out")),
        *((n, c_int32) for n in ("m", "n", "k", "split", "operands", "activation")),
        *((n, c_int32) for n in ("residual_type", "out_type", "out_bits", "out_per_column")),
        ("tile", c_int32),
    )


class DequantLinearArgs(ctypes.Structure):
    """`erq_cuda_dequant_linear_args`, field by field."""

    _fields_ = (
        *((n, c_void_p) for n in ("x", "packed", "scale", "scale2", "zero_point", "zero_point2")),
        *((n, c_void_p) for n in ("columns", "bias", "out")),
        ("x_stride", c_int64),
        *((n, c_int32) for n in ("m", "n", "k", "n_columns", "bits", "type", "splits")),
        *((n, c_void_p) for n in ("partial", "arrived")),
    )


@dataclass(frozen=True)
class Library:
    """A loaded library.

    Args:
        handle: its functions. emulated: whether it runs on the host.
    """

    handle: ctypes.CDLL
    emulated: bool

    def run(self, function: str, args: ctypes.Structure, device: torch.device) -> None:
        """Launch on torch's current stream of `device`.

        Raises:
            CudaError: the launch failed; with CUDA's text.
        """
        stream = None if self.emulated else torch.cuda.current_stream(device).cuda_stream
        self.check(
            getattr(self.handle, function)(ctypes.byref(args), self.index(device), c_void_p(stream))
            == 0
        )

    def index(self, device: torch.device) -> int:
        """CUDA's number of `device`."""
        if self.emulated:
            return 0
        return torch.cuda.current_device() if device.index is None else device.index

    def check(self, succeeded: bool) -> None:
        """Raise CudaError with what the last call left, if it failed."""
        if not succeeded:
            raise CudaError(self.handle.erq_cuda_error().decode())


def library_path() -> Path:
    """The file that is loaded, whether it exists or not."""
    chosen = os.environ.get("ERQ_CUDA_LIBRARY")
    return Path(chosen) if chosen else Path(__file__).with_name("liberq_cuda.so")


@cache
def _load(path: Path) -> Library | str:
    """The library of a file, or why there is none."""
    if not path.is_file():
        return f"{path.name} is not built (python csrc/build.py erq_cuda, which needs nvcc)"
    try:
        handle = ctypes.CDLL(str(path))
        if handle.erq_cuda_abi() != ABI:
            return f"{path.name} is of another version (ABI {handle.erq_cuda_abi()}, not {ABI})"
        handle.erq_cuda_error.restype = ctypes.c_char_p
        return Library(handle, bool(handle.erq_cuda_is_emulated()))
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"


def load() -> Library | str:
    """The library in use, or why there is none."""
    return _load(library_path())


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _device_reason(library: Library, device: torch.device) -> str | None:
    if library.emulated:
        return None if device.type == "cpu" else f"emulated: tensors on cpu, got {device.type}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs a CUDA device, got a tensor on {device.type}"
    major, minor = _capability(device)
    if major == 8 or (major, minor) == (9, 0):
        return None
    return f"built for compute capability 8.0 to 9.0, got {major}.{minor}"


def _why_not(refuse: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    library = load()
    if isinstance(library, str):
        return library
    devices = {a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
    if len(devices) != 1:
        return f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
    return _device_reason(library, devices.pop()) or refuse(*args, **kwargs)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _rows(t: Tensor) -> Tensor:
    """`t` itself if its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
    if aligned and t.stride(1) == 1 and t.stride(0) >= t.shape[1]:
        return t
    return t.clone(memory_format=torch.contiguous_format)


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
    tile: int = -1,
) -> Tensor:
    """See `ops.qlinear`; `tile` chooses the tile, by size if it is −1.

    Raises:
        CudaError: the launch failed.
    """
    library = load()
    if isinstance(library, str):
        raise CudaError(library)
    m, n, four_bit = x.shape[0], weight.shape[0], x.dtype == torch.uint8
    k = weight.shape[1] * (2 if four_bit else 1)
    quantizes = out_inv_scale is not None
    dtype = out_dtype
    if quantizes:
        dtype = torch.uint8 if out_packed else torch.int8
    out = torch.empty((m, n // 2 if out_packed else n), dtype=dtype, device=x.device)
    x, weight = _rows(x), _rows(weight)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    # Kept until the launch: what `contiguous` copies lives on the stream that runs it.
    vectors = {
        name: None if vector is None else vector.contiguous()
        for name, vector in {
            "offset": weight_offset, "scale": scale, "scale2": scale2, "bias": bias,
            "layer_scale": layer_scale, "out_inv_scale": out_inv_scale,
            "out_zero_point": out_zero_point,
        }.items()
    }  # fmt: skip
    args = QlinearArgs(
        x=_pointer(x), weight=_pointer(weight), x_stride=x.stride(0),
        weight_stride=weight.stride(0), residual=_pointer(residual),
        residual_stride=0 if residual is None else residual.stride(0), out=_pointer(out),
        m=m, n=n, k=k, split=split, operands=_U4_S4 if four_bit else _S8_S8,
        activation=ACTIVATIONS[act],
        residual_type=0 if residual is None else TYPES[residual.dtype],
        out_type=(_CODES4 if out_packed else _CODES8) if quantizes else TYPES[out_dtype],
        out_bits=out_bits,
        out_per_column=out_inv_scale is not None and out_inv_scale.dim() == 1, tile=tile,
        **{name: _pointer(vector) for name, vector in vectors.items()},
    )  # fmt: skip
    library.run("erq_cuda_qlinear", args, x.device)
    return out


def qlinear_why_not(
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
) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    if residual is not None and residual.dtype not in TYPES:
        return f"residual must be float16, bfloat16 or float32, got {residual.dtype}"
    if out_inv_scale is None and out_dtype not in TYPES:
        return f"out_dtype must be float16, bfloat16 or float32, got {out_dtype}"
    per_byte = 2 if x.dtype == torch.uint8 else 1
    piece, k = 16 * per_byte, weight.shape[1] * per_byte
    if k % piece or split % piece:
        return f"K and split must be multiples of {piece}, got {k} and {split}"
    if out_packed and weight.shape[0] % 2:
        return f"packed codes need an even N, got {weight.shape[0]}"
    return None


def qlinear_rather_not(x: Tensor, *_: Any, **__: Any) -> str | None:
    """Why another backend is to run these arguments on this device, or None."""
    library = load()
    if isinstance(library, str) or library.emulated or _capability(x.device)[0] == 8:
        return None
    if x.dtype == torch.uint8:
        return "compute capability 9.0 has no 4-bit tensor cores: products are made up of others"
    return "mma.sync leaves half of the rate of compute capability 9.0 unused, wgmma does not"


COUNTERS = 1024
"""ERQ_CUDA_COUNTERS of csrc/cuda/erq_cuda.h."""


@cache
def _counters_of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _counters(library: Library, device: torch.device) -> Tensor:
    """Zeros that every launch leaves zero, shared by launches that follow one another.

    Those are the launches of a stream; a CUDA graph may be replayed beside them, so each launch in
    one has counters of its own.
    """
    if library.emulated:
        return _counters_of_stream(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _counters_of_stream(device, torch.cuda.current_stream(device).cuda_stream)


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
    splits: int = 0,
) -> Tensor:
    """See `ops.dequant_linear`; `splits` cuts K among so many thread blocks, by size if it is 0.

    Raises:
        CudaError: the launch failed.
    """
    library = load()
    if isinstance(library, str):
        raise CudaError(library)
    (m, k), n = x.shape, scale.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    x, packed = _rows(x), packed.reshape(-1)
    if packed.data_ptr() % 16:
        packed = packed.clone()
    vectors = {
        name: None if vector is None else vector.contiguous()
        for name, vector in {
            "scale": scale, "scale2": scale2, "zero_point": zero_point,
            "zero_point2": zero_point2, "columns": columns, "bias": bias,
        }.items()
    }  # fmt: skip
    if not splits:
        splits = library.handle.erq_cuda_dequant_linear_splits(m, n, k, library.index(x.device))
        library.check(splits > 0)
    partial = arrived = None
    if splits > 1:
        width = (n + 15) // 16 * 16
        partial = torch.empty((splits, m, width), dtype=torch.float32, device=x.device)
        arrived = _counters(library, x.device)
    args = DequantLinearArgs(
        x=_pointer(x), packed=_pointer(packed), out=_pointer(out), x_stride=x.stride(0),
        m=m, n=n, k=k, n_columns=0 if columns is None else columns.numel(), bits=bits,
        type=TYPES[x.dtype], splits=splits, partial=_pointer(partial), arrived=_pointer(arrived),
        **{name: _pointer(vector) for name, vector in vectors.items()},
    )  # fmt: skip
    library.run("erq_cuda_dequant_linear", args, x.device)
    return out


def dequant_linear_why_not(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Why the kernel cannot run these arguments, or None."""
    m, k = x.shape
    if x.dtype not in TYPES:
        return f"x must be float16, bfloat16 or float32, got {x.dtype}"
    if k % 32:
        return f"K must be a multiple of 32, got {k}"
    if m > MOST_ROWS:
        return f"made for at most {MOST_ROWS} rows of x, got {m}"
    return None


def _register() -> None:
    for op, run, refuse, *rather_not in (
        ("qlinear", qlinear, qlinear_why_not, qlinear_rather_not),
        ("dequant_linear", dequant_linear, dequant_linear_why_not),
    ):

        def why_not(*args: Any, _refuse: Any = refuse, **kwargs: Any) -> str | None:
            return _why_not(_refuse, *args, **kwargs)

        dispatch.register(op, "cuda", run, why_not, *rather_not)


_register()
