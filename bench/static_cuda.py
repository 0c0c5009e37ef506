"""What nvcc makes of csrc/cuda, without a GPU: `python bench/static_cuda.py`.

Compiles the kernels for each architecture and reads the machine code as bench/static.py does for
Triton's. Exits 1 where a kernel

- spills registers, or takes more shared memory than a block can have;
- fits a multiprocessor fewer times than it was made for;
- multiplies 4-bit operands without the instruction for them where the architecture has one, or
  does not multiply on tensor cores at all;
- copies less than 16 bytes at a time into the pipeline.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.static import (
    COLUMNS,
    LOADS,
    STORES,
    Report,
    count_programs,
    count_widths,
    find_k_loops,
    format_report,
    format_row,
    is_mma,
    parse_sass,
    run_tool,
)

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
ARCHITECTURES = (80, 86, 89, 90)
# With a tensor-core instruction for 4-bit integers; later ones multiply 8-bit in its place.
HAVE_INT4 = (80, 86, 89)
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-cubin")
TYPES = {"3F16": "float16", "4Bf16": "bfloat16", "3F32": "float32"}


@dataclass(frozen=True)
class Kernel:
    """What a kernel's name says.

    Args:
        name: for the report. threads, shared_bytes: of a block.
        blocks: of it that are to fit a multiprocessor. four_bit: whether operands are.
        is_pipelined: whether tiles come through cp.async.
    """

    name: str
    threads: int
    shared_bytes: int
    blocks: int
    four_bit: bool
    is_pipelined: bool


def read_name(mangled: str) -> Kernel:
    """The kernel of a mangled name.

    Raises:
        ValueError: a name that no kernel of csrc/cuda has.
    """
    numbers = [int(n) for n in re.findall(r"L[bi](\d+)E", mangled)]
    if "qlinear_kernel" in mangled and len(numbers) == 10:
        four_bit, m, n, warps_m, warps_n, _, blocks, dual, offset, shared = numbers
        name = f"qlinear {'u4·s4' if four_bit else 's8·s8'} {m}×{n}"
        name += " dual" * dual + " offset" * offset
        return Kernel(name, 32 * warps_m * warps_n, shared, blocks, bool(four_bit), True)
    if "dequant_linear_kernel" in mangled and len(numbers) == 3:
        bits, tiles, shared = numbers
        dtype = next(t for code, t in TYPES.items() if f"NS_{code}E" in mangled)
        blocks = 3 if tiles == 1 else 2
        name = f"dequant_linear {8 * tiles} rows {bits} bits {dtype}"
        return Kernel(name, 128, shared, blocks, False, False)
    raise ValueError(f"bench/static_cuda.py does not know the kernel {mangled}")


def compile_source(source: Path, arch: int, folder: Path) -> tuple[str, dict[str, str]]:
    """Resource usage of a source's cubin, and the disassembly of each kernel."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    code = ("-gencode", f"arch=compute_80,code=sm_{arch}")
    result = subprocess.run(
        ["nvcc", *FLAGS, *code, "-o", str(cubin), str(source)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    text = run_tool("nvdisasm", "-c", str(cubin))
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    kernels = dict(zip(parts[1::2], parts[2::2], strict=True))
    return run_tool("cuobjdump", "-res-usage", str(cubin)), kernels


def examine(mangled: str, text: str, usage: str, arch: int) -> Report:
    """Judge one kernel."""
    kernel = read_name(mangled)
    report = Report(kernel.name, arch, shared_bytes=kernel.shared_bytes)
    resources = re.search(rf"Function {re.escape(mangled)}:\s*REG:(\d+) STACK:(\d+)", usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump -res-usage does not list {mangled}: {usage[:400]}")
    report.registers, report.spill_bytes = map(int, resources.groups())
    report.programs = count_programs(
        arch, kernel.threads // 32, report.registers, report.shared_bytes, 0
    )
    instructions, labels = parse_sass(text)
    report.mma = dict(Counter(i.opcode for i in instructions if is_mma(i)))
    report.all_load_bytes = count_widths(instructions, LOADS)
    report.store_bytes = count_widths(instructions, STORES)
    loads: Counter[str] = Counter()
    for loop in find_k_loops(instructions, labels):
        body = [instructions[i] for i in loop]
        loads.update(count_widths(body, LOADS))
        mma = sum(map(is_mma, body))
        if mma > report.mma_in_loop:
            report.mma_in_loop, report.loop_instructions = mma, len(body)
            report.per_mma = round(len(body) / mma, 1)
    report.load_bytes = dict(loads)
    report.problems = find_problems(report, kernel)
    return report


def find_problems(report: Report, kernel: Kernel) -> list[str]:
    """What is wrong with a compiled kernel."""
    # Where 4-bit products are made up of others, that is a function, and its loop is not found.
    is_native = not kernel.four_bit or report.arch in HAVE_INT4
    problems = []
    if report.spill_bytes:
        problems.append(f"spills {report.spill_bytes} bytes of registers")
    if report.programs < kernel.blocks:
        problems.append(
            f"fits a multiprocessor {report.programs} times, made for {kernel.blocks} "
            f"({report.registers} registers, {report.shared_bytes} bytes of shared memory)"
        )
    if not report.mma:
        problems.append("multiplies without tensor-core instructions")
    elif kernel.four_bit and is_native:
        wrong = [name for name in report.mma if not name.startswith("IMMA.16864.U4.S4")]
        if wrong:
            problems.append(f"multiplies 4-bit operands by {', '.join(wrong)}")
    if kernel.is_pipelined and is_native and set(report.load_bytes) != {"16"}:
        problems.append(f"copies {report.load_bytes or 'nothing'} in the K loop, not 16 bytes")
    return problems


def all_reports(arch: int, pattern: str) -> Iterator[Report]:
    """Reports of the kernels of every source whose file name contains `pattern`."""
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(CSRC.glob("*.cu")):
            if pattern in source.name:
                usage, kernels = compile_source(source, arch, Path(folder))
                for mangled, text in sorted(kernels.items()):
                    yield examine(mangled, text, usage, arch)


def main() -> int:
    """Report every kernel on every architecture; 1 if one has a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default=",".join(map(str, ARCHITECTURES)))
    parser.add_argument("--only", default="", help="sources whose file name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.error("no nvcc on PATH: it compiles what is examined here")
    reports = []
    if not args.json:
        print(format_row([title for title, _ in COLUMNS]))
    for arch in map(int, args.arch.split(",")):
        for report in all_reports(arch, args.only):
            reports.append(report)
            if not args.json:
                print(format_report(report), flush=True)
    if not reports:
        parser.error(f"no kernel in a source whose file name contains {args.only!r}")
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    failed = [report for report in reports if report.problems]
    for report in failed:
        print(f"sm_{report.arch} {report.name}: {'; '.join(report.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
