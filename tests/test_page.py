"""The page about a packed file: complete, self-contained, and the same in both languages."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from erq.evaluation import Evaluation
from erq.page import Bars, Section, command_of, sections, to_html, to_markdown, write_page
from erq.timing import Timing

ERRORS = {"error_float": 1e-3, "error_aqer": 9e-4, "error_nearest": 5e-2, "error_final": 2e-2}
HEADER: dict[str, Any] = {
    "architecture": "vit_<tiny>",
    "family": "timm_vit",
    "created_by": "erq 9",
    "size_bytes": 2000,
    "config": {
        "w_bits": 4, "a_bits": 4, "method": "erq", "upstream": "quantized", "refine": "greedy",
        "attention": "quantized",
    },
    "calibration": {"n": 32, "sha256": "ab" * 32, "command": "erq quantize vit --images 'a b'"},
    "sites": {
        "patch_embed.proj": {
            "bits": 8, "a_bits": 16, "scheme": "affine", "shape": [10, 10], "bytes": 140,
            "errors": ERRORS,
        },
        "blocks.0.attn.qkv": {
            "bits": 2, "a_bits": 4, "scheme": "dual", "shape": [30, 10], "bytes": 99,
            "errors": ERRORS | {"error_final": 0.0},
        },
        "blocks.0.attn.qk": {"bits": 4, "scheme": "affine", "errors": {}},
    },
}  # fmt: skip
TIMING = Timing(
    name="torch fp32", batch=8, device="cpu", hardware="a CPU", threads=2, kernel="torch", runs=9,
    median_ms=12.5, p95_ms=13.0, min_ms=12.0, images_per_s=640.0,
)  # fmt: skip
EVALUATION = Evaluation(n=50, top1=90.0, agreement=95.0, kl=0.01, sqnr_db=20.0, reference_top1=92.0)
QUALITY = {"patch_embed.proj": 40.0, "blocks.0.attn.qkv": math.inf}


@pytest.fixture
def parts() -> list[Section]:
    return sections(HEADER, 16000, EVALUATION, QUALITY, [TIMING])


class Page(HTMLParser):
    """What a page holds; fails on a tag that is not closed."""

    VOID = ("meta", "rect", "line", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else(parts: list[Section]) -> None:
    page = Page(to_html("vit <tiny>", parts))
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe"})
    assert not any("src" in attrs or "href" in attrs for _, attrs in page.tags)
    assert "vit <tiny>" in "".join(page.text) and "vit_<tiny>" in "".join(page.text)


def test_both_pages_have_the_same_sections_and_numbers(parts: list[Section]) -> None:
    titles = [p.title for p in parts]
    assert titles == [
        "Summary", "Accuracy", "Bits and bytes of every layer", "Error of every layer",
        "Closeness of every layer", "Latency", "Reproduce",
    ]  # fmt: skip
    html, markdown = "".join(Page(to_html("t", parts)).text), to_markdown("t", parts)
    assert re.findall(r"^## (.*)$", markdown, re.M) == titles
    for part in parts:
        assert part.title in html
        for row in part.rows:
            for cell in row:
                assert cell in html and cell in markdown
    # 8 bits in 100 weights, 2 in 300: 3.5 on average; 16000 bytes in 2000.
    assert "3.50 bits on average over 2 layers" in markdown and "8.0× smaller" in markdown
    assert "640.0" in markdown and "erq quantize vit --images 'a b' --out FILE" in markdown


def test_what_was_not_measured_is_left_out() -> None:
    titles = [p.title for p in sections(HEADER, 16000, None, {}, [])]
    assert titles == [
        "Summary", "Bits and bytes of every layer", "Error of every layer", "Reproduce",
    ]  # fmt: skip


def test_a_file_without_a_command_shows_the_call() -> None:
    shown = command_of(HEADER | {"calibration": {"n": 7, "sha256": "00"}})
    assert "erq.quantize(model, images, {'w_bits': 4" in shown and "the 7 of" in shown


def widths(svg: str, style: str) -> list[float]:
    found = re.findall(rf'<rect class="{style}" x="260" y="[^"]*" width="([\d.]+)" height', svg)
    return [float(w) for w in found if w != "10"]


def test_bars_are_as_long_as_their_values() -> None:
    bars = Bars(("a",), ["x", "y", "z"], [2.0, 8.0, None], ticks=(0, 4, 8))
    assert widths(bars.svg(), "one") == [140.0, 560.0]
    log = Bars(
        ("a", "b"), ["x", "y"], [1e-2, 1.0], [1e-1, 0.0], ticks=(1e-3, 1e-2, 1e-1, 1.0), log=True
    )
    assert widths(log.svg(), "one") == pytest.approx([186.7, 560.0], abs=0.1)
    # What a logarithm cannot show stays visible as a sliver.
    assert widths(log.svg(), "two") == pytest.approx([373.3, 1.0], abs=0.1)
    assert "<b>" not in Bars(("<b>",), ["<b>"], [1.0], ticks=(0, 1)).svg()


def test_errors_that_are_all_zero_need_no_plot() -> None:
    zero = dict.fromkeys(ERRORS, 0.0)
    site = HEADER["sites"]["patch_embed.proj"] | {"errors": zero}
    part = next(
        p
        for p in sections(HEADER | {"sites": {"a": site}}, 16000, None, {}, [])
        if p.title == "Error of every layer"
    )
    assert part.chart is None and len(part.rows) == 1


def test_pages_are_written_side_by_side(parts: list[Section], tmp_path: Path) -> None:
    html, markdown = write_page(tmp_path / "model.v1", "t", parts)
    assert (html.name, markdown.name) == ("model.v1.html", "model.v1.md")
    assert html.read_text("utf-8") == to_html("t", parts)
    assert markdown.read_text("utf-8") == to_markdown("t", parts)


def test_pages_are_whole_or_not_there(
    parts: list[Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.html").write_text("old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(ValueError, match="No space left on device"):
        write_page(tmp_path / "model", "t", parts)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("model.html", "old")]
