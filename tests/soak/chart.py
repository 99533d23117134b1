"""The chart of a run: memory, descriptors and threads of every process, and the memory of Redis, over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tests.bench.charts import STYLE
from tests.soak.sampler import ProcessSample, Samples

_PANELS: Final = (
    ("rss_mb", "resident memory, MB"),
    ("descriptors", "open descriptors"),
    ("threads", "threads"),
)
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_LINES: Final = ("-", "--", ":")
_MAX_POINTS: Final = 60
"""Points of a line; of more, every n-th is drawn."""
_WIDTH_IN, _HEIGHT_IN, _LEGEND_IN = 10.0, 2.4, 1.2


def svg(samples: Samples, caption: str) -> str:
    """Draw the samples as an SVG document.

    Args:
        caption: the machine and the date.
    """
    out = io.StringIO()
    with style.context(["default", STYLE], after_reset=True):
        _draw(samples, caption).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _draw(samples: Samples, caption: str) -> Figure:
    rows = len(_PANELS) + 1
    figure = Figure(
        figsize=(_WIDTH_IN, rows * _HEIGHT_IN + _LEGEND_IN), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    )
    *panels, redis = figure.subplots(rows, 1, sharex=True)
    for (name, label), axes in zip(_PANELS, panels, strict=True):
        _draw_processes(samples, name, label, axes)
    _draw_redis(samples, redis)
    handles, labels = panels[0].get_legend_handles_labels()
    by_role = dict(zip(labels, handles, strict=True))
    figure.legend(by_role.values(), by_role.keys(), loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _draw_processes(samples: Samples, name: str, label: str, axes: Axes) -> None:
    """Draw a line for each process. Those with the same role have the same colour; a restart ends a line."""
    roles = sorted({instance.role for instance, _ in samples.of_stack()})
    for instance, taken in samples.of_stack():
        index = roles.index(instance.role)
        colour, dashes = _COLOURS[index % len(_COLOURS)], _LINES[index // len(_COLOURS) % len(_LINES)]
        axes.plot(*_points(taken, name), color=colour, linestyle=dashes, linewidth=1, label=instance.role)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)


def _points(taken: Sequence[ProcessSample], name: str) -> tuple[list[float], list[float]]:
    drawn = taken[:: -(-len(taken) // _MAX_POINTS)]
    return [each.at_s / 60 for each in drawn], [float(getattr(each, name)) for each in drawn]


def _draw_redis(samples: Samples, axes: Axes) -> None:
    drawn = samples.redis[:: -(-len(samples.redis) // _MAX_POINTS)]
    minutes = [each.at_s / 60 for each in drawn]
    axes.plot(minutes, [each.used_mb for each in drawn], color=_COLOURS[0], linewidth=1, label="all")
    without = [each.used_mb - each.kept_mb for each in drawn]
    axes.plot(minutes, without, color=_COLOURS[1], linewidth=1, label="without webhook deliveries and batches")
    axes.set_ylabel("memory of Redis, MB")
    axes.set_xlabel("minutes")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
