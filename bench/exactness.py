"""Every kernel against the reference at the shapes of real models: `python bench/exactness.py`.

Random and extreme inputs, on the device at hand, for every backend that can run there. Where no
activation, norm or softmax stands before the result, it has to be equal bit by bit. Behind one, a
code may differ by one, fewer than FLIPS of them: those whose value lies on a rounding boundary.
Exits 1 where it is otherwise. `--smoke`: shapes that Triton's interpreter does in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import versions
from shapes import Kernel, model_kernels
from torch import Tensor

from erq_kernels import dispatch, formats, ops

FLIPS = 1e-4


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        args: of the op, without the backend. exact: whether the result must be equal.
    """

    name: str
    op: str
    args: dict[str, Any]
    exact: bool


def codes(shape: tuple[int, ...], bits: int, fill: str, device: torch.device) -> Tensor:
    """Stored codes: random ones, or all of them the lowest or the highest."""
    offset = formats.code_offset(bits)
    if fill == "random":
        drawn = torch.randint(0, 2**bits, shape, device=device, dtype=torch.int16)
    else:
        drawn = torch.full(shape, 0 if fill == "low" else 2**bits - 1, device=device)
    return (drawn - offset).to(torch.int8)


def quantizer(bits: int, columns: int | None, spread: float, device: torch.device) -> Any:
    """An output quantizer for values of that spread, per tensor or per column."""
    shape = () if columns is None else (columns,)
    scale = (torch.rand(shape, device=device) + 0.5) * 4 * spread / 2**bits
    zero_point = torch.randint(0, 2**bits, shape, device=device, dtype=torch.int32)
    return {"out_inv_scale": 1 / scale, "out_zero_point": zero_point, "out_bits": bits}


def gemm_cases(kernel: Kernel, bits: int, fill: str, device: torch.device) -> Iterator[Case]:
    """A GEMM with one and two segments, and every epilogue that a block has."""
    m, n, k = kernel.m, kernel.n, kernel.k
    for dual in (False, True):
        first = 32 if dual else 0
        columns = k + first
        low = -(2 ** (bits - 1))
        weight = torch.randint(low, -low, (n, columns), device=device, dtype=torch.int8)
        if fill != "random":
            weight.fill_(low if fill == "low" else -low - 1)
        spread = 2.0**bits * 2.0 ** (bits - 1) * columns**0.5
        scale = (torch.rand(n, device=device) + 0.5) / spread
        args: dict[str, Any] = {
            "x": codes((m, columns), bits, fill, device),
            "weight": weight,
            "scale": scale * 7 if dual else scale,
            "scale2": scale if dual else None,
            "split": first or columns,
            "bias": torch.randn(n, device=device),
        }
        name = f"{kernel.name} {m}×{n}×{columns}{' dual' if dual else ''} {bits} bits {fill}"
        residual = torch.randn(m, n, device=device).half()
        gamma = torch.rand(n, device=device)
        for epilogue, extra, exact in (
            ("to fp32", {}, True),
            (
                "LayerScale, residual, to half",
                {"layer_scale": gamma, "residual": residual, "out_dtype": torch.float16},
                True,
            ),
            ("codes by column", quantizer(bits, n, 2.0, device), True),
            ("GELU, codes", {"act": "gelu", **quantizer(bits, None, 1.0, device)}, False),
            ("tanh GELU, codes", {"act": "gelu_tanh", **quantizer(bits, None, 1.0, device)}, False),
        ):
            yield Case(f"{name}: {epilogue}", "qlinear", args | extra, exact)
            packed = formats.pack_weight(weight, args["split"]) if bits <= 4 else None
            if packed is not None:
                operands = {"x": formats.pack_nibbles(args["x"]), "weight": packed[0]}
                form = {
                    "weight_offset": packed[1],
                    "out_packed": "out_bits" in extra and n % 2 == 0,
                }
                yield Case(
                    f"{name} packed: {epilogue}", "qlinear", args | extra | operands | form, exact
                )


def norm_cases(kernel: Kernel, bits: int, fill: str, device: torch.device) -> Iterator[Case]:
    """LayerNorm and quantize in an order with a segment of outliers."""
    m, k = kernel.m, kernel.k
    order, _, _ = formats.k_order(torch.arange(3, k, 97)[:32], k)
    x = torch.randn(m, k, device=device)
    if fill != "random":
        x = x * (1e-4 if fill == "low" else 1e4)
    scale = 8.0 / 2**bits
    yield Case(
        f"{kernel.name} {m}×{k} {bits} bits {fill}",
        "layer_norm_quantize",
        {
            "x": x.half() if fill == "random" else x,
            "weight": torch.rand(k, device=device) + 0.5,
            "bias": torch.randn(k, device=device),
            "eps": 1e-6,
            "inv_scale": torch.tensor(1 / scale, device=device),
            "zero_point": torch.tensor(2 ** (bits - 1), dtype=torch.int32, device=device),
            "bits": bits,
            "order": None if order is None else order.to(device),
        },
        False,
    )
    yield Case(
        f"quantize {m}×{k} {bits} bits {fill}",
        "quantize",
        {
            "x": x.half(),
            "inv_scale": torch.tensor(1 / scale, device=device),
            "zero_point": torch.tensor(3, dtype=torch.int32, device=device),
            "bits": bits,
        },
        True,
    )


def attention_cases(kernel: Kernel, bits: int, fill: str, device: torch.device) -> Iterator[Case]:
    """Attention with log-√2 codes, codes out."""
    b, h, t, d = kernel.windows, kernel.heads, kernel.tokens, kernel.head_dim
    q, k, v = codes((b, t, 3, h, d), bits, fill, device).permute(2, 0, 3, 1, 4).unbind(0)
    middle = torch.tensor(2 ** (bits - 1), dtype=torch.int32, device=device)

    def number(value: float) -> Tensor:
        return torch.tensor(value, device=device)

    args: dict[str, Any] = {
        "q": q, "k": k, "v": v,
        "q_zero_point": middle, "k_zero_point": middle, "v_zero_point": middle,
        "score_scale": number(12 / 4.0**bits / d**0.5), "p_inv_scale": number(1 / 0.8),
        "value_scale": number(0.8 / 2**bits), "qk_bits": bits, "av_bits": bits,
    }  # fmt: skip
    bias = torch.randn(h, t, t, device=device)
    for what, extra in (("codes", {}), ("with a bias, codes", {"bias": bias})):
        yield Case(
            f"attention {b}×{h}×{t}×{d} {bits} bits {fill}: {what}",
            "qattention",
            args | extra | quantizer(bits, None, 0.3, device),
            False,
        )


def weight_cases(bits: int, m: int, device: torch.device) -> Iterator[Case]:
    """What is made of packed weights: products on them, pack, unpack, repack."""
    n, k = 384, 768
    drawn = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device)
    packed = formats.pack(drawn, bits)
    columns = torch.arange(5, k, 101, device=device)
    zeros = torch.randint(0, 2**bits, (2, n), dtype=torch.int32, device=device)
    zero, zero2 = zeros.clamp(2**bits - 128, 128)  # code − zero point fits int8
    scale, scale2 = torch.rand(2, n, device=device) / 2**bits
    shared = {"packed": packed, "bits": bits, "zero_point": zero, "zero_point2": zero2}
    yield Case(
        f"dequant_linear {m}×{n}×{k} {bits} bits",
        "dequant_linear",
        shared
        | {"x": torch.randn(m, k, device=device).half(), "scale": scale, "scale2": scale2}
        | {"columns": columns, "bias": torch.randn(n, device=device)},
        False,
    )
    outliers = columns.numel()
    yield Case(
        f"qlinear_packed {m}×{n}×{k} {bits} bits",
        "qlinear_packed",
        {
            "x": codes((m, formats.repacked_columns(k, outliers)), 4, "random", device),
            "packed": formats.order_packed(packed, bits, n, k, columns),
            "w_bits": bits, "k": k, "outliers": outliers,
            "w_zero_point": zero2, "w_zero_point2": zero,
            "scale": scale2 / k, "scale2": scale / k, "bias": torch.randn(n, device=device),
        },
        True,
    )  # fmt: skip
    yield Case(f"pack {bits} bits", "pack", {"codes": drawn, "bits": bits}, True)
    shape = {"packed": packed, "bits": bits, "shape": (n, k)}
    yield Case(f"unpack {bits} bits", "unpack", shape, True)
    yield Case(f"repack {bits} bits", "repack", shared | {"k": k, "columns": columns}, True)


CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "gemm": gemm_cases,
    "layer_norm": norm_cases,
    "attention": attention_cases,
}


def all_cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Every kernel of DeiT-S and ViT-B at two batch sizes, and Swin's windows."""
    chosen = [(m, b) for m in ("deit_small", "deit_base", "swin_tiny") for b in (1, 8)]
    seen = set()
    for model, batch in chosen[:1] if smoke else chosen:
        for kernel in model_kernels(model, batch):
            if smoke:
                kernel = Kernel(
                    kernel.name, kernel.kind, m=19, n=32, k=64,
                    windows=1, heads=1, tokens=19, head_dim=32,
                )  # fmt: skip
            same = (kernel.kind, kernel.m, kernel.n, kernel.k, kernel.windows)
            if same in seen:
                continue
            seen.add(same)
            # Every width is another kernel to compile: all of them for the first model alone.
            for bits in (4, 3, 8) if model == chosen[0][0] and not smoke else (4,):
                for fill in ("random", "low", "high"):
                    yield from CASES[kernel.kind](kernel, bits, fill, device)
    for bits in (3, 4) if smoke else range(2, 9):
        for m in (1,) if smoke else (1, 16, 197, 1576):
            yield from weight_cases(bits, m, device)


def compare(case: Case, got: Tensor, want: Tensor) -> dict[str, Any]:
    """What differs, and whether it may."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return {"ok": False, "what": f"{got.dtype} {list(got.shape)} for {list(want.shape)}"}
    if case.exact:
        return {"ok": torch.equal(got, want), "differ": int((got != want).sum())}
    if not got.is_floating_point():
        if got.dtype == torch.uint8:  # two codes a byte
            got, want = (torch.stack([t & 15, t >> 4]) for t in (got, want))
        moved = (got.int() - want.int()).abs()
        share, most = float((moved > 0).float().mean()), int(moved.max()) if moved.numel() else 0
        # One code of few is more than its share.
        ok = most <= 1 and (share <= FLIPS or int((moved > 0).sum()) <= 2)
        return {"ok": ok, "flips": share, "most": most}
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return {"ok": error < 1e-3, "error": error}


def main() -> int:
    """One line per backend and case; 1 if a result is not what it may be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--backend", help="this one alone; default: all that can run here")
    parser.add_argument("--out", type=Path, help="write JSON lines there")
    parser.add_argument("--seconds", type=float, help="stop after that time, and say so")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    lines, failed, count, left = [], 0, 0, 0
    refused: dict[str, str] = {}
    begin = time.monotonic()
    for case in all_cases(args.smoke, device):
        if args.seconds and time.monotonic() - begin > args.seconds:
            left += 1
            continue
        want = getattr(ops, case.op)(**case.args, backend="reference")
        for backend in [args.backend] if args.backend else dispatch.ORDER[:-1]:
            try:
                got = getattr(ops, case.op)(**case.args, backend=backend)
            except dispatch.BackendError as error:
                refused[backend] = str(error)
                continue
            found = compare(case, got, want)
            again = getattr(ops, case.op)(**case.args, backend=backend)
            found["ok"] = found["ok"] and torch.equal(got, again)
            count += 1
            failed += not found["ok"]
            lines.append({"case": case.name, "op": case.op, "backend": backend, **found})
            if not found["ok"]:
                print("WRONG", json.dumps(lines[-1], ensure_ascii=False), flush=True)
    if not count:
        why = "; ".join(refused.values())
        parser.error(f"no backend but the reference ran: {why or 'no case was tried'}")
    backends = ", ".join(sorted({line["backend"] for line in lines}))
    rest = f"; {left} cases left out, the time was up" if left else ""
    print(f"{count - failed} of {count} results as they must be ({backends} on {device}){rest}")
    if args.out:
        rows = (json.dumps(line | versions(), ensure_ascii=False, sort_keys=True) for line in lines)
        args.out.write_text("\n".join(rows) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
