"""A deployed model end to end against other engines: `python bench/models.py`.

One run: the engines take turns on every batch size, so that all meet the same machine. Times are
medians with their quarters; ratios are to the first engine that runs. Weights are random, no time
depends on them; the model is quantized with the RepQ stage alone, which gives the same kernels as
ERQ does, in seconds. Engines that cannot run here are named with the reason.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from cases import ResultFile, Spread, device_name
from torch import Tensor, nn

import erq
from erq.deployment.network import set_backend
from erq.engines import EngineError, start
from erq.report import check_plot, plot_timings
from erq.timing import interleave
from erq_kernels import dispatch

GPU_ENGINES = "compile-bf16,torch-bf16,torchao-bf16"
CPU_ENGINES = "torch,compile,torch-bf16,onnxruntime,openvino,torchao"
CALIBRATION_IMAGES = 8


def deployed(model: nn.Module, bits: str, images: Tensor) -> Any:
    """The packed model, on the reference backend."""
    config = erq.QuantConfig.preset(bits, method="repq")
    return erq.deploy(erq.quantize(model, images, config), "reference")


def ours(net: Any, x: Tensor, backends: list[str]) -> dict[str, Callable[[], object]]:
    """A call for each backend; on a GPU in fp16 between blocks, and also as a CUDA graph."""
    calls: dict[str, Callable[[], object]] = {}
    for backend in backends:
        own = copy.deepcopy(net)
        if x.is_cuda:
            own, x = own.half(), x.half()
        try:
            set_backend(own, backend)
        except dispatch.BackendError as error:
            print(f"  erq {backend}: {error}", file=sys.stderr)
            continue
        calls[f"erq {backend}"] = partial(own, x)
        if x.is_cuda:
            channels, height, width = x.shape[1:]
            graphs = erq.CudaGraphs(own, (len(x),), (channels, height, width))
            calls[f"erq {backend} graph"] = partial(graphs, x)
    return calls


def theirs(model: nn.Module, x: Tensor, engines: list[str]) -> dict[str, Callable[[], object]]:
    """A call for each engine that can run here."""
    calls = {}
    for name in engines:
        try:
            calls[name] = start(name, model, x)
        except EngineError as error:
            print(f"  {name}: {error}", file=sys.stderr)
    return calls


def main() -> None:
    """Measure, print a table, write bench/results/<device>/models.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="deit_small_patch16_224", help="timm names by commas")
    parser.add_argument("--batches", default="1,8", help="by commas")
    parser.add_argument("--bits", default="w4a4", help="a preset")
    parser.add_argument("--backends", help="by commas; default: all that can run here")
    parser.add_argument("--engines", help=f"default: {GPU_ENGINES} on a GPU, else {CPU_ENGINES}")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each model and batch")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--name", default="models", help="of the result file")
    parser.add_argument(
        "--plot", type=Path, help=".png or .svg of the only model: latency, throughput by batch"
    )
    parser.add_argument("--resume", action="store_true", help="add to the result file")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no result file")
    args = parser.parse_args()
    try:
        batches = [int(b) for b in args.batches.split(",")]
    except ValueError:
        parser.error(f"--batches takes numbers by commas, got {args.batches!r}")
    models = args.models.split(",")
    if args.plot:
        if len(models) > 1:
            parser.error(f"--plot shows one model, got --models {args.models}")
        try:
            check_plot(args.plot)
        except ValueError as error:
            parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engines = (args.engines or (GPU_ENGINES if device.type == "cuda" else CPU_ENGINES)).split(",")
    backends = args.backends.split(",") if args.backends else list(dispatch.ORDER[:-1])
    size = {"img_size": 32, "depth": 2} if args.smoke else {}
    results = ResultFile(args.name, args.resume, args.smoke)
    print(
        f"{'model':<28}{'batch':>6}  {'engine':<20}{'ms':>9}{'quarters':>20}{'img/s':>9}"
        f"{'ratio':>8}"
    )
    times_of: dict[str, dict[int, float]] = {}
    for name in models:
        torch.manual_seed(0)
        model = timm.create_model(name, **size).eval().to(device)
        shape = (3, *model.patch_embed.img_size)
        begin = time.perf_counter()
        net = deployed(model, args.bits, torch.randn(CALIBRATION_IMAGES, *shape, device=device))
        print(f"  {name}: quantized in {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        for batch in batches:
            x = torch.randn(batch, *shape, device=device)
            with torch.inference_mode():
                calls = theirs(model, x, engines) | ours(net, x, backends)
                times = interleave(calls, device, args.seconds)
            measured = {engine: Spread.of(ms) for engine, ms in times.items()}
            base = next(iter(measured))
            for engine, spread in measured.items():
                times_of.setdefault(engine, {})[batch] = spread.median
                rate, ratio = 1000 * batch / spread.median, measured[base].median / spread.median
                quarters = f"{spread.low:.3f}–{spread.high:.3f}"
                print(
                    f"{name:<28}{batch:>6}  {engine:<20}{spread.median:>9.3f}{quarters:>20}"
                    f"{rate:>9.0f}{ratio:>8.2f}",
                    flush=True,
                )
                results.add(
                    {"model": name, "batch": batch, "bits": args.bits, "engine": engine}
                    | {"ms": spread.median, "low": spread.low, "high": spread.high}
                    | {"rounds": spread.rounds, "images_per_s": round(rate, 1)}
                    | {"baseline": base, "ratio": round(ratio, 3)}
                )
            torch.compiler.reset()
    if args.plot:
        plot_timings(args.plot, f"{models[0]} {args.bits} · {device_name()}", times_of)
    print(f"ratios: first engine / this one; rows in {results.path}")


if __name__ == "__main__":
    main()
