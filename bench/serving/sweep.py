"""`fen bench sweep`: what one user gets against what the device does and what its tokens cost, over concurrencies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.report import markdown_table
from bench.serving.command import INTERRUPTED, conditions, launched, page, result
from bench.serving.measure import Measurement, Point, measure
from bench.serving.options import ServeOptions

CONCURRENCIES = ["1,2,4,8,16"]


def run(options: ServeOptions, folder: str) -> int:
    """Measures, prints the table, and writes sweep.json, sweep.png and sweep.svg. The exit status. Raises FenError."""
    if not options.max_concurrency:
        options = msgspec.structs.replace(options, max_concurrency=CONCURRENCIES)
    options.check()
    with launched(options) as options:
        found = measure(options, lambda found, point: print(page(options, found, point), flush=True))
    rows = [row(point, options.num_devices) for point in found.points]
    for name in ("device", "usd_busy", "usd_wall"):
        for entry, best in zip(rows, pareto(rows, name), strict=True):
            entry[f"pareto_{name}"] = best
    output = Path(folder)
    results.save(output / "sweep.json", result("sweep", options, found, sweep=rows))
    print(table(rows))
    print(conditions(found, found.points[-1]))
    written = ["sweep.json"]
    try:
        from bench.serving.sweep_plot import plot
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        written += plot(output, rows, caption(found))
    print(f"kept in {output}: {', '.join(written)}")
    return INTERRUPTED if found.interrupted else 0


def row(point: Point, devices: int) -> dict[str, Any]:
    """concurrency; user: generated tokens a second of one stream, 1 / median TPOT; device: generated tokens a second
    of each device; usd_busy, usd_wall: US$ per million tokens, 3:1, null without a price."""
    per_million = point.get("usd_per_million_tokens") or {}
    tpot = point["median_tpot_ms"]
    return {
        "concurrency": point["max_concurrency"],
        "user": 1e3 / tpot if tpot else None,
        "device": point["output_throughput"] / devices,
        "total_device": point["total_token_throughput"] / devices,
        "median_ttft_ms": point["median_ttft_ms"],
        "utilisation": point.get("utilisation"),
        "usd_busy": (per_million.get("busy") or {}).get("blended_3_to_1"),
        "usd_wall": (per_million.get("wall") or {}).get("blended_3_to_1"),
    }


def pareto(rows: Sequence[dict[str, Any]], name: str) -> list[bool]:
    """Whether no other row is better for the user and not worse in `name` (US$: less is better), or the reverse."""
    sign = -1 if name.startswith("usd") else 1
    places = [
        (entry["user"], sign * entry[name]) if entry["user"] is not None and entry[name] is not None else None
        for entry in rows
    ]
    return [
        place is not None
        and not any(
            other is not None and other != place and other[0] >= place[0] and other[1] >= place[1] for other in places
        )
        for place in places
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A mark stands behind what no other concurrency beats for both the user and the device, or the user and US$."""

    def cell(entry: dict[str, Any], name: str, digits: int) -> str:
        value = entry[name]
        if value is None:
            return "-"
        return f"{value:,.{digits}f}" + (" *" if entry.get(f"pareto_{name}") else "")

    header = ["concurrency", "tokens/s/user", "tokens/s/device", "median TTFT, ms", "utilisation", "US$/M busy", "wall"]
    body = [
        [
            str(entry["concurrency"] or "unlimited"),
            cell(entry, "user", 1),
            cell(entry, "device", 1),
            cell(entry, "median_ttft_ms", 0),
            "-" if entry["utilisation"] is None else f"{entry['utilisation']:.0%}",
            cell(entry, "usd_busy", 4),
            cell(entry, "usd_wall", 4),
        ]
        for entry in rows
    ]
    return markdown_table(header, body) + "\n* on the Pareto front. US$ per million tokens, 3:1 of prompt and answer."


def caption(found: Measurement) -> str:
    """Two lines of provenance for a picture."""
    server, points = found.server, found.points
    lengths = [
        f"{statistics.median(point[key] / point['completed'] for point in points):.0f}"
        for key in ("total_input_tokens", "total_output_tokens")
    ]
    device = server.get("device") or "a device that the server does not name"
    price = f"US${found.price.usd_per_device_hour:g} a device-hour" if found.price else "no price"
    return (
        f"{found.model} ({server.get('quantization') or 'quantization unknown'}) on {device}\n"
        f"{lengths[0]} tokens in, {lengths[1]} out; {price}"
    )
