"""Each kernel of a pass against the library's own: `python bench/kernels.py`.

For every shape of the chosen models: our op on each backend that can run here, and beside it, in
the same run and in turns, what a float or 8-bit model would call instead. Ratios are to the first
of these, bf16 on a GPU and fp32 on a CPU: above 1, ours is faster. On a GPU the L2 is flushed
between calls. `--smoke`: tiny shapes, to see that all of it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import ResultFile, Spread
from exactness import codes, quantizer
from shapes import MODELS, Kernel, model_kernels

from erq.timing import interleave
from erq_kernels import dispatch, formats, ops

Calls = dict[str, Callable[[], object]]


def gemm_calls(kernel: Kernel, bits: int, device: torch.device) -> tuple[Calls, Calls]:
    """(ours, theirs) for a GEMM with the epilogue that it has in a block."""
    m, n, k = kernel.m, kernel.n, kernel.k
    real = torch.bfloat16 if device.type == "cuda" else torch.float32
    # qkv and fc1 stand behind a norm: an outlier segment of 32 columns comes first.
    first = 32 if kernel.out == "codes" else 0
    epilogue: dict[str, Any] = {"out_dtype": real}
    if kernel.out == "codes":
        epilogue = quantizer(bits, None, 1.0, device)
    if kernel.residual:
        epilogue["residual"] = torch.randn(m, n, device=device, dtype=real)
    if "GELU" in kernel.name:
        epilogue["act"] = "gelu"
    scale = torch.rand(n, device=device) / k
    args = {
        "x": codes((m, k + first), bits, "random", device),
        "weight": torch.randint(-8, 8, (n, k + first), device=device, dtype=torch.int8),
        "scale": scale,
        "scale2": scale if first else None,
        "split": first or k,
        "bias": torch.randn(n, device=device),
    }
    ours = {
        f"erq {backend}": partial(ops.qlinear, **args, **epilogue, backend=backend)
        for backend in usable("qlinear", *args.values())
    }
    x, w = torch.randn(m, k, device=device, dtype=real), torch.randn(n, k, device=device).to(real)
    bias = torch.randn(n, device=device, dtype=real)
    name = str(real).removeprefix("torch.")
    theirs: Calls = {f"{name} linear": partial(F.linear, x, w, bias)}
    x8, w8 = args["x"][:, :k].contiguous(), args["weight"][:, :k].contiguous()
    if device.type == "cpu" or m > 16:
        theirs["int8 _int_mm"] = partial(torch._int_mm, x8, w8.t())
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        f8 = torch.float8_e4m3fn
        one = torch.ones((), device=device)
        theirs["fp8 _scaled_mm"] = partial(
            torch._scaled_mm, x.to(f8), w.to(f8).t(), scale_a=one, scale_b=one, out_dtype=real
        )
    return ours, theirs


def norm_calls(kernel: Kernel, bits: int, device: torch.device) -> tuple[Calls, Calls]:
    """(ours, theirs) for a LayerNorm whose output is quantized."""
    m, k = kernel.m, kernel.k
    real = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(m, k, device=device, dtype=real)
    weight, bias = torch.ones(k, device=device), torch.zeros(k, device=device)
    order, _, _ = formats.k_order(torch.arange(0, k, 97)[:32], k)
    inv_scale = torch.tensor(2.0, device=device)
    zero_point = torch.tensor(8, dtype=torch.int32, device=device)
    args = (x, weight, bias, 1e-6, inv_scale, zero_point, bits, order.to(device))  # type: ignore[union-attr]
    ours: Calls = {
        f"erq {backend}": partial(ops.layer_norm_quantize, *args, backend=backend)
        for backend in usable("layer_norm_quantize", *args)
    }
    w, b = weight.to(real), bias.to(real)
    name = str(real).removeprefix("torch.")
    return ours, {f"{name} layer_norm": partial(F.layer_norm, x, (k,), w, b, 1e-6)}


def attention_calls(kernel: Kernel, bits: int, device: torch.device) -> tuple[Calls, Calls]:
    """(ours, theirs) for attention on codes, codes out."""
    b, h, t, d = kernel.windows, kernel.heads, kernel.tokens, kernel.head_dim
    real = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = codes((b, t, 3, h, d), bits, "random", device).permute(2, 0, 3, 1, 4).unbind(0)
    middle = torch.tensor(8, dtype=torch.int32, device=device)
    numbers = [torch.tensor(v, device=device) for v in (0.02, 1.25, 0.05)]
    args = (*heads, middle, middle, middle, *numbers, bits, bits)
    epilogue = quantizer(bits, None, 0.3, device)
    ours: Calls = {
        f"erq {backend}": partial(ops.qattention, *args, **epilogue, backend=backend)
        for backend in usable("qattention", *args)
    }
    q, k, v = torch.randn(b, t, 3, h, d, device=device).to(real).permute(2, 0, 3, 1, 4).unbind(0)
    name = str(real).removeprefix("torch.")
    return ours, {f"{name} sdpa": partial(F.scaled_dot_product_attention, q, k, v)}


def weight_only_calls(m: int, n: int, k: int, device: torch.device) -> tuple[Calls, Calls]:
    """(ours, theirs) for a W4A16 layer."""
    real = torch.bfloat16 if device.type == "cuda" else torch.float32
    packed = formats.pack(torch.randint(0, 16, (n, k)), 4).to(device)
    x = torch.randn(m, k, device=device, dtype=real)
    zero = torch.full((n,), 8, dtype=torch.int32, device=device)
    args = (x, packed, 4, torch.rand(n, device=device), zero)
    ours: Calls = {
        f"erq {backend} W4A16": partial(ops.dequant_linear, *args, backend=backend)
        for backend in usable("dequant_linear", *args)
    }
    w = torch.randn(n, k, device=device, dtype=real)
    return ours, {f"{str(real).removeprefix('torch.')} linear": partial(F.linear, x, w)}


def usable(op: str, *args: Any) -> list[str]:
    """The backends that can run a call; the reference only where nothing else can."""
    found = [b for b, reason in dispatch.explain(op, *args).items() if reason == "usable"]
    return found[:-1] or found


CALLS: dict[str, Callable[[Kernel, int, torch.device], tuple[Calls, Calls]]] = {
    "gemm": gemm_calls,
    "layer_norm": norm_calls,
    "attention": attention_calls,
}


def shape_of(kernel: Kernel) -> str:
    """M×N×K of a GEMM, M×C of a norm, windows×heads×tokens×head_dim of an attention."""
    if kernel.kind == "attention":
        sizes: tuple[int, ...] = (kernel.windows, kernel.heads, kernel.tokens, kernel.head_dim)
    else:
        sizes = (kernel.m, kernel.n) + ((kernel.k,) if kernel.kind == "gemm" else ())
    return "×".join(map(str, sizes))


def main() -> None:
    """Measure, print a table, append JSON lines to bench/results/<device>/kernels.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default="deit_small,deit_base", help="by commas: " + ", ".join(MODELS)
    )
    parser.add_argument("--batches", default="1,8,64,256", help="by commas")
    parser.add_argument("--bits", type=int, default=4, help="of codes")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each shape")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round's worth")
    args = parser.parse_args()
    models = args.models.split(",")
    for model in models:
        if model not in MODELS:
            parser.error(f"unknown model {model!r}; choose from {', '.join(MODELS)}")
    try:
        batches = [int(b) for b in args.batches.split(",")]
    except ValueError:
        parser.error(f"--batches takes numbers by commas, got {args.batches!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.smoke:
        small = {"m": 20, "n": 32, "k": 64, "windows": 1, "heads": 1, "tokens": 19, "head_dim": 32}
        kinds = {"qkv": "gemm", "norm1": "layer_norm", "attention": "attention"}
        kernels = [Kernel(name, kind, **small) for name, kind in kinds.items()]
        weight_only: list[tuple[int, int, int]] = [(1, 32, 64)]
    else:
        everything = [k for m in models for b in batches for k in model_kernels(m, b)]
        kernels = list({(k.kind, shape_of(k), k.out): k for k in everything}.values())
        weight_only = [(m, 768, 768) for m in (1, 16, 64, 197)]
    results = ResultFile("kernels", smoke=args.smoke)
    print(f"{'kernel':<52}{'way':<18}{'ms':>9}{'quarters':>20}{'ratio':>8}")
    work: list[tuple[str, str, Callable[[], tuple[Calls, Calls]]]] = [
        (k.name, shape_of(k), partial(CALLS[k.kind], k, args.bits, device)) for k in kernels
    ] + [
        ("weight only", f"{m}×{n}×{k}", partial(weight_only_calls, m, n, k, device))
        for m, n, k in weight_only
    ]  # fmt: skip
    with torch.inference_mode():
        for name, shape, make in work:
            if args.only not in name:
                continue
            ours, theirs = make()
            times = interleave(theirs | ours, device, args.seconds, cold=True)
            measured = {way: Spread.of(ms) for way, ms in times.items()}
            base_name = next(iter(theirs))
            base = measured[base_name].median
            for way, spread in measured.items():
                report(f"{name} {shape}", way, spread, base, way == base_name)
                results.add(
                    {"kernel": name, "shape": shape, "bits": args.bits, "way": way}
                    | {"ms": spread.median, "low": spread.low, "high": spread.high}
                    | {"baseline": base_name, "ratio": round(base / spread.median, 3)}
                )
    print(f"ratios: baseline of the same kernel / this way; rows in {results.path}")


def report(what: str, way: str, spread: Spread, base: float, is_baseline: bool) -> None:
    """One row of the table."""
    quarters, ratio = f"{spread.low:.4f}–{spread.high:.4f}", base / spread.median
    print(
        f"{what:<52}{way:<18}{spread.median:>9.4f}{quarters:>20}{ratio:>8.2f}"
        + ("  baseline" if is_baseline else "")
    )


if __name__ == "__main__":
    main()
