"""`fusenc bench`: this library against torch and Hugging Face on the CPU, both sides taking turns in one process."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import environment, timing
from .cases import SUITES
from .cases.case import Case


@dataclass
class Figure:
    """One measured case. Times are medians in microseconds; the ratio is the median of the rounds' own ratios."""

    name: str
    theirs_is: str
    theirs_us: float
    ours_us: float
    speedup: float
    target: float | None
    reached: bool | None


def interleave(case: Case, rounds: int) -> Figure:
    """Measure both sides in turns, so that a slow moment of the machine hits both alike."""
    sides = {"theirs": case.theirs, "ours": case.ours}
    seconds = timing.take_turns(sides, timing.Cpu(), rounds, case.calls)
    speedup = statistics.median(t / o for t, o in zip(seconds["theirs"], seconds["ours"], strict=True))
    theirs, ours = (1e6 * statistics.median(seconds[side]) for side in ("theirs", "ours"))
    reached = None if case.target is None else speedup >= case.target
    return Figure(case.name, case.theirs_is, theirs, ours, speedup, case.target, reached)


def run(suites: list[str], file: Path | None, threads: int | None, rounds: int) -> list[Figure]:
    """Measure the suites, print a table and, if asked, write the figures as JSON."""
    console = Console()
    if threads is not None:
        torch.set_num_threads(threads)
    figures = []
    with Progress(console=console, transient=True) as progress:
        for suite in suites:
            cases = SUITES[suite]()
            for case in progress.track(cases, description=suite):
                figures.append(interleave(case, rounds))
    table = Table("case", "against", "theirs, us", "ours, us", "times as fast", "target", "")
    for f in figures:
        verdict = {True: "reached", False: "missed", None: ""}[f.reached]
        columns = (f.name, f.theirs_is, f"{f.theirs_us:,.1f}", f"{f.ours_us:,.1f}", f"{f.speedup:.2f}")
        table.add_row(*columns, "" if f.target is None else f"{f.target:.2f}", verdict)
    (console if console.is_terminal else Console(width=150)).print(table)
    machine = environment.summary()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if file is not None:
        file.write_text(json.dumps({"machine": machine, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
        console.print(f"Written to {file}")
    return figures
