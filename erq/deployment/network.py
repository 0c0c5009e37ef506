"""A deployed model as a whole: its backend, its summary, and swapping layers of any torch model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from erq.config import FLOAT_BITS, QuantConfig, as_config
from erq.data import check_image_shape
from erq.deployment.blocks import QuantBlock
from erq.deployment.modules import (
    QuantAttention,
    QuantLinear,
    QuantScores,
    QuantValues,
    _Deployed,
)
from erq_kernels.dispatch import check_backend


class InputCheck:
    """What a deployed network does before its forward pass: refuse what are no images for it.

    Values are not looked at, so that nothing waits for a GPU: NaN and infinity come out as NaN.
    """

    def __init__(self, shape: tuple[int, int | None, int | None]) -> None:
        """Take images of (channels, height, width), None where any size goes."""
        self.shape = shape

    def __call__(self, net: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise ValueError unless the first argument is a float tensor [N, C, H, W] that fits, of
        the network's type and on its device."""
        if not args:
            return
        x = args[0]
        check_image_shape(x, self.shape)
        for own in net.parameters():
            if x.dtype != own.dtype or x.device != own.device:
                raise ValueError(
                    f"images are {x.dtype} on {x.device}, the network is {own.dtype} on "
                    f"{own.device}: images.to(device, dtype)"
                )
            break  # those behind it may stay fp32 in a network of fp16


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
        if isinstance(module, QuantLinear | QuantAttention):
            module.kernel()
        elif isinstance(module, QuantBlock):
            module.kernels()


def set_layout(net: nn.Module, layout: str) -> None:
    """Keep the weights of every integer GEMM of `net` as `layout`, int8 or packed.

    int8, the default, is unpacked once; packed takes a half to a quarter of the memory and is
    unpacked in the kernel. Codes are the same.

    Raises:
        ValueError: an unknown layout.
    """
    for module in net.modules():
        if isinstance(module, QuantLinear):
            module.layout = layout


def summary(net: nn.Module) -> str:
    """A row per quantized site: bits, scheme, the kernel that runs it, bytes; then the kernels a
    transformer block runs.

    Args:
        net: a deployed model, or any model with swapped layers.

    Raises:
        ValueError: a model without deployed modules.
    """
    rows = [("site", "weight", "act", "scheme", "kernel", "bytes", "fp32 bytes")]
    packed = full = 0
    attention_kernel = ""
    for name, module in net.named_modules():
        if isinstance(module, QuantLinear):
            size = sum(b.numel() * b.element_size() for b in module.state_dict().values())
            original = 4 * module.out_features * (module.in_features + (module.bias is not None))
            packed, full = packed + size, full + original
            rows.append(
                (
                    name, f"W{module.w_bits} {module.out_features}×{module.in_features}",
                    f"A{module.a_bits}", module.scheme, module.kernel(), f"{size:,}",
                    f"{original:,}",
                )
            )  # fmt: skip
        elif isinstance(module, QuantAttention):
            attention_kernel = module.kernel()  # its qk and av come next
        elif isinstance(module, QuantScores | QuantValues):
            scheme = "affine" if isinstance(module, QuantScores) else "log√2 × affine"
            rows.append((name, "", f"A{module.bits}", scheme, attention_kernel, "", ""))
    if len(rows) == 1:
        raise ValueError(
            "the model has no deployed layers: erq.deploy(sim) or erq.load(file) first"
        )
    rows.append(("total", "", "", "", "", f"{packed:,}", f"{full:,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    align = [str.ljust] * 5 + [str.rjust] * 2
    lines = [
        "  ".join(put(c, w) for put, c, w in zip(align, r, widths, strict=True)).rstrip()
        for r in rows
    ]
    return "\n".join([*lines, *_describe_blocks(net)])


def _describe_blocks(net: nn.Module) -> list[str]:
    """A line per run of blocks on codes that run the same kernels, one by one in their order."""
    lines: list[tuple[str, list[str]]] = []
    for name, block in net.named_modules():
        if not isinstance(block, QuantBlock):
            continue
        kernels = block.kernels()
        at_once = block.runs_at_once(torch.empty(1, 1, 1, device=next(block.buffers()).device))
        count = f"{len(kernels)} kernels{' in one call' if at_once else ''}"
        text = f"{count}: " + " → ".join(f"{op} ({by})" for op, by in kernels)
        for part, half in (("attention", block.attention_half), ("MLP", block.mlp_half)):
            if not half.kernels:
                text += f"; {part} module by module, since {half.reason}"
            elif half.reason:
                text += f"; more than the fewest in the {part} half, since {half.reason}"
        if lines and lines[-1][0] == text:
            lines[-1][1].append(name)
        else:
            lines.append((text, [name]))
    return [
        f"{names[0]}{' … ' + names[-1] if len(names) > 1 else ''}: {text}" for text, names in lines
    ]


def swap_linears(
    module: nn.Module,
    config: QuantConfig | str | Mapping[str, Any] = "w4a16",
    filter: Callable[[str, nn.Linear], bool] | None = None,
) -> nn.Module:
    """Make every nn.Linear of any torch model a weight-only QuantLinear, in place, without data.

    Args:
        module: any model; returned, with its layers swapped. An nn.Linear itself cannot be swapped
            in place: its QuantLinear is returned.
        config: its w_bits count; a_bits must be 16. `keep_float` and `overrides` apply to paths.
        filter: called with (path, layer); False leaves that layer alone.

    Raises:
        ValueError: not a module; activations below 16 bits, which need calibration; no layer to
            swap.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"swap_linears takes a torch module, got a {type(module).__name__}")
    settings = as_config(config)
    # A layer that stands at several paths is one layer at all of them.
    everything = module.named_modules(remove_duplicate=False)
    layers = {n: m for n, m in everything if type(m) is nn.Linear}
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
        return _weight_only(layers[""], chosen[""])
    made: dict[tuple[nn.Module, int], QuantLinear] = {}
    for name, own in chosen.items():
        key = (layers[name], own.w_bits)
        if key not in made:
            made[key] = _weight_only(layers[name], own)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, made[key])
    return module


def _weight_only(layer: nn.Linear, config: QuantConfig) -> QuantLinear:
    return QuantLinear.from_linear(layer, config).train(layer.training)
