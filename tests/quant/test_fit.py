"""Fitting params: the vectorised search against one row at a time, and awkward rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erq.quant import (
    AffineParams,
    DualAffineParams,
    LogParams,
    dequantize,
    fake_quantize,
    fit,
    quantize,
)
from erq.quant.fit import (
    ACTIVATION_PERCENTILES,
    WEIGHT_PERCENTILES,
    fit_channels,
    fit_dual_weight,
    fit_rows,
    fit_scores,
    fit_softmax,
    fit_tensor,
    fit_values,
    fit_weight,
    outlier_columns,
    some_entries,
    some_queries,
    tail_quantiles,
)


def row_error(row: Tensor, scale: float, zero_point: float, bits: int) -> float:
    x = row.double()
    code = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1)
    return float(((code - zero_point) * scale - x).square().mean())


def search_row(row: Tensor, bits: int, percentiles: tuple[float, ...]) -> tuple[float, int, float]:
    """The published search for one row: scale, zero point and mean squared error."""
    best = (0.0, 0, float("inf"))
    for p in percentiles:
        hi = float(torch.quantile(row.double(), p))
        lo = float(torch.quantile(row.double(), 1 - p))
        scale = (hi - lo) / (2**bits - 1)
        zero_point = round(-lo / scale)
        error = row_error(row, scale, zero_point, bits)
        if error < best[2]:
            best = (scale, zero_point, error)
    return best


def rows_of_many_tails() -> Tensor:
    """[12, 1500], from flat to heavy-tailed and off centre, so that different percentiles win."""
    x = torch.randn(12, 1500)
    return x.sign() * x.abs() ** torch.linspace(0.3, 4, 12)[:, None] + 0.3 * torch.randn(12, 1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1001, 30000])
@pytest.mark.parametrize(
    "percentiles", [*ACTIVATION_PERCENTILES.values(), WEIGHT_PERCENTILES, (0.6,)]
)
def test_tail_quantiles_equals_torch_quantile(n: int, percentiles: tuple[float, ...]) -> None:
    rows = torch.randn(3, n)
    p = torch.tensor(percentiles, dtype=torch.float64)
    hi, lo = tail_quantiles(rows, percentiles)
    for got, q in ((hi, p), (lo, 1 - p)):
        expected = torch.quantile(rows.double(), q, dim=1).float()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "kind", ["normal", "sorted", "constant", "two values", "spikes between samples", "one spike"]
)
def test_tails_of_a_long_row_are_found_by_a_sample(kind: str) -> None:
    n = 300_000
    x = torch.randn(n)
    if kind == "sorted":
        x = x.sort().values
    elif kind == "constant":
        x = torch.full((n,), -0.25)
    elif kind == "two values":
        x = (torch.rand(n) > 0.9995).float()
    elif kind == "spikes between samples":
        x[50::101] += 30.0
    elif kind == "one spike":
        x[12345] = 1e6
    percentiles = (0.999, 0.9999, 0.99999)
    got = tail_quantiles(x[None], percentiles)
    ordered = x.sort().values.double()
    for p, hi, lo in zip(percentiles, *got, strict=True):
        depth = (1.0 - p) * (n - 1)
        i = int(depth)
        for value, tail in ((hi, ordered.flip(0)), (lo, ordered)):
            want = tail[i] + (depth - i) * (tail[i + 1] - tail[i])
            torch.testing.assert_close(value[0].double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("percentiles", [*ACTIVATION_PERCENTILES.values(), WEIGHT_PERCENTILES])
def test_fit_rows_equals_a_search_row_by_row(bits: int, percentiles: tuple[float, ...]) -> None:
    rows = rows_of_many_tails()
    params = fit_rows(rows, bits, percentiles)
    found = [search_row(row, bits, percentiles) for row in rows]
    scales = torch.tensor([f[0] for f in found])
    torch.testing.assert_close(params.scale, scales, rtol=1e-5, atol=0)
    assert params.zero_point.tolist() == [f[1] for f in found]


def test_different_percentiles_win_in_different_rows() -> None:
    """Guards the test above: a search that kept one percentile would not pass it."""
    rows = rows_of_many_tails()
    hi, lo = tail_quantiles(rows, WEIGHT_PERCENTILES)
    scale = fit_rows(rows, 4, WEIGHT_PERCENTILES).scale
    winners = ((hi - lo) / 15 - scale).abs().argmin(dim=0)
    assert len(winners.unique()) >= 3


def test_candidates_for_a_wide_tensor_are_compared_on_all_channels() -> None:
    # Channels 0 and 96 of 192 hold the tails: every channel's share of the sample is the same.
    x = torch.randn(17_000, 192)
    x[:, ::96] *= 30
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = fit._squared_error
        patch.setattr(fit, "_squared_error", lambda r, p: seen.append(r) or inner(r, p))
        params = fit_tensor(x, 4)
    assert {len(r[0]) for r in seen} == {-(-x.numel() // 11)}
    share = float((seen[0].abs() > 6).float().mean() / (x.abs() > 6).float().mean())
    assert 0.97 < share < 1.03
    fakes = [fake_quantize(x, p) for p in (params, fit_tensor(x[::11], 4))]
    errors = [float((f - x).square().mean()) for f in fakes]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_error_is_at_most_that_of_the_full_range(bits: int) -> None:
    weight = torch.randn(16, 200)
    top = 2**bits - 1 if bits < 8 else 254  # 8 bits are symmetric
    lo, hi = weight.amin(1), weight.amax(1)
    width = hi - lo if bits < 8 else 2 * torch.maximum(hi, -lo)
    error = (fake_quantize(weight, fit_weight(weight, bits)) - weight).square().mean(1)
    assert bool((error <= (width / top) ** 2 / 4).all())


AWKWARD = {
    "dead": torch.zeros(30),
    "positive constant": torch.full((30,), 3.25),
    "negative constant": torch.full((30,), -0.001),
    "nearly constant": 5.0 + 1e-6 * torch.arange(30),
    "positive": torch.linspace(0.5, 2.0, 30),
    "negative": torch.linspace(-2.0, -0.5, 30),
    "far from zero": 100.0 + torch.linspace(0, 1, 30),
    "far below zero": -100.0 - torch.linspace(0, 1, 30),
    "tiny": torch.linspace(-1e-15, 1e-15, 30),
    "subnormal": torch.linspace(-1e-42, 1e-42, 30),
    "huge": torch.linspace(-1e15, 2e15, 30),
    "one spike": torch.cat([torch.zeros(29), torch.ones(1)]),
    "usual": torch.linspace(-1, 1, 30),
}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("centered", [True, False])
def test_awkward_rows_get_a_usable_quantizer(bits: int, centered: bool) -> None:
    rows = torch.stack(list(AWKWARD.values()))
    params = fit_rows(rows, bits, WEIGHT_PERCENTILES, centered_int8=centered)
    codes = quantize(rows, params)
    values = dequantize(codes, params)
    assert bool(torch.isfinite(values).all())
    if centered:
        offset = codes - params.zero_point[:, None]
        assert int(offset.min()) >= -128
        assert int(offset.max()) <= 127
    # No row may be worse than half a step of a quantizer that spans it and zero.
    lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    width = hi - lo if bits < 8 or not centered else 2 * torch.maximum(hi, -lo)
    worst = (width.double() / (2**bits - 1 - (bits == 8))) ** 2 / 4
    error = (values.double() - rows.double()).square().mean(1)
    for name, e, w in zip(AWKWARD, error.tolist(), worst.tolist(), strict=True):
        assert e <= w * 1.01 + 1e-60, name


@given(
    bits=st.integers(2, 8),
    low=st.floats(-1e3, 1e3, width=32),
    width=st.floats(0, 1e3, width=32),
    n=st.integers(1, 40),
)
def test_weight_codes_fit_int8_wherever_the_row_lies(
    bits: int, low: float, width: float, n: int
) -> None:
    weight = low + width * torch.rand(3, n, generator=torch.Generator().manual_seed(n))
    params = fit_weight(weight, bits)
    offset = torch.tensor([0, 2**bits - 1])[:, None] - params.zero_point
    assert int(offset.min()) >= -128
    assert int(offset.max()) <= 127


def test_constant_rows_keep_their_value() -> None:
    rows = torch.tensor([[0.0], [3.25], [-0.001]]).expand(3, 30)
    for bits in (2, 4, 7, 8):
        for centered in (True, False):
            values = fake_quantize(rows, fit_rows(rows, bits, (1.0,), centered))
            torch.testing.assert_close(values, rows, rtol=1e-6, atol=0)


def test_dead_rows_take_a_neighbours_scale() -> None:
    rows = torch.cat([torch.zeros(1, 50), torch.randn(3, 50)])
    params = fit_rows(rows, 4, ACTIVATION_PERCENTILES["official"])
    assert float(params.scale[0]) in params.scale[1:].tolist()
    assert bool((fake_quantize(rows, params)[0] == 0).all())


def test_fit_tensor_is_one_row_and_fit_channels_a_row_per_channel() -> None:
    x = torch.randn(2, 50, 6) * torch.arange(1, 7)
    whole = fit_tensor(x, 4)
    assert whole.scale.dim() == 0
    torch.testing.assert_close(
        float(whole.scale), search_row(x.flatten(), 4, ACTIVATION_PERCENTILES["fine"])[0]
    )
    channels = fit_channels(x, 4)
    assert channels.scale.shape == (6,)
    for c in range(6):
        one = fit_tensor(x[..., c], 4)
        assert torch.equal(channels.scale[c], one.scale)
        assert torch.equal(channels.zero_point[c], one.zero_point)


def hits_of(weight: Tensor) -> np.ndarray:
    """Rows that hold an extreme weight in each column, counted one row at a time."""
    count = np.zeros(weight.shape[1], dtype=int)
    for row in weight.double().numpy():
        positive, negative = row[row > 0], row[row < 0]
        if len(positive):
            count += row > np.percentile(positive, 99)
        if len(negative):
            count += row < np.percentile(negative, 1)
    return count


def test_outlier_columns_are_those_of_most_hits() -> None:
    weight = torch.randn(100, 64)
    weight[:, [3, 17, 40]] *= 6
    weight[:10] = weight[:10].abs()  # rows of one sign have no threshold on the other side
    columns = outlier_columns(weight)
    count = hits_of(weight)
    assert len(columns) == 100 // 20
    assert {3, 17, 40} <= set(columns.tolist())
    assert columns.tolist() == sorted(set(columns.tolist()))
    assert sorted(count[columns.numpy()]) == sorted(count)[-5:]


def test_outlier_columns_leave_at_least_one_other() -> None:
    assert outlier_columns(torch.randn(400, 5)).numel() <= 4
    assert outlier_columns(torch.randn(400, 1)).numel() == 0
    assert outlier_columns(torch.randn(19, 50)).numel() == 0
    assert outlier_columns(torch.zeros(100, 50)).numel() == 0


def test_dual_weight_fits_both_groups_alone() -> None:
    weight = torch.randn(60, 40)
    weight[:, [5, 9]] *= 8
    params = fit_dual_weight(weight, 4)
    assert isinstance(params, DualAffineParams)
    rest = torch.tensor([c for c in range(40) if c not in params.columns.tolist()])
    for half, columns in ((params.outlier, params.columns), (params.rest, rest)):
        alone = fit_weight(weight[:, columns], 4)
        assert torch.equal(half.scale, alone.scale)
        assert torch.equal(half.zero_point, alone.zero_point)
    given_columns = fit_dual_weight(weight, 4, torch.tensor([1, 2]))
    assert isinstance(given_columns, DualAffineParams)
    assert given_columns.columns.tolist() == [1, 2]


def test_dual_weight_without_outliers_is_plain() -> None:
    assert isinstance(fit_dual_weight(torch.randn(19, 40), 4), AffineParams)


@pytest.mark.parametrize(("tokens", "bits"), [(8, 4), (20, 3), (20, 4), (400, 4)])
def test_softmax_params_are_the_candidate_of_least_error(tokens: int, bits: int) -> None:
    p = torch.softmax(torch.randn(2, 3, tokens, tokens) * 3, dim=-1)
    errors = {}
    for percentile in ACTIVATION_PERCENTILES["fine"]:
        scale = float(torch.quantile(p.double().flatten()[: 1 << 23], percentile))
        for zero_last in (True, False):
            k = (-2 * torch.log2(p.double() / scale)).round().clamp(0, 2**bits - 1)
            value = scale * 2 ** (-k / 2)
            if zero_last:
                value[k == 2**bits - 1] = 0
            errors[scale, zero_last] = float((value - p).square().sum())
    scale, zero_last = min(errors, key=errors.__getitem__)
    params = fit_softmax(p, bits)
    assert (params.bits, params.zero_last) == (bits, zero_last)
    assert float(params.scale) == pytest.approx(scale, rel=1e-5)


def test_softmax_of_uniform_and_dead_attention() -> None:
    uniform = fit_softmax(torch.full((4, 16, 16), 1 / 16), 4)
    assert float(uniform.scale) == pytest.approx(1 / 16)
    assert bool((fake_quantize(torch.zeros(5), fit_softmax(torch.zeros(5), 4)) == 0).all())


def test_fit_does_not_touch_its_input() -> None:
    weight = torch.randn(40, 30)
    before = weight.clone()
    fit_dual_weight(weight, 4)
    fit_tensor(weight, 4)
    assert torch.equal(weight, before)


def test_scores_keep_the_few_keys_that_decide() -> None:
    # One token in 64 has keys that all queries look for, far outside the others' range.
    q, k = torch.randn(2, 2, 64, 16) + 1, torch.randn(2, 2, 64, 16) * 0.3
    k[:, :, 5] = 2.5
    p = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)

    def lost(a: AffineParams, b: AffineParams) -> float:
        scores = fake_quantize(q, a) @ fake_quantize(k, b).transpose(-2, -1)
        return float((p * (p.log() - (scores * 0.25).log_softmax(-1))).sum())

    percentiles = ACTIVATION_PERCENTILES["attention"]
    *chosen, loss = fit_scores(q, k, 4, percentiles, 0.25)
    assert loss == pytest.approx(lost(*chosen), rel=1e-3)
    plain = (fit_tensor(q, 4, percentiles), fit_tensor(k, 4, percentiles))
    assert lost(*chosen) < 0.7 * lost(*plain)
    top = (15 - chosen[1].zero_point) * chosen[1].scale
    assert float(top) == pytest.approx(2.5, rel=0.05)


def test_values_keep_the_few_probabilities_that_decide() -> None:
    # One row in 64 attends to a single token, all others to many alike.
    p = torch.randn(2, 2, 64, 64).softmax(-1)
    p[:, :, 7] = torch.eye(64)[3]
    v = torch.randn(2, 2, 64, 16)
    v[:, :, 3] *= 4

    def lost(a: LogParams, b: AffineParams) -> float:
        return float((fake_quantize(p, a) @ fake_quantize(v, b) - p @ v).square().sum())

    percentiles = ACTIVATION_PERCENTILES["attention"]
    chosen = fit_values(p, v, 3, percentiles)
    plain = fit_softmax(p, 3, percentiles), fit_tensor(v, 3, percentiles)
    assert float(plain[0].scale) < 0.5
    assert lost(*chosen) < 0.7 * lost(*plain)
    assert float(chosen[0].scale) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("batch", [2, 256])
def test_some_of_the_batch_stand_for_all(batch: int) -> None:
    x = torch.empty(batch, 2, 64, 64)
    some = some_entries(x)
    assert len(some) == min(batch, 64)
    assert torch.equal(some, some.unique())
    assert int(some.max()) < batch
    assert torch.equal(some, some_entries(x))
    assert not bool((some.diff() == some.diff()[0]).all()) or batch == 2
    assert some_queries(x, 64).shape[2] == -(-64 // -(-x.numel() // (1 << 18)))
