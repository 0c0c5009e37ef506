"""QuantConfig: what it allows, what it says otherwise, and its way to a dict and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from erq.config import PRESETS, QuantConfig, as_config

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"w_bits": 1}, "w_bits must be an integer from 2 to 8, got 1"),
    ({"w_bits": 16}, "w_bits must be an integer from 2 to 8, got 16"),
    ({"w_bits": 4.0}, "w_bits must be an integer from 2 to 8, got 4.0"),
    ({"w_bits": True}, "w_bits must be an integer from 2 to 8, got True"),
    ({"a_bits": 9}, "a_bits must be an integer from 2 to 8, or 16 for floating point, got 9"),
    ({"a_bits": "4"}, "a_bits must be an integer from 2 to 8, or 16 for floating point, got '4'"),
    ({"method": "awq"}, "method must be one of erq, rtn, repq, gptq, got 'awq'"),
    ({"upstream": "fp"}, "upstream must be one of quantized, float, got 'fp'"),
    ({"refine": None}, "refine must be one of greedy, official, off, got None"),
    ({"attention": True}, "attention must be one of quantized, float, got True"),
    ({"ridge_scale": "mean"}, "ridge_scale must be one of relative, sum, got 'mean'"),
    ({"dual": 1}, "dual must be True or False, got 1"),
    ({"reparameterize": "no"}, "reparameterize must be True or False, got 'no'"),
    ({"ridge_act": -1.0}, "ridge_act must be a finite number >= 0, got -1.0"),
    ({"ridge_weight": float("nan")}, "ridge_weight must be a finite number >= 0, got nan"),
    ({"ridge_weight": float("inf")}, "ridge_weight must be a finite number >= 0, got inf"),
    ({"ridge_act": "1"}, "ridge_act must be a finite number >= 0, got '1'"),
    ({"ridge_act": True}, "ridge_act must be a finite number >= 0, got True"),
    ({"seed": 0.5}, "seed must be an integer of 64 bits, got 0.5"),
    ({"seed": True}, "seed must be an integer of 64 bits, got True"),
    ({"keep_float": "head"}, "keep_float must be a list of globs, got 'head'"),
    ({"keep_float": (1,)}, "keep_float must be a list of globs, got (1,)"),
    ({"keep_float": None}, "keep_float must be a list of globs, got None"),
    ({"overrides": []}, "overrides must map globs to fields, got list"),
    ({"overrides": {"head": 8}}, "overrides must map globs to fields, got 'head': 8"),
    ({"overrides": {3: {}}}, "overrides must map globs to fields, got 3: {}"),
    ({"overrides": {"head": {"seed": 1}}}, "overrides['head'] sets 'seed'; a site can override"),
    (
        {"overrides": {"head": {"w_bits": 1}}},
        "overrides['head']: w_bits must be an integer from 2 to 8, got 1",
    ),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused_values_are_named_with_what_is_allowed(
    values: dict[str, Any], message: str
) -> None:
    for make in (lambda: QuantConfig(**values), lambda: QuantConfig.from_dict(values)):
        with pytest.raises(ValueError) as error:
            make()
        assert message in str(error.value)


def test_unknown_fields_are_named() -> None:
    for make in (QuantConfig.from_dict, as_config):
        with pytest.raises(ValueError, match="unknown config field 'w_bit'; known: a_bits, aqer"):
            make({"w_bit": 4})
    for build in (QuantConfig.preset, QuantConfig.paper):
        with pytest.raises(ValueError, match="unknown config field 'w_bit'"):
            build("w4a4", w_bit=4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = QuantConfig.preset(name)
    w, a = name[1:].split("a")
    assert (config.w_bits, config.a_bits) == (int(w), int(a))
    assert config == QuantConfig(w_bits=int(w), a_bits=int(a))
    assert as_config(name) == config


def test_paper_is_the_published_method() -> None:
    config = QuantConfig.paper("w3a4")
    assert (config.w_bits, config.a_bits) == (3, 4)
    assert (config.upstream, config.refine, config.ridge_scale) == ("float", "official", "sum")
    assert config.ridge_act == config.ridge_weight == 1000.0
    assert (config.rotate_heads, config.ranges) == (False, "official")
    assert QuantConfig.paper("w3a4", refine="off").refine == "off"
    assert QuantConfig.preset("w3a4", dual=False).dual is False


@pytest.mark.parametrize("name", ["w4", "4a4", "w4a4 ", "W4A4", "", None, 44, "w4a4a4"])
def test_other_names_are_refused(name: Any) -> None:
    for build in (QuantConfig.preset, QuantConfig.paper):
        with pytest.raises(ValueError, match=r"unknown preset .*presets are w3a4, w4a4"):
            build(name)


@pytest.mark.parametrize(("name", "field"), [("w1a4", "w_bits"), ("w4a9", "a_bits")])
def test_widths_that_do_not_exist_are_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be an integer from 2 to 8"):
        QuantConfig.preset(name)


ODD = QuantConfig(
    w_bits=3,
    a_bits=16,
    method="gptq",
    reparameterize=False,
    rotate_heads=False,
    reparameterize_hidden=False,
    ranges="official",
    aqer=False,
    dual=False,
    wqer=False,
    reparameterize_merging=False,
    image_bits=8,
    upstream="float",
    refine="off",
    attention="float",
    ridge_act=0.5,
    ridge_weight=2,
    ridge_scale="sum",
    overrides={"blocks.*.mlp.fc2": {"a_bits": 8, "refine": "off"}},
    keep_float=("head",),
    seed=7,
)


def test_dict_round_trip_through_json() -> None:
    default = QuantConfig()
    differing = {f.name for f in fields(ODD) if getattr(ODD, f.name) != getattr(default, f.name)}
    assert differing == {f.name for f in fields(ODD)}  # the round trip below misses no field
    for config in (default, ODD, QuantConfig.paper("w4a4")):
        again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert as_config(config.to_dict()) == config
    assert as_config(ODD) is ODD


def test_lists_of_globs_become_tuples_and_configs_are_frozen() -> None:
    config = QuantConfig(keep_float=["head"])  # type: ignore[arg-type]
    assert config.keep_float == ("head",)
    with pytest.raises(FrozenInstanceError):
        config.w_bits = 8  # type: ignore[misc]


def test_a_config_does_not_share_the_callers_dicts() -> None:
    values = {"head": {"w_bits": 8}}
    config = QuantConfig(overrides=values)
    values["head"]["w_bits"] = 1
    assert config.for_site("head").w_bits == 8
    config.to_dict()["overrides"]["head"]["w_bits"] = 1
    assert config.for_site("head").w_bits == 8


@pytest.mark.parametrize("value", [4, None, ["w4a4"]])
def test_other_kinds_of_config_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"config must be a QuantConfig.*got (int|NoneType|list)"):
        as_config(value)


def test_overrides_of_every_matching_glob_apply_in_order() -> None:
    config = QuantConfig(
        overrides={
            "blocks.*": {"w_bits": 6, "ridge_act": 3.0},
            "blocks.*.mlp.fc2": {"w_bits": 8, "refine": "off"},
        }
    )
    fc2 = config.for_site("blocks.11.mlp.fc2")
    assert (fc2.w_bits, fc2.ridge_act, fc2.refine) == (8, 3.0, "off")
    assert config.for_site("blocks.0.attn.qkv").w_bits == 6
    assert config.for_site("head") == QuantConfig()


def test_kept_sites_and_globs_without_a_match() -> None:
    config = QuantConfig(
        keep_float=("head", "blocks.?.attn.*"), overrides={"*.fc2": {"dual": True}}
    )
    names = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"]
    assert [config.keeps_float(n) for n in names] == [False, True, False, True]
    config.check_globs(names)
    for glob, missing in (("head", "head"), ("*.fc2", "blocks.0.mlp.fc2")):
        rest = [n for n in names if n != missing]
        with pytest.raises(ValueError) as error:
            config.check_globs(rest)
        message = str(error.value)
        assert f"the glob {glob!r} matches none of the model's 3 sites" in message
        assert "sites are named patch_embed.proj, blocks.0.attn.qkv" in message
