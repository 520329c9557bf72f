"""The lines of `fen bench load`: what is wanted, what was measured, whether it was met."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection, Coroutine
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from bench import results
from bench.load import scenarios
from bench.load.disturbances import DISTURBANCES
from bench.load.scenarios import FLAT, MIB, percentile
from bench.load.server import Server, running
from bench.machine import Disturbance
from bench.report import markdown_table
from engine import cores
from engine.errors import FenError
from engine.messages import EngineOptions

STREAMS, TOKENS, ROUNDS = 16, 256, 15  # of the comparison with the engine alone
SEQS, QUEUE = 16, 64  # of the server that the thousand connections come to
CONTEXT = 1024
PLACES = SEQS + QUEUE
Data = dict[str, Any]


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


@dataclasses.dataclass(frozen=True)
class Place:
    """What a scenario gets. options: for an engine of its own beside `server`."""

    server: Server
    options: EngineOptions
    soak_seconds: float


Measure = Callable[[Place], Coroutine[Any, Any, tuple[list[Line], Data]]]  # -> the lines, and what was seen


def run(
    options: EngineOptions,
    soak_seconds: float,
    json_path: str | None,
    only: Collection[str] = (),
    resume: bool = False,
) -> None:
    """Measures (in about 20 minutes, with a soak of two), prints each line as it comes, then the table.

    json_path: written after each scenario. only: names of SCENARIOS; none: all. resume: leaves out those that the file
    holds already. Raises FenError for a name or a file that is none, and when a server does not start.
    """
    if unknown := set(only) - SCENARIOS.keys():
        raise FenError(f"--only {min(unknown)}: no such scenario; there are {', '.join(SCENARIOS)}")
    done: dict[str, Any] = {}
    if resume and json_path is not None and Path(json_path).exists():
        done = results.load(Path(json_path), "load").data["scenarios"]
    wanted = [name for name in SCENARIOS if (not only or name in only) and name not in done]
    for narrow in (True, False):
        names = [name for name in wanted if (name in NARROW) == narrow]
        places = ["--max-num-seqs", str(SEQS), "--max-queue", str(QUEUE)] if narrow else []
        if names:
            with running([*arguments_of(options), *places]) as server:
                for name in names:
                    done[name] = _measure(name, Place(server, options, soak_seconds))
                    if json_path is not None:
                        data = {"scenarios": {key: done[key] for key in SCENARIOS if key in done}}
                        results.save(Path(json_path), results.new("load", data, model=options.model))
    lines = [Line(**line) for name in SCENARIOS if name in done for line in done[name]["lines"]]
    print("\n" + markdown_table(["line", "wanted", "measured", ""], [line.row() for line in lines]))
    if json_path is not None:
        print(f"kept in {json_path}")


def _measure(name: str, place: Place) -> Data:
    started, disturbance = time.monotonic(), Disturbance(os.getpid(), place.server.pid, place.server.engine_pid())
    lines, seen = asyncio.run(SCENARIOS[name](place))
    for line in lines:
        print(f"{line.what}: {' '.join(line.row()[2:])}", flush=True)
    return {
        "lines": [dataclasses.asdict(line) for line in lines],
        "seen": seen,
        "seconds": time.monotonic() - started,
        "others_used_cpus": disturbance.share(),
    }


def arguments_of(options: EngineOptions) -> list[str]:
    """`fen serve`'s, for what is set."""
    defaults = EngineOptions()
    found = ["--max-model-len", str(options.max_model_len or CONTEXT)]
    found += ["--kv-cache-tokens", str(options.kv_cache_tokens or 16 * CONTEXT)]
    for name in ("model", "dtype", "threads", "load_format", "device"):
        if (value := getattr(options, name)) != getattr(defaults, name):
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


async def _burst(place: Place) -> tuple[list[Line], Data]:
    server = place.server
    await server.calm()  # what it makes when it is first idle, it has
    await scenarios.burst(server)  # what the first thousand make the process grow by, it keeps for the next
    memory = server.memory()
    seen = await scenarios.burst(server)
    growth = {process: (value - memory[process]) / MIB for process, value in server.memory().items()}
    wrong = sum(count for status, count in seen.statuses.items() if status not in (200, 429))
    await server.wait_idle()
    return [
        Line("1,000 connections in 5 s: neither served nor 429", 0, wrong, "answers"),
        Line(f"of them served before the first 429 ({PLACES} places)", PLACES, seen.admitted_first, "answers", False),
        Line("429, from the connect to its end, p99", 100, 1e3 * percentile(seen.refusals, 99), "ms"),
        Line("memory after 1,000 more connections, front end", 16, growth["front end"], "MiB more"),
        Line("memory after 1,000 more connections, engine", 16, growth["engine"], "MiB more"),
    ], {"statuses": seen.statuses, "growth_mib": growth}


async def _soak(place: Place) -> tuple[list[Line], Data]:
    seconds = place.soak_seconds
    if seconds <= 0:
        return [], {}
    soak = await scenarios.soak(place.server, seconds)
    held = sum(soak.after[name] for name in ("server_load", "running", "waiting", "kv_blocks_used"))
    broken = sum(count for status, count in soak.statuses.items() if status >= 500)
    return [
        Line(f"{seconds:g} s of random load: 5xx", 0, broken, "answers"),
        Line("blocks and places still held after it", 0, held, ""),
        Line("memory during it, front end", FLAT, soak.slope("front end") / MIB, "MiB a minute"),
        Line("memory during it, engine", FLAT, soak.slope("engine") / MIB, "MiB a minute"),
    ], {"statuses": soak.statuses, "seconds": seconds, "memory": soak.memory}


async def _idle(place: Place) -> tuple[list[Line], Data]:
    return [Line("an idle server's CPU", 1, 100 * await scenarios.idle(place.server), "% of a core")], {}


async def _cancelled(place: Place) -> tuple[list[Line], Data]:
    answer = await scenarios.cancelled(place.server)
    await place.server.wait_idle()
    return [Line("200 long requests cancelled, then a short one", 5, answer.seconds, "s")], {}


def _beside(name: str) -> Measure:
    async def measure(place: Place) -> tuple[list[Line], Data]:
        seen = await scenarios.beside(place.server, DISTURBANCES[name]())
        # Another program that takes a core for a second spoils the turn that it falls into, and not the median.
        ratio = statistics.median(seen.ratios())
        line = Line(f"inter-token p99 of a stream beside {name}", 3, ratio, "times the quiet one")
        requests = {"statuses": seen.statuses, "seconds_each": _spread(seen.seconds)}
        gaps = {"quiet": _spread([*chain(*seen.quiet)]), "loud": _spread([*chain(*seen.loud)])}
        return [line], {"ratios": seen.ratios(), **gaps, **requests}

    return measure


def _spread(values: list[float]) -> dict[str, float]:
    return {f"p{share}": percentile(values, share) for share in (50, 90, 99)} | {"most": max(values, default=0.0)}


async def _health(place: Place) -> tuple[list[Line], Data]:
    taken = await scenarios.health_under_load(place.server, STREAMS, TOKENS // 2)
    return [Line(f"GET /health beside {STREAMS} streams, p99", 50, 1e3 * percentile(taken, 99), "ms")], {}


async def _overhead(place: Place) -> tuple[list[Line], Data]:
    """The same work for the engine in a process without HTTP and for the server, one right after the other, each of
    them first in every other round: the median over the rounds of what the server lost. A machine whose speed
    drifts does so between rounds more than within one."""
    alone, served = [], []
    local = msgspec.structs.replace(place.options, kv_cache_tokens=16 * CONTEXT, max_model_len=CONTEXT)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, _load_engine, (local,)) as engine:

        async def run_alone(number: int) -> None:
            await place.server.wait_idle()
            alone.append(await asyncio.wrap_future(engine.submit(_engine_rate, number)))

        async def run_served(_: int) -> None:
            served.append(await _served_rate(place.server))

        for number in range(ROUNDS + 1):
            order = (run_alone, run_served) if number % 2 else (run_served, run_alone)
            for run in order:
                await run(number)
    lost = [100 * (1 - rates[1] / rates[0]) for rates in zip(alone[1:], served[1:], strict=True)]  # the first: warm-up
    line = Line(f"tokens/s that HTTP takes from the engine, {STREAMS} streams", 5, statistics.median(lost), "%")
    return [line], {"alone": alone[1:], "served": served[1:], "lost_percent": lost}


async def _served_rate(server: Server) -> float:
    started = time.monotonic()
    answers = await scenarios.streams(server, STREAMS, TOKENS)
    return STREAMS * TOKENS / (max(answer.ended for answer in answers) - started)


_engine: Any = None  # of the process that runs without HTTP


def _load_engine(options: EngineOptions) -> None:
    global _engine
    cores.bind(options.threads or cores.default_threads())  # as the server's
    from bench.local_engine import LocalEngine  # imports torch

    _engine = LocalEngine(options)


def _engine_rate(_: int) -> float:
    encode = _engine.checkpoint.tokenizer.encode
    prompts = [encode(f"Write a long story about the number {i}.") for i in range(STREAMS)]
    return float(_engine.generate(prompts, TOKENS).total_rate)


async def _hang(place: Place) -> tuple[list[Line], Data]:
    noticed, replaced = await scenarios.hang(place.server)
    return [
        Line("an engine stopped by SIGSTOP: /health answers 503 after", 5, noticed, "s"),
        Line("and another engine is ready after", 60, replaced, "s"),
    ], {}


NARROW = ("burst", "soak")  # come to a server with SEQS and QUEUE places
SCENARIOS: dict[str, Measure] = {
    "burst": _burst,
    "soak": _soak,
    "overhead": _overhead,  # with a pool as fresh as the engine's that it is compared with
    "idle": _idle,
    "cancelled": _cancelled,
    **{name: _beside(name) for name in DISTURBANCES},
    "health": _health,
    "hang": _hang,
}
