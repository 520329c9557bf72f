"""One decoder for the LLaMA family. What differs between models is a flag of `ModelConfig`; what differs between
devices is behind `Backend`, whose functions are the kernels' plain ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch

from engine.model.config import ModelConfig

Linear = Callable[[Any], torch.Tensor]  # of a tensor, or of what the backend has made for it


@dataclasses.dataclass(slots=True)
class Step:
    """The tensors of one step of T tokens, of which S get logits. `attention` and `rotations` are the backend's own."""

    tokens: torch.Tensor  # int64 [T]
    slots: torch.Tensor  # int64 [T]: where the KV of each token goes
    rotations: torch.Tensor  # of each token's position
    attention: Any
    logit_rows: torch.Tensor | None  # int64 [S]; None: all T, in order


class Backend(Protocol):
    """The arithmetic of one device: kernels/cpu or kernels/gpu behind one set of names."""

    def add_rmsnorm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
        reader: Linear | None,
    ) -> Any:  # fmt: skip
        """residual += delta; what `reader` takes of its RMSNorm. None: float32."""
        ...

    def rope_and_cache_write(
        self, qkv: torch.Tensor, step: Step, layer: int, qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> torch.Tensor: ...

    def attention(self, q: torch.Tensor, step: Step, layer: int) -> torch.Tensor: ...

    def gated(self, gate_up: Linear, x: Any, reader: Linear) -> Any:
        """silu(gate) * up, as `reader` takes it."""
        ...

    def run_layers(
        self, layers: list[Layer], residual: torch.Tensor, step: Step, eps: float, multiplier: float
    ) -> bool:
        """Adds to the residual all that the layers give, in fewer launches than one for each operation; False: nothing
        is done, since that is not to be had or does not pay."""
        ...


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of one layer; q, k, v and gate, up are fused."""

    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclasses.dataclass(frozen=True)
class Decoder:
    """config, weights and backend. `embed` int64 [T] -> float32 [T, H]."""

    config: ModelConfig
    backend: Backend
    embed: Callable[[torch.Tensor], torch.Tensor]
    layers: list[Layer]
    norm: torch.Tensor
    head: Linear

    def forward(self, step: Step) -> torch.Tensor:
        """Computes one step and writes its KV. Returns the final hidden states, float32 [S, H], for `logits`."""
        ops, eps = self.backend, self.config.rms_norm_eps
        residual = self.embed(step.tokens)
        if self.config.embedding_multiplier != 1:
            residual = residual * self.config.embedding_multiplier
        delta, weight = None, self.config.residual_multiplier
        fused = ops.run_layers(self.layers, residual, step, eps, weight)
        for index, layer in enumerate(() if fused else self.layers):
            x = ops.add_rmsnorm(residual, delta, layer.input_norm, eps, layer.qkv)
            q = ops.rope_and_cache_write(layer.qkv(x), step, index, layer.qk_norm)
            delta = _times(layer.output(ops.attention(q, step, index)), weight)
            x = ops.add_rmsnorm(residual, delta, layer.post_norm, eps, layer.gate_up)
            delta = _times(layer.down(ops.gated(layer.gate_up, x, layer.down)), weight)
        rows = step.logit_rows
        if rows is not None:
            residual, delta = residual[rows], None if delta is None else delta[rows]
        hidden: torch.Tensor = ops.add_rmsnorm(residual, delta, self.norm, eps, None)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] -> float32 [S, V]."""
        return _times(self.head(hidden).float(), 1 / self.config.logits_divisor)


def _times(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1 else x * factor
