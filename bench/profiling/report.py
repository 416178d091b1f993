"""A profile as tables, plots and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .advice import Advice
from .operators import CATEGORIES, OTHER, OUTSIDE, Breakdown
from .result import Result
from .throughput import Measured, ratio

TOP = 8
"""Operators named for each side."""

LEAST_SHARE = 5e-4
"""Of a step's time that a category needs to be shown."""

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fusenc", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_COLORS: dict[str, Any] = dict(zip(CATEGORIES, matplotlib.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
_COLORS |= {OTHER: "#999999", OUTSIDE: "#dddddd"}
_ORDERS = {"random": "as it comes", "sorted": "by length"}


def wide_console(console: Console | None = None) -> Console:
    """Tables need more than the 80 columns that a pipe is taken for."""
    if console is not None:
        return console
    console = Console()
    return console if console.is_terminal or console.width > 80 else Console(width=150)


def print_result(console: Console, result: Result) -> None:
    """All tables and the advice."""
    checked = [m for m in (*result.ragged, *result.dense) if m.difference is not None]
    if result.ragged:
        console.print(_ragged_table(result))
    if result.dense:
        console.print(_dense_table(result))
    if result.peak is not None:
        console.print(f"Peak for MFU: {1e3 * result.peak.tflops:,.0f} GFLOP/s, {result.peak.source}")
    elif not result.interrupted:
        console.print("No MFU: no published peak for this GPU is known")
    if result.flops is None and not result.interrupted:
        console.print("No MFU: the operations of this model are no polynomial of degree 2 in the length")
    if len(result.sides) == 2 and checked:
        largest = max(m.difference for m in checked if m.difference is not None)
        console.print(f"Largest difference of hidden states, fused from unfused: {largest:.1e} of the largest value")
    if result.operators:
        columns = {f"{case}, {side}": b for case, sides in result.operators.items() for side, b in sides.items()}
        print_operators(console, columns, "Where a step's time goes")
        for case, name in result.operators_of.items():
            console.print(f"{case}: {name}")
    print_advice(console, result.advice)
    for measured in result.failed:
        console.print(f"[bold red]No time[/bold red] {_case(measured)}: {measured.fault}", highlight=False)
    if result.interrupted:
        console.print("[bold]Interrupted[/bold]: the above is what was measured until then")


def _case(measured: Measured) -> str:
    if measured.length is not None:
        return f"of dense {measured.batch} x {measured.length}"
    return f"of batches of {measured.batch}, {_ORDERS[measured.order]}"


def _side_columns(result: Result) -> list[str]:
    columns = [f"{side}\ntokens/s" for side in result.sides]
    if len(result.sides) == 2:
        columns.append("times\nas fast")
    return columns + [f"{side}\nMFU" for side in result.sides]


def _side_cells(result: Result, measured: Measured) -> list[str]:
    if measured.fault:
        return ["" for _ in _side_columns(result)]
    cells = [f"{measured.tokens_per_second(side):,.0f}" for side in result.sides]
    if len(result.sides) == 2:
        cells.append(f"{ratio(measured.rounds['unfused'], measured.rounds['fused']):.2f}")
    return cells + [_percent(result.mfu(measured, side)) for side in result.sides]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _ragged_table(result: Result) -> Table:
    title = "Real text, ragged batches (tokens/s of real tokens; padding does not count)"
    table = Table(
        "batch", "order", "padding", "padding,\nFLOPs", *_side_columns(result), title=title, title_justify="left"
    )
    for m in result.ragged:
        work = None
        if m.padded_flops and m.useful_flops:
            work = 1 - m.useful_flops / m.padded_flops
        padding = _percent(1 - m.tokens / m.positions)
        table.add_row(str(m.batch), _ORDERS[m.order], padding, _percent(work), *_side_cells(result, m))
    return table


def _dense_table(result: Result) -> Table:
    table = Table(
        "batch", "length", *_side_columns(result), title="Batches without padding", title_justify="left"
    )  # fmt: skip
    for m in result.dense:
        table.add_row(str(m.batch), str(m.length), *_side_cells(result, m))
    return table


def print_operators(console: Console, columns: Mapping[str, Breakdown], title: str) -> None:
    """Milliseconds and shares by category, then the operators that take most."""
    table = Table("ms", *columns, title=title, title_justify="left")
    for category in CATEGORIES:
        if any(b.share(category) >= LEAST_SHARE for b in columns.values()):
            cells = (
                f"{1e3 * b.categories.get(category, 0.0):,.1f} ({b.share(category):.0%})" for b in columns.values()
            )
            table.add_row(category, *cells)
    table.add_section()
    table.add_row("all", *(f"{1e3 * b.seconds:,.1f}" for b in columns.values()))
    console.print(table)
    for name, b in columns.items():
        top = ", ".join(f"{_short(o.name)} {1e3 * o.seconds:,.1f} ({o.calls}x)" for o in b.operators[:TOP])
        console.print(f"[bold]{name}[/bold]: {top}", highlight=False)


def _short(name: str) -> str:
    name = name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
    return name if len(name) <= 60 else f"{name[:57]}..."


def print_advice(console: Console, advice: Sequence[Advice]) -> None:
    """One line each; what is worth doing first."""
    if not advice:
        return
    table = Table("advice", "", title="What would help, by these figures", title_justify="left", show_header=False)
    for a in sorted(advice, key=lambda a: not a.do):
        table.add_row(f"[bold green]{a.subject}[/bold green]" if a.do else a.subject, a.text)
    console.print(table)


def write_json(found: Mapping[str, Any], file: Path) -> None:
    """Written as a whole."""
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def plot_operators(columns: Mapping[str, Breakdown], file: Path) -> None:
    """A stacked bar for each column."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 1.5 + 0.55 * len(columns)))
        axis = figure.subplots()
        names = list(columns)
        left = [0.0] * len(names)
        for category in CATEGORIES:
            widths = [1e3 * columns[name].categories.get(category, 0.0) for name in names]
            if any(widths):
                axis.barh(names, widths, left=left, color=_COLORS[category], label=category)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        _save(figure, file)


def plot_throughput(result: Result, file: Path) -> None:
    """Tokens a second: of dense batches against length, of ragged ones as bars."""
    dense, ragged = ([m for m in measured if not m.fault] for measured in (result.dense, result.ragged))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 4))
        lines, bars = figure.subplots(1, 2)
        for i, batch in enumerate(dict.fromkeys(m.batch for m in dense)):
            mine = sorted((m for m in dense if m.batch == batch), key=lambda m: m.length or 0)
            for side, style in (("unfused", "--"), ("fused", "-")):
                if side in result.sides:
                    rates = [m.tokens_per_second(side) for m in mine]
                    label = f"batches of {batch}, {side}"
                    lines.plot([m.length for m in mine], rates, style, marker="o", color=f"C{i}", label=label)
        lines.set_xlabel("tokens of a sequence")
        lines.set_ylabel("tokens/s")
        lines.set_title("batches without padding", fontsize=9)
        lines.set_ylim(bottom=0)
        ways = [(side, order) for side in result.sides for order in _ORDERS]
        batches = list(dict.fromkeys(m.batch for m in ragged))
        for i, (side, order) in enumerate(ways):
            mine = [m for m in ragged if m.order == order]
            at = [batches.index(m.batch) + (i + 0.5) / len(ways) * 0.8 - 0.4 for m in mine]
            rates = [m.tokens_per_second(side) for m in mine]
            bars.bar(at, rates, 0.75 / len(ways), label=f"{side}, {_ORDERS[order]}")
        bars.set_xticks(range(len(batches)), [f"batches of {batch}" for batch in batches])
        bars.set_ylabel("real tokens/s")
        bars.set_title("real text", fontsize=9)
        for axis, drawn in ((lines, dense), (bars, ragged)):
            if drawn:
                axis.legend(fontsize=7)
        figure.tight_layout()
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    with matplotlib.rc_context({"svg.hashsalt": "fusenc"}):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
