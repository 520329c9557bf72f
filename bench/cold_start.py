"""From `fen serve` to the first token, and the memory it takes: `python -m bench.cold_start`.

The clock starts with the process and stops with the first piece of text of a streamed completion that is asked for as
soon as /ready says so. Memory is read from /proc while the server starts, answers that request and then a long prompt
beside eight short ones: the sum of the resident sets of all its processes (pages that two of them share count twice),
and the sum of their proportional sets (shared pages counted once).

The stages of the engine's start come from the server's log: libraries (the imports), checkpoint (its header and
tokenizer), device, weights (read, packed and, on a GPU, copied), kernels (Triton's, compiled or read from its cache),
warm-up, calibration (of the roofline). What is left of the time until /ready is the front end's and the processes'.
CUDA graphs are captured while serving, as batches of a size come for the second time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench import results
from bench.local_server import free_port, start, stop, wait_ready
from bench.report import markdown_table, median_and_spread

SAMPLE_SECONDS = 0.05
FIRST_TOKEN_TARGET = 8.0  # seconds
# What each stage may take of them, for the default model on a CPU.
STAGES = {
    "front end": 2.0, "libraries": 2.5, "checkpoint": 0.5, "device": 0.2, "weights": 1.5, "warm-up": 0.5,
    "calibration": 0.5,
}  # fmt: skip
MEMORY_TARGET = 1e9  # bytes
RESULTS = Path(__file__).resolve().parent / "results"


def descendants(pid: int) -> list[int]:
    """`pid` and every process below it, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def memory(pid: int) -> tuple[int, int]:
    """Resident and proportional bytes of one process; zeros once it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    fields = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    return int(fields.get("Rss", 0)) * 1024, int(fields.get("Pss", 0)) * 1024


class MemoryWatch(threading.Thread):
    """Samples a process and its descendants until `stop`; keeps the largest sums."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.resident = self.proportional = self.processes = 0
        self._pid = pid
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.is_set():
            pids = descendants(self._pid)
            both = [memory(pid) for pid in pids]
            self.resident = max(self.resident, sum(rss for rss, _ in both))
            self.proportional = max(self.proportional, sum(pss for _, pss in both))
            self.processes = max(self.processes, len(pids))
            self._stopped.wait(SAMPLE_SECONDS)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def complete(port: int, prompt: str, max_tokens: int) -> float:
    """Asks for a streamed completion; returns time.monotonic() of its first piece of text. RuntimeError on an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read().decode()}")
    first = None
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the completion failed: {event['error']}")
            if first is None and event["choices"] and event["choices"][0]["text"]:
                first = time.monotonic()
    connection.close()
    if first is None:
        raise RuntimeError("the completion had no text")
    return first


def measure(arguments: list[str]) -> dict[str, Any]:
    """One start of `fen serve` with `arguments` added: seconds, bytes and stages. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure([*arguments, "--log-file", f"{folder}/log", "--log-format", "json"], Path(folder, "log"))


def _measure(arguments: list[str], log: Path) -> dict[str, Any]:
    port = free_port()
    started = time.monotonic()
    process = start(arguments, port)
    watch = MemoryWatch(process.pid)
    watch.start()
    try:
        ready = wait_ready(port, process)
        first = complete(port, "The capital of France is", 16)
        stages = stages_of(log.read_text(encoding="utf-8"))
        prompts = ["word " * 1500, *("Tell me about the sea." for _ in range(8))]
        threads = [threading.Thread(target=complete, args=(port, prompt, 64)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        watch.stop()
        stop(process)
    return {
        "ready_seconds": ready - started,
        "first_token_seconds": first - started,
        "resident_bytes": watch.resident,
        "proportional_bytes": watch.proportional,
        "processes": watch.processes,
        "stages": {"front end": ready - started - sum(stages.values())} | stages,
    }


def stages_of(log: str) -> dict[str, float]:
    """Seconds by stage, of the line "ready" in a server's log in JSON."""
    lines = [json.loads(line) for line in log.splitlines()]
    return next((line["stages"] for line in lines if "stages" in line), {})


def render(runs: list[dict[str, Any]]) -> str:
    """The runs as a markdown table with the targets, then the stages of the time until /ready."""

    def row(name: str, key: str, scale: float, unit: str, target: float | None) -> list[str]:
        values = [run[key] / scale for run in runs]
        wanted = ""
        if target is not None:
            state = "met" if statistics.median(values) < target / scale else "missed"
            wanted = f"below {target / scale:g} {unit}: {state}"
        return [name, f"{median_and_spread(values, 1 if unit == 's' else 0)} {unit}", wanted]

    def stage(name: str) -> list[str]:
        values = [run["stages"].get(name, 0.0) for run in runs]
        budget = STAGES.get(name)
        state = "" if budget is None else "kept" if statistics.median(values) <= budget else "exceeded"
        return [name, f"{median_and_spread(values, 2)} s", f"{budget:g} s: {state}" if budget is not None else ""]

    names = dict.fromkeys(name for run in runs for name in run["stages"])
    whole = markdown_table(
        ["", "measured", "wanted"],
        [
            row("ready", "ready_seconds", 1, "s", None),
            row("first token", "first_token_seconds", 1, "s", FIRST_TOKEN_TARGET),
            row("peak memory, resident sets added", "resident_bytes", 1e6, "MB", MEMORY_TARGET),
            row("peak memory, shared pages once", "proportional_bytes", 1e6, "MB", None),
        ],
    )
    return whole + "\n\n" + markdown_table(["stage", "measured", "budget"], [stage(name) for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cold_start",
        description="From `fen serve` to the first token, and the memory. Other options go to fen serve.",
    )
    parser.add_argument("--kv-cache-tokens", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "cold_start.json", help="where the result is kept")
    arguments, others = parser.parse_known_args()
    if not os.path.exists("/proc/self/smaps_rollup"):
        sys.exit("This needs /proc/PID/smaps_rollup, which only Linux has.")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # ends the server as well
    serve_arguments = ["--kv-cache-tokens", str(arguments.kv_cache_tokens), *others]
    try:
        runs = [measure(serve_arguments) for _ in range(arguments.repetitions)]
    except RuntimeError as error:
        sys.exit(f"{error}. Command: fen serve {' '.join(serve_arguments)}")
    result = results.new("cold-start", {"arguments": serve_arguments, "runs": runs})
    results.save(arguments.json, result)
    processes = max(int(run["processes"]) for run in runs)
    print(f"fen serve {' '.join(serve_arguments)} on {result.device}, commit {result.commit}")
    print(f"Medians of {len(runs)} (smallest to largest), {processes} processes.\n")
    print(render(runs))
    print(f"kept in {arguments.json}")


if __name__ == "__main__":
    main()
