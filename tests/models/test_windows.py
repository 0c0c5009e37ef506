"""Windows as index arithmetic: what timm does by rolling, padding and cutting."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    get_relative_position_index,
    window_partition,
)
from torch import nn
from torch.nn import functional as F

from erq.models.windows import Windows, add_bias, relative_position_index, window_layout

CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((8, 8), (4, 4), (2, 2)),
    ((10, 7), (4, 4), (2, 2)),
    ((3, 20), (3, 7), (0, 3)),
    ((5, 5), (7, 7), (3, 3)),
    ((6, 9), (2, 5), (1, 2)),
]


def windows(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Windows:
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    return Windows(nn.Parameter(torch.randn(rows, 3)), 6, size, window, shift, fixed=True)


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_cut_is_roll_pad_and_partition(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    x = torch.randn(2, *size, 6)
    rolled = x.roll((-shift[0], -shift[1]), (1, 2))
    pad_h, pad_w = -size[0] % window[0], -size[1] % window[1]
    padded = F.pad(rolled, (0, 0, 0, pad_w, 0, pad_h))
    expected = window_partition(padded, window).flatten(1, 2)
    module = windows(size, window, shift)
    assert (module.pad is not None) == bool(pad_h or pad_w)
    cut = module.cut(x)
    assert torch.equal(cut, expected)
    assert torch.equal(module.join(cut, size), x)
    if module.pad is not None:
        filled = module.cut(x, torch.full((6,), 7.0))
        assert torch.equal(filled == 7.0, (expected == 0.0))


@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_mask_is_timms(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    block = SwinTransformerBlock(
        6, size, num_heads=3, window_size=window, shift_size=shift, always_partition=True
    )
    mask = window_layout(size, window, shift).mask
    if block.attn_mask is None:
        assert mask is None
    else:
        assert mask is not None and torch.equal(mask, block.attn_mask)


@pytest.mark.parametrize("window", [(4, 4), (3, 7), (1, 2)])
def test_relative_positions_are_timms(window: tuple[int, int]) -> None:
    expected = get_relative_position_index(*window).reshape(-1)
    assert torch.equal(relative_position_index(window), expected)


def test_indices_are_real_where_parameters_are_not() -> None:
    with torch.device("meta"):
        layout = window_layout((6, 6), (4, 4), (2, 2))
        index = relative_position_index((4, 4))
    assert layout.mask is not None
    for made in (layout.tokens, layout.places, layout.mask, index):
        assert made.device.type == "cpu"


def test_a_new_table_gives_a_new_bias() -> None:
    one, other = (windows((8, 8), (4, 4), (2, 2)) for _ in range(2))
    assert not torch.equal(one.bias, other.bias)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.bias, other.bias)
    assert torch.equal(one.bias, other.bias_at((8, 8)))
    # 12×8 tokens: 6 windows instead of 4.
    assert one.bias_at((12, 8)).shape == (6, 3, 16, 16)


def test_every_window_of_every_image_gets_its_own_bias() -> None:
    scores, bias = torch.randn(6, 3, 4, 4), torch.randn(2, 3, 4, 4)
    added = add_bias(scores, bias)
    for i in range(6):
        assert torch.equal(added[i], scores[i] + bias[i % 2])
