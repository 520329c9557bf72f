"""`fen cost`: the ledger of a running server, as tables."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.prices import BASES, usd
from engine.errors import FenError
from server.terminal_chat import RemoteModel


def show_cost(url: str, console: Console) -> None:
    """Raises FenError when there is no Fen server at `url`."""
    server = RemoteModel(url)
    with server.call("/v1/cost") as reply:
        cost = json.load(reply)
        if "device_seconds" not in cost:
            raise FenError(f"the server at {server.url} is not one of this version's")
    print_cost(cost, console)


def print_cost(cost: dict[str, Any], console: Console) -> None:
    """`cost`: the body of GET /v1/cost."""
    price, wall = cost["price"], cost["wall_seconds"]
    what = f"{cost['model']} ({cost['quantization']}) on {cost['device']}"
    console.print("; ".join([what, *cost["notes"]]), markup=False)
    rate = None
    if price:
        rate = price["usd_per_device_hour"] / 3600
        origin = ", ".join(part for part in (price["name"], price["date"], price["source"]) if part)
        console.print(f"US${price['usd_per_device_hour']:g} a device-hour ({origin})", markup=False)
    else:
        console.print(cost["reason"], markup=False)
    table = Table("class", "seconds", "share", "US$")
    rows = [*cost["device_seconds"].items(), ("unaccounted", cost["unaccounted_seconds"])]
    for name, seconds in rows:
        table.add_row(name, *_amounts(seconds, wall, rate), end_section=name in ("in_flight", "unaccounted"))
    table.add_row("wall time", *_amounts(wall, wall, rate), style="bold")
    console.print(_right(table))
    tokens = ", ".join(f"{count} {name}" for name, count in cost["tokens"].items())
    share = "" if cost["utilisation"] is None else f"; utilisation {cost['utilisation']:.1%}"
    console.print(f"tokens of finished requests: {tokens}{share}", markup=False)
    if price:
        table = Table("US$ per million tokens", "prompt", "cached", "generated", "3:1 blend")
        for basis in BASES:
            row = cost["usd_per_million_tokens"][basis]
            table.add_row(basis, *("" if value is None else usd(value) for value in row.values()))
        console.print(_right(table))
    joules, reason = cost["energy"]["joules"], cost["energy"]["reason"]
    console.print(f"energy: {reason}" if joules is None else f"energy: {joules:.0f} J", markup=False)


def _amounts(seconds: float, wall: float, rate: float | None) -> tuple[str, str, str]:
    share = f"{seconds / wall:.2%}" if wall else ""
    return f"{seconds:.3f}", share, "" if rate is None else f"{seconds * rate:.8f}"


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table
