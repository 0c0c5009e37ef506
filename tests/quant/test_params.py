"""Params are frozen and say what is wrong with a value they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from erq.quant import AffineParams, DualAffineParams, LogParams
from erq.quant.params import check_bits


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_check_bits_passes_the_allowed_widths(bits: int) -> None:
    assert check_bits(bits) == bits


@pytest.mark.parametrize("bits", [1, 9, 16, 0, -4, 4.0, "4", True, None])
def test_check_bits_names_value_and_range(bits: Any) -> None:
    with pytest.raises(ValueError, match="w_bits must be an integer from 2 to 8, got ") as error:
        check_bits(bits, "w_bits")
    assert repr(bits) in str(error.value)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (f32(1.0).double(), i32(0), "scale must be float32"),
        (torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.int32), r"shape \[\] or \[N\]"),
        (f32(0.0), i32(0), "finite and > 0"),
        (f32(1.0, -1.0), i32(0, 0), "down to -1"),
        (f32(float("nan")), i32(0), "finite and > 0"),
        (f32(float("inf")), i32(0), "finite and > 0"),
        (f32(1.0), f32(0.0), "zero_point must be int32"),
        (f32(1.0, 2.0), i32(0), r"int32 of shape \[2\]"),
    ],
)
def test_affine_refuses(scale: torch.Tensor, zero_point: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffineParams(scale, zero_point, 4)


def test_affine_takes_zero_points_outside_the_codes_and_is_frozen() -> None:
    params = AffineParams(f32(0.5, 4.0), i32(-300, 300), 4)
    assert torch.equal(params.inv_scale, f32(2.0, 0.25))
    with pytest.raises(FrozenInstanceError):
        params.bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("outlier", "columns", "message"),
    [
        (AffineParams(f32(1, 1), i32(0, 0), 3), torch.tensor([0]), "same bits and rows"),
        (AffineParams(f32(1), i32(0), 4), torch.tensor([0]), "same bits and rows"),
        (None, torch.tensor([], dtype=torch.int64), "non-empty int64"),
        (None, torch.tensor([0.0]), "non-empty int64"),
        (None, torch.tensor([[0]]), "non-empty int64"),
        (None, torch.tensor([2, 1]), "sorted, distinct"),
        (None, torch.tensor([1, 1]), "sorted, distinct"),
        (None, torch.tensor([-1, 1]), ">= 0"),
    ],
)
def test_dual_refuses(outlier: AffineParams | None, columns: torch.Tensor, message: str) -> None:
    rest = AffineParams(f32(1, 1), i32(0, 0), 4)
    with pytest.raises(ValueError, match=message):
        DualAffineParams(outlier or rest, rest, columns)


@pytest.mark.parametrize("bits", [1, 9])
def test_every_kind_checks_its_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="from 2 to 8"):
        AffineParams(f32(1.0), i32(0), bits)
    with pytest.raises(ValueError, match="from 2 to 8"):
        LogParams(torch.tensor(1.0), bits)


def test_log_has_one_scale() -> None:
    with pytest.raises(ValueError, match=r"one scale, got \[2\]"):
        LogParams(f32(1.0, 1.0), 4)


def test_to_keeps_every_field() -> None:
    first, second = AffineParams(f32(1, 2), i32(3, 4), 4), AffineParams(f32(5, 6), i32(7, 8), 4)
    dual = DualAffineParams(first, second, torch.tensor([1])).to("cpu")
    for half, moved in ((first, dual.outlier), (second, dual.rest)):
        assert torch.equal(half.scale, moved.scale)
        assert torch.equal(half.zero_point, moved.zero_point)
    assert (dual.bits, dual.columns.tolist()) == (4, [1])
    log = LogParams(torch.tensor(0.5), 3, zero_last=False).to("cpu")
    assert (float(log.scale), log.bits, log.zero_last) == (0.5, 3, False)
