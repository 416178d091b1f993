"""A benchmark as one self-contained web page."""

from __future__ import annotations

import jinja2
from matplotlib.figure import Figure

from . import charts, report
from .results import Results, figures, yardstick


def render(results: Results) -> str:
    """The page's HTML; plots are inline SVG, so the file needs nothing else."""
    plots: dict[str, list[str]] = {}
    with charts.styled():
        for panel in charts.panels(results):
            figure = Figure(figsize=panel.size)
            panel.draw(figure.subplots())
            plots.setdefault(panel.op, []).append(charts.svg(figure))
    rows = []
    for of, name, outcome in results.rows():
        found = figures(results, of, name)
        rows.append((of, name, outcome, None if found is None else report.cells(of, name, found)))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        results=results, ops=list(dict.fromkeys(of.op for of in results.records)), plots=plots, rows=rows,
        rates=report.RATES, header=report.HEADER, summary=list(report.summary(results)),
        absent=report.absent(results), yardstick=yardstick,
    )  # fmt: skip
