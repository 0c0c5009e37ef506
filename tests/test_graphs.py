"""CUDA graphs of a deployed model: which graph a batch takes, and, on a GPU, what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import erq
from erq import graphs
from erq.graphs import CudaGraphs, Graph

Build = Callable[..., VisionTransformer]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the graphs replayed since; a stand-in computes on a CPU what they would."""
    sizes: list[int] = []

    def capture(net: nn.Module, images: Tensor) -> Graph:
        result = net(images).clone()

        def replay() -> None:
            sizes.append(len(images))
            result.copy_(net(images))

        return Graph(images, result, replay)

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "placement", lambda net: (torch.device("cuda"), torch.float32))
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device=None, **kw: real(*shape, **kw))
    return sizes


@torch.no_grad()
def test_a_batch_takes_the_smallest_graph_that_holds_it(
    tiny_vit: Build, replayed: list[int]
) -> None:
    net = tiny_vit()
    graphed = CudaGraphs(net, (4, 1, 4), input_shape=(3, 16, 16))
    assert graphed.batch_sizes == (1, 4)
    for batch, used in ((1, [1]), (2, [4]), (4, [4]), (5, [])):
        x = torch.randn(batch, 3, 16, 16)
        replayed.clear()
        torch.testing.assert_close(graphed(x), net(x))
        assert replayed == used
    first = graphed(torch.randn(4, 3, 16, 16))
    kept = first.clone()
    second = graphed(torch.randn(4, 3, 16, 16))
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, kept)


@torch.no_grad()
def test_other_images_are_refused(tiny_vit: Build, replayed: list[int]) -> None:
    graphed = CudaGraphs(tiny_vit(), (2,), input_shape=(3, 16, 16))
    for x in (torch.randn(2, 3, 16, 20), torch.randn(1, 3, 16, 16).double()):
        with pytest.raises(ValueError, match=r"the graphs take \[≤ 2, 3, 16, 16\] torch\.float32"):
            graphed(x)
    assert not replayed


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((), "batch_sizes is empty"), ((0,), "batch sizes must be integers >= 1, got 0")],
)
def test_bad_sizes(sizes: tuple[int, ...], message: str, tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=message):
        CudaGraphs(tiny_vit(), sizes)


def test_a_model_on_the_cpu_is_refused(tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match="need a model on a CUDA device, got one on cpu"):
        erq.CudaGraphs(tiny_vit(), (1,))


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_compute_what_the_model_computes(tiny_vit: Build) -> None:
    sim = erq.quantize(tiny_vit(embed_dim=64), torch.randn(4, 3, 16, 16), "w4a4")
    net: Any = erq.deploy(sim.cuda())
    graphed = erq.CudaGraphs(net, (1, 4), input_shape=(3, 16, 16))
    for batch in (1, 3, 4, 6):
        x = torch.randn(batch, 3, 16, 16, device="cuda")
        want = net(x)
        assert torch.equal(graphed(x), want)
    x = torch.randn(4, 3, 16, 16, device="cuda")
    graphed(x)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        graphed(x)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
