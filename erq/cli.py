"""The command line: `erq demo | quantize | eval | report | bench | inspect | export | predict |
models | info`.

Exit codes: 0 success, 2 bad usage, 1 failure, 130 interrupted. What goes wrong is one line on
stderr; `--debug` adds the traceback. What imports torch is imported by the commands that need it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from erq._version import __version__
from erq.options import (
    Backend,
    Debug,
    Device,
    Json,
    ModelArgs,
    Quiet,
    RandomWeights,
    Source,
    Weights,
    as_batch_sizes,
    as_device,
    as_engines,
    as_settings,
    as_timm_options,
    check_backend_name,
    check_file,
    check_out,
    quantize_command,
)

if TYPE_CHECKING:
    import torch

    from erq.data import Selection
    from erq.ranks import Ranks

INTERRUPTED = 130
SHARED = ("quantize", "eval")
"""Commands that several ranks can share."""

_LONGEST = 700
"""Characters of a word that a message repeats."""

SITE_IMAGES = 32
"""Images on which the layers are compared one by one."""


class _Commands(TyperGroup):
    """Turns whatever a command raises into one line on stderr and an exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read what stands before the command's name."""
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            is_usage = getattr(error, "exit_code", 1) == 2 and hasattr(error, "format_message")
            if not is_usage or type(error).__name__ == "NoArgsIsHelpError":
                raise
            print(_line("erq", f"{_usage(error)}; see --help"), file=sys.stderr)
            raise typer.Exit(2) from error

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            if _speaks(ctx):
                _say(ctx, "interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            speaks = _speaks(ctx)
            if getattr(error, "exit_code", 1) == 2 and hasattr(error, "format_message"):
                if speaks:
                    _say(ctx, f"{_usage(error)}; see --help")
                raise typer.Exit(2) from error
            if (ctx.obj or {}).get("debug"):
                traceback.print_exc()
            known = isinstance(error, ValueError | OSError | RuntimeError | MemoryError)
            text = f"{error}" if known and str(error) else f"{type(error).__name__}: {error}"
            if speaks:
                _say(ctx, text)
            raise typer.Exit(1) from error


def _speaks(ctx: Any) -> bool:
    """Whether this process says why the command failed: of several ranks one does."""
    ranks = (ctx.obj or {}).get("ranks")
    if ranks is not None:
        return bool(ranks.reports_failure())
    return not _is_rank() or os.environ.get("RANK") == "0"


def _is_rank() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _join(ctx: typer.Context, device: torch.device) -> Ranks:
    """The ranks that share this command; they part when it has ended, and said how."""
    from erq.ranks import launched

    root = ctx.find_root()
    ranks = root.with_resource(launched(device))
    root.obj = {**(root.obj or {}), "ranks": ranks}
    return ranks


def _say(ctx: Any, text: str) -> None:
    """One line on stderr, whatever `text` holds."""
    command = f"erq {ctx.invoked_subcommand}" if ctx.invoked_subcommand else "erq"
    print(_line(command, text), file=sys.stderr)


def _usage(error: Any) -> str:
    """What is wrong with the words of a command line; not all of a word that is very long."""
    text = str(error.format_message()).rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _line(command: str, text: str) -> str:
    text = " ".join(text.split())
    return f"{command}: {text if len(text) <= 2 * _LONGEST else text[: 2 * _LONGEST] + '…'}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command `erq`."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # × and λ on a terminal that lacks them
    app(prog_name="erq")


def _show_version(value: bool) -> None:
    if value:
        print(f"erq {__version__}")
        raise typer.Exit


@app.callback()
def _erq(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Post-training quantization of Vision Transformers: few bits, few images, one packed file.

    MODEL is a timm name, torchvision:NAME, or demo, the small model that is shipped. FILE is what
    erq quantize wrote, file or folder.
    """
    if _is_rank() and ctx.invoked_subcommand not in SHARED:
        raise typer.BadParameter(
            f"runs in one process: torchrun starts erq {' and erq '.join(SHARED)} alone",
            param_hint=f"erq {ctx.invoked_subcommand}",
        )


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Keep the packed file there.")] = None,
    bits: Annotated[str, typer.Option(help="Preset, as w4a4.")] = "w4a4",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize, pack, reload, evaluate and time the shipped model; under a minute on a CPU."""
    as_settings(bits, None, [], None, paper=False)
    if out is not None:
        check_file(out)
    where = as_device(device)
    from erq.demonstration import demo_remarks, demo_table, demonstrate
    from erq.report import Output

    found = demonstrate(bits=bits, out=out, device=where, progress=not quiet)
    Output(json, quiet).result(found.to_dict(), demo_table(found), demo_remarks(found))


@app.command()
def quantize(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="timm name, or demo.")],
    images: Source,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|FOLDER/",
            help="The packed .safetensors file to write; a "
            "name with / at its end, or an existing folder: with config.json and a model card.",
        ),
    ],
    bits: Annotated[str, typer.Option(help="w3a4, w4a4, w4a8, w6a6, w8a8, w4a16 …")] = "w4a4",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    model_arg: ModelArgs = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Calibration images to draw.")] = 32,
    target_bits: Annotated[
        float | None,
        typer.Option(
            min=2, max=8, help="Average weight width: chosen per layer by measured errors."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="[GLOB.]FIELD=VALUE", help="Setting of these sites, or of all."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="erq, repq, gptq or rtn.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="ERQ's settings as published.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the drawing of images; default 0.")] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Of the weights, for the card, as apache-2.0; default: what timm says."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what is done in OUT.resume, and go on from there after an interruption.",
        ),
    ] = False,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write one packed file; torchrun shares the work among processes."""
    start = time.perf_counter()
    settings = as_settings(bits, method, changes or [], seed, paper)
    options = as_timm_options([model], weights, random_weights, model_arg)
    check_backend_name(backend)
    where = as_device(device)
    check_out(out, license)
    target = Path(out)
    ranks = _join(ctx, where)
    from erq import hub, pipeline
    from erq.data import Selection, open_images
    from erq.deployment.convert import deploy
    from erq.inputs import preprocessing
    from erq.loading import load_model
    from erq.messages import megabytes
    from erq.record import remove_record
    from erq.report import Output, bits_table

    output = Output(json, quiet)
    source = open_images(images)
    full = load_model(model, options, where)
    if hasattr(full, "erq_info"):
        raise ValueError(f"{model} is quantized already; name the full-precision model")
    chosen = Selection(source, preprocessing(full), source.draw(n, settings.seed))
    state = target.with_name(f"{target.name}.resume") if resume else None
    sim: Any = pipeline.quantize(
        full, chosen, settings, target_bits=target_bits, progress=not quiet and ranks.first,
        ranks=ranks, resume=state,
    )  # fmt: skip
    if not ranks.first:
        return
    net: Any = deploy(sim, backend)
    command = quantize_command(
        model, images, bits, n, target_bits, weights, random_weights, model_arg, changes, method,
        paper, seed,
    )  # fmt: skip
    origin = net.erq_info.calibration | {"command": command}
    net.erq_info = replace(net.erq_info, calibration=origin)
    hub.save(net, out, license=license)
    if state is not None:
        remove_record(state)

    header = hub.inspect(target)
    size = header["size_bytes"]
    fp32 = 4 * sum(t.numel() for t in full.state_dict().values())
    result = {
        "file": target, "size_bytes": size, "fp32_bytes": fp32, "fp16_bytes": fp32 // 2,
        "architecture": header["architecture"], "config": header["config"],
        "calibration": header["calibration"], "sites": len(header["sites"]),
        "bits": [s.to_dict() for s in sim.erq_bits], "seconds": time.perf_counter() - start,
    }  # fmt: skip
    width = f"{settings.w_bits}" if target_bits is None else f"{target_bits:g} on average, "
    said = (
        f"{target}: {megabytes(size)}, {fp32 / size:.1f}× smaller than fp32 · W{width}"
        f"A{settings.a_bits} {settings.method} · {len(header['sites'])} sites · "
        f"{header['calibration']['n']} images · {result['seconds']:.1f} s"
    )
    if quiet:
        output.result(result)
    elif sim.erq_bits:
        output.result(result, bits_table(sim.erq_bits), said)
    else:
        output.result(result, said)
    if images == "synthetic":
        output.note("calibrated on noise: expect more loss than from 32 real images of the task")
    if source.size < n:
        output.note(f"{images} holds {source.size} images, fewer than --n {n}: all were used")


@app.command("eval")
def evaluate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="FILE|MODEL")],
    images: Source,
    reference: Annotated[
        str | None, typer.Option(metavar="FILE|MODEL", help="Full-precision model to compare with.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A fixed random choice of that many images.")
    ] = None,
    sites: Annotated[
        bool | None,
        typer.Option(
            "--sites/--no-sites",
            help="SQNR of every layer against the reference; by default without labels.",
        ),
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write what is found into the model card of a FOLDER.")
    ] = False,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    model_arg: ModelArgs = None,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Accuracy on labelled images, and closeness to a reference; top-1 and the like in percent.

    --weights, --random-weights and --model-arg describe every timm name on the line.
    """
    start = time.perf_counter()
    options = as_timm_options([model, reference or model], weights, random_weights, model_arg)
    check_backend_name(backend)
    where = as_device(device)
    ranks = _join(ctx, where)
    from erq import evaluation
    from erq.data import Selection, open_images
    from erq.hub import add_evaluation
    from erq.inputs import preprocessing
    from erq.loading import load_model
    from erq.report import Output, evaluation_table, site_table
    from erq.timing import kernels

    output = Output(json, quiet)
    source = open_images(images)
    if source.labels is None and reference is None:
        raise ValueError(
            f"{images} has no labels: nothing to measure; give --reference MODEL to compare with"
        )
    net = load_model(model, options, where, backend)
    other = None if reference is None else load_model(reference, options, where, backend)
    indices = list(range(source.size))
    if limit is not None:
        indices = sorted(source.draw(limit, seed=0))
    chosen = Selection(source, preprocessing(net), indices)
    shown = _with_bar(chosen, not quiet) if ranks.alone else chosen
    found = evaluation.evaluate(net, shown, reference=other, ranks=ranks)
    if not ranks.first:
        return
    if card:
        add_evaluation(Path(model), found)
    quality: dict[str, float] = {}
    wanted = source.labels is None if sites is None else sites
    if wanted and other is not None and hasattr(net, "erq_info"):
        first = source.batches(preprocessing(net), indices[:SITE_IMAGES])
        quality = evaluation.site_sqnr(net, first, other)
    elif sites:
        raise ValueError("--sites compares a packed FILE with --reference MODEL; give both")
    result = {
        "model": model, "images": images, "reference": reference, "device": str(where),
        "kernel": ", ".join(kernels(net)) or "torch", "evaluation": found.to_dict(),
        "sites": quality, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    title = f"{images} · kernel {result['kernel']}"
    tables = [evaluation_table(title, model, found)]
    if quality:
        tables.append(site_table(quality, min(len(indices), SITE_IMAGES)))
    output.result(result, *tables)
    classes = int(getattr(net, "num_classes", 0))
    if source.classes and len(source.classes) != classes:
        output.note(
            f"{images} has {len(source.classes)} class folders, {model} has {classes} classes: "
            "folders are numbered from 0 in the order of their names"
        )


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    images: Annotated[
        str | None, typer.Option(metavar="SRC", help="Images to measure accuracy on; see eval.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model to compare with.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="OUT.html and OUT.md are written; default: beside FILE.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many of the images.")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to time; 0 for none.")] = "1,8",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time budget per row.")] = 2.0,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    model_arg: ModelArgs = None,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """One HTML page and one Markdown file about a packed FILE, with everything measured of it."""
    sizes = [] if batch == "0" else as_batch_sizes(batch)
    options = as_timm_options([reference or str(file)], weights, random_weights, model_arg)
    check_backend_name(backend)
    where = as_device(device)
    stem = file.with_suffix("") if out is None else out
    check_file(stem.with_name(f"{stem.name}.html"))
    if reference is not None and images is None:
        raise typer.BadParameter("needs --images to compare on", param_hint="--reference")
    from erq.data import Selection, open_images
    from erq.evaluation import evaluate as measure
    from erq.evaluation import site_sqnr
    from erq.hub import describe_checkpoint
    from erq.inputs import preprocessing
    from erq.loading import full_precision_twin, load_model
    from erq.page import sections, write_page
    from erq.report import Output
    from erq.timing import benchmark

    header = describe_checkpoint(file)
    net = load_model(str(file), None, where, backend)
    other = None if reference is None else load_model(reference, options, where)
    found, quality = None, {}
    if images is not None:
        source = open_images(images)
        if source.labels is None and other is None:
            raise ValueError(f"{images} has no labels: give --reference MODEL to compare with")
        indices = list(range(source.size))
        if limit is not None:
            indices = sorted(source.draw(limit, seed=0))
        recipe = preprocessing(net)
        shown = _with_bar(Selection(source, recipe, indices), not quiet)
        found = measure(net, shown, reference=other)
        if other is not None:
            quality = site_sqnr(net, source.batches(recipe, indices[:SITE_IMAGES]), other)
    twin = full_precision_twin(net).to(where)
    timings = []
    if sizes:
        timings = benchmark(twin, sizes, seconds=seconds, name="torch fp32")
        timings += benchmark(net, sizes, seconds=seconds, name=file.name)
    fp32 = 4 * sum(t.numel() for t in twin.state_dict().values())
    parts = sections(header, fp32, found, quality, timings)
    pages = write_page(stem, file.name, parts)
    result = {
        "pages": list(pages), "evaluation": None if found is None else found.to_dict(),
        "sites": quality, "timings": [t.to_dict() for t in timings],
    }  # fmt: skip
    Output(json, quiet).result(result, *([] if quiet else [f"{pages[0]}\n{pages[1]}"]))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="FILE|MODEL")],
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    against: Annotated[
        str | None,
        typer.Option(
            help="Engines that run the same architecture, in turns with it, comma-separated: "
            "torch, compile, onnxruntime, openvino, torchao; with -bf16 behind it in bfloat16. "
            "Default: torch for a FILE."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time budget per row.")] = 2.0,
    plot: Annotated[
        Path | None,
        typer.Option(help="Latency and throughput by batch size, .png or .svg; needs matplotlib."),
    ] = None,
    model_arg: ModelArgs = None,
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time forward passes, beside other engines that run the same architecture.

    The weights of a timm model are random here: no time depends on them.
    """
    sizes = as_batch_sizes(batch)
    options = as_timm_options([model], None, False, model_arg)
    check_backend_name(backend)
    chosen = None if against is None else as_engines(against)
    where = as_device(device)
    from erq.loading import full_precision_twin, load_model
    from erq.report import Output, check_plot, plot_timings, timing_table
    from erq.timing import compare

    if plot is not None:
        check_plot(plot)
    net = load_model(model, replace(options, random_weights=True), where, backend)
    packed = hasattr(net, "erq_info")
    twin = full_precision_twin(net).to(where) if packed else net
    if chosen is None:
        chosen = ["torch"] if packed else []
    timings, notes = compare(net, twin, chosen, sizes, seconds=seconds, name=model)
    for note in notes:
        print(note, file=sys.stderr)
    if plot is not None:
        times: dict[str, dict[int, float]] = {}
        for t in timings:
            times.setdefault(t.name, {})[t.batch] = t.median_ms
        plot_timings(plot, f"{model} · {timings[0].hardware}", times)
    Output(json, quiet).result(
        {"timings": [t.to_dict() for t in timings], "left_out": notes},
        timing_table("Forward passes", timings),
    )


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What a packed file holds: settings, every site, and its error after each step."""
    as_device(device)
    from erq.hub import describe_checkpoint
    from erq.report import Output, checkpoint_tables

    header = describe_checkpoint(file)
    Output(json, quiet).result(header, *checkpoint_tables(file, header))


@app.command()
def export(
    file: Annotated[str, typer.Argument(metavar="FILE")],
    onnx: Annotated[Path, typer.Option(metavar="OUT", help="The .onnx file to write.")],
    codes: Annotated[
        str, typer.Option("--codes", help="int4: codes of at most 4 bits as uint4; int8: all.")
    ] = "int4",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a packed file as ONNX, for runtimes outside PyTorch; needs erq[export]."""
    if codes not in ("int4", "int8"):
        raise typer.BadParameter(f"{codes!r} is neither int4 nor int8", param_hint="--codes")
    check_file(onnx)
    from erq.export import export_onnx
    from erq.loading import load_model
    from erq.messages import megabytes
    from erq.report import Output

    net = load_model(file, None, None, "reference")
    if not hasattr(net, "erq_info"):
        raise ValueError(f"{file} is not quantized; name what erq quantize wrote")
    export_onnx(net, onnx, codes)
    size = onnx.stat().st_size
    said = f"{onnx}: {megabytes(size)}, input images [batch, C, H, W], output logits"
    Output(json, quiet).result({"file": onnx, "size_bytes": size}, *([] if quiet else [said]))


@app.command()
def predict(
    file: Annotated[str, typer.Argument(metavar="FILE")],
    pictures: Annotated[list[Path], typer.Argument(metavar="IMAGE...")],
    backend: Backend = "auto",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The five likeliest classes of each picture."""
    check_backend_name(backend)
    where = as_device(device)
    from erq.data import open_files
    from erq.evaluation import likeliest
    from erq.inputs import preprocessing
    from erq.loading import load_model
    from erq.report import Output, make_table

    source = open_files(pictures)
    net = load_model(file, None, where, backend)
    tops = likeliest(net, source.batches(preprocessing(net)), 5)
    tables = [
        make_table(
            str(path),
            ("class", "name", "%"),
            [(str(t["class"]), t["name"] or "", f"{100 * t['probability']:.2f}") for t in top],
            left=2,
        )
        for path, top in zip(pictures, tops, strict=True)
    ]
    found = [{"image": path, "top": top} for path, top in zip(pictures, tops, strict=True)]
    Output(json, quiet).result({"predictions": found}, *tables)


@app.command()
def models(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Which models are covered, and which are refused by name."""
    from dataclasses import asdict

    from erq.models.coverage import COVERED, REFUSED
    from erq.report import Output, make_table

    covered = [(c.library, c.names, c.what) for c in COVERED]
    refused = [asdict(r) for r in REFUSED]
    names = [tuple(r.values()) for r in refused]
    columns = ("library", "names", "what")
    values = {"covered": [dict(zip(columns, c, strict=True)) for c in covered], "refused": refused}
    Output(json, quiet).result(
        values,
        make_table("Covered: quantized, deployed and reloaded alike", columns, covered, left=3),
        make_table("Refused by name", ("library", "names", "why"), names, left=3),
    )


@app.command()
def info(
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Versions, devices, and which kernels can run here, with the reason where one cannot."""
    where = as_device(device)
    from erq import system
    from erq.report import Output, make_table

    versions, devices = system.versions(), system.devices()
    ops = system.backends(where)
    values = {
        "versions": versions, "devices": devices, "device": str(where), "backends": ops,
        "forced": system.forced_backend(),
    }  # fmt: skip
    grouped: dict[tuple[str, str], list[str]] = {}
    for op, answers in ops.items():
        for backend, answer in answers.items():
            grouped.setdefault((backend, answer), []).append(op)
    rows = [(backend, ", ".join(o), answer) for (backend, answer), o in sorted(grouped.items())]
    Output(json, quiet).result(
        values,
        " · ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()),
        *(" · ".join(str(v) for v in entry.values()) for entry in devices),
        make_table(f"Kernels on {where}", ("backend", "ops", "answer"), rows, left=3),
    )


def _with_bar(chosen: Selection, shown: bool) -> Iterator[Any]:
    """Batches of the images, with a bar on a terminal."""
    from erq.data import BATCH_IMAGES
    from erq.progress import Progress

    with Progress(-(-len(chosen.indices) // BATCH_IMAGES), enabled=shown) as bar:
        for batch in chosen:
            bar.update("evaluating")
            yield batch
