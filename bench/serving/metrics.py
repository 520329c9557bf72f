"""What a run's answers amount to: the metrics, their names and the printed block of `vllm bench serve`.

TTFT: from sending a request to its first piece. TPOT: the rest of its time over its tokens but the first. ITL: between
pieces. E2EL: from sending to the last piece. All in milliseconds; percentiles with linear interpolation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.serving.load import Answer, Run
from bench.serving.options import ServeOptions

WIDTH = 50
HEADINGS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
FIGURES = (  # label, key, decimals
    ("Successful requests:", "completed", 0),
    ("Failed requests:", "failed", 0),
    ("Maximum request concurrency:", "max_concurrency", 0),
    ("Request rate configured (RPS):", "request_rate", 2),
    ("Benchmark duration (s):", "duration", 2),
    ("Total input tokens:", "total_input_tokens", 0),
    ("Total generated tokens:", "total_output_tokens", 0),
    ("Request throughput (req/s):", "request_throughput", 2),
    ("Request goodput (req/s):", "request_goodput", 2),
    ("Output token throughput (tok/s):", "output_throughput", 2),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s", 2),
    ("Peak concurrent requests:", "max_concurrent_requests", 2),
    ("Total token throughput (tok/s):", "total_token_throughput", 2),
)
CPU_LIMIT = 0.8  # share of a core beyond which the client is taken for a bottleneck
LAG_LIMIT = 0.2  # its lateness (99th percentile), as a share of the median time between tokens
LEAST_LAG = 0.005  # seconds, below which lateness does not matter


def measured(run: Run, options: ServeOptions) -> dict[str, Any]:
    """The figures of one run under vLLM's JSON keys. With no answer at all the latencies are null."""
    good = [answer for answer in run.answers if not answer.error]
    outputs = [answer.output_tokens or 1 + len(answer.itl) for answer in good]
    tokens_in, tokens_out = sum(answer.prompt_len for answer in good), sum(outputs)
    tpots = [(a.latency - a.ttft) / (n - 1) if n > 1 else 0.0 for a, n in zip(good, outputs, strict=True)]
    within = {"ttft": [a.ttft for a in good], "tpot": tpots, "e2el": [a.latency for a in good]}
    peak_tokens, peak_requests = _peaks(good)
    figures: dict[str, Any] = {
        "duration": run.seconds,
        "completed": len(good),
        "failed": len(run.answers) - len(good),
        "cancelled": run.cancelled,
        "total_input_tokens": tokens_in,
        "total_cached_tokens": sum(answer.cached_tokens for answer in good),
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / run.seconds,
        "request_goodput": _goodput(within, options.objectives) / run.seconds if options.objectives else None,
        "output_throughput": tokens_out / run.seconds,
        "total_token_throughput": (tokens_in + tokens_out) / run.seconds,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "client_cpu_share": run.cpu,
        "client_lag_p99_ms": 1e3 * float(np.percentile(run.lag, 99)) if run.lag else 0.0,
    }
    several = {
        "ttft": within["ttft"],
        "tpot": [tpot for tpot, n in zip(tpots, outputs, strict=True) if n > 1],
        "itl": [gap for answer in good for gap in answer.itl],
        "e2el": within["e2el"],
        "client_queue_time": [answer.queue_time for answer in good],
        "e2el_including_client_queue": [answer.latency + answer.queue_time for answer in good],
    }
    for name, values in several.items():
        figures |= _statistics(name, values, options.percentiles)
    if options.save_detailed:
        figures |= _details(run.answers)
    return figures


def _statistics(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    def ms(function: Any, *arguments: float) -> float | None:
        return 1e3 * float(function(values, *arguments)) if values else None

    found = {
        f"mean_{name}_ms": ms(np.mean),
        f"median_{name}_ms": ms(np.median),
        f"std_{name}_ms": ms(np.std),
    }
    return found | {f"p{_number(p)}_{name}_ms": ms(np.percentile, p) for p in percentiles}


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _details(answers: Sequence[Answer]) -> dict[str, list[Any]]:
    return {
        "input_lens": [answer.prompt_len for answer in answers],
        "output_lens": [answer.output_tokens for answer in answers],
        "ttfts": [answer.ttft for answer in answers],
        "itls": [answer.itl for answer in answers],
        "latencies": [answer.latency for answer in answers],
        "start_times": [answer.start for answer in answers],
        "queue_times": [answer.queue_time for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [answer.error for answer in answers],
    }


def _goodput(values: Mapping[str, Sequence[float]], objectives: Mapping[str, float]) -> int:
    """Requests that keep every objective."""
    rows = zip(*(values[name] for name in objectives), strict=True)
    return sum(all(v * 1e3 <= limit for v, limit in zip(row, objectives.values(), strict=True)) for row in rows)


def _peaks(answers: Sequence[Answer]) -> tuple[float, int]:
    """(most pieces in one second, counted from the first request; most requests at once)."""
    if not answers:
        return 0.0, 0
    first = min(answer.start for answer in answers)
    seconds: dict[int, int] = {}
    for answer in answers:
        now = answer.start + answer.ttft
        for gap in (0.0, *answer.itl):
            now += gap
            seconds[int(now - first)] = seconds.get(int(now - first), 0) + 1
    changes = [(answer.start, 1) for answer in answers] + [(answer.start + answer.latency, -1) for answer in answers]
    running = peak = 0
    for _, change in sorted(changes):  # an end before a beginning at the same time
        running += change
        peak = max(peak, running)
    return float(max(seconds.values())), peak


def together(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the runs, also inside of tables; of several runs also `spread`: the smallest and
    the largest by the figure's name, with dots."""
    spread: dict[str, list[float]] = {}
    found = _medians(runs, "", spread)
    return found | ({"spread": spread} if len(runs) > 1 else {})


def _medians(rows: Sequence[Mapping[str, Any]], prefix: str, spread: dict[str, list[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in rows[0].items():
        others = [row.get(key) for row in rows]
        if tables := [other for other in others if isinstance(other, dict)]:
            found[key] = _medians(tables, f"{prefix}{key}.", spread)
        elif numbers := [other for other in others if isinstance(other, int | float)]:
            middle = statistics.median(numbers)
            found[key] = round(middle) if all(isinstance(number, int) for number in numbers) else middle
            spread[prefix + key] = [min(numbers), max(numbers)]
        elif not isinstance(value, list):
            found[key] = value
    return found


def warnings(figures: Mapping[str, Any]) -> list[str]:
    """Where the client itself may have been what was measured."""
    cpu, lag, itl = figures["client_cpu_share"], figures["client_lag_p99_ms"], figures["median_itl_ms"]
    found = []
    if cpu > CPU_LIMIT:
        found.append(f"The client used {cpu:.0%} of a core: it may be the bottleneck, and the server faster than this.")
    if lag > max(1e3 * LEAST_LAG, LAG_LIMIT * (itl or 0.0)):
        found.append(
            f"The client was up to {lag:.1f} ms late (99th percentile): the latencies are too long by as much. "
            "Run it on another machine, or leave it a core."
        )
    if figures["failed"]:
        found.append(f"{figures['failed']} requests failed; they are in no figure.")
    return found


def block(figures: Mapping[str, Any], options: ServeOptions) -> str:
    """As `vllm bench serve` prints it; behind a median of several runs stand the smallest and the largest."""
    spread = figures.get("spread", {})
    lines = [" Serving Benchmark Result ".center(WIDTH, "=")]

    def line(label: str, key: str, decimals: int) -> None:
        value = figures.get(key)
        if value is None or value == math.inf:
            return
        low, high = spread.get(key, (value, value))
        row = f"{label:<40} {value:<10.{decimals}f}"
        lines.append((row + (f" ({low:.{decimals}f} to {high:.{decimals}f})" if low != high else "")).rstrip())

    for label, key, decimals in FIGURES:
        line(label, key, decimals)
    for name in options.selected:
        short, heading = HEADINGS[name]
        lines.append(heading.center(WIDTH, "-"))
        for word in ("Mean", "Median"):
            line(f"{word} {short} (ms):", f"{word.lower()}_{name}_ms", 2)
        for p in options.percentiles:
            line(f"P{_number(p)} {short} (ms):", f"p{_number(p)}_{name}_ms", 2)
    return "\n".join([*lines, "=" * WIDTH])
