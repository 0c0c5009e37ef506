"""Folders for a hub: what they hold, how they are replaced, and which ones are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import erq
from erq import CheckpointError, Evaluation
from erq.cli import app
from erq.hub import add_evaluation

FILES = {"model.safetensors", "config.json", "README.md"}
TIMM = {
    "hf_hub_id": "timm/vit_tiny.augreg",
    "license": "apache-2.0",
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}


@dataclass(frozen=True)
class Pair:
    """Two deployed networks of one architecture, and what they make of the images x."""

    old: Any
    new: Any
    x: Tensor

    def which(self, net: Any) -> str:
        """Which of the two computes as `net` does."""
        with torch.no_grad():
            same = [n for n in ("old", "new") if torch.equal(net(self.x), getattr(self, n)(self.x))]
        return "".join(same)


@pytest.fixture(scope="module")
def pair(tiny_vit: Callable[..., Any]) -> Pair:
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = tiny_vit(depth=1)
        model.pretrained_cfg = TIMM
        nets.append(erq.deploy(erq.quantize(model, torch.randn(4, 3, 16, 16), {"method": "rtn"})))
    return Pair(nets[0], nets[1], torch.randn(2, 3, 16, 16))


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """What `save` makes of the old network."""
    erq.save(pair.old, f"{tmp_path}/net/")
    return tmp_path / "net"


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_a_folder_holds_the_file_that_save_writes(pair: Pair, folder: Path) -> None:
    assert names(folder) == FILES
    assert names(folder.parent) == {"net"}
    erq.save(pair.old, folder.parent / "file")
    assert (folder / "model.safetensors").read_bytes() == (folder.parent / "file").read_bytes()
    for path in (folder, f"{folder}/", folder / "model.safetensors"):
        assert pair.which(erq.load(path)) == "old"
        assert erq.inspect(path) == erq.inspect(folder.parent / "file")


def test_config_says_what_the_header_does(folder: Path) -> None:
    config, header = config_of(folder), erq.inspect(folder)
    for key in ("format", "family", "architecture", "pretrained_cfg", "config", "calibration"):
        assert config[key] == json.loads(json.dumps(header[key])), key
    assert config["library_name"] == "erq"
    assert config["sizes"]["file"] == header["size_bytes"]
    # 3·16 + 1, 1 + 16 places, and a block of 12·24² − 8·24² (mlp_ratio 2) with its biases and norms
    width, classes = 24, 5
    block = 8 * width**2 + 9 * width + 4 * width - width
    other = 48 * width + width + (1 + 17) * width + 2 * width + classes * width + classes
    assert config["sizes"]["fp32"] == pytest.approx(4 * (block + other), rel=0.02)


def test_a_hub_understands_the_card(folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data == {
        "library_name": "erq",
        "pipeline_tag": "image-classification",
        "tags": ["quantization", "vision-transformer", "w4a4"],
        "license": "apache-2.0",
        "base_model": "timm/vit_tiny.augreg",
        "base_model_relation": "quantized",
    }
    for text in ("W4A4", "4 unlabelled images", "not measured yet", "erq.load(", "3×16×16"):
        assert text in card.text, text


def test_the_card_says_what_it_was_told(pair: Pair, tmp_path: Path) -> None:
    found = Evaluation(n=10, top1=90.0, agreement=80.0, reference_top1=95.0, sqnr_db=float("inf"))
    erq.save(pair.old, f"{tmp_path}/net/", evaluation=found, license="cc-by-4.0")
    text = (tmp_path / "net" / "README.md").read_text()
    assert "top-1 90.00 % (full precision 95.00 %)" in text and "80.00 %, on 10 images" in text
    assert 'license: "cc-by-4.0"' in text and "apache" not in text
    assert config_of(tmp_path / "net")["evaluation"]["sqnr_db"] is None


def test_an_evaluation_is_added_later(pair: Pair, folder: Path) -> None:
    before = config_of(folder)
    add_evaluation(folder, Evaluation(n=7, top1=50.0))
    assert "top-1 50.00 %, on 7 images" in (folder / "README.md").read_text()
    after = config_of(folder)
    assert after.pop("evaluation")["n"] == 7
    assert after == {k: v for k, v in before.items() if k != "evaluation"}
    add_evaluation(folder, Evaluation(n=8, top1=51.0))
    assert "on 8 images" in (folder / "README.md").read_text()
    assert pair.which(erq.load(folder)) == "old"
    with pytest.raises(CheckpointError, match=r"is no folder with a config\.json"):
        add_evaluation(folder / "model.safetensors", Evaluation(n=8))


def test_a_folder_is_replaced_and_other_files_stay(pair: Pair, folder: Path) -> None:
    (folder / ".gitattributes").write_text("mine")
    for path in (folder, f"{folder}/"):  # an existing folder needs no separator
        erq.save(pair.new, path)
        assert pair.which(erq.load(folder)) == "new"
    assert names(folder) == FILES | {".gitattributes"}
    assert names(folder.parent) == {"net"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "# Mine\n"),
        ("README.md", None),  # the card, edited
        ("config.json", '{"model_type": "vit"}'),
        ("config.json", "no JSON"),
        ("model.safetensors", "no checkpoint"),
    ],
)
def test_files_of_others_are_not_replaced(
    pair: Pair, folder: Path, name: str, content: str | None
) -> None:
    file = folder / name
    if content is None:
        content = file.read_text().replace("## Use", "## How I use it")
    file.write_text(content)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError, match=name):
        erq.save(pair.new, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def saves_but_for(monkeypatch: pytest.MonkeyPatch, step: int, net: Any, path: str) -> bool:
    """Save, but stop before the `step`-th change to a folder; whether it came to that."""
    count = iter(range(100))
    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            change = getattr(os, name)

            def changed(path: Any, *more: Any, change: Any = change, **other: Any) -> Any:
                counts = change.__name__ != "unlink" or Path(path).name == "config.json"
                if counts and next(count) == step:
                    raise KeyboardInterrupt
                return change(path, *more, **other)

            patch.setattr(os, name, changed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a killed process tidies nothing
        try:
            erq.save(net, path)
        except KeyboardInterrupt:
            return False
    return True


def test_an_interrupted_replacement_leaves_one_of_the_models(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    for step in range(20):
        folder = tmp_path / str(step)
        erq.save(pair.old, f"{folder}/")
        done = saves_but_for(monkeypatch, step, pair.new, f"{folder}/")
        left.append(pair.which(erq.load(folder)))
        erq.save(pair.new, folder)  # and can be taken up again
        assert pair.which(erq.load(folder)) == "new" and names(folder) >= FILES
        if done:
            break
    # Three files written beside their names, config.json removed, three files renamed.
    assert left == ["old"] * 5 + ["new"] * 3


def test_an_interrupted_save_leaves_no_folder(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(20):
        if saves_but_for(monkeypatch, step, pair.new, f"{tmp_path}/net/"):
            break
        assert not (tmp_path / "net").exists()
    assert step == 4 and names(tmp_path / "net") == FILES


def test_save_refuses_what_it_cannot_write(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, text in (
        (f"{tmp_path}/file/", "is a file; name a folder"),
        (f"{tmp_path}/no/net/", "no does not exist; create it first"),
        (f"{tmp_path}/nul\0byte/", "could not be written"),
        (f"{tmp_path}/{'n' * 300}/", "could not be written"),
    ):
        with pytest.raises(CheckpointError, match=text):
            erq.save(pair.old, path)
    with pytest.raises(ValueError, match="a file has no card for an evaluation"):
        erq.save(pair.old, tmp_path / "net", evaluation=Evaluation(n=1))
    with pytest.raises(ValueError, match="license must be an identifier"):
        erq.save(pair.old, f"{tmp_path}/net/", license="Apache 2")
    with pytest.raises(ValueError, match="save takes a deployed model"):
        erq.save(torch.nn.Linear(1, 1), f"{tmp_path}/net/")
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("key", ["architecture", "config", "calibration", "sha256", "format"])
def test_a_config_that_contradicts_is_refused(folder: Path, key: str) -> None:
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {key: "other"}))
    for read in (erq.load, erq.inspect):
        with pytest.raises(CheckpointError, match=rf'config\.json: {key} is "other", but ') as e:
            read(folder)
        assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_a_config_of_another_save_is_refused(pair: Pair, folder: Path) -> None:
    erq.save(pair.new, f"{folder.parent}/new/")
    os.replace(folder.parent / "new" / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match="do not belong together"):
        erq.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("\xff\0", "not readable as JSON"),
        ("[]", "was not written by erq"),
        ('{"library_name": "timm"}', "was not written by erq"),
    ],
)
def test_a_broken_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        erq.load(folder)


def test_the_weights_alone_are_enough_and_needed(pair: Pair, folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "README.md").unlink()
    assert pair.which(erq.load(folder)) == "old"
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        erq.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"a folder without model\.safetensors"):
        erq.load(folder)


def command(*args: str) -> str:
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_commands_take_folders(tmp_path: Path) -> None:
    demo, out = ("--images", "demo", "--json"), f"{tmp_path}/net/"
    quantize = ("quantize", "demo", *demo, "--n", "4", "--method", "rtn", "--license", "cc-by-4.0")
    made = json.loads(command(*quantize, "-o", out))
    folder = tmp_path / "net"
    assert names(folder) == FILES
    assert made["file"] == str(folder)
    assert made["size_bytes"] == (folder / "model.safetensors").stat().st_size
    for path in (out, str(folder)):
        found = json.loads(command("eval", path, *demo, "--limit", "20", "--card"))
        assert found["evaluation"]["n"] == 20
        assert json.loads(command("inspect", path, "--json"))["calibration"]["n"] == 4
    card = (folder / "README.md").read_text()
    assert "on 20 images" in card and "cc-by-4.0" in card and "erq quantize demo" in card
