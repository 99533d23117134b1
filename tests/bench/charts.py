"""The charts of a run: speed by number of clients, and time to first token by load."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from tests.bench.contenders import PEER
from tests.bench.results import Place, Results
from tests.bench.samples import Figures
from tests.bench.scenarios.images import AGAIN

Series = dict[str, list[tuple[float, float]]]
"""Contender → points, in the order of their x."""

_WIDTH_IN, _HEIGHT_IN, _LEGEND_IN = 4.4, 3.3, 0.7
"""Inches: width and height of one chart, height of legend and caption together."""
# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers tell them apart without colour.
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS: Final = "osD^vPX"
STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "mlxq",  # the same ids in every run: drawing the same figures again gives the same file
    "svg.fonttype": "none",  # text stays text
    "figure.facecolor": "white",  # an opaque background is readable on light and on dark pages
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """One line chart.

    Attributes:
        log: whether the y axis is logarithmic.
    """

    model: str
    title: str
    x_label: str
    y_label: str
    series: Series = field(default_factory=dict)
    log: bool = False


def charts(results: Results) -> list[Chart]:
    """The charts that have anything to show, model by model."""
    medians = results.medians()
    models = dict.fromkeys(place.model for place in medians)
    return [chart for model in models for chart in _charts(model, medians) if chart.series]


def svg(results: Results, caption: str) -> str:
    """All charts in one SVG document with one legend; empty if there is nothing to show.

    Args:
        caption: the machine and the date.
    """
    found = charts(results)
    if not found:
        return ""
    out = io.StringIO()
    with style.context(["default", STYLE], after_reset=True):
        draw(found, caption).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def draw(found: Sequence[Chart], caption: str) -> Figure:
    """A row of charts per model."""
    rows = [list(group) for _, group in groupby(found, key=lambda chart: chart.model)]
    columns = max(map(len, rows))
    figure = Figure(
        figsize=(columns * _WIDTH_IN, len(rows) * _HEIGHT_IN + _LEGEND_IN),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08),
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    names = list(dict.fromkeys(name for chart in found for name in chart.series))
    for row, cells in zip(rows, grid, strict=True):
        _draw_row(row, cells, names)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4), frameon=False)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _draw_row(row: Sequence[Chart], cells: Sequence[Axes], names: Sequence[str]) -> None:
    """Neighbours with the same quantity share its scale."""
    for axes in cells[len(row) :]:
        axes.set_axis_off()
    for i, (chart, axes) in enumerate(zip(row, cells, strict=False)):
        if i and chart.y_label == row[i - 1].y_label:
            axes.sharey(cells[i - 1])
        _draw_chart(chart, axes, names)
    for chart, axes in zip(row, cells, strict=False):  # after all lines that share the scale are drawn
        _scale(chart, axes)


def _draw_chart(chart: Chart, axes: Axes, names: Sequence[str]) -> None:
    axes.set_title(f"{chart.model}\n{chart.title}")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    for name, points in chart.series.items():
        index = names.index(name)
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        (line,) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=name)
        line.set_gid(f"{chart.model}: {chart.title}: {name}")


def _scale(chart: Chart, axes: Axes) -> None:
    """Label the measured x values only; space numbers of clients logarithmically."""
    xs = sorted({x for points in chart.series.values() for x, _ in points})
    if chart.x_label == "clients":
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(xs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _charts(model: str, medians: Mapping[Place, Figures]) -> Iterator[Chart]:
    of_model = {place: figures for place, figures in medians.items() if place.model == model}
    yield Chart(model, "speed", "clients", f"tokens/s ÷ {PEER}'s", _ratios(of_model))
    for name in ("p50", "p99"):
        series = _loads(of_model, f"ttft_{name}_s")
        yield Chart(model, f"time to first token, {name}", "load, % of own capacity", "TTFT, seconds", series, log=True)
    for title, again in (("images", False), (AGAIN, True)):
        yield Chart(model, title, "clients", "tokens/s", _images(of_model, again=again))


def _ratios(medians: Mapping[Place, Figures]) -> Series:
    points = []
    for place, figures in medians.items():
        peer = medians.get(Place(place.scenario, place.model, place.case, PEER))
        if place.scenario in ("single", "closed") and peer and peer["tokens_per_s"]:
            points.append((place.who, figures["clients"], figures["tokens_per_s"] / peer["tokens_per_s"]))
    return _series(points)


def _loads(medians: Mapping[Place, Figures], figure: str) -> Series:
    return _series(
        (place.who, round(figures["load"] * 100), figures[figure])
        for place, figures in medians.items()
        if place.scenario == "open" and "load" in figures
    )


def _images(medians: Mapping[Place, Figures], *, again: bool) -> Series:
    return _series(
        (place.who, figures["clients"], figures["tokens_per_s"])
        for place, figures in medians.items()
        if place.scenario == "images" and place.case.endswith(AGAIN) == again
    )


def _series(points: Iterable[tuple[str, float, float]]) -> Series:
    """Points by contender, sorted."""
    series: Series = {}
    for who, x, y in points:
        series.setdefault(who, []).append((x, y))
    return {who: sorted(found) for who, found in series.items()}
