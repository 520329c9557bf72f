"""Checkpoint tensors -> decoder: fuses q, k, v and gate, up; brings rotary rows into the engine's order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch

from engine.checkpoint import Checkpoint, StoredTensor
from engine.errors import CheckpointError
from engine.model.config import ModelConfig
from engine.model.cpu import CpuBackend
from engine.model.decoder import Backend, Decoder, Layer, Linear
from kernels.cpu.fused import norm_weight
from kernels.cpu.linear import Linear as CpuLinear
from kernels.cpu.linear import Plan, head_plan
from kernels.formats import STORED, Weight, decode, dequantize, joined

Raw = tuple[torch.Tensor, str]  # a matrix as stored: uint8 [rows, bytes of a row], and its format (kernels.formats)


class Parts(Protocol):
    """Makes one device's parts of a decoder."""

    @property
    def backend(self) -> Backend: ...

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        """A norm's float32 weight."""
        ...

    def linear(self, name: str, weight: Weight, bias: torch.Tensor | None) -> Linear:
        """name: of the checkpoint's linear, the first of those fused into this one. bias float32."""
        ...

    def ends(self, table: Raw, head: Weight | None) -> tuple[Callable[[torch.Tensor], torch.Tensor], Linear]:
        """The embedding and the head; head None: it is the table."""
        ...


class CpuParts:
    """Of a decoder on the CPU."""

    def __init__(self, config: ModelConfig, plan: Plan, block_size: int, kv_dtype: str = "auto"):
        self.backend = CpuBackend(config, plan, block_size, kv_dtype)
        self.plan = plan

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return norm_weight(values)

    def linear(self, name: str, weight: Weight, bias: torch.Tensor | None) -> Linear:
        return CpuLinear(weight, bias, self.plan)

    def ends(self, table: Raw, head: Weight | None) -> tuple[Callable[[torch.Tensor], torch.Tensor], Linear]:
        raw, kind = table
        linear = CpuLinear(head or decode(kind, {"": raw}), None, head_plan(self.plan))
        return lambda tokens: dequantize(decode(kind, {"": raw[tokens]})), linear


def load_decoder(checkpoint: Checkpoint, parts: Parts, on_bytes: Callable[[int], None] | None = None) -> Decoder:
    """Reads every tensor of the checkpoint once. `on_bytes(n)` follows with the bytes read so far."""
    return Loader(checkpoint, parts, on_bytes).decoder()


class Loader:
    def __init__(self, checkpoint: Checkpoint, parts: Parts, on_bytes: Callable[[int], None] | None):
        self.config: ModelConfig = checkpoint.config
        self.tensors = checkpoint.tensors
        self.parts = parts
        self.on_bytes = on_bytes
        self.bytes = 0

    def decoder(self) -> Decoder:
        config = self.config
        layers = [self.layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        table = "model.embed_tokens.weight"
        own_head = None if config.tie_embeddings else self.matrix("lm_head.weight")
        embed, head = self.parts.ends((self.read(self.tensors[table]), self.tensors[table].dtype), own_head)
        norm = self.parts.vector(self.dense("model.norm.weight"))
        self.tensors[table].drop_pages()
        return Decoder(config=config, backend=self.parts.backend, embed=embed, layers=layers, norm=norm, head=head)

    def layer(self, prefix: str) -> Layer:
        config = self.config
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qk_norm = None
        if config.qk_norm:
            q, k = (self.rotary(self.dense(f"{attention}{x}_norm.weight")) for x in "qk")
            qk_norm = self.parts.vector(q), self.parts.vector(k), config.rms_norm_eps
        layer = Layer(
            input_norm=self.parts.vector(self.dense(prefix + "input_layernorm.weight")),
            qkv=self.linear([attention + f"{x}_proj" for x in "qkv"], rotary=2),
            qk_norm=qk_norm,
            output=self.linear([attention + "o_proj"]),
            post_norm=self.parts.vector(self.dense(prefix + "post_attention_layernorm.weight")),
            gate_up=self.linear([mlp + "gate_proj", mlp + "up_proj"]),
            down=self.linear([mlp + "down_proj"]),
        )
        self.tensors[prefix + "input_layernorm.weight"].drop_pages()
        return layer

    def linear(self, names: list[str], rotary: int = 0) -> Linear:
        """The named linears as one; the first `rotary` of them make what is rotated. Parts of different formats cannot
        share a matmul and stay apart."""
        parts: list[tuple[Weight, torch.Tensor | None]] = []
        for i, name in enumerate(names):
            weight = self.matrix(name + ".weight")
            bias = self.dense(name + ".bias") if name + ".bias" in self.tensors else None
            if i < rotary:
                weight, bias = weight.rows(self.rotary), self.rotary(bias) if bias is not None else None
            parts.append((weight, bias))
        biases = [bias for _, bias in parts if bias is not None]
        one = joined([weight for weight, _ in parts]) if len(biases) in (0, len(parts)) else None
        if one is not None:
            parts = [(one, torch.cat(biases) if biases else None)]
        linears = [self.parts.linear(name, *part) for name, part in zip(names, parts, strict=False)]
        if len(linears) == 1:
            return linears[0]
        return lambda x: torch.cat([linear(x) for linear in linears], -1)

    def rotary(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (or elements) of whole heads in the engine's order: pairs (2i, 2i + 1)."""
        if self.config.rope_interleaved:
            return rows
        dim = self.config.rotary_dim or self.config.head_dim
        heads = rows.reshape(-1, self.config.head_dim, *rows.shape[1:])
        rotated = heads[:, :dim].unflatten(1, (2, dim // 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat([rotated, heads[:, dim:]], 1).reshape(rows.shape)

    def matrix(self, name: str) -> Weight:
        tensor = self.tensors[name]
        if not tensor.parts:
            return decode(tensor.dtype, {"": self.read(tensor)})
        parts = {
            part: self.read(stored).view(STORED[stored.dtype]).view(stored.shape)
            for part, stored in tensor.parts.items()
        }
        try:
            return decode(tensor.dtype, parts)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be used: {error}") from None

    def dense(self, name: str) -> torch.Tensor:
        """float32 values of a vector."""
        return dequantize(decode(self.tensors[name].dtype, {"": self.read(self.tensors[name])})).view(-1)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """uint8, a row of the tensor in each row."""
        with warnings.catch_warnings():  # torch warns that the file's mapping is read-only; nothing writes to it
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.from_numpy(tensor.data)
        self.bytes += tensor.nbytes
        if self.on_bytes is not None:
            self.on_bytes(self.bytes)
        return raw.view(tensor.shape[0] if tensor.shape else 1, -1)
