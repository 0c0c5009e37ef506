"""Every command on a tiny model: results, JSON, exit codes, one line for every failure."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

import erq
from erq.cli import app
from erq.data import DEMO_FOLDER, open_images
from erq.inputs import preprocessing
from erq.loading import TimmOptions, load_model
from erq_kernels import _cpu

NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_classes": 10}
SHAPE_ARGS = [part for k, v in SHAPE.items() for part in ("--model-arg", f"{k}={v}")]
RANDOM = [NAME, "--random-weights", *SHAPE_ARGS]


@dataclass(frozen=True)
class Workplace:
    """Files that the tests share: images in three forms, and a packed model."""

    root: Path
    npz: str
    folder: str
    packed: str


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def run(*args: str | Path) -> Ran:
    result = CliRunner().invoke(app, [str(a) for a in args])
    return Ran(result.exit_code, result.stdout, result.stderr)


def succeed(*args: str | Path) -> Ran:
    done = run(*args)
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, 36, 40, 3), dtype=np.uint8)
    np.savez(root / "images.npz", images=pictures, labels=np.arange(40) % 10)
    for label in range(10):
        folder = root / "classes" / str(label)
        folder.mkdir(parents=True)
        for i in range(label, 40, 10):
            Image.fromarray(pictures[i]).save(folder / f"{i}.png")
    npz, packed = str(root / "images.npz"), str(root / "packed.safetensors")
    succeed("quantize", *RANDOM, "--images", npz, "--out", packed, "--n", "8")
    return Workplace(root, npz, str(root / "classes"), packed)


def float_images(path: Path, images: torch.Tensor, **more: torch.Tensor) -> str:
    save_file({"images": images, **more}, path)
    return str(path)


def test_quantize_reports_what_it_wrote(place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    done = succeed(
        "quantize", *RANDOM, "--images", place.npz, "--bits", "w3a4", "--n", "8", "--out", out,
        "--set", "blocks.*.mlp.fc2.a_bits=8", "--set", "ridge_act=0.5", "--json",
    )  # fmt: skip
    result = done.json()
    assert result["size_bytes"] == out.stat().st_size
    assert result["fp32_bytes"] == 2 * result["fp16_bytes"] > 2 * result["size_bytes"]
    assert result["calibration"]["n"] == 8
    config = result["config"]
    assert (config["w_bits"], config["a_bits"], config["ridge_act"]) == (3, 4, 0.5)
    assert config["overrides"] == {"blocks.*.mlp.fc2": {"a_bits": 8}}
    sites = erq.inspect(out)["sites"]
    assert (sites["blocks.0.mlp.fc2"]["a_bits"], sites["blocks.0.mlp.fc1"]["a_bits"]) == (8, 4)


def test_quantize_draws_by_seed(place: Workplace, tmp_path: Path) -> None:
    digests = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / f"{name}.safetensors"
        succeed(
            "quantize", *RANDOM, "--images", place.npz, "--n", "4", "--out", out, "--seed", seed
        )
        digests.append(out.read_bytes())
    assert digests[0] == digests[1]
    assert erq.inspect(tmp_path / "c.safetensors")["calibration"]["sha256"] not in str(digests[0])


def test_quantize_is_the_python_call(place: Workplace) -> None:
    model = load_model(NAME, TimmOptions(random_weights=True, model_args=SHAPE))
    source = open_images(place.npz)
    drawn = source.batches(preprocessing(model), source.draw(8, seed=0))
    net, x = erq.deploy(erq.quantize(model, drawn, "w4a4")), torch.randn(2, 3, 32, 32)
    assert torch.equal(net(x), erq.load(place.packed)(x))


@pytest.mark.parametrize("method", ["rtn", "repq", "gptq"])
def test_quantize_takes_other_methods(place: Workplace, tmp_path: Path, method: str) -> None:
    out = tmp_path / "q.safetensors"
    done = succeed(
        "quantize", *RANDOM, "--images", place.folder, "--n", "4", "--out", out, "--method", method
    )
    assert method in done.out and str(out) in done.out
    assert erq.inspect(out)["config"]["method"] == method


def test_quantize_to_an_average_width_says_why(place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    args = ("quantize", *RANDOM, "--images", place.npz, "--n", "4", "--out", out)
    done = succeed(*args, "--target-bits", "4.5")
    assert "4.5 on average" in done.out and "gain" in done.out
    assert "blocks.0.attn.qkv" in done.out
    result = succeed(*args, "--target-bits", "4.5", "--json").json()
    sites = erq.inspect(out)["sites"]
    for row in result["bits"]:
        assert sites[row["name"]]["bits"] == row["w_bits"]
        assert set(row["errors"]) == {str(b) for b in range(2, 9)}
    total = sum(r["weights"] for r in result["bits"])
    assert 4 < sum(r["weights"] * r["w_bits"] for r in result["bits"]) / total <= 4.5


def test_quantize_without_data(place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    done = succeed("quantize", *RANDOM, "--images", "synthetic", "--n", "4", "--out", out)
    assert "calibrated on noise" in done.err
    assert erq.inspect(out)["calibration"]["n"] == 4


def test_quantize_as_published(place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "q.safetensors"
    succeed("quantize", *RANDOM, "--images", place.npz, "--n", "4", "--out", out, "--paper")
    assert erq.inspect(out)["config"] == erq.QuantConfig.paper("w4a4").to_dict()


def test_quiet_quantize_says_nothing(place: Workplace, tmp_path: Path) -> None:
    done = succeed(
        "quantize", *RANDOM, "--images", place.npz, "--out", tmp_path / "q.safetensors", "--n",
        "99", "--quiet",
    )  # fmt: skip
    assert (done.out, done.err) == ("", "")


def test_fewer_images_than_asked_for_is_noted(place: Workplace, tmp_path: Path) -> None:
    source = float_images(tmp_path / "six.safetensors", torch.randn(6, 3, 32, 32))
    done = succeed("quantize", *RANDOM, "--images", source, "--out", tmp_path / "q.safetensors")
    assert "holds 6 images, fewer than --n 32" in done.err
    assert "6 images" in done.out


def test_weights_in_fp16_load_as_fp32(place: Workplace, tmp_path: Path) -> None:
    half = timm.create_model(NAME, **SHAPE).eval().half()
    save_file(half.state_dict(), tmp_path / "half.safetensors")
    model = load_model(NAME, TimmOptions(tmp_path / "half.safetensors", model_args=SHAPE))
    x = torch.randn(2, 3, 32, 32)
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(model(x), half.float()(x))
    weights = ["--weights", tmp_path / "half.safetensors", *SHAPE_ARGS]
    found = succeed("eval", NAME, "--images", place.npz, "--reference", NAME, *weights, "--json")
    assert found.json()["evaluation"]["agreement"] == 100.0


def test_random_weights_are_always_the_same_and_leave_the_generator_alone() -> None:
    options = TimmOptions(random_weights=True, model_args=SHAPE)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = load_model(NAME, options), load_model(NAME, options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)


def test_eval_is_the_python_call(place: Workplace) -> None:
    found = succeed(
        "eval", place.packed, "--images", place.npz, "--reference", *RANDOM, "--json"
    ).json()
    model = load_model(NAME, TimmOptions(random_weights=True, model_args=SHAPE))
    net = erq.load(place.packed)
    batches = open_images(place.npz).batches(preprocessing(model))
    assert found["evaluation"] == pytest.approx(erq.evaluate(net, batches, model).to_dict())
    assert found["kernel"] and found["device"] == "cpu"


def test_folder_and_file_of_the_same_images_agree(place: Workplace) -> None:
    results = [
        succeed("eval", place.packed, "--images", source, "--json").json()["evaluation"]
        for source in (place.npz, place.folder)
    ]
    assert results[0] == results[1] and results[0]["n"] == 40


def test_eval_limits_to_a_fixed_choice(place: Workplace) -> None:
    args = ("eval", place.packed, "--images", place.npz, "--limit", "7", "--json")
    first, second = (succeed(*args).json()["evaluation"] for _ in range(2))
    assert first == second and first["n"] == 7


def test_eval_table_and_the_note_on_classes(place: Workplace, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / name / "a.png")
    done = succeed("eval", place.packed, "--images", tmp_path)
    assert "2 class folders" in done.err and "10 classes" in done.err
    assert "top-1" in done.out and "packed.safetensors" in done.out
    assert succeed("eval", place.packed, "--images", tmp_path, "--quiet").err == ""


def test_infinite_figures_are_null_in_json(place: Workplace) -> None:
    done = succeed("eval", *RANDOM, "--images", place.npz, "--reference", NAME, "--json")
    assert done.json()["evaluation"]["sqnr_db"] is None


def test_inspect(place: Workplace) -> None:
    header = succeed("inspect", place.packed, "--json").json()
    assert header["architecture"] == NAME and header["calibration"]["n"] == 8
    qkv = header["sites"]["blocks.0.attn.qkv"]
    assert (qkv["bits"], qkv["a_bits"], qkv["shape"]) == (4, 4, [144, 48])
    errors = qkv["errors"]
    assert 0 < errors["error_final"] < errors["error_nearest"]
    site_bytes = sum(site["bytes"] for site in header["sites"].values())
    assert 144 * 48 // 2 < qkv["bytes"] < site_bytes < header["size_bytes"]
    shown = succeed("inspect", place.packed).out
    for name, site in header["sites"].items():
        [row] = [line for line in shown.splitlines() if f" {name} " in line]
        for error in site["errors"].values():
            assert f"{error:.1e}" in row


def test_eval_without_labels_shows_every_layer(place: Workplace, tmp_path: Path) -> None:
    unlabelled = float_images(tmp_path / "x.safetensors", torch.randn(6, 3, 32, 32))
    args = ("eval", place.packed, "--images", unlabelled, "--reference", *RANDOM)
    done = succeed(*args)
    assert "agreement" in done.out and "blocks.0.mlp.fc1" in done.out
    sites = succeed(*args, "--json").json()["sites"]
    # Without qkv and attention, whose heads are in another basis.
    assert len(sites) == 5 and all(0 < db < 80 for db in sites.values())
    labelled = ("eval", place.packed, "--images", place.npz, "--reference", *RANDOM, "--json")
    assert succeed(*labelled).json()["sites"] == {}
    assert succeed(*labelled, "--sites").json()["sites"].keys() == sites.keys()
    alone = run("eval", place.packed, "--images", place.npz, "--sites")
    assert (alone.code, "--sites compares a packed FILE" in alone.err) == (1, True)


def test_report_writes_both_pages(place: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "page"
    done = succeed(
        "report", place.packed, "--images", place.npz, "--reference", *RANDOM, "--out", out,
        "--batch", "1", "--seconds", "0.01", "--limit", "12", "--json",
    )  # fmt: skip
    result = done.json()
    assert result["pages"] == [f"{out}.html", f"{out}.md"]
    assert result["evaluation"]["n"] == 12 and len(result["timings"]) == 2
    text = Path(f"{out}.md").read_text("utf-8")
    assert f"erq quantize {NAME} --images {place.npz} --bits w4a4 --n 8" in text
    for title in ("Summary", "Accuracy", "Error of every layer", "Closeness", "Latency"):
        assert f"## {title}" in text
    # The command in it makes the same file again.
    command = text.split("```")[1].strip().removesuffix("--out FILE").split()
    again = tmp_path / "again.safetensors"
    succeed(*command[1:], "--out", again)
    assert again.read_bytes() == Path(place.packed).read_bytes()


def test_report_of_the_file_alone(place: Workplace, tmp_path: Path) -> None:
    done = succeed("report", place.packed, "--out", tmp_path / "p", "--batch", "0")
    assert str(tmp_path / "p.html") in done.out
    assert "## Accuracy" not in (tmp_path / "p.md").read_text("utf-8")
    bad = run("report", place.packed, "--reference", *RANDOM)
    assert bad.code == 2 and "needs --images" in bad.err


def test_a_model_of_torchvision(place: Workplace, tmp_path: Path) -> None:
    shape = {"image_size": 32, "num_classes": 10}
    options = TimmOptions(random_weights=True, model_args=shape)
    model, again = (load_model("torchvision:vit_b_32", options) for _ in range(2))
    assert not model.training
    states = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    recipe = preprocessing(model)
    assert (recipe.shape, recipe.interpolation, recipe.crop_pct) == ((3, 32, 32), "bilinear", 0.875)
    state = {n: torch.full_like(t, 0.5) for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded = load_model(
        "torchvision:vit_b_32", TimmOptions(tmp_path / "w.safetensors", False, shape)
    )
    assert all(bool((t == 0.5).all()) for t in loaded.state_dict().values())

    args = ("--images", place.npz, "--out", tmp_path / "q.safetensors")
    for name, more, message in (
        ("vit_b_32", (), "are pickles"),
        ("resnet18", (), "covered models are vit_b_16"),
        ("vit_b_32", ("--random-weights", "--model-arg", "image_size=33"), "cannot create"),
    ):
        refused = run("quantize", f"torchvision:{name}", *args, *more)
        assert (refused.code, message in refused.err) == (1, True)


def test_models_lists_what_is_covered_and_what_is_not() -> None:
    done = succeed("models")
    assert "swin_*" in done.out and "nn.MultiheadAttention" in done.out
    result = succeed("models", "--json").json()
    assert {r["library"] for r in result["covered"]} == {"timm", "torchvision", "transformers"}
    assert any("swinv2" in r["names"] and "cosine" in r["why"] for r in result["refused"])


def test_predict_ranks_classes(place: Workplace) -> None:
    pictures = [Path(place.folder) / "1" / "1.png", Path(place.folder) / "2" / "2.png"]
    found = succeed("predict", place.packed, *pictures, "--json").json()["predictions"]
    assert [entry["image"] for entry in found] == [str(p) for p in pictures]
    net = erq.load(place.packed)
    transform = preprocessing(net).transform()
    for entry, path in zip(found, pictures, strict=True):
        expected = net(transform(Image.open(path))[None]).softmax(1)[0].topk(5)
        assert [t["class"] for t in entry["top"]] == expected.indices.tolist()
        probabilities = [t["probability"] for t in entry["top"]]
        assert probabilities == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert "1.png" in succeed("predict", place.packed, *pictures).out


def test_info_names_versions_devices_and_reasons() -> None:
    found = succeed("info", "--json", "--device", "cpu").json()
    assert found["versions"]["erq"] == erq.__version__
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    )
    assert found["devices"][0]["device"] == "cpu"
    for op in ("quantize", "layer_norm_quantize", "qlinear", "qattention", "dequant_linear"):
        assert found["backends"][op]["reference"] == "usable"
        assert found["backends"][op]["cuda"] != "usable"
    shown = succeed("info", "--device", "cpu").out
    assert found["backends"]["qlinear"]["cuda"][:20] in shown


def test_bench_compares_a_file_with_torch(place: Workplace) -> None:
    args = ("--batch", "2,1", "--seconds", "0.01")
    found = succeed("bench", place.packed, *args, "--json").json()["timings"]
    names = [(t["name"], t["batch"]) for t in found]
    assert names == [(n, b) for b in (2, 1) for n in ("torch", place.packed)]
    assert found[0]["kernel"] == "torch" and found[1]["kernel"] != "torch"
    alone = succeed("bench", NAME, *SHAPE_ARGS, *args, "--json").json()["timings"]
    assert [t["name"] for t in alone] == [NAME, NAME]
    against = ("--against", "torch-bf16,torch")
    both = succeed("bench", NAME, *SHAPE_ARGS, *args, *against, "--json").json()["timings"]
    assert [t["name"] for t in both[:3]] == ["torch-bf16", "torch", NAME]


@pytest.mark.parametrize(
    ("ending", "begins"), [(".png", b"\x89PNG\r\n"), (".svg", b"<?xml version")]
)
def test_bench_plots_what_it_measured(
    ending: str, begins: bytes, place: Workplace, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"times{ending}"
    succeed("bench", place.packed, "--batch", "1,3", "--seconds", "0.01", "--plot", plot)
    assert plot.read_bytes().startswith(begins)
    assert [p.name for p in tmp_path.iterdir()] == [plot.name]


def test_bench_refuses_a_plot_before_it_measures(place: Workplace, tmp_path: Path) -> None:
    plot = tmp_path / "times.svg"
    with pytest.MonkeyPatch.context() as patch:
        found = importlib.util.find_spec
        patch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else found(n, *a)
        )
        done = run("bench", place.packed, "--plot", plot)
    assert done.code == 1 and not done.out and not plot.exists()
    assert done.err.strip().endswith("not installed: pip install 'erq[bench]'")
    assert len(done.err.splitlines()) == 1
    for path, message in (
        (tmp_path / "times.pdf", "ends in .png or .svg, got '.pdf'"),
        (tmp_path / "nowhere" / "times.png", "create it first"),
    ):
        done = run("bench", place.packed, "--plot", path)
        assert done.code == 1 and message in done.err and not done.out


def test_a_plot_shows_every_engine_and_batch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from erq.report import plot_timings

    kept: list[Figure] = []
    save = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda f, *a, **k: (kept.append(f), save(f, *a, **k)))
        plot_timings(
            tmp_path / "p.svg", "t", {"erq": {8: 40.0, 1: 10.0}, "torch": {1: 20.0, 8: 160.0}}
        )
    latency, rate = kept[0].axes
    lines = {x.get_label(): x.get_xydata().tolist() for x in latency.get_lines()}
    assert lines == {"erq": [[1, 10], [8, 40]], "torch": [[1, 20], [8, 160]]}
    lines = {x.get_label(): x.get_xydata().tolist() for x in rate.get_lines()}
    assert lines == {"erq": [[1, 100], [8, 200]], "torch": [[1, 50], [8, 50]]}
    assert [t.get_text() for t in latency.get_xticklabels()] == ["1", "8"]


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for the shipped files: the same form, random weights."""
    folder = tmp_path_factory.mktemp("demo")
    arch = {"img_size": 16, "patch_size": 8, "num_classes": 10, "embed_dim": 48, "depth": 1,
            "num_heads": 3}  # fmt: skip
    torch.manual_seed(1)
    state = {k: t.half() for k, t in VisionTransformer(**arch).state_dict().items()}
    about = {"arch_kwargs": arch, "mean": 0.2, "std": 0.3}
    save_file(state, folder / "vit_digits.safetensors", metadata={"erq_demo": json.dumps(about)})
    rng = np.random.default_rng(0)
    np.savez(
        folder / "digits.npz",
        images=rng.integers(0, 256, (33, 16, 16), dtype=np.uint8),
        labels=np.arange(33) % 10,
        calib_images=rng.integers(0, 256, (40, 16, 16), dtype=np.uint8),
        calib_labels=np.arange(40) % 10,
    )
    return folder


def test_demo_goes_the_whole_way(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erq.demonstration.DEMO_FOLDER", demo_folder)
    monkeypatch.setattr("erq.demonstration._TIMING_SECONDS", 0.01)
    out = tmp_path / "kept.safetensors"
    found = succeed("demo", "--json", "--out", out, "--device", "cpu").json()
    assert list(found["evaluations"]) == ["full precision", "round to nearest", "RepQ", "ERQ"]
    assert (found["n_calibration"], found["n_test"]) == (32, 33)
    assert found["file_bytes"] == out.stat().st_size
    assert erq.inspect(out)["calibration"]["n"] == 32
    # The row of the other process is what the file gives here.
    model = load_model(str(demo_folder / "vit_digits.safetensors"))
    batches = open_images(str(demo_folder / "digits.npz")).batches(preprocessing(model))
    again = erq.evaluate(erq.load(out), batches, reference=model).to_dict()
    assert found["evaluations"]["ERQ"] == pytest.approx(again)
    assert [(t["name"], t["batch"]) for t in found["timings"]] == [
        ("full precision", 1), ("full precision", 8), ("ERQ", 1), ("ERQ", 8),
    ]  # fmt: skip


def test_demo_model_is_normalised_as_its_file_says(demo_folder: Path) -> None:
    recipe = preprocessing(load_model(str(demo_folder / "vit_digits.safetensors")))
    assert (recipe.shape, recipe.mean, recipe.std) == ((3, 16, 16), (0.2,) * 3, (0.3,) * 3)
    source = open_images(str(demo_folder / "digits.npz"))
    pixel = torch.tensor(np.asarray(source.read(0)), dtype=torch.float32) / 255
    [(batch, _)] = source.batches(recipe, [0])
    assert torch.allclose(batch[0], ((pixel - 0.2) / 0.3).expand(3, 16, 16), atol=1e-6)


def test_shipped_model_is_as_accurate_as_its_file_says() -> None:
    with safe_open(DEMO_FOLDER / "vit_digits.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["erq_demo"])["test_top1"]
    found = succeed("eval", "demo", "--images", "demo", "--json").json()["evaluation"]
    assert found["top1"] == pytest.approx(recorded, abs=0.2)
    assert found["n"] == open_images("demo").size


def test_demo_leaves_no_scratch_file_and_prints_one_table(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erq.demonstration.DEMO_FOLDER", demo_folder)
    monkeypatch.setattr("erq.demonstration._TIMING_SECONDS", 0.01)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reloaded: list[Path] = []

    def evaluate_here(file: Path, *_: Any) -> erq.Evaluation:
        reloaded.append(file)
        assert file.is_file()
        return erq.Evaluation(33, top1=12.34, agreement=56.78)

    monkeypatch.setattr("erq.demonstration._evaluate_in_new_process", evaluate_here)
    torch.set_num_threads(2)
    try:
        shown = succeed("demo", "--device", "cpu").out
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    [file] = reloaded
    assert file.is_relative_to(tmp_path) and list(tmp_path.iterdir()) == []
    [row] = [line for line in shown.splitlines() if line.startswith(" ERQ ")]
    kernel = "cpu" if _cpu.supported_variants() else "reference"
    assert "12.34" in row and "56.78" in row and kernel in row
    assert ("not for speed" in shown) == (kernel == "reference")
    assert "33 others" in shown and "1 thread" in shown


def test_demo_passes_on_why_the_other_process_failed(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erq.demonstration.DEMO_FOLDER", demo_folder)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="erq eval: out of luck\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    check_fails(None, tmp_path, ["demo"], "in a new process failed: erq eval: out of luck")


def test_usage_is_told_apart_from_failure() -> None:
    assert run().code == 2
    assert run("--help").code == run("quantize", "--help").code == run("--version").code == 0
    assert run("quantise").code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["quantize", NAME, "--out", "q.safetensors"], "--images"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--bits", "w9a4"], "2 to 8"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--bits", "w4a1"], "got 1"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--bits", "int4"], "w<2..8>"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--method", "awq"], "rtn"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--set", "a_bits"], "NAME=VAL"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--set", "b.w_bit=4"], "w_bit"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--set", "w_bit=4"], "w_bit"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--n", "0"], "--n"),
        (["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}", "--weights", "w"], "excludes"),
        (["eval", "{packed}", "--images", "{npz}", "--device", "gpu"], "'gpu' is no device"),
        (["eval", "{packed}", "--images", "{npz}", "--backend", "fast"], "unknown backend 'fast'"),
        (["eval", "{packed}", "--images", "{npz}", "--nonsense"], "--nonsense"),
        (["bench", "{packed}", "--batch", "1,x"], "list of sizes"),
        (["bench", "{packed}", "--batch", "0"], "list of sizes"),
        (["bench", "{packed}", "--against", "torch,tvm"], "unknown engine 'tvm'; choose from"),
        (["bench", "{packed}", "--model-arg", "depth=1"], "{packed} is none"),
        (["eval", "{packed}", "--images", "{npz}", "--random-weights"], "describe a timm model"),
        (["demo", "--bits", "w4"], "unknown preset 'w4'"),
        (["predict", "{packed}"], "IMAGE"),
    ],
)
def test_bad_usage_is_one_line(
    place: Workplace, tmp_path: Path, args: list[str], message: str
) -> None:
    check_fails(place, tmp_path, args, message, code=2)


def check_fails(
    place: Workplace | None, tmp_path: Path, args: list[str], message: str, code: int = 1
) -> None:
    names: dict[str, Any] = {"tmp": tmp_path, "q": tmp_path / "q.safetensors"}
    if place is not None:
        names |= {"npz": place.npz, "packed": place.packed}
    before = sorted(tmp_path.iterdir())
    done = run(*(a.format(**names) for a in args))
    assert done.code == code, done.err
    assert message.format(**names) in done.err
    assert done.err.count("\n") == 1 and done.err.startswith("erq "), done.err
    assert done.out == "" and "Traceback" not in done.err
    assert sorted(tmp_path.iterdir()) == before


QUANTIZE = ["quantize", *RANDOM, "--images", "{npz}", "--out", "{q}"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*QUANTIZE[:-1], "{tmp}/none/q.safetensors"], "none does not exist; create it first"),
        ([*QUANTIZE[:-1], "{tmp}/none/q/"], "none does not exist; create it first"),
        ([*QUANTIZE[:-1], "x" * 300], "File name too long; choose another name"),
        ([*QUANTIZE[:-1], "{npz}/"], "is a file; name a folder"),
        ([*QUANTIZE, "--license", "mit"], "a file has no card"),
        ([*QUANTIZE, "--set", "block.*.w_bits=3"], "the glob 'block.*' matches none"),
        ([*QUANTIZE, "--set", "keep_float=['nothing']"], "the glob 'nothing' matches none"),
        ([*QUANTIZE, "--model-arg", "depht=3"], "depht"),
        ([*QUANTIZE, "--backend", "cuda"], "cuda: "),
        (["quantize", "{packed}", *QUANTIZE[-4:]], "quantized already"),
        (["quantize", "vit_smal_patch16_224", *QUANTIZE[2:]], "close names: vit_small_p"),
        (["quantize", "resnet18", "--random-weights", *QUANTIZE[-4:]], "cannot quantize a"),
        (["eval", "{packed}", "--images", "{tmp}/none"], "no such folder or file"),
        (["eval", "{tmp}/none.safetensors", "--images", "{npz}"], "no such file"),
        (["eval", "nosuchmodel", "--images", "{npz}"], "neither a file nor one of timm's"),
        (["inspect", "{tmp}/none.safetensors"], "no such file"),
        (["inspect", "{npz}"], "not a readable .safetensors"),
        (["predict", "{packed}", "{tmp}/none.png"], "no such image file"),
        (["predict", "{packed}", "{npz}"], "not a readable image"),
        (["bench", "nosuchmodel"], "neither a file nor"),
    ],
)
def test_failure_is_one_line(
    place: Workplace, tmp_path: Path, args: list[str], message: str
) -> None:
    check_fails(place, tmp_path, args, message)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((4, 3, 32, 32), float("nan")), "NaN or infinite values, first in image 0"),
        (torch.full((4, 3, 32, 32), float("inf")), "NaN or infinite values"),
        (torch.randn(1, 3, 32, 32), "at least 2 images, 32 are usual, got 1"),
        (torch.randn(0, 3, 32, 32), "empty"),
        (torch.randn(4, 5, 32, 32), "5 channels, the model takes 3"),
        (torch.randn(4, 3, 32, 40), "32×40, the model takes 32×32"),
        (torch.zeros(4, 32, 32, 3, dtype=torch.int16), "must be uint8"),
    ],
)
def test_bad_images_are_one_line(
    place: Workplace, tmp_path: Path, images: torch.Tensor, message: str
) -> None:
    source = float_images(tmp_path / "bad.safetensors", images)
    args = ["quantize", *RANDOM, "--images", source, "--out", "{q}"]
    check_fails(place, tmp_path, args, message)


def test_labels_that_do_not_fit_are_one_line(place: Workplace, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    bare = float_images(tmp_path / "bare.safetensors", images)
    check_fails(place, tmp_path, ["eval", place.packed, "--images", bare], "has no labels")
    labelled = float_images(tmp_path / "high.safetensors", images, labels=torch.tensor([0, 10]))
    args = ["eval", place.packed, "--images", labelled]
    check_fails(place, tmp_path, args, "label 10 is none of the network's classes 0..9")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "not a readable .safetensors"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "digest"),
        (lambda data: b"", "not a readable .safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "inspect", "predict", "bench"])
def test_broken_checkpoint_is_one_line(
    place: Workplace, tmp_path: Path, command: str, spoil: Callable[[bytes], bytes], message: str
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(spoil(Path(place.packed).read_bytes()))
    more = {"eval": ["--images", "{npz}"], "predict": [f"{place.folder}/1/1.png"]}
    args = [command, str(broken), *more.get(command, [])]
    check_fails(place, tmp_path, args, message)


def test_weights_that_do_not_fit_are_one_line(place: Workplace, tmp_path: Path) -> None:
    state = timm.create_model(NAME, **SHAPE).state_dict()
    cases = [
        ({k: t for k, t in state.items() if k != "norm.bias"}, "lacks norm.bias"),
        ({**state, "extra": torch.zeros(1)}, "has extra, unknown"),
        ({**state, "head.bias": torch.zeros(7)}, "head.bias is [7], the model has [10]"),
        ({**state, "norm.bias": torch.full((48,), float("nan"))}, "norm.bias holds NaN"),
    ]
    for index, (tensors, message) in enumerate(cases):
        path = tmp_path / f"{index}.safetensors"
        save_file(tensors, path)
        args = ["quantize", NAME, "--weights", str(path), *SHAPE_ARGS, *QUANTIZE[-4:]]
        check_fails(place, tmp_path, args, message)
    torch.save(state, tmp_path / "state.pth")
    for name, message in (("state.pth", "from .safetensors alone"), ("none.pth", "no such file")):
        args = ["quantize", NAME, "--weights", str(tmp_path / name), *SHAPE_ARGS, *QUANTIZE[-4:]]
        check_fails(place, tmp_path, args, message)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No way to the hub, at once."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENETUNREACH, "network is unreachable")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_pretrained_weights_that_cannot_be_had_are_one_line(
    place: Workplace, tmp_path: Path, offline: None
) -> None:
    cache = ["--model-arg", f"cache_dir={tmp_path}"]
    args = ["quantize", NAME, *cache, *QUANTIZE[-4:]]
    check_fails(place, tmp_path, args, "pretrained weights cannot be had")
    assert "--random-weights" in run("eval", NAME, *cache, "--images", place.npz).err
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_head_without_pretrained_weights_is_refused(
    place: Workplace, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda n, pretrained, **k: create(n, **k))
    args = ["quantize", NAME, *SHAPE_ARGS, *QUANTIZE[-4:]]
    check_fails(place, tmp_path, args, "have 1000 classes, so a head with 10 would be random")


def test_no_cuda_is_one_line(place: Workplace, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    args = ["eval", "{packed}", "--images", "{npz}", "--device", f"cuda:{count}"]
    check_fails(place, tmp_path, args, f"torch sees {count} CUDA devices")


def test_debug_shows_the_traceback(place: Workplace) -> None:
    done = run("eval", "nosuchmodel", "--images", place.npz, "--debug")
    assert done.code == 1 and "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("erq eval: nosuchmodel")


def test_unexpected_error_is_one_line_with_its_type(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("erq.hub.describe_checkpoint", fail)
    check_fails(place, tmp_path, ["inspect", "{packed}"], "KeyError: 'lost'")


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("moment", ["erq.pipeline.solve_site", "os.fsync"])
def test_interrupt_leaves_no_file(
    place: Workplace, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moment, interrupt)
    check_fails(place, tmp_path, QUANTIZE, "erq quantize: interrupted", code=130)


def test_interrupt_leaves_the_old_file(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "q.safetensors"
    old.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", interrupt)
    check_fails(place, tmp_path, QUANTIZE, "interrupted", code=130)
    assert old.read_bytes() == b"old"


def test_folder_that_cannot_be_written_is_found_at_once(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("erq.loading.load_model", interrupt)
    check_fails(place, tmp_path, QUANTIZE, "is not writable")


def test_full_disk_is_one_line(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    check_fails(place, tmp_path, QUANTIZE, "No space left on device")


def test_module_runs_as_the_command() -> None:
    """Help comes without torch, at once, and on a terminal that knows ASCII alone."""
    program = (
        "import sys, runpy\nsys.argv = ['erq', '--help']\n"
        "try: runpy.run_module('erq', run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or ('torch' in sys.modules) * 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(erq.__file__).parents[1], capture_output=True,
        text=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout and done.stderr == ""
