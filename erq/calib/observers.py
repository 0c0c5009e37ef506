"""Streams of activations at a block boundary, and what enters a site when a block runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from erq.ranks import ALONE, Ranks

Run = Callable[[Tensor], Tensor]
"""One block as a function of its input."""


class _Stop(Exception):
    """Ends a block's forward pass at the observed site."""


class Stream:
    """A batch of activations at one block boundary, in chunks of images.

    Args:
        chunks: float tensors [b, …]; these first ones belong to the caller and are not written to.
            Those that are another rank's are on the meta device: a shape without data.
        ranks: whose chunks these are, part i of `ranks` being chunk i.
    """

    def __init__(self, chunks: list[Tensor], ranks: Ranks = ALONE) -> None:
        self.chunks = chunks
        self.ranks = ranks
        self._owned = False

    def head(self, images: int) -> Stream:
        """The stream of the first `images` images; shares memory until it advances."""
        out, left = [], images
        for chunk in self.chunks:
            if left <= 0:
                break
            out.append(chunk[:left])
            left -= len(chunk)
        return Stream(out, self.ranks)

    @torch.no_grad()
    def advance(self, run: Run) -> None:
        """Replace every chunk of this rank by the block's output for it."""
        for i, chunk in enumerate(self.chunks):
            if chunk.is_meta:
                continue
            out = run(chunk)
            if self._owned and out.shape == chunk.shape:
                # Into the old memory: chunks that come and go between the blocks' temporaries
                # would leave the heap in pieces.
                chunk.copy_(out)
            else:
                self.chunks[i] = out
        self._owned = True

    def inputs(self, run: Run, site: nn.Module) -> Iterator[tuple[Tensor, ...]]:
        """What enters `site` when the block runs on each chunk of this rank; nothing after it is
        computed."""
        for chunk in self.chunks:
            if not chunk.is_meta:
                yield observe(run, site, chunk)


@torch.no_grad()
def observe(run: Run, site: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The positional inputs of `site` in run(x), which stops there.

    Raises:
        RuntimeError: the block never calls the site.
    """
    seen: list[tuple[Tensor, ...]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args)
        raise _Stop

    handle = site.register_forward_pre_hook(hook)
    try:
        run(x)
    except _Stop:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError("the block's forward pass does not reach the observed site")
