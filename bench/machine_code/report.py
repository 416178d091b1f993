"""Figures as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .figures import Figures

_MIX = (
    ("tensor", "mma"), ("fp32", "fp"), ("integer", "int"), ("multiply_add", "imad"), ("special", "sfu"),
    ("shared", "shm"), ("global", "glb"), ("local", "loc"), ("control", "ctl"), ("unknown", "?"),
)  # fmt: skip


def table(all_figures: Sequence[Figures], arch: str) -> Table:
    """One chip's figures, a row a kernel and case."""
    result = Table(title=arch, title_justify="left", show_lines=False)
    for column in ("kernel", "case"):
        result.add_column(column, no_wrap=True)
    for column in ("regs", "spill B (in loop)", "shared B", "occupancy", "tensor cores", "loop mix"):
        result.add_column(column)
    for column in ("load/store B", "bound"):
        result.add_column(column)
    for f in all_figures:
        if f.arch != arch:
            continue
        if f.error:
            result.add_row(f.kernel, f.case, "", "", "", "", "", "", "", f"[red]{f.error}[/red]")
            continue
        occupancy = f"[red]{f.cannot_launch}[/red]" if f.cannot_launch else f"{f.occupancy:.0%} {f.limited_by}"
        result.add_row(
            f.kernel, f.case, str(f.registers), f"{f.spilled} ({f.loop_spills})" if f.spilled else "0",
            str(f.shared), occupancy, " ".join(f.tensor), mix(f), widths(f), bound(f),
        )  # fmt: skip
    return result


def mix(f: Figures) -> str:
    """The hot loop's instructions by kind."""
    return " ".join(f"{f.loop[kind]} {short}" for kind, short in _MIX if kind in f.loop)


def widths(f: Figures) -> str:
    """Bytes a thread of global loads and stores."""
    return "/".join(",".join(map(str, side)) or "-" for side in (f.loads, f.stores))


def bound(f: Figures) -> str:
    """The upper bounds in a few words."""
    if f.no_overlap_bound is not None:
        assert f.issue_bound is not None and f.overlap_bound is not None
        return f"{f.bound} {f.issue_bound:.0%} / {f.overlap_bound:.0%} / {f.no_overlap_bound:.0%}"
    if f.issue_over_dram is not None:
        return f"issue {f.issue_over_dram:.2f} x DRAM"
    return f"{f.bound}: not in the machine code" if f.bound == "tensor" else ""
