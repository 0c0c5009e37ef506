"""What the compiler makes of every Triton kernel, without a GPU: `python bench/static.py`.

Compiles the `static_cases` of every kernel for each architecture and reads registers, shared
memory, tensor-core instructions and load widths from the machine code. Exits 1 where a kernel

- does not compile, or takes more shared memory than a program can have;
- spills registers;
- has a `tl.dot` that is to run on tensor cores, but no tensor-core instruction;
- loads less than 16 bytes at a time from global memory in a loop over K, where its case does not
  say why (`StaticCase.load_bytes`, `.small_loads`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from erq_kernels import _triton, _triton_backend
from erq_kernels._triton.launch import Launch, StaticCase

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TYPES = {
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


@dataclass(frozen=True)
class Multiprocessor:
    """What resident programs share.

    Source: CUDA C++ Programming Guide, technical specifications per compute capability.
    """

    shared_bytes: int
    warps: int
    programs: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    89: Multiprocessor(100 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 64, 32),
    100: Multiprocessor(228 * 1024, 64, 32),
    120: Multiprocessor(100 * 1024, 48, 24),
}
# Of each program's share of the shared memory, the system keeps this much.
RESERVED_SHARED_BYTES = 1024
# Registers of one of a multiprocessor's four partitions, per lane.
PARTITION_REGISTERS = 512
TENSOR_MEMORY_COLUMNS = 512


@dataclass
class Report:
    """What is known of one case on one architecture.

    Args:
        name, arch: the case, and the compute capability.
        registers: of a thread. spill_bytes: of a thread's stack, if it reads from it.
        shared_bytes: of a program.
        programs: that fit a multiprocessor at a time.
        mma: tensor-core instructions by name. mma_in_loop: those in the busiest loop over K.
        loop_instructions: length of that loop. per_mma: instructions of it per tensor-core one.
        wait_group: wgmma groups that may be in flight at the loop's wait, or None without a wait.
        load_bytes: loads from global memory in loops over K, by width; "tma" for bulk copies.
        all_load_bytes, store_bytes: loads from and stores to global memory anywhere, by width.
        problems: why the case fails.
    """

    name: str
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    programs: int = 0
    mma: dict[str, int] = field(default_factory=dict)
    mma_in_loop: int = 0
    loop_instructions: int = 0
    per_mma: float = 0.0
    wait_group: int | None = None
    load_bytes: dict[str, int] = field(default_factory=dict)
    all_load_bytes: dict[str, int] = field(default_factory=dict)
    store_bytes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def describe_argument(value: Any, specialize: bool) -> tuple[str, Any, bool]:
    """Triton's view of a run-time argument: its type, its value if compiled in, alignment."""
    if value is None:
        return "constexpr", None, False
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}", None, specialize
    if hasattr(value, "block_shape"):  # a tensor descriptor; Gluon's have a layout too
        block = ", ".join(map(str, value.block_shape))
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]{layout}>", None, False
    if isinstance(value, bool):
        return "i1", None, False
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", 1, False
        small = -(2**31) <= value < 2**31
        return "i32" if small else "i64", None, specialize and value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    raise TypeError(f"no Triton type for an argument {value!r}")


def compile_launch(launch: Launch, arch: int) -> Any:
    """The compiled kernel of a launch, specialized as a launch on the device would be."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        if parameter.name in launch.constants:
            kind, value, is_aligned = "constexpr", launch.constants[parameter.name], False
        else:
            specialize = not parameter.do_not_specialize
            kind, value, is_aligned = describe_argument(launch.args[parameter.name], specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(i,)] = value
        if is_aligned:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source_type = ASTSource
    if launch.kernel.is_gluon():
        # Gluon cannot be imported where Triton interprets, as in the tests of this file.
        from triton.experimental.gluon._runtime import GluonASTSource as source_type
    source = source_type(launch.kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


@dataclass(frozen=True)
class Instruction:
    """One line of machine code.

    Args:
        predicate: e.g. "@!P0", or "".
        opcode: with its modifiers, e.g. LDG.E.128.
        operands: what follows.
    """

    predicate: str
    opcode: str
    operands: str


def parse_sass(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of a disassembly, and for each label the index of the one that follows it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif code := re.match(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+)?\s*(\S+)\s*(.*?)\s*;", line
        ):
            instructions.append(Instruction(code[1] or "", code[2], code[3]))
    return instructions, labels


def is_mma(instruction: Instruction) -> bool:
    """IMMA, HMMA (mma.sync), IGMMA, HGMMA, QGMMA (wgmma), UTCIMMA, UTCHMMA, … (tcgen05)."""
    return instruction.opcode.split(".")[0].endswith("MMA")


def find_k_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[range]:
    """Innermost loops around tensor-core instructions, as ranges of indices."""
    loops = []
    for i, instruction in enumerate(instructions):
        if instruction.opcode == "EXIT" and not instruction.predicate:
            break  # beyond lie slow paths that jump back into the middle of the code
        target = re.search(r"\.L_x_\d+", instruction.operands)
        if instruction.opcode.startswith("BRA") and target and labels[target[0]] <= i:
            loops.append(range(labels[target[0]], i + 1))
    found = set()
    for i, instruction in enumerate(instructions):
        around = [loop for loop in loops if i in loop]
        if is_mma(instruction) and around:
            found.add(min(around, key=len))
    return sorted(found, key=lambda loop: loop.start)


def access_width(opcode: str) -> str:
    """Bytes that a global load or store moves per thread; "tma" for a bulk copy."""
    if opcode.startswith(("UTMA", "UBLK")):
        return "tma"
    modifiers = opcode.split(".")[1:]
    for modifier, size in (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2)):
        if modifier in modifiers:
            return str(size)
    return "1" if {"U8", "S8"} & set(modifiers) else "4"


LOADS = ("LDG.", "LDGSTS", "UTMALDG", "UBLKCP")
STORES = ("STG", "UTMASTG")


def count_widths(instructions: Sequence[Instruction], opcodes: tuple[str, ...]) -> dict[str, int]:
    """How many instructions of these opcodes access global memory, by width."""
    found = (i.opcode for i in instructions if i.opcode.startswith(opcodes))
    return dict(Counter(map(access_width, found)))


def count_programs(arch: int, warps: int, registers: int, shared: int, tensor_columns: int) -> int:
    """Programs that fit a multiprocessor at a time."""
    unit = MULTIPROCESSORS[arch]
    # A partition gives its warps registers in steps of 8 per lane.
    resident_warps = min(unit.warps, 4 * (PARTITION_REGISTERS // (-(-registers // 8) * 8)))
    limits = [
        resident_warps // warps,
        unit.shared_bytes // (shared + RESERVED_SHARED_BYTES),
        unit.programs,
    ]
    if tensor_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(limits)


def run_tool(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


def examine(case: StaticCase, arch: int) -> Report:
    """Compile a case and judge it."""
    report = Report(case.name, arch)
    try:
        kernel = compile_launch(case.launch, arch)
    except Exception as error:  # whatever the compiler raises is the finding
        lines = [line for line in str(error).splitlines() if line.strip()]
        report.problems.append(f"does not compile: {type(error).__name__}: {' '.join(lines[:3])}")
        return report
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = run_tool("cuobjdump", "-res-usage", str(cubin))
        instructions, labels = parse_sass(run_tool("nvdisasm", "-c", str(cubin)))
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump -res-usage no longer prints REG and STACK: {usage}")
    report.registers, stack = map(int, resources.groups())
    # What is never read back is no spill: Triton 3.6 leaves tokens of barriers there, for sm_120.
    if any(i.opcode.startswith("LDL") for i in instructions):
        report.spill_bytes = stack
    report.shared_bytes = kernel.metadata.shared
    report.programs = count_programs(
        arch,
        kernel.metadata.num_warps,
        report.registers,
        report.shared_bytes,
        getattr(kernel.metadata, "tmem_size", 0) or 0,
    )
    report.mma = dict(Counter(i.opcode for i in instructions if is_mma(i)))
    report.all_load_bytes = count_widths(instructions, LOADS)
    report.store_bytes = count_widths(instructions, STORES)
    loads: Counter[str] = Counter()
    for loop in find_k_loops(instructions, labels):
        body = [instructions[i] for i in loop]
        loads.update(count_widths(body, LOADS))
        mma = sum(map(is_mma, body))
        if mma <= report.mma_in_loop:
            continue
        report.mma_in_loop, report.loop_instructions = mma, len(body)
        report.per_mma = round(len(body) / mma, 1)
        waits = [
            int(i.operands.split(",")[1], 16)
            for i in body
            if i.opcode.startswith("WARPGROUP.DEPBAR")
        ]
        report.wait_group = min(waits, default=None)
    report.load_bytes = dict(loads)
    source = kernel.asm["ttir" if "ttir" in kernel.asm else "ttgir"]  # Gluon begins with the latter
    report.problems = find_problems(report, case, source)
    return report


def find_problems(report: Report, case: StaticCase, source: str) -> list[str]:
    """What is wrong with a compiled case, whose MLIR before layouts is `source`."""
    problems = []
    if report.programs == 0:
        problems.append(
            f"takes {report.shared_bytes} bytes of shared memory, more than a program can have"
        )
    if report.spill_bytes:
        problems.append(f"spills {report.spill_bytes} bytes of registers")
    dots = [line for line in source.splitlines() if re.search(r"tt\.dot|_dot\b", line)]
    if any("inputPrecision = ieee" not in line for line in dots) and not report.mma:
        problems.append("multiplies without tensor-core instructions")
    loads = report.load_bytes
    narrow = {w: n for w, n in loads.items() if w != "tma" and int(w) < case.load_bytes}
    if sum(narrow.values()) > case.small_loads:
        problems.append(
            f"loads {format_counts(narrow)} bytes at a time in the K loop; {case.load_bytes} are "
            f"possible in all but {case.small_loads}"
        )
    return problems


def all_cases(arch: int, pattern: str) -> Iterator[StaticCase]:
    """Cases of every registered kernel whose name contains `pattern`."""
    for module in sorted(set(_triton_backend.MODULES.values())):
        cases = importlib.import_module(f"{_triton.__name__}.{module}").static_cases(arch)
        yield from (case for case in cases if pattern in case.name)


COLUMNS = (
    ("case", 50),
    ("sm", 4),
    ("regs", 5),
    ("spill", 6),
    ("shared", 7),
    ("/SM", 4),
    ("mma", 26),
    ("in loop", 8),
    ("instr", 6),
    ("/mma", 6),
    ("wait", 5),
    ("loads in loop", 16),
    ("loads", 24),
    ("stores", 10),
)


def format_row(cells: Sequence[object]) -> str:
    return " ".join(
        str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
        for i, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=True))
    ).rstrip()


def format_counts(counts: dict[str, int], unit: str = "") -> str:
    return ", ".join(f"{n}×{what}{unit}" for what, n in sorted(counts.items())) or "-"


def format_report(report: Report) -> str:
    kinds: Counter[str] = Counter()
    for opcode, n in report.mma.items():
        kinds[".".join(opcode.split(".")[:2])] += n
    return format_row(
        (
            report.name,
            report.arch,
            report.registers,
            report.spill_bytes,
            report.shared_bytes,
            report.programs,
            format_counts(dict(kinds)),
            report.mma_in_loop or "-",
            report.loop_instructions or "-",
            report.per_mma or "-",
            "-" if report.wait_group is None else report.wait_group,
            format_counts(report.load_bytes),
            format_counts(report.all_load_bytes),
            format_counts(report.store_bytes),
        )
    )


def main() -> int:
    """Report every case on every architecture; 1 if one has a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        default=",".join(map(str, MULTIPROCESSORS)),
        help="compute capabilities without the point, by commas; default: %(default)s",
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    args = parser.parse_args()
    if _triton.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    try:
        arches = [int(arch) for arch in args.arch.split(",")]
    except ValueError:
        parser.error(f"--arch takes numbers by commas, e.g. 80,90, got {args.arch!r}")
    for arch in arches:
        if arch not in MULTIPROCESSORS:
            known = ", ".join(map(str, MULTIPROCESSORS))
            parser.error(f"--arch {arch} is not known; choose from {known}")
    reports = []
    if not args.json:
        print(f"Triton {triton.__version__}")
        print(format_row([title for title, _ in COLUMNS]))
    for arch in arches:
        for case in all_cases(arch, args.only):
            report = examine(case, arch)
            reports.append(report)
            if not args.json:
                print(format_report(report), flush=True)
    if not reports:
        parser.error(f"no case's name contains {args.only!r}")
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    failed = [report for report in reports if report.problems]
    for report in failed:
        print(f"sm_{report.arch} {report.name}: {'; '.join(report.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
