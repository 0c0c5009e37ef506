"""A few of the kills and inferences of bench/reliability.py, and that it sees what is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import sys
sys.path.insert(0, "bench")
import torch
import reliability
torch.set_num_threads(1)
"""


def run(code: str) -> str:
    """What a fresh process prints: it forks, which a process with other tests' threads must not."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_target_is_old_or_new_after_a_kill() -> None:
    out = run("print([reliability.kill_at_random(m, 5, 7) for m in reliability.MODES])")
    rows = eval(out)
    assert [r["mode"] for r in rows] == ["save", "quantize", "quantize --resume"]
    for row in rows:
        assert row.get("old", 0) + row.get("new", 0) == row["kills"] == 5
    assert rows[2]["resumed to the same bytes"] == 5


def test_a_half_written_file_is_seen() -> None:
    out = run(
        """
from pathlib import Path
def save(net, target):
    with Path(target).open("wb") as file:
        for _ in range(2000):
            file.write(bytes(1000))
            file.flush()
reliability.erq.save = save
try:
    reliability.kill_at_random("save", 20, 0)
except reliability.Broken as error:
    print(error)
"""
    )
    assert "neither the old file nor the new one" in out


def test_memory_that_grows_is_told_from_memory_that_does_not() -> None:
    out = run(
        """
flat = reliability.memory_series(400, 40)
load, kept = reliability.erq.load, []
def leaking(file):
    net = load(file)
    return lambda x: kept.append(torch.ones(50_000)) or net(x)
reliability.erq.load = leaking
print([flat, reliability.memory_series(200, 20)])
"""
    )
    flat, leak = eval(out)
    assert len(flat["resident_mb"]) == 40 and flat["same_logits_at_the_end"]
    assert flat["growth_mb_after_the_first_tenth"] < 5
    assert leak["growth_mb_after_the_first_tenth"] > 10
