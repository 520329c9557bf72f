"""What replies and the server cost: device seconds of the ledger times a price. docs/cost.md defines every term."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from bench.prices import USE, WASTE, WORK, Price, per_million
from engine.messages import LedgerSnapshot


def reply_cost(
    charged: Iterable[Mapping[str, float] | None], price: Price | None, reason: str | None
) -> dict[str, Any]:
    """`cost` and `cost_details` of a reply from the device seconds of its choices. None: a choice was aborted."""
    parts = list(charged)
    known = [seconds for seconds in parts if seconds is not None]
    complete = len(known) == len(parts)
    seconds = {name: sum(part.get(name, 0.0) for part in known) for name in (*USE, "recompute")} if complete else None
    usd = dict.fromkeys(USE)
    if not complete:
        reason = "the reply was ended early; its device time is in the ledger's class aborted"
    elif price is not None and seconds is not None:
        usd = {name: seconds[name] * price.per_second for name in USE}
    return {
        "cost": None if None in usd.values() else sum(usd.values()),
        "cost_details": {
            "input_usd": usd["prompt"],
            "cached_usd": usd["cached_prompt"],
            "output_usd": usd["decode"],
            "basis": "direct",
            "device_seconds": seconds,
            "price": price and dataclasses.asdict(price),
            "reason": reason if None in usd.values() else None,
        },
    }


def summary(ledger: LedgerSnapshot, price: Price | None, reason: str | None) -> dict[str, Any]:
    """The ledger for `GET /v1/cost`: seconds, tokens, the bill and what it was for, prices of a million tokens."""
    seconds = ledger.seconds
    wall, classes = ledger.end - ledger.start, sum(seconds.values())
    bill = None
    if price is not None:
        groups = {
            "replies": USE,
            "waste": WASTE,
            **{name: (name,) for name in ("host", "idle", "startup", "in_flight")},
        }
        bill = {name: sum(seconds[part] for part in parts) * price.per_second for name, parts in groups.items()}
        bill["bill"] = wall * price.per_second
    return {
        "devices": 1,
        "wall_seconds": wall,
        "device_seconds": seconds,
        "unaccounted_seconds": wall - classes,
        "utilisation": sum(seconds[name] for name in WORK) / wall if wall > 0 else None,
        "tokens": ledger.tokens,
        "price": price and dataclasses.asdict(price),
        "reason": reason if price is None else None,
        "usd": bill,
        "usd_per_million_tokens": price and per_million(ledger, price),
    }
