"""What a network says of itself: where it lives, the images it takes, the names of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from erq.data import Preprocessing
from erq.models import UnsupportedModelError, adapter_for


def placement(net: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of a network, and the float type of its parameters: what its input must have."""
    device, dtype = torch.device("cpu"), torch.float32
    for first in chain(net.parameters(), net.buffers()):
        device = first.device
        break
    for parameter in net.parameters():
        if parameter.is_floating_point():
            dtype = parameter.dtype
            break
    return device, dtype


def data_config(net: nn.Module) -> Mapping[str, Any]:
    """timm's data config of a model, from wherever it carries one; empty if it carries none."""
    info = getattr(net, "erq_info", None)
    config = getattr(net, "pretrained_cfg", None) if info is None else info.pretrained_cfg
    return config or {}


def image_shape(net: nn.Module) -> tuple[int, int | None, int | None] | None:
    """(channels, height, width) of the images a network takes, None for a size that may vary.

    None altogether for a network that neither an adapter nor timm's data config knows.
    """
    try:
        return adapter_for(net).input_shape(net)
    except UnsupportedModelError:
        size = data_config(net).get("input_size")
        return None if size is None else (int(size[0]), None, None)


def preprocessing(net: nn.Module) -> Preprocessing:
    """How pictures become the input of a network.

    Raises:
        ValueError: a network that says nothing of its input.
    """
    shape = image_shape(net)
    if shape is None:
        raise ValueError(
            f"a {type(net).__name__} does not say which images it takes: give it timm's "
            "pretrained_cfg with input_size, mean and std"
        )
    return Preprocessing.from_config(data_config(net), shape)


def class_names(net: nn.Module) -> list[str] | None:
    """Names of a network's classes where its data config tells them, None elsewhere.

    It tells them by `label_names`, one per class, or by a tag that says ImageNet-1k.
    """
    config, classes = data_config(net), int(getattr(net, "num_classes", 0))
    names = config.get("label_names")
    if isinstance(names, list | tuple) and len(names) == classes:
        return [str(n) for n in names]
    if classes == 1000 and str(config.get("tag") or "").endswith("in1k"):
        from timm.data import ImageNetInfo

        return [str(n) for n in ImageNetInfo("imagenet-1k").label_descriptions()]
    return None


@contextmanager
def inference(*nets: nn.Module | None) -> Iterator[None]:
    """The networks in evaluation mode inside the context, as they were after it."""
    training = [net for net in nets if net is not None and net.training]
    for net in training:
        net.eval()
    try:
        yield
    finally:
        for net in training:
            net.train()
