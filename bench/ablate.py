"""What each choice is worth, and where the rest is lost: settings × widths × networks × draws.

    python bench/ablate.py                          the small networks, every setting
    python bench/ablate.py --networks real --settings "default; ranges=official" --bits w4a4
    python bench/ablate.py --suite loss             single quantizers at 8 bits
    python bench/ablate.py --no-run --docs          tables of what was run, into docs/accuracy.md

A setting is named by the fields that it changes: `rotate_heads=false ranges=official`, with
`GLOB:FIELD=VALUE` for single sites; `default` changes nothing. Every run adds a JSON line to
bench/results/ and is not run again (--fresh starts over). Settings see the same images in a
draw, so differences to the default are paired: mean ± standard deviation over the draws.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accuracy import logits, markdown, measure, write_docs
from cases import REAL, ResultFile, Task, demo_task, real_task
from scenes import RECIPES, scenes_task
from torch import nn

from erq.calib import calibrate
from erq.calib.prepare import insert_simulated
from erq.calib.simulate import SimScores, SimValues
from erq.config import QuantConfig
from erq.models import adapter_for

SMALL = tuple(RECIPES)
NETWORKS: dict[str, Callable[[Path], Task]] = {
    "real": real_task,
    "demo": lambda _: demo_task(),
    **{name: lambda _, name=name: scenes_task(name) for name in SMALL},  # type: ignore[misc]
}
BITS = ("w4a4", "w3a4", "w3a3", "w2a4")
IMAGES = 32

FIRST = "rotate_heads=false ranges=official reparameterize_hidden=false"
"""The default before heads had another basis and ranges more percentiles."""
SETTINGS = (
    "default",
    FIRST,
    "rotate_heads=false",
    "reparameterize_hidden=false",
    "ranges=official",
    "upstream=float",
    "refine=off",
    "refine=official",
    "aqer=false",
    "wqer=false",
    "dual=false",
    "reparameterize=false",
    "reparameterize_merging=false",
    "attention=float",
    "ridge_act=0.3",
    "ridge_act=3",
    "ridge_weight=0.3",
    "ridge_weight=3",
    "patch_embed.proj:w_bits=8",
    "head*:w_bits=8,a_bits=8",
)
OFF = 8
"""Bits of a quantizer that is `switched off`: at W4A8 no loss could be measured."""
KINDS = {
    "weights": f"*:w_bits={OFF}",
    "weights of qkv": f"*.qkv:w_bits={OFF}",
    "weights of proj": f"*.attn.proj:w_bits={OFF}",
    "weights of fc1": f"*.fc1:w_bits={OFF}",
    "weights of fc2": f"*.fc2:w_bits={OFF}",
    "weights of patch merging": f"*.reduction:w_bits={OFF}",
    "weights of the patch embedding": f"patch_embed.proj:w_bits={OFF}",
    "weights of the head": f"head*:w_bits={OFF}",
    "activations": f"*:a_bits={OFF}",
    "input of qkv": f"*.qkv:a_bits={OFF}",
    "q and k": f"*.qk:a_bits={OFF}",
    "q": "operand=q",
    "k": "operand=k",
    "softmax and v": f"*.av:a_bits={OFF}",
    "softmax": "operand=p",
    "v": "operand=v",
    "input of proj": f"*.attn.proj:a_bits={OFF}",
    "input of fc1": f"*.fc1:a_bits={OFF}",
    "input of fc2": f"*.fc2:a_bits={OFF}",
    "input of patch merging": f"*.reduction:a_bits={OFF}",
    "input of the head": f"head*:a_bits={OFF}",
}
"""Part of a network → the setting that switches its quantizers off."""


@dataclass(frozen=True)
class Change:
    """What a setting's name says.

    Args:
        fields: of the config. operand: q, k, p (softmax) or v, whose quantizer has `OFF` bits.
    """

    fields: dict[str, Any]
    operand: str = ""

    @classmethod
    def parse(cls, name: str) -> Change:
        """From words `field=value`, `glob:field=value,…` or `operand=q`.

        Raises:
            ValueError: a word that is none of these.
        """
        fields: dict[str, Any] = {}
        operand = ""
        for word in name.replace("default", "").split():
            glob, colon, assignments = word.rpartition(":")
            for assignment in assignments.split(","):
                field, equals, text = assignment.partition("=")
                if not equals:
                    raise ValueError(
                        f"a setting is `field=value` or `glob:field=value`, not {word!r}"
                    )
                try:
                    value = json.loads(text)
                except json.JSONDecodeError:
                    value = text
                if colon:
                    fields.setdefault("overrides", {}).setdefault(glob, {})[field] = value
                elif field == "operand":
                    if text not in ("q", "k", "p", "v"):
                        raise ValueError(f"an operand is q, k, p or v, not {text!r}")
                    operand = text
                else:
                    fields[field] = value
        return cls(fields, operand)

    def applies(self, sites: list[str]) -> bool:
        """Whether a network with these sites has what is changed."""
        globs = list(self.fields.get("overrides", ()))
        globs += ["*.reduction"] if "reparameterize_merging" in self.fields else []
        return all(fnmatch.filter(sites, glob) for glob in globs)


@contextmanager
def operand_off(operand: str) -> Iterator[None]:
    """Give one operand of attention `OFF` bits; the config has one width for both of a product."""
    fit = calibrate._fit

    def wider(site: Any, module: nn.Module, inputs: Any, config: QuantConfig) -> Any:
        ranges = fit(site, module, inputs, config)
        pair = "qk" if isinstance(module, SimScores) else "pv"
        if not isinstance(module, SimScores | SimValues) or operand not in pair:
            return ranges
        other = fit(site, module, inputs, replace(config, a_bits=OFF))
        return tuple(
            w if name == operand else r for name, r, w in zip(pair, ranges, other, strict=True)
        )

    with mock.patch.object(calibrate, "_fit", wider if operand else fit):
        yield


def site_names(model: nn.Module) -> list[str]:
    """Every site of a network, in forward order."""
    blocks = insert_simulated(copy.deepcopy(model), adapter_for(model), QuantConfig())
    return [s.name for b in blocks for s in b.sites]


def loss_parts(sites: list[str]) -> dict[str, str]:
    """Part of a network → setting: the kinds that it has, then its blocks."""
    kinds = {part: s for part, s in KINDS.items() if Change.parse(s).applies(sites)}
    found = (re.match(r".*blocks\.\d+", s) for s in sites)
    blocks = dict.fromkeys(m[0] for m in found if m)
    return kinds | {b: f"{b}.*:w_bits={OFF},a_bits={OFF}" for b in blocks}


@dataclass(frozen=True)
class Cell:
    """One run: network, setting, width, draw, and how many test images measure it."""

    network: str
    setting: str
    bits: str
    draw: int
    tested: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        """That of a row of the results."""
        return cls(*(row[k] for k in ("network", "setting", "bits", "draw", "tested")))


def run(cell: Cell, task: Task, full: torch.Tensor) -> dict[str, Any]:
    """Quantize and measure."""
    change = Change.parse(cell.setting)
    config = QuantConfig.preset(cell.bits, **change.fields)
    with operand_off(change.operand):
        row, _ = measure(task, task.draw(IMAGES, cell.draw), config, full)
    return vars(cell) | row


@dataclass(frozen=True)
class Paired:
    """A setting beside the default on one network at one width.

    Args:
        draws: both were run on. top1: mean, spread. kl: mean, spread.
        top1_change: mean, spread of the paired difference in points. kl_change: of the paired
            change of KL in percent, means and spreads in the logarithm.
    """

    draws: int
    top1: tuple[float, float]
    kl: tuple[float, float]
    top1_change: tuple[float, float]
    kl_change: tuple[float, float]

    @classmethod
    def of(cls, rows: list[dict[str, Any]], setting: str) -> Paired | None:
        """From the rows of one network and width; None without a pair of draw and test images."""
        base = {(r["draw"], r["tested"]): r for r in rows if r["setting"] == "default"}
        mine = {(r["draw"], r["tested"]): r for r in rows if r["setting"] == setting}
        both = sorted(base.keys() & mine.keys())
        if not both:
            return None
        tops, kls = ([mine[d][k] for d in both] for k in ("top1", "kl"))
        steps = [mine[d]["top1"] - base[d]["top1"] for d in both]
        logs = [100 * math.log(mine[d]["kl"] / base[d]["kl"]) for d in both]
        change, spread = _mean(logs)
        relative = 100 * math.expm1(change / 100)
        return cls(len(both), _mean(tops), _mean(kls), _mean(steps), (relative, spread))


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _spread(value: tuple[float, float], form: str, draws: int) -> str:
    """Mean and, of several draws, spread."""
    return f"{value[0]:{form}}" + (f" ± {value[1]:{form.lstrip('+')}}" if draws > 1 else "")


def setting_tables(rows: list[dict[str, Any]]) -> str:
    """A table per width: settings × networks."""
    out = []
    settings = list(dict.fromkeys([*SETTINGS, *(r["setting"] for r in rows)]))
    for bits in (b for b in BITS if any(r["bits"] == b for r in rows)):
        here = [r for r in rows if r["bits"] == bits]
        networks = [n for n in NETWORKS if any(r["network"] == n for r in here)]
        body = []
        for setting in settings:
            found = [Paired.of([r for r in here if r["network"] == n], setting) for n in networks]
            if any(found):
                name = "first default" if setting == FIRST else setting
                body.append([f"`{name}`" if "=" in name else name, *map(_cell(setting), found)])
        out.append(markdown([f"{bits.upper()}", *networks], body))
    return "\n\n".join(out)


def _cell(setting: str) -> Callable[[Paired | None], str]:
    def text(pair: Paired | None) -> str:
        if pair is None:
            return ""
        n = pair.draws
        if setting == "default":
            return f"{_spread(pair.top1, '.1f', n)} %, KL {_spread(pair.kl, '.3f', n)}"
        change = _spread(pair.kl_change, "+.0f", n)
        return f"{_spread(pair.top1_change, '+.1f', n)}, KL {change} %"

    return text


def loss_tables(rows: list[dict[str, Any]], parts: dict[str, dict[str, str]]) -> str:
    """Kinds × networks and widths, then blocks: the share of KL that goes with a part.

    Args:
        parts: network → part → setting.
    """
    run = {(r["network"], r["bits"]) for r in rows if r["setting"] != "default"}
    columns = [(n, b) for n in parts for b in BITS if (n, b) in run]
    names = dict.fromkeys(name for n in parts for name in (*KINDS, *parts[n]))
    body = []
    for name in names:
        line = []
        for network, bits in columns:
            here = [r for r in rows if (r["network"], r["bits"]) == (network, bits)]
            pair = Paired.of(here, parts[network].get(name, ""))
            line.append("" if pair is None else f"{-pair.kl_change[0]:.0f}")
        if any(line):
            body.append([name, *line])
    return markdown(["share of KL, %", *(f"{n} {b.upper()}" for n, b in columns)], body)


def main() -> None:
    """Run what the arguments name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, default=REAL, help="folder of the real model")
    parser.add_argument("--suite", choices=("settings", "loss"), default="settings")
    parser.add_argument(
        "--networks", default=",".join(("demo", *SMALL)), help="of " + ", ".join(NETWORKS)
    )
    parser.add_argument("--settings", help="separated by semicolons; default: all known ones")
    parser.add_argument("--bits", help="of the widths; default: all, for losses w4a4 and w3a4")
    parser.add_argument("--kinds", action="store_true", help="of losses leave out the blocks")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--tested", type=int, help="test images, the first ones; default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then begin no further run")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of the result file")
    parser.add_argument("--no-run", action="store_true", help="tables of what was run, no more")
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/accuracy.md")
    args = parser.parse_args()
    widths = args.bits.split(",") if args.bits else BITS[:2] if args.suite == "loss" else BITS
    stop = time.monotonic() + 60 * args.minutes
    results = ResultFile({"settings": "ablate", "loss": "losses"}[args.suite], not args.fresh)
    for network in args.networks.split(",") if not args.no_run else ():
        task = NETWORKS[network](args.real)
        tested = min(args.tested or len(task.test), len(task.test))
        task = replace(task, test=task.test[:tested], labels=task.labels[:tested])
        full = logits(task.model, task.test)
        sites = site_names(task.model)
        settings = [s.strip() for s in args.settings.split(";")] if args.settings else SETTINGS
        if args.suite == "loss":
            parts = loss_parts(sites)
            settings = ["default", *(s for p, s in parts.items() if p in KINDS or not args.kinds)]
        settings = [s for s in settings if Change.parse(s).applies(sites)]
        for draw, bits, setting in product(range(args.draws), widths, settings):
            cell = Cell(network, setting, bits, draw, tested)
            if cell in map(Cell.of, results.rows()):
                continue
            if time.monotonic() > stop:
                raise SystemExit(f"{args.minutes:g} minutes are over; the next run would be {cell}")
            row = run(cell, task, full)
            results.add(row)
            print(
                f"{network} {bits} draw {draw} {setting}: {row['top1']:.2f} %, KL {row['kl']:.4f}",
                flush=True,
            )
    rows = results.rows()
    if args.suite == "settings":
        tables = setting_tables(rows)
    else:
        names = [n for n in NETWORKS if any(r["network"] == n for r in rows)]
        parts = {n: loss_parts(site_names(NETWORKS[n](args.real).model)) for n in names}
        tables = loss_tables(rows, parts)
    print(tables)
    if args.docs:
        write_docs(tables, {"settings": "ablate", "loss": "losses"}[args.suite])


if __name__ == "__main__":
    main()
