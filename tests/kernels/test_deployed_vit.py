"""Whole deployed networks, each backend against the reference, op by op and from end to end."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import erq
from erq.data import DEMO_FOLDER, open_images
from erq.deployment.blocks import QuantBlock
from erq.inputs import preprocessing
from erq.loading import load_model
from erq_kernels import dispatch

# Of codes whose rounding depends on a LayerNorm, a GELU or a softmax, so many may differ by one.
FLIPS = 1e-4


@dataclass(frozen=True)
class Call:
    op: str
    args: tuple[Any, ...]
    result: Tensor


def run(net: Any, x: Tensor, backend: str, one_by_one: bool = True) -> tuple[Tensor, list[Call]]:
    """Output of `net` on `backend`, and every op that it called.

    Args:
        one_by_one: run the ops of a block by themselves, also where one call could run them all.
    """
    calls: list[Call] = []
    real = dispatch.call

    def call(op: str, forced: str, *args: Any) -> Any:
        result = real(op, forced, *args)
        calls.append(Call(op, args, result))
        return result

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), dispatch.use(backend):
        patch.setattr(dispatch, "call", call)
        if one_by_one:
            patch.setattr(QuantBlock, "runs_at_once", lambda *_: False)
        return net(x), calls


def check(net: Any, x: Tensor, backend: str) -> None:
    """The same codes at every site up to a rounding that differs; and each op, given the
    reference's inputs, its codes."""
    want, expected = run(net, x, "reference")
    got, calls = run(net, x, backend)
    assert [c.op for c in calls] == [c.op for c in expected]
    same = True  # no code has moved yet; one that did may move any number of those made of it
    for mine, reference in zip(calls, expected, strict=True):
        again = dispatch.call(reference.op, backend, *reference.args)
        for result in (again, mine.result) if same else (again,):
            assert result.dtype == reference.result.dtype
            if result.dtype == torch.int8:
                moved = (result.int() - reference.result.int()).abs()
                assert int(moved.max()) <= 1
                assert float((moved > 0).float().mean()) <= FLIPS
            else:
                torch.testing.assert_close(result, reference.result, rtol=1e-3, atol=1e-3)
        if mine.result.dtype == torch.int8:
            same = same and torch.equal(mine.result, reference.result)
    assert torch.equal(got.argmax(dim=1), want.argmax(dim=1))


@cache
def golden_size() -> tuple[Any, Tensor]:
    """A network of the size of the golden files: 2 blocks of 64 channels, 17 tokens."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, num_classes=10, embed_dim=64, depth=2, num_heads=4
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p) * (0.2 if p.dim() < 2 else p.shape[-1] ** -0.5)
            p.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    images = torch.randn(12, 3, 32, 32)
    return erq.deploy(erq.quantize(model, images[:8], "w4a4")), images[8:]


@cache
def demo() -> tuple[Any, Tensor]:
    """The shipped network and four of its test images."""
    model = load_model(str(DEMO_FOLDER / "vit_digits.safetensors"), device=torch.device("cpu"))
    recipe = preprocessing(model)
    data = str(DEMO_FOLDER / "digits.npz")
    calibration, test = open_images(f"{data}:calib_images"), open_images(data)
    sim = erq.quantize(model, calibration.batches(recipe, calibration.draw(16, seed=0)), "w4a4")
    images, _ = next(iter(test.batches(recipe)))
    return erq.deploy(sim), images[:4]


@cache
def swin() -> tuple[Any, Tensor]:
    """Shifted and padded windows: maps of 10×8 and 5×4 tokens in windows of 4×4."""
    torch.manual_seed(0)
    model = SwinTransformer(
        img_size=(20, 16), patch_size=2, num_classes=10, embed_dim=32, depths=(2, 2),
        num_heads=(2, 4), window_size=4, mlp_ratio=2.0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p) * (0.2 if p.dim() < 2 else p.shape[-1] ** -0.5)
            p.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    images = torch.randn(10, 3, 20, 16)
    return erq.deploy(erq.quantize(model, images[:8], "w4a4")), images[8:]


@pytest.mark.parametrize("network", [golden_size, demo, swin])
def test_codes_of_the_reference(network: Any, device: torch.device) -> None:
    net, x = network()
    check(net.to(device), x.to(device), dispatch.chosen())
    net.to("cpu")


@pytest.mark.parametrize("network", [golden_size, demo])
def test_a_block_at_once_equals_its_ops(network: Any, cpu_variant: str) -> None:
    net, x = network()
    before = torch.get_num_threads()
    try:
        for images in (1, 3, 4):
            want, _ = run(net, x[:images], "cpu")
            # More and fewer threads than images, and images left over.
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                got, calls = run(net, x[:images], "cpu", one_by_one=False)
                assert [c.op for c in calls].count("block") == len(net.blocks)
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_at_once_in_half_precision(dtype: torch.dtype, cpu_variant: str) -> None:
    net, _ = golden_size()
    x = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    want, _ = run(net.blocks[0], x, "cpu")
    got, calls = run(net.blocks[0], x, "cpu", one_by_one=False)
    assert [c.op for c in calls] == ["block"]
    assert got.dtype == dtype and torch.equal(got, want)


def test_a_block_at_once_follows_new_values(cpu_variant: str) -> None:
    net, x = golden_size()
    net = copy.deepcopy(net)
    first, _ = run(net, x, "cpu", one_by_one=False)
    net.blocks[0].mlp.fc1.operands.weight.neg_()
    net.blocks[1].norm1.weight.data = net.blocks[1].norm1.weight.data.flip(0)
    net.blocks[1].attn.qk.factor *= 2
    want, _ = run(net, x, "cpu")
    got, _ = run(net, x, "cpu", one_by_one=False)
    assert torch.equal(got, want) and not torch.equal(got, first)


def test_where_a_block_does_not_run_at_once(cpu_variant: str) -> None:
    net, x = golden_size()
    block, rows = net.blocks[0], torch.randn(2, 17, 64)
    assert block.runs_at_once(rows)
    assert not block.runs_at_once(rows.double())
    assert not block.runs_at_once(rows[None])
    with dispatch.use("reference"):
        assert not block.runs_at_once(rows)
    # Through torch's dispatcher, which a compiler or a gradient needs.
    with dispatch.use("cpu"):
        assert torch.equal(net(x), run(net, x, "cpu")[0])
        exported = torch.export.export(net, (x,)).module()(x)
    assert torch.equal(exported, run(net, x, "cpu")[0])
    other = copy.deepcopy(block)
    other.mlp.fc1.layout = "packed"
    assert not other.runs_at_once(rows)
    other = copy.deepcopy(block)
    other.attn.qk.backend = "reference"
    assert not other.runs_at_once(rows)
    with pytest.raises(ValueError, match="widths"):
        ops_of_another_width = torch.randn(2, 17, 32)
        dispatch.call("block", "cpu", ops_of_another_width, block._arguments())
