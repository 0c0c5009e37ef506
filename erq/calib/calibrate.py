"""Ranges of activations: fit the quantizers of one site from what enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from erq.calib.observers import Run, Stream
from erq.calib.reparam import Fold, apply_fold, fold_input, plan_fold
from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import FLOAT_BITS, QuantConfig
from erq.models import Site
from erq.models.attention import Attention
from erq.quant import AffineParams, LogParams
from erq.quant.fit import (
    ACTIVATION_PERCENTILES,
    NORM_PERCENTILES,
    fit_channels,
    fit_scores,
    fit_softmax,
    fit_tensor,
    fit_values,
)

RANGE_IMAGES = 32
"""Images that ranges are fitted on, the first ones: as published, and it bounds memory."""
# Elements of one fitted tensor at most; longer sequences use fewer images.
MAX_ELEMENTS = 1 << 26


Ranges = Fold | tuple[AffineParams | LogParams, ...]
"""The activation quantizers of a site: a fold, which has that of its output, or one per operand."""

Collect = Callable[[], tuple[Tensor, ...]]
Fit = Callable[[tuple[Tensor, ...]], Ranges]


def _fit_now(collect: Collect, fit: Fit) -> Ranges:
    return fit(collect())


def gather(stream: Stream, run: Run, *sites: nn.Module, keep: bool = False) -> tuple[Tensor, ...]:
    """Inputs of sites over the first images of the stream, concatenated per argument.

    Every rank contributes its chunks; what the others than the first return is of no use.

    Args:
        keep: as in `Stream.inputs`.
    """
    head, ranks = stream.head(RANGE_IMAGES), stream.ranks
    numbers = (n for n, chunk in enumerate(head.chunks) if not chunk.is_meta)
    own: dict[int, tuple[Tensor, ...]] = {}
    elements = 0
    for number, args in zip(numbers, head.inputs(run, *sites, keep=keep), strict=False):
        own[number] = args
        elements += max(a.numel() for a in args)
        if elements >= MAX_ELEMENTS:
            break
    sizes = ranks.merge({n: [a.numel() for a in args] for n, args in own.items()})
    elements, last = 0, -1
    for number, size in sizes.items():
        elements, last = elements + max(size), number
        if elements >= MAX_ELEMENTS:
            break
    collected: list[list[Tensor]] = [[] for _ in sizes[0]]
    for i, parts in enumerate(collected):
        ranks.in_order({n: args[i] for n, args in own.items() if n <= last}, parts.append)
    return tuple(torch.cat(parts) if parts else torch.empty(0) for parts in collected)


def _fit(site: Site, module: nn.Module, inputs: tuple[Tensor, ...], config: QuantConfig) -> Ranges:
    """Quantizers of what enters `module`, a simulated one that is quantized."""
    bits, percentiles = config.a_bits, ACTIVATION_PERCENTILES[config.ranges]
    jointly = config.ranges == "attention"
    if isinstance(module, SimScores):
        q, k = inputs
        if jointly:
            return fit_scores(q, k, bits, percentiles, module.temperature)[:2]
        return fit_tensor(q, bits, percentiles), fit_tensor(k, bits, percentiles)
    if isinstance(module, SimValues):
        p, v = inputs
        if jointly:
            return fit_values(p, v, bits, percentiles)
        return fit_softmax(p, bits, percentiles), fit_tensor(v, bits, percentiles)
    (x,) = inputs
    if isinstance(module, SimConv2d):
        return (fit_tensor(x, config.image_bits, percentiles),)
    if not config.reparameterize or config.method == "rtn":
        return (fit_tensor(x, bits, percentiles),)
    if site.norm is not None:
        return plan_fold(fit_channels(x, bits, NORM_PERCENTILES[config.ranges]))
    hidden = site.hidden and config.reparameterize_hidden and config.method == "erq"
    # With 8 bits one scale loses nothing, and the fold would make fc2's columns uneven for nothing.
    if hidden and bits < 8:
        return plan_fold(fit_channels(x, bits, percentiles))
    return (fit_tensor(x, bits, percentiles),)


def calibrate_site(
    site: Site,
    model: nn.Module,
    run: Run,
    stream: Stream,
    group: list[SimLinear],
    config: QuantConfig,
    decide: Callable[[Collect, Fit], Ranges] = _fit_now,
    keep: bool = False,
) -> Fold | None:
    """Fit the activation quantizers of `site`; fold the norm before it where that is wanted.

    Args:
        model: the prepared model that holds the site.
        run: the site's block.
        stream: what enters the block, quantized so far.
        group: all layers fed by the site's norm (with a norm), or the layer itself.
        config: the site's own settings.
        decide: calls the two functions it is given, or knows what they would come to.
        keep: what enters the site is asked for again, from the same stream.

    Returns:
        The fold, if the norm or the site's input was folded; else None.
    """
    module = model.get_submodule(site.name)
    bits = config.image_bits if isinstance(module, SimConv2d) else config.a_bits
    if bits == FLOAT_BITS:
        return None
    keep = keep and site.norm is None  # a norm changes when it is folded
    ranges = decide(
        lambda: gather(stream, run, module, keep=keep),
        lambda inputs: _fit(site, module, inputs, config),
    )
    if isinstance(ranges, Fold) and site.norm is None:
        assert isinstance(module, SimLinear)
        fold_input(ranges, module)
        return ranges
    if isinstance(ranges, Fold):
        assert site.norm is not None
        norm = model.get_submodule(site.norm)
        assert isinstance(norm, nn.LayerNorm)
        apply_fold(ranges, norm, group)
        owner = model.get_submodule(site.name.rpartition(".")[0])
        if isinstance(owner, Attention) and owner.windows is not None:
            owner.windows.fold(ranges.apply)
        return ranges
    operands: Any = ranges
    if isinstance(module, SimScores):
        module.q_params, module.k_params = operands
    elif isinstance(module, SimValues):
        module.p_params, module.v_params = operands
    else:
        layers: Any = group or [module]
        for layer in layers:
            (layer.x_params,) = operands
    return None
