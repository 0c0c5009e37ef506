"""csrc/build.py: what it builds, and what it says where it cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with one tiny library of sources in `tmp_path`."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    (tmp_path / "one.cpp").write_text('#include "one.h"\nextern "C" int one() { return ONE; }\n')
    (tmp_path / "one.h").write_text("#define ONE 1\n")
    monkeypatch.setattr(module, "CSRC", tmp_path)
    row = next(x for x in module.LIBRARIES if x.name == "erq_cpu")
    tiny = replace(row, name="tiny", sources=("*.cpp",), flags=("-fPIC",), required_by="TINY")
    monkeypatch.setattr(module, "LIBRARIES", (tiny,))
    monkeypatch.delenv("TINY", raising=False)
    if module.why_not(tiny) is not None:
        pytest.skip(module.why_not(tiny))
    return module


def test_builds_and_builds_again_what_changed(build: ModuleType, tmp_path: Path) -> None:
    (tiny,) = build.LIBRARIES
    for value in (1, 2):
        (tmp_path / "one.h").write_text(f"#define ONE {value}\n")
        path = build.build(tiny, tmp_path / f"out {value}", tmp_path / "objects")
        assert path == tmp_path / f"out {value}" / "libtiny.so"
        assert ctypes.CDLL(str(path)).one() == value


def test_without_a_compiler_installation_goes_on(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build_all() == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("erq installs without the cpu backend: no C++ compiler found")
    monkeypatch.setenv("TINY", "1")
    with pytest.raises(build.BuildError, match=r"TINY=1, but libtiny\.so: no C\+\+ compiler"):
        build.build_all()


def test_a_source_that_does_not_compile(
    build: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "one.h").write_text("#error broken on purpose\n")
    monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
    monkeypatch.setattr(build.build, "__defaults__", (tmp_path, tmp_path / "objects"))
    assert build.build_all(tmp_path / "out") == []
    assert "broken on purpose" in capsys.readouterr().err
    monkeypatch.setenv("TINY", "1")
    with pytest.raises(build.BuildError, match="broken on purpose"):
        build.build_all(tmp_path / "out")


def test_zero_skips_a_library(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY", "0")
    assert build.buildable() == []


def test_sources_of_an_instruction_set_are_left_out_elsewhere(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fast_avx2.cpp").write_text("")
    (tiny,) = build.LIBRARIES
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert dict(tiny.compilations())[tmp_path / "fast_avx2.cpp"] == tiny.x86_flags["_avx2.cpp"]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert [source.name for source, _ in tiny.compilations()] == ["one.cpp"]


def test_an_unknown_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "build.py"), "erq_tpu"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown library 'erq_tpu'; choose from erq_cpu" in done.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler found (cc)")
def test_the_interface_is_plain_c() -> None:
    command = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    subprocess.run([*command, "-x", "c", str(ROOT / "csrc" / "erq.h")], check=True)
