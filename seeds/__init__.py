"""Facts that the project is measured against: the articles' price points and figures, and what devices cost.

They are data (prices.toml) with their provenance; README.md is the digest of the articles. Read through
importlib.resources, so that they are found in a wheel and in a clone alike.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import math
import tomllib
from typing import Any, TypeVar


@dataclasses.dataclass(frozen=True)
class ApiPrice:
    """What a million tokens cost at an API, in US$, as `articles` state it; `label` is the articles' own name."""

    key: str
    label: str
    usd_per_million_tokens: float
    articles: list[str]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """Any other number of the articles."""

    key: str
    label: str
    value: float
    unit: str
    articles: list[str]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class DevicePrice:
    """US$ per hour of one device on demand; `low` and `high` are the marks between which offers lie, where known.

    memory_gb (10^9 bytes), bandwidth_gb_s and bf16_tflops (dense): what the maker's data sheet gives, not measured.
    """

    key: str
    label: str
    usd_per_hour: float
    date: str
    source: str
    low: float | None = None
    high: float | None = None
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    bf16_tflops: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """All of prices.toml, by key."""

    apis: dict[str, ApiPrice]
    figures: dict[str, Figure]
    devices: dict[str, DevicePrice]


Row = TypeVar("Row", ApiPrice, Figure, DevicePrice)


@functools.cache
def load() -> Seeds:
    """The facts that ship with this version."""
    return parse(importlib.resources.files("seeds").joinpath("prices.toml").read_text(encoding="utf-8"))


def parse(text: str) -> Seeds:
    """The facts in `text` (TOML). ValueError names the row and the field that is wrong."""
    tables = tomllib.loads(text)
    if unknown := sorted(tables.keys() - {"api", "figure", "device"}):
        raise ValueError(f"unknown tables {', '.join(unknown)}; allowed are api, figure and device")
    return Seeds(
        apis=_rows(ApiPrice, "api", tables.get("api", [])),
        figures=_rows(Figure, "figure", tables.get("figure", [])),
        devices=_rows(DevicePrice, "device", tables.get("device", [])),
    )


def _rows(kind: type[Row], table: str, entries: list[dict[str, Any]]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for position, entry in enumerate(entries, start=1):
        where = f"[[{table}]] {entry.get('key', position)}"
        try:
            row = kind(**entry)
        except TypeError as error:  # its message names the field that is missing or unknown
            raise ValueError(f"{where}: {error}") from None
        if row.key in rows:
            raise ValueError(f"{where}: the key is there twice")
        for field in dataclasses.fields(row):
            _check(where, field.name, str(field.type), getattr(row, field.name))
        rows[row.key] = row
    return rows


def _check(where: str, name: str, kind: str, value: object) -> None:
    if "float" in kind:
        if value is None and "None" in kind:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{where}: {name} must be a number above 0, not {value!r}")
    elif kind == "list[str]":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{where}: {name} must be a list of one or more article keys, not {value!r}")
    elif not isinstance(value, str) or (not value and name != "note"):
        raise ValueError(f"{where}: {name} must be text, not {value!r}")
