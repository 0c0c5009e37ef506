"""QuantConfig: everything that decides the numbers of a quantized model, in one frozen value."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from erq.messages import shown

FLOAT_BITS = 16
"""a_bits of activations that stay in floating point."""

Method = Literal["erq", "rtn", "repq", "gptq"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("erq", "rtn", "repq", "gptq"),
    "upstream": ("quantized", "float"),
    "refine": ("greedy", "official", "off"),
    "attention": ("quantized", "float"),
    "ridge_scale": ("relative", "sum"),
    "ranges": ("fine", "attention", "official"),
}
_FLAGS = (
    "reparameterize", "rotate_heads", "aqer", "dual", "wqer", "reparameterize_merging",
    "reparameterize_hidden",
)  # fmt: skip
_SITE_FIELDS = ("w_bits", "a_bits", "dual", "aqer", "wqer", "refine", "ridge_act", "ridge_weight")

PRESETS = ("w3a4", "w4a4", "w4a8", "w6a6", "w8a8", "w3a16", "w4a16")
PAPER_RIDGE = 1000.0
"""0.1 · coe at the coefficient 10000 of the authors' README."""


@dataclass(frozen=True)
class QuantConfig:
    """Settings of a quantization; the fields are described in README.md, "Settings".

    Args:
        w_bits: weight bits, 2..8.
        a_bits: activation bits, 2..8, or 16 for floating-point activations.
        method: `erq`, or a baseline in the same code: `rtn` (round to nearest, no
            reparameterization, no dual scales), `repq` (reparameterization, dual scales if `dual`,
            round to nearest), `gptq` (as repq, weights rounded column by column).
        reparameterize, aqer, dual, wqer: each step of ERQ can be switched off.
        rotate_heads: `erq` only: center and rotate q, k and v of an attention's heads where it then
            loses less; folded into weights (docs/math.md, "Heads").
        ranges: what the range of an activation is chosen by: `fine`, its squared error, of many
            percentiles; `attention`, those of q, k, softmax and v by what attention loses, behind
            LayerNorms of the published percentiles; `official`, squared error, as published.
        reparameterize_merging: also fold the norm of Swin's patch merging into its `reduction`, and
            give that dual scales; as published ERQ leaves that layer out.
        reparameterize_hidden: `erq` only: also quantize what the MLP's activation function gives
            channel by channel where it has fewer than 8 bits, folded into fc2 alone (docs/math.md,
            "Behind an activation").
        upstream: what feeds a site during calibration: `quantized`, the network as quantized so
            far, or `float`, as published: every layer alone on the full-precision network.
        refine: rounding refinement: `greedy` best flips, `official` rule, `off`.
        image_bits: bits of the pixels that enter the patch embedding, 2..8, or 16: they stay float,
            as published.
        attention: `quantized` (q, k, softmax and v as in the paper) or `float`.
        ridge_act, ridge_weight: λ of Aqer and of Wqer, >= 0.
        ridge_scale: `relative`: λ times the mean squared length of an input row; `sum`: λ itself,
            on sums over rows, with the official code's special cases (head 0.1 in Aqer; patch
            embedding 10 λ and no refinement in Wqer).
        overrides: glob over site names → fields for those sites.
        keep_float: globs of sites to leave alone.
        seed: for every random choice (the drawing of calibration images).

    Raises:
        ValueError: names the field, the value and what is allowed.
    """

    w_bits: int = 4
    a_bits: int = 4
    method: Method = "erq"
    reparameterize: bool = True
    rotate_heads: bool = True
    aqer: bool = True
    dual: bool = True
    wqer: bool = True
    reparameterize_merging: bool = True
    reparameterize_hidden: bool = True
    ranges: Literal["fine", "attention", "official"] = "attention"
    upstream: Literal["quantized", "float"] = "quantized"
    refine: Literal["greedy", "official", "off"] = "greedy"
    image_bits: int = FLOAT_BITS
    attention: Literal["quantized", "float"] = "quantized"
    ridge_act: float = 1.0
    ridge_weight: float = 1.0
    ridge_scale: Literal["relative", "sum"] = "relative"
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keep_float: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_bits(self.w_bits, "w_bits", float_allowed=False)
        _check_bits(self.a_bits, "a_bits", float_allowed=True)
        _check_bits(self.image_bits, "image_bits", float_allowed=True)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {shown(getattr(self, name))}"
                )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {shown(getattr(self, name))}")
        for name in ("ridge_act", "ridge_weight"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value <= sys.float_info.max:
                raise ValueError(f"{name} must be a finite number >= 0, got {shown(value)}")
        seed = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must be an integer of 64 bits, got {shown(seed)}")
        globs = self.keep_float
        if not isinstance(globs, tuple | list) or not all(isinstance(g, str) for g in globs):
            raise ValueError(f"keep_float must be a list of globs, got {shown(self.keep_float)}")
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> QuantConfig:
        """The best known settings for `name`: w3a4, w4a4, w4a8, w6a6, w8a8, w3a16 or w4a16.

        Raises:
            ValueError: an unknown name, or a change that is not allowed.
        """
        return cls.from_dict({**_parse_bits(name), **changes})

    @classmethod
    def paper(cls, name: str, **changes: Any) -> QuantConfig:
        """ERQ as published: full-precision upstream, official refinement, λ in the sum form, heads
        in the basis that they were trained in."""
        published = {
            "rotate_heads": False,
            "ranges": "official",
            "upstream": "float",
            "reparameterize_merging": False,
            "reparameterize_hidden": False,
            "refine": "official",
            "ridge_act": PAPER_RIDGE,
            "ridge_weight": PAPER_RIDGE,
            "ridge_scale": "sum",
        }
        return cls.from_dict({**_parse_bits(name), **published, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config with these fields, defaults elsewhere.

        Raises:
            ValueError: an unknown field, by name, or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a config is a dict of fields, got {shown(values)}")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(
                    f"unknown config field {shown(name)}; known: {', '.join(sorted(known))}"
                )
        return cls(**dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; `from_dict` gives the same config back."""
        values = asdict(self)
        values["keep_float"] = list(self.keep_float)
        return values

    def for_site(self, name: str) -> QuantConfig:
        """This config with the overrides of every glob that matches the site `name` applied."""
        changes: dict[str, Any] = {}
        for glob, values in self.overrides.items():
            if fnmatchcase(name, glob):
                changes.update(values)
        return replace(self, overrides={}, **changes)

    def keeps_float(self, name: str) -> bool:
        """Whether the site `name` stays in full precision."""
        return any(fnmatchcase(name, glob) for glob in self.keep_float)

    def check_globs(self, names: list[str]) -> None:
        """Raise ValueError for a glob of `overrides` or `keep_float` that matches no site."""
        for glob in (*self.overrides, *self.keep_float):
            if not any(fnmatchcase(name, glob) for name in names):
                known = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
                raise ValueError(
                    f"the glob {shown(glob)} matches none of the model's {len(names)} sites; "
                    f"sites are named {known}"
                )


def as_config(config: QuantConfig | str | Mapping[str, Any]) -> QuantConfig:
    """A QuantConfig from itself, a preset's name, or a dict of fields."""
    if isinstance(config, QuantConfig):
        return config
    if isinstance(config, str):
        return QuantConfig.preset(config)
    if isinstance(config, Mapping):
        return QuantConfig.from_dict(config)
    raise ValueError(
        f"config must be a QuantConfig, a preset's name ({', '.join(PRESETS)}) or a dict of "
        f"fields, got {type(config).__name__}"
    )


def _check_bits(value: Any, name: str, float_allowed: bool) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and (2 <= value <= 8 or (float_allowed and value == FLOAT_BITS)):
        return
    also = f", or {FLOAT_BITS} for floating point" if float_allowed else ""
    raise ValueError(f"{name} must be an integer from 2 to 8{also}, got {shown(value)}")


def _parse_bits(name: str) -> dict[str, int]:
    match = re.fullmatch(r"w([0-9]{1,2})a([0-9]{1,2})", name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"unknown preset {shown(name)}; presets are {', '.join(PRESETS)}, "
            "or any w<2..8>a<2..8 or 16>"
        )
    return {"w_bits": int(match[1]), "a_bits": int(match[2])}


def _checked_overrides(overrides: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(overrides, Mapping):
        raise ValueError(f"overrides must map globs to fields, got {type(overrides).__name__}")
    checked: dict[str, dict[str, Any]] = {}
    for glob, values in overrides.items():
        if not isinstance(glob, str) or not isinstance(values, Mapping):
            raise ValueError(
                f"overrides must map globs to fields, got {shown(glob)}: {shown(values)}"
            )
        for name in values:
            if name not in _SITE_FIELDS:
                raise ValueError(
                    f"overrides[{shown(glob)}] sets {shown(name)}; a site can override "
                    f"{', '.join(_SITE_FIELDS)}"
                )
        try:
            QuantConfig(**dict(values))  # the fields' own checks
        except ValueError as error:
            raise ValueError(f"overrides[{shown(glob)}]: {error}") from error
        checked[glob] = dict(values)
    return checked
