"""quantize, dequantize, fake_quantize: 2**bits codes, never one more, and their values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erq.quant import (
    AffineParams,
    DualAffineParams,
    LogParams,
    Params,
    dequantize,
    fake_quantize,
    quantize,
)

BITS = st.integers(2, 8)
SCALES = st.floats(2**-10, 2**10, width=32)
ZERO_POINTS = st.integers(-300, 300)
# Dense around the grid, plus what only clamping can answer.
VALUES = torch.cat(
    [torch.linspace(-400, 400, 4001), torch.tensor([0.0, 1e30, -1e30, float("inf"), -float("inf")])]
)


def check_codes(x: torch.Tensor, params: Params) -> None:
    codes = quantize(x, params)
    assert codes.dtype == torch.int32
    assert codes.shape == x.shape
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**params.bits
    assert torch.equal(fake_quantize(x, params), dequantize(codes, params))
    assert torch.equal(quantize(dequantize(codes, params), params), codes)


@given(bits=BITS, scale=SCALES, zero_point=ZERO_POINTS)
def test_affine_has_at_most_two_to_the_bits_values(
    bits: int, scale: float, zero_point: int
) -> None:
    params = AffineParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), bits)
    x = VALUES * scale
    check_codes(x, params)
    assert len(fake_quantize(x, params).unique()) <= 2**bits


@given(bits=BITS, scale=st.floats(2**-12, 1.0, width=32), zero_last=st.booleans())
def test_log_has_at_most_two_to_the_bits_values(bits: int, scale: float, zero_last: bool) -> None:
    params = LogParams(torch.tensor(scale), bits, zero_last)
    x = torch.cat([torch.zeros(1), torch.logspace(-38, 0, 3000), torch.linspace(0, 1, 1000)])
    check_codes(x, params)
    assert len(fake_quantize(x, params).unique()) <= 2**bits


@given(
    bits=BITS,
    scale=st.tuples(SCALES, SCALES),
    zero_point=st.tuples(ZERO_POINTS, ZERO_POINTS),
    columns=st.sets(st.integers(0, 7), min_size=1, max_size=7),
)
def test_dual_is_two_quantizers_side_by_side(
    bits: int, scale: tuple[float, float], zero_point: tuple[int, int], columns: set[int]
) -> None:
    outlier, rest = (
        AffineParams(torch.full((50,), s), torch.full((50,), z, dtype=torch.int32), bits)
        for s, z in zip(scale, zero_point, strict=True)
    )
    chosen = torch.tensor(sorted(columns))
    others = torch.tensor(sorted(set(range(8)) - columns))
    params = DualAffineParams(outlier, rest, chosen)
    x = VALUES[:4000].reshape(500, 8)[::10] * scale[0]
    check_codes(x, params)
    y = fake_quantize(x, params)
    assert torch.equal(y[:, chosen], fake_quantize(x[:, chosen].contiguous(), outlier))
    assert torch.equal(y[:, others], fake_quantize(x[:, others].contiguous(), rest))
    assert len(y[0].unique()) <= 2 * 2**bits


def test_affine_codes_by_hand(affine: Callable[..., AffineParams]) -> None:
    # Halves go to even before the zero point is added.
    x = torch.tensor([-9.0, -0.75, -0.25, 0.25, 0.75, 1.25, 9.0])
    codes = quantize(x, affine(0.5, 3, bits=3))
    assert codes.tolist() == [0, 1, 3, 3, 5, 5, 7]
    assert dequantize(codes, affine(0.5, 3, bits=3)).tolist() == [-1.5, -1, 0, 0, 1, 1, 2]


def test_rows_have_their_own_scale(affine: Callable[..., AffineParams]) -> None:
    rows = affine([0.1, 2.0, 0.5], [4, -7, 20], bits=4)
    x = torch.randn(3, 40) * 5
    for i in range(3):
        one = AffineParams(rows.scale[i], rows.zero_point[i], 4)
        assert torch.equal(fake_quantize(x, rows)[i], fake_quantize(x[i], one))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4, 5)])
def test_scalar_params_take_any_shape(
    affine: Callable[..., AffineParams], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape)
    for params in (affine(0.3, 7), LogParams(torch.tensor(0.5), 4)):
        assert fake_quantize(x.abs(), params).shape == x.shape


def test_error_is_half_a_step_inside_the_range(affine: Callable[..., AffineParams]) -> None:
    params = affine(0.25, 6, bits=4)
    x = torch.empty(10000).uniform_(-6 * 0.25, 9 * 0.25)
    assert float((fake_quantize(x, params) - x).abs().max()) <= 0.125


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_last", [True, False])
def test_log_levels(bits: int, zero_last: bool) -> None:
    params = LogParams(torch.tensor(0.75), bits, zero_last)
    last = 2**bits - 1
    values = dequantize(torch.arange(2**bits), params)
    expected = [0.75 * 2 ** (-k / 2) for k in range(last + 1)]
    if zero_last:
        expected[last] = 0.0
    torch.testing.assert_close(values, torch.tensor(expected))
    # Beyond both ends: above the scale it saturates, at and near 0 the last code answers.
    assert quantize(torch.tensor([1.0, 0.0, 1e-45]), params).tolist() == [0, last, last]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_fp32_whatever_comes_in(
    affine: Callable[..., AffineParams], dtype: torch.dtype
) -> None:
    x = torch.randn(100).to(dtype)
    y = fake_quantize(x, affine(0.1, 8))
    assert y.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.float(), affine(0.1, 8)))
