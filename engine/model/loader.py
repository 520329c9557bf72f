"""Checkpoint tensors -> decoder: fuses q, k, v and gate, up; brings rotary rows into the engine's order."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from engine.checkpoint import Checkpoint, StoredTensor
from engine.model.config import ModelConfig
from engine.model.cpu import CpuBackend
from engine.model.decoder import Decoder, Layer, Linear
from kernels.cpu.fused import norm_weight
from kernels.cpu.linear import Linear as CpuLinear
from kernels.cpu.linear import Plan, head_plan
from kernels.formats import dequantize


def load_decoder(
    checkpoint: Checkpoint, plan: Plan, block_size: int, on_bytes: Callable[[int], None] | None = None
) -> Decoder:
    """Reads every tensor of the checkpoint once. `on_bytes(n)` follows with the bytes read so far."""
    return _Loader(checkpoint, plan, on_bytes).decoder(block_size)


class _Loader:
    def __init__(self, checkpoint: Checkpoint, plan: Plan, on_bytes: Callable[[int], None] | None):
        self.config: ModelConfig = checkpoint.config
        self.tensors = checkpoint.tensors
        self.plan = plan
        self.on_bytes = on_bytes
        self.bytes = 0

    def decoder(self, block_size: int) -> Decoder:
        config = self.config
        layers = [self.layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        table = self.tensors["model.embed_tokens.weight"]
        raw = self.read(table.name)
        head = self.raw("model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight")
        decoder = Decoder(
            config=config,
            backend=CpuBackend(config, self.plan, block_size),
            embed=lambda tokens: dequantize(raw[tokens], table.dtype),
            layers=layers,
            norm=norm_weight(self.dense("model.norm.weight")),
            head=CpuLinear(*head, None, head_plan(self.plan)),
        )
        table.drop_pages()
        return decoder

    def layer(self, prefix: str) -> Layer:
        config = self.config
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qk_norm = None
        if config.qk_norm:
            q, k = (self.rotary(self.dense(f"{attention}{x}_norm.weight")) for x in "qk")
            qk_norm = norm_weight(q), norm_weight(k), config.rms_norm_eps
        layer = Layer(
            input_norm=norm_weight(self.dense(prefix + "input_layernorm.weight")),
            qkv=self.linear([attention + f"{x}_proj" for x in "qkv"], rotary=2),
            qk_norm=qk_norm,
            output=self.linear([attention + "o_proj"]),
            post_norm=norm_weight(self.dense(prefix + "post_attention_layernorm.weight")),
            gate_up=self.linear([mlp + "gate_proj", mlp + "up_proj"]),
            down=self.linear([mlp + "down_proj"]),
        )
        self.tensors[prefix + "input_layernorm.weight"].drop_pages()
        return layer

    def linear(self, names: list[str], rotary: int = 0) -> Linear:
        """The named linears as one; the first `rotary` of them make what is rotated. Parts of different formats cannot
        share a matmul and stay apart."""
        parts = []
        for i, name in enumerate(names):
            weight, kind = self.raw(name + ".weight")
            bias = self.dense(name + ".bias") if name + ".bias" in self.tensors else None
            if i < rotary:
                weight, bias = self.rotary(weight), self.rotary(bias) if bias is not None else None
            parts.append((weight, kind, bias))
        if len({(kind, bias is None) for _, kind, bias in parts}) == 1:
            biases = [bias for _, _, bias in parts if bias is not None]
            weight = torch.cat([weight for weight, _, _ in parts])
            parts = [(weight, parts[0][1], torch.cat(biases) if biases else None)]
        linears = [CpuLinear(*part, self.plan) for part in parts]
        if len(linears) == 1:
            return linears[0]
        return lambda x: torch.cat([linear(x) for linear in linears], -1)

    def rotary(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (or elements) of whole heads in the engine's order: pairs (2i, 2i + 1)."""
        if self.config.rope_interleaved:
            return rows
        half = self.config.head_dim // 2
        return rows.view(-1, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def raw(self, name: str) -> tuple[torch.Tensor, str]:
        """Bytes of a matrix, uint8 [rows, bytes of a row], and their format."""
        return self.read(name), self.tensors[name].dtype

    def dense(self, name: str) -> torch.Tensor:
        """float32 values of a vector."""
        return dequantize(self.read(name), self.tensors[name].dtype).view(-1)

    def read(self, name: str) -> torch.Tensor:
        tensor: StoredTensor = self.tensors[name]
        with warnings.catch_warnings():  # torch warns that the file's mapping is read-only; nothing writes to it
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.from_numpy(tensor.data)
        self.bytes += tensor.nbytes
        if self.on_bytes is not None:
            self.on_bytes(self.bytes)
        return raw.view(tensor.shape[0], -1)
