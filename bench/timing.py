"""How long one call takes: inside a replayed CUDA graph on a GPU, by the wall clock on a CPU.

A benchmark that calls one function on one buffer measures the cache. So a measurement takes several calls, the same
work on different buffers (`copies` says how many), and goes through them in turn.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
GRAPH_SECONDS = 4e-3  # of eager calls that one graph holds at least: what a replay itself costs must not count
MAX_CALLS = 1024


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of one call: the median, the smallest and the largest of the repetitions."""

    median: float
    low: float
    high: float


def copies(bytes_of_one: int, cache_bytes: int, limit: int = 512) -> int:
    """How many sets of buffers exceed a cache of cache_bytes twice over, at most `limit`; without a cache, one."""
    return min(max(2, math.ceil(2 * cache_bytes / max(bytes_of_one, 1))), limit) if cache_bytes else 1


def measure(calls: Sequence[Call], device: torch.device, seconds: float) -> Time:
    """Time of one call; about `seconds` of repetitions (0: one repetition)."""
    return graph_time(calls, seconds) if device.type == "cuda" else wall_time(calls, seconds)


def wall_time(calls: Sequence[Call], seconds: float) -> Time:
    """A repetition is one round through all calls, after one that does not count (unless `seconds` is 0)."""
    if seconds > 0:
        for call in calls:
            call()
    rounds: list[float] = []
    while not rounds or (sum(rounds) < seconds and len(rounds) < 1000) or (seconds > 0 and len(rounds) < 3):
        started = time.perf_counter()
        for call in calls:
            call()
        rounds.append(time.perf_counter() - started)
    return _time([r / len(calls) for r in rounds])


def graph_time(calls: Sequence[Call], seconds: float) -> Time:
    """A repetition is one replay of a graph that goes through the calls, several times where they are short."""
    eager = _warm_up(calls)
    count = min(max(len(calls), math.ceil(GRAPH_SECONDS / max(eager, 1e-6))), max(MAX_CALLS, len(calls)))
    graph = capture(calls, count)
    once = _replays(graph, 3)[-1]
    return _time([t / count for t in _replays(graph, min(max(5, round(seconds / max(once, 1e-6))), 100))])


def capture(calls: Sequence[Call], count: int) -> torch.cuda.CUDAGraph:
    """`count` calls, taken in turn, as a graph. They must have run before: nothing may compile during the capture."""
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        try:
            for i in range(count):
                calls[i % len(calls)]()
        except BaseException:
            try:
                graph.capture_end()
            except RuntimeError:  # the first error says more; but the allocator must not stay in the broken capture
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _warm_up(calls: Sequence[Call]) -> float:
    """Runs every call twice; returns seconds of one in the second round."""
    elapsed = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - started
    return elapsed / len(calls)


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Seconds of each of `count` replays, by events around it."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _time(values: list[float]) -> Time:
    return Time(statistics.median(values), min(values), max(values))
