"""Measure tile configurations of `qlinear` on this GPU: `python bench/tune.py`.

For every GEMM of the models and batch sizes asked for: each candidate must give the reference's
result bit by bit, several times over, before it is timed. The fastest is written to
erq_kernels/tuned/<device>.json, from which `erq_kernels.configs` takes it on this device; the
heuristic's choice stays where nothing is faster by MARGIN. The table is complete after every
problem, so a run that is stopped leaves what it has measured, and the next one goes on from there.

`--smoke` does the same to tiny problems, in Triton's interpreter too: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from shapes import MODELS, Kernel, model_kernels
from torch import Tensor

from erq_kernels import configs, reference
from erq_kernels._triton import INTERPRETED, qlinear
from erq_kernels.configs import GemmConfig, Measurement

# What another configuration must gain over the heuristic's: less is noise.
MARGIN = 0.02
# A race between copies and products shows in some runs only.
CHECKS = 5
# Outlier columns of a layer with two segments.
FIRST = 32
TUNED = Path(configs.__file__).parent / "tuned"


@dataclass(frozen=True)
class Problem:
    """One GEMM.

    Args:
        m, n: rows and columns of the output. k: length of the longer segment.
        dual: whether there is a segment of outliers.
        epilogue: codes, gelu (codes behind it) or residual (half, behind it).
    """

    m: int
    n: int
    k: int
    dual: bool
    epilogue: str

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """What a table distinguishes problems by."""
        return self.m, self.n, self.k, self.dual


def epilogue_of(kernel: Kernel) -> str:
    if kernel.out == "half":
        return "residual"
    return "gelu" if "GELU" in kernel.name else "codes"


def problems_of(models: list[str], batches: list[int]) -> list[Problem]:
    """The GEMMs of the models' passes; behind a LayerNorm with and without outlier columns."""
    found: dict[tuple[int, int, int, bool], Problem] = {}
    for model in models:
        for batch in batches:
            for kernel in model_kernels(model, batch):
                if kernel.kind != "gemm":
                    continue
                epilogue = epilogue_of(kernel)
                for dual in (False,) if epilogue == "residual" else (False, True):
                    problem = Problem(kernel.m, kernel.n, kernel.k, dual, epilogue)
                    found.setdefault(problem.key, problem)
    return list(found.values())


def candidates_of(problem: Problem, arch: int) -> Iterator[GemmConfig]:
    """The heuristic's configuration, then others, without regard to what the device can hold."""
    heuristic = configs.heuristic(*problem.key, arch)
    yield heuristic
    seen = {heuristic}
    rows = (64, 128) if problem.m > 32 else (16, 32)
    kernels = ["pointers"] + ["tma"] * (arch >= 90) + ["gluon"] * (arch == 90)
    for kernel in kernels:
        for block_m in rows:
            for block_n in (32, 64, 128) if problem.m <= 32 else (64, 128):
                for block_k in (64, 128):
                    for num_stages in (2, 3, 4):
                        for num_warps in (4, 8):
                            # wgmma takes 16 rows a warp; smaller tiles leave 8 warps no work.
                            if block_m * block_n < 2048 * num_warps and num_warps > 4:
                                continue
                            if kernel == "gluon" and not 4 <= num_warps <= block_m // 16:
                                continue
                            dots = 2 if kernel == "pointers" and arch != 90 and arch != 100 else 1
                            config = GemmConfig(
                                block_m,
                                block_n,
                                block_k,
                                num_warps=num_warps,
                                num_stages=num_stages,
                                dots=dots,
                                kernel=kernel,
                            )
                            if config not in seen:
                                seen.add(config)
                                yield config


class Workload:
    """Operands of a problem, and calls on them."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        """Random codes of 4 bits, every scale different, and the epilogue's tensors."""
        p = problem
        first = FIRST if p.dual else 0
        k = p.k + first
        self.x = torch.randint(0, 16, (p.m, k), dtype=torch.int8, device=device)
        self.weight = torch.randint(-15, 16, (p.n, k), dtype=torch.int8, device=device)
        spread = 64.0 * k**0.5
        scale = (torch.rand(p.n, device=device) + 0.5) / spread
        self.operands: dict[str, Any] = {
            "scale": scale * 3 if p.dual else scale,
            "scale2": scale if p.dual else None,
            "split": first or k,
            "bias": torch.randn(p.n, device=device),
        }
        codes = {
            "out_inv_scale": torch.rand(p.n, device=device) * 4 + 2,
            "out_zero_point": torch.randint(0, 16, (p.n,), dtype=torch.int32, device=device),
            "out_bits": 4,
        }
        added = {
            "layer_scale": torch.randn(p.n, device=device),
            "residual": torch.randn(p.m, p.n, device=device).half(),
            "out_dtype": torch.float16,
        }
        # Without an activation, whose last bits may differ from torch's: to be equal bit by bit.
        self.exact = codes if p.epilogue != "residual" else added
        self.timed = {"act": "gelu"} | codes if p.epilogue == "gelu" else self.exact

    def launcher(self, epilogue: dict[str, Any], config: GemmConfig) -> tuple[Any, Tensor]:
        """A function that runs the kernel once, and the tensor that it writes."""
        (m, _), n = self.x.shape, self.weight.shape[0]
        dtype = torch.int8 if "out_bits" in epilogue else epilogue["out_dtype"]
        out = torch.empty((m, n), dtype=dtype, device=self.x.device)
        launch = qlinear.plan(
            x=self.x,
            weight=self.weight,
            out=out,
            act=epilogue.get("act", "none"),
            layer_scale=epilogue.get("layer_scale"),
            residual=epilogue.get("residual"),
            out_inv_scale=epilogue.get("out_inv_scale"),
            out_zero_point=epilogue.get("out_zero_point"),
            out_bits=epilogue.get("out_bits", 0),
            config=config,
            **self.operands,
        )
        return launch.run, out

    def expected(self) -> Tensor:
        """The reference's result with the exact epilogue."""
        return reference.qlinear(self.x, self.weight, **self.operands, **self.exact)


def is_right(run: Callable[[], None], out: Tensor, want: Tensor) -> bool:
    """Whether every one of several runs leaves the result, whatever stood there before."""
    for i in range(CHECKS):
        out.fill_(i)
        run()
        if not torch.equal(out, want):
            return False
    return True


def time_of(run: Callable[[], None]) -> float:
    """Median time of a run in µs: on a GPU with a cold second-level cache."""
    if not INTERPRETED:
        median: float = triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")
        return median * 1000
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def measure(
    problem: Problem, candidates: Iterator[GemmConfig], arch: int, device: torch.device
) -> Measurement:
    """The fastest right configuration of a problem.

    Raises:
        RuntimeError: the heuristic's own configuration does not run, or is wrong.
    """
    work = Workload(problem, device)
    want = work.expected()
    timed: Tensor | None = None
    times: dict[GemmConfig, float] = {}
    for config in candidates:
        if not qlinear.can_run(config, work.x, work.weight, work.operands["split"], arch):
            continue
        try:
            right = is_right(*work.launcher(work.exact, config), want)
            run, out = work.launcher(work.timed, config)
            if timed is None:  # the heuristic's: the others must agree behind an activation too
                run()
                timed = out.clone()
            right = right and is_right(run, out, timed)
            microseconds = time_of(run) if right else float("inf")
        except (RuntimeError, triton.TritonError) as error:
            if not times:
                raise RuntimeError(f"{problem}: the heuristic's {config} fails: {error}") from error
            print(f"  {config}: {str(error).splitlines()[0]}")
            continue
        if not right and not times:
            raise RuntimeError(f"{problem}: the heuristic's {config} gives a wrong result")
        if not right:
            print(f"  WRONG {config}", flush=True)
        times[config] = microseconds
    heuristic, usual = next(iter(times.items()))
    best = min(times, key=lambda config: times[config])
    if times[best] > usual * (1 - MARGIN):
        best = heuristic
    print(
        f"{problem}: {times[best]:.1f} µs with {best}, {usual:.1f} µs with the heuristic's, "
        f"{len(times)} configurations",
        flush=True,
    )
    return Measurement(*problem.key, best, round(times[best], 3), round(usual, 3))


def write_table(path: Path, name: str, measured: list[Measurement]) -> None:
    """The table of a device, checked, and put in place at once."""
    table = {
        "version": configs.TABLE_VERSION,
        "device": name,
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "qlinear": [asdict(seen) for seen in measured],
    }
    text = json.dumps(table, indent=1) + "\n"
    configs.parse_table(text, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_table(path: Path) -> list[Measurement]:
    """What an earlier run of this Triton measured."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if json.loads(text).get("triton") != triton.__version__:
        return []
    return list(configs.parse_table(text, str(path))["qlinear"])


def smoke_problems() -> list[Problem]:
    return [
        Problem(19, n, 96, dual, epilogue)
        for dual in (False, True)
        for n, epilogue in ((40, "gelu"), (48, "residual"), (56, "codes"))
    ]


def smoke_candidates(problem: Problem, arch: int) -> Iterator[GemmConfig]:
    yield configs.heuristic(*problem.key, arch)
    yield GemmConfig(64, 64, 64)
    yield GemmConfig(16, 32, 32, kernel="tma")
    yield GemmConfig(64, 64, 64, kernel="gluon")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--batches", default="1,8,64,256", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop then; %(default)s")
    parser.add_argument("--out", type=Path, help="folder of the table; default: the package's")
    parser.add_argument("--smoke", action="store_true", help="tiny problems; needs --out")
    args = parser.parse_args()
    models = args.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    try:
        batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        parser.error(f"--batches takes numbers from 1, by commas, got {args.batches!r}")
    if args.smoke and args.out is None:
        parser.error("--smoke measures nothing that the package may use; name a folder with --out")
    if not torch.cuda.is_available() and not (args.smoke and INTERPRETED):
        parser.error("there is no GPU here; --smoke runs without one under TRITON_INTERPRET=1")
    device = torch.device("cpu" if INTERPRETED else "cuda")
    arch, name = qlinear.describe_device(device)
    path = (args.out or TUNED) / f"{configs.device_slug(name)}.json"
    measured = read_table(path)
    done = {(seen.m, seen.n, seen.k, seen.dual) for seen in measured}
    problems = smoke_problems() if args.smoke else problems_of(models, batches)
    candidates = smoke_candidates if args.smoke else candidates_of
    begin = time.monotonic()
    for i, problem in enumerate(problems):
        if problem.key in done:
            continue
        if time.monotonic() - begin > args.minutes * 60:
            print(f"out of time after {i} of {len(problems)} problems; run it again to go on")
            break
        torch.manual_seed(0)
        measured.append(measure(problem, candidates(problem, arch), arch, device))
        done.add(problem.key)
        write_table(path, name, measured)
    print(f"{len(measured)} problems in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
