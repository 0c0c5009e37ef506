"""One page about one packed file: summary, layers as plots, accuracy, sizes, latency, command.

The same sections are written twice: as one HTML file that needs nothing else, and as Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from erq.deployment.checkpoint import write_atomically
from erq.evaluation import Evaluation
from erq.messages import megabytes
from erq.report import number
from erq.timing import Timing

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #fff;
  --one: #0a5fb4; --two: #a8c7e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #14181d; --one: #58a6ff; --two: #2f5580; } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 960px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p, figcaption { color: var(--soft); margin: .25rem 0 }
.wide { overflow-x: auto } figure { margin: 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500 }
.facts td { text-align: left } .facts td:first-child { color: var(--soft) }
pre { background: color-mix(in srgb, var(--line) 35%, transparent); padding: .8rem;
  overflow-x: auto; border-radius: 6px; font-size: 13px }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink) } svg .soft { fill: var(--soft) }
svg .one { fill: var(--one) } svg .two { fill: var(--two) } svg line { stroke: var(--line) }
"""


@dataclass(frozen=True)
class Bars:
    """A bar for every layer, on a linear or a logarithmic scale.

    Args:
        legend: what the bars of `values`, and the paler ones of `behind`, show.
        values, behind: per layer; None draws none.
        ticks: values that get a line and a number.
        log: logarithmic between the first and the last tick, else linear from 0.
    """

    legend: tuple[str, ...]
    names: Sequence[str]
    values: Sequence[float | None]
    behind: Sequence[float | None] = ()
    ticks: Sequence[float] = ()
    log: bool = False

    def svg(self) -> str:
        """The chart as an inline SVG element."""
        row, left, width = 17, 260, 560
        top = 42
        height = top + row * len(self.names) + 6

        def at(value: float) -> float:
            low, high = self.ticks[0], self.ticks[-1]
            if not math.isfinite(value):
                return float(width) if value > 0 else 0.0
            if self.log:
                share = math.log(max(value, low) / low) / math.log(high / low)
            else:
                share = value / high
            return width * min(max(share, 0.0), 1.0)

        parts = [
            f'<svg viewBox="0 0 {left + width + 70} {height}" width="{left + width + 70}" '
            f'role="img" aria-label="{escape("; ".join(self.legend))}">'
        ]
        for i, (style, text) in enumerate(zip(("one", "two"), self.legend, strict=False)):
            start = left + 280 * i
            parts.append(f'<rect class="{style}" x="{start}" y="4" width="10" height="10"/>')
            parts.append(f'<text class="soft" x="{start + 16}" y="13">{escape(text)}</text>')
        for tick in self.ticks:
            x = left + at(tick)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height}"/>')
            label = f"{tick:g}"
            parts.append(
                f'<text class="soft" x="{x:.1f}" y="{top - 10}" text-anchor="middle">{label}</text>'
            )
        behind = self.behind or [None] * len(self.names)
        for i, (name, value, pale) in enumerate(zip(self.names, self.values, behind, strict=True)):
            y = top + row * i
            parts.append(
                f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
            )
            for style, v, inset in (("two", pale, 1), ("one", value, 4)):
                if v is not None:
                    parts.append(
                        f'<rect class="{style}" x="{left}" y="{y + inset}" '
                        f'width="{max(at(v), 1):.1f}" height="{row - 2 * inset}"/>'
                    )
            if value is not None:
                x = left + max(at(value), at(pale) if pale is not None else 0.0)
                shown = f"{value:.1e}" if self.log else f"{value:.3g}"
                parts.append(f'<text class="soft" x="{x + 6:.1f}" y="{y + 12}">{shown}</text>')
        return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: heading. text: a sentence under it. columns, rows: a table. chart: a plot, in HTML
            alone; the table says the same. code: verbatim.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    chart: Bars | None = None
    code: str = ""


def sections(
    header: Mapping[str, Any],
    fp32_bytes: int,
    evaluation: Evaluation | None,
    quality: Mapping[str, float],
    timings: Sequence[Timing],
) -> list[Section]:
    """The page's parts.

    Args:
        header: what `describe_checkpoint` gave. fp32_bytes: of the network in full precision.
        evaluation, quality: figures on images, where there were any.
        timings: of full precision and of the packed network.
    """
    found = [_summary(header, fp32_bytes)]
    if evaluation is not None:
        found.append(_accuracy(evaluation))
    found += [_bits(header), _errors(header)]
    if quality:
        found.append(_quality(quality))
    if timings:
        found.append(_latency(timings))
    found.append(Section("Reproduce", "The same codes come from:", code=command_of(header)))
    return found


def _summary(header: Mapping[str, Any], fp32_bytes: int) -> Section:
    config, calibration, size = header["config"], header["calibration"], header["size_bytes"]
    sites = header["sites"].values()
    weights = [(s["bits"], math.prod(s["shape"])) for s in sites if "shape" in s]
    average = sum(b * n for b, n in weights) / sum(n for _, n in weights)
    rows = [
        ("architecture", f"{header['architecture']} ({header['family']})"),
        ("weights", f"{average:.2f} bits on average over {len(weights)} layers"),
        ("activations", f"{config['a_bits']} bits, attention {config['attention']}"),
        ("method", f"{config['method']}, upstream {config['upstream']}, refine {config['refine']}"),
        ("calibration", f"{calibration['n']} images (sha256 {calibration['sha256'][:12]}…)"),
        ("file", f"{megabytes(size)}; fp32 {megabytes(fp32_bytes)}, fp16 "
         f"{megabytes(fp32_bytes // 2)}: {fp32_bytes / size:.1f}× smaller than fp32"),
        ("made by", str(header["created_by"])),
    ]  # fmt: skip
    return Section("Summary", columns=("", ""), rows=rows)


def _accuracy(e: Evaluation) -> Section:
    columns = ("images", "top-1 %", "full precision %", "agreement %", "KL", "SQNR dB")
    row = (
        str(e.n), number(e.top1), number(e.reference_top1), number(e.agreement), number(e.kl, 4),
        number(e.sqnr_db, 1),
    )  # fmt: skip
    text = (
        "Agreement: how often the likeliest class is that of full precision; KL: of its class "
        "probabilities; SQNR: of its logits. None of the three needs labels."
    )
    return Section("Accuracy", text, columns, [row])


def _bits(header: Mapping[str, Any]) -> Section:
    sites = header["sites"]
    layers = {n: s for n, s in sites.items() if "shape" in s}
    rows = [
        (
            n, str(s["bits"]), "float" if s["a_bits"] == 16 else str(s["a_bits"]), s["scheme"],
            "×".join(map(str, s["shape"])), f"{s['bytes']:,}",
        )
        for n, s in layers.items()
    ]  # fmt: skip
    chart = Bars(
        ("bits of a weight",), list(layers), [float(s["bits"]) for s in layers.values()],
        ticks=(0, 2, 4, 6, 8),
    )  # fmt: skip
    columns = ("layer", "weight bits", "activation bits", "scheme", "shape", "bytes")
    return Section("Bits and bytes of every layer", "", columns, rows, chart)


def _errors(header: Mapping[str, Any]) -> Section:
    layers = {n: s["errors"] for n, s in header["sites"].items() if s["errors"]}
    final = [e.get("error_final") for e in layers.values()]
    nearest = [e.get("error_nearest") for e in layers.values()]
    keys = ("error_float", "error_aqer", "error_nearest", "error_final")
    rows = [(n, *(f"{e[k]:.1e}" if k in e else "" for k in keys)) for n, e in layers.items()]
    chart = None
    positive = [v for v in (*final, *nearest) if v is not None and 0 < v < math.inf]
    if positive:
        first = math.floor(math.log10(min(positive)))
        last = max(math.ceil(math.log10(max(positive))), first + 1)
        chart = Bars(
            ("as kept", "its weights rounded to nearest"), list(layers), final, nearest,
            [10.0**e for e in range(first, last + 1)], log=True,
        )  # fmt: skip
    text = (
        "Squared error of the layer's output on the calibration images, relative to full "
        "precision: from activations alone, after Aqer, with weights rounded to nearest, as kept."
    )
    columns = ("layer", "activations", "+ Aqer", "rounded", "kept")
    return Section("Error of every layer", text, columns, rows, chart)


def _quality(quality: Mapping[str, float]) -> Section:
    finite = [v for v in quality.values() if math.isfinite(v)]
    high = 10.0 * math.ceil(max(finite, default=10.0) / 10.0)
    chart = Bars(
        ("SQNR in dB, more is better",), list(quality),
        [v if math.isfinite(v) else None for v in quality.values()],
        ticks=tuple(high * i / 4 for i in range(5)),
    )  # fmt: skip
    text = "Output of every layer against full precision, all losses before it included."
    rows = [(n, number(v, 1)) for n, v in quality.items()]
    return Section("Closeness of every layer", text, ("layer", "SQNR dB"), rows, chart)


def _latency(timings: Sequence[Timing]) -> Section:
    rows = [
        (t.name, t.kernel, str(t.batch), f"{t.median_ms:.2f}", f"{t.p95_ms:.2f}",
         f"{t.images_per_s:.1f}")
        for t in timings
    ]  # fmt: skip
    first = timings[0]
    threads = "" if first.threads is None else f", {first.threads} threads"
    text = f"{first.hardware} ({first.device}{threads})."
    columns = ("network", "kernel", "batch", "median ms", "p95 ms", "images/s")
    return Section("Latency", text, columns, rows)


def command_of(header: Mapping[str, Any]) -> str:
    """The command that made a file, or the Python call where none did."""
    command = header["calibration"].get("command")
    if isinstance(command, str):
        return f"{command} --out FILE"
    return (
        f"model = …  # {header['architecture']}\n"
        f"images = …  # the {header['calibration']['n']} of the summary\n"
        f"sim = erq.quantize(model, images, {header['config']!r})\n"
        "erq.save(erq.deploy(sim), FILE)"
    )


def to_markdown(title: str, parts: Sequence[Section]) -> str:
    """The page as Markdown; plots are left out, their numbers are in the tables."""
    lines = [f"# {title}"]
    for part in parts:
        lines += ["", f"## {part.title}"]
        if part.text:
            lines += ["", part.text]
        if part.rows:
            lines += ["", _row(part.columns), _row(["---"] * len(part.columns))]
            lines += [_row(row) for row in part.rows]
        if part.code:
            lines += ["", "```", part.code, "```"]
    return "\n".join([*lines, ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


def to_html(title: str, parts: Sequence[Section]) -> str:
    """The page as one HTML file without scripts, fonts or images of its own."""
    body = [f"<h1>{escape(title)}</h1>"]
    for part in parts:
        body.append(f"<h2>{escape(part.title)}</h2>")
        if part.text:
            body.append(f"<p>{escape(part.text)}</p>")
        if part.chart is not None:
            body.append(f'<figure class="wide">{part.chart.svg()}</figure>')
        if part.rows:
            table = _html_table(part)
            if part.chart is not None:
                table = f"<details><summary>Table</summary>{table}</details>"
            body.append(f'<div class="wide">{table}</div>')
        if part.code:
            body.append(f"<pre>{escape(part.code)}</pre>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _html_table(part: Section) -> str:
    if not any(part.columns):
        facts = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in part.rows)
        return f'<table class="facts"><tbody>{facts}</tbody></table>'
    head = "".join(f"<th>{escape(c)}</th>" for c in part.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in part.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def write_page(stem: Path, title: str, parts: Sequence[Section]) -> tuple[Path, Path]:
    """Write `stem`.html and `stem`.md, each whole or not at all; the two paths.

    Raises:
        CheckpointError: they cannot be written there.
    """
    pages = (stem.with_name(f"{stem.name}.html"), stem.with_name(f"{stem.name}.md"))
    write_atomically(pages[0], to_html(title, parts).encode())
    write_atomically(pages[1], to_markdown(title, parts).encode())
    return pages
