"""Several deployed models in one process, called from several threads, give the same bits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import erq
from erq.deployment.network import set_layout
from erq_kernels import _cpu

SHAPE: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10,
}  # fmt: skip
BATCHES = (1, 3, 5, 7, 13)
THREADS = 4
ROUNDS = 3


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(13, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models(images: Tensor) -> dict[str, nn.Module]:
    """Two models of other weights and other kernels."""
    if not _cpu.supported_variants():
        pytest.skip("the CPU library is not built")
    nets = {}
    for seed, bits in enumerate(("w4a4", "w3a16")):
        torch.manual_seed(seed)
        pixels = {} if bits == "w3a16" else {"image_bits": 8}
        config = erq.QuantConfig.preset(bits, method="repq", **pixels)
        sim = erq.quantize(VisionTransformer(**SHAPE).eval(), images[:4], config)
        nets[bits] = erq.deploy(sim, "cpu")
    return nets


def run(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return [net(images[:b]) for b in BATCHES]


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """Results of `work` for 0, 1, … of threads that start at once."""
    results: list[Any] = [None] * THREADS
    go = threading.Barrier(THREADS)

    def call(index: int) -> None:
        go.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def check(got: Any, want: list[Tensor]) -> None:
    assert not isinstance(got, Exception), got
    assert len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("layout", ["int8", "packed"])
def test_first_calls_from_several_threads(
    layout: str, models: dict[str, nn.Module], images: Tensor
) -> None:
    """Whatever a model makes on its first call is made once, or as well by each."""
    for net in models.values():
        set_layout(net, layout)
        want = run(copy.deepcopy(net), images)
        for _ in range(ROUNDS):
            fresh = copy.deepcopy(net)
            for got in in_threads(lambda _, fresh=fresh: run(fresh, images)):
                check(got, want)


def test_two_models_called_from_several_threads(
    models: dict[str, nn.Module], images: Tensor
) -> None:
    nets = list(models.values())
    want = [run(net, images) for net in nets]
    for _ in range(ROUNDS):
        for index, got in enumerate(in_threads(lambda i: run(nets[i % 2], images))):
            check(got, want[index % 2])


def test_two_models_in_turns(models: dict[str, nn.Module], images: Tensor) -> None:
    want = {name: run(net, images) for name, net in models.items()}
    with torch.inference_mode():
        for i, batch in enumerate(BATCHES):
            for name, net in models.items():
                assert torch.equal(net(images[:batch]), want[name][i])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_an_image_has_one_answer(
    threads: int, models: dict[str, nn.Module], images: Tensor
) -> None:
    """On codes from the pixels on, neither the batch nor the threads move a bit of it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode():
            alone = torch.cat([models["w4a4"](image[None]) for image in images])
        torch.set_num_threads(threads)
        check(run(models["w4a4"], images), [alone[:b] for b in BATCHES])
    finally:
        torch.set_num_threads(before)
