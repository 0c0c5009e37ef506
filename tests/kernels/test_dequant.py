"""Every backend's dequantizing GEMM against the reference, in units of what is summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from erq_kernels import formats, ops, reference

pytest.importorskip("triton")
from erq_kernels._triton.launch import Launch

# An op's arguments by name.
Call = dict[str, Any]


def build(
    m: int,
    n: int,
    k: int,
    bits: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    outliers: int = 0,
    has_bias: bool = True,
) -> Call:
    """Random operands; every scale different, zero points inside and outside the codes."""

    def params() -> tuple[Tensor, Tensor]:
        zero_point = torch.randint(-6, 2**bits + 6, (n,), dtype=torch.int32)
        return torch.rand(n) / 10 + 0.01, zero_point

    scale, zero_point = params()
    scale2, zero_point2 = params() if outliers else (None, None)
    call = {
        "x": torch.randn(m, k).to(dtype),
        "packed": formats.pack(torch.randint(0, 2**bits, (n, k)), bits),
        "bits": bits,
        "scale": scale,
        "zero_point": zero_point,
        "scale2": scale2,
        "zero_point2": zero_point2,
        "columns": torch.randperm(k)[:outliers].sort().values if outliers else None,
        "bias": torch.randn(n) if has_bias else None,
    }
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in call.items()}


def run(call: Call) -> Tensor:
    return ops.dequant_linear(**call)


def weight_of(call: Call) -> Tensor:
    """fp32 [N, K], as the reference decodes it."""
    shape = (call["scale"].numel(), call["x"].shape[1])
    names = ("scale", "zero_point", "scale2", "zero_point2", "columns")
    return reference.dequantize_weight(call["packed"], call["bits"], shape, *map(call.get, names))


def check(call: Call) -> None:
    """Within twice torch's error in x's dtype; twice the same."""
    x, weight, bias = call["x"], weight_of(call), call["bias"]
    in_fp64 = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = F.linear(*in_fp64)
    size = F.linear(*(None if t is None else t.abs() for t in in_fp64))
    in_dtype = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    got = run(call)
    assert got.dtype == x.dtype and got.shape == exact.shape and got.is_contiguous()
    if exact.numel():
        limit = float(((in_dtype.double() - exact).abs() / size).max())
        # With few outputs torch may happen to be exact.
        limit = max(limit, torch.finfo(x.dtype).eps / 4)
        assert float(((got.double() - exact).abs() / size).max()) <= 2 * limit
    assert torch.equal(run(call), got)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [96, 67])  # rows of whole words, and rows that begin on any bit
@pytest.mark.parametrize("outliers", [0, 13])
def test_identity_gives_the_decoded_weight(
    bits: int, k: int, outliers: int, device: torch.device, poison: None
) -> None:
    call = build(k, 34, k, bits, device, outliers=outliers, has_bias=False)
    call["x"] = torch.eye(k, device=device)
    got, want = run(call).t(), weight_of(call)
    if outliers:
        # Outliers' codes are multiplied by the ratio of the scales, then by a scale.
        assert bool(((got - want).abs() <= want.abs() * 2.0**-22).all())
        rest = torch.ones(k, dtype=torch.bool, device=device)
        rest[call["columns"]] = False
        got, want = got[:, rest], want[:, rest]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [0, 20])
# Few rows split K, into parts of which some may be empty; more rows do not.
@pytest.mark.parametrize("m", [0, 1, 17, 40, 70])
def test_every_dtype_and_number_of_rows(
    m: int, outliers: int, dtype: torch.dtype, device: torch.device, poison: None
) -> None:
    for n, k, bits in ((33, 136, 4), (20, 96, 3), (9, 91, 5)):
        check(build(m, n, k, bits, device, dtype=dtype, outliers=outliers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_rows(dtype: torch.dtype, device: torch.device, poison: None) -> None:
    check(build(260, 130, 72, 4, device, dtype=dtype, outliers=9))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches so far, which run as well."""
    launches: list[Launch] = []
    run_it = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (launches.append(self), run_it(self))[1])
    return launches


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("k", [512, 515])  # whole words, and bytes
def test_few_rows_share_their_columns(
    m: int, k: int, triton_device: torch.device, poison: None, launched: list[Launch]
) -> None:
    check(build(m, 40, k, 4, triton_device, dtype=torch.float16, outliers=3))
    product, addition = launched[:2]
    parts = product.grid[1]
    assert parts == product.constants["SPLIT"] == addition.constants["SPLIT"] > 2
    assert product.args["out"].shape == (parts, m, 40)


def test_many_rows_do_not(triton_device: torch.device, launched: list[Launch]) -> None:
    check(build(65, 40, 512, 4, triton_device))
    assert {launch.grid[1] for launch in launched} == {1}


def test_a_long_split(device: torch.device, poison: None) -> None:
    check(build(1, 16, 2112, 6, device, dtype=torch.float16))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_extreme_codes(bits: int, device: torch.device) -> None:
    for code in (0, 2**bits - 1):
        call = build(2, 9, 64, bits, device)
        call["packed"] = formats.pack(torch.full((9, 64), code), bits).to(device)
        check(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1e-4, 30.0, 1e4])
def test_scales_far_apart(dtype: torch.dtype, ratio: float, device: torch.device) -> None:
    call = build(3, 20, 96, 8, device, dtype=dtype, outliers=11)
    call["scale"] = call["scale"] / max(ratio, 1.0)
    call["scale2"] = call["scale"] * ratio
    call["zero_point2"] = call["zero_point2"] + 600
    check(call)


def test_streams_that_begin_between_words(device: torch.device) -> None:
    call = build(3, 20, 96, 4, device)
    want = run(call)
    for offset in (1, 2, 4):
        shifted = torch.cat([torch.full((offset,), 255, device=device), call["packed"]])
        again = run(call | {"packed": shifted.to(torch.uint8)[offset:]})
        assert torch.allclose(again, want, rtol=1e-6, atol=1e-6)


def test_activations_of_any_stride(device: torch.device) -> None:
    call = build(4, 20, 96, 3, device)
    want = run(call)
    wide = torch.full((4, 300), torch.nan, device=device)
    for view in (wide[:, 5:101], wide[:, ::3][:, :96], torch.empty(96, 4, device=device).t()):
        view.copy_(call["x"])
        assert torch.equal(run(call | {"x": view}), want)


def test_no_columns_gives_the_bias(device: torch.device, poison: None) -> None:
    call = build(3, 5, 0, 4, device)
    assert torch.equal(run(call), call["bias"].expand(3, 5))


def test_no_outputs(device: torch.device) -> None:
    assert run(build(3, 0, 8, 4, device)).shape == (3, 0)


def test_float64_is_refused_with_the_reason(device: torch.device) -> None:
    call = build(2, 3, 8, 4, device, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match=r"must be float16, bfloat16 or float32, got torch\.float64"
    ):
        run(call)
