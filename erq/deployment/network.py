"""A deployed model as a whole: its backend, its summary, and swapping layers of any torch model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from erq.config import FLOAT_BITS, QuantConfig, as_config
from erq.deployment.modules import QuantLinear, QuantPatchEmbed, QuantScores, QuantValues, _Deployed
from erq_kernels.dispatch import check_backend


def set_backend(net: nn.Module, backend: str) -> None:
    """Make every deployed module of `net` use `backend`.

    Raises:
        ValueError: an unknown name. BackendError: a layer that the forced backend cannot run.
    """
    check_backend(backend)
    for module in net.modules():
        if isinstance(module, _Deployed):
            module.backend = backend
    for module in net.modules():
        if isinstance(module, QuantLinear | QuantPatchEmbed):
            module.kernel()


def summary(net: nn.Module) -> str:
    """A row per quantized site: bits, scheme, the kernel that runs it, bytes.

    Args:
        net: a deployed model, or any model with swapped layers.

    Raises:
        ValueError: a model without deployed modules.
    """
    rows = [("site", "weight", "act", "scheme", "kernel", "bytes", "fp32 bytes")]
    packed = full = 0
    for name, module in net.named_modules():
        if isinstance(module, QuantLinear | QuantPatchEmbed):
            size = sum(b.numel() * b.element_size() for b in module.buffers())
            original = 4 * module.out_features * (module.in_features + (module.bias is not None))
            packed, full = packed + size, full + original
            a_bits = module.a_bits if isinstance(module, QuantLinear) else FLOAT_BITS
            rows.append(
                (
                    name, f"W{module.w_bits} {module.out_features}×{module.in_features}",
                    f"A{a_bits}", module.scheme, module.kernel(), f"{size:,}", f"{original:,}",
                )
            )  # fmt: skip
        elif isinstance(module, QuantScores | QuantValues):
            scheme = "affine" if isinstance(module, QuantScores) else "log√2 × affine"
            rows.append((name, "", f"A{module.bits}", scheme, "", "", ""))
    if len(rows) == 1:
        raise ValueError(
            "the model has no deployed layers: erq.deploy(sim) or erq.load(file) first"
        )
    rows.append(("total", "", "", "", "", f"{packed:,}", f"{full:,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    right = (5, 6)
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))
        ).rstrip()
        for r in rows
    )


def swap_linears(
    module: nn.Module,
    config: QuantConfig | str | Mapping[str, Any] = "w4a16",
    filter: Callable[[str, nn.Linear], bool] | None = None,
) -> nn.Module:
    """Replace every nn.Linear of any torch model by a weight-only QuantLinear, in place, without data.

    Args:
        module: any model; returned, with its layers swapped.
        config: its w_bits count; a_bits must be 16. `keep_float` and `overrides` apply to paths.
        filter: called with (path, layer); False leaves that layer alone.

    Raises:
        ValueError: activations below 16 bits, which need calibration; no layer to swap.
    """
    settings = as_config(config)
    layers = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    settings.check_globs(list(layers))
    chosen = {
        name: settings.for_site(name)
        for name, layer in layers.items()
        if not settings.keeps_float(name) and (filter is None or filter(name, layer))
    }
    if not chosen:
        raise ValueError(f"no nn.Linear to swap in {type(module).__name__}")
    for name, own in chosen.items():
        if own.a_bits != FLOAT_BITS:
            raise ValueError(
                f"swap_linears leaves activations float: use a_bits=16 (w4a16), got a_bits="
                f"{own.a_bits} for {name or 'the layer'}; quantized activations need erq.quantize"
            )
    if "" in chosen:
        return QuantLinear.from_linear(layers[""], chosen[""])
    for name, own in chosen.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, QuantLinear.from_linear(layers[name], own))
    return module
