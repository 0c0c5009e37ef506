"""Solve one site: Aqer, the weight's quantizer, Wqer (or a baseline), and the error after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from erq.calib.simulate import SimConv2d, SimLinear
from erq.config import FLOAT_BITS, QuantConfig
from erq.models import Site
from erq.quant import DualAffineParams, WeightParams, dequantize, quantize
from erq.quant.fit import fit_dual_weight, fit_weight
from erq.reduce.aqer import aqer
from erq.reduce.gptq import gptq
from erq.reduce.gram import Gram, OutputError
from erq.reduce.ridge import Ridge, ridge_strength
from erq.reduce.wqer import wqer

_OFFICIAL_HEAD_RIDGE = 0.1
_OFFICIAL_CONV_FACTOR = 10.0


@dataclass(frozen=True)
class SiteReport:
    """What was done at a site and what it cost.

    Args:
        name, kind: the site. w_bits, a_bits: its widths (16: float). scheme: affine or dual.
        error_float: relative squared output error on the calibration rows with the original
            weight, from activation quantization and the quantized upstream alone.
        error_aqer: the same after Aqer. error_nearest: with that weight rounded to nearest.
        error_final: with the codes that are kept.
        nearest: width → the same as error_nearest at that width, where it was asked for.
    """

    name: str
    kind: str
    w_bits: int
    a_bits: int
    scheme: str
    error_float: float
    error_aqer: float
    error_nearest: float
    error_final: float
    nearest: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields."""
        return asdict(self)


@dataclass(frozen=True)
class Solution:
    """What a site's weight has become.

    Args:
        params: the weight's quantizer. codes: uint8 [N, K]. bias: fp32 [N], or None.
        report: what it cost.
    """

    params: WeightParams
    codes: Tensor
    bias: Tensor | None
    report: SiteReport

    def put_into(self, module: SimLinear | SimConv2d) -> None:
        """Put the weight on its grid and freeze the module."""
        module.w_params = self.params
        module.set_weight(dequantize(self.codes.to(torch.int32), self.params), self.bias)
        module.freeze()


def fit_site_weight(weight: Tensor, site: Site, config: QuantConfig) -> WeightParams:
    """The weight quantizer [N, K] a site gets: dual behind a LayerNorm, else affine."""
    if config.dual and config.method != "rtn" and site.norm is not None:
        return fit_dual_weight(weight, config.w_bits)
    return fit_weight(weight, config.w_bits)


@torch.no_grad()
def solve_site(
    site: Site,
    module: SimLinear | SimConv2d,
    gram: Gram,
    config: QuantConfig,
    batch_rows: bool,
    widths: Sequence[int] = (),
) -> Solution:
    """The codes of the module's weight with the least output error; the module stays as it is.

    Args:
        gram: statistics of what enters the site.
        config: the site's own settings.
        batch_rows: one row per image (a head), which the official λ treats apart.
        widths: report the error of rounding to nearest at these widths as well.

    Returns:
        Quantizer, codes and bias, with the errors before and after every step.
    """
    has_bias = module.bias is not None
    zero = torch.zeros(len(module.weight), device=module.weight.device)
    bias = zero if module.bias is None else module.bias
    original = torch.cat([module.weight, bias[:, None]], dim=1).double()
    official = config.ridge_scale == "sum"
    cross = gram.cross(original[:, :-1])
    error = OutputError(gram, original, cross)
    errors = {"error_float": error.of(original)}

    @cache
    def ridge(value: float) -> Ridge:
        return Ridge(gram, ridge_strength(gram, value, config.ridge_scale), has_bias)

    weight = original
    if config.method == "erq" and config.aqer and bool(gram.c.any()):
        value = _OFFICIAL_HEAD_RIDGE if official and batch_rows else config.ridge_act
        weight = aqer(ridge(value), original, cross)
    errors["error_aqer"] = error.of(weight)

    params, nearest = _round_to_nearest(weight, site, config)
    codes = quantize(weight[:, :-1].float(), params)
    errors["error_nearest"] = error.of(nearest)
    by_width = {
        bits: error.of(_round_to_nearest(weight, site, replace(config, w_bits=bits))[1])
        for bits in widths
    }

    new_bias = weight[:, -1]
    if config.method == "gptq":
        codes = gptq(gram, weight[:, :-1], params)
    elif config.method == "erq" and config.wqer:
        conv = site.kind == "conv"
        value = config.ridge_weight * (_OFFICIAL_CONV_FACTOR if official and conv else 1.0)
        refine = "off" if official and conv else config.refine
        codes, new_bias = wqer(gram, weight, params, ridge(value), refine)
    final = torch.cat([dequantize(codes, params).double(), new_bias[:, None]], dim=1)
    errors["error_final"] = error.of(final)

    a_bits = FLOAT_BITS if module.x_params is None else module.x_params.bits
    scheme = "dual" if isinstance(params, DualAffineParams) else "affine"
    report = SiteReport(
        site.name, site.kind, config.w_bits, a_bits, scheme, nearest=by_width, **errors
    )
    return Solution(params, codes.to(torch.uint8), new_bias.float() if has_bias else None, report)


def _round_to_nearest(
    weight: Tensor, site: Site, config: QuantConfig
) -> tuple[WeightParams, Tensor]:
    """The quantizer of a weight, fp64 [N, D + 1], and the weight on its grid, bias as it was."""
    params = fit_site_weight(weight[:, :-1].float(), site, config)
    value = dequantize(quantize(weight[:, :-1].float(), params), params)
    return params, torch.cat([value.double(), weight[:, -1:]], dim=1)
