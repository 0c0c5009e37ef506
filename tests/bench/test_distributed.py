"""bench/distributed.py plans the bytes that a run of several ranks then sends, to the byte."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from timm.models.vision_transformer import VisionTransformer

from erq import QuantConfig

ROOT = Path(__file__).resolve().parents[2]
SHAPE: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "num_classes": 7, "embed_dim": 24, "depth": 1, "num_heads": 2,
}  # fmt: skip
CONFIG: dict[str, Any] = {"image_bits": 8, "overrides": {"head": {"a_bits": 16}}}
IMAGES = 55
PROGRAM = f"""
import json, sys, torch
from timm.models.vision_transformer import VisionTransformer
import erq
from erq.ranks import launched
torch.manual_seed(0)
model, images = VisionTransformer(**{SHAPE}).eval(), torch.randn({IMAGES}, 3, 16, 16)
with launched(torch.device("cpu")) as ranks:
    erq.quantize(model, images, {CONFIG}, ranks=ranks)
    sent = ranks.merge({{ranks.rank: (ranks.sent_bytes, ranks.told_bytes)}})
if ranks.first:
    print(json.dumps(list(sent.values())))
"""


@pytest.fixture(scope="module")
def distributed() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        spec = importlib.util.spec_from_file_location(
            "bench_distributed", ROOT / "bench" / "distributed.py"
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "bench_distributed", module)
        spec.loader.exec_module(module)
        return module


@pytest.mark.slow
@pytest.mark.parametrize("size", [3])
def test_planned_bytes_are_sent(distributed: Any, tmp_path: Path, size: int) -> None:
    program = tmp_path / "run.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(program)], capture_output=True, text=True, check=False,
        env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    model = VisionTransformer(**SHAPE).eval()
    planned = distributed.traffic(model, IMAGES, size, QuantConfig(**CONFIG))
    assert sum(t.total - t.decision for t in planned) == sum(sent for sent, _ in counted)
    told = counted[0][1]
    assert all(others == 0 for _, others in counted[1:])
    # Headers and ranges come on top: a few kB a site and rank.
    decisions = sum(t.decision for t in planned)
    assert decisions < told < decisions + 3000 * len(planned) * (size - 1)


def test_alone_nothing_goes_over_the_wire(distributed: Any) -> None:
    planned = distributed.traffic(VisionTransformer(**SHAPE).eval(), IMAGES, 1, QuantConfig())
    assert {t.total for t in planned} == {0}


def test_plan_by_hand(distributed: Any) -> None:
    model = VisionTransformer(**SHAPE).eval()
    found = {t.name: t for t in distributed.traffic(model, 64, 4, QuantConfig())}
    fc2 = found["blocks.0.mlp.fc2"]
    d = 4 * 24
    # Four chunks on four ranks: one round, in which three quarters of four matrices travel.
    # Fewer outputs than inputs: CWᵀ and a trace for C and P.
    assert fc2.sums == 3 * (8 * (d + 1) ** 2 + 4 * (d + 1) * 24 + 4)
    fc1 = found["blocks.0.mlp.fc1"]
    assert fc1.sums == 3 * (8 * 25**2 + 4 * 25 * 24 + 4 * 24 * 24)
    # Ranges need 32 images, two chunks; the first rank has one of them.
    assert fc2.rows == 16 * 17 * d * 4
    assert fc2.decision == 3 * (24 * d + 12 * 24)
    assert found["blocks.0.attn.av"].rows == 16 * 4 * (2 * 17 * 17 + 17 * 24)
    # Its norm feeds qkv alone; the pixels stay float.
    assert found["patch_embed.proj"].rows == 0 < found["blocks.0.attn.qkv"].rows


def test_tables_show_every_site(distributed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    distributed.PLANS = (("vit_tiny_patch16_224", 32),)
    distributed.plan(2, docs=False)
    shown = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0] == "site" and rows[-1] == "**all**" and "blocks.*.attn.qk, each" in rows
