"""The LayerNorm that writes codes, of every backend against the reference.

The statistics are sums, which no two implementations round alike, so a code whose value lies on a
rounding boundary may differ: by one, and rarely.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from erq_kernels import formats, ops, reference
from erq_kernels._triton import layer_norm_quantize

EPS = 1e-6


def make_args(
    m: int,
    k: int,
    bits: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    per_column: bool = False,
    outliers: int = 0,
) -> dict[str, Any]:
    """Arguments of the op: rows with means and widths all different, scales all different."""
    x = torch.randn(m, k) * (torch.rand(m, 1) * 4 + 0.1) + torch.randn(m, 1) * 3
    shape = (k,) if per_column else ()
    order = None
    if outliers:
        order, _, _ = formats.k_order(torch.randperm(k)[:outliers].sort().values, k)
    args = {
        "x": x.to(dtype),
        "weight": torch.rand(k) * 2 + 0.1,
        "bias": torch.randn(k),
        "eps": EPS,
        "inv_scale": (torch.rand(shape) + 0.5) * 2**bits / 6,
        "zero_point": torch.randint(-4, 2**bits + 4, shape, dtype=torch.int32),
        "bits": bits,
        "order": order,
    }
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in args.items()}


def distance_to_boundary(args: dict[str, Any]) -> Tensor:
    """How far from a rounding boundary each exact value lies, in steps of the code."""
    x = args["x"].double()
    k = x.shape[1]
    y = F.layer_norm(x, (k,), args["weight"].double(), args["bias"].double(), EPS)
    y = y * args["inv_scale"].double()
    distance = (y - y.floor() - 0.5).abs()
    return distance if args["order"] is None else distance[:, args["order"]]


def check(args: dict[str, Any]) -> None:
    """Codes equal the reference's, but for values within fp32's error of a boundary."""
    got = ops.layer_norm_quantize(**args)
    want = reference.layer_norm_quantize(**args)
    assert got.shape == want.shape and got.dtype == torch.int8 and got.is_contiguous()
    different = got != want
    assert bool(((got.int() - want.int()).abs() <= 1).all())
    assert bool((distance_to_boundary(args)[different] < 2e-6 * 2 ** args["bits"]).all())
    assert torch.equal(ops.layer_norm_quantize(**args), got)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("outliers", [0, 9])
def test_codes_equal_the_reference(
    bits: int, outliers: int, device: torch.device, poison: None
) -> None:
    check(make_args(3, 67, bits, device, outliers=outliers))


@pytest.mark.parametrize("bits", [4, 8])
def test_few_codes_of_many_differ(bits: int, device: torch.device) -> None:
    args = make_args(26, 4000, bits, device, outliers=300)
    got = ops.layer_norm_quantize(**args)
    want = reference.layer_norm_quantize(**args)
    assert got.numel() > 1e5
    assert int((got.int() - want.int()).abs().max()) <= 1
    assert int((got != want).sum()) < 1e-4 * got.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_column", [False, True])
def test_half_precision_and_quantizers_per_column(
    dtype: torch.dtype, per_column: bool, device: torch.device, poison: None
) -> None:
    for outliers in (0, 30):
        check(make_args(4, 132, 6, device, dtype=dtype, per_column=per_column, outliers=outliers))


@pytest.mark.parametrize("k", [1, 2, 31, 128, 1000, 4096])
def test_row_lengths(k: int, device: torch.device, poison: None) -> None:
    check(make_args(1, k, 4, device))
    if k > 1:
        check(make_args(2, k, 4, device, outliers=max(1, k // 10)))


@pytest.mark.parametrize(("m", "programs"), [(0, 1), (1, 1), (2, 1), (9, 1), (33, 1), (7, 256)])
def test_row_counts(
    m: int,
    programs: int,
    triton_device: torch.device,
    poison: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One row in each program, or several, of which the last program has fewer.
    monkeypatch.setattr(layer_norm_quantize, "_PROGRAMS", programs)
    check(make_args(m, 33, 4, triton_device, outliers=3))


def test_padding_repeats_the_channel_that_the_order_names(device: torch.device) -> None:
    args = make_args(2, 40, 4, device, outliers=3)
    got = ops.layer_norm_quantize(**args)
    natural = ops.layer_norm_quantize(**{**args, "order": None})
    assert got.shape[1] == 96
    assert torch.equal(got, natural[:, args["order"]])


def test_rows_may_have_gaps_and_columns_a_stride(device: torch.device) -> None:
    args = make_args(6, 80, 4, device, outliers=5)
    wide = torch.full((6, 200), torch.nan, device=device)
    for view in (wide[:, 7:87], wide[:, ::2][:, :80]):
        view.copy_(args["x"])
        check({**args, "x": view})


def test_constant_and_enormous_rows(device: torch.device) -> None:
    args = make_args(4, 24, 4, device, outliers=2)
    args["x"][0] = 0.0
    args["x"][1] = 7.5  # variance 0, so the codes are those of the bias
    args["x"][2] = torch.linspace(-1e18, 1e18, 24)
    args["x"][3] *= 1e-20
    check(args)


def test_rows_too_long_are_refused_with_the_reason(triton_device: torch.device) -> None:
    args = make_args(1, 16385, 4, triton_device)
    with pytest.raises(RuntimeError, match="must not be longer than 16384, got 16385"):
        ops.layer_norm_quantize(**args)
