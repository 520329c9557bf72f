"""This engine beside llama.cpp and transformers, in one run: `python -m bench.compare_cpu` (make bench-cpu).

Each engine is a process that stays loaded. They take turns, one measurement each, so that whatever the machine does
meanwhile happens to all of them; figures are medians with the smallest and the largest. llama.cpp comes as the prebuilt
CPU binary of node-llama-cpp from npm; a peer that cannot run is named, not left out in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import results
from bench.local_engine import Timing
from bench.machine import Disturbance
from bench.peers import install
from bench.peers.worker import PeerError, Worker
from bench.prompts import make_prompt, prose_tokens
from bench.report import markdown_table, median_and_spread
from bench.results import Result
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.errors import FenError

STREAMS = 16
STREAM_PROMPT = 100
NEW_TOKENS = 64
EXACT = "transformers float32"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Metric:
    """What is measured, in tokens a second, and what is wanted: peer -> (at least, aim) times its speed."""

    name: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    rate: Callable[[Timing], float]
    targets: dict[str, tuple[float, float | None]]


def _prefill(name: str, length: int, factor: float) -> Metric:
    return Metric(name, 1, length, 1, lambda timing: length / timing.first_seconds, {"llama.cpp": (factor, None)})


def _decode(name: str, length: int) -> Metric:
    targets: dict[str, tuple[float, float | None]] = {"llama.cpp": (1.0, 1.3), "transformers": (3.0, None)}
    return Metric(name, 1, length, NEW_TOKENS + 1, lambda timing: timing.decode_rate, targets)


METRICS = [
    _decode("decode at 100", 100),
    _decode("decode at 1000", 1000),
    _prefill("prefill of 512", 512, 2.0),
    _prefill("prefill of 2048", 2048, 3.0),
    Metric(
        f"{STREAMS} streams",
        STREAMS,
        STREAM_PROMPT,
        NEW_TOKENS,
        lambda timing: timing.total_rate,
        {"llama.cpp": (1.5, 2.5)},
    ),
]
NOTES = f"""\
Tokens a second. decode: one stream, {NEW_TOKENS} tokens after a prompt of that length, the prompt's time not counted.
prefill: until the first token. {STREAMS} streams: as many prompts of {STREAM_PROMPT} tokens given together,
{NEW_TOKENS} new tokens each, all of these over the whole time, prompts included."""


def verdict(ratio: float, least: float, aim: float | None) -> str:
    """How a ratio stands to what is wanted."""
    if ratio < least:
        return f"missed: {least:g}× wanted"
    if aim is None:
        return f"met: {least:g}× wanted"
    return f"met: {least:g}×, aim {aim:g}× " + ("reached" if ratio >= aim else "not reached")


def best_of(peer: str, rates: dict[str, dict[str, list[float]]], metric: str) -> float | None:
    """The median of a peer's fastest variant ("transformers" stands for its two dtypes); None when it was not run."""
    medians = [
        statistics.median(by_metric[metric])
        for engine, by_metric in rates.items()
        if engine.split()[0] == peer and by_metric.get(metric)
    ]
    return max(medians, default=None)


def table(rates: dict[str, dict[str, list[float]]], metrics: list[Metric]) -> str:
    """Engines as columns, then this engine's speed over each peer's, as markdown."""
    engines = list(rates)
    peers = [peer for peer in ("llama.cpp", "transformers") if any(engine.split()[0] == peer for engine in engines)]
    rows = []
    for metric in metrics:
        own = statistics.median(rates["fen"][metric.name])
        row = [metric.name, *(median_and_spread(rates[engine][metric.name]) for engine in engines)]
        for peer in peers:
            speed = best_of(peer, rates, metric.name)
            assert speed is not None
            wanted = f" ({verdict(own / speed, *metric.targets[peer])})" if peer in metric.targets else ""
            row.append(f"{own / speed:.2f}×{wanted}")
        rows.append(row)
    return markdown_table(["", *engines, *(f"fen / {peer}" for peer in peers)], rows)


def start_engines(
    checkpoint: Checkpoint, threads: int, wanted: list[str], stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The engines that run, and for each that does not, why."""
    path = str(checkpoint.path)
    longest = max(metric.prompt_tokens + metric.new_tokens for metric in METRICS)
    pool = max(longest, STREAMS * (STREAM_PROMPT + NEW_TOKENS)) + 64 * STREAMS  # whole blocks for every stream
    environment = {"OMP_NUM_THREADS": str(threads)}
    python = [sys.executable, "-m"]

    def llama_cpp() -> Worker:
        directory = Path(os.environ.get("FEN_NODE_LLAMA_CPP") or install.default_directory())
        if checkpoint.format != "gguf":
            raise PeerError("it reads GGUF files only")
        if not install.installed(directory):
            _say(f"installing node-llama-cpp {install.VERSION} in {directory}")
            install.install(directory)
        node = shutil.which("node")
        if node is None:
            raise PeerError("node is not installed")
        script = Path(install.__file__).with_name("llama_cpp.mjs")
        return Worker(
            [node, str(script), str(directory)],
            {},
            model=path,
            threads=threads,
            batch_size=512,
            flash_attention=True,
            context=longest + 64,
            streams=STREAMS,
            stream_context=STREAM_PROMPT + NEW_TOKENS + 64,
        )

    def transformers(dtype: str) -> Worker:
        command = [*python, "bench.peers.transformers_eager"]
        return Worker(command, environment, path=path, threads=threads, dtype=dtype)

    starters: dict[str, Callable[[], Worker]] = {
        "fen": lambda: Worker(
            [*python, "bench.peers.fen_engine"], environment, model=path, threads=threads, kv_cache_tokens=pool
        ),
        "llama.cpp": llama_cpp,
        "transformers bfloat16": lambda: transformers("bfloat16"),
        "transformers float32": lambda: transformers("float32"),
    }
    running: dict[str, Worker] = {}
    missing: dict[str, str] = {}
    for name, start in starters.items():
        if name.split()[0] not in wanted:
            missing[name] = "left out on request"
            continue
        _say(f"loading {name}")
        try:
            running[name] = start()
        except (PeerError, RuntimeError) as error:
            missing[name] = str(error)
        else:
            stack.callback(running[name].close)
    return running, missing


def measure(
    workers: dict[str, Worker],
    prose: list[int],
    metrics: list[Metric],
    repetitions: int,
    keep: Callable[[dict[str, Any]], None] = lambda measured: None,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[int]], list[float]]:
    """-> rates[engine][metric], each engine's tokens for the first metric, the shares of the CPUs that others used.

    `keep` gets what there is so far after each repetition, so that a run cut short is not lost.
    """
    rates: dict[str, dict[str, list[float]]] = {name: {metric.name: [] for metric in metrics} for name in workers}
    texts: dict[str, list[int]] = {}
    others: list[float] = []
    for worker in workers.values():  # memory is touched, code is generated
        worker.generate([make_prompt(prose, 64)], 4)
        worker.generate([make_prompt(prose, 64, 7 * i) for i in range(STREAMS)], 2)
    for repetition in range(1, repetitions + 1):
        for metric in metrics:
            _say(f"repetition {repetition} of {repetitions}: {metric.name}")
            prompts = [make_prompt(prose, metric.prompt_tokens, 50 * i) for i in range(metric.prompts)]
            for name, worker in workers.items():
                disturbance = Disturbance(worker.pid, os.getpid())
                timing = worker.generate(prompts, metric.new_tokens)
                others.append(disturbance.share())
                rates[name][metric.name].append(metric.rate(timing))
                texts.setdefault(name, timing.tokens[0])
        keep(
            {
                "repetitions": repetition,
                "tokens_per_second": rates,
                "tokens_as_float32": {name: agreement(tokens, texts.get(EXACT, [])) for name, tokens in texts.items()},
                "others_cpu_share": {"median": statistics.median(others), "max": max(others)},
            }
        )
    return rates, texts, others


def agreement(tokens: list[int], reference: list[int]) -> int:
    """How many tokens from the first on are the same."""
    same = [a == b for a, b in zip(tokens, reference, strict=False)]
    return same.index(False) if False in same else len(same)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare_cpu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="path, short name or Hugging Face id")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--peers", default="llama.cpp,transformers", help="comma-separated; empty: none")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json", help="where the result is kept")
    arguments = parser.parse_args()
    if arguments.repetitions < 1 or arguments.threads < 1:
        sys.exit("--repetitions and --threads must be at least 1.")
    try:
        checkpoint = open_checkpoint(arguments.model)
    except FenError as error:
        sys.exit(str(error))
    wanted = ["fen", *(peer for peer in arguments.peers.split(",") if peer)]
    if unknown := set(wanted) - {"fen", "llama.cpp", "transformers"}:
        sys.exit(f"--peers: unknown {', '.join(sorted(unknown))}; allowed are llama.cpp and transformers.")
    with contextlib.ExitStack() as stack:
        workers, missing = start_engines(checkpoint, arguments.threads, wanted, stack)
        if "fen" in missing:
            sys.exit(f"The engine itself does not run: {missing['fen']}")
        settings = {
            "threads": arguments.threads,
            "engines": {name: {"settings": w.settings, "versions": w.versions} for name, w in workers.items()},
            "not_run": missing,
        }
        model = Path(checkpoint.path).name
        result = results.new("compare-cpu", settings, model=model, quantization=checkpoint.quantization)

        def keep(measured: dict[str, Any]) -> None:
            result.data.update(measured)
            results.save(arguments.json, result)

        measure(workers, prose_tokens(checkpoint.tokenizer), METRICS, arguments.repetitions, keep)
    print(render(result))
    print(f"kept in {arguments.json}")


def render(result: Result) -> str:
    """The page of a result as `main` keeps it: what was measured on what, the table, what each engine ran with."""
    data = result.data
    lines = [
        f"{result.model} on {result.device}, {data['threads']} threads, commit {result.commit}",
        f"Medians of {data['repetitions']} (smallest to largest), engines taking turns.",
        NOTES,
        "",
        table(data["tokens_per_second"], METRICS),
        "",
    ]
    for name, engine in data["engines"].items():
        numbers = ", ".join(f"{key} {value}" for key, value in engine["versions"].items() if key != "system")
        lines.append(f"{name}: {engine['settings']}; {numbers}")
    lines += [f"{name}: not run, {reason}" for name, reason in data["not_run"].items()]
    if EXACT in data["engines"]:
        counts = ", ".join(f"{name} {count}" for name, count in data["tokens_as_float32"].items())
        lines.append(f"Greedy tokens equal to {EXACT} from the first on, of {NEW_TOKENS + 1}: {counts}")
    share = data["others_cpu_share"]
    lines.append(f"Other processes used {share['median']:.0%} of the CPUs in the median, {share['max']:.0%} at worst.")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
