"""bench/tune.py: what it measures, that nothing wrong wins, and the table that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from erq_kernels import configs
from erq_kernels.configs import GemmConfig

triton = pytest.importorskip("triton")

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def tune() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec = importlib.util.spec_from_file_location("tune", BENCH / "tune.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "tune", module)
        spec.loader.exec_module(module)
        return module


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH.parent)}
    return subprocess.run(
        [sys.executable, str(BENCH / "tune.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own runs are in bench/device.sh")
def test_a_table_is_written_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "tables" / "interpreter.json"
    arguments = ("--smoke", "--out", str(path.parent))
    result = run_script(*arguments)
    assert result.returncode == 0, result.stderr
    assert "WRONG" not in result.stdout
    # The heuristic's configuration, pointers and descriptors; Gluon has no interpreter.
    assert result.stdout.count("3 configurations") == 6
    first = path.read_text()
    assert json.loads(first)["triton"] == triton.__version__
    measured = configs.parse_table(first, "table")["qlinear"]
    assert len({(seen.m, seen.n, seen.k, seen.dual) for seen in measured}) == 6
    assert os.listdir(path.parent) == [path.name]

    shorter = json.loads(first)
    del shorter["qlinear"][2:4]
    path.write_text(json.dumps(shorter))
    result = run_script(*arguments)
    assert result.returncode == 0 and result.stdout.count("3 configurations") == 2
    again = configs.parse_table(path.read_text(), "table")["qlinear"]
    assert again[:4] == measured[:2] + measured[4:] and len(again) == 6

    path.write_text(json.dumps(json.loads(first) | {"triton": "0.0.1"}))
    result = run_script(*arguments, "--minutes", "0")
    assert result.returncode == 0 and "out of time after 0 of 6 problems" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--smoke",), "name a folder with --out"),
        (("--models", "vgg"), "unknown models vgg; known: deit_tiny"),
        (("--batches", "0"), "--batches takes numbers from 1"),
        (("--batches", "1,x"), "--batches takes numbers from 1"),
    ],
)
def test_wrong_arguments_are_refused(
    tune: Any,
    arguments: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        tune.main()
    assert exit.value.code == 2 and text in capsys.readouterr().err


def test_the_problems_are_those_of_the_models(tune: Any) -> None:
    problems = tune.problems_of(["deit_small", "swin_tiny"], [1, 256])
    assert len({p.key for p in problems}) == len(problems)
    for expected in (
        tune.Problem(50432, 1152, 384, True, "codes"),
        tune.Problem(50432, 1152, 384, False, "codes"),
        tune.Problem(197, 1536, 384, True, "gelu"),
        tune.Problem(50432, 384, 1536, False, "residual"),
        tune.Problem(784, 192, 384, False, "residual"),  # Swin's first merging
    ):
        assert expected in problems
    assert not any(p.dual for p in problems if p.epilogue == "residual")


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("m", [16, 197, 50432])
def test_candidates_begin_with_the_heuristic(tune: Any, arch: int, m: int) -> None:
    problem = tune.Problem(m, 1152, 384, True, "codes")
    candidates = list(tune.candidates_of(problem, arch))
    assert candidates[0] == configs.heuristic(*problem.key, arch)
    assert len(set(candidates)) == len(candidates) > 10
    kernels = {config.kernel for config in candidates}
    assert ("tma" in kernels) == (arch >= 90)
    assert ("gluon" in kernels) == (arch == 90 and m > 32)


def config_of(block_k: int) -> GemmConfig:
    return GemmConfig(64, 64, block_k)


class FakeWorkload:
    """Configurations that are right, wrong, wrong only sometimes, and that fail."""

    x = weight = None
    operands: ClassVar[dict[str, Any]] = {"split": 4}
    exact, timed = {"exact": True}, {"exact": False}
    behaviour: ClassVar[dict[int, str]] = {}

    def __init__(self, problem: Any, device: torch.device) -> None:
        pass

    def expected(self) -> Tensor:
        return torch.ones(3)

    def launcher(self, epilogue: Any, config: GemmConfig) -> tuple[Callable[[], None], Tensor]:
        kind = self.behaviour.get(config.block_k, "right")
        if kind == "fails":
            raise RuntimeError("out of resources\nand more")
        out = torch.empty(3)
        runs = []

        def run() -> None:
            runs.append(0)
            out.fill_(1.0 if epilogue["exact"] else 2.0)
            if (
                kind == "wrong"
                or (kind == "wrong behind an activation" and not epilogue["exact"])
                or (kind == "races" and len(runs) == 4)
            ):
                out[1] = 0.0

        return run, out


@pytest.fixture
def measure(tune: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Measurement of the heuristic's block_k 32 and others, given their behaviour and times."""

    def run(behaviour: dict[int, str], times: dict[int, float]) -> Any:
        order = iter(k for k in times if behaviour.get(k, "right") == "right")
        monkeypatch.setattr(tune, "time_of", lambda _: times[next(order)])
        monkeypatch.setattr(FakeWorkload, "behaviour", behaviour)
        problem = tune.Problem(5, 6, 7, True, "gelu")
        return tune.measure(problem, map(config_of, times), 90, torch.device("cpu"))

    monkeypatch.setattr(tune, "Workload", FakeWorkload)
    monkeypatch.setattr(tune.qlinear, "can_run", lambda *_: True)
    return run


def test_the_fastest_wins(measure: Callable[..., Any]) -> None:
    seen = measure({}, {32: 10.0, 64: 7.0, 128: 9.0})
    assert seen == configs.Measurement(5, 6, 7, True, config_of(64), 7.0, 10.0)


@pytest.mark.parametrize("kind", ["wrong", "wrong behind an activation", "races", "fails"])
def test_what_is_not_right_cannot_win(kind: str, measure: Callable[..., Any]) -> None:
    seen = measure({64: kind}, {32: 10.0, 64: 1.0, 128: 9.0})
    assert seen.config == config_of(128) and seen.microseconds == 9.0


def test_a_gain_within_the_noise_does_not_count(measure: Callable[..., Any]) -> None:
    assert measure({}, {32: 10.0, 64: 9.9}).config == config_of(32)


@pytest.mark.parametrize("kind", ["wrong", "fails"])
def test_a_heuristic_that_is_wrong_stops_the_run(kind: str, measure: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="the heuristic's GemmConfig"):
        measure({32: kind}, {32: 10.0, 64: 9.0})
