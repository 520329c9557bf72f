"""A part of the report: what was measured under which conditions, its pictures, its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bench.prices import usd
from bench.reporting.charts import Chart
from bench.results import Result

WIDE, NARROW = 560, 372  # widths that charts are drawn at, for large and small screens


@dataclasses.dataclass(frozen=True)
class Figure:
    """draw(width) gives the picture at WIDE, at NARROW, or (`broad`) at twice the room. name: of an exported file."""

    name: str
    title: str
    draw: Callable[[int], Chart]
    broad: bool = False


@dataclasses.dataclass(frozen=True)
class Scenario:
    """For the what-if sliders. seconds: of the device for a million tokens, 3:1, busy. price: US$ a device-hour, null
    where none is known."""

    label: str
    conditions: str
    seconds: float
    price: float | None
    utilisation: float | None


@dataclasses.dataclass(frozen=True)
class Section:
    """`conditions`: what every figure in it has to stand beside."""

    key: str
    title: str
    conditions: str
    figures: Sequence[Figure]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    scenarios: Sequence[Scenario] = ()


def subject(result: Result) -> str:
    """ "SmolLM2-135M-Instruct (Q4_1) on cpu (2 threads)"."""
    quantization = f" ({result.quantization})" if result.quantization else ""
    return f"{result.model or 'No model'}{quantization} on {result.device}"


def price_words(result: Result) -> str:
    price = result.price
    if price is None:
        return "no price was given, so there is no US$ figure"
    origin = ", ".join(part for part in (price.name, price.date, price.source) if part)
    return f"US${price.usd_per_device_hour:g} a device-hour ({origin})"


def money(value: float | None) -> str:
    return "–" if value is None else usd(value)


def share(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def is_cpu(result: Result) -> bool:
    return not any(name in result.device for name in ("NVIDIA", "Tesla", "GeForce"))
