"""The committed budget: figures that no shipped kernel may fall behind."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import triton
from fusenc.kernels.common import compat

from .figures import Figures

FILE = Path(__file__).parent / "budget.csv"
OLDER = Path(__file__).parent / "budget_older_triton.csv"
"""The spills in loops that are allowed under an older Triton in place of those of `FILE`, each with its reason."""

WHOLE = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Chips whose every case has a budget; the others have one for the first case of each kernel."""

WHOLE_OLDER = ("sm_80", "sm_90")
"""Chips whose every case is compiled by an older Triton too."""

MORE_IS_WORSE = ("registers", "spilled", "loop_spills", "shared", "loop_length", "issue_over_dram")
LESS_IS_WORSE = ("occupancy", "issue_bound", "overlap_bound", "no_overlap_bound")
_KEY = ("arch", "kernel", "case")
_MADE_WITH = "# fusenc inspect --arch all --update-budget, Triton "
_ROUNDING = 5e-4
"""Ratios are written with three decimals."""


def _row(figures: Figures) -> dict[str, str]:
    row = {name: getattr(figures, name) for name in _KEY}
    if figures.error or figures.cannot_launch:
        return {**row, "problem": figures.error or figures.cannot_launch}
    for name in MORE_IS_WORSE + LESS_IS_WORSE:
        value = sum(figures.loop.values()) if name == "loop_length" else getattr(figures, name)
        row[name] = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return row


def write(all_figures: Sequence[Figures], file: Path = FILE) -> None:
    """Rewrite the budget of the chips that `all_figures` holds; other chips keep theirs."""
    archs = {figures.arch for figures in all_figures}
    rows = [row for row in read(file).values() if row["arch"] not in archs] if file.exists() else []
    seen = set()
    for figures in all_figures:
        if figures.arch in WHOLE or (figures.arch, figures.kernel) not in seen:
            rows.append(_row(figures))
        seen.add((figures.arch, figures.kernel))
    text = io.StringIO()
    text.write(f"{_MADE_WITH}{triton.__version__}\n")
    writer = csv.DictWriter(text, [*_KEY, *MORE_IS_WORSE, *LESS_IS_WORSE, "problem"], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["arch"]))  # stable: kernels keep their order
    file.write_text(text.getvalue(), encoding="utf-8")


def read(file: Path = FILE) -> dict[tuple[str, ...], dict[str, str]]:
    """The budget's rows by (arch, kernel, case)."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(line for line in stream if not line.startswith("#"))
        return {tuple(row[name] for name in _KEY): row for row in rows}


def made_with(file: Path = FILE) -> str:
    """The version of Triton, and so of its compilers, that the budget holds for."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix(_MADE_WITH)


def complaints(all_figures: Sequence[Figures], file: Path = FILE) -> list[str]:
    """What is worse than the budget allows, one sentence a figure.

    Under another Triton than the budget's a kernel has to compile and may spill in its loop what `OLDER` says.
    """
    budget = read(file)
    same_compiler = made_with(file) == triton.__version__
    names = MORE_IS_WORSE + LESS_IS_WORSE if same_compiler else ("loop_spills",)
    spills = {} if same_compiler else spills_of(triton.__version__)
    found = []
    for figures in all_figures:
        now = _row(figures)
        key = tuple(now[name] for name in _KEY)
        where = " ".join(reversed(key))
        allowed = budget.get(key)
        if allowed is None and now["arch"] not in WHOLE:
            continue
        if allowed is None:
            found.append(f"{where}: has no budget; fusenc inspect --update-budget writes one")
            continue
        if now.get("problem"):
            if not allowed["problem"]:
                found.append(f"{where}: {now['problem']}")
            continue
        allowed = {**allowed, **spills.get(key, {})}
        for name in names:
            if not now[name] or not allowed[name]:
                continue
            worse_by = float(now[name]) - float(allowed[name])
            if (worse_by if name in MORE_IS_WORSE else -worse_by) > _ROUNDING:
                found.append(f"{where}: {name} is {now[name]}, its budget {allowed[name]}")
    return found


def spills_of(version: str) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of `OLDER` for a version of Triton, "3.6.0" say, by (arch, kernel, case)."""
    with OLDER.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if compat.parse(row["triton"]) == compat.parse(version)]
    return {tuple(row[name] for name in _KEY): {"loop_spills": row["loop_spills"]} for row in rows}
