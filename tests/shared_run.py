"""What the tests of ranks start, alone and under torchrun: quantize and evaluate tiny models.

python tests/shared_run.py FOLDER writes FOLDER/<number of ranks>.json: for every case what each
rank came to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import erq
from erq import QuantConfig
from erq.ranks import Ranks, launched

SIZE = 16
CLASSES = 5


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=SIZE, patch_size=4, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=2,
        mlp_ratio=2.0,
    )  # fmt: skip


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=SIZE, patch_size=2, num_classes=CLASSES, embed_dim=16, depths=(2, 1),
        num_heads=(2, 4), window_size=4, mlp_ratio=2.0,
    )  # fmt: skip


def uneven(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of sizes that no chunk has, with labels."""
    return [(part, torch.zeros(len(part))) for part in images.split([1, 19, 30, 20])]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "sequential": (vit, {"config": "w3a4"}),
    "as published": (vit, {"config": QuantConfig.paper("w4a4")}),
    "float activations, pixels on codes": (vit, {"config": {"a_bits": 16, "image_bits": 8}}),
    "average width": (vit, {"config": "w4a4", "target_bits": 3.5}),
    "windows": (swin, {"config": "w4a4"}),
}


def outcomes(folder: Path, ranks: Ranks) -> Iterator[tuple[str, Any]]:
    """Per case the SHA-256 of the packed file, and the evaluation, of every rank."""
    torch.manual_seed(0)
    images = torch.randn(70, 3, SIZE, SIZE) + torch.randn(70, 3, 1, 1)
    labels = torch.randint(CLASSES, (70,))
    batches = list(zip(images.split(9), labels.split(9), strict=True))
    for name, (build, settings) in CASES.items():
        torch.manual_seed(1)
        model = build().eval()
        given = uneven(images) if name == "windows" else images
        net = erq.deploy(erq.quantize(model, given, ranks=ranks, **settings))
        file = folder / f"{ranks.size}-{ranks.rank}.safetensors"
        erq.save(net, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found = erq.evaluate(net, batches, reference=model, ranks=ranks).to_dict()
        yield name, list(ranks.merge({ranks.rank: [digest, found]}).values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with launched(torch.device("cpu")) as started:
        result = dict(outcomes(target, started))
    if started.first:
        (target / f"{started.size}.json").write_text(json.dumps(result))
