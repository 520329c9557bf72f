"""`make test`: the suites one after another, each in a pytest process of its own, and a summary.

Triton decides once per process, at import, whether it interprets or compiles; hence three processes.
Exits 0 only if every suite passed. Arguments are handed to pytest.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

TESTS = pathlib.Path(__file__).resolve().parent
INTERPRETER = "tests/kernels/interpreter"
CODEGEN = "tests/kernels/codegen"
APART = (INTERPRETER, CODEGEN, "tests/load")  # `make test-load` runs the last
NO_TESTS_SELECTED = 5  # pytest's exit status: right when -k selects nothing in this suite


def run_suite(pytest_args: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run pytest with its output passed on as it comes; its exit status and last line."""
    command = [sys.executable, "-m", "pytest", "-q", f"--color={'yes' if sys.stdout.isatty() else 'no'}", *pytest_args]
    last = ""
    with subprocess.Popen(
        command,
        cwd=TESTS.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},  # they test the CPU's engine; a GPU: bench.gpu
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def main(args: list[str]) -> int:
    suites: list[tuple[str, list[str], dict[str, str]]] = [
        ("engine, server, bench", ["tests", *(f"--ignore={path}" for path in APART)], {})
    ]
    if sys.platform == "linux":  # where Triton is
        suites += [
            ("kernels, interpreted", [INTERPRETER], {"TRITON_INTERPRET": "1"}),
            ("kernels, compiled", [CODEGEN], {}),
        ]
    failed = False
    summary = []
    for name, paths, environment in suites:
        if not (TESTS.parent / paths[0]).exists():
            continue
        print(f"== {name}", flush=True)
        start = time.monotonic()
        status, last = run_suite([*paths, *args], environment)
        passed = status == 0 or (status == NO_TESTS_SELECTED and bool(args))
        failed |= not passed
        summary.append(f"{'passed' if passed else 'FAILED'}  {name:24} {time.monotonic() - start:5.0f} s  {last}")
    print("\n" + "\n".join(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
