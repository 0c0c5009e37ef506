"""Builds the native libraries into erq_kernels/: `python csrc/build.py [name …] [--out folder]`.

setup.py calls `build_all`. A new library is one row of `LIBRARIES`; ninja rebuilds what changed.
Standard library only: this file runs before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CSRC = Path(__file__).resolve().parent
PACKAGE = CSRC.parent / "erq_kernels"
OBJECTS = CSRC.parent / "build" / "csrc"


class BuildError(RuntimeError):
    """A library cannot be built; the message says why."""


@dataclass(frozen=True)
class Library:
    """One shared library, lib<name>.so.

    Args:
        name: of the library, without lib and .so.
        sources: patterns below csrc/.
        compiler: key of `COMPILERS`.
        flags: of every compilation and of the link. link_flags: of the link alone.
        x86_flags: ending of a source's name → further flags; such a source is built on x86-64 only.
        required_by: environment variable: 1 makes the library's absence an error, 0 skips it.
        purpose: what does not work without it.
        is_installed: whether an installation has it; others are built when named.
    """

    name: str
    sources: tuple[str, ...]
    compiler: str
    flags: tuple[str, ...]
    required_by: str
    purpose: str
    link_flags: tuple[str, ...] = ()
    x86_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_installed: bool = True

    @property
    def file_name(self) -> str:
        return f"lib{self.name}.so"

    def compilations(self) -> list[tuple[Path, tuple[str, ...]]]:
        """(source, its own flags) of every object that this machine links."""
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        found = []
        for source in sorted(p for pattern in self.sources for p in CSRC.glob(pattern)):
            ending = next((e for e in self.x86_flags if source.name.endswith(e)), None)
            if ending is None or is_x86:
                found.append((source, () if ending is None else self.x86_flags[ending]))
        return found


# name → (environment variable, names on PATH, flag that asks for a dependency file)
COMPILERS = {
    "C++ compiler": ("CXX", ("c++", "g++", "clang++"), "-MMD -MF $out.d"),
    "nvcc": ("NVCC", ("nvcc", "/usr/local/cuda/bin/nvcc"), "-MD -MF $out.d"),
}

_AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512vbmi",
    "-mbmi2", "-mfma", "-mprefer-vector-width=512",
)  # fmt: skip

CUDA_ARCHITECTURES = (80, 86, 89, 90)

LIBRARIES = (
    Library(
        name="erq_cpu",
        sources=("cpu/*.cpp",),
        compiler="C++ compiler",
        # Results are defined operation by operation: no contraction to FMA, no fast math.
        flags=(
            "-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
            "-fno-trapping-math", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-Wall",
            "-Wextra", "-pthread",
        ),
        x86_flags={
            "_amx.cpp": (*_AVX512, "-mamx-tile", "-mamx-int8"),
            "_avx512.cpp": _AVX512,
            "_avx2.cpp": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
        },
        required_by="ERQ_BUILD_CPU",
        purpose="the cpu backend",
    ),
    Library(
        name="erq_cuda",
        sources=("cuda/*.cu",),
        compiler="nvcc",
        # As above, no contraction: -fmad=false. A static runtime serves any torch.
        flags=(
            "-std=c++17", "-O3", "-fmad=false", "-cudart", "static", "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            # One pass of the front end for all of them.
            f"-gencode arch=compute_80,code=[{','.join(f'sm_{a}' for a in CUDA_ARCHITECTURES)}]",
        ),
        required_by="ERQ_BUILD_CUDA",
        purpose="the cuda backend",
    ),
    Library(
        name="erq_cuda_emulated",
        sources=("cuda/emulated_*.cpp",),
        compiler="C++ compiler",
        # The kernels read one buffer as several types, as device code may.
        flags=(
            "-std=c++17", "-O2", "-fPIC", "-DERQ_EMULATE", "-ffp-contract=off",
            "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra",
        ),
        required_by="ERQ_BUILD_CUDA_EMULATED",
        purpose="the emulated cuda backend",
        is_installed=False,
    ),
)  # fmt: skip


def find_compiler(kind: str) -> str | None:
    """Path of a compiler, or None; the environment variable of `COMPILERS` wins over PATH."""
    variable, names, _ = COMPILERS[kind]
    chosen = os.environ.get(variable)
    found = (shutil.which(name) for name in ((chosen,) if chosen else names))
    return next((path for path in found if path), None)


def find_ninja() -> list[str] | None:
    """How to call ninja, or None."""
    path = shutil.which("ninja")
    if path:
        return [path]
    found = subprocess.run([sys.executable, "-m", "ninja", "--version"], capture_output=True)
    return None if found.returncode else [sys.executable, "-m", "ninja"]


def why_not(library: Library) -> str | None:
    """The reason a library cannot be built here, or None."""
    if not library.compilations():
        return f"no source matches {', '.join(library.sources)} in {CSRC}"
    if find_compiler(library.compiler) is None:
        variable, names, _ = COMPILERS[library.compiler]
        return f"no {library.compiler} found (looked for ${variable}, {', '.join(names)})"
    return None if find_ninja() else "no ninja found (pip install ninja)"


def _quote(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build(library: Library, out: Path = PACKAGE, objects: Path = OBJECTS) -> Path:
    """Compile what changed; return the library's path in `out`.

    Raises:
        BuildError: no compiler or no ninja, or a source does not compile.
    """
    reason = why_not(library)
    if reason is not None:
        raise BuildError(f"lib{library.name} cannot be built: {reason}")
    compiler, ninja = find_compiler(library.compiler), find_ninja()
    assert compiler is not None and ninja is not None
    folder = objects / library.name
    folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    target = out.resolve() / library.file_name
    _, _, dependencies = COMPILERS[library.compiler]
    lines = [
        f"cxx = {compiler}",
        f"flags = {' '.join(library.flags)} -I{_quote(CSRC)}",
        "rule compile",
        f"  command = $cxx $flags $own {dependencies} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $flags -shared $in -o $out {' '.join(library.link_flags)}",
    ]
    linked = []
    for source, own in library.compilations():
        linked.append(f"{source.name}.o")
        lines += [f"build {linked[-1]}: compile {_quote(source)}", f"  own = {' '.join(own)}"]
    lines += [f"build {_quote(target)}: link {' '.join(linked)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    result = subprocess.run([*ninja, "-C", str(folder)], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(
            f"{library.file_name} does not compile with {compiler}:\n{result.stdout[-6000:]}"
        )
    return target


def buildable() -> list[Library]:
    """The libraries that an installation on this machine builds.

    Raises:
        BuildError: one that the environment requires cannot be built.
    """
    chosen = []
    for library in LIBRARIES:
        wanted = os.environ.get(library.required_by, "")
        if not library.is_installed or wanted == "0":
            continue
        reason = why_not(library)
        if reason is None:
            chosen.append(library)
        elif wanted == "1":
            raise BuildError(f"{library.required_by}=1, but {library.file_name}: {reason}")
        else:
            print(f"erq installs without {library.purpose}: {reason}.", file=sys.stderr)
    return chosen


def build_all(out: Path = PACKAGE) -> list[Path]:
    """Build `buildable()` into `out`; return the libraries' paths.

    Raises:
        BuildError: one that the environment requires cannot be built.
    """
    built = []
    for library in buildable():
        try:
            built.append(build(library, out))
        except BuildError as error:
            if os.environ.get(library.required_by) == "1":
                raise
            print(f"erq installs without {library.purpose}: {error}", file=sys.stderr)
    return built


def main() -> None:
    """Build the named libraries, or those of an installation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(x.name for x in LIBRARIES))
    parser.add_argument("--out", type=Path, default=PACKAGE)
    args = parser.parse_args()
    rows = {library.name: library for library in LIBRARIES}
    unknown = [name for name in args.names if name not in rows]
    if unknown:
        parser.error(f"unknown library {unknown[0]!r}; choose from {', '.join(rows)}")
    try:
        paths = [build(rows[n], args.out) for n in args.names] or build_all(args.out)
    except BuildError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
