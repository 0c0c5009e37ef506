"""Solving one site: on the grid, frozen, and what its report says is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erq.calib.simulate import SimConv2d, SimLinear
from erq.config import QuantConfig
from erq.models import Site
from erq.quant import AffineParams, DualAffineParams, dequantize, fake_quantize, quantize
from erq.quant.fit import fit_tensor
from erq.reduce.gram import Gram
from erq.reduce.site import SiteReport, fit_site_weight, solve_site

PLAIN = Site("blocks.0.mlp.fc2", "linear")
NORMED = Site("blocks.0.attn.qkv", "linear", "blocks.0.norm1")
CONV = Site("patch_embed.proj", "conv")


class Case:
    """A layer, its input and the outcome of solving it."""

    def __init__(
        self,
        site: Site = PLAIN,
        batch_rows: bool = False,
        has_bias: bool = True,
        n: int = 40,
        **settings: Any,
    ) -> None:
        torch.manual_seed(1)
        self.x = torch.randn(300, 24) @ torch.randn(24, 24) / 5 + torch.randn(24)
        self.weight, bias = torch.randn(n, 24) * 0.3, torch.randn(n) if has_bias else None
        self.y = nn.functional.linear(self.x, self.weight, bias)
        config = QuantConfig(**settings)
        gram = Gram(24, torch.device("cpu"))
        self.module: Any
        if site.kind == "conv":
            conv = nn.Conv2d(6, n, 2, stride=2)
            conv.weight.data, conv.bias.data = self.weight.reshape(n, 6, 2, 2), bias  # type: ignore[union-attr,assignment]
            self.module = SimConv2d(conv)
            gram.add(self.x, None, None)
        else:
            self.module = SimLinear(self.weight, bias)
            if config.a_bits != 16:
                self.module.x_params = fit_tensor(self.x, config.a_bits)
            gram.add(self.x, None, self.module.x_params)
        solution = solve_site(site, self.module, gram, config, batch_rows)
        solution.put_into(self.module)
        self.report: SiteReport = solution.report

    def error(self, y: Tensor) -> float:
        return float((y - self.y).double().square().sum() / self.y.double().square().sum())


METHODS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"method": "repq"},
    {"method": "gptq"},
    {"method": "erq"},
    {"method": "erq", "refine": "official"},
    {"method": "erq", "refine": "off"},
    {"method": "erq", "aqer": False},
    {"method": "erq", "wqer": False},
    {"method": "erq", "dual": False},
    {"method": "erq", "a_bits": 16},
    {"method": "erq", "w_bits": 8, "a_bits": 8},
    {"method": "erq", "w_bits": 2, "a_bits": 2},
]


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("site", [PLAIN, NORMED], ids=lambda s: s.name)
@pytest.mark.parametrize("has_bias", [True, False])
def test_weight_is_on_the_grid_and_the_report_is_true(
    settings: dict[str, Any], site: Site, has_bias: bool
) -> None:
    it = Case(site, has_bias=has_bias, **settings)
    module, report = it.module, it.report
    codes = quantize(module.weight, module.w_params)
    assert torch.equal(dequantize(codes, module.w_params), module.weight)
    assert int(codes.max()) < 2**report.w_bits
    assert (module.bias is not None) == has_bias
    assert (module.operands is None) == (report.a_bits == 16)
    is_dual = isinstance(module.w_params, DualAffineParams)
    assert report.scheme == ("dual" if is_dual else "affine")
    assert is_dual == (
        site is NORMED and settings.get("dual", True) and settings["method"] != "rtn"
    )
    assert report.error_final == pytest.approx(it.error(module(it.x)), rel=1e-3, abs=1e-6)
    assert (report.name, report.kind) == (site.name, "linear")


def test_report_follows_the_steps() -> None:
    it = Case(w_bits=3)
    float_weight = nn.functional.linear(
        fake_quantize(it.x, it.module.x_params), it.weight, it.y.mean(0) - it.weight @ it.x.mean(0)
    )
    report = it.report
    assert report.error_float == pytest.approx(it.error(float_weight), rel=1e-2)
    assert report.error_aqer < report.error_float
    assert report.error_aqer < report.error_final < report.error_nearest
    assert report.to_dict() == {name: getattr(report, name) for name in report.to_dict()}


def test_methods_are_ordered() -> None:
    errors = {
        name: Case(w_bits=3, method=name).report.error_final for name in ("rtn", "gptq", "erq")
    }
    assert errors["erq"] < errors["gptq"] < errors["rtn"]
    erq = Case(w_bits=3).report
    off = Case(w_bits=3, aqer=False, wqer=False).report
    assert erq.error_final < Case(w_bits=3, aqer=False).report.error_final < off.error_final
    assert off.error_final == off.error_nearest == pytest.approx(errors["rtn"])


def test_baselines_leave_the_bias_alone() -> None:
    for method in ("rtn", "repq", "gptq"):
        it = Case(method=method)
        expected = it.y[0] - it.weight @ it.x[0]
        torch.testing.assert_close(it.module.bias, expected, rtol=1e-4, atol=1e-4)


def test_official_ridge_of_the_head_and_of_the_patch_embedding() -> None:
    def erq(**settings: Any) -> SiteReport:
        return Case(**{"ridge_scale": "sum", "refine": "official", "w_bits": 3, **settings}).report

    head = erq(batch_rows=True, ridge_act=50.0, ridge_weight=50.0)
    assert head == erq(ridge_act=0.1, ridge_weight=50.0)
    assert head != erq(ridge_act=50.0, ridge_weight=50.0)
    # With the relative λ a head is a layer like any other.
    assert erq(ridge_scale="relative", batch_rows=True) == erq(ridge_scale="relative")

    conv = erq(site=CONV, ridge_weight=5.0).error_final
    assert conv == erq(site=CONV, ridge_weight=5.0, refine="off").error_final
    relative = {"site": CONV, "ridge_scale": "relative", "refine": "off", "a_bits": 16}
    per_row = float(torch.cat([Case().x, torch.ones(300, 1)], 1).square().sum(1).mean())
    assert conv == pytest.approx(erq(**relative, ridge_weight=50.0 / per_row).error_final)


def test_conv_is_weight_only() -> None:
    it = Case(CONV, w_bits=4)
    assert (it.report.kind, it.report.a_bits, it.report.scheme) == ("conv", 16, "affine")
    assert it.report.error_float == 0.0
    # Without an error in its input there is nothing for Aqer to do.
    assert it.report.error_aqer == 0.0
    assert 0 < it.report.error_final < it.report.error_nearest


def test_weight_quantizer_of_a_site() -> None:
    weight = torch.randn(60, 30)

    def fit(site: Site, **settings: Any) -> AffineParams | DualAffineParams:
        return fit_site_weight(weight, site, QuantConfig(**settings))

    assert isinstance(fit(NORMED), DualAffineParams)
    for site, settings in ((PLAIN, {}), (NORMED, {"dual": False}), (NORMED, {"method": "rtn"})):
        assert isinstance(fit(site, **settings), AffineParams)
    assert fit(PLAIN, w_bits=7).bits == 7


@pytest.mark.parametrize("refine", ["greedy", "official", "off"])
def test_fewer_rows_than_channels_and_no_ridge(
    refine: str, affine: Callable[..., AffineParams]
) -> None:
    module = SimLinear(torch.randn(30, 40), torch.randn(30))
    module.x_params = affine(0.4, 8)
    gram = Gram(40, torch.device("cpu"))
    gram.add(torch.randn(3, 40), None, module.x_params)
    config = QuantConfig(ridge_act=0.0, ridge_weight=0.0, refine=refine)  # type: ignore[arg-type]
    solution = solve_site(PLAIN, module, gram, config, batch_rows=False)
    assert solution.bias is not None and bool(torch.isfinite(solution.bias).all())
    assert solution.report.error_final <= solution.report.error_nearest
