"""Runs of several ranks, as real processes under torchrun: same results, and how they fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from erq.cli import app
from erq.ranks import ALONE, TIMEOUT_VARIABLE, Ranks, launched

ROOT = Path(__file__).resolve().parents[1]
MODEL = [
    "vit_tiny_patch16_224", "--random-weights", "--model-arg", "img_size=16", "--model-arg",
    "patch_size=4", "--model-arg", "embed_dim=24", "--model-arg", "depth=2", "--model-arg",
    "num_classes=5",
]  # fmt: skip
QUANTIZE = ["quantize", *MODEL, "--images", "synthetic", "--n", "40"]


def start(size: int, program: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program, a file or erq, on `size` ranks, on the loopback device, to its end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    module = ["-m"] if program[0] == "erq" else []
    command = [*torchrun, *module, "--", *program] if size > 1 else [sys.executable, *program]
    given = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **env}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **given}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that erq itself wrote to stderr."""
    return [line for line in done.stderr.splitlines() if re.match(r"erq \w+: ", line)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    done = start(1, ["tests/shared_run.py", str(folder)])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "1.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_gives_the_same_file_and_figures(
    size: int, tmp_path: Path, alone: dict[str, Any]
) -> None:
    done = start(size, ["tests/shared_run.py", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{size}.json").read_text())
    assert found == {name: one * size for name, one in alone.items()}
    digests = {one[0][0] for one in alone.values()}
    assert len(digests) == len(alone), "cases that do not differ show nothing"


@pytest.mark.slow
def test_commands_under_torchrun(tmp_path: Path) -> None:
    """quantize, gone on with by two ranks after one process was interrupted, and eval."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    alone = CliRunner().invoke(app, [*QUANTIZE, "--out", str(one)])
    assert alone.exit_code == 0, alone.stderr
    killed = start(
        1, ["tests/interrupted.py", "kill", "erq.pipeline:solve_site", "4", "0",
            *QUANTIZE, "--out", str(two), "--resume"],
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir() if p != one] == ["two.safetensors.resume"]
    done = start(2, ["erq", *QUANTIZE, "--out", str(two), "--resume"])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith(str(two))
    assert len(said(done)) == 0
    assert two.read_bytes() == one.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [one.name, two.name]

    evaluate = ["eval", str(one), "--reference", MODEL[0], *MODEL[1:], "--images", "synthetic"]
    evaluate += ["--limit", "100", "--json"]
    expected = CliRunner().invoke(app, evaluate)
    done = start(2, ["erq", *evaluate])
    assert done.returncode == 0, done.stderr
    results = [json.loads(text) for text in (expected.stdout, done.stdout)]
    for result in results:
        del result["seconds"]
    assert results[0]["evaluation"]["n"] == 100 and results[0] == results[1]


FAILURES = {
    "killed while images are dealt": ("kill", "erq.pipeline:calibration_chunks", "1", "1"),
    "killed between sums": ("kill", "erq.reduce.shared_gram:SharedGram.add", "3", "1"),
    "the first one killed": ("kill", "erq.pipeline:solve_site", "3", "0"),
    "the first one killed while it writes": ("kill", "os:replace", "1", "0"),
    "an error of one": ("raise", "erq.data:check_images", "1", "1"),
    "one that hangs": ("hang", "erq.reduce.shared_gram:SharedGram.add", "3", "1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_a_lost_rank_ends_the_run_with_one_line_and_no_file(failure: str, tmp_path: Path) -> None:
    action, *moment = FAILURES[failure]
    out = tmp_path / "q.safetensors"
    done = start(
        2, ["tests/interrupted.py", action, *moment, *QUANTIZE, "--out", str(out)],
        **{TIMEOUT_VARIABLE: "5" if action == "hang" else "60"},
    )  # fmt: skip
    assert done.returncode != 0
    writing = "writes" in failure
    assert len(said(done)) == (0 if writing else 1), done.stderr
    for line in said(done):
        reason = "of this rank alone is damaged" if action == "raise" else "another"
        assert line.startswith("erq quantize: ") and reason in line
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == (1 if writing else 0)  # what was not yet renamed
    assert done.stdout == ""


@pytest.mark.slow
def test_bad_usage_is_said_once() -> None:
    for args, reason in (
        (["quantize", "demo", "--images", "demo", "--out", "x", "--bits", "4"], "unknown preset"),
        (["info"], "runs in one process"),
    ):
        done = start(2, ["erq", *args])
        assert done.returncode != 0
        assert len(said(done)) == 1 and reason in said(done)[0]


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(torch.device("cpu")) as ranks:
        assert ranks is ALONE and ranks.first and ranks.alone
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with launched(torch.device("cpu")) as ranks:
        assert ranks is ALONE
    with pytest.raises(ValueError, match="from 0 to size − 1 = 1, got 2"):
        Ranks(2, 2)


def test_alone_nothing_is_sent() -> None:
    ranks, seen = Ranks(), list[torch.Tensor]()
    parts = {1: torch.ones(2), 0: torch.zeros(3)}
    ranks.in_order(parts, seen.append)
    assert [len(t) for t in seen] == [3, 2]
    assert list(ranks.merge({2: "b", 0: "a"})) == [0, 2]
    assert ranks.share(lambda: b"x") == b"x"
    assert ranks.deal(parts[1])[0] is parts[1]
    assert ranks.reports_failure() and ranks.sent_bytes == 0


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_and_pieces_are_dealt_out_whole(size: int) -> None:
    ranks = [Ranks(rank, size) for rank in range(size)]
    for parts in (0, 1, 7, 8, 9):
        owners = [[r.rank for r in ranks if r.owns(n)] for n in range(parts)]
        assert all(len(o) == 1 for o in owners)
        most = max(sum(o == [r.rank] for o in owners) for r in ranks)
        assert ranks[0].rounds(parts) == most
    for length in (0, 1, 5, 64, 65):
        pieces = ranks[0].pieces(length)
        assert sum(pieces) == length and max(pieces) - min(pieces) <= 1


@pytest.mark.parametrize(
    ("device", "timeout", "reason"),
    [
        ("cpu", "soon", "must be a number of seconds, got 'soon'"),
        ("cuda:0", "5", "name the device cuda"),
        ("cuda", "5", "has no GPU of its own"),
    ],
)
def test_what_ranks_cannot_start_with(
    device: str, timeout: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1000")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(TIMEOUT_VARIABLE, timeout)
    with pytest.raises(ValueError, match=reason), launched(torch.device(device)):
        pass
