"""`fusenc bench`: measure cases one after the other and keep what is there at every moment."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import cases, environment, report, results, timing
from .cases.case import DIRECTIONS, PROVIDERS, Case, Given
from .checking import DTYPES
from .files import check_targets, replace
from .measure import ABSENT, MEMORY, Limits, chosen, measure
from .results import Results

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


@dataclass
class Files:
    """Where results go."""

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    resume: Path | None = None


@dataclass
class Asked:
    """What the command line says, as texts with commas."""

    ops: Sequence[str] = ("all",)
    sizes: dict[str, str] = field(default_factory=dict)
    """By `Grid`'s names."""
    providers: str | None = None
    device: str = "auto"
    threads: int | None = None


def parse(sizes: dict[str, str]) -> Given:
    """The values of options.

    Raises:
        ValueError: a value that the option does not take; the message lists what it does.
    """
    given: dict[str, tuple[Any, ...]] = {}
    for name, text in sizes.items():
        values = text.split(",")
        known = {"dtype": tuple(DTYPES), "direction": DIRECTIONS}.get(name)
        if known is not None:
            for value in values:
                if value not in known:
                    raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
            given[name] = tuple(values)
            continue
        kind: Callable[[str], Any] = float if name == "fill" else int
        try:
            numbers = tuple(kind(value) for value in values)
        except ValueError:
            raise ValueError(f"--{name}: expected numbers, comma-separated, got {text!r}") from None
        if name == "fill" and not all(0.0 < n <= 1.0 for n in numbers):
            raise ValueError(f"--fill: expected above 0 and at most 1, got {text}")
        if not all(n > 0 for n in numbers):
            raise ValueError(f"--{name}: expected at least 1, got {text}")
        given[name] = numbers
    return given


def wanted(text: str | None) -> list[str] | None:
    """The providers asked for; None for the default ones.

    Raises:
        ValueError: an unknown one; the message lists the known ones.
    """
    if text is None:
        return None
    names = list(PROVIDERS) if text == "all" else text.split(",")
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"unknown provider {name!r}, expected one of {', '.join((*PROVIDERS, 'all'))}")
    return names


def find_device(name: str) -> timing.Device:
    """The device of ``--device``.

    Raises:
        ValueError: an unknown one, or a GPU where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}, expected one of auto, cpu, cuda")
    if name == "cpu":
        return timing.Cpu()
    gpu = timing.find_gpu()
    if gpu is None and name == "cuda":
        raise ValueError("--device cuda: torch finds no GPU here")
    return gpu or timing.Cpu()


def run(asked: Asked, files: Files, limits: Limits) -> int:
    """Measure, print and write.

    Returns:
        The exit status: 1 if this library failed or gave wrong values anywhere, or if nobody was measured;
        `INTERRUPTED` after Ctrl-C.

    Raises:
        ValueError: something unknown was asked for; the message lists what is known.
        OSError: a file that cannot be written or read.
    """
    given, providers = parse(asked.sizes), wanted(asked.providers)
    if files.plot is not None:
        from .charts import SUFFIXES

        if files.plot.suffix not in SUFFIXES:
            raise ValueError(f"--plot: expected a file ending in {', '.join(SUFFIXES)}, got {files.plot}")
    check_targets({f"--{name}": file for name, file in vars(files).items()})
    if files.resume is not None and not files.resume.exists():
        raise ValueError(f"--resume: there is no file {files.resume}; --json starts one")
    device = find_device(asked.device)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    console = Console()
    kept = Results(environment.summary(), device.name)
    todo = [case for case in cases.cases(asked.ops, given, device) if chosen(case, device, providers)]
    if not todo:
        raise ValueError("nothing to measure: none of these ops has such a case with such a provider")
    if files.resume is not None:
        files.json = files.json or files.resume
        _resume(kept, results.load(files.resume), console)
    done = {of.key: set(of.outcomes) for of in kept.records}
    left = [case for case in todo if not set(chosen(case, device, providers)) <= done.get(case.key, set())]
    stopped = False
    try:
        _measure(kept, left, device, providers, limits, files.json, console)
    except KeyboardInterrupt:
        stopped = True
    _write(kept, files, console)
    _show(kept, console)
    if stopped:
        again = "" if files.json is None else f"; --resume {files.json} goes on from there"
        console.print(f"Stopped after {len(kept.records)} of {len(todo)} cases{again}.", soft_wrap=True)
        return INTERRUPTED
    if not any(outcome.seconds for *_, outcome in kept.rows()):
        console.print("Nothing was measured.")
        return 1
    return 1 if _broken(kept) else 0


def _measure(
    kept: Results, todo: Sequence[Case], device: timing.Device, providers: list[str] | None, limits: Limits,
    file: Path | None, console: Console,
) -> None:  # fmt: skip
    if file is not None:
        replace(file, results.text(kept))  # a file that cannot be written shows before anything is measured
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")  # torch.nn's fast path makes some
        task = progress.add_task("", total=len(todo))
        for case in todo:
            progress.update(task, description=case.key)
            if case.dtype not in kept.peaks and (peaks := device.peaks(case.dtype)) is not None:
                kept.peaks[case.dtype] = peaks
            outcomes = measure(case, device, providers, limits)
            kept.records = [of for of in kept.records if of.key != case.key]  # one that lacks a provider
            kept.records.append(results.record(case, outcomes))
            if file is not None:
                replace(file, results.text(kept))
            progress.advance(task)


def _resume(kept: Results, earlier: Results, console: Console) -> None:
    """Take over what was measured on this machine, of this commit."""
    differing = [k for k in kept.machine if kept.machine[k] != earlier.machine.get(k)]
    if differing or kept.device != earlier.device:
        what = ", ".join(f"{k} {earlier.machine.get(k, 'none')}" for k in differing) or f"device {earlier.device}"
        console.print(f"The earlier results are of another machine or build ({what}); all is measured anew.")
        return
    kept.peaks, kept.records = earlier.peaks, earlier.records
    console.print(f"{len(kept.records)} cases are there already.")


def _write(kept: Results, files: Files, console: Console) -> None:
    texts: list[tuple[Path | None, Callable[[], str]]] = [
        (files.csv, lambda: results.table(kept)), (files.markdown, lambda: report.markdown(kept)),
        (files.html, lambda: _page(kept)), (files.json, lambda: results.text(kept)),
    ]  # fmt: skip
    for file, text in texts:
        if file is not None:
            replace(file, text())
    if files.plot is not None:
        from .charts import whole

        whole(kept).savefig(files.plot, dpi=120)
    for file in (files.json, files.csv, files.markdown, files.html, files.plot):
        if file is not None:
            console.print(f"Written to {file}", soft_wrap=True)


def _page(kept: Results) -> str:
    from .page import render

    return render(kept)


def _show(kept: Results, console: Console) -> None:
    from rich.table import Table

    wide = console if console.is_terminal else Console(width=190)
    for op in dict.fromkeys(of.op for of in kept.records):
        wide.print(report.table(kept, op))
    summary = Table(*report.HEADER, title="This library against the usual choice", title_justify="left")
    for row in report.summary(kept):
        summary.add_row(*(cell.replace("**", "") for cell in row), style="red" if "missed" in row[-1] else "")
    if summary.rows:
        wide.print(summary)
    for name, reasons in report.absent(kept).items():
        for reason, count in reasons.items():
            console.print(f"absent: {name}: {reason} ({count} cases)", highlight=False, markup=False, soft_wrap=True)
    for dtype, peaks in kept.peaks.items():
        console.print(f"peaks in {dtype}: {peaks.tflops:.3g} TFLOP/s, {peaks.gb_s:.3g} GB/s ({peaks.source})")
    console.print(", ".join(f"{name} {value}" for name, value in kept.machine.items()), soft_wrap=True)


def _broken(kept: Results) -> bool:
    """Whether this library failed where nothing but its own fault explains it."""
    allowed = ("measured", ABSENT, MEMORY)
    return any(name.startswith("fusenc") and outcome.status not in allowed for _, name, outcome in kept.rows())
