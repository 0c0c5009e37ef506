"""What a quantized model knows of itself: where it came from and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from erq.config import QuantConfig
from erq.models.sites import Site


@dataclass(frozen=True)
class QuantizedModelInfo:
    """Carried by simulated and deployed models as `erq_info`, and by checkpoints as their header.

    Args:
        family: the adapter's name. architecture: timm's model name, or the class's name.
        arch_kwargs: what the adapter's `build` takes. pretrained_cfg: timm's data config.
        config: the settings.
        calibration: n and sha256 of the calibration images.
        sites: the quantized sites in forward order.
    """

    family: str
    architecture: str
    arch_kwargs: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    config: QuantConfig
    calibration: dict[str, Any]
    sites: tuple[Site, ...]
