"""`fen bench serve`: measures, prints vLLM's block and the cost below it, and keeps the result if asked to."""

from __future__ import annotations

import contextlib
import datetime
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.local_server import local_server
from bench.machine import cpu_name
from bench.serving import bill, metrics
from bench.serving.measure import Measurement, Point, measure
from bench.serving.options import ServeOptions

INTERRUPTED = 130  # exit status, as shells have it


def run(options: ServeOptions) -> int:
    """The exit status. Raises FenError."""
    options.check()
    with launched(options) as options:
        found = measure(options, lambda found, point: print(page(options, found, point), flush=True))
    if options.save_result:
        path = Path(options.result_dir or ".") / (options.result_filename or file_name(options, found.model))
        results.save(path, result("serve", options, found))
        print(f"kept in {path}")
    return INTERRUPTED if found.interrupted else 0


@contextlib.contextmanager
def launched(options: ServeOptions) -> Iterator[ServeOptions]:
    """With --launch: a server of its own while it lasts, and the options to reach it."""
    if options.launch is None:
        yield options
        return
    with local_server(shlex.split(options.launch)) as url:
        yield msgspec.structs.replace(options, base_url=url)


def page(options: ServeOptions, found: Measurement, point: Point) -> str:
    """What is printed for one concurrency."""
    lines = []
    if len(point["runs"]) > 1:
        lines.append(f"Medians of {len(point['runs'])} runs (smallest to largest).")
    if point["cancelled"]:
        lines.append(f"Cut short: {point['cancelled']} requests were not answered.")
    lines += [
        metrics.block(point, options),
        bill.block(point, found.price, found.reason, conditions(found, point), metrics.WIDTH),
        *metrics.warnings(point),
        *bill.warnings(point, point),
    ]
    return "\n".join(lines)


def conditions(found: Measurement, point: Point) -> str:
    """What a figure in US$ has to stand beside: the rules are in docs/cost.md."""
    server, count = found.server, point["completed"]
    what = f"{found.model} ({server.get('quantization') or 'quantization unknown'})"
    where = server.get("device") or "a device that the server does not name"
    notes = "".join(f"; {note}" for note in server.get("notes") or [])
    lengths = f"{point['total_input_tokens'] / count:.0f} tokens in, {point['total_output_tokens'] / count:.0f} out"
    busy = point.get("utilisation")
    return f"{what} on {where}{notes}; {lengths}, concurrency {point['max_concurrency'] or 'unlimited'}, " + (
        "utilisation unknown" if busy is None else f"utilisation {busy:.1%}"
    )


def result(kind: str, options: ServeOptions, found: Measurement, **more: Any) -> results.Result:
    """`data` has vLLM's keys in each of `points`, and in each of a point's `runs`."""
    data = {
        "backend": options.backend,
        "label": options.label or options.backend,
        "model_id": found.model,
        "tokenizer_id": found.tokenizer,
        "dataset_name": options.dataset_name,
        "num_prompts": options.num_prompts,
        "num_runs": options.num_runs,
        "num_warmups": options.num_warmups,
        "num_devices": options.num_devices,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "request_fields": options.body,
        "seed": options.seed,
        "metadata": options.notes,
        "interrupted": found.interrupted,
        "server": found.server,
        "client": cpu_name(),
        "price_reason": found.reason,
        "points": found.points,
    }
    device = found.server.get("device") or "unknown: the server does not say"
    quantization = found.server.get("quantization")
    return results.new(
        kind, data | more, model=found.model, quantization=quantization, device=device, price=found.price
    )


def file_name(options: ServeOptions, model: str) -> str:
    """As vLLM names it: label, rate, concurrency, model, time."""
    several = [str(value) for value in options.concurrencies if value]
    concurrency = f"-concurrency{'-'.join(several)}" if several else ""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    label = options.label or options.backend
    return f"{label}-{options.request_rate}qps{concurrency}-{model.split('/')[-1]}-{now}.json"
