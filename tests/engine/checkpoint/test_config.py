"""Configs as transformers writes them and as GGUF holds them; what would change the arithmetic unnoticed is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.checkpoint import open_checkpoint
from engine.checkpoint.config import gguf_config, hf_config
from engine.checkpoint.gguf import read_gguf
from engine.errors import CheckpointError
from engine.model.config import ModelConfig, RopeScaling
from tests.engine.checkpoint.files import HEAD_DIM, TENSORS, tiny_metadata, write_gguf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "eos_token_id": [1, 2],
}
QWEN_WINDOW = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}


def parse(**changes: Any) -> ModelConfig:
    return hf_config({**LLAMA, **changes}, {}, "config.json")


SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling | None]] = {
    "none": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0, 512)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, 512)),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        RopeScaling("llama3", 8.0, 128, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0},
        RopeScaling("yarn", 4.0, 256, beta_fast=16.0),
    ),
    "yarn with mscale": (
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "mscale": 0.7,
            "mscale_all_dim": 1.0, "truncate": False,
        },
        RopeScaling("yarn", 4.0, 256, mscale=0.7, mscale_all_dim=1.0, truncate=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_in_both_spellings(name: str) -> None:
    values, expected = SCALINGS[name]
    old = {"type" if key == "rope_type" else key: value for key, value in values.items()}
    for config in (parse(rope_scaling=values), parse(rope_scaling=old), parse(rope_parameters=values)):
        assert config.rope_scaling == expected and config.rope_theta == 5e5
    theta = parse(rope_theta=None, rope_parameters=values | {"rope_theta": 123.0}).rope_theta
    assert theta == 123.0


@pytest.mark.parametrize("name", SCALINGS)
def test_a_checkpoint_that_transformers_wrote(random_checkpoint: Callable[..., Path], name: str) -> None:
    values, expected = SCALINGS[name]
    folder = random_checkpoint(rope_parameters=values | {"rope_theta": 10000.0})
    config = open_checkpoint(str(folder)).config
    assert config.rope_scaling == expected and config.rope_theta == 10000.0


@pytest.mark.parametrize(
    "family, fields",
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 32}),
        ("Mistral", {"sliding_window": 32}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}),
        ("Qwen3", {"attention_bias": False}),
        ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_families(random_checkpoint: Callable[..., Path], family: str, fields: dict[str, Any]) -> None:
    """Opening checks every tensor's presence and shape against the config, so wrong flags could not pass."""
    folder = random_checkpoint(family, **fields)
    checkpoint = open_checkpoint(str(folder))
    config, theirs = checkpoint.config, transformers.AutoConfig.from_pretrained(folder)
    assert config.architecture == f"{family}ForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (512, 64, 2)
    assert (config.num_heads, config.num_kv_heads) == (4, theirs.num_key_value_heads)
    assert config.head_dim == theirs.head_dim
    assert config.rms_norm_eps == theirs.rms_norm_eps and config.max_position == 512
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.sliding_window == getattr(theirs, "sliding_window", None)
    assert config.attention_bias == (family == "Qwen2" or bool(getattr(theirs, "attention_bias", False)))
    assert config.qk_norm == (family == "Qwen3")
    assert not config.rope_interleaved
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (0, (1,), "float32")


def test_end_tokens_of_the_generation_config_win() -> None:
    assert hf_config(LLAMA, {"eos_token_id": 7}, "config.json").eos_token_ids == (7,)
    assert hf_config(LLAMA, {}, "config.json").eos_token_ids == (1, 2)


def test_stretched_context_is_the_context() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert parse(rope_scaling=yarn).max_position == 2048
    assert parse(rope_scaling={"type": "linear", "factor": 4.0}).max_position == 512


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["MixtralForCausalLM"]}, "architectures is ['MixtralForCausalLM']; supported: LlamaFor"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 2.5}, "hidden_size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"max_position_embeddings": -5}, "max_position_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"compression_config": {"format": "pack-quantized"}}, "compression_config"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "rope_scaling: rope_type is 'ntk'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_scaling: short_factor is None; 8 numbers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"eos_token_id": 512}, "eos_token_id is 512"),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ({**QWEN_WINDOW, "max_window_layers": 1}, "layer_types mixes"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        parse(**changes)
    assert named in str(error.value) and "config.json" in str(error.value)


def gguf(path: Path, arch: str = "llama", shapes: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    metadata = tiny_metadata(arch)
    for key, value in changes.items():
        name = key.replace("__", ".")
        metadata[name if name.startswith(("general.", "tokenizer.")) else f"{arch}.{name}"] = value
    write_gguf(path, metadata, shapes=TENSORS | (shapes or {}))
    return gguf_config(read_gguf(path))


def test_the_default_model(smollm2: Path) -> None:
    assert gguf_config(read_gguf(smollm2)) == ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position=8192,
        rms_norm_eps=pytest.approx(1e-5),
        rope_theta=100000.0,
        rope_interleaved=True,
        tie_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def test_gguf_variants(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    assert gguf(path).rope_interleaved and gguf(path).dtype == "float32"
    assert not gguf(path, "qwen2").rope_interleaved
    bias = {f"blk.0.attn_{part}.bias": TENSORS[f"blk.0.attn_{part}.weight"][:1] for part in "qkv"}
    config = gguf(path, "qwen2", bias)
    assert config.attention_bias and not config.output_bias and not config.qk_norm
    norms = {"blk.0.attn_q_norm.weight": (HEAD_DIM,), "blk.0.attn_k_norm.weight": (HEAD_DIM,)}
    assert gguf(path, "qwen3", norms).qk_norm
    untied = gguf(path, shapes={"output.weight": TENSORS["token_embd.weight"]}, tokenizer__ggml__eot_token_id=5)
    assert not untied.tie_embeddings and untied.eos_token_ids == (258, 5)
    assert gguf(path, attention__sliding_window=16).sliding_window == 16


def test_gguf_rope(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    linear = gguf(path, rope__scaling__type="linear", rope__scaling__factor=4.0, rope__freq_base=5e5)
    assert linear.rope_scaling == RopeScaling("linear", 4.0, 128) and linear.rope_theta == 5e5
    fields = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 32}
    assert gguf(path, **fields).rope_scaling == RopeScaling("yarn", 4.0, 32)
    assert gguf(path, rope__scaling__type="none").rope_scaling is None


def test_gguf_rope_factors(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    stored = write_gguf(path, shapes=TENSORS | {"rope_freqs.weight": (HEAD_DIM // 2,)})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight must be 16 positive"):  # the random ones are not
        gguf_config(read_gguf(path))
    content = path.read_bytes()
    factors = [1.0] * 8 + [8.0] * 8
    import numpy as np

    path.write_bytes(content.replace(stored["rope_freqs.weight"].tobytes(), np.array(factors, np.float32).tobytes()))
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.rope_factors == tuple(factors)
    assert not any("rope" in name for name in checkpoint.tensors)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"arch": "mamba"}, "general.architecture is 'mamba'; supported: llama, qwen2, qwen3"),
        ({"block_count": 10**6}, "llama.block_count is 1000000"),
        ({"attention__head_count": 0}, "llama.attention.head_count is 0"),
        ({"attention__key_length": 0}, "llama.attention.key_length is 0"),
        ({"attention__value_length": 16}, "llama.attention.value_length is 16"),
        ({"rope__dimension_count": 16}, "llama.rope.dimension_count is 16"),
        ({"rope__freq_base": float("nan")}, "llama.rope.freq_base is nan"),
        ({"attention__layer_norm_rms_epsilon": float("inf")}, "rms_epsilon is inf"),
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ({"attention__head_count_kv": [1, 1]}, "llama.attention.head_count_kv"),
        ({"attention__scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"tokenizer__ggml__eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id"),
    ],
)
def test_gguf_refusals_name_the_key(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        gguf(tmp_path / "a.gguf", **changes)
    assert named in str(error.value)


def test_json_that_is_none(tmp_path: Path) -> None:
    for text in ("", "[1]", "{" * 10, '{"a": ' * 100_000, "\xff"):
        (tmp_path / "config.json").write_text(text, "latin-1")
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(str(tmp_path))
