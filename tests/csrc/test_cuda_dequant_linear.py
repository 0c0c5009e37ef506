"""The real source of the weight-only CUDA kernel, emulated on the host, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import Emulation
from torch import Tensor

from erq_kernels import explain, ops, reference
from erq_kernels.formats import pack

Call = dict[str, Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def build(
    m: int, n: int, k: int, bits: int, dtype: torch.dtype = torch.float32, outliers: int = 0
) -> Call:
    """Random operands whose code − zero_point fits int8, all scales different."""
    zero_point = torch.randint(0, 2**bits, (n,), dtype=torch.int32)
    if bits == 8:
        zero_point.fill_(128)
    return {
        "x": torch.randn(m, k).to(dtype),
        "packed": pack(torch.randint(0, 2**bits, (n, k)), bits),
        "bits": bits,
        "scale": torch.rand(n) + 0.1,
        "zero_point": zero_point,
        "scale2": torch.rand(n) * 8 + 1 if outliers else None,
        "zero_point2": zero_point.flip(0).contiguous() if outliers else None,
        "columns": torch.randperm(k)[:outliers].sort().values if outliers else None,
        "bias": torch.randn(n),
    }


def weight(call: Call) -> Tensor:
    return reference.dequantize_weight(
        call["packed"], call["bits"], (len(call["scale"]), call["x"].shape[1]), call["scale"],
        call["zero_point"], call["scale2"], call["zero_point2"], call["columns"],
    ).double()  # fmt: skip


def check(call: Call) -> None:
    """Within what summing K fp32 products in any order and one cast of the result leave."""
    got = ops.dequant_linear(**call, backend="cuda")
    assert got.dtype == call["x"].dtype
    x, w = call["x"].double(), weight(call)
    bias = torch.zeros(len(w)) if call["bias"] is None else call["bias"]
    exact = x @ w.t() + bias.double()
    rounding = torch.finfo(got.dtype).eps / 2
    terms = x.abs() @ w.abs().t() + bias.abs().double()
    bound = rounding * exact.abs() + 4 * torch.finfo(torch.float32).eps * terms
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_width(bits: int, dtype: torch.dtype, emulation: Emulation) -> None:
    for m, n, k, outliers in ((1, 33, 128, 0), (9, 20, 96, 5), (64, 48, 640, 40), (3, 16, 32, 1)):
        check(build(m, n, k, bits, dtype, outliers))


@pytest.mark.parametrize("m", [1, 7, 8, 9, 17, 63, 64])
def test_rows(m: int, emulation: Emulation) -> None:
    check(build(m, 24, 256, 3, torch.float16))


@pytest.mark.parametrize("k", [32, 64, 96, 160, 2048, 2176])  # units beyond the end, many units
@pytest.mark.parametrize("outliers", [0, 3])
def test_columns(k: int, outliers: int, emulation: Emulation) -> None:
    check(build(2, 17, k, 5, torch.bfloat16, outliers))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", FLOATS)
def test_identity_gives_the_weight(bits: int, dtype: torch.dtype, emulation: Emulation) -> None:
    call = build(64, 18, 64, bits, dtype, 7) | {"x": torch.eye(64, dtype=dtype), "bias": None}
    got = ops.dequant_linear(**call, backend="cuda")
    assert torch.equal(got, weight(call).float().t().to(dtype))


def test_values_that_16_bits_do_not_hold(emulation: Emulation) -> None:
    """fp32 x is not rounded: products of its last bits arrive."""
    call = build(1, 16, 32, 4) | {"bias": None}
    call["x"] = torch.zeros(1, 32)
    call["x"][0, 5] = 1 + 2**-23
    assert torch.equal(
        ops.dequant_linear(**call, backend="cuda")[0],
        (1 + 2**-23) * ((weight(call)[:, 5] / call["scale"]).round().float()) * call["scale"],
    )


def test_views_and_empties(emulation: Emulation) -> None:
    call = build(6, 24, 96, 4)
    want = ops.dequant_linear(**call, backend="cuda")
    wide = torch.randn(6, 99)
    wide[:, 3:] = call["x"]
    assert torch.equal(ops.dequant_linear(**(call | {"x": wide[:, 3:]}), backend="cuda"), want)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), call["packed"]])[1:]
    assert torch.equal(ops.dequant_linear(**(call | {"packed": shifted}), backend="cuda"), want)
    for m, n in ((0, 5), (5, 0)):
        assert ops.dequant_linear(**build(m, n, 32, 3), backend="cuda").shape == (m, n)


def test_no_bank_conflicts(emulation: Emulation) -> None:
    for m in (1, 64):
        check(build(m, 48, 640, 4, torch.float16, 40))
    wavefronts, conflicts = emulation.statistics()
    assert wavefronts["loads"] and wavefronts["stores"]
    assert not any(conflicts.values()), conflicts


def test_warps_in_any_order(emulation: Emulation) -> None:
    call = build(9, 33, 640, 6, torch.bfloat16, 11)
    want = ops.dequant_linear(**call, backend="cuda")
    emulation.reverse(True)
    assert torch.equal(ops.dequant_linear(**call, backend="cuda"), want)


def test_what_it_refuses(emulation: Emulation) -> None:
    call = build(2, 4, 64, 4)
    assert explain("dequant_linear", **call)["cuda"] == "usable"
    for change, reason in (
        ({"x": torch.zeros(2, 64).double()}, "x must be float16"),
        ({"x": torch.zeros(65, 64)}, "made for at most 64 rows of x, got 65"),
        ({"x": torch.zeros(2, 40)}, "K must be a multiple of 32, got 40"),
    ):
        assert explain("dequant_linear", **(call | change))["cuda"].startswith(reason)
