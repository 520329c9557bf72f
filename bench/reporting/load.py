"""`fen bench serve` and `sweep`: speed, latency and cost over concurrencies, and what the bill was for."""

from __future__ import annotations

import functools
from typing import Any

import seeds
from bench.prices import WASTE, Price, per_million
from bench.reporting.charts import CHARACTER, Axis, Chart, Plot, number
from bench.reporting.section import Figure, Scenario, Section, money, price_words, share, subject
from bench.results import Result
from engine.messages import LedgerSnapshot

Point = dict[str, Any]
PARTS = ("prompt", "cached prompt", "decode", "waste", "host", "idle", "start-up", "in flight")
SECOND = Price(3600.0, "a device second", "", "")  # US$ at this price are device seconds


def section(result: Result, key: str) -> Section | None:
    """None where no request was answered. Raises KeyError or TypeError for other keys than bench/serving's."""
    points = [point for point in result.data["points"] if point["completed"]]
    if not points:
        return None
    notes = [
        f"Concurrency {at_once(point)}: no request was answered, so it is left out."
        for point in result.data["points"]
        if not point["completed"]
    ]
    if result.data.get("interrupted"):
        notes.append("Cut short: the last concurrency is not whole.")
    failed = sum(point["failed"] for point in points)
    if failed:
        notes.append(f"{failed} requests failed; no figure counts them.")
    several = [point for point in points if point["max_concurrency"]]
    draw = functools.partial
    figures = []
    if len(several) > 1:
        figures += [
            Figure(f"{key}-throughput", "Generated tokens a second", draw(throughput, several)),
            Figure(f"{key}-user", "What one user gets against what the device does", draw(pareto, several)),
            Figure(f"{key}-ttft", "Time to first token", draw(latencies, several, "ttft")),
            Figure(f"{key}-tpot", "Time per token after the first", draw(latencies, several, "tpot")),
        ]
        if any(blend(point, "busy") for point in several):
            figures.append(Figure(f"{key}-usd", "US$ per million tokens, 3:1", draw(costs, several)))
    if any(point.get("device_seconds") for point in points):
        figures.append(Figure(f"{key}-bill", "What the bill was for", draw(bill, result, points)))
    for api in seeds.load().apis.values():
        reached = next((p for p in points if (blend(p, "busy") or 9e9) < api.usd_per_million_tokens), None)
        if reached is not None:
            notes.append(
                f"Below {api.label}'s US${api.usd_per_million_tokens:.2f} (busy) from concurrency {at_once(reached)} "
                f"on, of those measured; {wall_words(points, api.usd_per_million_tokens)}."
            )
        elif any(blend(point, "busy") for point in points):
            notes.append(f"At no measured concurrency below {api.label}'s US${api.usd_per_million_tokens:.2f}.")
    header = ["concurrency", "requests", "in / out", "tokens/s out", "TTFT, ms", "TPOT, ms", "utilisation",
              "US$/M in", "cached", "out", "3:1 busy", "3:1 wall"]  # fmt: skip
    return Section(
        key=key,
        title=f"Serving under load: {result.model or result.data['model_id']}",
        conditions=conditions(result, points),
        figures=figures,
        header=header,
        rows=[row(point) for point in points],
        notes=notes,
        scenarios=[found for point in points if (found := scenario(result, point)) is not None],
    )


def conditions(result: Result, points: list[Point]) -> str:
    server = result.data.get("server") or {}
    notes = "".join(f"; {note}" for note in server.get("notes") or [])
    return (
        f"{subject(result)}{notes}. {result.data['dataset_name']} prompts, {lengths(points)}; concurrency "
        f"{', '.join(at_once(point) for point in points)}; {runs(result)}; {price_words(result)}. Busy: with the waste "
        "that came with the work. Wall: with idle time. Medians; US$ per million tokens of prompt (in), of prompt from "
        "the cache (cached), of answer (out), basis busy, and their 3:1 blend."
    )


def runs(result: Result) -> str:
    count = result.data["num_runs"]
    return "one run of each" if count == 1 else f"{count} runs of each, of which the median stands here"


def lengths(points: list[Point]) -> str:
    pairs = [(p["total_input_tokens"] / p["completed"], p["total_output_tokens"] / p["completed"]) for p in points]
    return " and ".join(
        f"{min(values):.0f}{'' if round(min(values)) == round(max(values)) else f' to {max(values):.0f}'} tokens {way}"
        for values, way in zip(zip(*pairs, strict=True), ("in", "out"), strict=True)
    )


def at_once(point: Point) -> str:
    return str(point["max_concurrency"] or "unlimited")


def blend(point: Point, basis: str) -> float | None:
    return ((point.get("usd_per_million_tokens") or {}).get(basis) or {}).get("blended_3_to_1")


def wall_words(points: list[Point], price: float) -> str:
    reached = next((point for point in points if (blend(point, "wall") or 9e9) < price), None)
    return "on the wall basis at none" if reached is None else f"on the wall basis from {at_once(reached)} on"


def row(point: Point) -> list[str]:
    busy = (point.get("usd_per_million_tokens") or {}).get("busy") or {}

    def ms(name: str) -> str:
        value = point[f"median_{name}_ms"]
        return "–" if value is None else number(value)

    return [
        at_once(point),
        str(point["completed"]),
        " / ".join(f"{point[f'total_{way}_tokens'] / point['completed']:.0f}" for way in ("input", "output")),
        number(point["output_throughput"]),
        ms("ttft"),
        ms("tpot"),
        share(point.get("utilisation")),
        *(money(busy.get(name)) for name in ("prompt", "cached_prompt", "decode", "blended_3_to_1")),
        money(blend(point, "wall")),
    ]


def scenario(result: Result, point: Point) -> Scenario | None:
    """Of a server that keeps a ledger."""
    if not point.get("device_seconds") or not point.get("ledger_tokens"):
        return None
    took = LedgerSnapshot(0.0, point["wall_seconds"], point["device_seconds"], point["ledger_tokens"])
    seconds = per_million(took, SECOND)["busy"]["blended_3_to_1"]
    if not seconds:
        return None
    return Scenario(
        f"{result.data['dataset_name']} load, {result.model or result.data['model_id']}, concurrency {at_once(point)}",
        conditions(result, [point]),
        seconds,
        result.price.usd_per_device_hour if result.price else None,
        point.get("utilisation"),
    )


# Pictures


def concurrency_axis(points: list[Point]) -> Axis:
    return Axis.of("concurrency", [point["max_concurrency"] for point in points])


def throughput(points: list[Point], width: int) -> Chart:
    line = [(point["max_concurrency"], point["output_throughput"]) for point in points]
    y = Axis.linear("tokens/s", [value for _, value in line])
    plot = Plot(width, 260, "Generated tokens a second over concurrency", concurrency_axis(points), y)
    plot.curve(line, 0, [f"concurrency {x}: {number(value)} tokens/s" for x, value in line])
    return plot


def latencies(points: list[Point], name: str, width: int) -> Chart:
    """The median, and the highest percentile that was asked for."""
    percentiles = [key for key in points[0] if key.startswith("p") and key.endswith(f"_{name}_ms")]
    keys = [f"median_{name}_ms", *sorted(percentiles, key=lambda key: float(key[1:].split("_")[0]))[-1:]]
    names = ["median", *(f"{key.split('_')[0]}" for key in keys[1:])]
    series = [[(p["max_concurrency"], p[key]) for p in points if p[key] is not None] for key in keys]
    values = [value for points in series for _, value in points]
    plot = Plot(width, 260, f"{name.upper()} over concurrency, milliseconds", concurrency_axis(points),
                Axis.linear("ms", values), names)  # fmt: skip
    for i, (key, line) in enumerate(zip(names, series, strict=True)):
        plot.curve(line, i, [f"concurrency {x}: {key} {number(y)} ms" for x, y in line], "line" if i == 0 else "thin")
    return plot


def pareto(points: list[Point], width: int) -> Chart:
    known = [point for point in points if point["median_tpot_ms"]]
    places = [(1e3 / point["median_tpot_ms"], point["output_throughput"]) for point in known]
    plot = Plot(width, 260, "Tokens a second of the device against tokens a second of one user",
                Axis.linear("tokens/s of one user", [x for x, _ in places]),
                Axis.linear("tokens/s of the device", [y for _, y in places]))  # fmt: skip
    plot.curve(places, 2, [f"concurrency {at_once(p)}: {number(x)} each, {number(y)} together"
                           for p, (x, y) in zip(known, places, strict=True)])  # fmt: skip
    for point, place in zip(known, places, strict=True):
        x, y = plot.at(*place)
        plot.text(x, y - 9, at_once(point), "tick", "middle")
    return plot


def costs(points: list[Point], width: int) -> Chart:
    """Busy and wall, with the prices that the articles state."""
    apis = seeds.load().apis.values()
    lines = {basis: [(p["max_concurrency"], value) for p in points if (value := blend(p, basis))]
             for basis in ("busy", "wall")}  # fmt: skip
    values = [value for line in lines.values() for _, value in line]
    axis = Axis.logarithmic("US$ per million tokens", [*values, *(api.usd_per_million_tokens for api in apis)])
    plot = Plot(width, 300, "US$ per million tokens over concurrency", concurrency_axis(points), axis, list(lines))
    for api in apis:
        plot.level(api.usd_per_million_tokens, f"{api.label} US${api.usd_per_million_tokens:.2f}")
    for i, (basis, line) in enumerate(lines.items()):
        plot.curve(line, i, [f"concurrency {x}, {basis}: {money(y)}" for x, y in line], "line" if i == 0 else "thin")
    return plot


def parts_of(point: Point) -> list[float]:
    seconds = point["device_seconds"]
    names = [("prompt",), ("cached_prompt",), ("decode",), WASTE, ("host",), ("idle",), ("startup",), ("in_flight",)]
    return [sum(seconds.get(name, 0.0) for name in group) for group in names]


def bill(result: Result, points: list[Point], width: int) -> Chart:
    """A bar for each concurrency, made of the classes of device time; its end is the bill."""
    known = [point for point in points if point.get("device_seconds")]
    rate = result.price.per_second if result.price else 1.0
    bills = [point["wall_seconds"] * rate for point in known]
    what = "US$" if result.price else "device seconds"
    used = [i for i in range(len(PARTS)) if any(parts_of(point)[i] > 0 for point in known)]
    chart = Chart(width, 10, f"What the {'bill' if result.price else 'device time'} was for, by class, {what}")
    x = 6.0
    y = 14.0
    for i in used:
        size = 24 + CHARACTER * len(PARTS[i])
        if x > 6 and x + size > width:
            x, y = 6.0, y + 19
        chart.bar(x, y - 9, 12, 12, f"k{i}", PARTS[i])
        chart.text(x + 17, y + 1, PARTS[i])
        x += size
    y += 22
    room = width - 112
    for point, total in zip(known, bills, strict=True):
        chart.text(4, y + 2, f"concurrency {at_once(point)}, utilisation {share(point.get('utilisation'))}", "quiet")
        x = 4.0
        for i, part in enumerate(parts_of(point)):
            size = part * rate / max(bills) * room
            if size > 0:
                tip = f"{PARTS[i]}: {number(part * rate)} {what}, {part * rate / total:.1%}"
                chart.bar(x, y + 8, size, 24, f"k{i}", tip)
            x += size
        end = 4 + total / max(bills) * room
        chart.rule(end, y + 4, end, y + 36, "axis")
        chart.text(end + 6, y + 24, money(total) if result.price else f"{number(total)} s", "price")
        y += 56
    chart.height = y - 8
    return chart
