"""The plots of a benchmark, and how plots become part of a page."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases.case import PROVIDERS
from .results import Record, Results, figures, yardstick
from .timing import Peaks

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fusenc",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SUFFIXES = (".png", ".svg", ".pdf")


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Inside, plots look like the others and come out the same each time."""
    with matplotlib.rc_context(STYLE):
        yield


def svg(figure: Figure) -> str:
    """A plot as an element of a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def colour(provider: str) -> Any:
    """The same in every plot."""
    return matplotlib.colormaps["tab20"](list(PROVIDERS).index(provider) % 20)


Bar = tuple[Record, str, float, tuple[float, float]]
"""A case, a provider, how many times as fast it is, and the band of that."""


def bars(results: Results, op: str) -> list[Bar]:
    """What `speed` shows of an op."""
    found = []
    for of, name, _ in results.rows():
        each = figures(results, of, name) if of.op == op and name != yardstick(of) else None
        if each is not None and each.ratio is not None and each.band is not None:
            found.append((of, name, each.ratio, each.band))
    return found


def speed(axis: Axes, shown: list[Bar], title: str) -> None:
    """How many times as fast as the yardstick each provider is; whiskers for the band, a tick for the target."""
    names = sorted({name for _, name, _, _ in shown}, key=list(PROVIDERS).index)
    labels, y, before = [], 0.0, ""
    for of, name, ratio, band in shown:
        y += 1.0 if of.key == before else 1.6
        if of.key != before:
            labels.append((y, f"{of.name} (1 = {yardstick(of)})"))
        before = of.key
        reach = [[max(ratio - band[0], 0.0)], [max(band[1] - ratio, 0.0)]]
        axis.barh(y, ratio, 0.9, color=colour(name), label=name, xerr=reach, error_kw={"elinewidth": 0.8})
        if name in of.targets:
            axis.plot([of.targets[name]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.5)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    # Bands of a busy machine may be long; they are cut off, the bars are not.
    axis.set_xlim(0.0, 1.3 * max(1.0, *(max(ratio, of.targets.get(name, 0.0)) for of, name, ratio, _ in shown)))
    axis.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("times as fast (black tick: target)")
    drawn, their_names = axis.get_legend_handles_labels()
    handles = dict(zip(their_names, drawn, strict=True))  # one of each
    axis.legend([handles[name] for name in names], names, fontsize=7, loc="lower right")


Point = tuple[str, float, float]
"""A provider, FLOPs a byte, and TFLOP/s."""


def points(results: Results, dtype: str) -> list[Point]:
    """What `roofline` shows of a dtype."""
    found = []
    for of, name, _ in results.rows():
        each = figures(results, of, name) if of.dtype == dtype and of.flops and of.bytes else None
        if each is not None and each.tflops is not None:
            found.append((name, of.flops / of.bytes, each.tflops))
    return found


def roofline(axis: Axes, shown: list[Point], peaks: Peaks, dtype: str) -> None:
    """Throughput over intensity under the device's roof."""
    ridge = 1e3 * peaks.tflops / peaks.gb_s
    line = sorted([min(1.0, *(x for _, x, _ in shown)), ridge, 2.0 * max(ridge, *(x for _, x, _ in shown))])
    axis.loglog(line, [min(peaks.tflops, 1e-3 * peaks.gb_s * x) for x in line], color="black", label=peaks.source)
    for provider in dict.fromkeys(name for name, _, _ in shown):
        mine = [(x, y) for name, x, y in shown if name == provider]
        marker = "D" if provider.startswith("fusenc") else "o"
        axis.loglog(*zip(*mine, strict=True), marker, markersize=4, color=colour(provider), alpha=0.7, label=provider)
    axis.set_xlabel("FLOPs per byte that has to move")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"Roofline, {dtype}", fontsize=10, loc="left")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


def curves(results: Results, op: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Tokens a second by length, where an op has three lengths or more; by what else is fixed, and by provider."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for of, name, _ in results.rows():
        each = figures(results, of, name) if of.op == op and "length" in of.sizes else None
        if each is None or each.tokens_s is None:
            continue
        fixed = {k: v for k, v in of.sizes.items() if k not in ("length", "batch") and v != ""}
        title = ", ".join([of.dtype, of.direction, *(f"{k} {v}" for k, v in fixed.items())])
        found.setdefault(title, {}).setdefault(name, []).append((of.sizes["length"], each.tokens_s))
    return {
        title: {name: sorted(points) for name, points in lines.items()}
        for title, lines in found.items()
        if len({length for points in lines.values() for length, _ in points}) >= 3
    }


def throughput(axis: Axes, lines: dict[str, list[tuple[int, float]]], title: str) -> None:
    """Tokens a second by length."""
    for name, points in lines.items():
        axis.loglog(*zip(*points, strict=True), "o-", markersize=3, color=colour(name), label=name)
    axis.set_xlabel("length")
    axis.set_ylabel("tokens/s")
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)


@dataclass
class Panel:
    """One plot; those of no op belong to all."""

    op: str
    size: tuple[float, float]
    """Width and height in inches."""
    draw: Callable[[Axes], None]


def panels(results: Results) -> list[Panel]:
    """Every plot that the results have something for."""
    found = []
    for op in dict.fromkeys(of.op for of in results.records):
        shown = bars(results, op)
        if shown:
            height = 1.2 + 0.2 * (len(shown) + len({of.key for of, *_ in shown}))
            found.append(Panel(op, (11.0, height), partial(speed, shown=shown, title=op)))
        for title, lines in curves(results, op).items():
            found.append(Panel(op, (11.0, 4.0), partial(throughput, lines=lines, title=f"{op}: {title}")))
    for dtype, peaks in results.peaks.items():
        if dots := points(results, dtype):
            found.append(Panel("", (11.0, 4.5), partial(roofline, shown=dots, peaks=peaks, dtype=dtype)))
    return found


def whole(results: Results) -> Figure:
    """All plots below each other."""
    found = panels(results)
    heights = [panel.size[1] for panel in found] or [1.0]
    with styled():
        figure = Figure(figsize=(11.0, sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, panel in zip(axes, found, strict=False):
            panel.draw(axis)
    return figure
