"""The golden check passes on the authors' results, fails on changed ones, refuses anything else."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "check.py"
GOLDEN = HERE / "vit_w4a4.npz"

Arrays = dict[str, np.ndarray[Any, Any]]

SWIN = HERE / "swin_w4a4.npz"

LAYERS = [
    "patch_embed.proj",
    *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "head",
]
MATMULS = [f"blocks.{i}.attn.{n}" for i in (0, 1) for n in ("qk", "av")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_check", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    with np.load(GOLDEN) as archive:
        return {name: archive[name] for name in archive.files}


SWIN_BLOCKS = [f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
SWIN_LAYERS = [
    "patch_embed.proj",
    *(f"{b}.{n}" for b in SWIN_BLOCKS for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "layers.1.downsample.reduction",
    "head.fc",
]
SWIN_MATMULS = [f"{b}.attn.{n}" for b in SWIN_BLOCKS for n in ("qk", "av")]


def rows_of(text: str) -> dict[tuple[str, str], str]:
    """(stage, layer) → verdict of a printed report."""
    table = [line.split() for line in text.splitlines()]
    return {(c[0], c[1]): c[-1] for c in table if c and c[-1] in ("ok", "tie", "FAIL")}


@pytest.mark.parametrize(
    ("name", "layers", "matmuls"),
    [
        ("vit_w4a4", LAYERS, MATMULS),
        ("vit_w3a4", LAYERS, MATMULS),
        pytest.param("swin_w4a4", SWIN_LAYERS, SWIN_MATMULS, marks=pytest.mark.slow),
    ],
)
def test_published_results_pass(
    check: ModuleType,
    name: str,
    layers: list[str],
    matmuls: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check.main([str(HERE / f"{name}.npz")]) == 0
    rows = rows_of(capsys.readouterr().out)
    expected = {("fp", "network")}
    expected |= {(s, layer) for s in ("reparam", "aqer", "wq", "final") for layer in layers}
    expected |= {("act", layer) for layer in [*layers[1:], *matmuls]}
    assert rows.keys() == expected
    assert set(rows.values()) == {"ok"}


def scaled(name: str, factor: float) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {name: arrays[name] * np.float32(factor)}


def largest_scaled(name: str, factor: float) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        changed = arrays[name].copy()
        changed.flat[np.abs(changed).argmax()] *= np.float32(factor)
        return {name: changed}

    return change


def code_moved(layer: str) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        weight, step = arrays[f"final.{layer}.weight"].copy(), arrays[f"wq.{layer}.delta"]
        weight[3, 5] -= np.copysign(step[3, 0], weight[3, 5])
        return {f"final.{layer}.weight": weight}

    return change


def column_swapped(layer: str) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        columns = arrays[f"wq.{layer}.outlier_columns"].copy()
        columns[-1] = next(c for c in range(64) if c not in columns)
        return {f"wq.{layer}.outlier_columns": columns}

    return change


def meta_changed(**fields: Any) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        return {"meta": np.array(json.dumps(json.loads(str(arrays["meta"])) | fields))}

    return change


@pytest.mark.parametrize(
    ("change", "stage", "layer"),
    [
        (scaled("act.blocks.1.attn.matmul1.quantizer_B.delta", 1.01), "act", "blocks.1.attn.qk"),
        (scaled("reparam.blocks.1.norm2.weight", 1.01), "reparam", "blocks.1.mlp.fc1"),
        (scaled("reparam.head.weight", 1.01), "reparam", "head"),
        (scaled("aqer.blocks.0.attn.proj.weight", 1.05), "aqer", "blocks.0.attn.proj"),
        (largest_scaled("aqer.blocks.1.mlp.fc2.weight", 1.05), "wq", "blocks.1.mlp.fc2"),
        (column_swapped("blocks.0.mlp.fc1"), "wq", "blocks.0.mlp.fc1"),
        (code_moved("head"), "final", "head"),
        (scaled("final.blocks.0.attn.qkv.bias", 1.05), "final", "blocks.0.attn.qkv"),
        (meta_changed(coe=110), "aqer", "blocks.0.attn.proj"),
        (scaled("fp.head.weight", 1.01), "fp", "network"),
    ],
)
def test_changed_result_fails(
    check: ModuleType,
    arrays: Arrays,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Arrays], Arrays],
    stage: str,
    layer: str,
) -> None:
    path = tmp_path / "changed.npz"
    np.savez(path, **(arrays | change(arrays)))
    assert check.main([str(path)]) == 1
    assert rows_of(capsys.readouterr().out)[stage, layer] == "FAIL"


def dropped(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


def replaced(change: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | change(arrays)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dropped("meta"), "not a golden file"),
        (dropped("wq.head.delta"), "lacks the array wq.head.delta"),
        (dropped("fp.norm.bias"), "norm.bias"),
        (replaced(scaled("images", float("nan"))), "images holds NaN"),
        (replaced(scaled("wq.head.delta", -1.0)), "wq.head.delta is not > 0"),
        (replaced(scaled("act.head.input_quantizer.zero_point", 1.01)), "not a whole number"),
        (replaced(lambda a: {"aqer.head.weight": a["aqer.head.weight"][1:]}), "aqer.head.weight"),
        (replaced(lambda a: {"images": a["images"][:, :1]}), "test_images is [16, 3, 32, 32]"),
        (replaced(meta_changed(heads=3)), "meta heads is 3"),
        (replaced(meta_changed(w_bits=9)), "meta w_bits is 9"),
        (replaced(meta_changed(rounded_zero_point=False)), "not rounded"),
    ],
)
def test_unusable_arrays_are_named(
    check: ModuleType,
    arrays: Arrays,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Arrays], Arrays],
    reason: str,
) -> None:
    path = tmp_path / "unusable.npz"
    np.savez(path, **make(arrays))
    assert check.main([str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert reason in line


def test_other_files_are_refused(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes(GOLDEN.read_bytes()[:1000])
    empty = tmp_path / "empty.npz"
    empty.touch()
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    for path in (HERE / "README.md", broken, empty, single, tmp_path / "absent.npz", tmp_path):
        assert check.main([str(path)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"cannot check {path}: ")


def test_program_refuses_another_kind(arrays: Arrays, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, **(arrays | meta_changed(kind="mlp_mixer")(arrays)))
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert "kind 'mlp_mixer' is not covered, vit and swin are" in line


def last_column_moved(arrays: Arrays) -> Arrays:
    name = "final.layers.0.downsample.reduction.weight"
    weight = arrays[name].copy()
    weight[:, -1] += 0.4 * arrays["wq.layers.0.downsample.reduction.delta"][:, 0]
    return {name: weight}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "stage", "layer", "verdict"),
    [
        (last_column_moved, "final", "layers.1.downsample.reduction", "ok"),
        (
            scaled("final.layers.0.downsample.reduction.weight", 1.05),
            "final",
            "layers.1.downsample.reduction",
            "FAIL",
        ),
        (
            scaled("act.layers.0.blocks.1.attn.matmul1.quantizer_A.delta", 1.01),
            "act",
            "layers.0.blocks.1.attn.qk",
            "FAIL",
        ),
    ],
)
def test_changed_swin(
    check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Arrays], Arrays],
    stage: str,
    layer: str,
    verdict: str,
) -> None:
    monkeypatch.setattr(check, "NOISY_COPIES", 1)  # other rows may need the eight to be excused
    with np.load(SWIN) as archive:
        arrays = {name: archive[name] for name in archive.files}
    path = tmp_path / "changed.npz"
    np.savez(path, **(arrays | change(arrays)))
    check.main([str(path)])
    assert rows_of(capsys.readouterr().out)[stage, layer] == verdict
