"""Other engines compute what torch computes, or say why they cannot run here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from erq import engines
from erq.engines import ENGINES, EngineError, start

Build = Callable[..., VisionTransformer]


def logits(result: Any) -> torch.Tensor:
    first = result[0] if isinstance(result, list) else result
    if not isinstance(first, torch.Tensor):
        first = torch.from_numpy(next(iter(first.values())) if hasattr(first, "values") else first)
    return first.float()


@pytest.mark.parametrize("name", [*ENGINES, "torch-bf16"])
@torch.inference_mode()
def test_engines_run_the_model(name: str, tiny_vit: Build) -> None:
    if name in ("compile", "torchao"):
        pytest.skip("compiles C++ for half a minute; bench/models.py runs it")
    model, x = tiny_vit(), torch.randn(2, 3, 16, 16)
    try:
        run = start(name, model, x)
    except EngineError as error:
        assert "not installed: pip install 'erq[bench]'" in str(error)
        pytest.skip(str(error))
    want, got = model(x), logits(run())
    assert got.shape == want.shape
    assert (got - want).abs().mean() < 0.1 * want.abs().mean()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["tensorflow", "torch-fp8", ""])
def test_unknown_engine(name: str, tiny_vit: Build) -> None:
    with pytest.raises(ValueError, match=f"unknown engine '{name}'; choose from torch, compile, "):
        start(name, tiny_vit(), torch.randn(1, 3, 16, 16))


def test_what_is_not_installed_is_named(tiny_vit: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"openvino, nncf not installed: pip install 'erq\[be"):
        start("openvino", tiny_vit(), torch.randn(1, 3, 16, 16))


def test_whatever_a_library_raises_is_one_error(
    tiny_vit: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("deep inside\nmore")

    monkeypatch.setitem(engines.ENGINES, "torch", broken)
    with pytest.raises(EngineError, match=r"^torch: KeyError: 'deep inside"):
        start("torch", tiny_vit(), torch.randn(1, 3, 16, 16))
