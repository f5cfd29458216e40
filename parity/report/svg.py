"""Lays charts out: where lines, markers, bars, ticks and labels are, for wide screens and for narrow ones.

`data/chart.html` writes the shapes as inline SVG. Series differ by marker and dash, so they can be told apart in grey.
A logarithmic axis keeps every value visible: zero at its foot, infinity and NaN at its top.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .figures import figure, power_of_ten

WIDTHS = {"wide": 760, "narrow": 340}
HEIGHT = 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42
KINDS = 4  # of markers and dashes; a fifth series looks like the first
# The corners of each kind of marker around its middle; none for the circle, then a square, a triangle, a diamond.
CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
)
TICKS = 6  # the most ticks of an axis
MARKED = 60  # series of more points have markers at odd points only


class ChartPoint(NamedTuple):
    x: float
    y: float
    label: str  # shown on hovering, and in the table
    odd: bool = False  # marked as a fault


class Series(NamedTuple):
    name: str
    points: tuple[ChartPoint, ...]


class Level(NamedTuple):
    """A line across the whole chart."""

    value: float
    label: str


class Tick(NamedTuple):
    at: float
    text: str


class Line(NamedTuple):
    """A series' line; `points` is the attribute of an SVG polyline."""

    points: str
    kind: int


class Marker(NamedTuple):
    """A point of a series. `corners` is the attribute of an SVG polygon, and empty for a circle."""

    x: float
    y: float
    radius: float
    kind: int
    corners: str
    hint: str = ""
    odd: bool = False


class ChartBar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    hint: str


class Upright(NamedTuple):
    """A level of a bar chart: a vertical line, and its label at `text_at`, which starts or ends there."""

    x: float
    label: str
    text_at: float
    anchor: str


@dataclass(frozen=True)
class Drawing:
    """A chart laid out for one width of the screen, in the units of its viewBox."""

    size: str
    width: int
    y_ticks: list[Tick]
    x_ticks: list[Tick]
    levels: list[Tick]
    lines: list[Line]
    markers: list[list[Marker]]  # of each line
    bars: list[ChartBar]
    uprights: list[Upright]


@dataclass(frozen=True)
class Chart:
    """Values on a logarithmic axis over numbered places, or with `bars` shares of values (y, 0 to 1) over decades.

    `summary` describes the chart in words; `x_label` and `y_label` name the axes. In a bar chart, x is log10 of a
    bin's lower edge. All bins are as wide as the first. Levels are vertical, at log10 of their values."""

    title: str
    summary: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()
    bars: bool = False

    @property
    def drawings(self) -> list[Drawing]:
        draw = _bar_drawing if self.bars else _line_drawing
        return [draw(self, size, width) for size, width in WIDTHS.items()]

    @property
    def legend(self) -> list[tuple[str, Line, Marker]]:
        """Name, line and marker of each series; empty for a single series."""
        names = [one.name for one in self.series] if len(self.series) > 1 else []
        return [(name, _line([(1, 7), (33, 7)], n), _marker(17, 7, n)) for n, name in enumerate(names)]

    @property
    def columns(self) -> tuple[str, ...]:
        """The head of the chart's table."""
        return (*(() if self.bars else ("series",)), self.x_label, self.y_label)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The chart's points as rows of its table."""
        if self.bars:
            return [(p.label, f"{p.y:.2%}") for one in self.series for p in one.points if p.y]
        return [(one.name, p.label, figure(p.y)) for one in self.series for p in one.points]


def _line_drawing(chart: Chart, size: str, width: int) -> Drawing:
    points = [point for one in chart.series for point in one.points]
    low, high = _decades([p.y for p in points] + [level.value for level in chart.levels])
    first, last = min(p.x for p in points), max(p.x for p in points)

    def at_x(x: float) -> float:
        inner = width - LEFT - RIGHT - 16
        return LEFT + 8 + (inner * (x - first) / (last - first) if last > first else inner / 2)

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - decade(y, low, high)) / (high - low)

    step = max(1, math.ceil((high - low) / TICKS))
    return Drawing(
        size,
        width,
        y_ticks=[Tick(at_y(10.0**power), power_of_ten(power)) for power in range(low, high + 1, step)],
        x_ticks=[Tick(at_x(x), f"{x:g}") for x in _whole_numbers(first, last)],
        levels=[Tick(at_y(level.value), level.label) for level in chart.levels],
        lines=[_line([(at_x(p.x), at_y(p.y)) for p in one.points], n) for n, one in enumerate(chart.series)],
        markers=[_markers(one, n, at_x, at_y) for n, one in enumerate(chart.series)],
        bars=[],
        uprights=[],
    )


def _bar_drawing(chart: Chart, size: str, width: int) -> Drawing:
    points = chart.series[0].points
    step = points[1].x - points[0].x
    levels = [level for level in chart.levels if 0 < level.value < math.inf]
    edges = [p.x for p in points if p.y] + [math.log10(level.value) for level in levels]
    low, high = math.floor(min(edges) - step), math.ceil(max(edges) + 2 * step)
    top = max(p.y for p in points) * (1 + 0.08 * (1 + len(levels)))  # leaves room for the labels

    def at_x(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (x - low) / (high - low)

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / top)

    def bar(p: ChartPoint) -> ChartBar:
        left, right = at_x(p.x), at_x(p.x + step)
        return ChartBar(left + 0.5, at_y(p.y), max(right - left - 1, 1), at_y(0) - at_y(p.y), f"{p.label}: {p.y:.2%}")

    return Drawing(
        size,
        width,
        y_ticks=[Tick(at_y(share), f"{share:.0%}") for share in _shares(top)],
        x_ticks=[Tick(at_x(x), power_of_ten(int(x))) for x in _whole_numbers(low, high)],
        levels=[],
        lines=[],
        markers=[],
        bars=[bar(p) for p in points if p.y],
        uprights=[_upright(at_x(math.log10(level.value)), level.label, width) for level in levels],
    )


def _shares(top: float) -> list[float]:
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5) if top / s <= TICKS), 1.0)
    return [index * step for index in range(int(top / step) + 1)]


def _decades(values: list[float]) -> tuple[int, int]:
    """The decades that the axis spans, at least two."""
    logs = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    low, high = math.floor(min(logs) - 0.3), math.ceil(max(logs) + 0.2)
    return low, max(high, low + 2)


def decade(value: float, low: int, high: int) -> float:
    """log10 of a value, within the axis: zero and less at its foot, infinity and NaN at its top."""
    if not math.isfinite(value):
        return high
    return min(max(math.log10(value), low), high) if value > 0 else low


def _whole_numbers(first: float, last: float) -> list[float]:
    start, stop = math.ceil(first), math.floor(last)
    step = next((n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if (stop - start) / n <= 8), 1000)
    return [float(x) for x in range(start, stop + 1) if (x - (0 if step > 1 else start)) % step == 0]


def _upright(x: float, label: str, width: int) -> Upright:
    """The label is on the side of the line that has room."""
    return Upright(x, label, x + 5, "start") if x < width * 0.6 else Upright(x, label, x - 5, "end")


def _line(places: list[tuple[float, float]], index: int) -> Line:
    return Line(" ".join(f"{x:.1f},{y:.1f}" for x, y in places), index % KINDS)


def _markers(
    series: Series, index: int, at_x: Callable[[float], float], at_y: Callable[[float], float]
) -> list[Marker]:
    found = []
    for p in series.points:
        odd = p.odd or not math.isfinite(p.y)
        if odd or len(series.points) <= MARKED:
            found.append(_marker(at_x(p.x), at_y(p.y), index, f"{series.name}, {p.label}: {figure(p.y)}", odd=odd))
    return found


def _marker(x: float, y: float, index: int, hint: str = "", *, odd: bool = False) -> Marker:
    radius, kind = 7.0 if odd else 4.0, index % KINDS
    corners = " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in CORNERS[kind])
    return Marker(x, y, radius, kind, corners=corners, hint=hint, odd=odd)
