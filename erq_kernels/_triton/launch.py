"""One call of a Triton kernel as a value: launched on a device, or compiled by bench/static.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that a call fixes.

    Args:
        kernel: the decorated function.
        grid: programs per axis, each >= 1.
        args: run-time arguments by name: tensors (meta tensors where nothing is launched), tensor
            descriptors, ints, floats; None for what is absent.
        constants: compile-time arguments by name.
        num_warps, num_stages: warps of a program, stages of the software pipeline.
        max_registers: registers a thread may take, or None: no limit.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments."""
        # A multiply and the add after it stay two roundings, as in torch (`numerics`).
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](**self.args, **self.constants, **self.options)


@dataclass(frozen=True)
class StaticCase:
    """A call that bench/static.py compiles and judges.

    Args:
        name: op and variant, e.g. "qlinear 50432×1152×384 codes".
        launch: over meta tensors; bases count as aligned to 16 bytes.
        load_bytes: narrowest load from global memory that alignment excuses in the K loop.
        small_loads: loads there that may be narrower, since their tile has not as much for each
            thread or is in pieces that are not as long.
    """

    name: str
    launch: Launch
    load_bytes: int = 16
    small_loads: int = 0
