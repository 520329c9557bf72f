"""One stream, as llama-bench measures it: pp512, a prompt of 512 tokens; tg128, 128 tokens from an empty context.

Beside each figure stands what it makes of the machine: tg reads every weight and the KV cache once a token, so bytes a
second over the read bandwidth; pp multiplies, so FLOPs a second over the matmul rate. Both limits are measured in the
same run with the same threads.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import msgspec
import torch

from bench import results
from bench.ceilings import matmul_rate, measure_ceilings, read_bandwidth
from bench.local_engine import LocalEngine
from bench.prompts import make_prompt, prose_tokens
from bench.report import markdown_table, median_and_spread
from engine.checkpoint import Checkpoint
from engine.messages import EngineInfo, EngineOptions

LARGE_BUFFER = 1 << 30  # bytes; beyond the caches of most CPUs
UNCACHED = "model.embed_tokens.weight"  # one row of it is read for a token, unless it is the head as well


@dataclasses.dataclass(frozen=True)
class Latency:
    """tokens/s of every repetition, and what one token of each kind costs."""

    prefill: list[float]
    decode: list[float]
    flops_per_prompt: float
    bytes_per_token: float
    read_bandwidth: float  # bytes/s over a buffer of the model's own size
    read_bandwidth_large: float  # bytes/s over LARGE_BUFFER
    matmul_rate: float  # FLOPs/s, bfloat16 or float32 as the model computes


def run(
    options: EngineOptions,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repetitions: int = 5,
    json_path: str | None = None,
) -> None:
    """Loads `options.model`, measures, prints the table, and writes it to `json_path` as JSON if there is one.

    Raises CheckpointError, CapacityError, or RequestError where the context is too short.
    """
    options = _pool_for(options, max(prompt_tokens + 1, new_tokens + 2))
    engine = LocalEngine(options)
    latency = measure(engine, prompt_tokens, new_tokens, repetitions)
    print(render(engine.info, latency, prompt_tokens, new_tokens))
    if json_path is not None:
        data = {
            "dtype": engine.info.dtype,
            "threads": torch.get_num_threads(),
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            **dataclasses.asdict(latency),
        }
        info = engine.info
        device = None if info.device.startswith("cpu") else info.device
        about = {"model": info.model, "quantization": info.quantization, "device": device}
        results.save(Path(json_path), results.new("latency", data, **about))


def measure(engine: LocalEngine, prompt_tokens: int, new_tokens: int, repetitions: int) -> Latency:
    """Both tests `repetitions` times, after one round that does not count."""
    prose = prose_tokens(engine.checkpoint.tokenizer)
    prompt, start = make_prompt(prose, prompt_tokens), prose[:1]
    engine.generate([prompt], 1)
    engine.generate([start], 3)
    prefill, decode = [], []
    for _ in range(repetitions):
        prefill.append(prompt_tokens / engine.generate([prompt], 1).first_seconds)
        decode.append(engine.generate([start], new_tokens + 1).decode_rate)
    info = engine.info
    kv_per_token = info.kv_cache_bytes / (info.num_blocks * info.block_size)
    weights = bytes_read(engine.checkpoint)
    return Latency(
        prefill=prefill,
        decode=decode,
        flops_per_prompt=prompt_flops(engine.checkpoint, prompt_tokens),
        bytes_per_token=weights + kv_per_token * (1 + new_tokens / 2),
        **_limits(info, int(weights)),
    )


def _limits(info: EngineInfo, weights: int) -> dict[str, float]:
    """Of the device that the engine is on."""
    if info.device.startswith("cpu"):
        dtype = torch.float32 if info.dtype == "float32" else torch.bfloat16
        small, large, rate = read_bandwidth(weights), read_bandwidth(LARGE_BUFFER), matmul_rate(dtype)
    else:
        limits = measure_ceilings(torch.device("cuda"))
        small, large, rate = limits.bandwidth, limits.bandwidth, limits.rates[info.dtype]
    return {"read_bandwidth": small, "read_bandwidth_large": large, "matmul_rate": rate}


def bytes_read(checkpoint: Checkpoint) -> int:
    """Bytes of weights that one decoded token needs, as the file stores them."""
    return sum(
        tensor.nbytes
        for name, tensor in checkpoint.tensors.items()
        if name != UNCACHED or checkpoint.config.tie_embeddings
    )


def prompt_flops(checkpoint: Checkpoint, tokens: int) -> float:
    """FLOPs of a prompt: 2 for each weight of the layers and token, causal attention, and the head for one token."""
    config = checkpoint.config
    matrices = [tensor for name, tensor in checkpoint.tensors.items() if name.endswith("_proj.weight")]
    weights = sum(tensor.shape[0] * tensor.shape[1] for tensor in matrices)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * (tokens + 1)
    return 2.0 * weights * tokens + attention + 2.0 * config.vocab_size * config.hidden_size


def render(info: EngineInfo, latency: Latency, prompt_tokens: int, new_tokens: int) -> str:
    """The result as a few lines and a markdown table."""
    flops = latency.flops_per_prompt * statistics.median(latency.prefill) / prompt_tokens
    read = latency.bytes_per_token * statistics.median(latency.decode)
    rows = [
        [
            f"pp{prompt_tokens}",
            median_and_spread(latency.prefill),
            f"{flops / 1e9:,.0f} GFLOP/s",
            f"{flops / latency.matmul_rate:.0%} of {latency.matmul_rate / 1e9:,.0f} GFLOP/s",
        ],
        [
            f"tg{new_tokens}",
            median_and_spread(latency.decode),
            f"{read / 1e9:.1f} GB/s",
            f"{read / latency.read_bandwidth:.0%} of {latency.read_bandwidth / 1e9:.1f} GB/s",
        ],
    ]
    return "\n".join(
        [
            f"{info.model}, {info.quantization}, {info.dtype} activations, {info.device}",
            markdown_table(["test", "tokens/s", "achieved", "of the limit measured here"], rows),
            f"Medians of {len(latency.decode)}, smallest to largest. The bandwidth is that of a buffer as large as the "
            f"weights; one of {LARGE_BUFFER >> 20:,} MiB is read at {latency.read_bandwidth_large / 1e9:.1f} GB/s.",
        ]
    )


def _pool_for(options: EngineOptions, tokens: int) -> EngineOptions:
    """`options` without the prefix cache, and with a KV pool no larger than one stream needs unless it was chosen."""
    block_size = options.block_size or 64
    pool = options.kv_cache_tokens or (tokens // block_size + 2) * block_size
    return msgspec.structs.replace(options, enable_prefix_caching=False, kv_cache_tokens=pool)
