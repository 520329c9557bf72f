"""The cases of `fen bench kernels` as pytest-benchmark tests: `pytest bench/ --benchmark-only`.

On a GPU one round is a replay of a CUDA graph that holds `calls` calls, on a CPU one pass over the copies of the
weights; `calls`, bytes and FLOPs of a call are in the extra info. Baselines are groups' other members.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import kernels
from bench.kernel_cases import Case
from bench.operations import Operation
from bench.timing import Call, capture

CALLS = 64  # that a graph holds at least
CASES = kernels.cases_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"), quick=True)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> Operation:
    place, prepare = kernels.choose()
    return prepare(case, place)


def round_of(calls: list[Call]) -> tuple[Callable[[], None], int]:
    """A function that makes several calls and waits for them, and how many."""
    if torch.cuda.is_available():
        for call in calls:
            call()
        count = max(CALLS, len(calls))
        graph = capture(calls, count)

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay, count

    def go() -> None:
        for call in calls:
            call()

    return go, len(calls)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel} {case.label}")
def test_kernel(case: Case, benchmark: Any) -> None:
    benchmark.group = f"{case.kernel} {case.label}"
    operation = prepared(case)
    error, allowed = operation.error()
    assert error <= allowed
    function, calls = round_of(operation.calls)
    benchmark.extra_info.update(calls=calls, bytes=operation.bytes, flops=operation.flops, error=error)
    benchmark(function)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel} {case.label}")
def test_baseline(case: Case, benchmark: Any) -> None:
    """The first baseline that runs: the plainest way to do the same in PyTorch."""
    benchmark.group = f"{case.kernel} {case.label}"
    runnable = {name: calls for name, calls in prepared(case).baselines.items() if not isinstance(calls, str)}
    if not runnable:
        pytest.skip("no baseline for this case")
    name = next(iter(runnable))
    function, calls = round_of(runnable[name])
    benchmark.extra_info.update(calls=calls, baseline=name)
    benchmark(function)
