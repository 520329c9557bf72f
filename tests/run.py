"""`make test`: three suites, each in a pytest process of its own, and a summary.

Triton decides once per process, at import, whether it interprets or compiles; hence three processes. These two use one
core each and run side by side, after the first, which wants the machine for itself.
Exits 0 only if every suite passed. Arguments are handed to pytest.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

TESTS = pathlib.Path(__file__).resolve().parent
INTERPRETER = "tests/kernels/interpreter"
CODEGEN = "tests/kernels/codegen"
APART = (INTERPRETER, CODEGEN, "tests/load")  # `make test-load` runs the last
NO_TESTS_SELECTED = 5  # pytest's exit status: right when -k selects nothing in this suite


class Suite(NamedTuple):
    name: str
    paths: list[str]
    environment: dict[str, str]


class Outcome(NamedTuple):
    """status: pytest's. held: the output, if it was not passed on."""

    status: int
    last: str
    seconds: float
    held: str


def run_suite(suite: Suite, args: list[str], hold: bool = False) -> Outcome:
    """Run pytest with its output passed on as it comes, or held back."""
    pytest_args = [*suite.paths, *args]
    started, held = time.monotonic(), ""
    command = [sys.executable, "-m", "pytest", "-q", f"--color={'yes' if sys.stdout.isatty() else 'no'}", *pytest_args]
    last = ""
    with subprocess.Popen(
        command,
        cwd=TESTS.parent,
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            **suite.environment,
        },  # they test the CPU's engine; a GPU: bench.gpu
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if hold:
                held += line
            else:
                print(line, end="", flush=True)
            last = line.strip() or last
    return Outcome(process.returncode, last, time.monotonic() - started, held)


def main(args: list[str]) -> int:
    first = Suite("engine, server, bench", ["tests", *(f"--ignore={path}" for path in APART)], {})
    beside = []
    if sys.platform == "linux":  # where Triton is
        alone = {"OMP_NUM_THREADS": "1"}
        beside = [
            Suite("kernels, interpreted", [INTERPRETER], {"TRITON_INTERPRET": "1"} | alone),
            Suite("kernels, compiled", [CODEGEN], alone),
        ]
    print(f"== {first.name}", flush=True)
    outcomes = [(first, run_suite(first, args))]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = [(suite, pool.submit(run_suite, suite, args, hold=suite is not beside[0])) for suite in beside]
        for suite, future in running:
            print(f"== {suite.name}", flush=True)
            outcomes.append((suite, future.result()))
            print(outcomes[-1][1].held, end="", flush=True)
    failed = False
    print()
    for suite, outcome in outcomes:
        passed = outcome.status == 0 or (outcome.status == NO_TESTS_SELECTED and bool(args))
        failed |= not passed
        print(f"{'passed' if passed else 'FAILED'}  {suite.name:24} {outcome.seconds:5.0f} s  {outcome.last}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
