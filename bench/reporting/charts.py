"""Charts as SVG text. Colours are CSS variables (charts.css), so that one picture serves a light and a dark page."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import math
from collections.abc import Callable, Iterable, Sequence

Point = tuple[float, float]
MARKERS = 6  # shapes and colours of series; after these they repeat
CHARACTER = 7.0  # mean width in units of the SVG, at the font size of charts.css
TOP, RIGHT, BOTTOM, LEFT = 14, 16, 44, 54  # margins


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(digits, 12)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def nice(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from below `low` to above `high`."""
    rough = (high - low or abs(high) or 1.0) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


@dataclasses.dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with marks at `ticks`."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False
    write: Callable[[float], str] = number

    @staticmethod
    def linear(label: str, values: Iterable[float], write: Callable[[float], str] = number) -> Axis:
        """From 0."""
        ticks = nice(0.0, max([*values, 0.0]) or 1.0)
        return Axis(label, ticks[0], ticks[-1], ticks, write=write)

    @staticmethod
    def logarithmic(label: str, values: Iterable[float], write: Callable[[float], str] = number) -> Axis:
        """A little beyond the smallest and the largest value, all of which must be above 0."""
        known = list(values)
        low, high = min(known) / 1.35, max(known) * 1.35
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1,) if math.log10(high / low) > 3 else (1, 3) if math.log10(high / low) > 1.6 else (1, 2, 5)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return Axis(label, low, high, [tick for tick in ticks if low <= tick <= high], True, write)

    @staticmethod
    def of(label: str, values: Sequence[float]) -> Axis:
        """Logarithmic, with marks at the values themselves: concurrencies."""
        return Axis(label, min(values) / 1.25, max(values) * 1.25, sorted(set(values)), True)

    def share(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Chart:
    """Something drawn: `parts` are SVG elements; `about` is what a screen reader says."""

    def __init__(self, width: int, height: float, about: str):
        self.width, self.height, self.about = width, height, about
        self.parts: list[str] = []

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {self.width} {self.height:g}" '
            f'role="img" aria-label="{escape(self.about)}">{"".join(self.parts)}</svg>'
        )

    def standalone(self) -> str:
        """A file of its own, on a ground of its own."""
        css = importlib.resources.files("bench.reporting").joinpath("charts.css").read_text(encoding="utf-8")
        size = f'width="{self.width}" height="{self.height:g}" viewBox'
        ground = f"<style>{css}</style>" + '<rect class="ground" width="100%" height="100%"/>'
        head, body = self.svg().replace("viewBox", size, 1).split(">", 1)
        return f"{head}>{ground}{body}\n"

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{place}>{escape(text)}</text>')

    def path(self, points: Sequence[Point], kind: str, close: bool = False) -> None:
        joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{joined}{"Z" if close else ""}" class="{kind}"/>')

    def rule(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.path([(x1, y1), (x2, y2)], kind)

    def bar(self, x: float, y: float, width: float, height: float, kind: str, tip: str) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" height="{height:g}" class="{kind}">'
            f"<title>{escape(tip)}</title></rect>"
        )

    def dot(self, x: float, y: float, series: int, tip: str = "") -> None:
        """A mark whose shape and colour tell the series."""
        kind, r = f"s{series % MARKERS} dot", 4.5
        shapes = [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" class="{kind}">',
            f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" class="{kind}">',
            f'<path d="M{x:.1f} {y - 5.4:.1f}l5.2 9h-10.4z" class="{kind}">',
            f'<path d="M{x:.1f} {y - 5.6:.1f}l5.6 5.6-5.6 5.6-5.6-5.6z" class="{kind}">',
            f'<path d="M{x:.1f} {y + 5.4:.1f}l5.2-9h-10.4z" class="{kind}">',
            f'<path d="M{x - 5:.1f} {y - 1.7:.1f}h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z" class="{kind}">',
        ]
        shape = shapes[series % MARKERS]
        self.parts.append(shape + (f"<title>{escape(tip)}</title>" if tip else "") + f"</{shape[1:].split(' ', 1)[0]}>")

    def legend(self, names: Sequence[str], y: float, left: float = LEFT, mark: str = "dot") -> float:
        """In as many lines as it takes; -> the y below it."""
        x = left
        for series, name in enumerate(names):
            width = 30 + CHARACTER * len(name)
            if x > left and x + width > self.width - 4:
                x, y = left, y + 19
            if mark == "dot":
                self.dot(x + 6, y, series)
            else:
                self.bar(x, y - 6, 12, 12, f"{mark}{series}", name)
            self.text(x + 17, y + 4, name)
            x += width
        return y + 19


class Plot(Chart):
    """A chart with two axes; lines and dots are given in values."""

    def __init__(
        self, width: int, height: float, about: str, x: Axis, y: Axis, names: Sequence[str] = (), ticks: bool = True
    ):
        super().__init__(width, height, about)
        self.x, self.y = x, y
        self.left = max(30.0, 14 + CHARACTER * max((len(y.write(tick)) for tick in y.ticks), default=0))
        self.top = (self.legend(names, TOP + 2, 6) if names else TOP) + 20
        self.text(4, self.top - 9, y.label, "label")
        for tick in y.ticks:
            at = self.at(x.low, tick)[1]
            self.rule(self.left, at, width - RIGHT, at, "grid")
            self.text(self.left - 6, at + 4, y.write(tick), "tick", "end")
        last = -math.inf
        for tick in x.ticks if ticks else ():
            at = self.at(tick, y.low)[0]
            half = CHARACTER * len(x.write(tick)) / 2 + 3
            if at - half > last and at + half < width:
                self.text(at, height - BOTTOM + 18, x.write(tick), "tick", "middle")
                last = at + half
            self.rule(at, height - BOTTOM, at, height - BOTTOM + 4, "axis")
        self.rule(self.left, height - BOTTOM, width - RIGHT, height - BOTTOM, "axis")
        self.text((self.left + width - RIGHT) / 2, height - 6, x.label, "label", "middle")

    def at(self, x: float, y: float) -> Point:
        """Where the values lie in the picture."""
        return (
            self.left + self.x.share(x) * (self.width - RIGHT - self.left),
            self.height - BOTTOM - self.y.share(y) * (self.height - BOTTOM - self.top),
        )

    def curve(self, points: Sequence[Point], series: int, tips: Sequence[str] = (), kind: str = "line") -> None:
        """A line, with a dot at each point if there are tips."""
        places = [self.at(*point) for point in points]
        if len(places) > 1:
            self.path(places, f"s{series % MARKERS} {kind}")
        for place, tip in zip(places, tips, strict=False):
            self.dot(*place, series, tip)

    def level(self, value: float, label: str, kind: str = "mark") -> None:
        """A horizontal line across, with its name above it; left out where it is outside."""
        if self.y.low <= value <= self.y.high:
            at = self.at(self.x.low, value)[1]
            self.rule(self.left, at, self.width - RIGHT, at, kind)
            self.text(self.width - RIGHT, at - 4, label, "marked", "end")
