"""nvcc's report of the CUDA kernels: what it finds wrong, and that every GEMM passes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench import static_cuda
from bench.static import Report

ROOT = Path(__file__).parents[2]
S4 = (
    "_ZN3erq14qlinear_kernelINS_4TileILb1ELi64ELi128ELi2ELi2ELi4ELi2ELb1ELb0EEELi49152EEEvNS_13"
    "QlinearParamsE"
)


def test_a_name_says_what_a_kernel_is() -> None:
    kernel = static_cuda.read_name(S4)
    assert kernel == static_cuda.Kernel("qlinear u4·s4 64×128 dual", 128, 49152, 2, True, True)
    with pytest.raises(ValueError, match="does not know the kernel other"):
        static_cuda.read_name("other")


def test_what_it_finds() -> None:
    kernel = static_cuda.read_name(S4)
    good = Report(
        kernel.name, 80, 200, shared_bytes=49152, programs=2, mma={"IMMA.16864.U4.S4": 8},
        load_bytes={"16": 12},
    )  # fmt: skip
    assert static_cuda.find_problems(good, kernel) == []
    eight_bit: dict[str, Any] = {"mma": {"IMMA.16832.S8.S8": 8}}
    assert static_cuda.find_problems(replace(good, arch=90, **eight_bit), kernel) == []
    for change, problem in (
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"programs": 1}, "fits a multiprocessor 1 times, made for 2"),
        ({"mma": {}}, "without tensor-core instructions"),
        (eight_bit, "multiplies 4-bit operands by IMMA.16832.S8.S8"),
        ({"load_bytes": {"16": 3, "4": 1}}, "not 16 bytes"),
    ):
        found = static_cuda.find_problems(replace(good, **change), kernel)
        assert len(found) == 1 and problem in found[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_every_gemm_on_sm_80_and_sm_90() -> None:
    command = [sys.executable, "bench/static_cuda.py", "--json", "--arch", "80,90"]
    result = subprocess.run(
        [*command, "--only", "qlinear_s"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert len(reports) == 2 * (14 + 7)
    for report in reports:
        name, size = report["name"].split()[1:3]
        native = name == "s8·s8" or report["arch"] == 80
        if native and size == "128×128":
            # A loop that multiplies, and does little else.
            assert report["per_mma"] < 3.5
