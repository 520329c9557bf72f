"""Quantised checkpoints on the GPU's engine in the interpreter, without a dense copy, against the CPU's in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.core.gpu_runner import GpuRunner
from engine.core.runner import Runner
from engine.messages import SamplingParams
from engine.model.gpu import GpuBackend
from tests.engine.quantized_files import KINDS, quantise
from tests.kernels.interpreter.test_gpu_engine import core_of, generate, tokens_of
from tests.kernels.interpreter.test_linear_w8 import blocks

TOKENS = [5, 9, 300, 17, 4, 80, 33]
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
# Error of the logits in the Euclidean norm. Of W8A8 and of FP8 the activations are rounded to 8 bits, those of FP8 not
# on a CPU; random weights make much of it.
ALLOWED = {"w8a8": 6e-2, "fp8 channel": 0.15, "fp8 tensor": 0.15}


def difference(checkpoint: Checkpoint, dtype: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of a prefill and of the decode behind it. No matrix of a layer may become dense."""
    monkeypatch.setattr(GpuBackend, "_dense", _only_what_is_dense(GpuBackend._dense))
    core = core_of(checkpoint, dtype=dtype, max_model_len=64, batch_invariant=False)
    reference = core_of(checkpoint, Runner, max_model_len=64).runner
    assert isinstance(core.runner, GpuRunner) and isinstance(reference, Runner)
    mine, theirs = (torch.cat([r.logits(TOKENS[:6]), r.logits(TOKENS[6:], 6)]) for r in (core.runner, reference))
    if checkpoint.quantization == "W8A8":  # whole steps, once: slow in the interpreter
        outputs = generate(core, [[5, 9], [4]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        assert [len(tokens_of(o)) for o in outputs] == [2, 2]
    return ((mine - theirs).norm() / theirs.norm()).item()


def _only_what_is_dense(dense: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def checked(self: GpuBackend, weight: object) -> torch.Tensor:
        d, rows = weight.d, weight.q.shape[0]  # type: ignore[attr-defined]
        assert d is None or rows == 512, "a quantised matrix became dense"  # 512: the vocabulary, of the embedding
        return dense(self, weight)

    return checked


KERNELS = ["gptq 8 act-order", "w8a16 channel", "w8a16 group asym", "fp8 channel", "fp8 block", "w8a8"]


@pytest.mark.parametrize("kind", KERNELS)
def test_as_the_cpu(
    random_checkpoint: Callable[..., Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind in KINDS
    checkpoint = open_checkpoint(str(quantise(random_checkpoint(**SHAPE), kind, tmp_path)[0]))
    dtype = "bfloat16" if kind == "w8a16 group asym" else "auto"
    allowed = ALLOWED.get(kind, 4e-2 if dtype == "bfloat16" else 5e-3)
    assert difference(checkpoint, dtype, monkeypatch) < allowed


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf(random_checkpoint: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(str(random_checkpoint(**shape)))
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            n, k = tensor.shape
            raw = blocks(kind, n, k // 256)
            tensors[name] = StoredTensor(name, kind, tensor.shape, raw.numpy())
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors, quantization=kind)
    assert difference(checkpoint, "auto", monkeypatch) < 1e-2


def test_eight_bit_products_in_float32(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W8A8 rounds its activations in every dtype; in float32 nothing else differs."""
    checkpoint = open_checkpoint(str(quantise(random_checkpoint(**SHAPE), "w8a8", tmp_path)[0]))
    assert difference(checkpoint, "float32", monkeypatch) < 1e-3
