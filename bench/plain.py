"""The ladder's first rung: a LLaMA-family decoder in plain PyTorch, one request at a time.

Written to be fast with torch's own operations and nothing else: weights in one dense dtype, q, k, v and gate, up as one
matrix each, a KV cache allocated once, scaled_dot_product_attention. No kernel, packing or scheduler of this project.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from engine.checkpoint import Checkpoint, StoredTensor
from engine.errors import FenError
from engine.model.rope import rotations
from kernels.formats import decode, dequantize

DTYPES = ("bfloat16", "float16", "float32")  # the plain ones, of which the fastest is taken
NOT_PLAIN = {  # what a config must leave as it is
    "sliding_window": None, "rotary_dim": None, "unrotated_layers": (), "attention_scale": None,
    "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_divisor": 1.0,
}  # fmt: skip


def matrix(tensor: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of one part, dequantised: [N, K], or [1, N] of a vector's N values."""
    with warnings.catch_warnings():  # the file's mapping is read-only, and nothing writes to it
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.from_numpy(tensor.data).view(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)
    return dequantize(decode(tensor.dtype, {"": raw}), dtype)


class PlainModel:
    """The checkpoint's weights, dequantised once to `dtype`, on `device`, and room for `max_len` positions."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, max_len: int, device: str = "cpu"):
        config = checkpoint.config
        unknown = [name for name, plain in NOT_PLAIN.items() if getattr(config, name) != plain]
        if unknown:
            raise FenError(
                f"the ladder's plain PyTorch does not know {', '.join(unknown)}, which {checkpoint.name} has"
            )
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self._tensors = checkpoint.tensors
        attention = "self_attn."
        self.layers: list[dict[str, Any]] = []
        for i in range(config.num_layers):
            prefix = f"model.layers.{i}."
            self.layers.append(
                {
                    "norm": self._dense(prefix + "input_layernorm.weight"),
                    "qkv": self._linear(*(f"{prefix}{attention}{x}_proj" for x in "qkv")),
                    "qk_norm": [self._rotary(self._dense(f"{prefix}{attention}{x}_norm.weight")) for x in "qk"]
                    if config.qk_norm
                    else None,
                    "out": self._linear(f"{prefix}{attention}o_proj"),
                    "post": self._dense(prefix + "post_attention_layernorm.weight"),
                    "gate_up": self._linear(prefix + "mlp.gate_proj", prefix + "mlp.up_proj"),
                    "down": self._linear(prefix + "mlp.down_proj"),
                }
            )
        self.norm = self._dense("model.norm.weight")
        self.embed = self._matrix("model.embed_tokens.weight")
        self.head = self.embed if config.tie_embeddings else self._matrix("lm_head.weight")
        shape = (config.num_layers, 2, 1, config.num_kv_heads, max_len, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=self.device)
        turns = rotations(config, max_len)
        # cos and sin of both halves: x * cos + swap(x) * sin, the halves swapped and the first one's sine negated
        self.cos = torch.cat([turns.real, turns.real], -1).to(self.device, dtype)
        self.sin = torch.cat([-turns.imag, turns.imag], -1).to(self.device, dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes that one token reads."""
        matrices = [layer[name][0] for layer in self.layers for name in ("qkv", "out", "gate_up", "down")]
        return sum(matrix.nbytes for matrix in (*matrices, self.head))

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, start: int, last: bool = True) -> torch.Tensor:
        """Computes tokens int64 [T] at positions start.. and keeps their KV. Returns logits [1 or T, V]."""
        config, rows = self.config, tokens.shape[0]
        end, heads, kv_heads, dim = start + rows, config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]
        mask = None
        if start and rows > 1:  # a later part of a prompt
            mask = torch.ones(rows, end, dtype=torch.bool, device=self.device).tril(start)
        hidden = self.embed[tokens]
        for layer, (key, value) in zip(self.layers, self.cache.unbind(0), strict=True):
            x = F.rms_norm(hidden, layer["norm"].shape, layer["norm"], config.rms_norm_eps)
            qkv = F.linear(x, *layer["qkv"]).view(rows, heads + 2 * kv_heads, dim)
            qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
            if layer["qk_norm"] is not None:
                parts = zip(qk.split([heads, kv_heads], 1), layer["qk_norm"], strict=True)
                qk = torch.cat([F.rms_norm(part, (dim,), weight, config.rms_norm_eps) for part, weight in parts], 1)
            qk = qk * cos + qk.roll(dim // 2, -1) * sin
            key[0, :, start:end] = qk[:, heads:].transpose(0, 1)
            value[0, :, start:end] = v.transpose(0, 1)
            attended = F.scaled_dot_product_attention(
                qk[:, :heads].transpose(0, 1)[None],
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=mask,
                is_causal=mask is None and rows > 1,
                enable_gqa=heads != kv_heads,
            )
            hidden = hidden + F.linear(attended[0].transpose(0, 1).reshape(rows, heads * dim), *layer["out"])
            x = F.rms_norm(hidden, layer["post"].shape, layer["post"], config.rms_norm_eps)
            gate, up = F.linear(x, *layer["gate_up"]).chunk(2, -1)
            hidden = hidden + F.linear(F.silu(gate) * up, *layer["down"])
        hidden = hidden[-1:] if last else hidden
        return F.linear(F.rms_norm(hidden, self.norm.shape, self.norm, config.rms_norm_eps), self.head)

    def generate(
        self, prompt: list[int], new_tokens: int, on_token: Callable[[], None] | None = None
    ) -> tuple[float, float, list[int]]:
        """Greedy -> seconds until the first token, seconds of all the others, the tokens."""
        started = time.monotonic()
        token = self.forward(torch.tensor(prompt, device=self.device), 0).argmax(-1)
        found = [int(token)]  # a server would send each token as it comes
        first = time.monotonic()
        while len(found) < new_tokens:
            token = self.forward(token, len(prompt) + len(found) - 1).argmax(-1)
            found.append(int(token))
            if on_token is not None:
                on_token()
        return first - started, time.monotonic() - first, found

    # Loading.

    def _matrix(self, name: str) -> torch.Tensor:
        return matrix(self._tensors[name], self.dtype).to(self.device)

    def _dense(self, name: str) -> torch.Tensor:
        return self._matrix(name).view(-1)

    def _linear(self, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the named linears as one; rows of q and k in halves, as `_rotary` has them."""
        turned = [name.endswith(("q_proj", "k_proj")) for name in names]
        weights = [self._matrix(name + ".weight") for name in names]
        weights = [self._rotary(w) if turn else w for w, turn in zip(weights, turned, strict=True)]
        if names[0] + ".bias" not in self._tensors:
            return torch.cat(weights), None
        biases = [self._dense(name + ".bias") for name in names]
        biases = [self._rotary(b) if turn else b for b, turn in zip(biases, turned, strict=True)]
        return torch.cat(weights), torch.cat(biases)

    def _rotary(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of whole heads so that the pairs that rotate are (i, i + D/2)."""
        if not self.config.rope_interleaved:
            return rows
        half = self.config.head_dim // 2
        return rows.view(-1, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
