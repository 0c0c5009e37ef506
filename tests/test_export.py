"""Exports: torch.export and AOTInductor of deployed models, and ONNX files that runtimes run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import erq
from erq.cli import app

Build = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[1]
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))),
    reason="needs onnx, onnxruntime and onnxscript (pip install 'erq[export]')",
)
# torch's exporter uses what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def deployed(model: Any, config: Any, backend: str = "reference") -> Any:
    size = model.patch_embed.img_size
    return erq.deploy(erq.quantize(model, torch.randn(8, 3, *size), config), backend)


def images_for(model: Any, n: int) -> Tensor:
    return torch.randn(n, 3, *model.patch_embed.img_size)


# torch


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("build", ["tiny_vit", "tiny_swin"])
@torch.no_grad()
def test_torch_export_keeps_every_bit(
    build: str, backend: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(build)()
    net = deployed(model, {"method": "rtn"}, backend)
    program = torch.export.export(net, (images_for(model, 2),), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 5):
        x = images_for(model, n)
        assert torch.equal(program.module()(x), net(x))
        assert torch.equal(again(x), net(x))


RUN_PACKAGE = """
import sys, torch
package, images, imports = sys.argv[1:]
if imports == "yes":
    import erq_kernels
try:
    net = torch._inductor.aoti_load_package(package)
    torch.save(net(torch.load(images)), images + ".out")
except Exception as error:
    print(error)
    raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@torch.no_grad()
def test_aot_inductor_keeps_every_bit_and_needs_erq_kernels(
    tiny_vit: Build, tmp_path: Path
) -> None:
    model = tiny_vit(depth=1)
    net = deployed(model, {"method": "rtn"}, "auto")
    program = torch.export.export(net, (images_for(model, 2),), dynamic_shapes=BATCH)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "net.pt2")
    )
    x = images_for(model, 3)
    torch.save(x, tmp_path / "x")
    for imports, code in (("yes", 0), ("no", 3)):
        done = subprocess.run(
            [sys.executable, "-c", RUN_PACKAGE, package, str(tmp_path / "x"), imports],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert "Could not find schema for erq::" in done.stdout, done.stdout
        else:
            assert torch.equal(torch.load(tmp_path / "x.out"), net(x))


# ONNX


def run_onnx(file: Path, x: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def check_agrees(net: Any, file: Path, x: Tensor) -> None:
    """Equal but for codes on a rounding boundary: most images to fp32's noise, none far off."""
    with torch.no_grad():
        want = net(x)
    error = (run_onnx(file, x) - want).abs().amax(dim=1) / want.std()
    assert float(error.median()) < 1e-4, error
    assert float(error.max()) < 0.3, error


@needs_onnx
@pytest.mark.parametrize(
    ("build", "codes", "config"),
    [
        ("tiny_vit", "int4", {}),
        ("tiny_vit", "int8", {}),
        ("tiny_vit", "int4", {"w_bits": 3, "a_bits": 8, "image_bits": 8}),
        ("tiny_vit", "int4", {"a_bits": 16, "method": "rtn"}),
        ("tiny_vit", "int4", {"w_bits": 6, "attention": "float", "keep_float": ["head"]}),
        ("tiny_swin", "int4", {"a_bits": 8}),
    ],
)
def test_onnx_runtime_agrees(
    build: str, codes: str, config: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    import onnx

    model = request.getfixturevalue(build)()
    net, file = deployed(model, config), tmp_path / "net.onnx"
    erq.export_onnx(net, file, codes)
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    assert {o.domain for o in graph.opset_import} <= {"", "ai.onnx"}
    types = Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in graph.graph.initializer)
    assert (types["UINT4"] > 0) == (codes == "int4" and config.get("w_bits", 4) <= 4)
    assert types["INT8"] + types["UINT4"] >= 5
    check_agrees(net, file, images_for(model, 16))


@needs_onnx
def test_simulated_and_deployed_models_give_one_file(tiny_vit: Build, tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    sim = erq.quantize(model, images_for(model, 4), {"method": "repq"})
    before = {n: t.clone() for n, t in sim.state_dict().items()}
    erq.export_onnx(sim, tmp_path / "sim.onnx")
    net = erq.deploy(sim)
    erq.export_onnx(net, tmp_path / "net.onnx")
    assert (tmp_path / "sim.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
    assert all(torch.equal(t, before[n]) for n, t in sim.state_dict().items())
    x = images_for(model, 2)
    with torch.no_grad():
        assert torch.equal(net(x), erq.deploy(sim)(x))  # neither is changed
    import onnx

    about = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(about["erq"])["config"]["method"] == "repq"


@needs_onnx
def test_zero_points_outside_their_type(tiny_vit: Build, tmp_path: Path) -> None:
    """Of weights: int8 holds code − zero point. Of activations: values without a QuantizeLinear."""
    model = tiny_vit(depth=1)
    net = deployed(model, {"method": "rtn", "a_bits": 8})
    fc1, fc2 = net.blocks[0].mlp.fc1, net.blocks[0].mlp.fc2
    fc1.zero_point[0] -= 20
    fc2.x_zero_point = torch.tensor(-3, dtype=torch.int32)
    fc1.repack()
    fc2.repack()
    erq.export_onnx(net, tmp_path / "net.onnx")
    check_agrees(net, tmp_path / "net.onnx", images_for(model, 16))


@needs_onnx
def test_images_that_are_not_finite_come_out_as_nan(tiny_vit: Build, tmp_path: Path) -> None:
    model = tiny_vit(depth=1)
    erq.export_onnx(deployed(model, {"method": "rtn"}), tmp_path / "net.onnx")
    x = images_for(model, 4)
    x[1, 0, 3, 3], x[2, 2, 0, 0] = float("nan"), float("inf")
    wrong = run_onnx(tmp_path / "net.onnx", x).isnan()
    assert wrong[1:3].all() and not wrong[::3].any()


def test_export_refuses(tiny_vit: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit(depth=1)
    with pytest.raises(ValueError, match="takes what erq"):
        erq.export_onnx(model, tmp_path / "net.onnx")
    net = deployed(model, {"method": "rtn"})
    with pytest.raises(ValueError, match="codes must be one of int4, int8, got 'int3'"):
        erq.export_onnx(net, tmp_path / "net.onnx", "int3")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"needs onnx, onnxscript: pip install 'erq\[export\]'"):
        erq.export_onnx(net, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_command(tmp_path: Path) -> None:
    packed, file = tmp_path / "net.safetensors", tmp_path / "net.onnx"
    demo = ("--images", "demo", "--n", "4", "--method", "rtn", "--out", str(packed))
    assert CliRunner().invoke(app, ["quantize", "demo", *demo]).exit_code == 0
    done = CliRunner().invoke(app, ["export", str(packed), "--onnx", str(file), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["size_bytes"] == file.stat().st_size
    check_agrees(erq.load(packed, "reference"), file, torch.randn(16, 3, 32, 32))
    done = CliRunner().invoke(app, ["export", "demo", "--onnx", str(file)])
    assert done.exit_code == 1 and "demo is not quantized" in done.stderr
