"""The sdist and the wheels built from it, each installed into an environment of its own and tried.

An environment is a fresh one with the dependencies of this one behind it, and without the checkout:
what a wheel lacks shows, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import erq

ROOT = Path(__file__).resolve().parents[1]
DEPENDENCIES = Path(torch.__file__).resolve().parents[1]
PURE, NATIVE = {"ERQ_BUILD_CPU": "0"}, {"ERQ_BUILD_CPU": "1"}

CONSUMER = """\
import torch
from torch import Tensor, nn

import erq


def compress(model: nn.Module, images: Tensor) -> nn.Module:
    config = erq.QuantConfig.preset("w4a4")
    sim = erq.quantize(model, images, config)
    net = erq.deploy(sim, backend="auto")
    erq.save(net, "net.safetensors")
    reveal_type(erq.evaluate(net, images, reference=model).top1)
    reveal_type(erq.summary(net))
    return erq.load("net.safetensors", device=torch.device("cpu"))


erq.save("no model", "net.safetensors")
erq.load(1)
erq.quantise
"""


@dataclass(frozen=True)
class Installed:
    """A wheel and the environment that it alone was installed into.

    Args:
        files: of the wheel. python: the environment's.
    """

    wheel: Path
    files: frozenset[str]
    python: Path

    def run(self, *command: str | Path, cwd: Path) -> str:
        """Standard output of `python -m command`, run far from the checkout."""
        return call([self.python, "-m", *command], cwd)

    def metadata(self, name: str) -> Message:
        """A file of the wheel's .dist-info, as headers."""
        [path] = [f for f in self.files if f.endswith(f".dist-info/{name}")]
        with zipfile.ZipFile(self.wheel) as archive:
            return Parser().parsestr(archive.read(path).decode())


def call(command: list[str | Path], cwd: Path, **variables: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ERQ_BACKEND")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    pytest.importorskip("build", reason="needs build (pip install build)")
    out = tmp_path_factory.mktemp("sdist")
    call([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", out, ROOT], out)
    [archive] = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    [folder] = [path for path in out.iterdir() if path.is_dir()]
    assert folder.name == f"erq-{erq.__version__}" == archive.name.removesuffix(".tar.gz")
    return folder


def install(sdist: Path, folder: Path, libraries: dict[str, str]) -> Installed:
    """Build a wheel from the sdist and install it."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, sdist]
    call(build, folder, ERQ_BUILD_CUDA="0", **libraries)
    [wheel] = folder.glob("*.whl")
    venv = folder / "venv"
    call([sys.executable, "-m", "venv", "--without-pip", venv], folder)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    call([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], folder)
    [site] = (venv / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(f"{DEPENDENCIES}\n")
    with zipfile.ZipFile(wheel) as archive:
        return Installed(wheel, frozenset(archive.namelist()), python)


@pytest.fixture(scope="module")
def pure(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(sdist, tmp_path_factory.mktemp("pure"), PURE)


@pytest.fixture(scope="module")
def native(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel with the CPU library, its compilation included."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler found")
    return install(sdist, tmp_path_factory.mktemp("native"), NATIVE)


def try_demo(installed: Installed, folder: Path) -> str:
    """Quantize the demo's model, then read and run the file in a new process; the kernel used."""
    images = ("--images", "demo", "--json", "--quiet")
    quantize = ("quantize", "demo", *images, "--method", "rtn", "--n", "8", "--out", "net")
    made = json.loads(installed.run("erq", *quantize, cwd=folder))
    assert made["config"]["w_bits"] == 4
    found = json.loads(installed.run("erq", "eval", "net", *images, "--limit", "64", cwd=folder))
    assert found["evaluation"]["top1"] > 80
    return str(found["kernel"])


def where_is_erq(installed: Installed, folder: Path) -> Path:
    return Path(call([installed.python, "-c", "import erq; print(erq.__file__)"], folder).strip())


def check_contents(installed: Installed) -> None:
    """What every wheel holds, and one version for all of it."""
    wanted = {"erq/py.typed", "erq_kernels/py.typed", "erq/demo/digits.npz"}
    tracked = {
        path.relative_to(ROOT).as_posix()
        for package in ("erq", "erq_kernels")
        for path in (ROOT / package).rglob("*.py")
    }
    assert wanted | tracked <= installed.files
    assert any(f.endswith(".dist-info/licenses/LICENSE") for f in installed.files)
    assert {f.partition("/")[0] for f in installed.files} == {
        "erq", "erq_kernels", f"erq-{erq.__version__}.dist-info",
    }  # fmt: skip
    metadata = installed.metadata("METADATA")
    assert metadata["Version"] == erq.__version__
    required = metadata.get_all("Requires-Dist") or []
    assert any(r.startswith("torch>=") for r in required)


@pytest.mark.slow
def test_the_sdist_has_what_a_wheel_and_its_tests_need(sdist: Path) -> None:
    for name in ("csrc/erq.h", "csrc/build.py", "LICENSE", "conftest.py", "tests/golden/check.py"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so"))


@pytest.mark.slow
def test_the_pure_wheel_runs_on_the_reference(pure: Installed, tmp_path: Path) -> None:
    check_contents(pure)
    assert pure.wheel.name == f"erq-{erq.__version__}-py3-none-any.whl"
    assert not [f for f in pure.files if f.endswith(".so")]
    assert where_is_erq(pure, tmp_path).is_relative_to(pure.python.parents[1])
    assert pure.run("erq", "--version", cwd=tmp_path).strip() == f"erq {erq.__version__}"
    assert try_demo(pure, tmp_path) == "reference"


@pytest.mark.slow
def test_the_native_wheel_runs_on_its_library(native: Installed, tmp_path: Path) -> None:
    check_contents(native)
    system = f"{platform.system().lower()}_{platform.machine()}"
    assert native.wheel.name == f"erq-{erq.__version__}-py3-none-{system}.whl"
    assert native.metadata("WHEEL")["Root-Is-Purelib"] == "false"
    assert [f for f in native.files if f.endswith(".so")] == ["erq_kernels/liberq_cpu.so"]
    assert where_is_erq(native, tmp_path).is_relative_to(native.python.parents[1])
    assert try_demo(native, tmp_path) == "cpu"


@pytest.mark.slow
def test_the_public_surface_is_typed(pure: Installed, tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [
        sys.executable, "-m", "mypy", "--strict", "--python-executable", pure.python,
        "--cache-dir", tmp_path / "cache", "--no-error-summary", "--hide-error-context",
        "consumer.py",
    ]  # fmt: skip
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    said = [line.partition(": ")[2].replace('"', "") for line in done.stdout.splitlines()]
    expected = (
        "note: Revealed type is float | None",
        "note: Revealed type is str",
        "error: Argument 1 to save has incompatible type str; expected Module",
        "error: Argument 1 to load has incompatible type int; expected str | PathLike[str]",
        "error: Module has no attribute quantise",
    )
    assert len(said) == len(expected), done.stdout + done.stderr
    for line, start in zip(said, expected, strict=True):
        assert line.startswith(start), done.stdout
