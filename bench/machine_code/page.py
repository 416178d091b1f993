"""Figures as one self-contained web page: tables, bar charts and rooflines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import fusenc
import jinja2
import triton
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..charts import styled, svg
from . import chips, report
from .figures import Figures


def render(all_figures: Sequence[Figures]) -> str:
    """The page's HTML; plots are inline SVG, so the file needs nothing else."""
    archs = list(dict.fromkeys(f.arch for f in all_figures))
    with styled():
        charts = {arch: _bars([f for f in all_figures if f.arch == arch]) for arch in archs}
        rooflines = {arch: _roofline([f for f in all_figures if f.arch == arch]) for arch in archs}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        version=fusenc.__version__, triton=triton.__version__, archs=archs, figures=all_figures, chips=chips.chips(),
        charts=charts, rooflines=rooflines, mix=report.mix, widths=report.widths, bound=report.bound,
    )  # fmt: skip


def _bars(figures: list[Figures]) -> str:
    """The no-overlap bound of each matrix kernel's cases, and issue over DRAM time of the memory-bound ones."""
    bounded = [f for f in figures if f.no_overlap_bound is not None or f.issue_over_dram is not None]
    if not bounded:
        return "<p>No bounds: the shapes of tcgen05 instructions are not in the machine code.</p>"
    kernels = list(dict.fromkeys(f.kernel for f in bounded))
    figure = Figure(figsize=(13, 1.5 * len(kernels) + 1.2))
    axes = figure.subplots(1, 2)
    for axis, name, title, limit in (
        (axes[0], "no_overlap_bound", "tensor or FMA peak reachable, nothing overlapping inside a warp", 1.0),
        (axes[1], "issue_over_dram", "issue time over DRAM time (above 1 the DRAM idles)", None),
    ):
        rows = [k for k in kernels if any(f.kernel == k and getattr(f, name) is not None for f in bounded)]
        for y, kernel in enumerate(rows):
            mine = [f for f in bounded if f.kernel == kernel and getattr(f, name) is not None]
            height = 0.85 / len(mine)
            for i, f in enumerate(mine):
                value = getattr(f, name)
                at = y - 0.42 + (i + 0.5) * height
                axis.barh(at, value, 0.9 * height, color=f"C{y}")
                axis.text(value, at, f" {f.case}", fontsize=5, va="center")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(title, fontsize=9)
        axis.invert_yaxis()
        if limit:
            axis.set_xlim(0, limit)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.tight_layout()
    return svg(figure)


def _roofline(figures: list[Figures]) -> str:
    """Attainable float16 throughput over arithmetic intensity, with the kernels' bounds as lower ceilings."""
    matrix = [f for f in figures if f.bound == "tensor" and f.no_overlap_bound and f.case.startswith("float16")]
    chip = chips.chips()[figures[0].arch]
    figure = Figure(figsize=(8, 4))
    axis = figure.subplots()
    intensity = sorted([*(2.0**e for e in range(13)), chip.tensor_tflops / chip.dram_tb_s])
    axis.loglog(
        intensity, [min(chip.tensor_tflops, chip.dram_tb_s * x) for x in intensity], color="black",
        label=f"{chip.name}: {chip.tensor_tflops:g} TFLOP/s float16, {chip.dram_tb_s:g} TB/s",
    )  # fmt: skip
    best: dict[str, Figures] = {}
    for f in matrix:
        kept = best.get(f.kernel)
        if kept is None or (kept.no_overlap_bound or 0.0) < (f.no_overlap_bound or 0.0):
            best[f.kernel] = f
    for i, f in enumerate(best.values()):
        assert f.no_overlap_bound is not None
        ceiling = chip.tensor_tflops * f.no_overlap_bound
        start = math.ceil(ceiling / chip.dram_tb_s)
        label = f"{f.kernel}, {f.case}: {f.no_overlap_bound:.0%}"
        axis.loglog([start, intensity[-1]], [ceiling, ceiling], color=f"C{i}", linestyle="--", label=label)
    axis.set_xlabel("FLOPs per byte of DRAM traffic")
    axis.set_ylabel("TFLOP/s, at most")
    axis.set_title("Roofline, and the best case of each matrix kernel without overlap inside a warp", fontsize=9)
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.3)
    return svg(figure)
