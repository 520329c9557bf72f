"""What a device costs an hour, and what that makes of a million tokens. docs/cost.md defines every term."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

import seeds
from engine.errors import FenError

if TYPE_CHECKING:
    from engine.messages import LedgerSnapshot

USE = ("prompt", "cached_prompt", "decode")  # what finished replies are made of
WASTE = ("padding", "recompute", "rejected_draft", "aborted")
WORK = (*USE, *WASTE, "host")
BASES = ("direct", "busy", "wall")


@dataclasses.dataclass(frozen=True)
class Price:
    """US$ per hour of one device, and where that comes from."""

    usd_per_device_hour: float
    name: str
    date: str
    source: str

    @property
    def per_second(self) -> float:
        return self.usd_per_device_hour / 3600


def parse_price(text: str) -> Price:
    """`--price`: a number (US$ per device-hour) or the key of a device in seeds/prices.toml. Raises FenError."""
    devices = seeds.load().devices
    if text in devices:
        return _of_device(devices[text])
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise FenError(
            f"--price is {text!r}; it must be a number above 0, in US$ per device-hour, or one of {', '.join(devices)}"
        )
    return Price(value, "given", "", "--price")


def price_of(device: str) -> Price | None:
    """The price of a GPU by its driver's name, such as "NVIDIA H100 80GB HBM3". None for a CPU: it must be given."""
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    for row in seeds.load().devices.values():
        if set(row.label.lower().split()) <= words:
            return _of_device(row)
    return None


def no_price(device: str) -> str:
    """The reason for a US$ field that is null."""
    return f"no price is known for the device {device!r}; --price sets one (US$ per device-hour, or cpu-4vcpu)"


def per_million(ledger: LedgerSnapshot, price: Price) -> dict[str, dict[str, float | None]]:
    """US$ per million tokens by basis and phase; null where there are no tokens yet."""
    seconds, tokens = ledger.seconds, ledger.tokens
    use = sum(seconds[name] for name in USE)
    factors = {
        "direct": 1.0,
        "busy": sum(seconds[name] for name in WORK) / use if use else None,
        "wall": (ledger.end - ledger.start) / use if use else None,
    }

    def rate(spent: float, count: int, factor: float | None) -> float | None:
        return 1e6 * price.per_second * spent / count * factor if count and factor is not None else None

    result: dict[str, dict[str, float | None]] = {}
    for basis, factor in factors.items():
        row = {name: rate(seconds[name], tokens[name], factor) for name in USE}
        whole = rate(seconds["prompt"] + seconds["cached_prompt"], tokens["prompt"] + tokens["cached_prompt"], factor)
        decode = row["decode"]
        row["blended_3_to_1"] = (3 * whole + decode) / 4 if whole is not None and decode is not None else None
        result[basis] = row
    return result


def usd(value: float) -> str:
    """Two significant digits, without an exponent: US$0.0000031."""
    digits = 2 if value >= 0.1 or value <= 0 else 1 - math.floor(math.log10(value))
    return f"US${value:.{digits}f}"


def _of_device(row: seeds.DevicePrice) -> Price:
    return Price(row.usd_per_hour, row.key, row.date, row.source)
