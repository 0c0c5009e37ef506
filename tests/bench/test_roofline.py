"""The paper model of bench/roofline.py against sums done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "roofline.py"


def run(*arguments: str) -> str:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def layers(model: str, batch: int, device: str) -> dict[str, dict[str, Any]]:
    chosen = ("--model", model, "--batch", str(batch), "--device", device)
    rows = [json.loads(line) for line in run("--json", *chosen).splitlines()]
    return {row["kernel"]: row for row in rows}


def test_layers_of_a_vision_transformer_by_hand() -> None:
    found = layers("deit_small", 64, "H200")
    assert len(found) == 7 and all(row["calls"] == 12 for row in found.values())
    rows = 64 * 197
    fc1 = found["fc1 + GELU"]
    assert fc1["operations"] == 2 * rows * 384 * 1536
    assert fc1["bytes"] == rows * 384 + 1536 * 384 + rows * 1536
    memory, math = fc1["bytes"] / 4800e9, fc1["operations"] / 1979e12
    assert fc1["floor_us"] == pytest.approx(1e6 * max(memory, math))
    proj = found["proj + residual"]
    assert proj["bytes"] == rows * 384 + 384 * 384 + 2 * (2 * rows * 384)
    assert found["attention"]["operations"] == 4 * 64 * 6 * 197**2 * 64
    packed = layers("deit_small", 64, "A100")["fc1 + GELU"]
    assert packed["bytes"] == (rows * 384 + 1536 * 384 + rows * 1536) // 2


def test_swin_has_windows_and_merges() -> None:
    found = layers("swin_tiny", 8, "H100")
    assert found["stage 2 qkv"]["calls"] == 6
    assert found["stage 3 merge"]["operations"] == 2 * (8 * 49) * 768 * 1536
    assert found["stage 0 attention"]["operations"] == 4 * (8 * 64) * 3 * 49**2 * 32


def test_nothing_is_expected_to_beat_its_floor() -> None:
    rows = [json.loads(line) for line in run("--json").splitlines()]
    assert {row["device"] for row in rows} == {"A100", "RTX 4090", "H100", "H200"}
    assert {row["batch"] for row in rows} == {1, 8, 64, 256}
    assert len({row["model"] for row in rows}) == 6
    assert all(row["expected_us"] >= row["floor_us"] > 0 for row in rows)
    table = run("--model", "swin_base", "--layers", "--device", "A100", "--batch", "8")
    assert "stage 1 merge (" in table and "pass" in table


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("--batch", "0")
    assert "--batch must be at least 1, got 0" in caught.value.stderr
