"""The tables of a run, and of all committed runs for docs/gpu.md."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..measure import ABSENT, MEASURED
from ..results import Figures, Record, figures, yardstick
from .state import DONE, Part, Run, load

REHEARSAL = "**Rehearsal on a CPU with tiny sizes: the figures mean nothing.**"
BEGIN, END = "<!-- results: made by the command -->", "<!-- end of results -->"
NONE_YET = "No run on a GPU has been committed yet."

Cell = Callable[[Record, str, Figures], str]


def _us(of: Record, name: str, found: Figures) -> str:
    return f"{1e6 * found.seconds:.3g}"


def _tflops(of: Record, name: str, found: Figures) -> str:
    return "" if found.tflops is None else f"{found.tflops:.3g}"


def _gb_s(of: Record, name: str, found: Figures) -> str:
    return "" if found.gb_s is None else f"{found.gb_s:.0f}"


def _tokens(of: Record, name: str, found: Figures) -> str:
    memory = of.outcomes[name].peak_memory
    rate = "" if found.tokens_s is None else f"{found.tokens_s:,.0f}"
    return f"{rate} ({memory / 2**20:,.0f} MiB)" if memory else rate  # a graph keeps its memory, and allocates none


TABLES: tuple[tuple[str, str, str, Cell], ...] = (
    ("host", "Host time", "microseconds of a call until its launches are queued", _us),
    ("attention", "Attention", "TFLOP/s of the real tokens", _tflops),
    ("add_norm", "Residual and norm", "GB/s of the least traffic", _gb_s),
    ("linear_act", "Product, bias and GELU", "TFLOP/s", _tflops),
    ("model", "Models", "real tokens a second (peak memory)", _tokens),
)
"""Op, title, unit, and what a cell says."""


def markdown(run: Run) -> str:
    """The tables of one run."""
    title = run.found.device
    lines = [f"# {title}", ""]
    if run.rehearsal:
        lines += [REHEARSAL, ""]
    return "\n".join([*lines, *_body(run)]) + "\n"


def _body(run: Run) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in run.found.machine.items()]
    lines += ["", *_parts(run), *_values(run)]
    for op, title, unit, cell in TABLES:
        records = [of for of in run.found.records if of.op == op]
        if records:
            lines += ["", f"## {title}", "", f"In {unit}. Times are medians of {_rounds(records)} rounds or more.", ""]
            lines += _table(run, records, cell)
    lines += _tuned(run)
    reasons = Counter((name, o.status, _plain(o.reason)) for _, name, o in run.found.rows() if not o.seconds)
    if reasons:
        lines += ["", "## Without a time", ""]
        lines += [f"- {name}, {status}: {why} ({count} cases)" for (name, status, why), count in reasons.items()]
    lefts = [f"- {name}: {left}" for name, part in run.parts.items() for left in part.left_out]
    return [*lines, "", "## Left out for want of time", "", *lefts] if lefts else lines


def _rounds(records: Sequence[Record]) -> int:
    return min((len(o.seconds) for of in records for o in of.outcomes.values() if o.seconds), default=0)


def _parts(run: Run) -> list[str]:
    lines = ["| part | state | seconds | left out |", "|---|---|---|---|"]
    for name, part in run.parts.items():
        lines.append(f"| {name} | {_state(part)} | {part.seconds:.0f} | {len(part.left_out) or ''} |")
    return lines


def _state(part: Part) -> str:
    return part.state if part.state == DONE or not part.reason else f"{part.state}: {_plain(part.reason)}"


def _values(run: Run) -> list[str]:
    if not run.tests:
        return []
    outcomes = [of["outcome"] for of in run.tests.values()]
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = ["", "## Values", "", f"{len(outcomes)} tests: {counts}.", ""]
    return lines + [
        f"- {test}: {_plain(of.get('reason', ''))}" for test, of in run.tests.items() if of["outcome"] == "failed"
    ]


def _table(run: Run, records: Sequence[Record], cell: Cell) -> list[str]:
    """A line for each case, a column for each provider that has a time or wrong values anywhere."""
    names = list(dict.fromkeys(
        name for of in records for name, outcome in of.outcomes.items() if outcome.status != ABSENT
    ))  # fmt: skip
    lines = [_row("case", *names, "best of ours against the best stock one"), "|---|" + "---:|" * len(names) + "---|"]
    for of in records:
        cells = []
        for name in names:
            found = figures(run.found, of, name) if name in of.outcomes else None
            status = of.outcomes[name].status if name in of.outcomes else ABSENT
            cells.append(cell(of, name, found) if found else "" if status == ABSENT else status)
        lines.append(_row(of.name, *cells, ratio(run, of)))
    return lines


def ratio(run: Run, of: Record) -> str:
    """How many times as fast the best of this library is as the fastest stock provider, with both names."""
    against = yardstick(of)
    ours = [n for n, o in of.outcomes.items() if n.startswith("fusenc") and o.status == MEASURED]
    if against is None or not ours:
        return ""
    best = min(ours, key=lambda name: statistics.median(of.outcomes[name].seconds))
    found = figures(run.found, of, best)
    return "" if found is None or found.ratio is None else f"{found.ratio:.2f} ({best} / {against})"


def _tuned(run: Run) -> list[str]:
    if not run.tuned:
        return []
    lines = [
        "",
        "## Tuned",
        "",
        _row("call", "fastest", "us", "slowest", "us", "refused"),
        "|---|---|---:|---|---:|---:|",
    ]
    for of in run.tuned:
        ordered = sorted(of["seconds"], key=of["seconds"].get)
        ends = [x for name in (ordered[:1] + ordered[-1:]) for x in (name, f"{1e6 * of['seconds'][name]:.3g}")]
        lines.append(_row(of["key"], *(ends or ["", "", "", ""]), str(len(of["refused"]) or "")))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    """Text that does not end a table's cell or line."""
    return text.replace("|", "/").replace("\n", " ")


def page(text: str, runs: Iterable[Run]) -> str:
    """A page with its results replaced by those of some runs, the latest first; rehearsals do not count.

    Raises:
        ValueError: the page has no place for them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    lines = []
    for run in sorted(
        (r for r in runs if not r.rehearsal), key=lambda r: r.found.machine.get("date", ""), reverse=True
    ):
        body = [f"#{line}" if line.startswith("##") else line for line in _body(run)]
        lines += ["", f"## {run.found.device}, {run.found.machine.get('date', '')}", "", *body]
    return "\n".join([f"{before}{begin}", *(lines or ["", NONE_YET]), "", f"{end}{after}"])


def committed(folder: Path) -> list[Run]:
    """The runs of a folder of results, one folder a GPU."""
    return [load(file) for file in sorted(folder.glob("*/*.json")) if not file.name.endswith(".tuned.json")]
