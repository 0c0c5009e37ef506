"""Checkpoints: what is written is what is loaded; every way to break a file is one clear error."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import erq
from erq import CheckpointError
from erq.config import QuantConfig
from erq.deployment import checkpoint
from erq.deployment.modules import QuantLinear
from erq_kernels import BackendError, dispatch

Build = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]

CONFIG: dict[str, Any] = {
    # The later glob wins: the order must survive. The head has float activations.
    "overrides": {"head": {"a_bits": 16}, "*.fc2": {"a_bits": 6}, "blocks.0.mlp.*": {"a_bits": 5}},
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint with every kind of site, and what its network computes.

    Args:
        net: the deployed network. data: its file's bytes. header, tensors: what the file holds.
        x, logits: images and the network's output. file: where tests put their variants.
    """

    net: Any
    data: bytes
    header: dict[str, Any]
    tensors: dict[str, Tensor]
    x: Tensor
    logits: Tensor
    file: Path

    def write(
        self, header: Any = None, tensors: dict[str, Tensor] | None = None, signed: bool = True
    ) -> Path:
        """The file with another header or other tensors; its digests made to fit if `signed`."""
        header = copy.deepcopy(self.header if header is None else header)
        tensors = self.tensors if tensors is None else tensors
        if signed:
            checkpoint._sign(header, tensors)
        text = header if isinstance(header, str) else json.dumps(header)
        safetensors.torch.save_file(
            {n: t.clone() for n, t in tensors.items()}, self.file, metadata={"erq": text}
        )
        return self.file

    def refusal(self) -> str:
        """The message of the one error with which the file is refused."""
        with pytest.raises(CheckpointError) as caught:
            erq.load(self.file)
        assert type(caught.value) is CheckpointError
        message = str(caught.value)
        assert message.startswith(str(self.file)), message
        assert "\n" not in message
        return message

    @torch.no_grad()
    def refused_or_same(self) -> bool:
        """Whether the file is refused; if it is not, it must be the same network, bit by bit."""
        try:
            net = erq.load(self.file, backend="reference")
        except CheckpointError as error:
            assert str(error).startswith(str(self.file))
            return True
        assert torch.equal(net(self.x), self.logits)
        return False


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(file, framework="pt") as f:
        header = json.loads(f.metadata()["erq"])
        return header, {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def saved(tiny_vit: Build, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(1)
    model = tiny_vit(depth=1, init_values=1.0)
    net = erq.deploy(erq.quantize(model, torch.randn(4, 3, 16, 16), CONFIG), backend="reference")
    file = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    erq.save(net, file)
    header, tensors = contents(file)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        return Saved(net, file.read_bytes(), header, tensors, x, net(x), file)


# Round trip


@torch.no_grad()
def test_saving_is_deterministic(saved: Saved, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    erq.save(saved.net, first)
    assert first.read_bytes() == saved.data
    erq.save(erq.load(first), second)
    assert second.read_bytes() == saved.data
    erq.save(copy.deepcopy(saved.net), second)
    assert second.read_bytes() == saved.data


def test_quantizing_again_gives_the_same_file(tiny_vit: Build, tmp_path: Path) -> None:
    model, images, files = tiny_vit(depth=1), torch.randn(4, 3, 16, 16), []
    for _ in range(2):
        erq.save(erq.deploy(erq.quantize(model, images)), tmp_path / "net")
        files.append((tmp_path / "net").read_bytes())
    assert files[0] == files[1]


@torch.no_grad()
def test_loaded_network_knows_all_that_the_deployed_one_did(saved: Saved) -> None:
    net: Any = erq.load(saved.write(), backend="reference")
    assert torch.equal(net(saved.x), saved.logits)
    assert net.erq_info == saved.net.erq_info
    assert [s.name for s in net.erq_info.sites] == [s.name for s in saved.net.erq_info.sites]
    assert list(net.erq_info.config.overrides) == list(CONFIG["overrides"])
    assert net.erq_info.config.for_site("blocks.0.mlp.fc2").a_bits == 5
    names = [r["name"] for r in saved.net.erq_report]
    assert [r["name"] for r in net.erq_report] == names and len(names) == 6
    for ours, theirs in zip(net.erq_report, saved.net.erq_report, strict=True):
        assert len(ours) == 5 and ours.items() <= theirs.items()
    assert erq.summary(net) == erq.summary(saved.net)
    assert not any(m.training for m in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    state = saved.net.state_dict()
    assert net.state_dict().keys() == state.keys() == saved.tensors.keys()
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())


def test_fresh_process_needs_nothing_of_calibration(saved: Saved, tmp_path: Path) -> None:
    saved.file.write_bytes(saved.data)
    safetensors.torch.save_file({"x": saved.x}, tmp_path / "x")
    program = """
import sys, torch, erq
from safetensors.torch import load_file, save_file
file, folder = sys.argv[1:]
net = erq.load(file, backend="reference")
with torch.no_grad():
    save_file({"logits": net(load_file(f"{folder}/x")["x"])}, f"{folder}/logits")
erq.save(net, f"{folder}/again")
print(sorted(m for m in sys.modules if m.startswith("erq.")))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(saved.file), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    loaded = run.stdout
    assert "'erq.deployment.checkpoint'" in loaded
    for module in ("calib", "reduce", "pipeline", "deployment.convert"):
        assert f"'erq.{module}" not in loaded
    assert torch.equal(safetensors.torch.load_file(tmp_path / "logits")["logits"], saved.logits)
    assert (tmp_path / "again").read_bytes() == saved.data


@torch.no_grad()
def test_loaded_network_outlives_its_file(saved: Saved) -> None:
    """Another program that writes over the file, in place, must not change a loaded network."""
    saved.file.write_bytes(saved.data)
    net = erq.load(saved.file, backend="reference")
    with open(saved.file, "r+b") as f:
        f.write(bytes(len(saved.data)))
    assert torch.equal(net(saved.x), saved.logits)
    os.truncate(saved.file, 0)
    assert torch.equal(net(saved.x), saved.logits)


@torch.no_grad()
def test_half_network_is_stored_in_float32(saved: Saved, tmp_path: Path) -> None:
    half = copy.deepcopy(saved.net).half()
    erq.save(half, tmp_path / "half")
    net = erq.load(tmp_path / "half", backend="reference")
    assert {t.dtype for t in net.state_dict().values()} == {t.dtype for t in saved.tensors.values()}
    assert torch.equal(net.half()(saved.x.half()), half(saved.x.half()))


@torch.no_grad()
def test_loading_with_packed_weights(saved: Saved) -> None:
    file = saved.write()
    net: Any = erq.load(file, backend="reference", weights="packed")
    assert torch.equal(net(saved.x), saved.logits)
    layers = [m for m in net.modules() if isinstance(m, QuantLinear) and m.a_bits < 16]
    assert layers and {layer.gemm for layer in layers} == {"qlinear_packed"}
    with pytest.raises(ValueError, match="weights are kept as one of int8, packed, got 'int4'"):
        erq.load("no such file", weights="int4")


def test_inspect_reads_the_header(saved: Saved) -> None:
    header = erq.inspect(saved.write())
    assert header.pop("size_bytes") == len(saved.data)
    assert header.pop("parameters") == sum(t.numel() for t in saved.tensors.values())
    expected = {k: v for k, v in saved.header.items() if k not in ("tensors", "sha256")}
    assert header == expected
    assert list(header["sites"]) == [s.name for s in saved.net.erq_info.sites]
    assert header["format"] == 2 and header["calibration"]["n"] == 4
    assert header["sites"]["blocks.0.attn.qkv"] | {"errors": {}} == {
        "kind": "linear",
        "norm": "blocks.0.norm1",
        "bits": 4,
        "a_bits": 4,
        "scheme": "dual",
        "shape": [72, 24],
        "dual": 3,
        "bias": True,
        "channels": False,
        "errors": {},
    }
    assert header["sites"]["blocks.0.mlp.fc2"]["channels"] is True
    assert QuantConfig.from_dict(header["config"]) == QuantConfig.from_dict(CONFIG)


# Writing


def test_save_refuses_what_is_not_deployed(saved: Saved, tiny_vit: Build, tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    sim = erq.quantize(model, torch.randn(4, 3, 16, 16))
    for other in (model, sim, erq.swap_linears(nn.Sequential(nn.Linear(4, 4))), nn.Identity()):
        with pytest.raises(ValueError, match="save takes a deployed model"):
            erq.save(other, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net, "head", nn.Linear(24, 5)), "head is a Linear now"),
        (lambda net: net.blocks.append(copy.deepcopy(net.blocks[0])), r"tensor blocks\.1\.\S+ is"),
        (
            lambda net: delattr(net, "norm"),
            r"tensor norm\.bias is missing, expected torch\.float32",
        ),
        (lambda net: net.norm.weight.fill_(math.nan), r"tensor norm\.weight holds NaN"),
        (lambda net: setattr(net.norm, "weight", nn.Parameter(torch.ones(7))), r"norm\.weight is"),
    ],
)
def test_save_refuses_what_would_not_load(
    change: Callable[[Any], Any], message: str, saved: Saved, tmp_path: Path
) -> None:
    net = copy.deepcopy(saved.net)
    with torch.no_grad():
        change(net)
    with pytest.raises(ValueError, match=rf"changed since it was deployed .*{message}"):
        erq.save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_save_names_the_folder_that_is_missing(saved: Saved, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "net.safetensors"
    with pytest.raises(CheckpointError, match=r"the folder .*no/such does not exist; create it"):
        erq.save(saved.net, missing)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="file does not exist; create it"):
        erq.save(saved.net, tmp_path / "file" / "net")
    for name in ("n" * 300, "nul\0byte"):
        with pytest.raises(CheckpointError, match="could not be written"):
            erq.save(saved.net, tmp_path / name)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CheckpointError, match="is a folder or a device"):
        erq.save(saved.net, pipe)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "pipe"}


@pytest.fixture
def old_file(tmp_path: Path) -> Iterator[Path]:
    """A file that a failing save must leave alone, and leave alone in its folder."""
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"old")
    yield file
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_failing_disk_leaves_the_old_file(
    call: str, number: int, saved: Saved, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError) as caught:
        erq.save(saved.net, old_file)
    message = str(caught.value)
    assert message.startswith(f"{old_file} could not be written ({os.strerror(number)})")
    assert f"{len(saved.data):,} bytes are needed" in message


def test_write_that_is_cut_off_leaves_the_old_file(saved: Saved, old_file: Path) -> None:
    """A real one: the kernel takes the first bytes and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved.data) // 2, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            erq.save(saved.net, old_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_read_only_folder(saved: Saved, old_file: Path) -> None:
    old_file.parent.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"could not be written \(Permission denied\)"):
            erq.save(saved.net, old_file)
    finally:
        old_file.parent.chmod(0o700)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupt_leaves_the_old_file(
    call: str, saved: Saved, old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        erq.save(saved.net, old_file)


def test_save_replaces_and_gives_usual_permissions(saved: Saved, tmp_path: Path) -> None:
    file, other = tmp_path / ("n" * 255), tmp_path / "other"
    file.write_bytes(b"old")
    other.write_bytes(b"")
    erq.save(saved.net, file)
    assert file.read_bytes() == saved.data
    assert file.stat().st_mode == other.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


# Reading what is no checkpoint


def test_load_names_a_file_that_is_not_there(saved: Saved, tmp_path: Path) -> None:
    for path, text in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "a folder without model.safeten"),
    ):
        for read in (erq.load, erq.inspect):
            with pytest.raises(CheckpointError, match=text) as caught:
                read(path)
            assert str(path) in str(caught.value)
    for path in (str(tmp_path / ("n" * 300)), "nul\0byte"):
        with pytest.raises(CheckpointError, match="no such file"):
            erq.load(path)


def test_load_refuses_other_files(saved: Saved) -> None:
    torch.save({"a": torch.ones(3)}, saved.file)
    for data in (saved.file.read_bytes(), b"", b"{}", b"\0" * 8, b"\xff" * 64, b"erq" * 1000):
        saved.file.write_bytes(data)
        assert "not a readable .safetensors file, cut off or damaged" in saved.refusal()
    for metadata in (None, {}, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.ones(3)}, saved.file, metadata=metadata)
        assert "without an erq header" in saved.refusal()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "nan"]
)
def test_load_refuses_another_header(text: str, saved: Saved) -> None:
    saved.write(text, signed=False)
    assert "the erq header is not the expected JSON object" in saved.refusal()


def test_load_asks_for_a_known_backend_first(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose one of auto, "):
        erq.load("no such file", backend="gpu")
    monkeypatch.setattr(dispatch, "_kernels", dict(dispatch._kernels))
    for op in ("quantize", "qlinear", "qattention", "dequant_linear"):
        dispatch.register(op, "triton", lambda *_: None, lambda *_: "needs a moon")
    with pytest.raises(BackendError, match=r"\(triton: needs a moon\)"):
        erq.load(saved.write(), backend="triton")


# Damage: the digests find it


def test_every_bit_of_the_length_matters(saved: Saved) -> None:
    for bit in range(64):
        data = bytearray(saved.data)
        data[bit // 8] ^= 1 << bit % 8
        saved.file.write_bytes(data)
        saved.refusal()


@given(where=st.floats(0, 1, exclude_max=True), part=st.booleans(), flip=st.integers(1, 255))
@settings(max_examples=80)
def test_flipped_byte(saved: Saved, where: float, part: bool, flip: int) -> None:
    start = 8 + int.from_bytes(saved.data[:8], "little")
    index = int(where * start) if part else start + int(where * (len(saved.data) - start))
    data = bytearray(saved.data)
    data[index] ^= flip
    saved.file.write_bytes(data)
    refused = saved.refused_or_same()
    if index >= start:
        assert refused, "a tensor changed and nobody noticed"
        with pytest.raises(CheckpointError, match="does not match its digest"):
            erq.inspect(saved.file)


def test_flipped_byte_is_named(saved: Saved) -> None:
    for name, tensor in list(saved.tensors.items())[::4]:
        raw = tensor.clone()
        raw.reshape(-1).view(torch.uint8)[-1] ^= 64
        saved.write(tensors={**saved.tensors, name: raw}, signed=False)
        assert f"tensor {name} does not match its digest" in saved.refusal()


@given(length=st.integers(0, 1 << 20))
@settings(max_examples=80)
def test_truncated_file(saved: Saved, length: int) -> None:
    length %= len(saved.data)
    saved.file.write_bytes(saved.data[:length])
    assert "cut off or damaged" in saved.refusal()
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        erq.inspect(saved.file)


@given(tail=st.binary(min_size=1, max_size=100))
def test_appended_bytes(saved: Saved, tail: bytes) -> None:
    saved.file.write_bytes(saved.data + tail)
    assert "cut off or damaged" in saved.refusal()


@given(st.data())
@settings(max_examples=50)
def test_replaced_stretch(saved: Saved, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(saved.data) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=300))
    broken = (saved.data[:start] + patch + saved.data[start + len(patch) :])[: len(saved.data)]
    assume(broken != saved.data)
    saved.file.write_bytes(broken)
    saved.refused_or_same()


# Tensors that do not fit, with digests that do not fit either, and with digests that do


def names(saved: Saved) -> list[str]:
    return sorted(saved.tensors)


@pytest.mark.parametrize("signed", [False, True])
@given(data=st.data())
@settings(max_examples=15)
def test_renamed_tensor(signed: bool, saved: Saved, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(saved)))
    new = data.draw(st.one_of(st.just(name + "x"), st.text(max_size=8), st.just(name.upper())))
    assume(new not in saved.tensors and new != "__metadata__" and new.isprintable())
    tensors = {new if n == name else n: t for n, t in saved.tensors.items()}
    saved.write(tensors=tensors, signed=signed)
    assert f"tensor {name} is missing, expected torch." in saved.refusal()


@pytest.mark.parametrize("signed", [False, True])
def test_dropped_tensor(signed: bool, saved: Saved) -> None:
    for name in names(saved)[signed::3]:
        tensors = {n: t for n, t in saved.tensors.items() if n != name}
        saved.write(tensors=tensors, signed=signed)
        shape = list(saved.tensors[name].shape)
        dtype = saved.tensors[name].dtype
        assert f"tensor {name} is missing, expected {dtype} {shape}" in saved.refusal()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "name", ["extra", "blocks.0.attn.proj.scale2", "head.x_scale", "blocks.1.norm1.weight", "norm"]
)
def test_added_tensor(name: str, signed: bool, saved: Saved) -> None:
    saved.write(tensors={**saved.tensors, name: torch.ones(24)}, signed=signed)
    assert f"tensor {name} is unknown to the architecture" in saved.refusal()


@pytest.mark.parametrize("signed", [False, True])
@given(data=st.data())
@settings(max_examples=15)
def test_reshaped_tensor(signed: bool, saved: Saved, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(saved)))
    tensor = saved.tensors[name]
    shapes = [(-1, 1), (1, *tensor.shape), (*tensor.shape, 1)]
    changed = [tensor.reshape(s) for s in shapes] + [
        torch.cat([tensor.reshape(-1)] * 2),
        tensor.reshape(-1)[:-1],
        tensor.reshape(-1)[:0],
    ]
    new = data.draw(st.sampled_from([t for t in changed if t.shape != tensor.shape]))
    saved.write(tensors={**saved.tensors, name: new}, signed=signed)
    message = saved.refusal()
    assert f"tensor {name} is {new.dtype} {list(new.shape)}, expected {tensor.dtype} " in message
    assert message.endswith(str(list(tensor.shape)))


@pytest.mark.parametrize("signed", [False, True])
@given(data=st.data())
@settings(max_examples=15)
def test_tensor_of_another_dtype(signed: bool, saved: Saved, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names(saved)))
    tensor = saved.tensors[name]
    types = (torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.int32)
    dtype = data.draw(st.sampled_from([t for t in types if t != tensor.dtype]))
    same_bytes = data.draw(st.booleans())
    if same_bytes and tensor.dim():
        assume(dtype.itemsize == tensor.dtype.itemsize)
    new = tensor.view(dtype) if same_bytes and tensor.dim() else tensor.to(dtype)
    saved.write(tensors={**saved.tensors, name: new}, signed=signed)
    assert f"tensor {name} is {dtype} {list(tensor.shape)}, expected" in saved.refusal()


QKV, FC2, HEAD = "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"
BAD_VALUES: list[tuple[str, int, float, str]] = [
    (f"{QKV}.scale", 2, 0.0, "must be finite and > 0"),
    (f"{QKV}.scale", 2, -1.0, "must be finite and > 0"),
    (f"{HEAD}.scale", 4, 0.0, "must be finite and > 0"),
    (f"{FC2}.scale", 0, 1e-45, "so must its reciprocal"),
    ("patch_embed.proj.scale", 1, 0.0, "must be finite and > 0"),
    (f"{QKV}.scale2", 71, -1e-3, "must be finite and > 0"),
    (f"{QKV}.zero_point", 3, 200, "must fit int8"),
    (f"{QKV}.zero_point", 3, -(2**31), "must fit int8"),
    (f"{QKV}.zero_point2", 3, -200, "must fit int8"),
    (f"{HEAD}.zero_point", 4, 2**31 - 1, "must fit int8"),
    ("patch_embed.proj.zero_point", 0, -128, "must fit int8"),
    (f"{QKV}.dual_columns", 0, -1, "must be sorted, distinct and inside 0..23"),
    (f"{QKV}.dual_columns", 2, 24, "must be sorted, distinct and inside 0..23"),
    (f"{QKV}.dual_columns", 0, 23, "must be sorted, distinct and inside 0..23"),
    (f"{FC2}.x_scale", 0, 0.0, "must be finite and > 0"),
    (f"{FC2}.x_scale", 0, -0.1, "must be finite and > 0"),
    (f"{FC2}.x_zero_point", 0, -(2**31), "must be below 2**24"),
    (f"{FC2}.x_channel_scale", 5, 0.0, "must be finite and > 0"),
    (f"{FC2}.x_channel_zero_point", 5, 2**30, "must be below 2**24"),
    ("blocks.0.attn.qk.q_scale", 0, 0.0, "must be finite and > 0"),
    ("blocks.0.attn.qk.k_scale", 0, -1.0, "must be finite and > 0"),
    ("blocks.0.attn.qk.k_zero_point", 0, 2**12, "must be below 2**12"),
    ("blocks.0.attn.av.p_scale", 0, 0.0, "must be finite and > 0"),
    ("blocks.0.attn.av.v_scale", 0, -2.0, "must be finite and > 0"),
    ("blocks.0.attn.av.v_zero_point", 0, -(2**12), "must be below 2**12"),
]


@pytest.mark.parametrize(("name", "index", "value", "text"), BAD_VALUES)
def test_value_that_no_quantizer_has(
    name: str, index: int, value: float, text: str, saved: Saved
) -> None:
    tensor = saved.tensors[name].clone()
    tensor.reshape(-1)[index] = value
    saved.write(tensors={**saved.tensors, name: tensor})
    message = saved.refusal()
    assert name in message and text in message


def test_float_that_is_not_finite(saved: Saved) -> None:
    floats = [n for n, t in saved.tensors.items() if t.is_floating_point()][::2]
    for name, value in zip(floats, cycle([math.nan, math.inf, -math.inf]), strict=False):
        tensor = saved.tensors[name].clone()
        tensor.reshape(-1)[-1] = value
        saved.write(tensors={**saved.tensors, name: tensor})
        assert f"tensor {name} holds NaN or infinite values" in saved.refusal()


@given(data=st.data())
@settings(max_examples=40)
@torch.no_grad()
def test_any_signed_bytes_give_a_network_or_one_error(saved: Saved, data: st.DataObject) -> None:
    """Digests are no signature: whoever makes them fit must still not break anything."""
    name = data.draw(st.sampled_from(names(saved)))
    tensor = saved.tensors[name].clone()
    raw = tensor.reshape(-1).view(torch.uint8)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file = saved.write(tensors={**saved.tensors, name: tensor})
    try:
        net = erq.load(file, backend="reference")
    except CheckpointError as error:
        assert str(error).startswith(str(file)) and name.rpartition(".")[0] in str(error)
    else:
        assert net(saved.x).shape == saved.logits.shape


# Headers that do not fit, with digests that do


def test_format_1_says_what_its_settings_were(saved: Saved) -> None:
    header = edited(saved.header, ("format",), 1)
    for name in (
        "rotate_heads",
        "ranges",
        "reparameterize_hidden",
    ):  # fields that came with format 2
        header = edited(header, ("config", name), DROP)
    file = saved.write(header)
    net: Any = erq.load(file, backend="reference")
    assert (net.erq_info.config.rotate_heads, net.erq_info.config.ranges) == (False, "official")
    assert torch.equal(net(saved.x), saved.logits)


def edited(header: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy of the header with `value` at `path`; DROP removes the key."""
    header = copy.deepcopy(header)
    at: Any = header
    for key in path[:-1]:
        at = at[key]
    if value is DROP:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return header


DROP = object()
SITE = ("sites", QKV)
BAD_HEADERS: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("format",), 3, "format 3, this version reads up to 2: upgrade erq"),
    (("format",), 10**30, "this version reads up to 2: upgrade erq"),
    *((("format",), v, "the header's format must be 1 or more") for v in (0, -1, "1", 1.0, True)),
    (("format",), None, "the header's format must be 1 or more, got None"),
    (("format",), DROP, "the erq header is not the expected JSON object"),
    (("family",), "swin", "unknown model family 'swin'"),
    (("family",), 3, "the header's family must be a string, got 3"),
    *(
        ((key,), value, f"the header's {key} must be {what}, got {got}")
        for key, what in (
            ("family", "a string"),
            ("architecture", "a string"),
            ("version", "a string"),
            ("created_by", "a string"),
            ("arch_kwargs", "an object"),
            ("pretrained_cfg", "an object"),
            ("config", "an object"),
            ("calibration", "an object"),
            ("sites", "an object"),
        )
        for value, got in ((DROP, "nothing"), (None, "None"), ([1], "[1]"))
    ),
    (("config", "w_bits"), 9, "w_bits must be an integer from 2 to 8"),
    (("config", "w_bits"), -4, "w_bits must be an integer from 2 to 8"),
    (("config", "future"), 1, "unknown config field 'future'"),
    *((("calibration", "n"), v, "must hold an integer n and a") for v in (DROP, "4", 4.0, None)),
    (("calibration", "sha256"), 5, "must hold an integer n and a string sha256"),
    (("config", "overrides"), [], "overrides must map globs to fields"),
    (("config", "keep_float"), "head", "keep_float must be a list of globs"),
    (("arch_kwargs", "depth"), DROP, "arch_kwargs: depth is missing"),
    (("arch_kwargs", "qkv_bias"), DROP, "arch_kwargs: qkv_bias is missing"),
    (("arch_kwargs", "embed_dim"), DROP, "describes no model"),
    (("arch_kwargs", "depth"), 2, "tensor blocks.1."),
    (("arch_kwargs", "depth"), 0, "describes no model"),
    (("arch_kwargs", "depth"), -1, "describes no model"),
    (("arch_kwargs", "depth"), 10**12, "depth 1000000000000 needs more than the"),
    (("arch_kwargs", "depth"), "1", "describes no model"),
    (("arch_kwargs", "embed_dim"), 48, "shape must be [48, 48], got [24, 48]"),
    (("arch_kwargs", "embed_dim"), -24, "describes no model"),
    (("arch_kwargs", "num_heads"), 5, "describes no model"),
    (("arch_kwargs", "num_heads"), 0, "describes no model"),
    (("arch_kwargs", "num_heads"), None, "describes no model"),
    (("arch_kwargs", "num_classes"), 6, "site head: shape must be [6, 24], got [5, 24]"),
    (("arch_kwargs", "num_classes"), 0, "site head: a Identity is no linear"),
    (("arch_kwargs", "img_size"), [20, 16], "tensor pos_embed is torch.float32 [1, 17, 24]"),
    (("arch_kwargs", "patch_size"), [0, 0], "describes no model"),
    (("arch_kwargs", "in_chans"), 4, "shape must be [24, 64], got [24, 48]"),
    (("arch_kwargs", "mlp_hidden"), 64, "shape must be [64, 24], got [48, 24]"),
    (("arch_kwargs", "mlp"), "conv", "describes no model"),
    (("arch_kwargs", "mlp"), "swiglu", "describes no model"),
    (("arch_kwargs", "norm"), "BatchNorm2d", "describes no model: StopIteration"),
    (("arch_kwargs", "norm_eps"), "tiny", "describes no model"),
    (("arch_kwargs", "norm_eps"), -1e-6, "has eps -1e-06, expected 0..1"),
    (("arch_kwargs", "norm_eps"), math.inf, "has eps inf, expected 0..1"),
    (("arch_kwargs", "norm_eps"), math.nan, "describes no model"),
    (("arch_kwargs", "act"), "sin", "describes no model"),
    (("arch_kwargs", "distilled"), "yes", "distilled cannot be 'yes'"),
    (("arch_kwargs", "class_token"), False, "describes no model"),
    (("arch_kwargs", "reg_tokens"), 4, "tensor reg_token is missing"),
    (("arch_kwargs", "layer_scale"), False, "tensor blocks.0.ls1.gamma is unknown"),
    (("arch_kwargs", "qk_norm"), True, "tensor blocks.0.attn.k_norm.bias is missing"),
    (("arch_kwargs", "future"), 1, "describes no model"),
    (("arch_kwargs", "drop_rate"), 0.5, "arch_kwargs: drop_rate is unknown"),
    (("sites",), {}, "tensor blocks.0.attn.proj.weight is missing"),
    ((*SITE,), DROP, f"tensor {QKV}.weight is missing"),
    ((*SITE,), None, f"site {QKV} must be an object whose kind is one of"),
    ((*SITE,), 7, f"site {QKV} must be an object whose kind is one of"),
    ((*SITE, "kind"), "norm", f"site {QKV} must be an object whose kind is one of"),
    ((*SITE, "kind"), ["linear"], f"site {QKV} must be an object whose kind is one of"),
    ((*SITE, "kind"), "conv", f"site {QKV}: scheme must be affine, got 'dual'"),
    ((*SITE, "kind"), "matmul_qk", f"site {QKV}: scheme must be affine, got 'dual'"),
    *(((*SITE, k), DROP, f"site {QKV} lacks '{k}'") for k in checkpoint._SITE_FIELDS["linear"]),
    *(
        ((*SITE, "bits"), v, f"site {QKV}: bits must be an integer from 2 to 8, got {v!r}")
        for v in (1, 9, -4, 4.0, "4", None, True)
    ),
    ((*SITE, "bits"), 3, f"tensor {QKV}.packed is torch.uint8 [864], expected torch.uint8 [648]"),
    ((*SITE, "bits"), 8, f"tensor {QKV}.packed is torch.uint8 [864], expected torch.uint8 [1728]"),
    *(
        ((*SITE, "a_bits"), v, f"site {QKV}: a_bits must be an integer from 2 to 8, or 16, got {v}")
        for v in (1, 9, 15, 17, -16, 4.0, None, False)
    ),
    ((*SITE, "a_bits"), 16, f"tensor {QKV}.x_scale is unknown to the architecture"),
    *(
        ((*SITE, "shape"), v, f"site {QKV}: shape must be")
        for v in (
            [24, 72],
            [72],
            [72, 24, 1],
            [72, -24],
            [72, 0],
            [72.0, 24],
            "72",
            None,
            [True, 24],
        )
    ),
    ((*SITE, "shape"), [10**9, 10**9], f"site {QKV}: shape must be [72, 24]"),
    *(((*SITE, "dual"), v, f"site {QKV}: dual must be") for v in (-1, 0, 24, 1e3, None, "3")),
    ((*SITE, "dual"), 4, f"tensor {QKV}.dual_columns is torch.int64 [3], expected torch.int64 [4]"),
    ((*SITE, "scheme"), "affine", f"site {QKV}: dual must be 0 in the affine scheme"),
    ((*SITE, "scheme"), "log", f"site {QKV}: scheme must be affine or dual, got 'log'"),
    ((*SITE, "scheme"), {}, f"site {QKV}: scheme must be affine or dual"),
    ((*SITE, "bias"), False, f"tensor {QKV}.bias is unknown to the architecture"),
    ((*SITE, "bias"), 1, f"site {QKV}: bias must be true or false, got 1"),
    ((*SITE, "norm"), 3, f"site {QKV}: norm must be a name or null, got 3"),
    ((*SITE, "errors"), [1], f"site {QKV}: errors must be an object of numbers"),
    ((*SITE, "errors"), {"error_float": "x"}, f"site {QKV}: errors must be an object of numbers"),
    (("sites", "head", "scheme"), "dual", "site head: dual must be 0 in the affine scheme"),
    ((*SITE, "channels"), 1, f"site {QKV}: channels must be true or false, got 1"),
    ((*SITE, "channels"), True, f"tensor {QKV}.x_channel_scale is missing"),
    (("sites", FC2, "channels"), False, f"tensor {FC2}.x_channel_scale is unknown"),
    (("sites", FC2, "a_bits"), 16, f"site {FC2}: channels must be false with float activations"),
    (("sites", "patch_embed.proj", "channels"), True, "channels must be false, got True"),
    (("sites", "patch_embed.proj", "a_bits"), 4, "tensor patch_embed.proj.x_scale is missing"),
    (("sites", "patch_embed.proj", "scheme"), "dual", "scheme must be affine, got 'dual'"),
    (("sites", "blocks.0.attn.qk"), DROP, "blocks.0.attn: qk and av must both be sites"),
    (("sites", "blocks.0.attn.av"), DROP, "blocks.0.attn: qk and av must both be sites"),
    (("sites", "blocks.0.attn.qk", "kind"), "matmul_av", "site blocks.0.attn.qk: scheme must be"),
    (("sites", "blocks.0.attn.qk", "bits"), 0, "site blocks.0.attn.qk: bits must be"),
    *(
        (("sites", "blocks.0.attn.qk", "temperature"), v, "temperature must be a number > 0")
        for v in (0.0, -0.5, math.nan, math.inf, None, "x", True)
    ),
    (("sites", "blocks.0.attn.qk", "temperature"), 1e300, "q_scale · k_scale · temperature must"),
    (
        ("sites", "blocks.0.attn.av", "scheme"),
        "affine",
        "log_sqrt2 or log_sqrt2_zero, got 'affine'",
    ),
    (("sites", "blocks.0.attn.av", "bits"), DROP, "site blocks.0.attn.av lacks 'bits'"),
    (("sites", "blocks.0.attn.proj"), {"kind": "conv"}, "site blocks.0.attn.proj lacks 'norm'"),
]


@pytest.mark.parametrize(
    ("path", "value", "text"),
    BAD_HEADERS,
    ids=[f"{'/'.join(map(str, p))}={'DROP' if v is DROP else v!r}"[:60] for p, v, _ in BAD_HEADERS],
)
def test_header_that_is_wrong(
    path: tuple[str | int, ...], value: Any, text: str, saved: Saved
) -> None:
    saved.write(edited(saved.header, path, value))
    assert text in saved.refusal()


@pytest.mark.parametrize(
    "name", ["blocks.0", "blocks.0.norm1", "blocks.1.attn.qkv", "nowhere", "", "head.", "blocks"]
)
def test_site_that_is_no_layer(name: str, saved: Saved) -> None:
    header = edited(saved.header, ("sites", name), saved.header["sites"]["head"])
    saved.write(header)
    assert "the header describes no model" in saved.refusal()


@pytest.mark.parametrize("field", ["tensors", "sha256"])
@pytest.mark.parametrize("value", [DROP, None, {}, "x", 3])
def test_digests_that_are_not_there(field: str, value: Any, saved: Saved) -> None:
    header = edited(saved.header, (field,), value)
    if field == "tensors":
        header["sha256"] = checkpoint._header_digest(header)
    saved.write(header, signed=False)
    message = saved.refusal()
    if field == "sha256":
        assert "the header does not match its digest" in message
    else:
        assert "the header's tensors must be an object" in message or "tensor " in message


def test_digest_of_one_tensor_is_not_there(saved: Saved) -> None:
    header = edited(saved.header, ("tensors", f"{QKV}.packed"), DROP)
    header["sha256"] = checkpoint._header_digest(header)
    saved.write(header, signed=False)
    assert f"tensor {QKV}.packed is unknown to the header" in saved.refusal()


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all values in a JSON tree but its root, inner ones included."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, child in items:
        yield (*path, key)
        yield from leaves(child, (*path, key))


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from([2**31, 2**63, -(2**63), 10**40]),
        st.floats(),
        st.text(max_size=6),
        st.sampled_from(["linear", "conv", "dual", "affine", "log_sqrt2", "gelu", "avg", "silu"]),
    ),
    lambda child: st.one_of(
        st.lists(child, max_size=3), st.dictionaries(st.text(max_size=4), child, max_size=2)
    ),
    max_leaves=4,
)


@given(data=st.data())
@settings(max_examples=120)
@torch.no_grad()
def test_any_signed_header_gives_a_network_or_one_error(saved: Saved, data: st.DataObject) -> None:
    paths = [p for p in leaves(saved.header) if p[0] not in ("tensors", "sha256")]
    path = data.draw(st.sampled_from(paths))
    value = data.draw(st.one_of(JSON, st.just(DROP)))
    header = edited(saved.header, path, value)
    file = saved.write(header)
    try:
        net = erq.load(file, backend="reference")
    except CheckpointError as error:
        assert str(error).startswith(str(file)) and "\n" not in str(error)
        return
    y = net(saved.x)
    described = ("architecture", "version", "created_by", "pretrained_cfg", "calibration", "config")
    if path[0] in described or "errors" in path or "norm" in path:
        assert torch.equal(y, saved.logits), "a field that only describes changed the result"


def test_inspect_fills_in_settings(saved: Saved) -> None:
    """A reader need not know which version began to write a field."""
    header = erq.inspect(saved.write(edited(saved.header, ("config",), {"w_bits": 3})))
    assert header["config"] == QuantConfig(w_bits=3).to_dict()


@pytest.mark.parametrize("key", ["version", "created_by", "calibration", "config"])
def test_unsigned_header_change_is_found(key: str, saved: Saved) -> None:
    value = {"seed": 7} if key == "config" else {**saved.header["calibration"], "n": 5}
    value = value if isinstance(saved.header[key], dict) else "9.9"
    saved.write(edited(saved.header, (key,), value), signed=False)
    assert "the header does not match its digest: it was changed or damaged" in saved.refusal()
    with pytest.raises(CheckpointError, match="does not match its digest"):
        erq.inspect(saved.file)


@pytest.mark.parametrize(
    ("path", "value"), [(SITE, None), ((*SITE, "bits"), 9), (("config",), 3), (("sites",), DROP)]
)
def test_inspect_refuses_a_wrong_header(
    path: tuple[str | int, ...], value: Any, saved: Saved
) -> None:
    saved.write(edited(saved.header, path, value))
    with pytest.raises(CheckpointError) as caught:
        erq.inspect(saved.file)
    assert str(caught.value).startswith(str(saved.file))
