"""bench/ablate.py: settings by name, pairs of draws, quantizers switched off, and its networks."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erq.pipeline import quantize

pytest.importorskip("sklearn")
BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def ablate() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module("ablate")


@pytest.fixture(scope="module")
def scenes(ablate: Any) -> Any:
    return sys.modules["scenes"]


def test_a_setting_is_what_its_name_says(ablate: Any) -> None:
    parse = ablate.Change.parse
    assert parse("default") == ablate.Change({})
    assert parse("rotate_heads=false ranges=official ridge_act=0.3").fields == {
        "rotate_heads": False,
        "ranges": "official",
        "ridge_act": 0.3,
    }
    assert parse("head*:w_bits=8,a_bits=8 *.qkv:a_bits=8").fields == {
        "overrides": {"head*": {"w_bits": 8, "a_bits": 8}, "*.qkv": {"a_bits": 8}}
    }
    assert parse("operand=k").operand == "k"
    for bad in ("refine", "operand=x", "*.qkv:a_bits"):
        with pytest.raises(ValueError, match="is"):
            parse(bad)


def test_every_known_setting_is_one_of_the_config(ablate: Any) -> None:
    for name in (*ablate.SETTINGS, *ablate.KINDS.values()):
        ablate.QuantConfig.preset("w4a4", **ablate.Change.parse(name).fields)


def test_parts_of_a_network(
    ablate: Any, tiny_vit: Callable[..., Any], tiny_swin: Callable[..., Any]
) -> None:
    parts = ablate.loss_parts(ablate.site_names(tiny_vit()))
    assert parts["blocks.1"] == "blocks.1.*:w_bits=8,a_bits=8"
    assert "blocks.2" not in parts and "input of patch merging" not in parts
    swin = ablate.loss_parts(ablate.site_names(tiny_swin()))
    assert "layers.1.blocks.1" in swin and "input of patch merging" in swin


@pytest.mark.parametrize("operand", ["", "q", "k", "p", "v"])
def test_one_operand_of_attention_is_switched_off(
    ablate: Any, tiny_vit: Callable[..., Any], operand: str
) -> None:
    with ablate.operand_off(operand):
        sim = quantize(tiny_vit(), torch.randn(4, 3, 16, 16), "w4a4")
    attention: Any = sim.get_submodule("blocks.0.attn")
    bits = {
        "q": attention.qk.q_params.bits,
        "k": attention.qk.k_params.bits,
        "p": attention.av.p_params.bits,
        "v": attention.av.v_params.bits,
    }
    assert bits == dict.fromkeys("qkpv", 4) | ({operand: 8} if operand else {})


def test_differences_are_paired_by_draw(ablate: Any) -> None:
    def row(setting: str, draw: int, top1: float, kl: float) -> dict[str, Any]:
        return {"setting": setting, "draw": draw, "tested": 9, "top1": top1, "kl": kl}

    rows = [row("default", d, 90 + d, 0.1 * (d + 1)) for d in range(3)]
    rows += [row("refine=off", d, 89 + d, 0.2 * (d + 1)) for d in (0, 2)]
    rows.append(row("refine=off", 1, 50, 9.0) | {"tested": 5})
    pair = ablate.Paired.of(rows, "refine=off")
    # Draw 1 has no partner on the same images; what draws share leaves no spread in differences.
    assert pair.draws == 2
    assert pair.top1 == (90, pytest.approx(math.sqrt(2)))
    assert pair.top1_change == (-1, 0)
    assert pair.kl_change == pytest.approx((100, 0))
    assert ablate.Paired.of(rows, "aqer=false") is None


def test_scenes_follow_from_their_seed_and_show_the_split(scenes: Any) -> None:
    x, classes = scenes.scenes("test", 64, 1)
    again, _ = scenes.scenes("test", 64, 1)
    assert torch.equal(x, again) and x.shape == (64, 1, 24, 24)
    assert not torch.equal(x, scenes.scenes("test", 64, 2)[0])
    assert len(classes.unique()) == 10
    train, test = (scenes._digits()[split][0] for split in ("train", "test"))
    assert (len(train), len(test)) == (1000, 797)
    # The stream is numpy's frozen one: the same scenes wherever this runs.
    assert classes[:12].tolist() == CLASSES
    assert float(x.double().mean()) == pytest.approx(MEAN, abs=1e-6)


CLASSES = [2, 3, 2, 4, 0, 3, 5, 5, 8, 8, 1, 2]
MEAN = -0.094042


@pytest.mark.parametrize("name", ["vit", "vit-outliers", "swin"])
def test_committed_networks_know_their_task(scenes: Any, ablate: Any, name: str) -> None:
    task = scenes.scenes_task(name)
    assert task.calib.shape == (512, 1, 24, 24)
    right = (ablate.logits(task.model, task.test[:256]).argmax(1) == task.labels[:256]).float()
    assert float(right.mean()) > 0.6


def test_a_run_is_recorded_once_and_tabled(
    ablate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ERQ_RESULTS", str(tmp_path))
    size = ("--bits", "w3a4", "--draws", "1", "--tested", "32")
    command = ["ablate", "--networks", "vit", *size, "--settings", "default; method=rtn"]
    monkeypatch.setattr(sys, "argv", command)
    ablate.main()
    (file,) = tmp_path.rglob("ablate.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["setting"] for r in rows] == ["default", "method=rtn"]
    assert rows[1]["kl"] > rows[0]["kl"] > 0
    shown = capsys.readouterr().out
    assert "| W3A4 | vit |" in shown and "| `method=rtn` |" in shown
    ablate.main()
    assert len(file.read_text().splitlines()) == 2
