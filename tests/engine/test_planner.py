"""Plans: bytes and seconds against hand arithmetic, and starts that cannot fit."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoint import open_checkpoint
from engine.core.build import build_core
from engine.errors import CapacityError
from engine.messages import EngineOptions
from engine.planner import GIB, Machine, Plan, check_fit, layer_weights, plan
from tests.engine.quantized_files import KINDS, quantise

CARD = Machine("a card", 80 * GIB, 3.0e12, 800e12)


def planned(shape: str, machine: Machine = CARD, weights: str | None = None, **options: object) -> Plan:
    return plan(open_checkpoint(shape, "dummy"), machine, EngineOptions(**options), weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "weights", "tokens_per_second"),
    [("llama-3-8b", None, 200), ("yi-6b", None, 259), ("yi-34b", None, 44), ("yi-34b", "w8a16", 88)],
)
def test_decode_at_batch_1_is_the_weights_over_the_bandwidth(
    shape: str, weights: str | None, tokens_per_second: float
) -> None:
    """The figures that are known for a card of 3.0 TB/s, head included (16-bit here)."""
    assert 1 / planned(shape, weights=weights).decode(1, 1) == pytest.approx(tokens_per_second, rel=0.02)


@pytest.mark.parametrize("shape", ["llama-3-8b", "yi-34b", "smollm2-135m"])
def test_the_layers_of_a_config_are_those_of_the_checkpoint(shape: str) -> None:
    checkpoint = open_checkpoint(shape, "dummy")
    matrices = [t for n, t in checkpoint.tensors.items() if n.startswith("model.layers.") and len(t.shape) == 2]
    assert layer_weights(checkpoint.config) == sum(math.prod(tensor.shape) for tensor in matrices)
    of = planned(shape)
    assert of.weights == pytest.approx(checkpoint.total_bytes, rel=1e-4)  # less the last norm
    assert of.kv == checkpoint.config.kv_bytes_per_token


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_a_quantised_folder_counts_what_its_files_hold(
    random_checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 32}
    folder, _ = quantise(random_checkpoint(dtype="bfloat16", **shape), kind, tmp_path)
    (tmp_path / "alone").mkdir()
    config = shutil.copy(folder / "config.json", tmp_path / "alone")
    whole = plan(open_checkpoint(str(folder)), CARD, EngineOptions())
    alone = plan(open_checkpoint(config, "dummy"), CARD, EngineOptions())
    assert alone.read == pytest.approx(whole.read, rel=0.05)  # no g_idx, scales of another type: little
    bits = 4 if " 4" in f" {kind}" or "w4" in kind or kind == "awq" else 8
    layers = alone.read - 512 * 256 * 2
    assert layers == pytest.approx(layer_weights(alone.config) * bits / 8, rel=0.35)
    assert open_checkpoint(config, "dummy").quantization == open_checkpoint(str(folder)).quantization


def test_a_gguf_counts_its_blocks(smollm2: Path) -> None:
    of = plan(open_checkpoint(str(smollm2)), CARD, EngineOptions())
    assert of.read - 49152 * 576 * 2 == pytest.approx(layer_weights(of.config) * 20 / 32, rel=0.01)  # Q4_1


def test_prefill_is_bound_by_arithmetic_and_decode_of_many_reads_their_keys() -> None:
    of = planned("llama-3-8b")
    flops = 2 * 512 * layer_weights(of.config) + 2 * 128256 * 4096 + 2 * 2 * 32 * 32 * 128 * 512 * 513 / 2
    assert of.prefill(512) == pytest.approx(flops / 800e12)
    assert of.decode(64, 4096) - of.decode(1, 4096) == pytest.approx(63 * 4096 * of.kv / 3.0e12)


def test_a_window_bounds_what_is_read() -> None:
    of = planned("llama-3-8b")
    narrow = dataclasses.replace(of, config=dataclasses.replace(of.config, sliding_window=128))
    assert narrow.decode(64, 4096) == of.decode(64, 128)
    assert narrow.prefill(100) == of.prefill(100)
    assert narrow.prefill(4096) < of.prefill(4096)


def test_what_fits_uses_the_memory_and_no_more() -> None:
    of = planned("llama-3-8b")
    assert of.weights + of.workspace + of.tokens * of.kv <= CARD.memory
    assert of.weights + of.workspace + (of.tokens + 1) * of.kv > CARD.memory
    assert of.sequences(8192) == of.tokens // 8192
    options = EngineOptions(kv_cache_tokens=of.tokens)
    check_fit(of, options)
    with pytest.raises(CapacityError, match=r"--kv-cache-tokens \d+ takes .* GiB .*; --kv-cache-tokens \d+ would fit"):
        check_fit(of, EngineOptions(kv_cache_tokens=of.tokens + 1))
    with pytest.raises(CapacityError, match=r"--max-model-len 9000000 takes"):
        check_fit(of, EngineOptions(max_model_len=9_000_000))


def test_weights_that_do_not_fit_name_the_ways_out() -> None:
    small = dataclasses.replace(CARD, memory=24 * GIB)
    with pytest.raises(CapacityError) as error:
        check_fit(planned("yi-34b", small), EngineOptions(), "a larger --gpu-memory-utilization")
    assert "a 4-bit copy of it" in str(error.value)
    assert "a larger --gpu-memory-utilization" in str(error.value)
    with pytest.raises(CapacityError, match="--dtype bfloat16, which takes half"):
        check_fit(planned("llama-3-8b", small, dtype="float32"), EngineOptions(dtype="float32"))
    check_fit(planned("yi-34b", small, weights="w4a16"), EngineOptions())


def test_a_start_that_cannot_fit_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.build.available_memory", lambda: 8 * GIB)
    options = EngineOptions(model="yi-34b", load_format="dummy", device="cpu")
    with pytest.raises(CapacityError, match="does not fit: its weights take 64"):
        build_core(options)


def test_float32_weights_are_halved_on_a_gpu() -> None:
    checkpoint = open_checkpoint("smollm2-135m", "dummy")
    tensors = {name: dataclasses.replace(tensor, dtype="F32") for name, tensor in checkpoint.tensors.items()}
    stored = dataclasses.replace(checkpoint, tensors=tensors)
    halved, as_it_is = (plan(which, CARD, EngineOptions(), gpu=True).read for which in (stored, checkpoint))
    assert halved == as_it_is
    assert plan(stored, CARD, EngineOptions(dtype="float32"), gpu=True).read > 1.9 * halved
