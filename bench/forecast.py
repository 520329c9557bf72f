"""What a CPU will give, before a weight is read: the engine runs with a few layers of the model's shape and format,
whose weights are zeros, and the time of a layer and of the rest are carried over to all layers.

`python -m bench.forecast` holds the forecast against a measurement of the whole model in the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import msgspec
import numpy as np

from bench.local_engine import LocalEngine
from engine.checkpoint import Checkpoint, StoredTensor
from engine.messages import EngineOptions

FEW, MORE = 2, 6  # layers
STEPS = 12  # of decode in a sample
SAMPLES = 5


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
