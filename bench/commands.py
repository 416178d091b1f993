"""The subcommands and their arguments; what they do is in the modules they import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import fusenc
import typer
from typer.core import TyperCommand

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Fused Transformer encoders: see them work.")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"fusenc {fusenc.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Fused Transformer encoders: see them work."""


def _fail(message: str) -> typer.Exit:
    typer.echo(f"fusenc: {message}", err=True)
    return typer.Exit(2)


class _UpToScript(TyperCommand):
    """Leaves what follows a Python script to the script, options too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        valued = {name for p in self.params if not getattr(p, "is_flag", True) for name in p.opts}
        for i, argument in enumerate(args):
            if argument.endswith(".py") and not argument.startswith("-") and (i == 0 or args[i - 1] not in valued):
                return super().parse_args(ctx, [*args[: i + 1], "--", *args[i + 1 :]])
        return super().parse_args(ctx, args)


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(help="A local Hugging Face encoder folder.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file, one sentence a line.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences a batch.")] = 32,
    limit: Annotated[int, typer.Option(min=1, help="Encode at most this many sentences.")] = 512,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
) -> None:
    """Encode real sentences unfused and fused: the difference, the speed, and what they mean."""
    from .demo import DemoError, run

    try:
        agrees = run(model, text, batch_size, limit, threads)
    except DemoError as error:
        raise _fail(str(error)) from None
    raise typer.Exit(0 if agrees else 1)


@app.command()
def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(help="host, add_norm, embed_norm, rotary, attention, ffn, layer, model, encoder, decoder, all; "
                            "or: compare A.json B.json."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16, float32; with commas, as what follows.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sequences.")] = None,
    length: Annotated[str | None, typer.Option(help="Tokens of the longest.")] = None,
    width: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    heads: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    fill: Annotated[str | None, typer.Option(help="Real tokens among all, up to 1.")] = None,
    direction: Annotated[str | None, typer.Option(help="forward, backward, both.")] = None,
    provider: Annotated[str | None, typer.Option(help="Who takes part, or all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Times of each provider, at most; their median counts.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.0, help="For a case; fewer rounds where they take longer.")] = 4.0,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The same as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="A page with tables and plots.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A page with the table.")] = None,
    plot: Annotated[Path | None, typer.Option(help="The plots alone, .png, .svg or .pdf.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a file of --json.")] = None,
) -> None:  # fmt: skip
    """Measure the library beside everything else that does the same, on this machine's GPU or CPU.

    With "compare" and two result files: which differences between them are more than chance; exit status 1 if anything
    became slower.
    """
    from . import benchmark, compare
    from .measure import Limits

    sizes = {"dtype": dtype, "batch": batch, "length": length, "width": width, "heads": heads, "fill": fill,
             "direction": direction}  # fmt: skip
    given = {name: value for name, value in sizes.items() if value is not None}
    chosen = ops or ["all"]
    try:
        if chosen[0] == "compare":
            if len(chosen) != 3:
                raise ValueError(f"compare: expected two result files, got {len(chosen) - 1}")
            status = compare.run(Path(chosen[1]), Path(chosen[2]))
        else:
            asked = benchmark.Asked(chosen, given, provider, device, threads)
            files = benchmark.Files(json, csv, html, markdown, plot, resume)
            status = benchmark.run(asked, files, Limits(rounds, seconds))
    except (ValueError, OSError) as error:  # OSError: a file that cannot be written or read
        raise _fail(str(error)) from None
    raise typer.Exit(status)


@app.command()
def inspect(
    kernels: Annotated[
        list[str] | None, typer.Argument(help="Shipped kernels (with --traffic: functions); all if none is given.")
    ] = None,
    arch: Annotated[str, typer.Option(help="Chips, comma-separated, or all.")] = "sm_80,sm_90",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables and plots to this file.")] = None,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="Count memory traffic under Triton's interpreter instead.")
    ] = False,
    launches: Annotated[bool, typer.Option("--launches", help="Count a layer's kernels instead.")] = False,
    update_budget: Annotated[bool, typer.Option("--update-budget", help="Rewrite the committed budget.")] = False,
) -> None:
    """Read registers, spills, occupancy, instruction mix and speed bounds from machine code; no GPU is needed."""
    try:
        from .machine_code import chips, command

        archs = list(chips.chips()) if arch == "all" else arch.split(",")
        if launches:
            status = command.run_launches()
        elif traffic:
            status = command.run_traffic(kernels or [], json)
        else:
            status = command.run(kernels or [], archs, json, html, update_budget)
    except (ValueError, OSError, ImportError) as error:  # OSError: a file that cannot be written
        raise _fail(str(error)) from None
    raise typer.Exit(status)


@app.command(context_settings={"ignore_unknown_options": True})
def verify(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Functions of fusenc.kernels (all if none), or a script of your own and its arguments."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
) -> None:
    """Search Triton kernels for overruns, races and unwritten memory; no GPU is needed."""
    from .verify import VerifyError, run

    try:
        status = run(targets or [], markdown)
    except VerifyError as error:
        raise _fail(str(error)) from None
    raise typer.Exit(status)


@app.command()
def roofline(
    model: Annotated[
        str,
        typer.Option(
            help="bert-base, bert-large, roberta-base, minilm-l6, vit-b, vit-l or a Hugging Face model's folder."
        ),
    ] = "bert-base",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 32,
    seq: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    gpu: Annotated[str, typer.Option(help="Chips, comma-separated.")] = "a100,h100",
    layers: Annotated[int | None, typer.Option(help="Another number of layers than the model's.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Another width.")] = None,
    nhead: Annotated[int | None, typer.Option(help="Another number of heads.")] = None,
    dim_feedforward: Annotated[int | None, typer.Option(help="Another hidden width.")] = None,
    launch_us: Annotated[float, typer.Option(min=0.0, help="Host time of a launch, microseconds.")] = 4.0,
    details: Annotated[bool, typer.Option("--details", help="Every kernel.")] = False,
) -> None:
    """Bound the time of a training layer by the chips' published peaks: eager, SDPA, compiled and fused."""
    from .roofline import run, shape_of

    try:
        shape = shape_of(model, layers=layers, d_model=d_model, nhead=nhead, dim_feedforward=dim_feedforward)
        run(shape, batch, seq, gpu.split(","), launch_us, details)
    except ValueError as error:
        raise _fail(str(error)) from None


@app.command()
def tune(
    operations: Annotated[list[str] | None, typer.Argument(help="Operations to measure; all if none is given.")] = None,
    rows: Annotated[str, typer.Option(help="Numbers of tokens, comma-separated.")] = "1024,4096,16384",
    length: Annotated[str, typer.Option(help="Tokens of a sequence, for attention.")] = "128,512,2048",
    model: Annotated[
        str, typer.Option(help="Whose widths: a name, as for roofline, or a Hugging Face model's folder.")
    ] = "bert-base",
    d_model: Annotated[int | None, typer.Option(help="Another width.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Another hidden width.")] = None,
    nhead: Annotated[int | None, typer.Option(help="Another number of heads.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    export: Annotated[Path | None, typer.Option(help="Also write this GPU's choices to a table file.")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget what was measured before.")] = False,
) -> None:
    """Measure the ways to do the same on this machine's GPU and keep the fastest for later calls."""
    from filelock import Timeout

    from .roofline import shape_of
    from .tune import TuneError, run

    counts, lengths = _numbers("--rows", rows), _numbers("--length", length)
    try:
        shape = shape_of(model, d_model=d_model, nhead=nhead, dim_feedforward=hidden)
        status = run(operations or [], counts, lengths, shape, dtype, export, reset)
    except (TuneError, ValueError, OSError, Timeout) as error:  # OSError: a file that cannot be written
        raise _fail(str(error)) from None
    raise typer.Exit(status)


@app.command(cls=_UpToScript)
def profile(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL|SCRIPT]", help="A Hugging Face encoder's folder, or a Python script."),
    ] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file, one sentence a line.")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, comma-separated; 8,32 if not given.")] = None,
    length: Annotated[str | None, typer.Option(help="Lengths of dense batches; 32,128 if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (if not given), bfloat16 or float16.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward instead of inference.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Times taken of each side; 7 if not given.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Recorded of a script; 5 if not given.")] = None,
    out: Annotated[Path, typer.Option(help="The folder that files are written to.")] = Path("fusenc-profile"),
) -> None:
    """Measure a model's throughput and where its time goes, or a script's, and say what would help."""
    from .profiling import model, script
    from .profiling.workload import ProfileError

    is_script = target is not None and target.endswith(".py")
    of_model = {"--text": text, "--batch": batch, "--length": length, "--dtype": dtype, "--rounds": rounds,
                "--train": train or None}  # fmt: skip
    misplaced = [
        name for name, value in (of_model if is_script else {"--seconds": seconds}).items() if value is not None
    ]
    if misplaced:
        raise _fail(f"{misplaced[0]}: is for a {'model' if is_script else 'script'}")
    try:
        if is_script:
            status = script.run(Path(str(target)), arguments or [], threads, seconds or 5.0, out)
        elif arguments:
            raise ProfileError(f"unexpected argument {arguments[0]!r} after the model")
        else:
            status = model.run(
                None if target is None else Path(target), text, _numbers("--batch", batch or "8,32"),
                _numbers("--length", length or "32,128"), dtype or "float32", train, threads, rounds or 7, out,
            )  # fmt: skip
    except (ProfileError, OSError) as error:  # OSError: a file that cannot be written
        raise _fail(str(error)) from None
    raise typer.Exit(status)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(n) for n in text.split(",")]
    except ValueError:
        raise _fail(f"{option}: expected numbers, comma-separated, got {text!r}") from None
    if min(numbers) < 1:
        raise _fail(f"{option}: expected at least 1, got {min(numbers)}")
    return numbers


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print what a bug report needs: versions, machine, GPUs, settings, tuned tables."""
    from json import dumps

    from . import environment

    sections = environment.collect()
    typer.echo(dumps(sections, indent=1) if json else environment.text(sections))
