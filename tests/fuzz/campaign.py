"""python -m tests.fuzz.campaign: every target for as many cases as asked, resumable.

A case is numbered; its number and the seed decide it, so `--target NAME --case N` runs it again. A
worker process runs the cases of a target one after the other and writes down how far it is; one
that dies, hangs or grows is replaced, and the case it was at is a finding.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 10.0
"""A case that takes longer hangs."""
_SAVE_EVERY = 500
_GROWTH_BYTES = 2 << 30
_KEPT_OUTCOMES = 400


class Hang(BaseException):
    """A case took too long."""


TARGETS = {
    "checkpoint-bytes": "files:CheckpointBytes",
    "checkpoint-headers": "files:CheckpointHeaders",
    "settings": "settings:Settings",
    "command-lines": "settings:CommandLines",
    "pictures": "pictures:Pictures",
    "ops": "tensors:Ops",
    "networks": "tensors:Networks",
}
"""Name of every target → where it is."""


def target_named(name: str) -> Any:
    """The target of that name."""
    module, _, leaf = TARGETS[name].partition(":")
    return getattr(import_module(f"tests.fuzz.{module}"), leaf)()


def case_of(target: Any, seed: int, number: int) -> bytes:
    """Case `number` of a target."""
    made: bytes = target.make(random.Random(f"{target.name} {seed} {number}"))
    return made


def _ring(_: int, __: FrameType | None) -> None:
    raise Hang(f"more than {CASE_SECONDS:g} s")


def place_of(error: BaseException) -> str:
    """Type and innermost frame of erq: findings with the same place are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/erq/" in f.filename or "/erq_kernels/" in f.filename]
    frame = (ours or list(frames))[-1]
    text = " ".join(w for w in str(error).split()[:8] if w.isalpha()) if not ours else ""
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} {text}".strip()


def work(name: str, folder: Path, seed: int, cases: int) -> None:
    """Run the cases of a target that are not done yet; the body of a worker."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")  # nobody should read a library's warnings of a hostile file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    target = target_named(name)
    state_file, at_file = folder / f"{name}.json", folder / f"{name}.at"
    state: dict[str, Any] = {
        "target": name, "seed": seed, "done": 0, "accepted": 0, "refused": 0, "seconds": 0.0,
        "outcomes": {}, "findings": {},
    }  # fmt: skip
    if state_file.exists():
        state = json.loads(state_file.read_text())
        if state["seed"] != seed:
            sys.exit(f"{state_file} is of seed {state['seed']}; name another folder")
    target.make(random.Random(0))  # builds what all cases share
    outcomes: Counter[str] = Counter(state["outcomes"])
    at = os.open(at_file, os.O_RDWR | os.O_CREAT)
    signal.signal(signal.SIGALRM, _ring)
    last = time.monotonic()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + _GROWTH_BYTES

    def keep() -> None:
        nonlocal last
        now = time.monotonic()
        state["seconds"] += now - last
        last = now
        state["outcomes"] = dict(outcomes.most_common(_KEPT_OUTCOMES))
        beside = state_file.with_suffix(".tmp")
        beside.write_text(json.dumps(state, indent=1))
        beside.replace(state_file)

    for number in range(state["done"], cases):
        os.pwrite(at, number.to_bytes(8, "little"), 0)
        case = case_of(target, seed, number)
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        try:
            outcome = target.check(case)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and Hang, too, are findings
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome = "finding"
            note_finding(state, folder, name, number, place_of(error), case, error)
        outcomes[outcome] += 1
        kind = outcome.split(maxsplit=1)[0].rstrip(",")
        state[kind] = state.get(kind, 0) + 1
        state["done"] = number + 1
        if state["done"] % _SAVE_EVERY == 0:
            keep()
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > grown:
                break  # a fresh worker goes on
    keep()


def note_finding(
    state: dict[str, Any], folder: Path, name: str, number: int, place: str, case: bytes,
    error: BaseException | None,
) -> None:  # fmt: skip
    """Count a finding, and keep the case of the first one at its place."""
    found = state["findings"].setdefault(place, {"first": number, "count": 0})
    found["count"] += 1
    if found["count"] == 1:
        stem = folder / f"{name}-{number}"
        stem.with_suffix(".case").write_bytes(case)
        lines = traceback.format_exception(error) if error else [place]
        found["text"] = (str(error) if error else place)[:300]
        stem.with_suffix(".txt").write_text("".join(lines), errors="replace")
        print(f"{name} case {number}: {place}: {found['text'][:120]!r}", flush=True)


def run_target(name: str, folder: Path, seed: int, cases: int) -> dict[str, Any]:
    """Workers for one target, one after the other, until its cases are done."""
    state_file, at_file = folder / f"{name}.json", folder / f"{name}.at"
    command = [sys.executable, "-m", "tests.fuzz.campaign", "--target", name, "--worker"]
    command += ["--seed", str(seed), "--cases", str(cases), "--out", str(folder)]
    while True:
        process = subprocess.Popen(command, cwd=ROOT)
        stuck, seen, since = False, -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            now = _read_at(at_file)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > 120:  # not even a signal gets through
                stuck = True
                process.kill()
                process.wait()
        state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
        done = int(state.get("done", 0))
        if process.returncode == 0 and done >= cases:
            return state
        if process.returncode == 0:
            continue
        if process.returncode > 0:
            raise SystemExit(f"the worker of {name} failed with {process.returncode}")
        number = _read_at(at_file)
        place = "hang" if stuck else f"crash, {signal.Signals(-process.returncode).name}"
        state = {
            "target": name, "seed": seed, "done": 0, "accepted": 0, "refused": 0, "seconds": 0.0,
            "outcomes": {}, "findings": {},
        } | state  # fmt: skip
        # What ran since the state was last written is not counted by outcome, and not run again.
        state["uncounted"] = state.get("uncounted", 0) + number - done + 1
        state["done"] = number + 1
        case = case_of(target_named(name), seed, number)
        note_finding(state, folder, name, number, place, case, None)
        state_file.write_text(json.dumps(state, indent=1))


def _read_at(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[:8], "little") if file.exists() else 0


def summarise(states: list[dict[str, Any]], out: Path | None) -> bool:
    """Print a row per target; whether there are findings. With `out`, JSON lines as well."""
    print(f"{'target':20} {'cases':>8} {'accepted':>9} {'refused':>9} {'refusals':>9} findings")
    for s in states:
        kinds = sum(k.startswith("refused") for k in s["outcomes"])
        counts = f"{s['accepted']:>9,} {s['refused']:>9,} {kinds:>9}"
        print(f"{s['target']:20} {s['done']:>8,} {counts} {len(s['findings'])}")
        for place, found in s["findings"].items():
            print(f"    {found['count']:>7,} × {place}, first in case {found['first']}")
    if out is not None:
        import torch

        where = {"machine": platform.machine(), "torch": torch.__version__}
        rows = [
            {
                "target": s["target"], "seed": s["seed"], "cases": s["done"],
                "accepted": s["accepted"], "refused": s["refused"],
                "kinds_of_refusal": sum(k.startswith("refused") for k in s["outcomes"]),
                "findings": s["findings"], "seconds": round(s["seconds"], 1), **where,
            }
            for s in states
        ]  # fmt: skip
        out.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return any(s["findings"] for s in states)


def guided(name: str, seed: int, cases: int) -> None:
    """Cases that atheris invents by the lines of erq they reach; the first finding ends the run."""
    import atheris

    with atheris.instrument_imports(include=["erq", "erq_kernels"]):
        target = target_named(name)

    class Given(random.Random):
        """Randomness read from the fuzzer's bytes, so that it steers the mutators."""

        given = b""
        at = 0

        def getrandbits(self, k: int, /) -> int:
            n = (k + 7) // 8
            part = self.given[self.at : self.at + n].ljust(n, b"\0")
            self.at += n
            return int.from_bytes(part, "little") & ((1 << k) - 1)

        def random(self) -> float:
            return self.getrandbits(53) / (1 << 53)

    def one(data: bytes) -> None:
        rng = Given(0)
        rng.given = data
        target.check(target.make(rng))

    target.check(case_of(target, seed, 0))
    atheris.Setup([sys.argv[0], f"-runs={cases}", f"-seed={seed + 1}", "-max_len=256"], one)
    atheris.Fuzz()


def main() -> None:
    """The command."""
    faulthandler.enable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--cases", type=int, default=int(os.environ.get("FUZZ_CASES") or 100_000))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("FUZZ_SEED") or 0))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "fuzz", help="state, findings")
    parser.add_argument("--result", type=Path, help="JSON lines with the figures")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, len(TARGETS)))
    parser.add_argument("--case", type=int, help="run this case alone, with its traceback")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.target or list(TARGETS)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.worker:
        return work(names[0], given.out, given.seed, given.cases)
    if given.engine == "atheris":
        return guided(names[0], given.seed, given.cases)
    if given.case is not None:
        target = target_named(names[0])
        case = case_of(target, given.seed, given.case)
        print(case[:2000])
        print(target.check(case))
        return None
    print(f"seed {given.seed}, {given.cases:,} cases a target, state in {given.out}", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        states = list(pool.map(lambda n: run_target(n, given.out, given.seed, given.cases), names))
    if summarise(states, given.result):
        sys.exit(1)


if __name__ == "__main__":
    main()
