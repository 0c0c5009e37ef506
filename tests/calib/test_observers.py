"""Streams advance block by block and stop at a site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from erq.calib.observers import Stream, observe
from erq.ranks import Ranks


class Counting(nn.Module):
    """Adds one and counts its calls."""

    calls = 0

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x + 1 if y is None else x + y


def test_head_shares_the_first_images() -> None:
    chunks = [torch.arange(3), torch.arange(3, 6), torch.arange(6, 8)]
    stream = Stream(chunks)
    for n, sizes in ((1, [1]), (3, [3]), (5, [3, 2]), (100, [3, 3, 2])):
        head = stream.head(n)
        assert [len(c) for c in head.chunks] == sizes
        assert torch.cat(head.chunks).tolist() == list(range(min(n, 8)))
        assert head.chunks[0].data_ptr() == chunks[0].data_ptr()


def test_advancing_a_head_leaves_the_stream() -> None:
    stream = Stream([torch.zeros(2), torch.zeros(2)])
    stream.head(3).advance(lambda x: x + 1)
    assert not torch.cat(stream.chunks).any()
    stream.advance(lambda x: x + 1)
    assert torch.cat(stream.chunks).tolist() == [1.0] * 4


def test_inputs_of_a_site_and_nothing_behind_it() -> None:
    first, site, behind = Counting(), Counting(), Counting()

    def run(x: Tensor) -> Tensor:
        return behind(site(first(x), 2 * x))

    stream = Stream([torch.ones(2), torch.full((1,), 5.0)])
    seen = list(stream.inputs(run, site))
    assert [[t.tolist() for t in args] for args in seen] == [
        [[2.0, 2.0], [2.0, 2.0]],
        [[6.0], [10.0]],
    ]
    assert (first.calls, site.calls, behind.calls) == (2, 0, 0)


def test_inputs_of_two_sites_in_one_pass() -> None:
    first, site, behind = Counting(), Counting(), Counting()
    stream = Stream([torch.ones(2)])
    (seen,) = stream.inputs(lambda x: behind(site(first(x), 2 * x)), first, site)
    assert [t.tolist() for t in seen] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert (first.calls, site.calls, behind.calls) == (1, 0, 0)


def test_kept_inputs_are_given_once_more_and_no_longer() -> None:
    first, site = Counting(), Counting()

    def run(x: Tensor) -> Tensor:
        return site(first(x))

    stream = Stream([torch.ones(2), torch.ones(2), torch.ones(2)])
    kept = list(stream.head(4).inputs(run, site, keep=True))
    assert first.calls == 2
    again = list(stream.inputs(run, site))
    assert first.calls == 3  # for the third chunk alone
    assert [a[0] is b[0] for (a, b) in zip(again, kept, strict=False)] == [True, True]
    list(stream.inputs(run, site))
    assert first.calls == 6
    # Another site's are not mistaken for them, those of a chunk cut short not for a whole one's.
    list(stream.head(4).inputs(run, first, keep=True))
    assert [len(args) for args in stream.inputs(run, site)] == [1, 1, 1]
    list(stream.head(3).inputs(run, site, keep=True))
    assert [len(x) for (x,) in stream.inputs(run, site)] == [2, 2, 2]
    # After a step they are those of another block.
    list(stream.inputs(run, site, keep=True))
    stream.advance(lambda x: 3 * x)
    assert [x.tolist() for (x,) in stream.inputs(run, site)] == [[4.0, 4.0]] * 3


def test_the_last_inputs_take_the_stream_along() -> None:
    first, site = Counting(), Counting()
    images = torch.zeros(2)
    stream = Stream([images, torch.zeros(1)])
    for expected in (0.0, 2.0):  # the caller's images, then chunks of the stream's own
        site.calls = 0
        seen = list(stream.inputs(lambda x: site(first(x)), site, last=True))
        assert [x.tolist() for (x,) in seen] == [[expected + 1] * 2, [expected + 1]]
        assert site.calls == 2
        stream.advance(lambda x: site(first(x)))
        assert site.calls == 2  # all chunks are there already
        assert torch.cat(stream.chunks).tolist() == [expected + 2] * 3
    assert not images.any()
    # A reader that stops early leaves the rest to advance().
    next(stream.inputs(lambda x: site(first(x)), site, last=True))
    stream.advance(lambda x: site(first(x)))
    assert torch.cat(stream.chunks).tolist() == [6.0] * 3


def test_no_gradient_and_no_hook_stay_behind() -> None:
    linear = nn.Linear(3, 3)
    stream = Stream([torch.ones(1, 3)])
    stream.advance(linear)
    assert not stream.chunks[0].requires_grad
    observe(linear, (linear,), torch.ones(1, 3))

    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError("of the model itself")

    with pytest.raises(ArithmeticError, match="of the model itself"):
        observe(fail, (linear,), torch.ones(1))
    with pytest.raises(RuntimeError, match="does not reach the observed site"):
        observe(nn.Identity(), (linear,), torch.ones(1))
    assert not linear._forward_pre_hooks


def test_chunks_of_other_ranks_are_shapes() -> None:
    ranks = Ranks(1, 2)
    stream = Stream([torch.empty(2, 3, device="meta"), torch.ones(2, 3)], ranks)
    head = stream.head(3)
    assert head.ranks is ranks and [c.is_meta for c in head.chunks] == [True, False]
    assert [len(c) for c in head.chunks] == [2, 1]
    linear = nn.Linear(3, 3)
    seen = list(stream.inputs(lambda x: linear(2 * x), linear))
    assert [[t.tolist() for t in args] for args in seen] == [[[[2.0] * 3] * 2]]
    stream.advance(lambda x: x + 1)
    assert stream.chunks[0].is_meta and stream.chunks[1].tolist() == [[2.0] * 3] * 2
