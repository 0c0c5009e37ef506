"""The shipped network, quantized and deployed, on the emulated CUDA library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import Emulation

import erq
from erq.data import DEMO_FOLDER, open_images
from erq.deployment.blocks import QuantBlock
from erq.deployment.modules import QuantLinear
from erq.inputs import preprocessing
from erq.loading import load_model
from erq_kernels import dispatch


def quantized(config: str) -> tuple[Any, torch.Tensor]:
    model = load_model(str(DEMO_FOLDER / "vit_digits.safetensors"), device=torch.device("cpu"))
    recipe = preprocessing(model)
    data = str(DEMO_FOLDER / "digits.npz")
    calibration, test = open_images(f"{data}:calib_images"), open_images(data)
    sim = erq.quantize(model, calibration.batches(recipe, calibration.draw(16, seed=0)), config)
    images, _ = next(iter(test.batches(recipe)))
    return sim, images[:2]


@pytest.mark.parametrize(("config", "packs"), [("w4a4", True), ("w3a4", True), ("w8a8", False)])
def test_a_whole_network(
    config: str, packs: bool, emulation: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sim, images = quantized(config)
    net = erq.deploy(sim)
    layers = [m for m in net.modules() if isinstance(m, QuantLinear) and m.x_scale is not None]
    assert all(layer.kernel() == "cuda" for layer in layers)
    # A row whose zero point lies outside its codes does not share 4 bits with the 0 of padding.
    assert sum(layer.packs_codes() for layer in layers) >= (len(layers) - 1 if packs else 0)
    assert packs or not any(layer.packs_codes() for layer in layers)
    calls: list[tuple[str, torch.dtype]] = []
    real = dispatch.call

    def call(op: str, backend: str, *args: Any) -> Any:
        if op == "qlinear":
            calls.append((dispatch.select(op, backend, *args), args[0].dtype))
            return real(op, backend, *args)
        # A norm or a softmax of another backend may move a code that lies on a boundary.
        return real(op, "reference", *args)

    monkeypatch.setattr(dispatch, "call", call)
    # The images lie on the CPU, whose library would take whole blocks.
    monkeypatch.setattr(QuantBlock, "runs_at_once", lambda *_: False)
    with torch.no_grad():
        got = net(images)
        seen = list(calls)
        with dispatch.use("reference"):
            want = net(images)
    assert {backend for backend, _ in seen} == {"cuda"}
    packed = sum(dtype == torch.uint8 for _, dtype in seen)
    # Of four GEMMs in each of eight blocks; the head's input is not the result of an op on codes.
    assert packed >= 31 if packs else packed == 0
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_weight_only(emulation: Emulation) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(96, 40), torch.nn.GELU(), torch.nn.Linear(40, 8))
    erq.swap_linears(model, "w3a16", filter=lambda name, _: name == "0")
    x = torch.randn(5, 96)
    with torch.no_grad():
        got = model(x)
        with dispatch.use("reference"):
            want = model(x)
    assert model[0].kernel() == "cuda"
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
