"""What `fusenc inspect` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import launches, traffic
from . import budget, chips, report
from .figures import Figures
from .inspecting import inspect_shipped


def run(
    kernels: Sequence[str], archs: Sequence[str], json_file: Path | None, html_file: Path | None, update_budget: bool
) -> int:
    """Inspect, print and write; the exit status is 1 if a kernel does not compile or is worse than its budget.

    Raises:
        ValueError: an unknown kernel or arch.
    """
    console = Console()
    chips.chosen(archs)
    if update_budget and kernels:
        raise ValueError("--update-budget: expected all kernels, got a selection")
    # The budget of most chips holds no more.
    first_case = [arch for arch in archs if update_budget and arch not in budget.WHOLE]
    all_figures = _inspect(kernels, archs, console, first_case)
    for arch in archs:
        # Without a terminal the width is 80, too narrow for any row of the table.
        wide = console if console.is_terminal else Console(width=230)
        wide.print(report.table(all_figures, arch))
    console.print(
        "Bounds: share of the tensor (or FMA) peak if only issue slots counted / with perfect overlap / with no "
        "overlap inside a warp; or issue time over DRAM time. docs/inspect.md says how they are made."
    )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(f) for f in all_figures], indent=1) + "\n", encoding="utf-8")
        console.print(f"Written to {json_file}")
    if html_file is not None:
        from . import page

        html_file.write_text(page.render(all_figures), encoding="utf-8")
        console.print(f"Written to {html_file}")
    failed = [f for f in all_figures if f.error]
    for f in failed:
        console.print(f"[red]{f.arch} {f.case} {f.kernel}: {f.error}[/red]")
    if update_budget:
        budget.write(all_figures)
        console.print(f"Written to {budget.FILE}")
        return 1 if failed else 0
    if budget.made_with() != triton.__version__:
        console.print(
            f"The budget holds for Triton {budget.made_with()}; under {triton.__version__} spills alone are compared."
        )
    worse = budget.complaints(all_figures)
    for complaint in worse:
        console.print(f"[red]{complaint}[/red]")
    if not worse:
        console.print("All within the budget.")
    return 1 if failed or worse else 0


def _inspect(
    kernels: Sequence[str], archs: Sequence[str], console: Console, first_case: Sequence[str]
) -> list[Figures]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=None)
        return inspect_shipped(
            kernels, archs, lambda done, total: progress.update(task, completed=done, total=total), first_case
        )


def run_traffic(names: Sequence[str], json_file: Path | None) -> int:
    """Count memory traffic and print it beside the least that must move.

    Raises:
        ValueError: an unknown function.
    """
    console = Console()
    known = sorted({case.split()[0] for case in traffic.CASES})
    for name in names:
        if name not in known:
            raise ValueError(f"unknown function {name!r}, expected one of {', '.join(known)}")
    with console.status("counting under Triton's interpreter"):
        passes = traffic.passes_in_a_process(list(names))
    for each in passes:
        table = Table(title=each.name, title_justify="left")
        table.add_column("kernel")
        table.add_column("argument")
        for column in ("loaded B", "times each", "in sectors B", "stored B", "in sectors B", "atomics"):
            table.add_column(column, justify="right")
        for launch in each.launches:
            for name, a in launch.arguments.items():
                again = f"{a.loaded / a.loaded_once:.2f}" if a.loaded_once else ""
                table.add_row(
                    launch.kernel, name, f"{a.loaded:,}", again, f"{traffic.SECTOR * a.load_sectors:,}",
                    f"{a.stored:,}", f"{traffic.SECTOR * a.store_sectors:,}", f"{a.atomics:,}",
                )  # fmt: skip
        console.print(table)
        asked, once = (sum(getattr(launch, what) for launch in each.launches) for what in ("asked", "once"))
        flops = sum(launch.dot_flops for launch in each.launches)
        console.print(
            f"Asked for {asked:,} B, {once:,} B if each launch touched a byte once; the least is {each.least:,} B. "
            f"Dot products: {flops:,} FLOPs.\n"
        )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(p) for p in passes], indent=1) + "\n", encoding="utf-8")
        console.print(f"Written to {json_file}")
    return 0


def run_launches() -> int:
    """Count the kernels that an encoder layer launches and print them."""
    console = Console()
    for dropout in (0.0, 0.1):
        table = Table("layer", "forward", "backward", "forward kernels", "backward kernels", show_lines=True)
        table.title = f"Kernels of a post-norm layer in training, dropout {dropout}"
        for name, count in launches.layers(dropout).items():
            names = (" ".join(f"{n} {k}" for k, n in c.most_common()) for c in (count.forward, count.backward))
            table.add_row(name, str(count.forward.total()), str(count.backward.total()), *names)
        console.print(table)
    return 0
