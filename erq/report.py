"""What the command line prints: tables for people, or JSON on stdout alone for programs."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from erq.deployment.checkpoint import write_atomically
from erq.evaluation import Evaluation
from erq.messages import megabytes
from erq.options import check_file
from erq.reduce.allocation import SiteBits, average_bits
from erq.timing import Timing

_WIDE = 200
"""Columns where stdout is no terminal, so that a row stays one line."""

_NARROWEST = 124
"""Columns that tables get on any terminal: a row in two lines reads better than a number in two."""

PLOT_ENDINGS = (".png", ".svg")

_ERRORS = ("error_float", "error_aqer", "error_nearest", "error_final")


@dataclass(frozen=True)
class Output:
    """Where results and notes of one command go.

    Args:
        json: results as one JSON object on stdout. quiet: no notes.
    """

    json: bool
    quiet: bool

    def result(self, values: Mapping[str, Any], *shown: Table | str) -> None:
        """Print `values` as JSON, or what is shown to people."""
        if self.json:
            print(json.dumps(to_plain(values), indent=2, allow_nan=False))
            return
        width = max(Console().width, _NARROWEST) if sys.stdout.isatty() else _WIDE
        console = Console(width=width)
        for item in shown:
            console.print(Text(item) if isinstance(item, str) else item)

    def note(self, text: str) -> None:
        """Print one line on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)


def to_plain(value: Any) -> Any:
    """`value` in what JSON knows: lists for tuples, text for paths, null for NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def make_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1
) -> Table:
    """A table whose first `left` columns are text and the others numbers."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(Text(column, "bold"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def bits_table(sites: Sequence[SiteBits]) -> Table:
    """Why every layer has its width, as `quantize(target_bits=...)` found."""
    widths = sorted({w for s in sites for w in s.errors})
    columns = ("layer", "weights", "bits", *(f"W{w}" for w in widths), "act", "gain", "next")
    rows = [
        (
            s.name, f"{s.weights:,}", str(s.w_bits),
            *(f"{s.errors[w]:.1e}" for w in widths), f"{s.floor:.1e}",
            "–" if s.gain is None else f"{s.gain:.1e}",
            "–" if s.next_gain is None else f"{s.next_gain:.1e}",
        )
        for s in sites
    ]  # fmt: skip
    title = (
        f"Bits per layer, {average_bits(sites):.2f} on average; W2 … W8: squared output error from "
        "the weights at that width; act: from activations at any width; gain: error saved per "
        "million bits by the last step taken, next: by the first one not taken"
    )
    return make_table(title, columns, rows)


def number(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def evaluation_table(title: str, name: str, e: Evaluation) -> Table:
    """One evaluation as a table of one row."""
    columns = (
        "", "images", "top-1 %", "top-5 %", "reference top-1 %", "agreement %", "KL", "SQNR dB",
    )  # fmt: skip
    row = (
        name, str(e.n), number(e.top1), number(e.top5), number(e.reference_top1),
        number(e.agreement), number(e.kl, 4), number(e.sqnr_db, 1),
    )  # fmt: skip
    return make_table(title, columns, [row])


def site_table(quality: Mapping[str, float], images: int) -> Table:
    """Closeness of every layer to full precision, as `site_sqnr` found it."""
    rows = [(name, number(db, 1)) for name, db in quality.items()]
    title = f"Output of every layer against full precision, {images} images"
    return make_table(title, ("layer", "SQNR dB"), rows)


def timing_table(title: str, timings: Sequence[Timing]) -> Table:
    """A row per measurement; the first of each batch size is what the others are compared with."""
    first: dict[int, float] = {}
    cells = []
    for t in timings:
        base = first.setdefault(t.batch, t.median_ms)
        cells.append(
            (
                t.name, t.kernel, str(t.batch), f"{t.median_ms:.2f}", f"{t.p95_ms:.2f}",
                f"{t.images_per_s:.1f}", f"{base / t.median_ms:.2f}", str(t.runs),
            )
        )  # fmt: skip
    where = f"{timings[0].hardware} ({timings[0].device}"
    threads = timings[0].threads
    where += f", {threads} threads)" if threads is not None else ")"
    columns = ("network", "kernel", "batch", "median ms", "p95 ms", "images/s", "× first", "runs")
    return make_table(f"{title} · {where}", columns, cells, left=2)


def check_plot(path: Path) -> None:
    """Raise before anything is timed if no plot can be written there.

    Raises:
        ValueError: an ending other than .png and .svg, no such folder, or no matplotlib.
    """
    if path.suffix not in PLOT_ENDINGS:
        endings = " or ".join(PLOT_ENDINGS)
        raise ValueError(f"{path}: a plot is a file that ends in {endings}, got {path.suffix!r}")
    check_file(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "a plot needs matplotlib, which is not installed: pip install 'erq[bench]'"
        )


def plot_timings(path: Path, title: str, times: Mapping[str, Mapping[int, float]]) -> None:
    """Latency and throughput by batch size, a line per engine, as `path` ends: .png or .svg.

    Args:
        times: median ms of a pass, by engine and batch size.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    latency, rate = figure.subplots(1, 2)
    for (name, by_batch), marker in zip(times.items(), itertools.cycle("osD^v<>*")):
        sizes = sorted(by_batch)
        latency.plot(sizes, [by_batch[s] for s in sizes], marker=marker, label=name)
        rate.plot(sizes, [1000 * s / by_batch[s] for s in sizes], marker=marker, label=name)
    batches = sorted({s for by_batch in times.values() for s in by_batch})
    for axes, what in ((latency, "median latency, ms"), (rate, "images per second")):
        axes.set(xscale="log", xticks=batches, xlabel="batch", ylabel=what)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    latency.set_yscale("log")
    rate.set_ylim(bottom=0)
    figure.legend(*latency.get_legend_handles_labels(), loc="outside right upper")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=150)
    write_atomically(path, image.getvalue())


def checkpoint_tables(path: Path, header: Mapping[str, Any]) -> tuple[str, Table]:
    """Header and sites of a checkpoint, as `describe_checkpoint` gives them."""
    config, calibration = header["config"], header["calibration"]
    lines = [
        f"{path}: {header['architecture']} ({header['family']}), format {header['format']}, "
        f"{header['created_by']}",
        f"W{config['w_bits']}A{config['a_bits']} · {config['method']} · upstream "
        f"{config['upstream']} · refine {config['refine']} · attention {config['attention']} · "
        f"λ {config['ridge_act']:g}, {config['ridge_weight']:g} ({config['ridge_scale']})",
        f"calibrated on {calibration['n']} images (sha256 {calibration['sha256'][:12]}…) · "
        f"{megabytes(header['size_bytes'])} on disk",
    ]
    columns = (
        "site", "scheme", "weights", "act", "bytes", "act only", "+ Aqer", "rounded", "final",
    )  # fmt: skip
    cells = []
    for name, site in header["sites"].items():
        is_weight = "shape" in site
        errors = [site["errors"].get(e) for e in _ERRORS]
        cells.append(
            (
                name,
                site["scheme"] + (f" ({site['dual']})" if site.get("dual") else ""),
                f"W{site['bits']} {'×'.join(map(str, site['shape']))}" if is_weight else "",
                f"A{site['a_bits'] if is_weight else site['bits']}",
                f"{site['bytes']:,}",
                *("" if e is None else f"{e:.1e}" for e in errors),
            )
        )
    title = (
        "Sites; last four columns: squared output error relative to full precision, after "
        "quantizing activations, after Aqer, with weights rounded to nearest, as kept"
    )
    return "\n".join(lines), make_table(title, columns, cells, left=3)
