"""Quantises a model layer by layer: no more than one layer and the calibration's activations are in memory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.prompts import text_of
from bench.quantize.calibrate import WINDOW, Recorder, Stream
from bench.quantize.folder import Shards, config_json, fuse, parts_of, quantization_config, write_json, write_tokenizer
from bench.quantize.rounding import TARGETS, Rounded, Target, gptq, group_size, nearest
from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.checkpoint.quantized import Scheme
from engine.errors import FenError
from engine.model.loader import Loader
from kernels.formats import STORED, dequantize

METHODS = ("rtn", "gptq")
# Linears that share an input, under the name of the first.
SHARED = {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}
_TYPES = {dtype: name for name, dtype in STORED.items()}


def quantize(
    model: str,
    to: str,
    output: Path,
    method: str | None = None,
    calibration: Path | None = None,
    tokens: int = 8192,
    group: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes `model` in the format `to` (a key of TARGETS) into the new folder `output`.

    method: "rtn" or "gptq"; None: gptq for 4 bits, rtn for 8. calibration: a text, of which the first `tokens` are
    used; None: the one that is shipped. group: columns that share a scale; None: as many as fit. Raises FenError in
    one sentence.
    """
    if to not in TARGETS:
        raise FenError(f"--to is {to}; it must be {', '.join(TARGETS)}.")
    target = TARGETS[to]
    method = method or ("gptq" if target.bits == 4 else "rtn")
    if method not in METHODS:
        raise FenError(f"--method is {method}; it must be {', '.join(METHODS)}.")
    if method == "gptq" and target.floating:
        raise FenError("--method gptq rounds to integers; fp8 takes rtn.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FenError(f"{output} is there already; choose another --output.")
    checkpoint = open_checkpoint(model)
    dtype = checkpoint.config.dtype if checkpoint.format == "safetensors" else "float16"
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name.endswith("_proj.weight")}
    try:
        group = group_size(target, [shape[1] for shape in shapes.values()], group)
    except ValueError as error:
        raise FenError(f"--to {to} does not fit: {error}.") from None
    config = config_json(checkpoint, dtype) | {"quantization_config": quantization_config(target, group)}
    stream = None
    if method == "gptq":
        ids = checkpoint.tokenizer.encode(
            text_of(calibration, "--calibration", "calibration.txt"), add_special_tokens=False
        )[:tokens]
        if len(ids) < WINDOW:
            raise FenError(f"The calibration text has {len(ids)} tokens; {WINDOW} are needed at least.")
        stream = Stream(checkpoint, ids)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(checkpoint, partial, target, group, dtype, stream, on_layer)
        write_json(partial / "config.json", config)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:  # also at Ctrl-C and on a full disk
        shutil.rmtree(partial, ignore_errors=True)
    on_layer(checkpoint.config.num_layers, checkpoint.config.num_layers)
    return output


def _write(
    checkpoint: Checkpoint, folder: Path, target: Target, group: int, dtype: str, stream: Stream | None,
    on_layer: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Weights and tokenizer."""
    worker = _Worker(checkpoint, target, group, getattr(torch, dtype))
    shards = Shards(folder, checkpoint.config.num_layers + 1)
    with torch.inference_mode():
        for index in range(checkpoint.config.num_layers):
            on_layer(index, checkpoint.config.num_layers)
            shards.write(worker.layer(index, stream))
        shards.write(worker.rest())
    shards.finish()
    write_tokenizer(checkpoint, folder)


class _Worker:
    def __init__(self, checkpoint: Checkpoint, target: Target, group: int, dtype: torch.dtype):
        self.checkpoint, self.target, self.group, self.dtype = checkpoint, target, group, dtype
        self.loader = Loader(checkpoint, Recorder(checkpoint), None)
        # What is written has its rows in Hugging Face's order.
        self.config = dataclasses.replace(checkpoint.config, rope_interleaved=False)
        kind = {"pack-quantized": "PACKED", "float-quantized": "FP8"}.get(target.layout, "INT8")
        self.scheme = Scheme(kind, target.name, target.bits, group)

    def layer(self, index: int, stream: Stream | None) -> dict[str, torch.Tensor]:
        """The tensors of the layer as they are written; moves the stream behind it, through the rounded weights."""
        prefix = f"model.layers.{index}."
        inputs = stream.inputs(self.checkpoint, index) if stream else {}
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        written: dict[str, torch.Tensor] = {}
        stored: dict[str, StoredTensor] = {}
        for name in names:
            values = self._values(name)
            if not name.endswith("_proj.weight"):
                written[name] = values.to(self.dtype)
                stored[name] = _stored(name, written[name])
                continue
            linear = name.removesuffix(".weight")
            parts = parts_of(linear, self._round(linear, values, inputs), self.target)
            written |= parts
            of_weight = {key.removeprefix(linear + "."): _stored(key, value) for key, value in parts.items()}
            stored[name] = StoredTensor(name, self.scheme.kind, tuple(values.shape), np.empty(0), of_weight)
        self.checkpoint.tensors[names[0]].drop_pages()
        if stream is not None:
            stream.advance(dataclasses.replace(self.checkpoint, config=self.config, tensors=stored), index)
        return fuse(written) if self.config.architecture == "Phi3ForCausalLM" else written

    def rest(self) -> dict[str, torch.Tensor]:
        names = [name for name in self.checkpoint.tensors if not name.startswith("model.layers.")]
        return {name: self._values(name).to(self.dtype) for name in names}

    def _round(self, linear: str, values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> Rounded:
        if not inputs:
            return nearest(values, self.target, self.group, self.dtype)
        layer, part = linear.rsplit(".", 2)[0], ".".join(linear.rsplit(".", 2)[1:])
        h = inputs.get(linear)
        h = inputs[f"{layer}.{SHARED[part]}"] if h is None else h
        return gptq(values, h, self.target, self.group, self.dtype)

    def _values(self, name: str) -> torch.Tensor:
        """float32, rows of q and k in Hugging Face's order."""
        tensor, config = self.checkpoint.tensors[name], self.checkpoint.config
        values = dequantize(self.loader.matrix(name)) if len(tensor.shape) == 2 else self.loader.dense(name)
        if config.rope_interleaved and name.endswith(
            (".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias")
        ):
            heads = values.view(-1, config.head_dim // 2, 2, *values.shape[1:])
            return heads.transpose(1, 2).reshape(values.shape)
        return values


def _stored(name: str, value: torch.Tensor) -> StoredTensor:
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(name, _TYPES[value.dtype], tuple(value.shape), raw)
