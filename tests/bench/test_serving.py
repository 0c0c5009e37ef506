"""bench/serving.py ends with 0 where a model serves, and says what is wrong where it does not."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erq_kernels import _cpu

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def serving() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec = importlib.util.spec_from_file_location("serving", BENCH / "serving.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "serving", module)
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def judge(serving: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("ERQ_RESULTS", str(tmp_path))
    return serving.Judge(serving.ResultFile("serving"))


class Wrong(nn.Module):
    """Right on its first `right` calls."""

    def __init__(self, right: int) -> None:
        super().__init__()
        self.left = right

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        return x.flatten(1) + (self.left < 0)


@pytest.mark.slow
def test_a_model_that_serves(tmp_path: Path) -> None:
    if not _cpu.supported_variants():
        pytest.skip("the CPU library is not built")
    environment = os.environ | {"PYTHONPATH": str(BENCH.parent), "ERQ_RESULTS": str(tmp_path)}
    options = ["--smoke", "--model", "vit_tiny_patch16_224", "--calls", "50"]
    options += ["--seconds", "0.01", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCH / "serving.py"), *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.rglob("serving.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"batches", "callers", "memory"}
    assert all(row["wrong"] is None for row in rows)
    assert {row["batch"] for row in rows if row["part"] == "batches"} == {1, 3, 5, 7, 8, 13}


def test_a_wrong_answer_is_told(serving: Any, judge: Any) -> None:
    x = torch.randn(13, 3)
    sizes = sum(b % 2 for b in serving.BATCHES)
    work = serving.plan({"good": Wrong(10**6), "bad": Wrong(sizes + 3)}, x)
    assert serving.serve(work, 7) is None
    assert serving.serve(work, 2) == "bad: 1 of 1 answers differ, by up to 1"
    serving.check_callers(judge, "two", serving.plan({"bad": Wrong(sizes)}, x), 2)
    assert len(judge.problems) == 2  # of one caller and of several
    assert all("answers differ" in problem for problem in judge.problems)


def test_an_error_in_a_thread_is_told(serving: Any, judge: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of luck")

    x = torch.randn(3, 3)
    serving.check_callers(judge, "one", [("broken", Broken(), x, x)], 1)
    assert judge.problems == [
        f"callers, {n} at once, one: RuntimeError: out of luck" for n in (1, serving.CALLERS)
    ]


def test_an_answer_that_depends_on_the_batch_is_told(serving: Any, judge: Any) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    serving.check_batches(judge, Mean(), torch.randn(3, 4), [1], 0.01)
    [problem] = judge.problems  # alone, every image is its own mean
    assert problem.startswith("batches, batch 3, 1 thread: 3 of 3 answers differ")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_growing_memory_is_told(serving: Any, judge: Any) -> None:
    kept: list[mmap.mmap] = []

    def leak(calls: int) -> None:
        # Fresh pages: the heap may still hold what earlier tests gave back.
        for _ in range(calls):
            kept.append(mmap.mmap(-1, 65536))
            kept[-1].write(b"x" * 65536)

    serving.check_memory(judge, "none", lambda calls: None, 1000)
    assert not judge.problems
    serving.check_memory(judge, "leak", leak, 1000)
    [problem] = judge.problems
    assert problem.startswith("memory, 1000 calls, leak: memory grew by 5")
