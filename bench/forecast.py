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

FEW, MORE = 2, 6  # layers
STEPS = 12  # of decode in a sample
SAMPLES = 3
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
    measured = {}
    for layers in {few, more}:
        progress(f"timing {layers} layers of {checkpoint.config.num_layers}")
        measured[layers] = measure(shortened(checkpoint, layers), options, prompt_tokens, batches)

    def carried(value: Callable[[Forecast], float]) -> float:
        least, most = value(measured[few]), value(measured[more])
        layer = (most - least) / (more - few) if more > few else 0.0
        return least + max(0.0, layer) * (checkpoint.config.num_layers - few)

    decode = {batch: carried(lambda of, batch=batch: of.decode[batch]) for batch in batches}  # type: ignore[misc]
    return Forecast(prompt_tokens, carried(lambda of: of.prefill), decode)


def measure(checkpoint: Checkpoint, options: EngineOptions, prompt_tokens: int, batches: list[int]) -> Forecast:
    """The same of a checkpoint that is there, all of it; medians."""
    pool = (max(batches) + 1) * (prompt_tokens + STEPS + 130)
    options = msgspec.structs.replace(
        options, kv_cache_tokens=pool, max_num_seqs=max(batches), enable_prefix_caching=False
    )
    engine = LocalEngine(options, checkpoint)
    prompt = [1 + i % 100 for i in range(prompt_tokens)]
    engine.generate([prompt], 2)
    prefill = [engine.generate([prompt], 1).first_seconds for _ in range(SAMPLES)]
    decode: dict[int, float] = {}
    for batch in batches:
        times = []
        for _ in range(SAMPLES):
            timing = engine.generate([prompt] * batch, STEPS)
            times.append((timing.seconds - timing.first_seconds) / (STEPS - 1))
        decode[batch] = statistics.median(times)
    return Forecast(prompt_tokens, statistics.median(prefill), decode)


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
