"""Curves and intervals as SVG geometry: pure functions; `plots.html.j2` draws what they give, in the page's own colours.

A chart is 340 units wide so that its labels can be read on a phone; pages put several beside one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 8, 36  # room around the axes for ticks and labels
STRIP = 150, 18  # width and height of an interval's strip
COLOURS = 8
"""Styles of lines; a ninth begins again, with dashes."""

Limits = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, lower, right and upper end."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a series.

    Args:
        x: On the horizontal axis.
        y: None where there is none: the line is broken there.
        told: What is said of it when it is pointed at; without it there is no dot.
        low: Lower end of its interval; None, as `high`, without one.
        high: See `low`.
        weak: Whether few stand behind it; such a point is hollow.
    """

    x: float
    y: float | None
    told: str
    low: float | None = None
    high: float | None = None
    weak: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """A line.

    Args:
        name: Of whose it is.
        style: `style(k)`, or `real` for real people.
        points: From left to right; without a line, in any order.
        line: Whether they are joined.
        bars: Whether intervals are a bar at each point, not a band along the line.
    """

    name: str
    style: str
    points: Sequence[Point]
    line: bool = True
    bars: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """A line as it is drawn: SVG paths of it and of its intervals, and `(x, y, hollow, told)` of its points."""

    name: str
    style: str
    path: str
    band: str
    dots: Sequence[tuple[float, float, bool, str]]
    bars: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines with their axes; ticks are `(position, label)`, shades SVG paths below the lines, the key name and style."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    curves: Sequence[Curve]
    note: str = ""
    shades: Sequence[str] = ()
    key: Sequence[tuple[str, str]] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Strip:
    """An interval as it is drawn, in units of `STRIP`; `mean` and `zero` None where they are not on it."""

    low: float | None
    high: float | None
    mean: float | None
    zero: float | None
    width: int = STRIP[0]
    height: int = STRIP[1]


def style(index: int) -> str:
    """The class of the k-th line.

    Example:
        >>> style(0), style(8)
        ('s0', 's0 again')
    """
    return f"s{index % COLOURS}" + (" again" if index >= COLOURS else "")


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within the limits.

    Args:
        low: Lower limit.
        high: Upper limit, above `low`.
        most: At most so many of them, and one.
        whole: Whether only whole numbers will do.

    Example:
        >>> ticks(0, 100), ticks(1, 4, whole=True)
        ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [1.0, 2.0, 3.0, 4.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= (high - low) * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 10) + 0.0 for k in range(first, last + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    x_limits: Limits | None = None,
    y_limits: Limits | None = None,
    whole: bool = True,
    note: str = "",
    shades: Sequence[Sequence[Box]] = (),
    key: Sequence[tuple[str, str]] = (),
) -> Chart | None:
    """A line chart; None where there is nothing to draw.

    Args:
        title: Above it.
        series: Drawn in order, the last on top.
        labels: Of the horizontal and the vertical axis.
        x_limits: Default: of the points.
        y_limits: Default: of the points and their intervals, and 0.
        whole: Whether the horizontal axis counts something.
        note: Below it.
        shades: Boxes below the lines, shade upon shade.
        key: Name and style of lines that the page's own key does not explain.
    """
    shown = [point for one in series for point in one.points if _finite(point.y)]
    if not shown:
        return None
    left, right = _wide(x_limits or _limits(point.x for point in shown))
    low, high = _wide(y_limits or _limits([0.0, *(v for p in shown for v in (p.y, p.low, p.high) if v is not None)]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left)
        up = (min(max(y, low), high) - low) / (high - low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    def curve(one: Series) -> Curve:
        points = [(point, *place(point.x, point.y)) for point in one.points if point.y is not None and _finite(point.y)]
        known = [point for point in one.points if _finite(point.low) and _finite(point.high)]
        upper = [place(point.x, point.high or 0.0) for point in known]
        lower = [place(point.x, point.low or 0.0) for point in known]
        band = "M" + "L".join(f"{x:g} {y:g}" for x, y in upper + lower[::-1]) + "z" if len(known) > 1 else ""
        bars = "".join(f"M{x:g} {high:g}V{low:g}" for (x, high), (_, low) in zip(upper, lower, strict=True))
        return Curve(
            one.name,
            one.style,
            _path(one.points, place) if one.line else "",
            "" if one.bars else band,
            [(x, y, point.weak, point.told) for point, x, y in points if point.told],
            bars if one.bars else "",
        )

    def shade(boxes: Sequence[Box]) -> str:
        ends = ((*place(x0, y0), *place(x1, y1)) for x0, y0, x1, y1 in boxes)
        return "".join(f"M{x0:g} {y0:g}H{x1:g}V{y1:g}H{x0:g}z" for x0, y0, x1, y1 in ends)

    return Chart(
        title,
        *labels,
        [(place(x, low)[0], f"{x:g}") for x in ticks(left, right, whole=whole)],
        [(place(left, y)[1], f"{y:g}") for y in ticks(low, high)],
        [curve(one) for one in series if any(_finite(point.y) for point in one.points)],
        note,
        [shade(boxes) for boxes in shades],
        key,
    )


def _path(points: Sequence[Point], place: Callable[[float, float], tuple[float, float]]) -> str:
    path, broken = "", True
    for point in points:
        if point.y is None or not _finite(point.y):
            broken = True
            continue
        x, y = place(point.x, point.y)
        path += f"{'M' if broken else 'L'}{x:g} {y:g}"
        broken = False
    return path


def strips(values: Sequence[tuple[float | None, Sequence[float] | None]]) -> list[Strip]:
    """Means with intervals on one scale that 0 is on; nothing of a mean that is not known.

    Example:
        >>> strips([(10.0, (-5.0, 15.0)), (None, None)])[0]
        Strip(low=5.0, high=145.0, mean=110.0, zero=40.0, width=150, height=18)
    """
    known = [v for mean, ends in values for v in (mean, *(ends or ())) if v is not None and _finite(v)]
    low, high = _wide(_limits([0.0, *known]))
    room = STRIP[0] - 10

    def at(value: float | None) -> float | None:
        return None if value is None or not _finite(value) else round(5 + room * (value - low) / (high - low), 1)

    return [Strip(*((at(ends[0]), at(ends[1])) if ends else (None, None)), at(mean), at(0.0)) for mean, ends in values]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _limits(values: Iterable[float]) -> Limits:
    known = [value for value in values if math.isfinite(value)]
    return min(known), max(known)


def _wide(limits: Limits) -> Limits:
    """Limits with something between them."""
    low, high = limits
    return (low, high) if high > low else (low - 0.5, high + 0.5)
