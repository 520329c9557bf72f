"""What a run cost: from the server's own ledger (GET /v1/cost), before and after; of another server from the price and
the clock alone, which cannot tell a prompt's tokens from an answer's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from bench.prices import BASES, USE, WASTE, WORK, Price, no_price, per_million, usd
from bench.serving.client import Client, HttpError
from engine.messages import LedgerSnapshot

SETTLE_SECONDS = 6.0  # an idle engine tells of itself once a second
MARGIN = 0.01  # by which the ledger's tokens may differ from the client's before others are suspected


async def ledger(client: Client, settled: bool = False) -> dict[str, Any] | None:
    """The body of /v1/cost; None where there is none. settled: wait for one made after now, with nothing in flight."""
    deadline = time.monotonic() + SETTLE_SECONDS
    first: float | None = None
    while True:
        try:
            body = await client.get("/v1/cost")
        except HttpError:
            return None
        if not isinstance(body, dict) or not {"device_seconds", "wall_seconds", "tokens"} <= body.keys():
            return None
        first = body["wall_seconds"] if first is None else first
        fresh = body["wall_seconds"] > first and not body["device_seconds"].get("in_flight")
        if not settled or fresh or time.monotonic() > deadline:
            return body
        await asyncio.sleep(0.1)


def price_of_run(given: Price | None, body: Mapping[str, Any] | None) -> tuple[Price | None, str | None]:
    """--price, else the server's own; or the reason why there is none."""
    if given is not None:
        return given, None
    if body is None:
        return None, "the server keeps no ledger (GET /v1/cost); --price sets what its devices cost an hour"
    if body.get("price"):
        return Price(**body["price"]), None
    return None, body.get("reason") or no_price(str(body.get("device")))


def account(
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    figures: Mapping[str, Any],
    price: Price | None,
    devices: int,
) -> dict[str, Any]:
    """What the run took and cost. Of a Fen: seconds by class, utilisation, tokens of finished replies, US$ by purpose
    and a million, energy. Of another server: the bill alone."""
    seconds = figures["duration"]
    if before is None or after is None:
        bill = price.per_second * seconds * devices if price else None
        tokens = figures["total_input_tokens"] + figures["total_output_tokens"]
        return {
            "usd": {"bill": bill} if price else None,
            "usd_per_million_tokens": {"wall": {"all": 1e6 * bill / tokens if tokens else None}} if bill else None,
        }
    spent = {
        name: after["device_seconds"][name] - before["device_seconds"].get(name, 0.0)
        for name in after["device_seconds"]
    }
    wall = after["wall_seconds"] - before["wall_seconds"]
    around = min(max(wall - seconds, 0.0), spent["idle"])  # before the first request and after the last answer
    spent["idle"] -= around
    wall -= around
    tokens = {name: after["tokens"][name] - before["tokens"][name] for name in after["tokens"]}
    took = LedgerSnapshot(0.0, wall, spent, tokens)
    found: dict[str, Any] = {
        "device_seconds": spent,
        "wall_seconds": wall,
        "unaccounted_seconds": wall - sum(spent.values()),
        "utilisation": sum(spent[name] for name in WORK) / wall if wall > 0 else None,
        "ledger_tokens": tokens,
        "usd": None,
        "usd_per_million_tokens": None,
        **_energy(before.get("energy") or {}, after.get("energy") or {}),
    }
    if price:
        groups: dict[str, tuple[str, ...]] = {"replies": USE, "waste": WASTE}
        groups |= {name: (name,) for name in ("host", "idle", "startup", "in_flight")}
        bill = {name: sum(spent[part] for part in parts) * price.per_second for name, parts in groups.items()}
        found["usd"] = bill | {"bill": wall * price.per_second}
        found["usd_per_million_tokens"] = per_million(took, price)
    return found


def _energy(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    first, last = before.get("joules"), after.get("joules")
    if first is None or last is None:
        return {"joules": None, "joules_reason": after.get("reason") or "the server counts no energy"}
    return {"joules": last - first, "joules_reason": None}


def warnings(found: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Where the ledger saw other tokens than this client."""
    tokens = found.get("ledger_tokens")
    if not tokens or figures["failed"] or figures["cancelled"]:
        return []
    seen, own = sum(tokens.values()), figures["total_input_tokens"] + figures["total_output_tokens"]
    if abs(seen - own) <= MARGIN * own:
        return []
    return [f"The server's ledger counts {seen} tokens, this client {own}: others used the server, and share its cost."]


def block(figures: Mapping[str, Any], price: Price | None, reason: str | None, conditions: str, width: int) -> str:
    """The lines below vLLM's block. `conditions`: what every figure in US$ has to stand beside."""
    lines = [" Cost and the server ".center(width, "-")]

    def line(label: str, value: str) -> None:
        lines.append(f"{label:<40} {value}")

    if (share := figures.get("utilisation")) is not None:
        line("Utilisation of the device (%):", f"{100 * share:.1f}")
    if figures.get("joules") is not None:
        line("Energy (J):", f"{figures['joules']:.0f}")
        if figures["total_output_tokens"]:
            line("Energy per generated token (J):", f"{figures['joules'] / figures['total_output_tokens']:.3f}")
    elif "joules_reason" in figures:
        line("Energy (J):", f"none: {figures['joules_reason']}")
    if price is None:
        return "\n".join([*lines, f"US$: none: {reason}", "=" * width])
    line("Bill of the run (US$):", usd(figures["usd"]["bill"]).removeprefix("US$"))
    for basis, row in figures["usd_per_million_tokens"].items():
        if basis == BASES[0]:
            continue
        for name, value in row.items():
            if value is not None:
                words = {"blended_3_to_1": "3:1 blend", "decode": "generated", "cached_prompt": "cached prompt"}
                line(f"US$ per million, {basis}, {words.get(name, name)}:", usd(value).removeprefix("US$"))
    source = ", ".join(part for part in (price.name, price.date, price.source) if part)
    lines += [conditions, f"US${price.usd_per_device_hour:g} a device-hour ({source})"]
    return "\n".join([*lines, "=" * width])
