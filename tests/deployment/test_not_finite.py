"""NaN and infinity in what enters a deployed model come out as NaN, at every entry and backend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import erq
from erq.deployment.blocks import QuantBlock, module_by_module
from erq.deployment.modules import QuantAttention, QuantLinear
from erq_kernels import dispatch

# Triton's interpreter computes in numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

Build = Callable[..., Any]
VALUES = (math.nan, math.inf, -math.inf)
CONFIGS: dict[str, dict[str, Any]] = {
    "w4a4": {},
    "weights only": {"a_bits": 16},
    "pixels on codes": {"image_bits": 8},
    "float attention": {"attention": "float"},
    "float first block": {"overrides": {"blocks.0.*": {"a_bits": 16}}},
    "unequal widths": {"overrides": {"*.qk": {"a_bits": 5}}},
}


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that runs every op of the test; Triton interpreted where there is no GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, zero = torch.zeros(1), torch.zeros((), dtype=torch.int32)
    reason = dispatch.explain("quantize", x, x[0], zero, 4)[request.param]
    if reason.startswith("usable"):
        with dispatch.use(request.param):
            yield request.param
    else:
        pytest.skip(reason)


def spoilt(x: Tensor, index: int, value: float, place: int = 77) -> Tensor:
    """`x` with one value of entry `index` replaced."""
    out = x.clone()
    out[index].view(-1)[place] = value
    return out


@pytest.fixture(scope="module")
def nets(tiny_vit: Build, tiny_swin: Build) -> dict[str, Any]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    built = {n: erq.deploy(erq.quantize(tiny_vit(), images, c)) for n, c in CONFIGS.items()}
    return built | {"windows": erq.deploy(erq.quantize(tiny_swin(), images, "w4a4"))}


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "windows"])
def test_network(name: str, nets: dict[str, Any], backend: str) -> None:
    net, x = nets[name], torch.randn(3, 3, 16, 16)
    clean = net(x)
    for value, place in zip(VALUES, (0, 300, 767), strict=True):
        y = net(spoilt(x, 1, value, place))
        assert bool(y[1].isnan().all()), f"a plausible answer to {value}"
        assert torch.equal(y[[0, 2]], clean[[0, 2]]), "its neighbours changed"


@torch.no_grad()
@pytest.mark.parametrize("name", ["w4a4", "float attention", "unequal widths", "windows"])
def test_network_module_by_module(name: str, nets: dict[str, Any]) -> None:
    net, x = nets[name], torch.randn(2, 3, 16, 16)
    with module_by_module(net):
        y = net(spoilt(x, 1, math.nan))
    assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all())


@torch.no_grad()
def test_half_network(nets: dict[str, Any]) -> None:
    net = copy.deepcopy(nets["w4a4"]).half()
    x = torch.randn(2, 3, 16, 16).half()
    y = net(spoilt(x, 0, math.inf))
    assert y.dtype == torch.float16 and bool(y[0].isnan().all()) and bool(y[1].isfinite().all())
    layer = net.get_submodule("blocks.1.mlp.fc2")
    large = layer(torch.full((2, layer.in_features), 60_000.0, dtype=torch.float16))
    assert bool(large.isfinite().all()), "the sum of large values overflowed fp16"


@torch.no_grad()
def test_features_of_a_spoilt_image() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=32, depth=2, out_indices=(0, 1)
    )
    net = erq.deploy(erq.quantize(model.eval(), torch.randn(4, 3, 32, 32), "w4a4"))
    for part in net(spoilt(torch.randn(2, 3, 32, 32), 1, math.nan)):
        assert bool(part[1].isnan().all()) and bool(part[0].isfinite().all())


@torch.no_grad()
def test_layer(nets: dict[str, Any], backend: str) -> None:
    for name in ("w4a4", "weights only"):
        layer: QuantLinear = nets[name].get_submodule("blocks.1.mlp.fc2")
        x = torch.randn(2, 5, layer.in_features)
        clean = layer(x)
        for value in VALUES:
            bad = x.clone()
            bad[1, 3, 7] = value
            y = layer(bad)
            # A weight of 0 takes infinity to NaN, any other one to infinity: as floats would.
            assert not bool(y[1, 3].isfinite().any())
            good = torch.ones(2, 5, dtype=torch.bool)
            good[1, 3] = False
            assert torch.equal(y[good], clean[good])


@torch.no_grad()
def test_patch_embedding_and_attention(nets: dict[str, Any], backend: str) -> None:
    embedding = nets["pixels on codes"].get_submodule("patch_embed.proj")
    y = embedding(spoilt(torch.randn(2, 3, 16, 16), 1, math.nan, 0))
    assert bool(y[1, :, 0, 0].isnan().all()) and int(y.isnan().sum()) == y.shape[1]
    attention: QuantAttention = nets["w4a4"].get_submodule("blocks.0.attn")
    heads = [torch.randn(2, 2, 17, 12) for _ in range(3)]
    for which in range(3):
        given = [spoilt(h, 1, math.inf) if i == which else h for i, h in enumerate(heads)]
        y = attention.core(*given)
        assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all())


@torch.no_grad()
def test_later_block_keeps_the_rows_that_are_spoilt(nets: dict[str, Any], backend: str) -> None:
    block: QuantBlock = nets["w4a4"].get_submodule("blocks.1")
    y = block(spoilt(torch.randn(2, 17, 24), 1, math.nan, 24 * 3 + 5))
    assert bool(y[1, 3, 5].isnan()) and bool(y[0].isfinite().all())


@torch.no_grad()
def test_first_block_does_not_change_what_it_was_given(nets: dict[str, Any]) -> None:
    block: QuantBlock = nets["w4a4"].get_submodule("blocks.0")
    x = spoilt(torch.randn(2, 17, 24), 1, math.nan, 0)
    before = x.clone()
    assert bool(block(x)[1].isnan().all())
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))


def test_marking_leaves_no_gradient(nets: dict[str, Any]) -> None:
    layer = nets["w4a4"].get_submodule("blocks.1.mlp.fc2")
    y = layer(torch.randn(3, layer.in_features, requires_grad=True))
    assert not y.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("name", ["w4a4", "windows"])
def test_compiled_and_exported(name: str, nets: dict[str, Any]) -> None:
    net, x = nets[name], torch.randn(2, 3, 16, 16)
    bad = spoilt(x, 1, math.inf)
    torch.compiler.reset()
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        for run in (compiled, torch.export.export(net, (x,)).module()):
            y = run(bad)
            assert bool(y[1].isnan().all()) and torch.equal(y[0], net(x)[0])


@torch.no_grad()
def test_loaded_network(nets: dict[str, Any], tmp_path: Any) -> None:
    file = tmp_path / "net.safetensors"
    erq.save(nets["w4a4"], file)
    x = torch.randn(2, 3, 16, 16)
    for layout in ("int8", "packed"):
        y = erq.load(file, weights=layout)(spoilt(x, 1, math.nan))
        assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all())


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs(nets: dict[str, Any]) -> None:
    net = copy.deepcopy(nets["w4a4"]).cuda()
    graphed = erq.CudaGraphs(net, (2,))
    y = graphed(spoilt(torch.randn(2, 3, 16, 16), 1, math.nan).cuda())
    assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 16, 20), r"images are 16×20, the model takes 16×16"),
        (torch.zeros(1, 1, 16, 16), r"images have 1 channels, the model takes 3"),
        (torch.zeros(3, 16, 16), r"images must be a float tensor \[N, C, H, W\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), r"must be a float tensor"),
        (torch.zeros(1, 3, 16, 16).to_sparse(), r"that is not dense"),
        (torch.zeros(1, 3, 16, 16, device="meta"), r"that is not dense or has no data"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.float64), r"images are torch\.float64 on cpu"),
        ("images", r"must be a float tensor .* got str"),
    ],
)
def test_network_refuses_what_are_no_images(x: Any, message: str, nets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        nets["w4a4"](x)


@torch.no_grad()
def test_no_images_give_no_logits(nets: dict[str, Any]) -> None:
    for name in ("w4a4", "pixels on codes", "windows"):
        assert nets[name](torch.zeros(0, 3, 16, 16)).shape == (0, 5)
