"""Every finding of the campaigns again, and the first cases of every target.

The cases of `cases/` are named TARGET.WHAT.case; each of them once got past erq. `make fuzz` runs
100,000 cases a target (docs/reliability.md).
"""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.fuzz import campaign, mutate
from tests.fuzz.campaign import TARGETS, case_of, target_named
from tests.fuzz.target import Finding, Target, refusal

CASES = sorted((Path(__file__).parent / "cases").glob("*.case"))
FIRST = {"checkpoint-headers": 40, "command-lines": 60}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_what_was_found_stays_fixed(path: Path) -> None:
    outcome = target_named(path.name.partition(".")[0]).check(path.read_bytes())
    assert outcome.startswith(("accepted", "refused"))


@pytest.mark.parametrize("name", TARGETS)
def test_first_cases(name: str) -> None:
    target, outcomes = target_named(name), set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(FIRST.get(name, 200)):
            outcomes.add(target.check(case_of(target, 0, number)))
    assert any(o.startswith("accepted") for o in outcomes), "no case gets through"
    assert sum(o.startswith("refused") for o in outcomes) >= 5, "refused for few reasons only"


def test_a_case_is_decided_by_its_number_and_the_seed() -> None:
    target = target_named("settings")
    assert case_of(target, 1, 7) == case_of(target, 1, 7) != case_of(target, 2, 7)


class Wrong(Target):
    """A target that every case gets past."""

    name = "wrong"

    def make(self, rng: random.Random) -> bytes:
        return mutate.data(rng, b"abc")

    def check(self, case: bytes) -> str:
        raise KeyError("what")


def test_what_escapes_is_a_finding_with_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(campaign, "target_named", lambda _: Wrong())
    campaign.work("wrong", tmp_path, seed=0, cases=5)
    state = campaign.json.loads((tmp_path / "wrong.json").read_text())
    assert state["done"] == 5
    (found,) = state["findings"].values()
    assert found["count"] == 5 and found["first"] == 0
    assert (tmp_path / "wrong-0.case").read_bytes() == case_of(Wrong(), 0, 0)
    assert "KeyError" in (tmp_path / "wrong-0.txt").read_text()
    campaign.work("wrong", tmp_path, seed=0, cases=5)  # nothing is left to do
    assert campaign.summarise([state], tmp_path / "result.jsonl")
    assert '"cases": 5' in (tmp_path / "result.jsonl").read_text()
    capsys.readouterr()


def test_messages_are_short_and_name_the_file() -> None:
    assert refusal(ValueError("f: no such file"), "f: ") == "refused ValueError: no such file"
    for error in (ValueError(""), ValueError("x" * 3000), ValueError("elsewhere")):
        with pytest.raises(Finding):
            refusal(error, "f: ")


@pytest.mark.slow
def test_the_command_runs_workers_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz.campaign", "--target", "settings", "--jobs", "1"]
    for cases in (20, 30):
        result = subprocess.run(
            [*command, "--cases", str(cases), "--out", str(tmp_path)],
            cwd=campaign.ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        row = next(line for line in result.stdout.splitlines() if line.startswith("settings"))
        assert row.split()[1] == str(cases)
