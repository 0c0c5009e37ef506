"""Compare ERQ with what the authors' published code computed on a small network, stage by stage.

    python tests/golden/check.py FILE

FILE is a golden file as README.md beside this program describes it; every dimension, width and
coefficient is read from it. Each stage is fed with the file's result of the stage before, so that a
deviation shows where it arises. One row is printed per layer and stage:

    reparam  fp.* → scale, zero point and parameters of every layer, folded behind a LayerNorm.
             Ranges are fitted on a stream quantized by the file's own parameters upstream.
    act      the same for every activation quantizer, the operands of attention among them.
    aqer     reparam.*, act.* → the weight after Aqer.
    wq       aqer.* → scale and zero point of every row, outlier columns.
    final    aqer.*, wq.* → codes and bias after Wqer; output error on the calibration images.

Before them `fp` says how well timm's network reproduces the file's logits (1e-4). Differences are
relative: ‖ours − theirs‖ / ‖theirs‖ for tensors, the largest of all rows for weight scales.

    reparam, act  scales and folded tensors 1e-3, zero points equal. README.md gives no tolerance;
                  fp32 rounding of the streams alone moves a scale by 1e-7 to 1e-5.
    aqer          1e-4 for all but one layer, 1e-2 for that one.
    wq            scales 1e-3, zero points and outlier columns equal. A row may differ if both
                  quantizers have the same error on its weights: two percentiles tie.
    final         output mean squared error within 0.5 % and bias (of rows whose codes are equal)
                  within 1e-2 for every layer; 99.9 % of the codes equal for all but one layer.

The one layer is README.md's: an activation on a rounding tie may fall to either side. Where ties
can matter is measured. Ours is computed again, eight times, with everything that enters a site
changed by 5 parts in 10 million, as another order of summation would (`spread`). An element that
this moves may in reparam, act and aqer differ from theirs by thrice as much before it counts (aqer:
up to the 1e-2). Further, the official inverse is an fp32 one: `inverse` estimates what that does to
a weight after Aqer, and replaces the 1e-4 where it is more.

Exit status: 0 all within, 1 something outside, 2 a file that cannot be used.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from erq.calib.calibrate import RANGE_IMAGES, calibrate_site
from erq.calib.observers import Stream
from erq.calib.prepare import insert_simulated
from erq.calib.simulate import SimLinear, SimScores, SimValues, patches
from erq.config import QuantConfig
from erq.data import CHUNK_IMAGES
from erq.models import Site, adapter_for
from erq.quant import (
    AffineParams,
    DualAffineParams,
    LogParams,
    WeightParams,
    dequantize,
    fake_quantize,
    quantize,
)
from erq.quant.fit import (
    ACTIVATION_PERCENTILES,
    WEIGHT_PERCENTILES,
    fit_rows,
    fit_weight,
    outlier_columns,
    tail_quantiles,
)
from erq.reduce.aqer import aqer
from erq.reduce.gram import Gram
from erq.reduce.ridge import Ridge
from erq.reduce.wqer import wqer

LOGITS = 1e-4
RANGE = 1e-3
SOFTMAX_ERROR = 1e-3
AQER, AQER_TIE = 1e-4, 1e-2
ROW_SCALE, ROW_ERROR = 1e-3, 1e-5
EQUAL_CODES, EQUAL_CODES_TIE = 0.999, 0.95
OUTPUT_ERROR = 0.005
BIAS = 1e-2
OFF_GRID = 1e-3

NOISE, NOISY_COPIES, SPREAD_FACTOR = 5e-7, 8, 3.0

KINDS = ("vit", "swin")
DEFAULT_HEADS = 2
SOLVED = ("linear", "conv")
HEAD_RIDGE = 0.1
CONV_FACTOR = 10.0


class UnusableFileError(ValueError):
    """A file that holds no comparison this program can make; the message is one line."""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Args:
        values: column title → text.
        verdict: ok, tie (outside what all but one layer of a stage must reach) or FAIL.
    """

    stage: str
    layer: str
    values: dict[str, str]
    verdict: str


def judge(within: bool, allowed: bool = True) -> str:
    """The verdict of a row inside `within` the tight and `allowed` the wide tolerance."""
    if not allowed:
        return "FAIL"
    return "ok" if within else "tie"


def read_meta(text: np.ndarray[Any, Any] | None) -> dict[str, Any]:
    """The settings of a golden file, checked.

    Raises:
        UnusableFileError: none, or settings that are not covered.
    """
    try:
        meta = json.loads(str(text))
    except ValueError as error:
        raise UnusableFileError("not a golden file: it has no JSON text `meta`") from error
    if not isinstance(meta, dict) or "kind" not in meta:
        raise UnusableFileError("not a golden file: `meta` names no kind of network")
    if meta["kind"] not in KINDS:
        raise UnusableFileError(f"kind {meta['kind']!r} is not covered, {' and '.join(KINDS)} are")
    if meta.get("rounded_zero_point") is not True:
        raise UnusableFileError("its mean zero points are not rounded (meta rounded_zero_point)")
    for name in ("w_bits", "a_bits"):
        if type(meta.get(name)) is not int or not 2 <= meta[name] <= 8:
            raise UnusableFileError(f"meta {name} is {meta.get(name)!r}, not an integer in 2..8")
    if type(meta.get("coe")) not in (int, float) or not meta["coe"] > 0:
        raise UnusableFileError(f"meta coe is {meta.get('coe')!r}, not a number > 0")
    return meta


class Golden:
    """The arrays and settings of a golden file.

    Raises:
        UnusableFileError: not such a file.
    """

    def __init__(self, path: Path) -> None:
        try:
            # numpy leaves a file open that it opened and cannot read.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except OSError as error:
            raise UnusableFileError(error.strerror or str(error)) from error
        except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UnusableFileError("not a golden file: no .npz archive of arrays") from error
        self.meta = read_meta(arrays.pop("meta", None))
        self.tensors = {n: torch.from_numpy(a) for n, a in arrays.items() if a.dtype.kind in "fi"}
        for name, value in self.tensors.items():
            if not bool(torch.isfinite(value).all()):
                raise UnusableFileError(f"{name} holds NaN or infinite values")

    @property
    def swin(self) -> bool:
        """Whether the network is a Swin transformer, otherwise a ViT."""
        return bool(self.meta["kind"] == "swin")

    def named(self, path: str) -> str:
        """The file's path of a module: timm moved Swin's downsample and named its head `head.fc`.

        With an array's name in front of it, as `act.head.fc`, that stays.
        """
        if not self.swin:
            return path
        path = re.sub(r"\bhead\.fc\b", "head", path)
        return re.sub(
            r"\blayers\.(\d+)\.downsample\b",
            lambda m: f"layers.{int(m[1]) - 1}.downsample",
            path,
        )

    @property
    def ridge(self) -> float:
        """λ on sums over rows."""
        return 0.1 * float(self.meta["coe"])

    def get(self, name: str, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """An array by its name, viewed in `shape` if that is given; −1 stands for any size."""
        name = self.named(name)
        if name not in self.tensors:
            raise UnusableFileError(f"it lacks the array {name}")
        value = self.tensors[name]
        if shape is None:
            return value
        if -1 in shape:
            fits = value.dim() == len(shape) and all(
                want in (-1, have) for want, have in zip(shape, value.shape, strict=True)
            )
        else:
            fits = value.numel() == torch.Size(shape).numel()
        if not fits:
            raise UnusableFileError(f"{name} is {list(value.shape)}, {list(shape)} is wanted")
        return value if -1 in shape else value.reshape(shape)

    def state(self, *prefixes: str) -> dict[str, Tensor]:
        """Model parameters by timm's name of today; later prefixes go before earlier ones."""
        skipped = ("quantizer", "relative_position_index", "attn_mask")
        return {
            self.timm_name(name.removeprefix(f"{prefix}.")): value
            for prefix in prefixes
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.") and not any(word in name for word in skipped)
        }

    def timm_name(self, name: str) -> str:
        """A parameter's name in timm of today; the reverse of `named`."""
        if not self.swin:
            return name
        name = re.sub(r"^head\.", "head.fc.", name)
        return re.sub(
            r"^layers\.(\d+)\.downsample\b",
            lambda m: f"layers.{int(m[1]) + 1}.downsample",
            name,
        )

    def affine(
        self, name: str, bits: int, rows: int | None = None, suffix: str = ""
    ) -> AffineParams:
        """Scale and zero point: [] or, with `rows`, [rows]."""
        shape = () if rows is None else (rows,)
        scale = self.get(f"{name}.delta{suffix}", shape)
        zero_point = self.get(f"{name}.zero_point{suffix}", shape)
        if not torch.equal(zero_point, zero_point.round()):
            raise UnusableFileError(f"{name}.zero_point{suffix} is not a whole number")
        if not bool((scale > 0).all()):
            raise UnusableFileError(f"{name}.delta{suffix} is not > 0")
        return AffineParams(scale.float(), zero_point.to(torch.int32), bits)

    def activation(self, name: str) -> AffineParams:
        """The activation quantizer `name`."""
        return self.affine(f"act.{name}", self.meta["a_bits"])

    def softmax(self, name: str) -> LogParams:
        """The softmax quantizer `name`."""
        scale = self.get(f"act.{name}.delta", ()).float()
        if not float(scale) > 0:
            raise UnusableFileError(f"act.{name}.delta is not > 0")
        return LogParams(scale, self.meta["a_bits"])

    def weight_params(self, layer: str, shape: torch.Size) -> WeightParams:
        """The weight quantizer of a layer of `shape` [N, K]."""
        name, bits = f"wq.{layer}", self.meta["w_bits"]
        plain = self.affine(name, bits, shape[0])
        if self.named(f"{name}.outlier_columns") not in self.tensors:
            return plain
        columns = self.get(f"{name}.outlier_columns", (-1,)).long().unique()
        count = self.get(f"{name}.outlier_columns").numel()
        if not 0 < len(columns) == count < shape[1] or columns[0] < 0 or columns[-1] >= shape[1]:
            raise UnusableFileError(
                f"{name}.outlier_columns are not distinct columns of {shape[1]}, or all of them"
            )
        return DualAffineParams(plain, self.affine(name, bits, shape[0], "_2"), columns)


def build_model(golden: Golden, *prefixes: str, heads: int) -> nn.Module:
    """The file's network with its parameters.

    Args:
        heads: of a ViT; the table of position biases tells those of a Swin.
    """
    state = golden.state(*prefixes)
    model = build_swin(golden, state) if golden.swin else build_vit(golden, state, heads)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UnusableFileError(" ".join(str(error).split())) from error
    return model.eval()


def build_swin(golden: Golden, state: dict[str, Tensor]) -> nn.Module:
    """timm's SwinTransformer; LayerNorm eps is timm's 1e-5."""
    dim, channels, *patch = golden.get("fp.patch_embed.proj.weight", (-1, -1, -1, -1)).shape
    depths: Counter[int] = Counter()
    heads, window = [], 0
    for name, value in state.items():
        place = re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_\w+_table", name)
        if place is not None and value.dim() == 2:
            depths[int(place[1])] += 1
            window = (round(len(value) ** 0.5) + 1) // 2
            if place[2] == "0":
                heads.append(value.shape[1])
    if not heads or len(heads) != len(depths):
        raise UnusableFileError("it lacks tables of relative position biases")
    return SwinTransformer(
        img_size=tuple(golden.get("images", (-1, channels, -1, -1)).shape[2:]),
        patch_size=tuple(patch),
        in_chans=channels,
        num_classes=len(golden.get("fp.head.weight", (-1, -1))),
        embed_dim=dim,
        depths=tuple(depths[stage] for stage in sorted(depths)),
        num_heads=tuple(heads),
        window_size=window,
        mlp_ratio=len(golden.get("fp.layers.0.blocks.0.mlp.fc1.weight", (-1, dim))) / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in state,
    )


def build_vit(golden: Golden, state: dict[str, Tensor], heads: int) -> nn.Module:
    """timm's VisionTransformer; LayerNorm eps is timm's 1e-6."""
    dim, channels, *patch = golden.get("fp.patch_embed.proj.weight", (-1, -1, -1, -1)).shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    hidden = len(golden.get("fp.blocks.0.mlp.fc1.weight", (-1, dim)))
    return VisionTransformer(
        img_size=tuple(golden.get("images", (-1, channels, -1, -1)).shape[2:]),
        patch_size=tuple(patch),
        in_chans=channels,
        num_classes=len(golden.get("fp.head.weight", (-1, dim))),
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=(hidden + 0.5) / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
    )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ in fp64; the plain norm where theirs is 0."""
    difference = float((ours.double() - theirs.double()).norm())
    return difference / (float(theirs.double().norm()) or 1.0)


def unexplained(ours: Tensor, theirs: Tensor, noisy: list[Tensor]) -> float:
    """What of `relative` is left once every element may move as far as noise moves ours, thrice."""
    spread = torch.stack([(other.double() - ours.double()).abs() for other in noisy]).amax(dim=0)
    difference = (ours.double() - theirs.double()).abs()
    left = (difference - SPREAD_FACTOR * spread).clamp(min=0)
    return relative(left, torch.zeros_like(left)) / (float(theirs.double().norm()) or 1.0)


def rebuild(golden: Golden) -> tuple[int, Row]:
    """The number of heads that reproduces the file's logits best, and how well it does."""
    images = golden.get("test_images", (-1, *golden.get("images", (-1, -1, -1, -1)).shape[1:]))
    if golden.swin:
        ours = build_model(golden, "fp", heads=0)(images)
        best = relative(ours, golden.get("fp_logits", ours.shape))
        return 0, Row("fp", "network", {"logits": f"{best:.1e}"}, judge(True, best <= LOGITS))
    dim = len(golden.get("fp.patch_embed.proj.weight", (-1, -1, -1, -1)))
    divisors = [h for h in range(1, dim + 1) if dim % h == 0]
    stated = golden.meta.get("heads")
    if stated is not None and stated not in divisors:
        raise UnusableFileError(f"meta heads is {stated!r}, which does not divide {dim} channels")
    best, heads = float("inf"), 0
    for candidate in [stated] if stated else sorted(divisors, key=lambda h: h != DEFAULT_HEADS):
        ours = build_model(golden, "fp", heads=candidate)(images)
        error = relative(ours, golden.get("fp_logits", ours.shape))
        if error < best:
            best, heads = error, candidate
        if best <= LOGITS:
            break
    values = {"logits": f"{best:.1e}", "heads": str(heads)}
    return heads, Row("fp", "network", values, judge(True, best <= LOGITS))


def add_noise(model: nn.Module, sites: list[Site], seed: int) -> None:
    """Change what enters every site by what fp32 arithmetic may; seed 0 leaves it alone."""
    generator = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x * (1.0 + NOISE * torch.randn(x.shape, generator=generator)) for x in inputs)

    for site in sites if seed else ():
        model.get_submodule(site.name).register_forward_pre_hook(hook)


class OfficialValues(SimValues):
    """SimValues with the official softmax quantizer: 2**bits levels, and 0 as one value more."""

    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, T], [B, H, T, D] → [B, H, T, D]."""
        if self.p_params is None or self.v_params is None:
            return p @ v
        return official_softmax(p, self.p_params) @ fake_quantize(v, self.v_params)


def official_softmax(p: Tensor, params: LogParams) -> Tensor:
    """The values that the official quantizer puts for p."""
    exponent = (-2.0 * torch.log2(p / params.scale)).round()
    value = fake_quantize(p, replace(params, zero_last=False))
    return value.masked_fill(exponent >= 2**params.bits, 0.0)


def nearest_official_softmax(p: Tensor, bits: int, scale: Tensor) -> Tensor:
    """The percentile nearest to `scale` among those of least error with one value more.

    At few bits that may be another one than ours; errors within 0.1 % of the least count as equal.
    """
    scales = tail_quantiles(p.reshape(1, -1), ACTIVATION_PERCENTILES["official"])[0][:, 0]
    values = (official_softmax(p, LogParams(s, bits)) for s in scales)
    errors = torch.stack([(value - p).double().square().sum() for value in values])
    best = scales[errors <= (1.0 + SOFTMAX_ERROR) * errors.min()]
    return best[(best - scale).abs().argmin()]


@dataclass(frozen=True)
class Fitted:
    """A value of ours and the array, without its stage, that holds theirs."""

    array: str
    value: Tensor


COLUMNS = {
    "reparam": ("scale", "zero", "norm weight", "norm bias", "weight", "bias"),
    "act": ("scale", "zero", "scale B", "zero B"),
}


def query_factor(golden: Golden, module: SimScores) -> float:
    """What the official code multiplies q by before it is quantized: in Swin the temperature.

    A quantizer's scale goes with its input, so the codes are the same either way.
    """
    return module.temperature if golden.swin else 1.0


def fitted_values(golden: Golden, site: Site, model: nn.Module) -> dict[str, Fitted]:
    """What calibration found at a site, by column title."""
    module = model.get_submodule(site.name)
    path = site.name.rpartition(".")[0]
    quantizers: dict[str, tuple[str, Any]]
    if isinstance(module, SimScores):
        name = f"{path}.matmul1.quantizer_"
        q = module.q_params
        assert q is not None
        q = replace(q, scale=q.scale * query_factor(golden, module))
        quantizers = {"": (f"{name}A", q), " B": (f"{name}B", module.k_params)}
    elif isinstance(module, SimValues):
        name = f"{path}.matmul2.quantizer_"
        quantizers = {"": (f"{name}A", module.p_params), " B": (f"{name}B", module.v_params)}
    elif isinstance(module, SimLinear):
        quantizers = {"": (f"{site.name}.input_quantizer", module.x_params)}
    else:  # the image is not quantized
        quantizers = {}
    values = {}
    for suffix, (name, params) in quantizers.items():
        values[f"scale{suffix}"] = Fitted(f"{name}.delta", params.scale)
        if isinstance(params, AffineParams):
            values[f"zero{suffix}"] = Fitted(f"{name}.zero_point", params.zero_point)
    for title, name in (("norm ", site.norm), ("", site.name)):
        holder = nn.Identity() if name is None else model.get_submodule(name)
        for leaf, parameter in holder.named_parameters():
            values[title + leaf] = Fitted(f"{name}.{leaf}", parameter.detach().clone())
    return values


def adopt_stored(golden: Golden, site: Site, model: nn.Module) -> None:
    """Give a site the file's quantizers and parameters, folded where a norm stands before it."""
    module = model.get_submodule(site.name)
    path = site.name.rpartition(".")[0]
    if isinstance(module, SimScores):
        q = golden.activation(f"{path}.matmul1.quantizer_A")
        module.q_params = replace(q, scale=q.scale / query_factor(golden, module))
        module.k_params = golden.activation(f"{path}.matmul1.quantizer_B")
    elif isinstance(module, SimValues):
        module.p_params = golden.softmax(f"{path}.matmul2.quantizer_A")
        module.v_params = golden.activation(f"{path}.matmul2.quantizer_B")
    elif isinstance(module, SimLinear):
        module.x_params = golden.activation(f"{site.name}.input_quantizer")
    for name in (site.norm, site.name) if site.norm is not None else (site.name,):
        for leaf, parameter in model.get_submodule(name).named_parameters():
            parameter.data = golden.get(f"reparam.{name}.{leaf}", parameter.shape).clone()


def fit_ranges(golden: Golden, heads: int, seed: int) -> dict[Site, dict[str, Fitted]]:
    """Our calibration, every site on a stream quantized by the file's parameters upstream."""
    model = build_model(golden, "fp", heads=heads)
    adapter = adapter_for(model)
    config = QuantConfig.paper("w{w_bits}a{a_bits}".format(**golden.meta))
    blocks = insert_simulated(model, adapter, config)
    for block in blocks:
        for site in block.sites:
            if site.kind == "matmul_av":
                model.get_submodule(site.name.rpartition(".")[0]).av = OfficialValues()
    add_noise(model, [site for block in blocks for site in block.sites], seed)
    stream = Stream(list(golden.get("images").split(CHUNK_IMAGES))).head(RANGE_IMAGES)
    fitted = {}
    for index, block in enumerate(blocks):
        run = partial(adapter.run_block, model, index)
        for site in block.sites:
            module = model.get_submodule(site.name)
            group = [module] if isinstance(module, SimLinear) else []
            calibrate_site(site, model, run, stream, group, config)
            fitted[site] = fitted_values(golden, site, model)
            if site.kind == "matmul_av":
                scale = fitted[site]["scale"]
                theirs = golden.get(f"act.{scale.array}", ())
                if relative(scale.value, theirs) > RANGE:
                    p = torch.cat([p for p, _ in stream.inputs(run, module)])
                    value = nearest_official_softmax(p, config.a_bits, theirs)
                    fitted[site]["scale"] = replace(scale, value=value)
            adopt_stored(golden, site, model)
        if index < len(blocks) - 1:
            stream.advance(run)
    return fitted


def check_ranges(golden: Golden, heads: int) -> list[Row]:
    """Rows of the stages reparam and act."""
    fits = [fit_ranges(golden, heads, seed) for seed in range(1 + NOISY_COPIES)]
    kinds = {"reparam": SOLVED, "act": ("linear", "matmul_qk", "matmul_av")}
    return [
        compare_fitted(golden, stage, site, [fit[site] for fit in fits])
        for stage in kinds
        for site in fits[0]
        if site.kind in kinds[stage]
    ]


def compare_fitted(golden: Golden, stage: str, site: Site, fits: list[dict[str, Fitted]]) -> Row:
    """The row of one site.

    Args:
        fits: what calibration found, then the same with noise.
    """
    values = dict.fromkeys(COLUMNS[stage], "")
    widest, within = 0.0, True
    for title, fitted in fits[0].items():
        if title not in values:
            continue
        ours, noisy = fitted.value, [fit[title].value for fit in fits[1:]]
        theirs = golden.get(f"{stage}.{fitted.array}", ours.shape)
        if title.startswith("zero"):
            values[title] = f"{float(ours - theirs):g}"
            within &= any(float(zero) == float(theirs) for zero in (ours, *noisy))
        else:
            values[title] = f"{relative(ours, theirs):.1e}"
            within &= unexplained(ours, theirs, noisy) <= RANGE
            widest = max(widest, *(relative(other, ours) for other in noisy))
    values["spread"] = f"{widest:.1e}"
    return Row(stage, site.name, values, judge(True, within))


@dataclass(frozen=True)
class Layer:
    """A linear layer or the patch embedding of the folded full-precision network.

    Args:
        inputs: fp32 [M, D], what enters it, one row per token. params: its input quantizer.
        gram: their statistics. weight: fp64 [N, D + 1], bias last.
        batch_rows: one row per image.
    """

    name: str
    conv: bool
    inputs: Tensor
    params: AffineParams | None
    gram: Gram
    weight: Tensor
    has_bias: bool
    batch_rows: bool

    def output_error(self, weight: Tensor) -> float:
        """Mean squared error of the output with `weight` [N, D + 1] on quantized inputs, fp64."""
        x = self.inputs
        quantized = x if self.params is None else fake_quantize(x, self.params)
        one = torch.ones(len(x), 1, dtype=torch.float64)
        expected = torch.cat([x.double(), one], dim=1) @ self.weight.t()
        got = torch.cat([quantized.double(), one], dim=1) @ weight.t()
        return float((got - expected).square().mean())


def walk_layers(golden: Golden, heads: int, seed: int) -> Iterator[Layer]:
    """The layers of the file's folded network, in forward order, on its full-precision stream."""
    model = build_model(golden, "fp", "reparam", heads=heads)
    adapter = adapter_for(model)
    if not adapter.raw_sites:
        adapter.prepare(model)
    blocks = adapter.blocks(model)
    add_noise(model, [site for b in blocks for site in b.sites if site.kind in SOLVED], seed)
    stream = Stream(list(golden.get("images").split(CHUNK_IMAGES)))
    for index, block in enumerate(blocks):
        run = partial(adapter.run_block, model, index)
        for site in block.sites:
            if site.kind not in SOLVED:
                continue
            module = model.get_submodule(site.name)
            conv = site.kind == "conv"
            params = None if conv else golden.activation(f"{site.name}.input_quantizer")
            weight = module.weight.flatten(1)
            gram = Gram(weight.shape[1], weight.device)
            chunks = []
            batch_rows = False
            for (x,) in stream.inputs(run, module):
                if conv:
                    x = patches(x, tuple(module.kernel_size))
                batch_rows = x.dim() == 2
                gram.add(x, None, params)
                chunks.append(x.reshape(-1, weight.shape[1]))
            has_bias = module.bias is not None
            bias = module.bias if has_bias else torch.zeros(len(weight))
            yield Layer(
                site.name,
                conv,
                torch.cat(chunks),
                params,
                gram,
                torch.cat([weight, bias[:, None]], dim=1).double(),
                has_bias,
                batch_rows,
            )
        if index < len(blocks) - 1:
            stream.advance(run)


def solve_aqer(golden: Golden, layer: Layer) -> Tensor:
    """Our weight after Aqer, fp64 [N, D + 1]."""
    if layer.conv:  # the official code leaves it as it is
        return layer.weight
    ridge = Ridge(layer.gram, ridge_of_aqer(golden, layer), layer.has_bias)
    return aqer(ridge, layer.weight, layer.gram.cross(layer.weight[:, :-1]))


def ridge_of_aqer(golden: Golden, layer: Layer) -> float:
    """The official λ."""
    return HEAD_RIDGE if layer.batch_rows else golden.ridge


def check_aqer(golden: Golden, copies: tuple[Layer, ...]) -> tuple[Row, Tensor]:
    """Row of the stage aqer, and our own weight, fp64 [N, D + 1].

    Args:
        copies: the layer, then the same with noise.
    """
    layer = copies[0]
    theirs = golden.get(f"aqer.{layer.name}.weight", layer.weight[:, :-1].shape)
    solved = [solve_aqer(golden, copy) for copy in copies]
    ours, *noisy = (weight[:, :-1] for weight in solved)
    # Inverting G + λI in fp32 has an error of about condition · 2^-23 of the update. It matters
    # where λ is small and rows are few, as in the head.
    ridge = ridge_of_aqer(golden, layer)
    eigenvalues = torch.linalg.eigvalsh(layer.gram.g)
    condition = (float(eigenvalues[-1]) + ridge) / (max(float(eigenvalues[0]), 0.0) + ridge)
    inverse = condition * 2.0**-23 * relative(solved[0], layer.weight)
    difference = relative(ours, theirs)
    values = {
        "weight": f"{difference:.1e}",
        "spread": f"{max(relative(other, ours) for other in noisy):.1e}",
        "inverse": f"{inverse:.1e}",
    }
    within = unexplained(ours, theirs, noisy) <= max(AQER, inverse)
    if layer.conv:
        within = difference == 0
    return Row("aqer", layer.name, values, judge(within, difference <= AQER_TIE)), solved[0]


def differing_rows(weight: Tensor, theirs: AffineParams) -> tuple[float, int]:
    """Largest relative difference of a row's scale, and how many rows differ without a tie.

    Args:
        weight: fp32 [N, K], the columns that `theirs` [N] quantizes.
    """
    bits = theirs.bits
    # 8-bit weights of this project are symmetric about code 128 by design, the official ones are
    # not: there the search alone is compared.
    ours = fit_weight(weight, bits) if bits < 8 else fit_rows(weight, bits, WEIGHT_PERCENTILES)
    scale = (ours.scale - theirs.scale).abs() / theirs.scale
    differs = ~(scale <= ROW_SCALE) | (ours.zero_point != theirs.zero_point)
    error, reference = (
        (fake_quantize(weight, p) - weight).double().square().sum(dim=1) for p in (ours, theirs)
    )
    tied = (error - reference).abs() <= ROW_ERROR * reference
    return float(scale.max()), int((differs & ~tied).sum())


def check_wq(golden: Golden, layer: Layer, theirs: WeightParams) -> Row:
    """Row of the stage wq."""
    weight = golden.get(f"aqer.{layer.name}.weight", layer.weight[:, :-1].shape)
    values = {"scale": "", "rows": "", "scale rest": "", "rows rest": "", "columns": ""}
    if isinstance(theirs, AffineParams):
        scale, wrong = differing_rows(weight, theirs)
        values |= {"scale": f"{scale:.1e}", "rows": str(wrong)}
    else:
        rest = torch.ones(weight.shape[1], dtype=torch.bool)
        rest[theirs.columns] = False
        scale, wrong = differing_rows(weight[:, theirs.columns], theirs.outlier)
        values |= {"scale": f"{scale:.1e}", "rows": str(wrong)}
        scale, more = differing_rows(weight[:, rest], theirs.rest)
        values |= {"scale rest": f"{scale:.1e}", "rows rest": str(more)}
        columns = set(outlier_columns(weight).tolist()) ^ set(theirs.columns.tolist())
        values["columns"] = str(len(columns))
        wrong += more + len(columns)
    return Row("wq", layer.name, values, judge(True, wrong == 0))


def check_final(golden: Golden, layer: Layer, params: WeightParams, bias: Tensor) -> Row:
    """Row of the stage final.

    Args:
        params: the file's weight quantizer. bias: fp64 [N], after Aqer.
    """
    shape = layer.weight[:, :-1].shape
    start = golden.get(f"aqer.{layer.name}.weight", shape).double()
    strength = golden.ridge * (CONV_FACTOR if layer.conv else 1.0)
    ridge = Ridge(layer.gram, strength, layer.has_bias)
    refine = "off" if layer.conv else "official"
    weight = torch.cat([start, bias[:, None]], dim=1)
    codes, new_bias = wqer(layer.gram, weight, params, ridge, refine)
    weight = golden.get(f"final.{layer.name}.weight", shape)
    their_codes = quantize(weight, params)
    step = params.rest.scale if isinstance(params, DualAffineParams) else params.scale
    # README.md: without a bias the official code leaves the last column off the grid.
    compared = slice(None) if layer.has_bias else slice(-1)
    if not layer.has_bias:
        codes[:, -1] = their_codes[:, -1]
        weight = torch.cat([weight[:, :-1], dequantize(their_codes, params)[:, -1:]], dim=1)
    distance = (dequantize(their_codes, params) - weight).abs() / step[:, None]
    off_grid = float(distance[:, compared].max())
    equal = float((codes == their_codes)[:, compared].double().mean())
    their_bias = torch.zeros_like(bias)
    if layer.has_bias:
        their_bias = golden.get(f"final.{layer.name}.bias", bias.shape).double()
    agree = (codes == their_codes).all(dim=1)
    difference = relative(new_bias[agree], their_bias[agree])
    ours, theirs = (
        layer.output_error(torch.cat([w.double(), b[:, None]], dim=1))
        for w, b in ((dequantize(codes, params), new_bias), (weight, their_bias))
    )
    ratio = ours / theirs if theirs else float(ours == theirs)
    values = {
        "equal codes": f"{equal:.5f}",
        "mse / official": f"{ratio:.5f}",
        "bias": f"{difference:.1e}",
        "off grid": f"{off_grid:.1e}",
    }
    allowed = (
        equal >= EQUAL_CODES_TIE
        and abs(ratio - 1.0) <= OUTPUT_ERROR
        and difference <= BIAS
        and off_grid <= OFF_GRID
    )
    return Row("final", layer.name, values, judge(equal >= EQUAL_CODES, allowed))


def check(golden: Golden) -> list[Row]:
    """All rows, stage by stage; more than one tie in a stage is a failure of each."""
    heads, network = rebuild(golden)
    rows = check_ranges(golden, heads)
    walks = [walk_layers(golden, heads, seed) for seed in range(1 + NOISY_COPIES)]
    solved: list[Row] = []
    for copies in zip(*walks, strict=True):
        layer = copies[0]
        params = golden.weight_params(layer.name, layer.weight[:, :-1].shape)
        row, ours = check_aqer(golden, copies)
        solved += [
            row,
            check_wq(golden, layer, params),
            check_final(golden, layer, params, ours[:, -1]),
        ]
    rows += [row for stage in ("aqer", "wq", "final") for row in solved if row.stage == stage]
    ties = Counter(row.stage for row in rows if row.verdict == "tie")
    return [network] + [
        replace(row, verdict="FAIL") if row.verdict == "tie" and ties[row.stage] > 1 else row
        for row in rows
    ]


def render(rows: list[Row]) -> str:
    """Aligned text, a header line for each stage."""
    lines = []
    for stage in dict.fromkeys(row.stage for row in rows):
        part = [row for row in rows if row.stage == stage]
        titles = list(dict.fromkeys(title for row in part for title in row.values))
        table = [[stage, "layer", *titles, ""]]
        table += [
            [stage, r.layer, *(r.values.get(title, "") for title in titles), r.verdict]
            for r in part
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        widths[0], widths[1] = max(widths[0], 7), max(widths[1], 18)
        lines += [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append("")
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Check the file named by the only argument; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python tests/golden/check.py FILE", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    try:
        rows = check(Golden(path))
    except UnusableFileError as error:
        print(f"cannot check {path}: {error}", file=sys.stderr)
        return 2
    outside = sum(row.verdict == "FAIL" for row in rows)
    ties = sum(row.verdict == "tie" for row in rows)
    print(
        f"{render(rows)}{path.name}: {len(rows)} rows, {outside} outside the tolerances, "
        f"{ties} excused as ties"
    )
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
