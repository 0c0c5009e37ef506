"""A quantized model for runtimes outside PyTorch: an ONNX file of QuantizeLinear/DequantizeLinear.

Every quantizer stands in the graph by operators of the ONNX standard, so the file needs no custom
ones. Weights are their codes, of at most 4 bits as uint4. Arithmetic is the runtime's: where it
rounds otherwise a code may move by one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erq.deployment.blocks import Half, QuantBlock
from erq.deployment.checkpoint import write_atomically
from erq.deployment.convert import deploy, replace_module
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantPatchEmbed,
    QuantScores,
    QuantValues,
    not_finite,
)
from erq.inputs import image_shape
from erq.models.attention import Attention
from erq.models.patches import patches

CODES = ("int4", "int8")
"""How an ONNX file stores weight codes: uint4 where they fit, or all of them as int8."""

# QuantizeLinear knows uint4 from opset 21 on.
_OPSETS = {"int4": 21, "int8": 18}
_UINT4_MAX = 15
_UINT8_MAX = 255


def export_onnx(model: nn.Module, path: str | os.PathLike[str], codes: str = "int4") -> None:
    """Write a quantized model as ONNX: input `images` [batch, C, H, W], output `logits`.

    Args:
        model: what `erq.quantize`, `erq.deploy` or `erq.load` returned; it is not changed.
        path: the file; an existing one is replaced only once the new one is complete.
        codes: int4: weight codes of at most 4 bits as uint4 with their zero points, wider ones as
            int8 (opset 21). int8: all of them as int8, code − zero point (opset 18).

    Raises:
        ValueError: not a quantized model, or no such way to store codes.
        RuntimeError: onnx or onnxscript is missing.
        CheckpointError: the file cannot be written.
    """
    if codes not in CODES:
        raise ValueError(f"codes must be one of {', '.join(CODES)}, got {codes!r}")
    info: Any = getattr(model, "erq_info", None)
    if info is None:
        raise ValueError(
            "export_onnx takes what erq.quantize, erq.deploy or erq.load returned, got a "
            f"{type(model).__name__}"
        )
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise RuntimeError(f"ONNX export needs {', '.join(missing)}: pip install 'erq[export]'")
    net = _standard_ops(model, codes == "int4")
    channels, height, width = image_shape(model) or (3, 224, 224)
    # Two images: torch.export takes a dimension of one for a constant.
    images = torch.zeros(2, channels, height or 224, width or 224)
    with _quiet(), torch.no_grad():
        exported: Any = torch.onnx.export(
            net, (images,), dynamo=True, opset_version=_OPSETS[codes], verbose=False,
            input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    # Where in the sources every node came from: long, and of this machine.
    for node in exported.model.graph:
        for item in (node, *node.outputs):
            item.metadata_props.clear()
    for value in (*exported.model.graph.inputs, *exported.model.graph.initializers.values()):
        value.metadata_props.clear()
    if codes == "int4":
        _store_uint4(exported.model)
    about = {
        "architecture": info.architecture,
        "pretrained_cfg": info.pretrained_cfg,
        "config": info.config.to_dict(),
        "calibration": info.calibration,
    }
    exported.model.metadata_props["erq"] = json.dumps(about)
    write_atomically(Path(path), exported.model_proto.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _standard_ops(model: nn.Module, narrow: bool) -> nn.Module:
    """A copy of a quantized model, on the CPU, of modules that ONNX can express."""
    if any(isinstance(m, QuantLinear) for m in model.modules()):
        net: Any = deepcopy(model)
    else:
        net = deploy(model)
    net = net.cpu().float()
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantBlock):
            module.attention_half = module.mlp_half = Half(())
        elif isinstance(module, QuantAttention):
            replace_module(net, name, _attention(module))
    for name, module in list(net.named_modules()):
        if isinstance(module, QuantLinear):
            replace_module(net, name, _Linear(module, narrow))
    return _Marked(net).eval()


class _Marked(nn.Module):
    """A network whose outputs are NaN for an image that holds NaN or infinity: codes have none."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        """What the network gives for [N, C, H, W]."""
        mark = not_finite(images, [1, 2, 3])
        outputs = self.net(images)
        if not isinstance(outputs, Tensor):
            return [y + mark.reshape(-1, *[1] * (y.dim() - 1)) for y in outputs]
        return outputs + mark.reshape(-1, *[1] * (outputs.dim() - 1))


def _op(
    name: str, inputs: list[Tensor | None], like: Tensor, dtype: torch.dtype, **attrs: Any
) -> Tensor:
    """An ONNX operator whose result has the shape of `like`."""
    return torch.onnx.ops.symbolic(name, inputs, attrs, dtype=dtype, shape=like.shape)


class _Quantizer(nn.Module):
    """A per-tensor quantizer of activations: codes, and their values again."""

    scale: Tensor
    zero_point: Tensor
    top: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        # A zero point outside uint8 has no QuantizeLinear: then the values are formed directly.
        self.bits, self.fits = bits, 0 <= int(zero_point) <= _UINT8_MAX
        self.register_buffer("scale", scale.clone())
        self.register_buffer(
            "zero_point", zero_point.to(torch.uint8 if self.fits else torch.float32)
        )
        self.register_buffer("top", torch.tensor(2**bits - 1, dtype=torch.uint8))

    def codes(self, x: Tensor) -> Tensor:
        """uint8 codes, or their values where codes do not fit."""
        if not self.fits:
            low, high = -self.zero_point, 2.0**self.bits - 1 - self.zero_point
            return (x * self.scale.reciprocal()).round().clamp(low, high) * self.scale
        codes = _op("QuantizeLinear", [x, self.scale, self.zero_point], x, torch.uint8)
        return codes if self.bits == 8 else _op("Clip", [codes, None, self.top], codes, torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """fp32 values of what `codes` gave, or of some of its columns."""
        if not self.fits:
            return codes
        return _op("DequantizeLinear", [codes, self.scale, self.zero_point], codes, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """The value that the code of x stands for."""
        return self.values(self.codes(x))


class _Segment(nn.Module):
    """Some input columns of a weight, with one scale and zero point per output."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        columns: Tensor | None,
        narrow: bool,
        stacked: bool,
    ) -> None:
        """Take the `columns` of uint8 codes [N, K], None for all.

        Args:
            narrow: whether codes may be stored as uint4. stacked: as a stack of one matrix.
        """
        super().__init__()
        if columns is not None:
            codes = codes[:, columns]
        fits = int(codes.max()) <= _UINT4_MAX
        if narrow and fits and bool(((zero_point >= 0) & (zero_point <= _UINT4_MAX)).all()):
            stored, zeros = codes, zero_point.to(torch.uint8)  # uint4 in the file: _store_uint4
        else:
            stored, zeros = (codes.to(torch.int32) - zero_point[:, None]).to(torch.int8), None
        stored = stored.t().contiguous()
        self.register_buffer("codes", stored[None] if stacked else stored)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zeros)
        self.register_buffer("columns", columns)

    def pick(self, x: Tensor) -> Tensor:
        """The segment's columns of [..., K]."""
        return x if self.columns is None else x.index_select(-1, self.columns)

    def forward(self) -> Tensor:
        """fp32 [K, N], or a stack of one if the codes are."""
        inputs = [self.codes, self.scale, self.zero_point]
        axis = self.codes.dim() - 1
        return _op("DequantizeLinear", inputs, self.codes, torch.float32, axis=axis)


class _Linear(nn.Module):
    """A quantized linear layer, or patch embedding: a product per segment of the weight."""

    bias: Tensor | None
    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: QuantLinear, narrow: bool) -> None:
        super().__init__()
        self.kernel_size = layer.kernel_size if isinstance(layer, QuantPatchEmbed) else None
        self.quantizer = None
        if layer.x_scale is not None and layer.x_zero_point is not None:
            self.quantizer = _Quantizer(layer.x_scale, layer.x_zero_point, layer.a_bits)
        # A quantizer per channel is that of the whole input once each channel is scaled and moved.
        self.register_buffer("factor", None)
        self.register_buffer("shift", None)
        if layer.x_channel_scale is not None and layer.x_channel_zero_point is not None:
            assert layer.x_scale is not None and layer.x_zero_point is not None
            self.factor = layer.x_scale / layer.x_channel_scale
            self.shift = layer.x_scale * (layer.x_zero_point - layer.x_channel_zero_point)
        self.reads_floats = self.quantizer is None or not self.quantizer.fits
        codes = layer.weight_codes()
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if layer.dual_columns is None:
            parts.append((layer.scale, layer.zero_point, None))
        else:
            assert layer.scale2 is not None and layer.zero_point2 is not None
            rest = torch.ones(layer.in_features, dtype=torch.bool)
            rest[layer.dual_columns] = False
            parts.append((layer.scale2, layer.zero_point2, layer.dual_columns))
            parts.append((layer.scale, layer.zero_point, rest.nonzero()[:, 0]))
        self.segments = nn.ModuleList(
            _Segment(codes, *part, narrow, self.reads_floats) for part in parts
        )
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N], or images to maps of patches."""
        if self.kernel_size is None:
            return self._product(x)
        y = self._product(patches(x, self.kernel_size))
        grid = (x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1])
        return y.transpose(1, 2).reshape(x.shape[0], -1, *grid)

    def _product(self, x: Tensor) -> Tensor:
        if self.factor is not None and self.shift is not None:
            x = x * self.factor - self.shift
        if self.quantizer is not None:
            x = self.quantizer.codes(x)
        products = []
        for segment in self.segments:
            part, weight = segment.pick(x), segment()  # type: ignore[operator]
            if self.quantizer is not None:
                part = self.quantizer.values(part)
            if self.reads_floats:
                # Of floats and a matrix of codes ONNX Runtime makes a MatMulNBits, which by default
                # rounds the floats to 8 bits. A stack of one matrix it leaves alone.
                product = part.reshape(1, -1, part.shape[-1]) @ weight
                products.append(product.reshape(*part.shape[:-1], -1))
            else:
                products.append(part @ weight)
        y: Tensor = sum(products[1:], products[0])
        return y if self.bias is None else y + self.bias


class _Scores(nn.Module):
    """q·kᵀ · temperature of quantized q and k."""

    def __init__(self, source: QuantScores) -> None:
        super().__init__()
        self.temperature = source.temperature
        self.q = _Quantizer(source.q_scale, source.q_zero_point, source.bits)
        self.k = _Quantizer(source.k_scale, source.k_zero_point, source.bits)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """[B, H, T, D] twice → [B, H, T, T]."""
        scores: Tensor = self.q(q) @ self.k(k).transpose(-2, -1)
        return scores * self.temperature


class _Values(nn.Module):
    """softmax·v, the softmax on log-√2 codes: what they stand for is looked up in a table."""

    p_scale: Tensor
    table: Tensor

    def __init__(self, source: QuantValues) -> None:
        super().__init__()
        self.top = 2**source.bits - 1
        self.v = _Quantizer(source.v_scale, source.v_zero_point, source.bits)
        table = source.p_scale * torch.exp2(-0.5 * torch.arange(self.top + 1))
        if source.zero_last:
            table[-1] = 0.0
        self.register_buffer("p_scale", source.p_scale.clone())
        self.register_buffer("table", table)

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, T], [B, H, T, D] → [B, H, T, D]."""
        codes = (torch.log2(p * self.p_scale.reciprocal()) * -2.0).round().clamp(0, self.top)
        values: Tensor = self.v(v)
        return self.table[codes.long()] @ values


def _attention(source: QuantAttention) -> Attention:
    return Attention(
        source.num_heads, source.head_dim, source.qkv, source.q_norm, source.k_norm,
        _Scores(source.qk), _Values(source.av), source.norm, source.proj, source.windows,
    )  # fmt: skip


def _store_uint4(model: Any) -> None:
    """Store as uint4 the weights of an ONNX model that are uint8 codes, with their zero points."""
    import ml_dtypes
    import onnx_ir as ir

    for node in model.graph:
        codes = node.inputs[0].const_value if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.UINT8:
            continue
        for value in (node.inputs[0], node.inputs[2]):
            narrow = value.const_value.numpy().astype(ml_dtypes.uint4)
            value.const_value = ir.Tensor(narrow, name=value.name)
            value.dtype = ir.DataType.UINT4
