"""bench/exactness.py finds what differs, and nothing where nothing does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erq_kernels import _triton_backend

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def exactness() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        spec = importlib.util.spec_from_file_location("exactness", BENCH / "exactness.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "exactness", module)
        spec.loader.exec_module(module)
        return module


def test_one_code_of_many_may_move_by_one_behind_a_norm(exactness: Any) -> None:
    want = torch.zeros(40_000, dtype=torch.int8)
    rounded = exactness.Case("", "layer_norm_quantize", {}, exact=False)
    exact = exactness.Case("", "qlinear", {}, exact=True)
    got = want.clone()
    assert exactness.compare(exact, got, want)["ok"]
    got[0] = 1
    assert exactness.compare(rounded, got, want)["ok"]
    assert not exactness.compare(exact, got, want)["ok"]
    got[0] = 2
    assert not exactness.compare(rounded, got, want)["ok"]
    got[:5] = 1
    assert not exactness.compare(rounded, got, want)["ok"]
    assert not exactness.compare(rounded, got[1:], want)["ok"]
    assert not exactness.compare(rounded, got.float(), want)["ok"]


@pytest.mark.skipif(not _triton_backend.is_installed(), reason="triton is not installed")
def test_interpreted_kernels_pass(tmp_path: Path) -> None:
    out = tmp_path / "exactness.jsonl"
    command = [sys.executable, str(BENCH / "exactness.py"), "--smoke", "--backend", "triton"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCH.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["op"] for row in rows} == set(_triton_backend.MODULES)
    assert all(row["ok"] for row in rows)
