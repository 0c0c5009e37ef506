"""Streams of activations at a block boundary, and what enters a site when a block runs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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
        self._ahead: set[int] = set()
        self._kept: dict[int, tuple[nn.Module, tuple[Tensor, ...]]] = {}

    def head(self, images: int) -> Stream:
        """The stream of the first `images` images; shares memory until it advances."""
        out, left = [], images
        for chunk in self.chunks:
            if left <= 0:
                break
            out.append(chunk[:left])
            left -= len(chunk)
        head = Stream(out, self.ranks)
        if left <= 0 and len(out[-1]) < len(self.chunks[len(out) - 1]):
            return head
        head._kept = self._kept  # the same chunks, whole
        return head

    @torch.no_grad()
    def advance(self, run: Run) -> None:
        """Replace every chunk of this rank by the block's output for it."""
        for i, chunk in enumerate(self.chunks):
            if not chunk.is_meta and i not in self._ahead:
                self._replace(i, run(chunk))
        self._owned = True
        self._ahead.clear()
        self._kept.clear()

    def inputs(
        self, run: Run, *sites: nn.Module, keep: bool = False, last: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """What enters the sites, one site's arguments behind the other's, when the block runs on
        each chunk of this rank; nothing after the last site is computed.

        Args:
            keep: the same is asked for once more, of one site and with nothing changed before it.
            last: nothing else is asked for in this block: compute all of it and replace each chunk,
                as `advance` does, once the next one's inputs are asked for.
        """
        for i, chunk in enumerate(self.chunks):
            if chunk.is_meta:
                continue
            site, found = self._kept.pop(i, (None, ()))
            if len(sites) != 1 or site is not sites[0]:
                found, out = observe(run, sites, chunk, stop=not last)
            else:
                out = None
            if keep:
                self._kept[i] = sites[0], found
            yield found
            if out is not None:
                self._replace(i, out)
                self._ahead.add(i)

    def _replace(self, i: int, out: Tensor) -> None:
        chunk = self.chunks[i]
        if self._owned and out.shape == chunk.shape:
            # Into the old memory: chunks that come and go between the blocks' temporaries would
            # leave the heap in pieces.
            chunk.copy_(out)
        else:
            self.chunks[i] = out


@torch.no_grad()
def observe(
    run: Run, sites: Sequence[nn.Module], x: Tensor, stop: bool = True
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The positional inputs of the sites in run(x), in the order of the sites.

    Args:
        stop: stop at the last of them, which then must be the last to be called.

    Returns:
        The inputs, and what run(x) gives, or None if it was stopped.

    Raises:
        RuntimeError: the block never calls one of the sites.
    """
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}

    def hook(site: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[site] = args
        if stop and site is sites[-1]:
            raise _Stop

    handles = [site.register_forward_pre_hook(hook) for site in sites]
    out = None
    try:
        out = run(x)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(sites):
        raise RuntimeError("the block's forward pass does not reach the observed site")
    return tuple(a for site in sites for a in seen[site]), out
