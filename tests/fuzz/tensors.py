"""Tensors given to the public ops and to deployed networks."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import erq
from erq_kernels import formats, ops
from tests.fuzz import mutate
from tests.fuzz.files import networks
from tests.fuzz.target import Target, attempt, require

OPTIONAL = (
    "order", "scale2", "layer_scale", "residual", "out_inv_scale", "out_zero_point", "columns",
    "zero_point2", "w_zero_point2", "p_inv_scale", "bias",
)  # fmt: skip
DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool",
    "complex64", "float8_e4m3fn", "uint16",
)  # fmt: skip
LAYOUTS = ("transposed", "expanded", "strided", "offset", "sparse", "meta", "conj", "grad")
FILLS = (
    float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e38, -1e38, 1e-45, 127.0, -128.0, 255.0,
    2.0**24, 2.0**31,
)  # fmt: skip


def _floats(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def _codes(rng: torch.Generator, bits: int, *shape: int) -> Tensor:
    codes = torch.randint(0, 2**bits, shape, generator=rng)
    return (codes - formats.code_offset(bits)).to(torch.int8)


def _scale(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=rng) + 0.1


def _zeros(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 8, shape, generator=rng, dtype=torch.int32)


def sound_arguments(op: str, seed: int) -> dict[str, Any]:
    """Arguments that an op takes, small ones, by name."""
    pick, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    bits, m, n, k = pick.randint(2, 8), pick.choice((1, 3, 17)), pick.choice((1, 4, 24)), 32
    if op == "quantize":
        columns = pick.choice(((), (k,)))
        return {"x": _floats(rng, m, k), "inv_scale": _scale(rng, *columns),
                "zero_point": _zeros(rng, *columns), "bits": bits, "out_packed": False}  # fmt: skip
    if op == "layer_norm_quantize":
        order = torch.randperm(k, generator=rng) if pick.random() < 0.5 else None
        return {"x": _floats(rng, m, k), "weight": _floats(rng, k), "bias": _floats(rng, k),
                "eps": 1e-6, "inv_scale": _scale(rng), "zero_point": _zeros(rng), "bits": bits,
                "order": order, "out_packed": False}  # fmt: skip
    if op in ("qlinear", "qlinear_packed"):
        dual = pick.random() < 0.4
        width = 2 * k if dual else k
        rest: dict[str, Any] = {
            "scale": _scale(rng, n), "scale2": _scale(rng, n) if dual else None,
            "bias": _floats(rng, n), "act": pick.choice(ops.ACTIVATIONS),
            "layer_scale": pick.choice((None, _scale(rng, n))),
            "residual": pick.choice((None, _floats(rng, m, n))),
            "out_dtype": pick.choice(ops.OUT_DTYPES),
        }  # fmt: skip
        if pick.random() < 0.5:
            rest |= {"out_inv_scale": _scale(rng), "out_zero_point": _zeros(rng), "out_bits": bits}
        x = _codes(rng, bits, m, width)
        if op == "qlinear":
            weight = torch.randint(-8, 8, (n, width), generator=rng, dtype=torch.int8)
            return {"x": x, "weight": weight, "split": k, **rest}
        size = formats.repacked_columns(k + 4 if dual else k, 4 if dual else 0)
        packed = torch.randint(0, 256, (n, size * bits // 8), generator=rng).to(torch.uint8)
        return {"x": x, "packed": packed, "w_bits": bits, "k": k + 4 if dual else k,
                "outliers": 4 if dual else 0, "w_zero_point": _zeros(rng, n),
                "w_zero_point2": _zeros(rng, n) if dual else None, **rest}  # fmt: skip
    if op == "qattention":
        shape = (pick.choice((1, 2)), 2, pick.choice((1, 5)), 8)
        bias = pick.choice((None, _floats(rng, 1, 2, shape[2], shape[2])))
        return {
            "q": _codes(rng, bits, *shape), "k": _codes(rng, bits, *shape),
            "v": _codes(rng, bits, *shape), "q_zero_point": _zeros(rng),
            "k_zero_point": _zeros(rng), "v_zero_point": _zeros(rng),
            "score_scale": _scale(rng) * 0.01, "p_inv_scale": pick.choice((None, _scale(rng))),
            "value_scale": _scale(rng), "qk_bits": bits, "av_bits": bits,
            "zero_last": pick.random() < 0.5, "bias": bias,
        }  # fmt: skip
    if op == "dequant_linear":
        packed = torch.randint(0, 256, (formats.packed_size(n * k, bits),), generator=rng)
        dual_columns = pick.choice((None, torch.tensor([1, 7, 30])))
        two = (None, None) if dual_columns is None else (_scale(rng, n), _zeros(rng, n))
        return {"x": _floats(rng, m, k), "packed": packed.to(torch.uint8), "bits": bits,
                "scale": _scale(rng, n), "zero_point": _zeros(rng, n), "scale2": two[0],
                "zero_point2": two[1], "columns": dual_columns,
                "bias": pick.choice((None, _floats(rng, n)))}  # fmt: skip
    if op == "pack":
        return {"codes": torch.randint(0, 2**bits, (m, k), generator=rng), "bits": bits}
    size = formats.packed_size(n * k, bits)
    packed = torch.randint(0, 256, (size,), generator=rng).to(torch.uint8)
    if op == "unpack":
        return {"packed": packed, "bits": bits, "shape": [n, k]}
    return {"packed": packed, "bits": bits, "k": k, "zero_point": _zeros(rng, n)}


OPS: dict[str, Callable[..., Any]] = {
    name: getattr(ops, name)
    for name in (
        "quantize", "layer_norm_quantize", "qlinear", "qlinear_packed", "qattention",
        "dequant_linear", "pack", "unpack", "repack",
    )
}  # fmt: skip


def changed(tensor: Tensor, edit: str, number: int) -> Tensor:
    """`tensor` after an edit: another dtype, shape, layout, or other values."""
    kind, _, what = edit.partition(":")
    if tensor.layout is not torch.strided or tensor.is_meta:
        return tensor
    if kind == "dtype":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of imaginary parts that are dropped
            return tensor.to(getattr(torch, what))
    if kind == "shape":
        shapes = (
            tensor[None], tensor.reshape(-1), tensor[..., :-1] if tensor.dim() else tensor[None],
            tensor[:0] if tensor.dim() else tensor, torch.stack([tensor, tensor]),
            tensor.reshape(-1)[:1].reshape(()) if tensor.numel() else tensor,
        )  # fmt: skip
        return shapes[number % len(shapes)]
    if kind == "fill" and tensor.numel():
        out = tensor.clone()
        flat = out.reshape(-1)
        where = slice(None) if number % 3 == 0 else number % len(flat)
        value = float(what)
        if not tensor.is_floating_point() and not tensor.is_complex():
            # Zero points stay below 2**24, those of attention below 2**12, as modules check.
            value = 0.0 if value != value else max(min(value, 2.0**24 - 1), 1 - 2.0**24)
            if tensor.dtype != torch.bool:
                limits = torch.iinfo(tensor.dtype)
                value = max(min(int(value), limits.max), limits.min)
        flat[where] = torch.tensor(value, dtype=torch.float64)
        return flat.reshape(tensor.shape)
    return _laid_out(tensor, what) if kind == "layout" else tensor


def _laid_out(tensor: Tensor, what: str) -> Tensor:
    if what == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if what == "expanded" and tensor.dim():
        return tensor[:1].expand(tensor.shape)
    if what == "strided" and tensor.dim():
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if what == "offset":
        return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].reshape(tensor.shape)
    if what == "sparse" and tensor.dim() and tensor.dtype in (torch.float32, torch.int64):
        return tensor.to_sparse()
    if what == "meta":
        return tensor.to("meta")
    if what == "conj":
        return torch.complex(tensor.float(), tensor.float()).conj()
    if what == "grad" and tensor.is_floating_point():
        return tensor.requires_grad_()
    return tensor


class Ops(Target):
    """Public ops on small tensors, one or two of the arguments hostile.

    What the reference refuses, the CPU kernels refuse; what it computes, they compute.
    """

    name = "ops"

    def make(self, rng: random.Random) -> bytes:
        op, seed = rng.choice(list(OPS)), rng.randrange(10_000)
        arguments = sound_arguments(op, seed)
        edits = []
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2))):
            name = rng.choice(list(arguments))
            value = arguments[name]
            if isinstance(value, Tensor) and (name not in OPTIONAL or rng.random() < 0.9):
                kind = rng.randrange(5)
                edit: Any = f"fill:{rng.choice(FILLS)}"
                if kind == 0:
                    edit = f"dtype:{rng.choice(DTYPES)}"
                elif kind == 1:
                    edit = "shape:"
                elif kind == 2:
                    edit = f"layout:{rng.choice(LAYOUTS)}"
                edits.append([name, edit, rng.randrange(1000)])
                if edit == "layout:meta":  # shape functions take what ops have checked
                    edits = edits[-1:]
                    break
            elif type(value) is bool:
                edits.append([name, None, not value])
            elif isinstance(value, int):
                small = [n for n in mutate.INTEGERS if abs(n) < 2**63]
                edits.append([name, None, rng.choice((*small, value + 1, value - 1))])
            elif isinstance(value, float):
                edits.append([name, None, rng.choice(mutate.FLOATS)])
            elif isinstance(value, str):
                edits.append([name, None, rng.choice(mutate.TEXTS[:8] + mutate.TEXTS[-8:])])
            elif isinstance(value, list):
                edits.append([name, None, [rng.choice((-1, 0, 1, 3, 32, 2**31, 2**40))] * 2])
            elif name in OPTIONAL:
                edits.append([name, None, None])
        return json.dumps([op, seed, edits, rng.random() < 0.5]).encode()

    def check(self, case: bytes) -> str:
        op, seed, edits, plain = json.loads(case)
        found = {b: self._run(op, seed, edits, plain, b) for b in ("reference", "cpu")}
        (exact, refused), (fast, slow_refused) = found["reference"], found["cpu"]
        if refused or slow_refused:
            if refused:
                require(slow_refused != "", f"{op}: the CPU kernel takes what is wrong: {refused}")
            return f"{op}: {refused or slow_refused}".replace(f"{op}: refused", f"refused {op}")
        require(exact.dtype == fast.dtype and exact.shape == fast.shape, f"{op}: another shape")
        # Codes beyond the width that they are said to have may come to any number.
        loose = ("qk_bits", "av_bits", "q", "k", "v")
        misnamed = op == "qattention" and any(e[0] in loose for e in edits)
        # Nor is a parameter looked at on every call: modules check theirs when they are made.
        not_finite = ("fill:nan", "fill:inf", "fill:-inf")
        misnamed |= any(e[1] in not_finite and e[0] not in ("x", "residual") for e in edits)
        if not exact.is_meta and not misnamed:
            fills = [e[1].removeprefix("fill:") for e in edits if str(e[1]).startswith("fill:")]
            _compare(op, exact, fast, [float(f) for f in fills])
        return f"accepted {op}"

    def _run(
        self, op: str, seed: int, edits: list[Any], plain: bool, backend: str
    ) -> tuple[Any, str]:
        arguments = sound_arguments(op, seed)
        for name, edit, number in edits:
            value = arguments[name]
            if edit is None:
                arguments[name] = number
            elif isinstance(value, Tensor):
                arguments[name] = changed(value, edit, number)
                is_wide = op == "qattention" and arguments[name].dtype == torch.int32
                if is_wide:
                    arguments[name] = arguments[name].clamp(-4095, 4095)
        with torch.set_grad_enabled(not plain):
            return attempt(
                lambda: OPS[op](**arguments, backend=backend), ValueError, erq.BackendError
            )


def _compare(op: str, exact: Tensor, fast: Tensor, fills: list[float]) -> None:
    """Raise unless two results are one: codes but for rounding, floats to fp32's accuracy.

    Args:
        fills: what was written into arguments.
    """
    if any(1e30 < abs(f) < float("inf") for f in fills) and op not in ("pack", "unpack", "repack"):
        return  # sums that overflow do so in one order and not in another
    a, b = exact.detach().double(), fast.detach().double()
    if exact.dtype.is_floating_point:
        require(torch.equal(a.isfinite(), b.isfinite()), f"{op}: finite at other places")
        a, b = (t.where(a.isfinite(), 0.0) for t in (a, b))
        room = 2e-2 if exact.dtype != torch.float32 else 1e-3
        scale = float(a.abs().max()) if a.numel() else 1.0
        # Codes of the softmax that round the other way move a value by a step.
        room = 0.6 if op == "qattention" else room
        worst = float((a - b).abs().max()) if a.numel() else 0.0
        require(worst <= room * max(scale, 1.0), f"{op}: results differ by {worst}")
    elif op in ("pack", "unpack", "repack"):
        require(torch.equal(exact, fast), f"{op}: other integers")
    elif not fills:
        flips = float((a != b).double().mean()) if a.numel() else 0.0
        require(flips <= 0.2 or a.numel() < 20, f"{op}: {flips:.0%} of codes differ")


class Networks(Target):
    """Deployed networks, and their layers, on hostile images: an error, NaN, or right logits."""

    name = "networks"

    def make(self, rng: random.Random) -> bytes:
        edits = []
        for _ in range(rng.choice((0, 1, 1, 2))):
            kind = rng.randrange(5)
            edit = f"fill:{rng.choice(FILLS)}"
            if kind == 0:
                edit = f"dtype:{rng.choice(DTYPES)}"
            elif kind == 1:
                edit = "shape:"
            elif kind == 2:
                edit = f"layout:{rng.choice(LAYOUTS)}"
            edits.append([edit, rng.randrange(100_000)])
        entry = rng.choice(("net", "net", "net", "layer", "evaluate"))
        which = rng.choice(("vit", "vit", "vit", "mixed", "mixed", "swin"))
        return json.dumps([which, entry, rng.randrange(1000), edits, rng.random() < 0.7]).encode()

    def check(self, case: bytes) -> str:
        which, entry, seed, edits, plain = json.loads(case)
        net = networks()[which]
        size = 16 if which == "swin" else 8
        generator = torch.Generator().manual_seed(seed)
        layer = _first_layer(net)
        shape = (2, 3, size, size) if entry != "layer" else (2, 5, layer.in_features)
        x = torch.randn(shape, generator=generator)
        sound = x
        for edit, number in edits:
            x = changed(x, edit, number)
        run = {
            "net": lambda: net(x),
            "layer": lambda: layer(x),
            "evaluate": lambda: erq.evaluate(net, [x]),
        }[entry]
        with torch.set_grad_enabled(not plain):
            y, refused = attempt(run, ValueError, erq.BackendError)
        if refused:
            return refused
        values = x.detach()
        finite = bool(torch.isfinite(values.double()).all())
        if entry == "evaluate":
            require(finite, "evaluate measured images that are not finite")
            return "accepted evaluate"
        rows = torch.isfinite(values.double()).flatten(1).all(dim=1)
        if entry == "layer":
            rows = torch.isfinite(values.double()).all(dim=-1)
        bad = y[~rows]
        require(bool(bad.isnan().all()), f"{entry}: a plausible answer to what is not finite")
        if x.shape == sound.shape and x.dtype == sound.dtype:
            same = (values == sound).reshape((*rows.shape, -1)).all(dim=-1)
            with torch.no_grad():
                expected = (layer if entry == "layer" else net)(sound)
            require(torch.equal(y[same], expected[same]), f"{entry}: another answer")
        return f"accepted {entry}{'' if finite else ', NaN'}"


def _first_layer(net: Any) -> Any:
    layers = [m for m in net.modules() if isinstance(m, erq.QuantLinear)]
    return next(m for m in layers if m.x_scale is not None and type(m) is erq.QuantLinear)
