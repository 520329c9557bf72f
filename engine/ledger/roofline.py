"""What parts of a step would take if they ran alone: a small roofline model, by which a step's seconds are shared out.

Only proportions matter: the shares of a step add up to what it took, however good the model is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from engine.messages import EngineInfo
from engine.model.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Roofline:
    """Times in seconds. The default takes every token for equally expensive."""

    weights: float = 0.0  # to read all weights once
    token: float = 1.0  # a token's arithmetic in the linear layers
    read: float = 0.0  # to read K and V of one position
    score: float = 0.0  # the arithmetic of one query on one position

    def linear(self, tokens: int) -> float:
        return max(self.weights, tokens * self.token)

    def attention(self, start: int, length: int) -> float:
        """Of the queries at positions start .. start + length - 1 on all positions up to their own."""
        end = start + length
        return max(end * self.read, length * (start + end) / 2 * self.score)


def calibrate(
    forward: Callable[[int], object], config: ModelConfig, info: EngineInfo, tokens: int = 32, bandwidth: float = 0.0
) -> Roofline:
    """Measures `forward(n)`, which computes n tokens, for fractions of a second: one token gives the bandwidth at which
    this engine reads its weights, `tokens` give the rate of its arithmetic.

    bandwidth: bytes a second, instead of one token's time (a GPU's is that of Python, which launches its kernels; in
    a captured graph it does not count, and `tokens` are so many that it does not count there, either).
    """
    tokens = min(tokens, info.max_model_len)
    weights = info.weight_bytes / bandwidth if bandwidth else _fastest(forward, 1)
    token = _fastest(forward, tokens) / tokens
    multiplied = info.parameters - (0 if config.tie_embeddings else config.vocab_size * config.hidden_size)
    position_bytes = info.kv_cache_bytes / (info.num_blocks * info.block_size)
    position_products = 2 * config.num_layers * config.num_heads * config.head_dim
    read, score = weights * position_bytes / info.weight_bytes, token * position_products / multiplied
    return Roofline(weights, token, read, score)


def _fastest(forward: Callable[[int], object], tokens: int) -> float:
    times: list[float] = []
    while len(times) < 2 or (len(times) < 5 and sum(times) < 0.1):  # the first compiles what it needs
        started = time.monotonic()
        forward(tokens)
        times.append(time.monotonic() - started)
    return min(times)
