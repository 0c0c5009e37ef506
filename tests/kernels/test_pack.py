"""The kernels of every backend that pack and unpack, against `formats`: every byte equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erq_kernels import formats, ops


def random_codes(count: int, bits: int, device: torch.device) -> Tensor:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    # Whatever the draw, both ends of the range and both in one byte.
    codes[: min(count, 4)] = torch.tensor([0, 2**bits - 1, 2**bits - 1, 0])[:count]
    return codes.to(device)


@pytest.mark.parametrize("bits", range(1, 9))
# Around a group of 8 codes and around the 128 groups of a program; odd and even everything.
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1023, 1024, 1025, 2100])
def test_streams_equal_the_reference(
    bits: int, count: int, device: torch.device, poison: None
) -> None:
    codes = random_codes(count, bits, device)
    packed = ops.pack(codes, bits)
    assert torch.equal(packed, formats.pack(codes, bits))
    unpacked = ops.unpack(packed, bits, (count,))
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)
    assert torch.equal(ops.pack(codes, bits), packed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype_and_stride(dtype: torch.dtype, device: torch.device) -> None:
    codes = random_codes(60, 5, device).reshape(6, 10).to(dtype).t()
    packed = ops.pack(codes, 5)
    assert torch.equal(packed, formats.pack(codes, 5))
    assert torch.equal(ops.unpack(packed, 5, codes.shape), codes.to(torch.uint8))


def test_booleans_are_codes_of_one_bit(device: torch.device) -> None:
    flags = random_codes(13, 1, device).bool()
    assert torch.equal(ops.pack(flags, 1), formats.pack(flags, 1))


@pytest.mark.parametrize("wrong", [-1, 8, 300])
def test_code_outside_its_range_is_refused(wrong: int, device: torch.device) -> None:
    codes = torch.tensor([0, 7, wrong], dtype=torch.int16, device=device)
    with pytest.raises(ValueError, match=rf"codes of 3 bits must lie in 0\.\.7, got .*{wrong}"):
        ops.pack(codes, 3)


@pytest.mark.parametrize("size", [4, 6])
def test_stream_of_another_length_is_refused(size: int, device: torch.device) -> None:
    packed = torch.zeros(size, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=rf"13 codes of 3 bits take 5 bytes .*got {size}"):
        ops.unpack(packed, 3, (13,))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("n", "k", "outliers"), [(3, 64, 0), (5, 37, 0), (4, 1300, 7), (1, 33, 32)]
)
def test_repacked_weights_equal_the_reference(
    bits: int, n: int, k: int, outliers: int, device: torch.device, poison: None
) -> None:
    codes = random_codes(n * k, bits, device).reshape(n, k)
    packed = formats.pack(codes, bits)
    low, high = 2**bits - 128, 129  # zero points that any code bears
    zero, second = torch.randint(low, high, (2, n), dtype=torch.int32).to(device)
    columns = torch.randperm(k)[:outliers].sort().values.to(device)
    dual = (second, columns) if outliers else (None, None)
    got = ops.repack(packed, bits, k, zero, *dual)
    assert torch.equal(got, formats.center(codes, bits, zero, *dual))
    assert got.shape[1] == formats.repacked_columns(k, outliers)
