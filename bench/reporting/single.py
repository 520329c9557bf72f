"""Engine beside engine, and against itself: `make bench-cpu`, `fen bench latency`, `python -m bench.quality`."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from bench.report import median_and_spread
from bench.reporting.charts import Chart, number
from bench.reporting.section import Figure, Section, share, subject
from bench.results import Result


def compared(result: Result, key: str) -> Section | None:
    """Fen beside its peers on a CPU, tokens a second."""
    data = result.data
    engines: dict[str, dict[str, list[float]]] = data["tokens_per_second"]
    if "fen" not in engines or not engines["fen"]:
        return None
    others = [name for name in engines if name != "fen"]
    rows = []
    for test, values in engines["fen"].items():
        cells = [test, median_and_spread(values)]
        for name in others:
            theirs = engines[name].get(test)
            cells += (
                [median_and_spread(theirs), f"{statistics.median(values) / statistics.median(theirs):.2f}×"]
                if theirs
                else ["–", "–"]
            )
        rows.append(cells)
    notes = [f"Not run: {name}: {why}." for name, why in data.get("not_run", {}).items()]
    notes += [f"{name}: {about['settings']}." for name, about in data["engines"].items()]
    return Section(
        key=key,
        title="Beside other engines on a CPU",
        conditions=(
            f"{subject(result)}, {data['threads']} threads, the engines taking turns; medians of {data['repetitions']} "
            "(smallest to largest), tokens a second."
        ),
        figures=[Figure(key, "Tokens a second; each pair has its own scale", functools.partial(bars, engines))],
        header=["test", "fen", *(cell for name in others for cell in (name, f"fen / {name}"))],
        rows=rows,
        notes=notes,
    )


def bars(engines: dict[str, dict[str, list[float]]], width: int) -> Chart:
    """For each test a bar of each engine; whiskers from the smallest to the largest."""
    names = [name for name in engines if engines[name]]
    chart = Chart(width, 10, "Tokens a second, engine beside engine")
    y = 16.0
    room = width - 70.0
    for test in engines["fen"]:
        chart.text(4, y, test, "name")
        y += 8
        top = max(max(engines[name].get(test, [0.0])) for name in names)
        for i, name in enumerate(names):
            values = engines[name].get(test)
            if not values:
                continue
            middle = statistics.median(values)
            size = middle / top * room
            chart.bar(4, y, size, 18, f"k{(0, 7, 2, 6)[i % 4]}", f"{name}: {number(middle)} tokens/s")
            low, high = 4 + min(values) / top * room, 4 + max(values) / top * room
            chart.rule(low, y + 9, high, y + 9, "axis")
            chart.text(high + 6, y + 13, number(middle), "")
            y += 20
        y += 22
    x = 4.0
    for i, name in enumerate(names):
        chart.bar(x, y - 12, 12, 12, f"k{(0, 7, 2, 6)[i % 4]}", name)
        chart.text(x + 17, y - 2, name)
        x += 40 + 7 * len(name)
    chart.height = y + 6
    return chart


def latency(result: Result, key: str) -> Section:
    data = result.data
    read = data["bytes_per_token"] * statistics.median(data["decode"]) / data["read_bandwidth"]
    flops = data["flops_per_prompt"] * statistics.median(data["prefill"]) / data["prompt_tokens"] / data["matmul_rate"]
    return Section(
        key=key,
        title="One stream",
        conditions=f"{subject(result)}, {data['dtype']} activations, {data['threads']} threads, one request at a time.",
        figures=[],
        header=["test", "tokens/s, median (smallest to largest)", "of the limit measured in the same run"],
        rows=[
            [f"pp{data['prompt_tokens']}", median_and_spread(data["prefill"]), f"{share(flops)} of the products"],
            [f"tg{data['new_tokens']}", median_and_spread(data["decode"]), f"{share(read)} of the bandwidth"],
        ],
    )


def forecast(result: Result, key: str) -> Section:
    """The planner's forecast beside what was then measured."""
    data = result.data
    missed = [row["what"] for row in data["seconds"] if not row["met"]]
    return Section(
        key=key,
        title="Forecast beside measurement",
        conditions=(
            f"{subject(result)}. Forecast from a few layers of the model's shape; wanted within {data['wanted']:.0%}; "
            f"other processes used {share(data['others_cpu_share'])} of the CPUs meanwhile."
        ),
        figures=[],
        header=["", "forecast, ms", "measured, ms", "off by"],
        rows=[
            [row["what"], f"{1e3 * row['forecast']:,.1f}", f"{1e3 * row['measured']:,.1f}", f"{row['error']:+.1%}"]
            for row in data["seconds"]
        ],
        notes=[f"Missed: {what}." for what in missed] or ["All are met."],
    )


def quality(result: Result, key: str) -> Section:
    divergence: dict[str, dict[str, Any]] = result.data["divergence"]
    return Section(
        key=key,
        title="What the fast default rounds",
        conditions=f"{subject(result)}, against float32 over {result.data['tokens']:,} tokens of prose.",
        figures=[],
        header=["", "KL divergence, nats", "same most likely token"],
        rows=[[name, f"{row['kl_nats']:.1e}", share(row["top1_agreement"], 1)] for name, row in divergence.items()],
    )
