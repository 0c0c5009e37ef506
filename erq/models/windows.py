"""Shifted windows of an attention as index arithmetic, with their position bias and mask.

timm rolls the map of tokens, pads it below and on the right to whole windows, and cuts it. All of
that is one gather of rows, `cut`; its reverse, `join`, is another one, which drops the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASKED = -100.0
"""Added to the score of two tokens that only the shift has made neighbours (timm's constant)."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class WindowLayout:
    """Where the tokens of an H×W map stand in its windows, n of them with T places each.

    Args:
        tokens: int64 [n·T], the token at every place, window by window; H·W where there is none.
        places: int64 [H·W], the place of every token.
        mask: fp32 [n, T, T], 0 or MASKED; None without a shift.
        padded: whether a place without a token exists.
    """

    tokens: Tensor
    places: Tensor
    mask: Tensor | None
    padded: bool


def window_layout(size: Pair, window: Pair, shift: Pair) -> WindowLayout:
    """The layout of a map of `size`, made on the CPU."""
    cpu = torch.device("cpu")  # a surrounding `torch.device("meta")` is not for these numbers
    (h, w), (wh, ww) = size, window
    rows, columns = -(-h // wh) * wh, -(-w // ww) * ww
    token = torch.arange(h * w, device=cpu).reshape(h, w).roll((-shift[0], -shift[1]), (0, 1))
    grid = torch.full((rows, columns), h * w, device=cpu)
    grid[:h, :w] = token

    def cut(x: Tensor) -> Tensor:
        return x.reshape(rows // wh, wh, columns // ww, ww).transpose(1, 2).reshape(-1, wh * ww)

    tokens = cut(grid).reshape(-1)
    places = torch.empty(h * w + 1, dtype=torch.int64, device=cpu)
    places[tokens] = torch.arange(len(tokens), device=cpu)
    mask = None
    if any(shift):
        region = torch.zeros(rows, columns, device=cpu)
        count = 0
        for i in _bands(wh, shift[0]):
            for j in _bands(ww, shift[1]):
                region[i, j] = count
                count += 1
        of_window = cut(region)
        apart = of_window[:, None, :] != of_window[:, :, None]
        mask = torch.where(apart, MASKED, 0.0)
    return WindowLayout(tokens, places[:-1].clone(), mask, h * w < rows * columns)


def _bands(window: int, shift: int) -> tuple[slice, slice, slice]:
    """Rows of a shifted map by where they come from, as timm's slices."""
    return slice(0, -window), slice(-window, -shift), slice(-shift, None)


def relative_position_index(window: Pair) -> Tensor:
    """int64 [T·T]: the row of the table of position biases for every pair of places."""
    cpu = torch.device("cpu")
    h, w = window
    y = torch.arange(h, device=cpu).repeat_interleave(w)
    x = torch.arange(w, device=cpu).repeat(h)
    dy = y[:, None] - y[None, :] + h - 1
    dx = x[:, None] - x[None, :] + w - 1
    return (dy * (2 * w - 1) + dx).reshape(-1)


class Windows(nn.Module):
    """Cuts a map of tokens into windows and joins them again.

    Buffers:
        pad: fp32 [C], what stands at places without a token, or None if there are none. Zero, as
            timm has it, until the norm before the attention is folded: then what zero becomes.
        bias: float [1 or n, heads, T, T], derived: relative position bias and mask at `size`.
    """

    pad: Tensor | None
    tokens: Tensor
    places: Tensor
    mask: Tensor | None
    bias: Tensor
    index: Tensor

    def __init__(
        self, table: nn.Parameter, channels: int, size: Pair, window: Pair, shift: Pair, fixed: bool
    ) -> None:
        """Windows of maps of `size`; of any other size too unless `fixed`.

        Args:
            table: float [(2·wh − 1)·(2·ww − 1), heads], biases by relative position.
            channels: C, width of the tokens that are cut.
        """
        super().__init__()
        self.relative_position_bias_table = table
        self.size, self.window, self.shift = size, window, shift
        layout = window_layout(size, window, shift)
        self._padded = layout.padded
        pads = layout.padded or not fixed
        self.register_buffer("pad", table.new_zeros(channels) if pads else None)
        self.register_buffer("tokens", layout.tokens, persistent=False)
        self.register_buffer("places", layout.places, persistent=False)
        self.register_buffer("mask", layout.mask, persistent=False)
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(_refresh)  # type: ignore[no-untyped-call]

    def refresh(self) -> None:
        """Make the bias again, after the table was given new values."""
        self.register_buffer("bias", self._bias_of(self.mask), persistent=False)

    def layout(self, size: Pair) -> WindowLayout:
        """The layout of a map of `size`."""
        if size == self.size:
            return WindowLayout(self.tokens, self.places, self.mask, self._padded)
        made = window_layout(size, self.window, self.shift)
        device = self.tokens.device
        mask = None if made.mask is None else made.mask.to(device)
        return WindowLayout(made.tokens.to(device), made.places.to(device), mask, made.padded)

    def cut(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """[B, H, W, C] → [B·n, T, C], the windows of one image after another.

        Args:
            pad: [C], what stands at places without a token; the module's own if None.
        """
        b, h, w, c = x.shape
        layout = self.layout((h, w))
        flat = x.reshape(b, h * w, c)
        if layout.padded:
            filler = self.pad if pad is None else pad
            assert filler is not None
            flat = torch.cat([flat, filler.to(x.dtype).expand(b, 1, c)], dim=1)
        cut = flat.index_select(1, layout.tokens)
        return cut.reshape(-1, self.window[0] * self.window[1], c)

    def join(self, x: Tensor, size: Pair) -> Tensor:
        """[B·n, T, C] → [B, H, W, C]; what stands at padding is dropped."""
        h, w = size
        layout = self.layout(size)
        flat = x.reshape(-1, len(layout.tokens), x.shape[-1])
        # shape[0], not len, which torch.export takes for a constant.
        return flat.index_select(1, layout.places).reshape(flat.shape[0], h, w, x.shape[-1])

    def bias_at(self, size: Pair) -> Tensor:
        """float [1 or n, heads, T, T]: what is added to the scores of a map of `size`."""
        return self.bias if size == self.size else self._bias_of(self.layout(size).mask)

    def fold(self, apply: Callable[[Tensor], Tensor]) -> None:
        """Follow a change of the tokens that are cut, so that padding still stands for zero."""
        if self.pad is not None:
            self.pad = apply(self.pad)

    def _bias_of(self, mask: Tensor | None) -> Tensor:
        table = self.relative_position_bias_table.detach()
        places = self.window[0] * self.window[1]
        index = self.index.to(table.device)
        bias = table[index].reshape(1, places, places, -1).permute(0, 3, 1, 2).contiguous()
        return bias if mask is None else bias + mask[:, None].to(bias)

    def extra_repr(self) -> str:
        return f"size={self.size}, window={self.window}, shift={self.shift}"


def _refresh(windows: nn.Module, _: Any) -> None:
    assert isinstance(windows, Windows)
    windows.refresh()


def add_bias(scores: Tensor, bias: Tensor) -> Tensor:
    """scores [B·n, heads, T, T] + bias [n, heads, T, T], window by window."""
    images = scores.shape[0] // bias.shape[0]
    return (scores.reshape(images, *bias.shape) + bias).reshape(scores.shape)
