"""GPTQ against optimal brain surgeon with an explicit inverse per column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erq.quant import dequantize, quantize
from erq.quant.fit import fit_dual_weight, fit_weight
from erq.reduce.gptq import gptq

Build = Callable[..., Any]


@pytest.mark.parametrize("group", [1, 5, 64])
@pytest.mark.parametrize("dual", [False, True])
def test_codes_equal_column_by_column_surgery(layer: Build, group: int, dual: bool) -> None:
    it = layer(d=18, n=15)
    weight = it.weight[:, :-1]
    columns = torch.tensor([3, 11])
    params = fit_dual_weight(weight.float(), 3, columns) if dual else fit_weight(weight.float(), 3)
    h = it.gram.g[:-1, :-1]
    h = h + 0.01 * float(h.diagonal().mean()) * torch.eye(18).double()
    current = weight.clone()
    codes = torch.empty(15, 18, dtype=torch.int32)
    for j in range(18):
        inverse = torch.linalg.inv(h[j:, j:])
        every = quantize(current.float(), params)
        codes[:, j] = every[:, j]
        error = current[:, j] - dequantize(every, params)[:, j]
        current[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(gptq(it.gram, weight, params, group=group), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_error_is_no_more_than_that_of_rounding_to_nearest(
    layer: Build, bits: int, seed: int
) -> None:
    torch.manual_seed(seed)
    it = layer(d=24, n=40)
    weight = it.weight[:, :-1]
    params = fit_weight(weight.float(), bits)
    errors = []
    for codes in (gptq(it.gram, weight, params), quantize(weight.float(), params)):
        assert int(codes.min()) >= 0
        assert int(codes.max()) < 2**bits
        full = torch.cat([dequantize(codes, params).double(), it.weight[:, -1:]], dim=1)
        errors.append(float(it.error(full).sum()))
    assert errors[0] < errors[1]


def test_dead_input_channels(layer: Build) -> None:
    it = layer(d=10, n=5)
    it.gram.g[:4], it.gram.g[:, :4] = 0, 0
    weight = it.weight[:, :-1]
    params = fit_weight(weight.float(), 4)
    codes = gptq(it.gram, weight, params)
    assert torch.equal(codes[:, :4], quantize(weight.float(), params)[:, :4])
