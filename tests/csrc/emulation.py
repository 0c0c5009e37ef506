"""Builds the emulated CUDA library once per state of its sources, and steers what it does."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1")

ACCESSES = ("ldmatrix", "cp.async", "loads", "stores")
FAULTS = {
    "fragment": 1, "barrier": 2, "pipeline": 3, "swizzle": 4,
    "counter": 5, "fence": 6, "arrival barrier": 7, "partial": 8,
}  # fmt: skip


@cache
def builder() -> ModuleType:
    """csrc/build.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row() -> object:
    return next(x for x in builder().LIBRARIES if x.name == "erq_cuda_emulated")


def why_not() -> str | None:
    """The reason the library cannot be built here, or None."""
    reason: str | None = builder().why_not(row())
    return reason


def build(*flags: str) -> Path:
    """The library, compiled with further flags."""
    library = replace(row(), flags=(*row().flags, *flags))
    digest = hashlib.sha256(repr(library.flags).encode())
    for source in sorted((ROOT / "csrc" / "cuda").iterdir()):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"erq-emulated-{digest.hexdigest()[:16]}"
    path: Path = builder().build(library, folder, folder / "objects")
    return path


class Emulation:
    """What a loaded emulated library can be told and asked besides its kernels."""

    def __init__(self, path: Path) -> None:
        self.handle = ctypes.CDLL(str(path))

    def put_fault(self, name: str | None) -> None:
        """Make the kernels wrong in one way of FAULTS, or right again."""
        self.handle.erq_emulation_fault(FAULTS[name] if name else 0)

    def reverse(self, reversed_: bool) -> None:
        """Run warps and lanes from the last to the first."""
        self.handle.erq_emulation_reverse(int(reversed_))

    def shuffle_blocks(self, order: int) -> None:
        """Run blocks in an order of this number; 0: from the first to the last."""
        self.handle.erq_emulation_block_order(order)

    def statistics(self) -> tuple[dict[str, int], dict[str, int]]:
        """Wavefronts of accesses to shared memory, and bank conflicts, since the last call."""
        numbers = (ctypes.c_longlong * 8)()
        self.handle.erq_emulation_statistics(numbers)
        values = list(numbers)
        return (
            dict(zip(ACCESSES, values[:4], strict=True)),
            dict(zip(ACCESSES, values[4:], strict=True)),
        )
