"""Line charts as SVG, by hand: static, small, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

WIDTH: Final = 460
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 40, 44
# Colours that can be told apart by people who see few of them (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_FONT = 'font-family="system-ui, sans-serif" font-size="11" fill="#333"'


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled chart; series by name, each a line in the order of its points.

    Attributes:
        log: whether the y axis is logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Points] = field(default_factory=dict)
    log: bool = False


def document(charts: Sequence[Chart], columns: int) -> str:
    """All charts in one picture, with one legend: a name has the same colour everywhere."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.series))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    rows = math.ceil(len(charts) / columns)
    width, height = columns * WIDTH, rows * HEIGHT + 30
    body = [
        f'<g transform="translate({i % columns * WIDTH} {i // columns * HEIGHT})">{_chart(chart, colours)}</g>'
        for i, chart in enumerate(charts)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" {_FONT}>\n<rect width="{width}" height="{height}" fill="#fff"/>\n'
        + "\n".join([*body, _legend(colours, rows * HEIGHT)])
        + "\n</svg>\n"
    )


def _legend(colours: dict[str, str], y: int) -> str:
    x, parts = _LEFT, []
    for name, colour in colours.items():
        parts.append(f'<rect x="{x}" y="{y + 6}" width="14" height="4" fill="{colour}"/>')
        parts.append(_text(x + 19, y + 12, name))
        x += 34 + 7 * len(name)
    return "".join(parts)


def _chart(chart: Chart, colours: dict[str, str]) -> str:
    points = [point for line in chart.series.values() for point in line]
    if not points:
        return _text(_LEFT, _TOP, f"{chart.title}: nothing was measured")
    frame = _Frame.around(points, log=chart.log)
    lines = (_line(points, colours[name], frame) for name, points in chart.series.items())
    return "".join(
        [
            _text(_LEFT, 20, chart.title, 'font-weight="600"'),
            _text(_LEFT, 34, chart.y_label),
            _text(WIDTH - _RIGHT, HEIGHT - 8, chart.x_label, 'text-anchor="end"'),
            *frame.axes(sorted({x for x, _ in points})),
            *lines,
        ]
    )


def _line(points: Points, colour: str, frame: _Frame) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


@dataclass(frozen=True, slots=True)
class _Frame:
    """From values to places."""

    low_x: float
    high_x: float
    ticks: list[float]
    log: bool

    @classmethod
    def around(cls, points: Iterable[tuple[float, float]], *, log: bool) -> _Frame:
        xs, ys = zip(*points, strict=True)
        ticks = log_ticks(min(ys), max(ys)) if log else even_ticks(max(ys))
        return cls(min(xs), max(xs), ticks, log)

    def x(self, value: float) -> float:
        part = (value - self.low_x) / (self.high_x - self.low_x) if self.high_x > self.low_x else 0.5
        return _LEFT + 12 + part * (WIDTH - _LEFT - _RIGHT - 24)

    def y(self, value: float) -> float:
        low, high, value = (self._scaled(each) for each in (self.ticks[0], self.ticks[-1], value))
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.ticks[0])) if self.log else value

    def axes(self, xs: list[float]) -> list[str]:
        across = (
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}" '
            f'stroke="#ddd"/>{_text(_LEFT - 6, self.y(tick) + 4, f"{tick:g}", _END)}'
            for tick in self.ticks
        )
        return [*across, *(_text(self.x(x), HEIGHT - _BOTTOM + 16, f"{x:g}", _MIDDLE) for x in xs)]


_END = 'text-anchor="end"'
_MIDDLE = 'text-anchor="middle"'


def even_ticks(high: float) -> list[float]:
    """From 0 to at least `high`, in four to eight round steps."""
    if high <= 0:
        return [0.0, 1.0]
    size = 10.0 ** math.floor(math.log10(high / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if high / (size * factor) <= 8)
    return [round(i * step, 10) for i in range(math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the values."""
    low = max(low, 1e-6)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(max(high, low)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _text(x: float, y: float, said: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(said)}</text>'
