"""The cost ladder: one fixed, saturated workload, and real configurations that each add a technique to the one before.

Each rung is a process of its own. A file of the result is written after every part, so that Ctrl-C loses little and
`--resume` goes on. The rungs and the workload are data: bench/ladder.toml.

`data` of the result (kind "ladder"):
    device_kind "cpu" | "gpu", threads, load_format, basis "busy", workload {fields of bench/ladder.toml},
    ceilings {bandwidth bytes/s, rates {dtype: FLOPs/s}, measured}, baseline {dtype, plain_seconds,
    transformers_seconds, speed_against_transformers, ...}, target_cut 0.9, complete (all rungs measured)
    rungs [{name, technique, settings, batch, commit, date, requests, tokens {prompt, cached_prompt, decode},
        busy_seconds, device_seconds {class: s}, tokens_per_second (answers), roofline_seconds, roofline_share,
        seconds_per_million / usd_per_million (null without a price) {prompt, cached_prompt, decode, blended_3_to_1},
        cut (1 - blend / blend of the first), perplexity, top1_agreement, greedy_agreement (both with the first),
        others_cpu_share, ...}], in order
    unfinished {name, requests}: of a rung that was cut short
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.ladder_workload import Ladder, Rung, Workload, load
from bench.machine import Disturbance, commit
from bench.prices import WORK, Price, no_price, per_million, price_of, usd
from bench.report import markdown_table
from engine.checkpoint import open_checkpoint
from engine.errors import FenError
from engine.messages import LedgerSnapshot

KIND = "ladder"
TARGET_CUT = 0.9  # the articles' "more than 90% cheaper"
SECOND = Price(3600.0, "a device second", "", "")  # US$ at this price are device seconds
RESULTS = Path(__file__).resolve().parent / "results"
Progress = Callable[[int, int], None]


def run(
    model: str,
    load_format: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    price: Price | None = None,
    path: Path | None = None,
    resume: bool = False,
    ladder: Ladder | None = None,
    small: bool = False,
) -> dict[str, Any]:
    """Measures what is missing, prints the table, keeps the result in `path`, and returns its data. Raises FenError.

    small: ceilings on sizes that say nothing, to try the command out.
    """
    ladder = ladder or load()
    checkpoint = open_checkpoint(model, load_format)
    path = path or RESULTS / f"ladder_{'gpu' if device == 'cuda' else 'cpu'}.json"
    workload, rungs = ladder.on(device)
    result = _fresh(checkpoint.name, checkpoint.quantization, load_format, device, threads, price, workload)
    if resume:
        result = _resumed(path, result)
    data = result.data
    place = {"model": model, "load_format": load_format, "device": device, "threads": threads}
    request = {"place": place, "workload": msgspec.to_builtins(workload), "small": small}

    def keep() -> None:
        results.save(path, result)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        for part in ("ceilings", "baseline"):
            if part not in data:
                with _bar(part) as show:
                    data[part] = _part({**request, "part": part}, show)
                keep()
        for number, rung in enumerate(rungs):
            if number < len(data["rungs"]):
                continue
            _measure_rung(number, rung, request, result, keep, len(rungs))
        data["complete"] = True
        keep()
    except KeyboardInterrupt:
        print(
            f"Stopped; {len(data['rungs'])} of {len(rungs)} rungs are kept in {path}; --resume goes on.",
            file=sys.stderr,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    if data["rungs"]:
        print(render(result))
        print(f"kept in {path}")
    return data


def _fresh(
    model: str,
    quantization: str,
    load_format: str,
    device: str,
    threads: int | None,
    price: Price | None,
    workload: Workload,
) -> results.Result:
    data = {
        "device_kind": "gpu" if device == "cuda" else "cpu",
        "threads": threads or len(os.sched_getaffinity(0)),
        "load_format": load_format,
        "basis": "busy",
        "workload": msgspec.to_builtins(workload),
        "target_cut": TARGET_CUT,
        "complete": False,
        "rungs": [],
    }
    name = None
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise FenError("there is no GPU here that PyTorch can use; --device cpu measures the rungs of a CPU")
        name = torch.cuda.get_device_name()
        price = price or price_of(name)
    return results.new(KIND, data, model=model, quantization=quantization, device=name, price=price)


def _resumed(path: Path, fresh: results.Result) -> results.Result:
    """The earlier result, with the price of now. Raises FenError where it is not of the same ladder on this machine."""
    earlier = results.load(path, KIND)
    fixed = ("device_kind", "threads", "load_format", "workload")
    differs = [key for key in fixed if earlier.data.get(key) != json.loads(json.dumps(fresh.data[key]))]
    differs += [key for key in ("model", "quantization", "device") if getattr(earlier, key) != getattr(fresh, key)]
    if differs:
        raise FenError(f"{path} was measured with another {', '.join(differs)}: start anew without --resume")
    for entry in earlier.data["rungs"]:
        _price(entry, fresh.price)
    return dataclasses.replace(earlier, price=fresh.price)


def _measure_rung(
    number: int, rung: Rung, request: dict[str, Any], result: results.Result, keep: Callable[[], None], count: int
) -> None:
    data = result.data
    unfinished = data.get("unfinished") or {}
    done = list(unfinished.get("requests", [])) if unfinished.get("name") == rung.name else []

    def on_request(found: dict[str, Any]) -> None:
        done.append(found)
        data["unfinished"] = {"name": rung.name, "requests": done}
        if len(done) % 8 == 0:
            keep()

    asked = {
        **request,
        "part": "rung",
        "rung": msgspec.to_builtins(rung),
        "dtype": data["baseline"]["dtype"],
        "ceilings": data["ceilings"],
        "done": list(done),
    }
    try:
        with _bar(f"rung {number + 1} of {count}, {rung.name}") as show:
            found = _part(asked, show, on_request)
    except BaseException:
        keep()
        raise
    data.pop("unfinished", None)
    first = data["rungs"][0] if data["rungs"] else None
    data["rungs"].append(entry_of(rung, found, first, result.price, data["workload"]["requests"]))
    keep()


def entry_of(
    rung: Rung, found: dict[str, Any], first: dict[str, Any] | None, price: Price | None, requests: int
) -> dict[str, Any]:
    """A rung as the result keeps it, from what its process has measured. first: the first rung's; None: this is it."""
    texts, best = found["texts"], found["best_tokens"]
    entry = {
        "name": rung.name,
        "technique": rung.technique,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "requests": requests,
        **{key: value for key, value in found.items() if key not in ("texts", "best_tokens")},
    }
    busy = sum(found["device_seconds"][name] for name in WORK)
    entry["busy_seconds"] = busy
    entry["tokens_per_second"] = found["tokens"]["decode"] / busy
    entry["roofline_share"] = found["roofline_seconds"] / busy
    _price(entry, price)
    blend = entry["seconds_per_million"]["blended_3_to_1"]
    reference = first or entry
    entry["cut"] = 1 - blend / reference["seconds_per_million"]["blended_3_to_1"]
    if first is None:
        entry["texts"], entry["best_tokens"] = texts, best
    entry["top1_agreement"] = _same(best.split(), reference["best_tokens"].split())
    pairs = [(a.split(), b.split()) for a, b in zip(texts, reference["texts"], strict=True)]
    entry["greedy_agreement"] = sum(_prefix(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)
    return entry


def _price(entry: dict[str, Any], price: Price | None) -> None:
    ledger = LedgerSnapshot(0.0, 0.0, entry["device_seconds"], entry["tokens"])
    entry["seconds_per_million"] = per_million(ledger, SECOND)["busy"]
    entry["usd_per_million"] = per_million(ledger, price)["busy"] if price else None


def _same(a: list[str], b: list[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(b)


def _prefix(a: list[str], b: list[str]) -> int:
    """Tokens that are the same from the first on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))


def _part(asked: dict[str, Any], show: Progress, on_request: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """One part in a process of its own. Raises FenError with its sentence."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.ladder_rung"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        assert child.stdin is not None and child.stdout is not None
        others = Disturbance(child.pid, os.getpid())
        try:
            with child.stdin as pipe, contextlib.suppress(BrokenPipeError):
                json.dump(asked, pipe)
            for line in child.stdout:
                message = json.loads(line)
                if "progress" in message:
                    show(*message["progress"])
                elif "request" in message and on_request is not None:
                    on_request(message["request"])
                elif "error" in message:
                    raise FenError(message["error"])
                elif "result" in message:
                    if asked["part"] == "rung":
                        message["result"]["others_cpu_share"] = others.share()
                    return message["result"]
            status = child.wait()
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            raise FenError(f"the process of this part of the ladder ended with status {status}: {last}")
        finally:
            child.kill()
            child.wait()
            child.stdout.close()


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    """A progress bar on standard error; a line where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    console = Console(stderr=True)
    if not console.is_terminal:
        print(title, file=sys.stderr, flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def render(result: results.Result) -> str:
    """The conditions, the table, the baseline and the target, as text that is markdown too."""
    return "\n\n".join([conditions(result), table(result), *notes(result)])


def conditions(result: results.Result) -> str:
    """One paragraph: everything that a US$ figure needs beside it."""
    data, work = result.data, result.data["workload"]
    dummy = ", dummy weights" if data["load_format"] == "dummy" else ""
    price = (
        f"US$ at {result.price.usd_per_device_hour:g} a device-hour ({result.price.name}, {result.price.date}, "
        f"{result.price.source})"
        if result.price
        else f"No US$: {no_price(result.device)}"
    )
    tail, new = work["tail"], work["new_tokens"]
    flow = "all there from the start" if work["concurrency"] >= work["requests"] else "the next starts as one ends"
    return (
        f"{result.model} {result.quantization}{dummy} on {result.device}, {data['threads']} threads. "
        f"{work['requests']} requests, saturated: {flow}. Prompts of "
        f"{work['shared_prefix'] + tail[0]} to {work['shared_prefix'] + tail[1]} tokens, {work['shared_prefix']} of "
        f"them shared by every second one; answers of {new[0]} to {new[1]} tokens, greedy. Basis busy: all of the "
        f"device's time but idle and start-up, utilisation 100%. {price}; 3:1 blend of prompt and answer tokens."
    )


def table(result: results.Result) -> str:
    rows = []
    for number, rung in enumerate(result.data["rungs"], 1):
        money = rung["usd_per_million"]
        rows.append(
            [
                f"{number}. {rung['name']}",
                str(rung["batch"]),
                f"{rung['tokens_per_second']:.1f}",
                f"{rung['roofline_share']:.0%}",
                f"{rung['seconds_per_million']['blended_3_to_1']:,.0f}",
                usd(money["blended_3_to_1"]) if money else "no price",
                "" if number == 1 else f"{-rung['cut']:+.1%}".replace("-", "−"),
                f"{rung['perplexity']:.2f}",
                f"{rung['top1_agreement']:.1%}",
                f"{rung['greedy_agreement']:.0%}",
            ]
        )
    header = [
        "rung", "at a time", "answer tokens/s", "of the roofline", "device s per million", "US$ per million",
        "against 1", "perplexity", "same top token", "same text",
    ]  # fmt: skip
    return markdown_table(header, rows)


def notes(result: results.Result) -> list[str]:
    data = result.data
    rungs, base = data["rungs"], data["baseline"]
    lines = ["\n".join(f"{i}. {r['name']}: {r['technique']} ({r['settings']})" for i, r in enumerate(rungs, 1))]
    lines.append(
        f"Rung 1 in {base['dtype']}, its fastest dtype here, runs at {base['speed_against_transformers']:.2f} times "
        f"the speed of transformers {base['transformers_version']}'s generate() in {base['transformers_dtype']}, its "
        f"fastest, on {base['requests']} of the requests, taking turns. Perplexity and the most likely token: of "
        f"{data['workload']['quality_tokens']} tokens of prose, rung 1's as the reference; same text: tokens of the "
        "answers that are rung 1's from the first on."
    )
    if data["complete"]:
        cut = rungs[-1]["cut"]
        met, way = "met" if cut >= data["target_cut"] else "missed", "below" if cut >= 0 else "above"
        lines.append(
            f"The last rung is {abs(cut):.1%} {way} the first: the target of {data['target_cut']:.0%} is {met}."
        )
    else:
        lines.append(f"Not complete: {len(rungs)} rungs are measured.")
    share = max(r["others_cpu_share"] or 0.0 for r in rungs)
    lines.append(
        f"Other processes used at most {share:.0%} of the CPUs during a rung. Beating another model's price says "
        "nothing about quality."
    )
    return lines


__all__ = ["KIND", "Workload", "conditions", "entry_of", "notes", "render", "run", "table"]
