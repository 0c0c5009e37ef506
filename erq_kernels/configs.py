"""Tile configuration of the GEMM kernels: a heuristic, overridden by tables measured on a device.

The heuristic rests on what the compiler says about each configuration (`bench/static.py`:
registers, shared memory, programs per multiprocessor), not on timings. A table
`tuned/<device>.json`, written by `bench/tune.py`, holds the winners among configurations whose
results were right on that device, and is the only thing that may choose the kernel "gluon":

    {"version": 1, "device": "NVIDIA H200", "triton": "3.6.0", "date": "2026-11-24",
     "qlinear": [{"m": 50432, "n": 1152, "k": 384, "dual": true, "config": {"block_m": 128, …},
                  "microseconds": 61.5, "heuristic_microseconds": 70.2}]}

`k` is the length of the longer K segment, `dual` whether there is a second one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, lru_cache
from importlib import metadata, resources
from typing import Any, get_type_hints

TABLE_VERSION = 1
OPS = ("qlinear",)
KERNELS = ("pointers", "tma", "gluon")


@dataclass(frozen=True)
class GemmConfig:
    """How a GEMM kernel cuts its problem up.

    Args:
        block_m, block_n: output tile of a program; powers of two, 16..256 and 32..256.
        block_k: columns of K per step of the loop; power of two, 32..512.
        group_m: tiles of M that run side by side before the next tile of N, so that they meet in
            L2.
        num_warps: warps of a program, a power of two up to 16.
        num_stages: depth of the software pipeline, 1..8.
        dots: tensor-core calls that a step is cut into, 1 or 2, each of at least 32 columns.
        max_registers: registers a thread may take, a multiple of 8 in 32..248, or None: no limit.
        kernel: "pointers"; "tma", tiles through tensor descriptors (compute capability 9.0 and
            newer); or "gluon", asynchronous wgmma (9.0 only), which takes at most 128 columns, at
            least 2 stages, and 4 or more warps of 16 rows or more each.

    Raises:
        ValueError: a value outside the above.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    dots: int = 1
    max_registers: int | None = None
    kernel: str = "pointers"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block_m", 16, 256),
            ("block_n", 32, 256),
            ("block_k", 32, 512),
            ("num_warps", 1, 16),
            ("dots", 1, 2),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name} must be a power of two from {low} to {high}, got {value}")
        for name, low, high in (("group_m", 1, 1 << 16), ("num_stages", 1, 8)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        if self.block_k // self.dots < 32:
            raise ValueError(
                f"block_k {self.block_k} cut into {self.dots} dots leaves "
                f"{self.block_k // self.dots} columns each; at least 32 are needed"
            )
        limit = self.max_registers
        if limit is not None and (not 32 <= limit <= 248 or limit % 8):
            raise ValueError(f"max_registers must be a multiple of 8 in 32..248, got {limit}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.kernel == "gluon" and not (
            self.block_n <= 128
            and self.num_stages >= 2
            and 4 <= self.num_warps <= self.block_m // 16
        ):
            raise ValueError(
                "the gluon kernel takes block_n <= 128, num_stages >= 2 and num_warps from 4 to "
                f"block_m / 16, got {self.block_n}, {self.num_stages} and {self.num_warps} with "
                f"block_m {self.block_m}"
            )


# Multiprocessors of the common device of an architecture; only how far the tiles of a small problem
# shrink depends on it.
_MULTIPROCESSORS = {
    80: 108,
    86: 84,
    87: 16,
    89: 128,
    90: 132,
    100: 148,
    103: 148,
    120: 170,
    121: 48,
}

# Tiles per class of architecture, largest first; the comments give the programs that
# bench/static.py finds room for on a multiprocessor.
#
# wgmma takes 64 rows and keeps accumulators in registers. Triton does not make it asynchronous for
# int32, so two or three programs per multiprocessor have to hide one another's waits and epilogues;
# tiles read through descriptors leave the registers and the issue slots for that.
_WGMMA = (
    # The limit makes room for a second program. The richest epilogue (residual, LayerScale, codes
    # by column) pays with 24 bytes of spill under Triton 3.6, the others with nothing.
    GemmConfig(128, 128, 128, num_warps=8, max_registers=128, kernel="tma"),  # 2
    GemmConfig(64, 128, 128, kernel="tma"),  # 3
    GemmConfig(128, 64, 128, kernel="tma"),  # 3
    GemmConfig(64, 64, 128, kernel="tma"),  # 4
)
# A second segment brings accumulators of its own: of 128×128 only one program would fit. A limit
# that lets three of 64×128 in makes most epilogues spill.
_WGMMA_DUAL = (
    GemmConfig(64, 128, 128, kernel="tma"),  # 3
    GemmConfig(64, 64, 128, kernel="tma"),  # 4
)
# tcgen05 keeps accumulators in tensor memory; those of two segments meet in registers, in the
# epilogue.
_TCGEN05 = (
    GemmConfig(128, 128, 128, num_warps=8),  # 2
    GemmConfig(128, 64, 128),  # 3
    GemmConfig(64, 64, 128),  # 3 or 4
)
_TCGEN05_DUAL = _TCGEN05[1:]
# mma.sync. Where a step has a single dot, Triton (3.6, and 3.8 for sm_8x) carries the next operands
# through the loop byte by byte, at more than twice the instructions; two dots turn that pass off.
_MMA_SYNC = (
    GemmConfig(64, 128, 128, dots=2),
    GemmConfig(128, 64, 128, dots=2),
    GemmConfig(64, 64, 128, dots=2),
)
_FEW_ROWS = (
    GemmConfig(32, 64, 128, dots=2, max_registers=128),  # without, sm_86 spills under Triton 3.6
    GemmConfig(16, 32, 128, num_warps=2, dots=2),
)


def _candidates(m: int, dual: bool, arch: int) -> tuple[GemmConfig, ...]:
    if m <= 16:
        return _FEW_ROWS[1:]
    if m <= 32:
        return _FEW_ROWS
    if arch == 90:
        return _WGMMA_DUAL if dual else _WGMMA
    if arch == 100:  # of the Blackwells the only one that multiplies int8 in tcgen05
        return _TCGEN05_DUAL if dual else _TCGEN05
    return _MMA_SYNC


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


# Padding that a larger block may bring before a smaller one is better.
_MAX_PADDING = 1.15


def heuristic(m: int, n: int, k: int, dual: bool, arch: int) -> GemmConfig:
    """The configuration where none was measured: the largest tile that leaves no multiprocessor
    idle.

    Args:
        m, n: rows and columns of the output. k: length of the longer K segment.
        dual: whether there are two segments.
        arch: compute capability, e.g. 90.
    """
    candidates = _candidates(m, dual, arch)
    narrow = [c for c in candidates if _padded(n, c.block_n) <= _MAX_PADDING * n]
    candidates = tuple(narrow) or candidates[-1:]
    multiprocessors = _MULTIPROCESSORS.get(arch, 108)
    config = candidates[-1]
    for candidate in candidates:
        tiles = -(-m // candidate.block_m) * -(-n // candidate.block_n)
        if tiles >= multiprocessors:
            config = candidate
            break
    half = config.block_k // 2
    if half >= 32 * config.dots and _padded(k, config.block_k) > _MAX_PADDING * _padded(k, half):
        config = replace(config, block_k=half)
    return config


@dataclass(frozen=True)
class Measurement:
    """The fastest configuration of one problem on one device, its time and the heuristic's."""

    m: int
    n: int
    k: int
    dual: bool
    config: GemmConfig
    microseconds: float
    heuristic_microseconds: float


def device_slug(name: str) -> str:
    """File name of a device's table without suffix: "NVIDIA H200" → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _checked(cls: type[Any], record: Any, where: str) -> dict[str, Any]:
    """The fields of a JSON object, if their names and types are those of the dataclass `cls`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {record!r}")
    known = get_type_hints(cls)
    required = {f.name for f in fields(cls) if f.default is MISSING}
    if not required <= record.keys() <= known.keys():
        raise ValueError(
            f"{where} must have the fields {', '.join(sorted(required))} and may have "
            f"{', '.join(sorted(known.keys() - required)) or 'no other'}, got "
            f"{', '.join(sorted(map(str, record)))}"
        )
    for name, value in record.items():
        allowed = known[name]
        # bool is an int to isinstance, but not here.
        if allowed in (int, bool, float, str) and type(value) is not allowed:
            raise ValueError(f"{where}: {name} must be {allowed.__name__}, got {value!r}")
        if allowed == int | None and type(value) not in (int, type(None)):
            raise ValueError(f"{where}: {name} must be int or null, got {value!r}")
    return record


def parse_table(text: str, source: str) -> dict[str, tuple[Measurement, ...]]:
    """Measurements by op of a table's JSON text.

    Raises:
        ValueError: what is not of the form that this module describes; names `source` and the
            entry.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(table, dict) or table.get("version") != TABLE_VERSION:
        raise ValueError(
            f"{source} must be an object with version {TABLE_VERSION}; measure it again with this "
            "release"
        )
    unknown = table.keys() - {"version", "device", "triton", "date", *OPS}
    if unknown:
        raise ValueError(f"{source} has unknown fields {', '.join(sorted(unknown))}")
    measured: dict[str, tuple[Measurement, ...]] = {}
    for op in OPS:
        entries = table.get(op, [])
        if not isinstance(entries, list):
            raise ValueError(f"{source}: {op} must be a list, got {entries!r}")
        parsed = []
        for i, entry in enumerate(entries):
            where = f"{source}: {op}[{i}]"
            values = dict(_checked(Measurement, entry, where))
            config = _checked(GemmConfig, values.pop("config"), f"{where}.config")
            try:
                parsed.append(Measurement(**values, config=GemmConfig(**config)))
            except ValueError as error:
                raise ValueError(f"{where}.config: {error}") from None
            if min(entry["m"], entry["n"], entry["k"]) < 1:
                raise ValueError(f"{where}: m, n and k must be at least 1")
            if not 0 < entry["microseconds"] <= entry["heuristic_microseconds"]:
                raise ValueError(f"{where} must not be slower than the heuristic's configuration")
        measured[op] = tuple(parsed)
    return measured


@cache
def load_table(device: str) -> Mapping[str, tuple[Measurement, ...]]:
    """The shipped measurements of a device by op; empty if there are none.

    Gluon's interface is not stable: those of its kernel count under the Triton of the measurement.

    Raises:
        ValueError: a table that is not of the form that this module describes.
    """
    file = resources.files("erq_kernels") / "tuned" / f"{device_slug(device)}.json"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    table = parse_table(text, f"tuned/{file.name}")
    if json.loads(text).get("triton") == metadata.version("triton"):
        return table
    return {
        op: tuple(seen for seen in measured if seen.config.kernel != "gluon")
        for op, measured in table.items()
    }


def nearest(
    measurements: Iterable[Measurement], m: int, n: int, k: int, dual: bool
) -> GemmConfig | None:
    """Configuration of the measured problem nearest in log m and log k, or None if none is near.

    Near is the same n and number of segments, m within a factor of 2 and k within one of √2.
    """
    best: tuple[float, GemmConfig] | None = None
    for seen in measurements:
        far_m, far_k = abs(math.log2(seen.m / m)), abs(math.log2(seen.k / k))
        if (seen.n, seen.dual) != (n, dual) or far_m > 1 or far_k > 0.5:
            continue
        if best is None or far_m + far_k < best[0]:
            best = far_m + far_k, seen.config
    return None if best is None else best[1]


@lru_cache(maxsize=4096)
def choose(op: str, m: int, n: int, k: int, dual: bool, arch: int, device: str) -> GemmConfig:
    """The configuration of a call: the nearest measured one of this device, else the heuristic's.

    Args:
        op: one of OPS.
        m, n, k, dual, arch: as `heuristic`; each size at least 1.
        device: name of the device, as torch.cuda.get_device_name gives it.
    """
    measured = nearest(load_table(device).get(op, ()), m, n, k, dual)
    return measured or heuristic(m, n, k, dual, arch)
