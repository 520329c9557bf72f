"""The CPU backend of the decoder: kernels.cpu, bound to one model's KV cache."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from engine.model.config import ModelConfig
from engine.model.decoder import Layer, Linear, Step
from engine.model.rope import unrotated
from kernels import kv_cache
from kernels.cpu import fused
from kernels.cpu.attention import KEY_TILE, Attention, Span
from kernels.cpu.linear import Plan, cpu_features


class CpuBackend:
    """Owns the KV cache: [2 * layers, slots, kv_heads, D], K and V of layer l at 2l and 2l + 1.

    kv_dtype: "auto", the activations' own; or of kernels.kv_cache.EIGHT_BIT, with float32 scales [..., kv_heads, 1].
    """

    def __init__(self, config: ModelConfig, plan: Plan, block_size: int, kv_dtype: str = "auto"):
        self.config = config
        self.plan = plan
        self.block_size = block_size
        exact = plan.many == torch.float32 and plan.few == torch.float32
        self.cache_dtype = kv_cache.EIGHT_BIT.get(kv_dtype, torch.float32 if exact else torch.bfloat16)
        self._attention_dtype = torch.bfloat16 if "amx" in cpu_features() and not exact else torch.float32
        self.cache = torch.empty(0)
        self.scales: torch.Tensor | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return config.num_layers * kv_cache.bytes_per_token(config.num_kv_heads, config.head_dim, self.cache_dtype)

    def allocate(self, num_blocks: int) -> None:
        """Zeroed pages. The memory is taken from the system only as pages are written."""
        config = self.config
        spare = max(1, KEY_TILE // self.block_size)  # attention may read a masked tile beyond the last block
        slots = (num_blocks + spare) * self.block_size
        shape = (2 * config.num_layers, slots, config.num_kv_heads, config.head_dim)
        plain = {1: np.uint8, 2: np.uint16, 4: np.float32}[self.cache_dtype.itemsize]
        self.cache = torch.from_numpy(np.zeros(shape, plain)).view(self.cache_dtype)
        if self.cache_dtype in kv_cache.QMAX:
            self.scales = torch.from_numpy(np.zeros((*shape[:3], 1), np.float32))

    def clear(self, blocks: list[int]) -> None:
        """Zeroes pages. One is read whole, under a mask: NaN that an earlier sequence left would come through it."""
        pages = self.cache.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[self.cache.itemsize])
        for block in blocks:
            pages.narrow(1, block * self.block_size, self.block_size).zero_()

    def prepare(self, spans: list[Span]) -> Attention:
        """The attention of one step."""
        return Attention(
            spans,
            self.cache,
            self.block_size,
            self.config.num_heads,
            self._attention_dtype,
            self.config.sliding_window,
            self.plan.batch_invariant,
            self.scales,
        )

    def add_rmsnorm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
        reader: Linear | None,
    ) -> torch.Tensor:  # fmt: skip
        dtype = torch.float32 if reader is None else self.plan.dtype(residual.shape[0])
        return fused.add_rmsnorm(residual, delta, weight, eps, dtype)

    def rope_and_cache_write(
        self, qkv: torch.Tensor, step: Step, layer: int, qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> torch.Tensor:
        rotations = step.rotations
        if layer in self.config.unrotated_layers:
            rotations = torch.full_like(rotations, unrotated(self.config))
        return fused.rope_and_cache_write(
            qkv,
            rotations,
            self.config.num_heads,
            self.config.num_kv_heads,
            self.cache[2 * layer : 2 * layer + 2],
            step.slots,
            step.attention.dtype,
            qk_norm,
            None if self.scales is None else self.scales[2 * layer : 2 * layer + 2],
        )

    def attention(self, q: torch.Tensor, step: Step, layer: int) -> torch.Tensor:
        padding = q.shape[0] - step.attention.rows
        out: torch.Tensor = step.attention(q[: step.attention.rows], layer)
        return F.pad(out, (0, 0, 0, padding)) if padding else out

    def gated(self, gate_up: Linear, x: torch.Tensor, reader: Linear) -> torch.Tensor:
        return fused.silu_mul(gate_up(x))

    def run_layers(
        self, layers: list[Layer], residual: torch.Tensor, step: Step, eps: float, multiplier: float
    ) -> bool:
        return False
