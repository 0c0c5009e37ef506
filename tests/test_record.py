"""What a run has decided: as bytes and back, and a killed run that goes on to the same file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import erq
from erq import pipeline
from erq.calib.reparam import plan_fold
from erq.cli import app
from erq.quant import AffineParams, DualAffineParams, LogParams
from erq.ranks import ALONE
from erq.record import Record, RecordError, decode, encode, model_digest, scratch_file
from erq.reduce.allocation import SiteBits
from erq.reduce.site import SiteReport, Solution

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
MODEL = [
    "vit_tiny_patch16_224", "--random-weights", "--model-arg", "img_size=16", "--model-arg",
    "patch_size=4", "--model-arg", "embed_dim=24", "--model-arg", "depth=2", "--model-arg",
    "num_classes=5",
]  # fmt: skip
QUANTIZE = ["quantize", *MODEL, "--images", "synthetic", "--n", "20"]
SITES = 10  # layers of that model: patch embedding, 2 × (qkv, proj, fc1, fc2), head


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, [*QUANTIZE, *map(str, args)])


def killed(out: Path, function: str, call: int, *more: str) -> int:
    """Exit status of a process that is killed (-9) at a call of a function."""
    command = ["tests/interrupted.py", "kill", function, str(call), "0", *QUANTIZE, *more]
    return subprocess.run(
        [sys.executable, *command, "--out", str(out), "--resume"], cwd=ROOT, check=False,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    ).returncode  # fmt: skip


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the sites that are solved; at number `stop` the user interrupts."""
    count = {"solved": 0, "stop": 0}
    solve = pipeline.solve_site

    def counted(*args: Any, **kwargs: Any) -> Solution:
        count["solved"] += 1
        if count["solved"] == count["stop"]:
            interrupt()
        return solve(*args, **kwargs)

    monkeypatch.setattr(pipeline, "solve_site", counted)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("paper", [(), ("--paper",)], ids=["sequential", "as published"])
def test_killed_again_and_again_gives_the_same_bytes(
    tmp_path: Path, calls: dict[str, int], paper: tuple[str, ...]
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    assert run("--out", whole, *paper).exit_code == 0
    state = tmp_path / "q.safetensors.resume"
    moments = [
        ("erq.pipeline:solve_site", 1, set[str]()),  # nothing is kept yet
        ("os:replace", 1, {scratch_file(state).name}),  # the first state is there but for its name
        ("erq.pipeline:solve_site", 4, {state.name}),  # within a block
        ("erq.pipeline:calibrate_site", 9, {state.name}),
        ("os:replace", 2, {state.name, scratch_file(state).name}),
        ("erq.deployment.checkpoint:save", 1, {state.name}),  # all is decided, nothing written
    ]
    for function, call, left in moments:
        assert killed(out, function, call, *paper) == -signal.SIGKILL
        # What an earlier one left is there until a state takes its place.
        found = {p.name for p in tmp_path.iterdir()} - {whole.name}
        assert left <= found <= {state.name, scratch_file(state).name}
    calls["solved"] = 0
    done = run("--out", out, "--resume", *paper)
    assert done.exit_code == 0, done.stderr
    assert calls["solved"] == 0
    assert out.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {whole.name, out.name}


@pytest.mark.parametrize("stop", [2, 7, SITES])
def test_what_is_done_is_not_done_again(tmp_path: Path, calls: dict[str, int], stop: int) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    run("--out", whole)
    calls.update(solved=0, stop=stop)
    assert run("--out", out, "--resume").exit_code == 130
    assert not out.exists()
    calls.update(solved=0, stop=0)
    assert run("--out", out, "--resume").exit_code == 0
    # The sites of blocks that were finished: embedding, attention and MLP in turns, head.
    finished = {2: 1, 7: 5, SITES: 9}[stop]
    assert calls["solved"] == SITES - finished
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("stop", [5, SITES + 5])
def test_average_width_goes_on_in_either_run(
    tmp_path: Path, calls: dict[str, int], stop: int
) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    run("--out", whole, "--target-bits", "3.5")
    calls.update(solved=0, stop=stop)
    assert run("--out", out, "--resume", "--target-bits", "3.5").exit_code == 130
    calls.update(solved=0, stop=0)
    assert run("--out", out, "--resume", "--target-bits", "3.5").exit_code == 0
    assert calls["solved"] == {5: 2 * SITES - 3, SITES + 5: SITES - 3}[stop]
    assert out.read_bytes() == whole.read_bytes()


@pytest.fixture
def halfway(tmp_path: Path, calls: dict[str, int]) -> Path:
    """The output of an interrupted run, its state beside it."""
    out = tmp_path / "q.safetensors"
    calls["stop"] = 5
    assert run("--out", out, "--resume").exit_code == 130
    calls["stop"] = 0
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--bits", "w3a4"), "with other settings:"),
        (("--target-bits", "4"), "with other settings:"),
        (("--n", "21"), "with other images:"),
        (("--seed", "1"), "with other settings and images:"),
        (("--model-arg", "mlp_ratio=3"), "with other model:"),
    ],
)
def test_state_of_another_run_is_refused(
    halfway: Path, change: tuple[str, str], reason: str
) -> None:
    state = halfway.with_name("q.safetensors.resume")
    before = state.read_bytes()
    done = run("--out", halfway, "--resume", *change)
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert str(state) in done.stderr and reason in done.stderr and "delete" in done.stderr
    assert state.read_bytes() == before and not halfway.exists()


def test_state_of_another_version_is_refused(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erq.record.__version__", "0")
    assert "with other versions:" in run("--out", halfway, "--resume").stderr


def test_damaged_state_is_refused(halfway: Path) -> None:
    state = halfway.with_name("q.safetensors.resume")
    data = state.read_bytes()
    for wrong in (b"", data[:-9], b"x" * 100, encode(3), encode({"format": 9, "identity": {}})):
        state.write_bytes(wrong)
        done = run("--out", halfway, "--resume")
        assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
        assert str(state) in done.stderr and "delete it" in done.stderr
    state.unlink()
    state.mkdir()
    assert "cannot be read" in run("--out", halfway, "--resume").stderr


def test_without_the_option_a_state_stays_as_it_is(halfway: Path) -> None:
    state = halfway.with_name("q.safetensors.resume")
    before = state.read_bytes()
    assert run("--out", halfway).exit_code == 0
    assert state.read_bytes() == before


def test_python_call_resumes(
    tmp_path: Path, calls: dict[str, int], tiny_vit: Callable[..., Any]
) -> None:
    model, images, state = tiny_vit(), torch.randn(6, 3, 16, 16), tmp_path / "state"
    calls["stop"] = 6
    with pytest.raises(KeyboardInterrupt):
        erq.quantize(model, images, "w4a4", resume=state)
    calls.update(solved=0, stop=0)
    sim: Any = erq.quantize(model, images, "w4a4", resume=state)
    assert calls["solved"] == SITES - 5
    assert state.exists()
    expected: Any = erq.quantize(model, images, "w4a4")
    assert sim.erq_report == expected.erq_report
    for name, value in expected.state_dict().items():
        assert torch.equal(sim.state_dict()[name], value), name


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if is_dataclass(a):
        same = (equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
        return type(a) is type(b) and all(same)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(equal, a.values(), b.values()))
    return type(a) is type(b) and bool(a == b)


def test_values_come_back_as_they_were(affine: Callable[..., AffineParams]) -> None:
    per_row = affine([0.1, 1e-9], [-300, 7])
    dual = DualAffineParams(per_row, per_row, torch.tensor([1, 5]))
    report = SiteReport(
        "head", "linear", 4, 16, "dual", 0.1, 1 / 3, 1e-300, float("inf"), {2: 0.1, 8: 0.3}
    )
    solution = Solution(dual, torch.arange(6, dtype=torch.uint8).reshape(2, 3), None, report)
    value = {
        "ranges": (LogParams(torch.tensor(0.7), 4, False), affine(0.5, 3)),
        "fold": plan_fold(affine([0.1, 0.3], [3, 5])),
        "weight": solution,
        "bits": [SiteBits("head", 10, 3, {2: 0.5}, 0.1, None, 1e-3)],
        "plain": (None, True, 1, 0.1, "λ", {"a": {"b": ()}}),
    }
    assert equal(decode(encode(value), CPU), value)
    # A view of a large tensor carries its own elements alone.
    part = torch.zeros(10**6)[::2][:3]
    assert len(encode(part)) < 1000 and equal(decode(encode(part), CPU), part)


def test_without_a_path_nothing_is_kept() -> None:
    record = Record()
    record.keep("a", 1)
    record.save()
    assert record.find("a") is None


def test_record_is_written_when_something_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    record = Record.open(path, {"model": "m"}, ALONE, CPU)
    record.save()
    assert not path.exists()
    record.keep("first: a", (1, torch.ones(2)))
    record.keep("b", 2)
    record.save()
    again = Record.open(path, {"model": "m"}, ALONE, CPU)
    assert equal(again.find("first: a"), (1, torch.ones(2)))
    again.drop("first")
    assert (again.find("first: a"), again.find("b")) == (None, 2)
    with pytest.raises(RecordError, match="with other model:"):
        Record.open(path, {"model": "n"}, ALONE, CPU)
    path.unlink()
    record.save()
    assert not path.exists()


def test_digest_of_a_model(tiny_vit: Callable[..., Any]) -> None:
    model = tiny_vit()
    first = model_digest(model, "vit", {"depth": 2})
    assert first == model_digest(model, "vit", {"depth": 2})
    assert first != model_digest(model, "vit", {"depth": 3})
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    assert first != model_digest(model, "vit", {"depth": 2})
