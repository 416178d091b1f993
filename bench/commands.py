"""The subcommands and their arguments; what they do is in the modules they import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import fusenc
import typer

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
    suite: Annotated[str, typer.Argument(help="host, model or all.")] = "all",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch on the CPU.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Measurements of each side; their median counts.")] = 25,
) -> None:
    """Measure the library against torch and Hugging Face on this machine's CPU."""
    from .measure import SUITES, run

    if suite not in (*SUITES, "all"):
        raise _fail(f"unknown suite {suite!r}, expected one of {', '.join((*SUITES, 'all'))}")
    run(list(SUITES) if suite == "all" else [suite], json, threads, rounds)
