"""Charts as inline SVG: once for wide screens and once for narrow ones, with text alternatives, readable in grey.

Series differ by marker and dash, not by colour alone. Values that a logarithmic axis has no place for stay visible:
zero on the floor, infinity and NaN at the top.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .markup import Markup, element, join, table

WIDTHS = {"wide": 760, "narrow": 340}
HEIGHT = 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 42
DASHES = ("none", "7 4", "2 3", "9 3 2 3")
# Of the markers, around their middle: a circle, a square, a triangle, a diamond.
CORNERS: tuple[tuple[tuple[float, float], ...], ...] = (
    (),
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
)
TICKS = 6  # at most, of an axis
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
MARKED = 60  # series of more points are drawn without markers


@dataclass(frozen=True)
class ChartPoint:
    x: float
    y: float
    label: str  # said on hovering, and in the table
    odd: bool = False  # stands out


@dataclass(frozen=True)
class Series:
    name: str
    points: tuple[ChartPoint, ...]


@dataclass(frozen=True)
class Level:
    """A line across the whole chart."""

    value: float
    label: str


@dataclass(frozen=True)
class Chart:
    """`summary` says in words what the chart shows; `x_label` and `y_label` name the axes."""

    title: str
    summary: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()


def figure(value: float) -> str:
    """A number in few characters: 3.1e-6."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞" if value < 0 else "NaN"
    if 0.01 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else spaced(round(value))
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def spaced(value: int) -> str:
    """A whole number, thousands apart."""
    return f"{value:,}".replace(",", " ")


def line_chart(chart: Chart) -> Markup:
    """Values on a logarithmic axis over numbered places."""
    drawn = (_svg(chart, size, width, _lines(chart, width)) for size, width in WIDTHS.items())
    rows = [(s.name, p.label, figure(p.y)) for s in chart.series for p in s.points]
    return _whole(chart, _legend(chart.series), *drawn, data=table(("series", chart.x_label, chart.y_label), rows))


def bar_chart(chart: Chart) -> Markup:
    """Shares of the values (y, 0 to 1) over decades (x, log10 of a bin's lower edge; its width is that between the
    first two). Levels stand upright, at the log10 of their values."""
    drawn = (_svg(chart, size, width, _bars(chart, width)) for size, width in WIDTHS.items())
    rows = [(p.label, f"{p.y:.2%}") for s in chart.series for p in s.points if p.y]
    return _whole(chart, None, *drawn, data=table((chart.x_label, chart.y_label), rows))


def _whole(chart: Chart, legend: Markup | None, *drawn: Markup, data: Markup) -> Markup:
    return element(
        "figure",
        element("figcaption", element("strong", chart.title), " ", chart.summary),
        legend,
        *drawn,
        element("details", element("summary", "The numbers"), data),
        class_="chart",
    )


def _svg(chart: Chart, size: str, width: int, content: Markup) -> Markup:
    text = f"{chart.title}. {chart.summary}"
    return element(
        "svg",
        content,
        class_=size,
        viewBox=f"0 0 {width} {HEIGHT}",
        role="img",
        aria_label=text,
    )


def _legend(series: tuple[Series, ...]) -> Markup | None:
    if len(series) < 2:
        return None
    items = (
        element(
            "li",
            element(
                "svg",
                _line([(1, 7), (33, 7)], index),
                _marker(17, 7, index, ""),
                viewBox="0 0 34 14",
                class_="key",
                aria_hidden="true",
            ),
            one.name,
        )
        for index, one in enumerate(series)
    )
    return element("ul", *items, class_="legend")


def _lines(chart: Chart, width: int) -> Markup:
    points = [point for one in chart.series for point in one.points]
    low, high = _decades([p.y for p in points] + [level.value for level in chart.levels])
    first, last = min(p.x for p in points), max(p.x for p in points)

    def at_x(x: float) -> float:
        inner = width - LEFT - RIGHT - 16
        return LEFT + 8 + (inner * (x - first) / (last - first) if last > first else inner / 2)

    def at_y(y: float) -> float:
        place = decade(y, low, high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - place) / (high - low)

    levels = join(*(_level(width, at_y(level.value), level.label) for level in chart.levels))
    drawn = []
    for index, one in enumerate(chart.series):
        places = [(at_x(p.x), at_y(p.y)) for p in one.points]
        drawn.append(_line(places, index))
        drawn += [
            _marker(*place, index, f"{one.name}, {p.label}: {figure(p.y)}", odd=p.odd or not math.isfinite(p.y))
            for p, place in zip(one.points, places, strict=True)
            if p.odd or len(one.points) <= MARKED or not math.isfinite(p.y)
        ]
    return join(
        _y_axis(chart, width, low, high, at_y),
        *(_x_tick(at_x(x), f"{x:g}") for x in _whole_numbers(first, last)),
        _x_label(chart.x_label, width),
        levels,
        *drawn,
    )


def _bars(chart: Chart, width: int) -> Markup:
    points = chart.series[0].points
    step = points[1].x - points[0].x
    levels = [level for level in chart.levels if 0 < level.value < math.inf]
    edges = [p.x for p in points if p.y] + [math.log10(level.value) for level in levels]
    low, high = math.floor(min(edges) - step), math.ceil(max(edges) + 2 * step)
    top = max(p.y for p in points) * (1 + 0.08 * (1 + len(levels)))  # room for the labels

    def at_x(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (x - low) / (high - low)

    def at_y(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / top)

    bars = (
        element(
            "rect",
            element("title", f"{p.label}: {p.y:.2%}"),
            x=f"{at_x(p.x) + 0.5:.1f}",
            y=f"{at_y(p.y):.1f}",
            width=f"{max(at_x(p.x + step) - at_x(p.x) - 1, 1):.1f}",
            height=f"{at_y(0) - at_y(p.y):.1f}",
            class_="bar",
        )
        for p in points
        if p.y
    )
    uprights = [
        _upright(at_x(math.log10(level.value)), level.label, width, number) for number, level in enumerate(levels)
    ]
    ticks = join(*(_y_tick(at_y(share), f"{share:.0%}", width) for share in _shares(top)))
    return join(
        _y_label(chart.y_label),
        ticks,
        *(_x_tick(at_x(x), _power(int(x))) for x in _whole_numbers(low, high)),
        _x_label(chart.x_label, width),
        *bars,
        *(line for line, _ in uprights),
        *(label for _, label in uprights),
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


def _y_axis(chart: Chart, width: int, low: int, high: int, at_y: Callable[[float], float]) -> Markup:
    step = max(1, math.ceil((high - low) / TICKS))
    ticks = (_y_tick(at_y(10.0**power), _power(power), width) for power in range(low, high + 1, step))
    return join(_y_label(chart.y_label), *ticks)


def _power(exponent: int) -> str:
    return {0: "1", 1: "10", 2: "100"}.get(exponent, "10" + str(exponent).translate(SUPERSCRIPTS))


def _y_label(text: str) -> Markup:
    return element("text", text, x=2, y=14, class_="axis")


def _y_tick(y: float, text: str, width: int) -> Markup:
    line = element("line", x1=LEFT, x2=width - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid")
    return join(line, element("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))


def _x_tick(x: float, text: str) -> Markup:
    y = HEIGHT - BOTTOM
    line = element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=y, y2=y + 4, class_="tick")
    return join(line, element("text", text, x=f"{x:.1f}", y=y + 17, text_anchor="middle"))


def _x_label(text: str, width: int) -> Markup:
    return element("text", text, x=width - RIGHT, y=HEIGHT - 6, text_anchor="end", class_="axis")


def _level(width: int, y: float, label: str) -> Markup:
    line = element("line", x1=LEFT, x2=width - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level")
    return join(line, element("text", label, x=LEFT + 6, y=f"{y - 5:.1f}", class_="level"))


def _upright(x: float, label: str, width: int, number: int) -> tuple[Markup, Markup]:
    """A line from top to bottom, and its label, on a row of its own and on the side that has room."""
    right = x < width * 0.6
    ends = {"x1": f"{x:.1f}", "x2": f"{x:.1f}", "y1": TOP, "y2": HEIGHT - BOTTOM}
    line = element("line", class_="level", stroke_dasharray=DASHES[number % 4], **ends)
    place = {"x": f"{x + (5 if right else -5):.1f}", "text_anchor": "start" if right else "end"}
    return line, element("text", label, y=TOP + 12 + 15 * number, class_="level", **place)


def _line(places: list[tuple[float, float]], index: int) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return element("polyline", points=points, class_=f"line s{index % 4}", stroke_dasharray=DASHES[index % 4])


def _marker(x: float, y: float, index: int, hint: str, *, odd: bool = False) -> Markup:
    r = 7.0 if odd else 4.0
    title = element("title", hint) if hint else None
    kind = f"mark s{index % 4}" + (" odd" if odd else "")
    corners = CORNERS[index % 4]
    if not corners:
        return element("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=r, class_=kind)
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return element("polygon", title, points=points, class_=kind)
