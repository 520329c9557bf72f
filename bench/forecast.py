"""What a CPU will give, before a weight is read: the engine runs with a few layers of the model's shape and format,
whose weights are zeros, and the time of a layer and of the rest are carried over to all layers.

`python -m bench.forecast` holds the forecast against a measurement of the whole model in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from bench import results
from bench.local_engine import LocalEngine
from bench.machine import Disturbance
from bench.report import markdown_table
from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.errors import FenError
from engine.messages import EngineOptions

FEW, MORE = 2, 8  # layers; an error in their difference counts as often as there are layers
STEPS = 12  # of decode in a round
ROUNDS = 7
SECONDS = 20.0  # for all rounds of a forecast; three there are at least
WANTED = 0.25  # how far a forecast may be from the measurement
RESULTS = Path(__file__).resolve().parent / "results" / "forecast_cpu.json"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds: of a prompt, and of a decode step, by batch."""

    prompt_tokens: int
    prefill: float
    decode: dict[int, float]


def forecast(
    checkpoint: Checkpoint,
    options: EngineOptions,
    prompt_tokens: int,
    batches: list[int],
    progress: Callable[[str], None] = lambda what: None,
) -> Forecast:
    """decode: at contexts of `prompt_tokens` and the few tokens after."""
    few, more = min(FEW, checkpoint.config.num_layers), min(MORE, checkpoint.config.num_layers)
    progress(f"timing {few} and {more} layers of {checkpoint.config.num_layers}")
    timed = [Timed(shortened(checkpoint, layers), options, prompt_tokens, batches) for layers in (few, more)]
    rounds: list[tuple[Forecast, ...]] = []
    end = time.monotonic() + SECONDS
    while len(rounds) < 3 or (len(rounds) < ROUNDS and time.monotonic() < end):
        rounds.append(tuple(one.round() for one in timed))  # in turns: a machine's pace drifts

    def carried(value: Callable[[Forecast], float]) -> float:
        least = statistics.median(value(one) for one, _ in rounds)
        layers = statistics.median(value(other) - value(one) for one, other in rounds)
        return least + max(0.0, layers) / max(1, more - few) * (checkpoint.config.num_layers - few)

    return _each(carried, prompt_tokens, batches)


def measure(checkpoint: Checkpoint, options: EngineOptions, prompt_tokens: int, batches: list[int]) -> Forecast:
    """The same of a checkpoint that is there, all of it; medians."""
    timed = Timed(checkpoint, options, prompt_tokens, batches)
    rounds = [timed.round() for _ in range(ROUNDS)]
    return _each(lambda value: statistics.median(map(value, rounds)), prompt_tokens, batches)


def _each(of: Callable[[Callable[[Forecast], float]], float], prompt_tokens: int, batches: list[int]) -> Forecast:
    decode = {batch: of(lambda one, batch=batch: one.decode[batch]) for batch in batches}  # type: ignore[misc]
    return Forecast(prompt_tokens, of(lambda one: one.prefill), decode)


class Timed:
    """An engine on a checkpoint, and what a round of prompts and decode steps takes there."""

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions, prompt_tokens: int, batches: list[int]):
        pool = (max(batches) + 1) * (prompt_tokens + STEPS + 130)
        options = msgspec.structs.replace(
            options, kv_cache_tokens=pool, max_num_seqs=max(batches), enable_prefix_caching=False
        )
        self.engine = LocalEngine(options, checkpoint)
        self.prompt, self.batches = [1 + i % 100 for i in range(prompt_tokens)], batches
        for batch in batches:
            self.engine.generate([self.prompt] * batch, 2)

    def round(self) -> Forecast:
        prefill = self.engine.generate([self.prompt], 1).first_seconds
        decode: dict[int, float] = {}
        for batch in self.batches:
            timing = self.engine.generate([self.prompt] * batch, STEPS)
            decode[batch] = (timing.seconds - timing.first_seconds) / (STEPS - 1)
        return Forecast(len(self.prompt), prefill, decode)


def shortened(checkpoint: Checkpoint, layers: int) -> Checkpoint:
    """The first layers of a checkpoint, and its ends, with zeros for weights."""
    config = dataclasses.replace(checkpoint.config, num_layers=layers)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue
        size = tensor.nbytes
        tensors[name] = dataclasses.replace(tensor, source=lambda size=size: np.zeros(size, np.uint8))  # type: ignore[misc]
    return dataclasses.replace(checkpoint, config=config, tensors=tensors)


def compare(model: str, prompt_tokens: int, batches: list[int]) -> results.Result:
    """Forecast and measurement, one after the other in this process."""
    checkpoint, options = open_checkpoint(model), EngineOptions(model=model, device="cpu")
    disturbance = Disturbance(os.getpid())

    def say(what: str) -> None:
        print(what, file=sys.stderr)

    expected = forecast(checkpoint, options, prompt_tokens, batches, say)
    say("measuring the whole model")
    found = measure(checkpoint, options, prompt_tokens, batches)
    rows = [{"what": f"prefill of {prompt_tokens}", "forecast": expected.prefill, "measured": found.prefill}]
    for batch in batches:
        what = f"decode step of {batch} after {prompt_tokens}"
        rows.append({"what": what, "forecast": expected.decode[batch], "measured": found.decode[batch]})
    for row in rows:
        row["error"] = row["forecast"] / row["measured"] - 1
        row["met"] = abs(row["error"]) <= WANTED
    data = {"wanted": WANTED, "seconds": rows, "others_cpu_share": disturbance.share()}
    return results.new("forecast", data, model=checkpoint.name, quantization=checkpoint.quantization)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if min([args.prompt_tokens, *args.batch]) < 1:
        parser.error("--prompt-tokens and --batch must be at least 1")
    try:
        result = compare(args.model, args.prompt_tokens, sorted(set(args.batch)))
    except FenError as error:
        sys.exit(f"fen: {error}")
    results.save(args.output, result)
    rows = [
        [
            row["what"],
            f"{1e3 * row['forecast']:.1f} ms",
            f"{1e3 * row['measured']:.1f} ms",
            f"{row['error']:+.0%}",
            "met" if row["met"] else "missed",
        ]
        for row in result.data["seconds"]
    ]
    print(markdown_table(["", "forecast", "measured", "", f"within {WANTED:.0%}"], rows))
    print(f"Other processes used {result.data['others_cpu_share']:.0%} of the CPUs.")


if __name__ == "__main__":
    main()
