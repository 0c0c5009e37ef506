"""Gram matrices from streamed chunks, and the output error they give, against all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erq.quant import AffineParams, fake_quantize
from erq.reduce.gram import Gram, OutputError

Affine = Callable[..., AffineParams]

QUANTIZERS = [None, (0.5, 7, 4), (0.9, -3, 3), (0.03, 10, 8), (0.03, 128, 8), (0.03, 240, 8)]


@pytest.fixture(params=QUANTIZERS, ids=str)
def params(request: pytest.FixtureRequest, affine: Affine) -> AffineParams | None:
    return None if request.param is None else affine(*request.param)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal within fp32 rounding of the products that are summed."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def rows_of(x: Tensor, params: AffineParams | None) -> tuple[Tensor, Tensor]:
    """A = [Q(X) | 1] and Q(X) in fp64."""
    q = (x if params is None else fake_quantize(x, params)).double()
    return torch.cat([q, torch.ones(len(x), 1)], dim=1), q


@pytest.mark.parametrize("with_upstream", [False, True])
@pytest.mark.parametrize("chunks", [1, 4])
def test_matrices_are_sums_over_all_rows(
    params: AffineParams | None, with_upstream: bool, chunks: int
) -> None:
    x = torch.randn(8, 15, 9) * 2 + torch.randn(9)
    upstream = x + 0.3 * torch.randn_like(x) if with_upstream else None
    gram = Gram(9, x.device)
    for i in range(chunks):
        part = slice(i * 8 // chunks, (i + 1) * 8 // chunks)
        gram.add(x[part], None if upstream is None else upstream[part], params)

    a, q = rows_of(x.reshape(-1, 9), params)
    error = (x if upstream is None else upstream).reshape(-1, 9).double() - q
    assert gram.rows == 120
    close(gram.g, a.t() @ a)
    close(gram.c, a.t() @ error)
    close(gram.p, error.t() @ error)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_products_are_exact(affine: Affine, bits: int) -> None:
    params = affine(0.25, 5, bits)  # a power of two: not even the scale rounds
    x = torch.randn(500, 7) * 30
    gram = Gram(7, x.device)
    gram.add(x, None, params)
    a, _ = rows_of(x, params)
    assert torch.equal(gram.g, a.t() @ a)


def test_more_rows_than_one_int32_product_takes(affine: Affine) -> None:
    """Largest codes in 2**17 + 1 rows: an int32 sum over all of them would overflow."""
    rows = (1 << 17) + 1
    gram = Gram(2, torch.device("cpu"))
    gram.add(torch.full((rows, 2), -1e9), None, affine(1.0, 0, 8))
    assert not gram.g[:2].any()
    gram.add(torch.full((rows, 2), 1e9), None, affine(1.0, 0, 8))
    assert bool((gram.g[:2, :2] == 255.0**2 * rows).all())
    assert gram.g[2].tolist() == [255.0 * rows, 255.0 * rows, 2.0 * rows]


def test_unquantized_input_without_upstream_has_no_error() -> None:
    gram = Gram(5, torch.device("cpu"))
    gram.add(torch.randn(20, 5), None, None)
    assert not gram.c.any()
    assert not gram.p.any()


def test_no_rows_change_nothing(affine: Affine) -> None:
    gram = Gram(5, torch.device("cpu"))
    for params in (None, affine(0.5, 7)):
        gram.add(torch.zeros(0, 5), torch.zeros(0, 5), params)
    assert gram.rows == 0
    assert not gram.g.any()


@pytest.mark.parametrize("with_upstream", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_output_error_is_the_error_of_the_outputs(
    params: AffineParams | None, with_upstream: bool, narrow: bool
) -> None:
    x = torch.randn(150, 9) * 2 + torch.randn(9)
    upstream = x + 0.3 * torch.randn_like(x) if with_upstream else x
    full, other = torch.randn(2, 6, 10).float().double()
    other = full + 0.1 * other
    # Six outputs of nine inputs: with the weight known, its products are summed.
    gram = Gram(9, x.device, full[:, :-1].float() if narrow else None)
    gram.add(x, upstream if with_upstream else None, params)
    assert (gram.c.shape == (10, 6)) == narrow
    a, _ = rows_of(x, params)
    y = torch.cat([upstream.double(), torch.ones(150, 1)], dim=1) @ full.t()
    error = OutputError(gram, full, gram.cross(full[:, :-1]))
    for weight in (full, other):
        expected = float((y - a @ weight.t()).square().sum() / y.square().sum())
        assert error.of(weight) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_output_error_of_a_dead_layer_is_zero() -> None:
    gram = Gram(3, torch.device("cpu"))
    gram.add(torch.randn(10, 3), None, None)
    zero = torch.zeros(2, 4).double()
    assert OutputError(gram, zero, gram.cross(zero[:, :-1])).of(zero) == 0.0


def test_a_narrow_layer_sums_what_the_solves_use(affine: Callable[..., AffineParams]) -> None:
    x, weight = torch.randn(200, 9), torch.randn(4, 9)
    whole, narrow = Gram(9, x.device), Gram(9, x.device, weight)
    for gram in (whole, narrow):
        for part in x.split(64):
            gram.add(part, part + 0.1, affine(0.3, 7))
    w = weight.double()
    assert narrow.c.shape == (10, 4)
    assert torch.equal(narrow.g, whole.g)
    torch.testing.assert_close(narrow.cross(w), whole.cross(w), rtol=1e-5, atol=1e-3)
    assert narrow.energy(w) == pytest.approx(whole.energy(w), rel=1e-5)
    assert Gram(9, x.device, torch.randn(9, 9)).c.shape == (10, 9)
