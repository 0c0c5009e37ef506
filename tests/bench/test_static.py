"""The compile report: what it reads from machine code, what it finds wrong, and that every kernel
passes.

Kernels are compiled in processes of their own, since this one may interpret them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench import static
from bench.static import Instruction, Report, StaticCase
from erq_kernels import _triton_backend

ROOT = Path(__file__).parents[2]


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def reports(*arguments: str) -> dict[str, dict[str, Any]]:
    """Reports by case, all without a problem."""
    result = run_script("bench/static.py", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return {report["name"]: report for report in json.loads(result.stdout)}


OPS = set(_triton_backend.MODULES)


def test_every_kernel_on_sm_80() -> None:
    found = reports("--arch", "80")
    assert {name.split()[0] for name in found} == OPS
    for name, report in found.items():
        if name.startswith("qlinear "):
            # int8 mma.sync, and a loop in which it is not drowned by address arithmetic.
            assert set(report["mma"]) == {"IMMA.16832.S8.S8.SAT"}
            assert report["mma_in_loop"] > 0
            assert report["per_mma"] < (4.5 if "head" not in name else 12)
            assert set(report["load_bytes"]) == {"16"}
            assert report["programs"] >= 2
    attention = found["qattention 197×64 4 bits"]["mma"]
    assert {name.split(".")[0] for name in attention} == {"IMMA", "HMMA"}
    assert found["dequant_linear 50432×768×768 4 bits bfloat16"]["load_bytes"] == {"16": 9}


def test_every_kernel_on_sm_90() -> None:
    found = reports("--arch", "90")
    assert {name.split()[0] for name in found} == OPS
    for name, report in found.items():
        if name.startswith("qlinear "):
            kind = "IMMA" if "head" in name else "IGMMA"
            assert {mma.split(".")[0] for mma in report["mma"]} == {kind}
            assert report["mma_in_loop"] > 0
            assert report["programs"] >= 2
            # Few rows go to mma.sync, and their tiles through pointers.
            pointers = "head" in name or name.endswith(" pointers")
            assert set(report["load_bytes"]) == {"16" if pointers else "tma"}
            # Only Gluon's products stay in flight while the loop goes on.
            waits = {"IMMA": None, "IGMMA": 1 if name.endswith(" gluon") else 0}
            assert report["wait_group"] == waits[kind]
    assert {"qlinear qkv gluon", "qlinear fc1 dual gelu gluon"} <= found.keys()
    for name in ("qlinear qkv", "qlinear qkv gluon"):
        report = found[name]
        assert report["mma"] == {"IGMMA.64x128x32.S8.S8": 4}
        assert report["registers"] <= 128
        assert report["shared_bytes"] <= 100 * 1024


def test_what_is_wrong_is_reported() -> None:
    result = run_script("tests/bench/bad_kernels.py")
    assert result.returncode == 0, result.stderr
    problems = {report["name"]: report["problems"] for report in json.loads(result.stdout)}
    assert problems["good"] == []
    assert any(p.startswith("spills ") for p in problems["few registers"])
    assert any("×1 bytes at a time in the K loop" in p for p in problems["unaligned rows"])
    assert any("more than a program can have" in p for p in problems["much shared memory"])
    (raised,) = problems["raises"]
    assert raised.startswith("does not compile: ") and "a compile-time failure" in raised


# As nvdisasm prints it, cut down: a loop, and a slow path behind the first exit that jumps back.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U8 R8, desc[UR4][R2.64+0x40] ;
        /*0050*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24 ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_1) ;
        /*10000*/                  NOP ;
"""


def test_machine_code_is_read() -> None:
    instructions, labels = static.parse_sass(SASS)
    assert len(instructions) == 13
    assert labels == {".L_x_1": 2, ".L_x_2": 8, ".L_x_3": 11}
    assert instructions[1] == Instruction("@!P0", "BRA", "`(.L_x_2)")
    assert instructions[6].operands == "gsb0, 0x1"
    assert [i for i, code in enumerate(instructions) if static.is_mma(code)] == [5, 8]
    (loop,) = static.find_k_loops(instructions, labels)
    assert loop == range(2, 8)
    body = [instructions[i] for i in loop]
    assert static.count_widths(body, static.LOADS) == {"16": 2, "1": 1}
    assert static.count_widths(instructions, static.STORES) == {"8": 1}


def test_nested_loops_count_once() -> None:
    outer = SASS.replace("LDC R1, c[0x0][0x28]", "NOP").replace(
        "STG.E.64 desc[UR4][R2.64], R4", "BRA `(.L_x_0)"
    )
    outer = outer.replace(".text.kernel:", ".L_x_0:")
    loops = static.find_k_loops(*static.parse_sass(outer))
    assert loops == [range(0, 10), range(2, 8)]  # the second product is in the outer loop alone


@pytest.mark.parametrize(
    ("opcode", "width"),
    [
        ("LDG.E.128.CONSTANT", "16"),
        ("LDG.E.ENL2.256", "32"),
        ("LDG.E.64", "8"),
        ("LDG.E", "4"),
        ("LDG.E.U16", "2"),
        ("LDG.E.S8", "1"),
        ("STG.E.U8", "1"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "16"),
        ("LDGSTS.E.LTC128B", "4"),
        ("UTMALDG.2D", "tma"),
    ],
)
def test_width_of_an_access(opcode: str, width: str) -> None:
    assert static.access_width(opcode) == width


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "columns", "programs"),
    [
        (90, 8, 128, 98304, 0, 2),  # registers and shared memory both leave room for two
        (90, 8, 129, 98304, 0, 1),  # 129 count as 136
        (90, 4, 168, 0, 0, 3),
        (90, 4, 32, 0, 0, 16),  # 64 warps
        (86, 4, 32, 0, 0, 12),  # 48 warps
        (90, 1, 16, 0, 0, 32),  # programs
        (80, 4, 32, 49152, 0, 3),
        (89, 4, 32, 49152, 0, 2),
        (90, 8, 64, 240 * 1024, 0, 0),  # does not fit at all
        (100, 4, 64, 1024, 256, 2),  # 512 columns of tensor memory
    ],
)
def test_programs_of_a_multiprocessor(
    arch: int, warps: int, registers: int, shared: int, columns: int, programs: int
) -> None:
    assert static.count_programs(arch, warps, registers, shared, columns) == programs


def report(**values: Any) -> Report:
    return Report("case", 90, **{"programs": 1, "mma": {"IMMA.16832": 1}, **values})


def test_problems_of_a_report() -> None:
    case = StaticCase("case", launch=None, load_bytes=16, small_loads=2)  # type: ignore[arg-type]
    product = "%1 = tt.dot %a, %b, %c, inputPrecision = tf32"
    gluon = "%1 = ttng.warp_group_dot %a, %b, %c"
    for source in (product, gluon):
        assert static.find_problems(report(), case, source) == []
        (problem,) = static.find_problems(report(mma={}), case, source)
        assert problem == "multiplies without tensor-core instructions"
    exact = product.replace("tf32", "ieee")
    assert static.find_problems(report(mma={}), case, exact) == []
    assert static.find_problems(report(mma={}), case, "tt.load tt.store") == []
    good = report(load_bytes={"16": 9, "32": 1, "tma": 2, "4": 2})
    assert static.find_problems(good, case, product) == []
    (problem,) = static.find_problems(report(load_bytes={"4": 2, "1": 1}), case, product)
    assert problem.startswith("loads 1×1, 2×4 bytes at a time")


def test_unknown_choices_are_refused() -> None:
    for arguments, text in (
        (("--arch", "70"), "--arch 70 is not known; choose from 80"),
        (("--arch", "a100"), "--arch takes numbers by commas"),
        (("--arch", "80", "--only", "no such case"), "no case's name contains 'no such case'"),
    ):
        result = run_script("bench/static.py", *arguments)
        assert result.returncode == 2
        assert text in result.stderr
