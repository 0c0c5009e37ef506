"""The choice of a tile configuration: heuristic, tables, and what a table must look like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest

from erq_kernels import configs
from erq_kernels.configs import GemmConfig, Measurement

ARCHES = (80, 86, 89, 90, 100, 120)
CONFIG = GemmConfig(64, 128, 64, num_stages=4)
GLUON = GemmConfig(128, 128, 128, num_warps=8, kernel="gluon")


def entry(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "m": 1576,
        "n": 1152,
        "k": 384,
        "dual": True,
        "config": asdict(CONFIG),
        "microseconds": 10.0,
        "heuristic_microseconds": 12.5,
    }
    return values | changes


def table(*entries: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "version": configs.TABLE_VERSION,
        "device": "Some GPU",
        "triton": "3.8.0",
        "date": "2026-11-24",
        "qlinear": list(entries),
    }
    return values | changes


def parse(value: Any) -> dict[str, tuple[Measurement, ...]]:
    return configs.parse_table(json.dumps(value), "table")


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dual", [False, True])
def test_the_heuristic_fills_the_device_and_never_takes_gluon(arch: int, dual: bool) -> None:
    for n, k in ((192, 192), (1152, 384), (384, 1536), (3072, 768), (1000, 1024)):
        tiles = []
        for m in (1, 16, 17, 32, 33, 197, 1576, 12608, 50432):
            config = configs.heuristic(m, n, k, dual, arch)
            assert config.kernel == ("tma" if arch == 90 and m > 32 else "pointers")
            assert config.block_m <= max(16, 2 * m)
            assert config.block_k <= max(64, 2 * k)
            tiles.append(config.block_m * config.block_n)
        assert tiles == sorted(tiles)  # more rows never get smaller tiles
    assert configs.heuristic(50432, 1152, 384, dual, arch).block_m >= 64


def test_narrow_outputs_get_narrow_tiles() -> None:
    assert configs.heuristic(50432, 192, 192, False, 90).block_n == 64
    assert configs.heuristic(50432, 192, 192, False, 90).block_k == 64
    assert configs.heuristic(50432, 384, 384, False, 90).block_k == 128


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"block_m": 48}, "block_m must be a power of two from 16 to 256, got 48"),
        ({"block_k": 1024}, "block_k must be a power of two from 32 to 512, got 1024"),
        ({"num_stages": 0}, "num_stages must be from 1 to 8, got 0"),
        ({"block_k": 32, "dots": 2}, "leaves 16 columns each"),
        ({"max_registers": 100}, "max_registers must be a multiple of 8 in 32..248, got 100"),
        ({"kernel": "cutlass"}, "kernel must be one of pointers, tma, gluon, got 'cutlass'"),
        ({"kernel": "gluon", "block_n": 256}, "the gluon kernel takes block_n <= 128"),
        ({"kernel": "gluon", "num_stages": 1}, "num_stages >= 2"),
        ({"kernel": "gluon", "num_warps": 8}, "num_warps from 4 to block_m / 16"),
        ({"kernel": "gluon", "num_warps": 2}, "num_warps from 4 to block_m / 16"),
    ],
)
def test_configurations_that_do_not_exist(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        GemmConfig(**(asdict(CONFIG) | change))
    assert text in str(error.value)


def test_a_table_is_read() -> None:
    measured = parse(table(entry(), entry(m=197, dual=False)))["qlinear"]
    assert measured[0] == Measurement(1576, 1152, 384, True, CONFIG, 10.0, 12.5)
    assert measured[1].m == 197


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([], "must be an object with version 1"),
        (table(version=0), "measure it again with this release"),
        (table(speed=1), "has unknown fields speed"),
        (table(qlinear={}), "qlinear must be a list"),
        (table(entry(n="1152")), "qlinear[0]: n must be int, got '1152'"),
        (table(entry(dual=1)), "dual must be bool, got 1"),
        (table(entry(microseconds=10)), "microseconds must be float, got 10"),
        (table(entry(k=0)), "m, n and k must be at least 1"),
        (table(entry(microseconds=13.0)), "must not be slower than the heuristic's"),
        (table(entry(microseconds=-1.0)), "must not be slower than the heuristic's"),
        (table(entry(config={"block_m": 64})), "must have the fields block_k, block_m, block_n"),
        (table(entry(config=asdict(CONFIG) | {"block_m": 65})), "config: block_m must be a power"),
        (table(entry(config=asdict(CONFIG) | {"kernel": 1})), "kernel must be str, got 1"),
        (table(entry(extra=1)), "and may have no other"),
    ],
)
def test_a_wrong_table_is_refused(value: Any, text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(value)
    assert text in str(error.value) and str(error.value).startswith("table")


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="table is not JSON"):
        configs.parse_table("{", "table")


def test_nearest_measurement() -> None:
    def seen(m: int, k: int, block_k: int) -> Measurement:
        return Measurement(m, 1152, k, True, GemmConfig(64, 64, block_k), 1.0, 1.0)

    measured = (seen(1000, 384, 32), seen(4000, 384, 64), seen(1000, 512, 128))
    for m, k, block_k in ((1000, 384, 32), (1900, 384, 32), (2100, 384, 64), (900, 500, 128)):
        config = configs.nearest(measured, m, 1152, k, True)
        assert config is not None and config.block_k == block_k
    for m, n, k, dual in (
        (490, 1152, 384, True),
        (8100, 1152, 384, True),
        (1000, 1152, 200, True),
        (1000, 1153, 384, True),
        (1000, 1152, 384, False),
    ):
        assert configs.nearest(measured, m, n, k, dual) is None


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in the place of `tuned`; the caches are fresh."""
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    folder = tmp_path / "tuned"
    folder.mkdir()
    configs.load_table.cache_clear()
    configs.choose.cache_clear()
    yield folder
    configs.load_table.cache_clear()
    configs.choose.cache_clear()


def test_a_device_without_a_table_gets_the_heuristic(shipped: Path) -> None:
    assert configs.load_table("Some GPU") == {}
    got = configs.choose("qlinear", 1576, 1152, 384, True, 90, "Some GPU")
    assert got == configs.heuristic(1576, 1152, 384, True, 90)


def test_a_device_with_a_table_gets_what_was_measured(shipped: Path) -> None:
    (shipped / "some-gpu-80gb.json").write_text(json.dumps(table(entry())))
    for device, config in (("Some GPU 80GB", CONFIG), ("Some GPU", None)):
        got = configs.choose("qlinear", 1600, 1152, 384, True, 90, device)
        assert got == (config or configs.heuristic(1600, 1152, 384, True, 90))


@pytest.mark.parametrize("version", ["own", "0.0.1"])
def test_gluon_counts_under_the_triton_that_was_measured(shipped: Path, version: str) -> None:
    own = metadata.version("triton")
    written = table(
        entry(config=asdict(GLUON)), entry(n=384), triton=own if version == "own" else version
    )
    (shipped / "some-gpu.json").write_text(json.dumps(written))
    got = configs.choose("qlinear", 1576, 1152, 384, True, 90, "Some GPU")
    want = GLUON if version == "own" else configs.heuristic(1576, 1152, 384, True, 90)
    assert got == want
    assert configs.choose("qlinear", 1576, 384, 384, True, 90, "Some GPU") == CONFIG


def test_every_shipped_table_is_sound() -> None:
    for file in (Path(configs.__file__).parent / "tuned").glob("*.json"):
        measured = configs.parse_table(file.read_text(), file.name)
        assert measured["qlinear"]
        assert configs.device_slug(json.loads(file.read_text())["device"]) == file.stem


def test_name_of_a_table() -> None:
    assert configs.device_slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
