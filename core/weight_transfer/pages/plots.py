"""Lines over logarithmic axes, as the places of what is drawn in an SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import attrs

WIDTH, HEIGHT = 360, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 34
_STEPS = (1, 2, 5)


@attrs.frozen
class Line:
    """What is measured at each point.

    Attributes:
        name: for the legend and the points.
        points: ``(x, y)``, both above 0, in rising order of x.
        colour: number of its colour.
        dashed: whether it is one that others are compared with.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@attrs.frozen
class Tick:
    """A place on an axis."""

    at: float
    text: str


@attrs.frozen
class Drawn:
    """A line's places: ``path`` for SVG, and each point as ``(x, y, text)``."""

    line: Line
    path: str
    points: list[tuple[float, float, str]]


@attrs.frozen
class Plot:
    """A plot of `WIDTH` x `HEIGHT`; its axes cross at ``left`` and ``bottom``."""

    label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Drawn]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def plot(label: str, lines: Sequence[Line], x_text: Callable[[float], str], y_text: Callable[[float], str]) -> Plot:
    """Place lines, of which there is at least one with a point.

    Args:
        label: what the plot shows, for those who do not see it.
        lines: what is drawn.
        x_text: says a value of the horizontal axis.
        y_text: says one of the vertical axis.
    """
    xs, ys = _values(lines, 0), _values(lines, 1)
    x_at, y_at = _scale(xs, _LEFT, WIDTH - _RIGHT), _scale(ys, HEIGHT - _BOTTOM, _TOP)
    drawn = []
    for line in lines:
        points = [(x_at(x), y_at(y), f"{line.name}: {y_text(y)} at {x_text(x)}") for x, y in line.points]
        drawn.append(Drawn(line, " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points), points))
    x_ticks = [Tick(x_at(x), _short(x_text(x))) for x in xs if x == xs[0] or x == xs[-1] or _is_decade(x)]
    return Plot(label, x_ticks, [Tick(y_at(y), _short(y_text(y))) for y in ys], drawn)


def _short(text: str) -> str:
    """Return a figure without the zeros that end it behind its point: ``50.0 ms`` is ``50 ms``."""
    return re.sub(r"\.0+(?= |$)|(?<=\.)(\d*[1-9])0+(?= |$)", r"\1", text)


def _values(lines: Sequence[Line], axis: int) -> list[float]:
    """Return round values from below the least to above the largest: decades, or if these are few, steps of them."""
    values = [point[axis] for line in lines for point in line.points]
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = _STEPS if math.log10(high / low) < 1.7 else _STEPS[:1]
    round_values = [step * 10.0**decade for decade in decades for step in steps]
    first = max((value for value in round_values if value <= low * 1.001), default=round_values[0])
    last = min((value for value in round_values if value >= high * 0.999), default=round_values[-1])
    chosen = [value for value in round_values if first <= value <= last]
    return chosen if len(chosen) > 1 else [first, first * 10]


def _is_decade(value: float) -> bool:
    exponent = math.log10(value)
    return abs(exponent - round(exponent)) < 1e-9


def _scale(values: Sequence[float], begin: float, end: float) -> Callable[[float], float]:
    low, span = math.log10(values[0]), math.log10(values[-1] / values[0])
    return lambda value: round(begin + (end - begin) * (math.log10(value) - low) / span, 2)
