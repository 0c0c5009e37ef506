"""A float model → the same model with simulated modules at every site, still in full precision."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import QuantConfig
from erq.models import Block, ModelAdapter, Site


def _simulated(site: Site, module: nn.Module) -> nn.Module:
    if site.kind == "conv":
        return SimConv2d(module)  # type: ignore[arg-type]
    if site.kind == "linear":
        return SimLinear(module.weight, module.bias)  # type: ignore[arg-type]
    return SimScores(module) if site.kind == "matmul_qk" else SimValues()  # type: ignore[arg-type]


def insert_simulated(model: nn.Module, adapter: ModelAdapter, config: QuantConfig) -> list[Block]:
    """Prepare `model` in place and put a simulated module at every site that is quantized.

    Args:
        model: a float model; every parameter is frozen (requires_grad False), and it is put into
            evaluation mode.

    Returns:
        The model's blocks with their quantized sites.

    Raises:
        UnsupportedModelError, ValueError: a part that is not understood; a glob without a match.
    """
    adapter.prepare(model)
    model.requires_grad_(False)
    blocks = adapter.blocks(model)
    config.check_globs([s.name for b in blocks for s in b.sites])
    out = []
    for block in blocks:
        _check_attention(block, config)
        # A norm can be folded only if all the layers that it feeds quantize its output alike.
        widths: dict[str | None, set[int | None]] = {}
        for site in block.sites:
            a_bits = config.for_site(site.name).a_bits if is_quantized(site, config) else None
            widths.setdefault(site.norm, set()).add(a_bits)
        sites = tuple(
            replace(s, norm=None) if len(widths[s.norm]) > 1 or not _folds(s, config) else s
            for s in block.sites
            if is_quantized(s, config)
        )
        for site in sites:
            parent, _, leaf = site.name.rpartition(".")
            module = _simulated(site, model.get_submodule(site.name))
            setattr(model.get_submodule(parent), leaf, module)
        out.append(Block(block.name, sites))
    model.eval()  # new modules begin in training mode
    return out


def is_quantized(site: Site, config: QuantConfig) -> bool:
    """Whether the settings quantize `site` at all."""
    if config.keeps_float(site.name):
        return False
    if site.kind in ("matmul_qk", "matmul_av"):
        return config.attention == "quantized" and config.for_site(site.name).a_bits != 16
    return True


def _folds(site: Site, config: QuantConfig) -> bool:
    """Whether the settings let the norm before `site` be folded into it."""
    return config.reparameterize_merging or not site.merging


def _check_attention(block: Block, config: QuantConfig) -> None:
    """Raise ValueError if one matmul of an attention is quantized and the other is not."""
    for site in block.sites:
        if site.kind != "matmul_qk":
            continue
        partner = site.name.removesuffix("qk") + "av"
        other = next(s for s in block.sites if s.name == partner)
        if is_quantized(site, config) != is_quantized(other, config):
            raise ValueError(
                f"{site.name} and {partner} must both be quantized or both be float: name both in "
                "keep_float or overrides"
            )
