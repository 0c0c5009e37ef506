"""Train the small networks of bench/scenes.py and write their weights into bench/models.

    python bench/train_small.py [--networks vit,swin]

Some minutes a network on one core. Seeds are fixed but the order of float sums is not: another
machine or thread count gives other weights of about the same accuracy.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from accuracy import logits
from safetensors.torch import save_file
from scenes import MODELS, RECIPES, TRAIN_SEED, Recipe, load_network, scenes, scenes_task
from torch import nn
from torch.nn import functional as F

MAX_BYTES = 2_200_000


def train(recipe: Recipe, folder: Path) -> nn.Module:
    """The recipe's network, every step on new scenes of the training digits.

    Args:
        folder: with the weights that it begins with, if with any.
    """
    torch.manual_seed(0)
    model = recipe.build(**recipe.arguments)
    if recipe.start:
        model = load_network(recipe.start, folder).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    rates = [recipe.peak_lr, recipe.peak_lr * recipe.vector_lr]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rates, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    start = time.perf_counter()
    for step in range(recipe.steps):
        # A network that has learnt digits learns sooner which of several is meant.
        clutter = 1.0 if recipe.start else min(1.0, step / (0.5 * recipe.steps))
        x, labels = scenes("train", recipe.batch, TRAIN_SEED + step, clutter)
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True
            )
    return model.eval()


def main() -> None:
    """Train, save, reload what was saved and measure it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(RECIPES))
    parser.add_argument("--out", type=Path, default=MODELS, help="folder for the weights")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.networks.split(","):
        model = train(RECIPES[name], args.out)
        file = args.out / f"{name}.safetensors"
        save_file({k: t.half().contiguous() for k, t in model.state_dict().items()}, file)
        task = scenes_task(name, args.out)
        right = (logits(task.model, task.test).argmax(1) == task.labels).float().mean()
        size = file.stat().st_size
        print(f"{file}: {size:,} bytes, top-1 {100 * right:.2f} %")
        if size > MAX_BYTES:
            raise SystemExit(f"{file} must stay below {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    main()
