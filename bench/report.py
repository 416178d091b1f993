"""What a benchmark prints: tables for the terminal and for a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from .results import MISSED, Figures, Record, Results, figures, verdict, yardstick

RATES = (
    "us", "times as fast", "TFLOP/s", "GB/s", "of peak", "of roofline", "tokens/s", "peak memory", "kept", "launches",
)  # fmt: skip


def table(results: Results, op: str) -> Table:
    """Every provider of an op's cases that has a time, or that should have."""
    shown = Table("case", "provider", title=op, title_justify="left")
    for column in RATES:
        shown.add_column(column, justify="right")
    before = ""
    for of, name, outcome in results.rows():
        if of.op != op or outcome.status == "absent":
            continue
        case, before = "" if of.name == before else of.name, of.name
        found = figures(results, of, name)
        if found is None:
            shown.add_row(case, name, f"[red]{outcome.status}: {outcome.reason}[/red]")
        else:
            shown.add_row(case, name, *cells(of, name, found))
    return shown


def cells(of: Record, name: str, found: Figures) -> tuple[str, ...]:
    """The columns of `RATES`."""
    outcome = of.outcomes[name]
    band = found.band or (0.0, 0.0)
    return (
        f"{1e6 * found.seconds:,.1f}",
        "" if found.ratio is None or name == yardstick(of) else f"{found.ratio:.2f} ({band[0]:.2f} to {band[1]:.2f})",
        "" if found.tflops is None else f"{found.tflops:.3g}",
        "" if found.gb_s is None else f"{found.gb_s:.3g}",
        "" if found.peak is None else f"{found.peak:.0%}",
        "" if found.roofline is None else f"{found.roofline:.0%}",
        "" if found.tokens_s is None else f"{found.tokens_s:,.0f}",
        "" if outcome.peak_memory is None else f"{outcome.peak_memory / 2**20:,.1f} MiB",
        "" if outcome.kept is None else f"{outcome.kept:.1f}",
        "" if outcome.launches is None else str(outcome.launches),
    )


def absent(results: Results) -> dict[str, dict[str, int]]:
    """Who did not take part: the reasons of each provider, and in how many cases."""
    found: dict[str, dict[str, int]] = {}
    for _, name, outcome in results.rows():
        if outcome.status == "absent":
            reasons = found.setdefault(name, {})
            reasons[outcome.reason] = reasons.get(outcome.reason, 0) + 1
    return found


HEADER = ("case", "against", "theirs, us", "ours", "us", "times as fast", "target")


def summary(results: Results) -> Iterator[tuple[str, ...]]:
    """A line for each case and way of this library, of the columns of `HEADER`."""
    for of, name, _ in results.rows():
        if not name.startswith("fusenc"):
            continue
        found = figures(results, of, name)
        against = yardstick(of)
        theirs = None if against is None else figures(results, of, against)
        if found is None or theirs is None or found.ratio is None:
            continue
        said = verdict(of, name, found)
        target = f"{of.targets[name]:.2f}, {f'**{said}**' if said == MISSED else said}" if said else ""
        band = found.band or (0.0, 0.0)
        yield (of.key, against or "", f"{1e6 * theirs.seconds:,.1f}", name, f"{1e6 * found.seconds:,.1f}",
               f"{found.ratio:.2f} ({band[0]:.2f} to {band[1]:.2f})", target)  # fmt: skip


def markdown(results: Results) -> str:
    """The summary as a page."""
    lines = [
        "# Measured with `fusenc bench`",
        "",
        "Made by the command; benchmarks.md says what it means.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in results.machine.items()]
    lines += [f"- peaks in {dtype}: {p.tflops:.3g} TFLOP/s, {p.gb_s:.3g} GB/s ({p.source})"
              for dtype, p in results.peaks.items()]  # fmt: skip
    lines += ["", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    lines += [f"| {' | '.join(row)} |" for row in summary(results)]
    missing = absent(results)
    if missing:
        lines += ["", "Not measured here:", ""]
        for name, reasons in missing.items():
            lines += [f"- {name}: {reason}" for reason in reasons]
    return "\n".join(lines) + "\n"
