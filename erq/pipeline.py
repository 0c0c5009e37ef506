"""quantize(): full-precision model + images → simulated model, every tensor on its b-bit grid.

The model is a list of blocks. Two streams of activations stand at one block boundary, that of the
full-precision network and that of the network as quantized so far; for each block in order every
site is calibrated, solved and frozen, then both streams move on (docs/math.md, "Sequential
calibration"). As published (`upstream="float"`), sites are calibrated with full-precision weights
and solved on the full-precision stream alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import repeat
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from erq.calib.calibrate import RANGE_IMAGES, calibrate_site, gather
from erq.calib.heads import (
    Basis,
    HeadBases,
    choose_bases,
    rotate_heads,
    rotated_attention,
)
from erq.calib.observers import Run, Stream
from erq.calib.prepare import insert_simulated
from erq.calib.reparam import Fold
from erq.calib.simulate import SimConv2d, SimLinear
from erq.config import QuantConfig, as_config
from erq.data import Images, calibration_chunks
from erq.models import Block, ModelAdapter, Site, adapter_for, carry_over, prepared_twin
from erq.models.info import QuantizedModelInfo
from erq.models.patches import patches
from erq.progress import Progress
from erq.quant.fit import ACTIVATION_PERCENTILES
from erq.ranks import ALONE, Ranks
from erq.record import Record, decode, encode, environment, model_digest
from erq.reduce.allocation import WIDTHS, SiteBits, allocate
from erq.reduce.gram import Gram
from erq.reduce.shared_gram import SharedGram
from erq.reduce.site import SiteReport, Solution, solve_site

# Before the names of what is decided only to measure errors.
_FIRST_RUN = "first run, "

D = TypeVar("D")
T = TypeVar("T")


@dataclass
class _Calibration:
    """The state of a running quantization."""

    adapter: ModelAdapter
    config: QuantConfig
    sim: nn.Module
    full: nn.Module
    ranks: Ranks = ALONE
    record: Record = field(default_factory=Record)
    prefix: str = ""
    folds: dict[str, Fold | Basis] = field(default_factory=dict)
    widths: Sequence[int] = ()
    reports: list[SiteReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    inner_seconds: float = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the wall time of the context, less that of stages within it, to the stage `name`."""
        start, outer = perf_counter(), self.inner_seconds
        self.inner_seconds = 0.0
        try:
            yield
        finally:
            took = perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inner_seconds
            self.inner_seconds = outer + took

    def runner(self, model: nn.Module, index: int) -> Run:
        """A block of `model` as a function."""

        def run(x: Tensor) -> Tensor:
            with self.stage("forward"):
                return self.adapter.run_block(model, index, x)

        return run

    def module(self, site: Site) -> nn.Module:
        return self.sim.get_submodule(site.name)

    def decide(self, name: str, collect: Callable[[], D], settle: Callable[[D], T]) -> T:
        """The decision `name`: from the record, else what the first rank makes of all data.

        Args:
            name: of the decision, unique in this run.
            collect: every rank takes part; what the first gets out of it is the whole.
            settle: the decision from that.
        """
        known: T | None = self.record.find(self.prefix + name)
        if known is not None:
            return known
        data = collect()
        if self.ranks.alone:
            made = settle(data)
        else:
            device = next(self.sim.parameters()).device
            made = decode(self.ranks.share(lambda: encode(settle(data))), device)
        self.record.keep(self.prefix + name, made)
        return made

    def calibrate(self, site: Site, block: Block, run: Run, stream: Stream) -> None:
        """Fit the activation quantizers of a site, once for all layers behind one norm."""
        module = self.module(site)
        if isinstance(module, SimLinear) and module.x_params is not None:
            return
        group = [self.module(s) for s in block.sites if s == site or s.norm == site.norm]
        linears = [m for m in group if isinstance(m, SimLinear)] if site.norm else []
        if isinstance(module, SimLinear) and not linears:
            linears = [module]
        with self.stage("ranges"):
            own = self.config.for_site(site.name)
            decide = partial(self.decide, f"{site.name}: ranges")
            keep = self.config.upstream == "quantized" and site.kind in ("linear", "conv")
            fold = calibrate_site(site, self.sim, run, stream, linears, own, decide, keep)
        if fold is not None:
            self.folds[site.norm or site.name] = fold

    def rotate_heads(self, site: Site, run: Run, stream: Stream) -> None:
        """Change the basis of the heads that the layer `site` feeds, if it feeds any."""
        attention = rotated_attention(self.sim, site.name)
        if attention is None:
            return
        config, name = self.config, site.name.rpartition(".")[0]
        bits = {leaf: config.for_site(f"{name}.{leaf}").a_bits for leaf in ("qk", "av", "proj")}

        def collect() -> tuple[Tensor, ...]:
            return gather(stream, run, attention.qk, attention.av)

        def settle(operands: tuple[Tensor, ...]) -> HeadBases:
            return choose_bases(attention, operands, bits, ACTIVATION_PERCENTILES[config.ranges])

        with self.stage("ranges"):
            bases = self.decide(f"{name}: heads", collect, settle)
            rotate_heads(attention, bases)
        if bases.values is not None:
            self.folds[f"{name}.proj"] = bases.values

    def solve(
        self, site: Site, run: Run, stream: Stream, run_full: Run, full: Stream, last: bool
    ) -> None:
        """Gather a site's Gram matrices over the streams and solve it.

        Args:
            last: no other site of the block is still to be solved, and another block follows.
        """
        module = self.module(site)
        assert isinstance(module, SimLinear | SimConv2d)
        own_config = self.config.for_site(site.name)

        def collect() -> tuple[Gram, bool]:
            with self.stage("gram"):
                return self.gram(site, run, stream, run_full, full, last)

        def settle(found: tuple[Gram, bool]) -> Solution:
            with self.stage("solve"):
                gram, batch_rows = found
                return solve_site(site, module, gram, own_config, batch_rows, self.widths)

        solution = self.decide(f"{site.name}: weight", collect, settle)
        with self.stage("solve"):
            solution.put_into(module)
        self.reports.append(solution.report)

    def gram(
        self, site: Site, run: Run, stream: Stream, run_full: Run, full: Stream, last: bool
    ) -> tuple[Gram, bool]:
        """Gram matrices of a site over all images, and whether it sees one row per image."""
        module = self.module(site)
        assert isinstance(module, SimLinear | SimConv2d)
        fold = self.folds.get(site.norm or site.name)
        conv = module if isinstance(module, SimConv2d) else None
        columns, device, weight = module.weight.shape[1], module.weight.device, module.weight
        batch_rows = False
        reference_site = self.full.get_submodule(site.name)
        same = self.config.upstream == "float"
        reference = full.inputs(run_full, reference_site, last=last)
        own = reference if same else stream.inputs(run, module)
        other = repeat((None,)) if same or conv is not None else reference
        parts = len((full if same else stream).chunks)
        gram: Gram | SharedGram = (
            Gram(columns, device, weight)
            if self.ranks.alone
            else SharedGram(columns, device, self.ranks, parts, weight)
        )
        for (upstream,), (x,) in zip(other, own):  # noqa: B905 (one may be endless)
            if conv is not None:
                x = patches(x, conv.kernel_size)
            batch_rows = x.dim() == 2
            # Folded norms and heads give the quantized stream folded values already.
            if fold is not None and (same or module.x_channels is not None):
                x = fold.apply(x)
            if fold is not None and upstream is not None:
                upstream = fold.apply(upstream)
            gram.add(x, upstream, module.x_params)
        return gram.whole() if isinstance(gram, SharedGram) else gram, batch_rows


def quantize(
    model: nn.Module,
    images: Images,
    config: QuantConfig | str | Mapping[str, Any] = "w4a4",
    *,
    target_bits: float | None = None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Quantize a Vision Transformer by ERQ from a few unlabelled images.

    Args:
        model: a timm, torchvision or transformers model that `erq.models` understands; it is not
            changed. What a transformers model gives is called with pixels alone and returns logits.
        images: float [N, 3, H, W], already normalised, or an iterable of such batches or of
            (batch, label); 32 images are usual, labels are ignored.
        config: a QuantConfig, a preset's name, or a dict of fields.
        target_bits: average width of a weight, 2..8: widths are chosen per layer, by the errors
            that a first run with `config` measures; a second run then quantizes. Layers whose width
            `config.overrides` sets keep it and do not count.
        progress: a bar per stage on a terminal, nothing elsewhere.
        ranks: processes that share the work (`erq.ranks.launched`); each calls with the same
            arguments and gets the same model, that of one process alone.
        resume: a file that keeps what is decided, written after every block. If it is there, of the
            same model, images and settings, the run goes on behind it, to the same codes. Whoever
            has saved the result removes it.

    Returns:
        The simulated model, called like `model`; `erq_report` holds the error of every site before
        and after each step, `erq_stages` the seconds spent on ranges, Gram matrices, solving and
        forward passes, `erq_bits` why each layer has its width (empty without target_bits).

    Raises:
        ValueError: bad images or settings, or a file to resume from that is of another run.
        UnsupportedModelError: a model that is not understood. RankError: a rank that is gone.
    """
    settings = as_config(config)
    model = carry_over(model)
    adapter = adapter_for(model)
    arch_kwargs = adapter.describe(model)
    device = next(model.parameters()).device
    chunks = calibration_chunks(images, adapter.input_shape(model), device, ranks)
    calibration: dict[str, Any] = {
        "n": sum(len(c) for c in chunks),
        "sha256": _digest(chunks, ranks),
    }
    record = Record()
    if resume is not None:
        identity = {
            "settings": json.dumps([settings.to_dict(), target_bits]),
            "model": model_digest(model, _architecture(model), arch_kwargs),
            "images": calibration["sha256"],
            "versions": environment(device),
        }
        record = Record.open(Path(resume), identity, ranks, device)

    chosen: list[SiteBits] = []
    if target_bits is not None:
        chosen = list(record.find("bits") or ())
        if not chosen:
            first = partial(_run, progress=progress, ranks=ranks, record=record)
            chosen = _choose_bits(model, adapter, settings, chunks, target_bits, first)
            record.keep("bits", chosen)
            record.drop(_FIRST_RUN)
        given = settings.overrides
        widths = {s.name: {**given.get(s.name, {}), "w_bits": s.w_bits} for s in chosen}
        settings = replace(settings, overrides={**given, **widths})
    sim: Any = deepcopy(model).float().eval()
    blocks = insert_simulated(sim, adapter, settings)
    full = _full_precision(model, adapter)
    with torch.no_grad(), _full_fp32():
        _check_size(adapter, full, chunks[0][:1])
        state = _run(
            adapter, settings, sim, full, blocks, chunks, progress=progress, ranks=ranks,
            record=record,
        )  # fmt: skip
    sim.erq_info = QuantizedModelInfo(
        family=adapter.family,
        architecture=_architecture(model),
        arch_kwargs=arch_kwargs,
        pretrained_cfg=_json_able(getattr(model, "pretrained_cfg", None) or {}),
        config=settings,
        calibration=calibration,
        sites=tuple(s for b in blocks for s in b.sites),
    )
    sim.erq_report = state.reports
    sim.erq_stages = state.seconds
    sim.erq_bits = chosen
    simulated: nn.Module = sim
    return simulated


def _choose_bits(
    model: nn.Module,
    adapter: ModelAdapter,
    config: QuantConfig,
    chunks: list[torch.Tensor],
    target_bits: float,
    run: Callable[..., _Calibration],
) -> list[SiteBits]:
    """Widths by the errors of one run with `config`."""
    if isinstance(target_bits, bool) or not isinstance(target_bits, int | float):
        raise ValueError(f"target_bits must be a number from 2 to 8, got {target_bits!r}")
    allocate([], {}, target_bits)  # refuses a target out of range before minutes of work
    sim = deepcopy(model).float().eval()
    blocks = insert_simulated(sim, adapter, config)
    with torch.no_grad(), _full_fp32():
        full = _full_precision(model, adapter)
        _check_size(adapter, full, chunks[0][:1])
        state = run(adapter, config, sim, full, blocks, chunks, prefix=_FIRST_RUN, widths=WIDTHS)
    fixed = [glob for glob, values in config.overrides.items() if "w_bits" in values]
    free = [r for r in state.reports if not any(fnmatchcase(r.name, glob) for glob in fixed)]
    if not free:
        raise ValueError("target_bits finds no layer to decide on: overrides set all their widths")
    modules: Any = {r.name: sim.get_submodule(r.name) for r in free}
    return allocate(free, {n: m.weight.numel() for n, m in modules.items()}, target_bits)


def _run(
    adapter: ModelAdapter,
    config: QuantConfig,
    sim: nn.Module,
    full: nn.Module,
    blocks: list[Block],
    chunks: list[torch.Tensor],
    *,
    progress: bool,
    ranks: Ranks,
    record: Record,
    prefix: str = "",
    widths: Sequence[int] = (),
) -> _Calibration:
    state = _Calibration(adapter, config, sim, full, ranks, record, prefix, widths=widths)
    stream, full_stream = Stream(list(chunks), ranks), Stream(list(chunks), ranks)
    sequential = config.upstream == "quantized"
    if not sequential:
        stream = stream.head(RANGE_IMAGES)
    with Progress(sum(len(b.sites) for b in blocks), enabled=progress) as bar:
        for index, block in enumerate(blocks):
            run, run_full = state.runner(sim, index), state.runner(full, index)
            last = index == len(blocks) - 1
            solved = [s for s in block.sites if s.kind in ("linear", "conv")]
            for site in block.sites:
                bar.update(site.name)
                state.calibrate(site, block, run, stream)
                if config.rotate_heads and config.method == "erq":
                    state.rotate_heads(site, run, stream)
                if sequential and site in solved:
                    final = site is solved[-1] and not last
                    state.solve(site, run, stream, run_full, full_stream, final)
            if not last:
                stream.advance(run)
            if not sequential:
                for site in solved:
                    final = site is solved[-1] and not last
                    state.solve(site, run, stream, run_full, full_stream, final)
            if not last:
                full_stream.advance(run_full)
            record.save()
    return state


def _full_precision(model: nn.Module, adapter: ModelAdapter) -> nn.Module:
    """`model` in fp32 with the adapter's sites; itself, or with its own tensors, where possible."""
    plain = not any(m.training for m in model.modules()) and all(
        p.dtype == torch.float32 for p in model.parameters()
    )
    if plain and adapter.raw_sites:
        return model
    return deepcopy(model).float().eval() if adapter.raw_sites else prepared_twin(model)


def _check_size(adapter: ModelAdapter, model: nn.Module, image: torch.Tensor) -> None:
    """Raise ValueError if a model that takes images of any size cannot take this one."""
    if image.is_meta:  # another rank's
        return
    try:
        adapter.run_block(model, 0, image)
    except AssertionError as error:  # timm's own check: a side that patches do not divide
        size = "×".join(map(str, image.shape[2:]))
        raise ValueError(f"the model does not take images of {size}: {error}") from error


def _architecture(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(model).__name__)


def _json_able(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a data config that JSON can hold, tuples as lists."""
    plain = (str, int, float, bool, type(None))
    out: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, plain):
            out[name] = value
        elif isinstance(value, list | tuple) and all(isinstance(v, plain) for v in value):
            out[name] = list(value)
    return out


def _digest(chunks: list[torch.Tensor], ranks: Ranks) -> str:
    """SHA-256 of the calibration images' fp32 bytes, in order."""
    digest = hashlib.sha256()
    own = {n: c for n, c in enumerate(chunks) if not c.is_meta}
    ranks.in_order(own, lambda c: digest.update(c.cpu().contiguous().numpy().tobytes()))
    return ranks.share(lambda: digest.hexdigest().encode()).decode()


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Full fp32 matmuls on GPUs while ranges and Gram matrices are measured."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
