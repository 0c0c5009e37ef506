"""Other ways to run a model, to compare with: torch, its compiler, and quantizing runtimes.

Each engine takes the full-precision model and a batch, and gives a call without arguments that runs
the model on that batch. What is not installed, or cannot run here, says why.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], object]


class EngineError(RuntimeError):
    """An engine that cannot run here; the message says why."""


def torch_eager(model: nn.Module, x: Tensor) -> Run:
    """torch, op by op, in the dtype of x."""
    net = _cast(model, x)
    return lambda: net(x)


def torch_compiled(model: nn.Module, x: Tensor) -> Run:
    """torch.compile; on a GPU with its own CUDA graphs."""
    mode = "reduce-overhead" if x.is_cuda else None
    net: Any = torch.compile(_cast(model, x), mode=mode)
    return lambda: net(x)


def onnxruntime_int8(model: nn.Module, x: Tensor) -> Run:
    """ONNX Runtime, weights and activations static int8 (QDQ), per output channel."""
    _need("onnxruntime", "onnx", "onnxscript")
    _need_cpu(x)
    import tempfile
    from pathlib import Path

    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"x": x.numpy()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            copy.deepcopy(model), (x,), source, input_names=["x"], opset_version=17, dynamo=False
        )
        quantization.shape_inference.quant_pre_process(source, source)
        quantization.quantize_static(
            source, target, Reader(), per_channel=True, quant_format=quantization.QuantFormat.QDQ
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            target.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def openvino_int8(model: nn.Module, x: Tensor) -> Run:
    """OpenVINO, quantized to int8 by NNCF as a transformer."""
    _need("openvino", "nncf")
    _need_cpu(x)
    import nncf
    import openvino

    with _quiet():
        converted = openvino.convert_model(model.eval(), example_input=x, input=list(x.shape))
        quantized = nncf.quantize(
            converted,
            nncf.Dataset([x.numpy()]),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=1,
        )
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        compiled = openvino.Core().compile_model(quantized, "CPU", settings)
    request, feed = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer({0: feed}, share_inputs=True, share_outputs=True)


def torchao_int8(model: nn.Module, x: Tensor) -> Run:
    """torchao, int8 weights and dynamically quantized int8 activations, compiled."""
    _need("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    net: Any = _cast(model, x)
    with _quiet():
        quantize_(net, Int8DynamicActivationInt8WeightConfig())
    net = torch.compile(net, mode="reduce-overhead" if x.is_cuda else "max-autotune")
    return lambda: net(x)


ENGINES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "torch": torch_eager,
    "compile": torch_compiled,
    "onnxruntime": onnxruntime_int8,
    "openvino": openvino_int8,
    "torchao": torchao_int8,
}


def check_engine(name: str) -> tuple[str, torch.dtype]:
    """Engine and dtype that a name means.

    Raises:
        ValueError: an unknown name.
    """
    engine, _, dtype = name.partition("-")
    if engine not in ENGINES or dtype not in ("", "bf16"):
        raise ValueError(
            f"unknown engine {name!r}; choose from {', '.join(ENGINES)}, with -bf16 behind it for "
            "bfloat16"
        )
    return engine, torch.bfloat16 if dtype else torch.float32


def start(name: str, model: nn.Module, x: Tensor) -> Run:
    """The call that runs `model` on the batch `x` by an engine, once run.

    Args:
        name: a key of ENGINES, `-bf16` behind it for a bfloat16 model and batch.
        model: full precision, eval. x: [B, C, H, W] on the model's device.

    Raises:
        ValueError: an unknown name. EngineError: it cannot run here, with the reason.
    """
    engine, dtype = check_engine(name)
    try:
        with torch.inference_mode():
            run = ENGINES[engine](model, x.to(dtype))
            run()
    except EngineError:
        raise
    except Exception as error:  # of any library, of any kind: it cannot run here
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise EngineError(f"{name}: {type(error).__name__}: {line}") from error
    return run


def _cast(model: nn.Module, x: Tensor) -> nn.Module:
    return copy.deepcopy(model).to(x.dtype).eval()


def _need(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise EngineError(f"{', '.join(missing)} not installed: pip install 'erq[bench]'")


def _need_cpu(x: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype != torch.float32:
        raise EngineError(f"runs fp32 models on a CPU here, got {x.dtype} on {x.device}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own progress and warnings from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
