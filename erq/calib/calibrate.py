"""Ranges of activations: fit the quantizers of one site from what enters it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from erq.calib.observers import Run, Stream
from erq.calib.reparam import Fold, apply_fold, plan_fold
from erq.calib.simulate import SimConv2d, SimLinear, SimScores, SimValues
from erq.config import FLOAT_BITS, QuantConfig
from erq.models import Site
from erq.models.attention import Attention
from erq.quant.fit import fit_channels, fit_softmax, fit_tensor

RANGE_IMAGES = 32
"""Images that ranges are fitted on, the first ones: as published, and it bounds memory."""
# Elements of one fitted tensor at most; longer sequences use fewer images.
_MAX_ELEMENTS = 1 << 26


def _gather(stream: Stream, run: Run, module: nn.Module) -> tuple[Tensor, ...]:
    """Inputs of a site over the first images of the stream, concatenated per argument."""
    collected: list[tuple[Tensor, ...]] = []
    elements = 0
    for args in stream.head(RANGE_IMAGES).inputs(run, module):
        collected.append(args)
        elements += max(a.numel() for a in args)
        if elements >= _MAX_ELEMENTS:
            break
    return tuple(torch.cat(parts) for parts in zip(*collected, strict=True))


def calibrate_site(
    site: Site,
    model: nn.Module,
    run: Run,
    stream: Stream,
    group: list[SimLinear],
    config: QuantConfig,
) -> Fold | None:
    """Fit the activation quantizers of `site`; fold the norm before it where that is wanted.

    Args:
        model: the prepared model that holds the site.
        run: the site's block.
        stream: what enters the block, quantized so far.
        group: all layers fed by the site's norm (with a norm), or the layer itself.
        config: the site's own settings.

    Returns:
        The fold, if the norm was folded; else None.
    """
    module = model.get_submodule(site.name)
    if isinstance(module, SimScores):
        q, k = _gather(stream, run, module)
        module.q_params = fit_tensor(q, config.a_bits)
        module.k_params = fit_tensor(k, config.a_bits)
    elif isinstance(module, SimValues):
        p, v = _gather(stream, run, module)
        module.p_params = fit_softmax(p, config.a_bits)
        module.v_params = fit_tensor(v, config.a_bits)
    elif isinstance(module, SimConv2d) and config.image_bits != FLOAT_BITS:
        (x,) = _gather(stream, run, module)
        module.x_params = fit_tensor(x, config.image_bits)
    elif isinstance(module, SimLinear) and config.a_bits != FLOAT_BITS:
        (x,) = _gather(stream, run, module)
        if site.norm is not None and config.reparameterize and config.method != "rtn":
            fold = plan_fold(fit_channels(x, config.a_bits))
            norm = model.get_submodule(site.norm)
            assert isinstance(norm, nn.LayerNorm)
            apply_fold(fold, norm, group)
            owner = model.get_submodule(site.name.rpartition(".")[0])
            if isinstance(owner, Attention) and owner.windows is not None:
                owner.windows.fold(fold.apply)
            return fold
        params = fit_tensor(x, config.a_bits)
        for linear in group:
            linear.x_params = params
    return None
