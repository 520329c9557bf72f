"""The lines of `fen bench load`: what is wanted, what was measured, whether it was met."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.load import scenarios
from bench.load.client import completion
from bench.load.scenarios import MIB, PATH, percentile
from bench.load.server import Server, running
from bench.machine import Disturbance
from bench.report import markdown_table
from engine.messages import EngineOptions

STREAMS, TOKENS, ROUNDS = 16, 64, 3  # of the comparison with the engine alone
SEQS, QUEUE = 16, 64  # of the server that the thousand connections come to
CONTEXT = 1024
MEGABYTE = "The quick brown fox jumps over the lazy dog, and then it rests in the sun. " * 14000
HARD_SCHEMA = {
    "type": "object",
    "properties": {
        f"field_{i}": {"type": "array", "items": {"enum": [f"value {i} {j}" for j in range(100)]}, "maxItems": 50}
        for i in range(50)
    },
}


@dataclasses.dataclass
class Line:
    """unit: of wanted and measured. most: whether `wanted` is the most that is allowed, or else the least."""

    what: str
    wanted: float
    measured: float
    unit: str
    most: bool = True

    @property
    def met(self) -> bool:
        return self.measured <= self.wanted if self.most else self.measured >= self.wanted

    def row(self) -> list[str]:
        sign = "≤" if self.most else "≥"
        return [
            self.what,
            f"{sign} {self.wanted:g} {self.unit}",
            f"{self.measured:.3g} {self.unit}",
            "met" if self.met else "missed",
        ]


def run(options: EngineOptions, soak_seconds: float, json_path: str | None) -> None:
    """Measures all lines (about five minutes with a soak of two), prints each as it comes, then the table.

    Raises FenError when a server does not start.
    """
    lines: list[Line] = []
    notes: dict[str, Any] = {}

    def show(line: Line) -> None:
        lines.append(line)
        print(f"{line.what}: {' '.join(line.row()[2:])}", flush=True)

    disturbance = Disturbance(os.getpid())
    arguments = arguments_of(options)
    with running([*arguments, "--max-num-seqs", str(SEQS), "--max-queue", str(QUEUE)]) as server:
        asyncio.run(_crowd(server, show, notes, soak_seconds))
    with running(arguments) as server:
        asyncio.run(_alone(server, show, notes))
        _overhead(server, options, show, notes)
        asyncio.run(_hang(server, show))
    notes["others_used_cpus"] = disturbance.share()
    print("\n" + markdown_table(["line", "wanted", "measured", ""], [line.row() for line in lines]))
    if json_path is not None:
        data = {"lines": [dataclasses.asdict(line) | {"met": line.met} for line in lines], **notes}
        results.save(Path(json_path), results.new("load", data, model=options.model))
        print(f"kept in {json_path}")


def arguments_of(options: EngineOptions) -> list[str]:
    """`fen serve`'s, for what is set."""
    defaults = EngineOptions()
    found = ["--max-model-len", str(options.max_model_len or CONTEXT)]
    found += ["--kv-cache-tokens", str(options.kv_cache_tokens or 16 * CONTEXT)]
    for name in ("model", "dtype", "threads", "load_format", "device"):
        if (value := getattr(options, name)) != getattr(defaults, name):
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


async def _crowd(server: Server, show: Callable[[Line], None], notes: dict[str, Any], soak_seconds: float) -> None:
    await scenarios.burst(server)  # what the first thousand make the process grow by, it keeps for the next
    memory = server.memory()
    seen = await scenarios.burst(server)
    growth = {process: (value - memory[process]) / MIB for process, value in server.memory().items()}
    wrong = sum(count for status, count in seen.statuses.items() if status not in (200, 429))
    places = SEQS + QUEUE
    notes["burst"] = {"statuses": seen.statuses, "growth_mib": growth}
    show(Line("1,000 connections in 5 s: neither served nor 429", 0, wrong, "answers"))
    show(Line(f"of them served before the first 429 ({places} places)", places, seen.admitted_first, "answers", False))
    show(Line("429, from the connect to its end, p99", 100, 1e3 * percentile(seen.refusals, 99), "ms"))
    show(Line("memory after 1,000 more connections, front end", 16, growth["front end"], "MiB more"))
    show(Line("memory after 1,000 more connections, engine", 16, growth["engine"], "MiB more"))
    await server.wait_idle()
    if soak_seconds <= 0:
        return
    soak = await scenarios.soak(server, soak_seconds)
    notes["soak"] = {"statuses": soak.statuses, "seconds": soak_seconds, "memory": soak.memory}
    held = sum(soak.after[name] for name in ("server_load", "running", "waiting", "kv_blocks_used"))
    broken = sum(count for status, count in soak.statuses.items() if status >= 500)
    show(Line(f"{soak_seconds:g} s of random load: 5xx", 0, broken, "answers"))
    show(Line("blocks and places still held after it", 0, held, ""))
    show(Line("memory during it, front end", 8, soak.slope("front end") / MIB, "MiB a minute"))
    show(Line("memory during it, engine", 8, soak.slope("engine") / MIB, "MiB a minute"))


async def _alone(server: Server, show: Callable[[Line], None], notes: dict[str, Any]) -> None:
    show(Line("an idle server's CPU", 1, 100 * await scenarios.idle(server), "% of a core"))
    answer = await scenarios.cancelled(server)
    show(Line("200 long requests cancelled, then a short one", 5, answer.seconds, "s"))
    await server.wait_idle()
    for name, requests in disturbances().items():
        quiet, _ = await scenarios.beside(server, 300, [])
        loud, statuses = await scenarios.beside(server, 300, requests)
        ratio = percentile(loud, 99) / percentile(quiet, 99)
        notes[f"beside {name}"] = {"quiet": _gaps(quiet), "loud": _gaps(loud), "statuses": statuses}
        show(Line(f"inter-token p99 of a stream beside {name}", 3, ratio, "times the quiet one"))
    taken = await scenarios.health_under_load(server, STREAMS, 2 * TOKENS)
    show(Line(f"GET /health beside {STREAMS} streams, p99", 50, 1e3 * percentile(taken, 99), "ms"))


def disturbances() -> dict[str, list[tuple[str, str, Any]]]:
    """What is sent over and over beside a stream. A text that does not fit is refused by its size; /tokenize reads it
    all."""
    schema = {"type": "json_schema", "json_schema": {"name": "hard", "schema": HARD_SCHEMA}}
    return {
        "prompts of 1 MB": [("POST", PATH, completion(MEGABYTE, 1)), ("POST", "/tokenize", {"prompt": MEGABYTE})],
        "a hard schema": [("POST", PATH, completion("x", 1, response_format=schema, ignore_eos=False))],
    }


def _gaps(gaps: list[float]) -> dict[str, float]:
    return {f"p{share}": percentile(gaps, share) for share in (50, 90, 99)} | {"most": max(gaps, default=0.0)}


def _overhead(server: Server, options: EngineOptions, show: Callable[[Line], None], notes: dict[str, Any]) -> None:
    """The same work for the engine in a process without HTTP and for the server, taking turns."""
    alone, served = [], []
    local = msgspec.structs.replace(options, kv_cache_tokens=16 * CONTEXT, max_model_len=CONTEXT)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _load_engine, (local,)) as engine:
        for repetition in range(ROUNDS + 1):
            rates = engine.submit(_engine_rate, repetition).result(), asyncio.run(_served_rate(server))
            if repetition:  # the first warms both up
                alone.append(rates[0])
                served.append(rates[1])
    notes["overhead"] = {"alone": alone, "served": served}
    ratio = statistics.median(served) / statistics.median(alone)
    show(Line(f"tokens/s that HTTP takes from the engine, {STREAMS} streams", 5, 100 * (1 - ratio), "%"))


async def _served_rate(server: Server) -> float:
    await server.wait_idle()
    started = time.monotonic()
    answers = await scenarios.streams(server, STREAMS, TOKENS)
    return STREAMS * TOKENS / (max(answer.ended for answer in answers) - started)


_engine: Any = None  # of the process that runs without HTTP


def _load_engine(options: EngineOptions) -> None:
    global _engine
    from bench.local_engine import LocalEngine  # imports torch

    _engine = LocalEngine(options)


def _engine_rate(_: int) -> float:
    encode = _engine.checkpoint.tokenizer.encode
    prompts = [encode(f"Write a long story about the number {i}.") for i in range(STREAMS)]
    return float(_engine.generate(prompts, TOKENS).total_rate)


async def _hang(server: Server, show: Callable[[Line], None]) -> None:
    noticed, replaced = await scenarios.hang(server)
    show(Line("an engine stopped by SIGSTOP: /health answers 503 after", 5, noticed, "s"))
    show(Line("and another engine is ready after", 60, replaced, "s"))
