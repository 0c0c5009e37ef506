"""How good a network is: accuracy where there are labels, closeness where there is a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from erq.data import Images, check_image_shape, check_images, own_batches
from erq.data import batches as iterate
from erq.deployment.blocks import module_by_module
from erq.inputs import class_names, image_shape, inference, placement
from erq.models import carry_over, prepared_twin
from erq.ranks import ALONE, Ranks

_SITE_IMAGES = 8
"""Images whose outputs of all layers are held at once."""


@dataclass(frozen=True)
class Evaluation:
    """Figures over `n` images; None where labels or a reference were missing.

    Args:
        n: number of images.
        top1, top5: percent of images whose label is the likeliest class, or one of the 5 likeliest.
        agreement: percent of images whose likeliest class is the reference's.
        kl: mean over images of KL(reference ‖ network) of the class probabilities, in nats.
        sqnr_db: 10 log₁₀ of the reference's logits' energy over that of the difference, in dB;
            infinite where the logits are equal.
        reference_top1: percent, as top1.
    """

    n: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sqnr_db: float | None = None
    reference_top1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


@dataclass
class _Sums:
    """What is added up over the images."""

    n: int = 0
    labelled: int = 0
    first: int = 0
    first_five: int = 0
    reference_first: int = 0
    same: int = 0
    kl: float = 0.0
    signal: float = 0.0
    noise: float = 0.0


def evaluate(
    net: nn.Module, batches: Images, reference: nn.Module | None = None, ranks: Ranks = ALONE
) -> Evaluation:
    """Compare a network with labels, with a reference network, or with both, batch by batch.

    Both networks run in evaluation mode, each on its own device. A tuple of logits, which distilled
    models may return, is averaged, as timm does when it evaluates them.

    Args:
        net: images → logits [N, classes].
        batches: float [N, C, H, W], already normalised, or an iterable of such batches or of
            (batch, integer labels [N]).
        reference: usually the full-precision model; it sees the same images.
        ranks: processes that share the batches (`erq.ranks.launched`); each calls with the same
            arguments and gets the same figures, those of one process alone.

    Returns:
        Percentages and errors over all images.

    Raises:
        ValueError: no images, images that the network does not take, labels that do not fit, or
            outputs that are not finite logits.
    """
    own: dict[int, _Sums] = {}
    with inference(net, reference):
        for index, (x, labels) in own_batches(_checked_source(batches), ranks):
            sums = own[index] = _Sums()
            images = _checked(x, net)
            if reference is not None:
                _check_reference(images, reference)
            logits = _logits(net, images, "the network")
            other = None if reference is None else _logits(reference, images, "the reference")
            if other is not None and other.shape != logits.shape:
                raise ValueError(
                    f"the network has {logits.shape[1]} classes, the reference {other.shape[1]}"
                )
            sums.n += len(images)
            if labels is not None:
                checked = _check_labels(labels, logits, f"batch {index}")
                _add_labelled(sums, logits, other, checked)
            if other is not None:
                _add_compared(sums, logits, other)
    # Batch by batch, so that the order of the sums does not depend on who had which.
    sums = _Sums()
    for part in ranks.merge(own).values():
        for name, value in vars(part).items():
            setattr(sums, name, getattr(sums, name) + value)
    if sums.n == 0:
        raise ValueError("no images to evaluate")
    if sums.labelled not in (0, sums.n):
        raise ValueError(f"only {sums.labelled} of {sums.n} images have labels: give all or none")
    return _result(sums, reference is not None)


def site_sqnr(net: nn.Module, batches: Images, reference: nn.Module) -> dict[str, float]:
    """How close every layer of a quantized network comes to full precision; no labels needed.

    Both networks see the same images, so a layer's figure counts what all layers before it lost as
    well. The output of linear layers and of attention is compared; scores are never in memory.

    Args:
        net: a simulated or deployed network. batches: as for `evaluate`; labels are ignored.
        reference: the full-precision network that it was made from.

    Returns:
        Site → 10 log₁₀ of the reference's energy over that of the difference, in dB, in forward
        order; attention under its `av` site. With `rotate_heads` what qkv and attention give is in
        another basis than the reference's and left out; `proj` is the first to compare.

    Raises:
        ValueError: networks that are not a quantized one and its origin, or no images.
    """
    info = getattr(net, "erq_info", None)
    if info is None or hasattr(reference, "erq_info"):
        raise ValueError(
            "site_sqnr compares a network that erq.quantize, deploy or load gave with the "
            "full-precision network that it was made from"
        )
    twin = prepared_twin(carry_over(reference))
    rotated = info.config.rotate_heads and info.config.method == "erq"
    names = [s.name for s in info.sites if s.kind in ("linear", "conv")]
    attention = {
        s.name.removesuffix("av") + "proj": s.name for s in info.sites if s.kind[-2:] == "av"
    }
    if rotated:
        names = [n for n in names if not n.endswith(".qkv")]
        attention = {}
    compared = {*names, *attention.values()}
    sums: dict[str, list[float]] = {s.name: [0.0, 0.0] for s in info.sites if s.name in compared}
    with inference(net), module_by_module(net), torch.inference_mode():
        for x, _ in _items(batches):
            images = _checked(x, net)
            _check_reference(images, reference)
            for part in images.split(_SITE_IMAGES):
                want = _site_outputs(twin, part, names, attention)
                for name, value in _site_outputs(net, part, names, attention).items():
                    full = want[name]
                    if full.shape != value.shape:
                        raise ValueError(
                            f"{name} gives {list(value.shape)}, the reference {list(full.shape)}: "
                            "it is another network"
                        )
                    sums[name][0] += float(full.square().sum(dtype=torch.float64))
                    sums[name][1] += float((full - value).square().sum(dtype=torch.float64))
    if not any(signal for signal, _ in sums.values()):
        raise ValueError("no images to evaluate")
    return {
        name: math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
        for name, (signal, noise) in sums.items()
    }


def _site_outputs(
    net: nn.Module, images: Tensor, names: list[str], attention: Mapping[str, str]
) -> dict[str, Tensor]:
    """fp32 outputs, on the CPU, of the layers `names` and of the attention before each `proj`."""
    found: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.float().cpu()

    try:
        for name in names:
            module = net.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda _, __, y, n=name: keep(n, y)))
        for proj, site in attention.items():
            module = net.get_submodule(proj)
            hooks.append(module.register_forward_pre_hook(lambda _, a, n=site: keep(n, a[0])))
        device, dtype = placement(net)
        net(images.to(device, dtype))
    except AttributeError as error:
        raise ValueError(f"the reference is another network: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def likeliest(net: nn.Module, batches: Images, count: int = 5) -> list[list[dict[str, Any]]]:
    """The likeliest classes of every image, best first.

    Args:
        batches: as for `evaluate`; labels are ignored.
        count: classes per image, all if there are fewer.

    Returns:
        Per image a list of `class` (index), `name` (None where unknown) and `probability`.

    Raises:
        ValueError: as `evaluate`.
    """
    names = class_names(net)
    found: list[list[dict[str, Any]]] = []
    with inference(net):
        for x, _ in _items(batches):
            logits = _logits(net, _checked(x, net), "the network")
            top = logits.softmax(dim=1).topk(min(count, logits.shape[1]), dim=1)
            for probabilities, classes in zip(
                top.values.tolist(), top.indices.tolist(), strict=True
            ):
                found.append(
                    [
                        {"class": c, "name": names[c] if names else None, "probability": p}
                        for p, c in zip(probabilities, classes, strict=True)
                    ]
                )
    return found


def _checked(x: Any, net: nn.Module) -> Tensor:
    """`x` as images that the network takes, as far as it says what it takes."""
    channels = x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else 0
    return check_images(x, image_shape(net) or (channels, None, None))


def _check_reference(images: Tensor, reference: nn.Module) -> None:
    """Raise ValueError if the reference says that it takes other images than the network does."""
    shape = image_shape(reference)
    if shape is None:
        return
    try:
        check_image_shape(images, shape)
    except ValueError as error:
        raise ValueError(f"the reference is another network: {error}") from error


def _checked_source(batches: Any) -> Any:
    if not isinstance(batches, Iterable):
        raise ValueError(
            "batches must be a float tensor [N, C, H, W] or an iterable of such batches or of "
            f"(batch, labels), got {type(batches).__name__}"
        )
    return batches


def _items(batches: Any) -> Iterable[tuple[Any, Any]]:
    return iterate(_checked_source(batches))


def _logits(net: nn.Module, images: Tensor, who: str) -> Tensor:
    """fp64 logits [N, classes] on the CPU."""
    device, dtype = placement(net)
    with torch.inference_mode():
        out = net(images.to(device, dtype))
    parts = list(out) if isinstance(out, tuple | list) else [out]
    if not parts or not all(isinstance(p, Tensor) and p.dim() == 2 for p in parts):
        shown = ", ".join(
            str(list(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in parts
        )
        raise ValueError(f"{who} must return logits [N, classes], got {shown}")
    logits = torch.stack([p.double().cpu() for p in parts]).mean(dim=0)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{who} returned NaN or infinite logits")
    return logits


def _check_labels(labels: Any, logits: Tensor, where: str) -> Tensor:
    """int64 labels [N] on the CPU, each one of the logits' classes."""
    n, classes = logits.shape
    try:
        checked = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: labels must be integers [{n}] ({error})") from error
    if checked.is_floating_point() or checked.is_complex() or checked.dtype == torch.bool:
        raise ValueError(f"{where}: labels must be integers [{n}], got {checked.dtype}")
    if tuple(checked.shape) != (n,):
        raise ValueError(f"{where}: {n} images need labels [{n}], got {list(checked.shape)}")
    outside = (checked < 0) | (checked >= classes)
    if bool(outside.any()):
        raise ValueError(
            f"{where}: label {int(checked[outside][0])} is none of the network's classes "
            f"0..{classes - 1}"
        )
    return checked.long().cpu()


def _add_labelled(sums: _Sums, logits: Tensor, other: Tensor | None, labels: Tensor) -> None:
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    sums.labelled += len(labels)
    sums.first += int((logits.argmax(dim=1) == labels).sum())
    sums.first_five += int((top == labels[:, None]).any(dim=1).sum())
    if other is not None:
        sums.reference_first += int((other.argmax(dim=1) == labels).sum())


def _add_compared(sums: _Sums, logits: Tensor, other: Tensor) -> None:
    log_p, log_q = other.log_softmax(dim=1), logits.log_softmax(dim=1)
    sums.same += int((logits.argmax(dim=1) == other.argmax(dim=1)).sum())
    sums.kl += float((log_p.exp() * (log_p - log_q)).sum())
    sums.signal += float(other.square().sum())
    sums.noise += float((logits - other).square().sum())


def _result(sums: _Sums, compared: bool) -> Evaluation:
    def percent(count: int) -> float:
        return 100.0 * count / sums.n

    labelled = sums.labelled > 0
    sqnr = math.inf
    if sums.noise > 0:
        sqnr = 10 * math.log10(sums.signal / sums.noise) if sums.signal > 0 else -math.inf
    return Evaluation(
        n=sums.n,
        top1=percent(sums.first) if labelled else None,
        top5=percent(sums.first_five) if labelled else None,
        agreement=percent(sums.same) if compared else None,
        kl=sums.kl / sums.n if compared else None,
        sqnr_db=sqnr if compared else None,
        reference_top1=percent(sums.reference_first) if labelled and compared else None,
    )
