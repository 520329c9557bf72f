"""The decoder in float32 against transformers on the same weights: logits, and greedy text through the whole engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.build import build_core
from engine.core.loop import EngineCore
from engine.core.runner import Runner
from engine.messages import EngineOptions, Output, Request, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three laws of motion are",
    "Dear Sir or Madam,\n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: Who wrote Hamlet?\nA:",
    "In 1969, the first humans",
    "SELECT name, COUNT(*) FROM",
    "La capitale de l'Italie est",
    "The opposite of hot is",
    "To make pancakes, you need",
    "Photosynthesis is the process by which",
    "<html>\n<head>\n<title>",
    "My favourite colour is blue because",
    "The largest planet in the solar system",
    "import numpy as np\n\n",
    "She opened the door and saw",
    "The meaning of life, according to",
]


def core_of(model: Path, **options: Any) -> EngineCore:
    fields = {"dtype": "float32", "kv_cache_tokens": 4096} | options
    return build_core(EngineOptions(model=str(model), **fields))[0]


def generate(core: EngineCore, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[list[int]]:
    """Greedy continuations, all submitted at once."""
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        outputs[str(i)] = []
        settings = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **params)
        core.add(Request(id=str(i), prompt=prompt, params=settings))
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            outputs[output.id] += output.tokens
    return list(outputs.values())


def logits_of(core: EngineCore, tokens: list[int]) -> torch.Tensor:
    """float32 [T, V] of one forward over the tokens."""
    assert isinstance(core.runner, Runner)
    return core.runner.logits(tokens)


def check_greedy(oracle: Any, prompt: list[int], continuation: list[int], eps: float = 1e-4) -> None:
    """Every token is the oracle's most likely one after those before it (or as likely to within `eps`)."""
    logits = oracle(torch.tensor([prompt + continuation])).logits[0].float()
    for i, token in enumerate(continuation):
        row = logits[len(prompt) + i - 1]
        assert row.max() - row[token] <= eps, f"token {i}: {token}, transformers has {int(row.argmax())}"


@pytest.fixture(scope="module")
def smollm2_core(smollm2: Path) -> EngineCore:
    return core_of(smollm2)


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2: Path) -> Any:
    """transformers' Llama with the file's weights as the gguf package dequantises them, q and k in Hugging Face's order
    of rows."""
    import gguf
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    weights = {}
    for tensor in gguf.GGUFReader(smollm2).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        if tensor.name in names:
            weights[names[tensor.name]] = values
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            values = values.view(-1, 32, 2, 576).transpose(1, 2).reshape(values.shape)
        weights[f"model.layers.{layer}.{parts[part]}.weight"] = values
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="module")
def prompt_ids(smollm2: Path) -> list[list[int]]:
    from engine.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(str(smollm2)).tokenizer
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@torch.inference_mode()
def test_smollm2_logits(smollm2_core: EngineCore, smollm2_oracle: Any, prompt_ids: list[list[int]]) -> None:
    for ids in prompt_ids:
        expected = smollm2_oracle(torch.tensor([ids])).logits[0]
        assert (logits_of(smollm2_core, ids) - expected).abs().max() < 1e-3


@torch.inference_mode()
def test_smollm2_greedy(smollm2_core: EngineCore, smollm2_oracle: Any, prompt_ids: list[list[int]]) -> None:
    texts = generate(smollm2_core, prompt_ids, 64)
    for prompt, text in zip(prompt_ids, texts, strict=True):
        assert len(text) == 64
        check_greedy(smollm2_oracle, prompt, text)


def test_smollm2_golden_text(smollm2_core: EngineCore, smollm2: Path) -> None:
    from engine.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(str(smollm2)).tokenizer
    ids = tokenizer.encode("The capital of France is")
    params = SamplingParams(max_tokens=15, temperature=0.0, logprobs=3)
    smollm2_core.add(Request(id="golden", prompt=ids, params=params))
    outputs: list[Output] = []
    while smollm2_core.has_work:
        outputs += smollm2_core.step()
    text = tokenizer.decode([token for output in outputs for token in output.tokens])
    assert text.startswith(" Paris.\n\nThe answer is: 201")
    assert outputs[0].logprobs is not None
    top = {tokenizer.decode([token]): value for token, value in outputs[0].logprobs[0].top}
    assert top == pytest.approx({" Paris": -0.2581, " the": -2.7407, " London": -4.3844}, abs=1e-3)


FAMILIES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "sharded": {"max_shard_size": "60KB"},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 500000.0,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0,
        }
    },
    "mistral window": {"family": "Mistral", "sliding_window": 24},
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3"},
    "phi3": {"family": "Phi3"},
    "phi3 window": {"family": "Phi3", "sliding_window": 24},
    "phi3 partly rotated": {
        "family": "Phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "granite": {
        "family": "Granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.03,
        "logits_scaling": 8.0,
    },
    "smollm3": {"family": "SmolLM3", "num_hidden_layers": 4, "no_rope_layer_interval": 2, "layer_types": None},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}  # fmt: skip


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
@torch.inference_mode()
def test_random_checkpoints(random_checkpoint: Callable[..., Path], config: dict[str, Any]) -> None:
    """Logits over 96 positions, and greedy text after prompts of several lengths, computed together."""
    import transformers

    folder = random_checkpoint(**config)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    core = core_of(folder, max_num_batched_tokens=48)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 512, (n,), generator=generator).tolist() for n in (1, 7, 33, 96)]
    expected = oracle(torch.tensor([prompts[-1]])).logits[0].float()
    assert (logits_of(core, prompts[-1]) - expected).abs().max() < 1e-3
    for prompt, text in zip(prompts, generate(core, prompts, 24), strict=True):
        check_greedy(oracle, prompt, text, eps=1e-3)


@torch.inference_mode()
def test_the_first_release_of_yi(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Its norms are called ln1 and ln2, its class YiForCausalLM: renamed, they are a Llama's."""
    import transformers
    from safetensors.torch import load_file, save_file

    source = random_checkpoint()
    names = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        part = name.rsplit(".", 2)[-2]
        tensors[name.replace(part, names.get(part, part))] = tensor
    assert "model.layers.1.ln2.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["YiForCausalLM"], "model_type": "Yi"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    oracle = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    core, prompt = core_of(tmp_path), list(range(2, 98))
    assert (logits_of(core, prompt) - oracle(torch.tensor([prompt])).logits[0].float()).abs().max() < 1e-3
    check_greedy(oracle, prompt, generate(core, [prompt], 12)[0], eps=1e-3)


LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8.5],
    },
}  # fmt: skip


@pytest.mark.parametrize(("length", "context"), [(48, 64), (96, 512)], ids=["short", "long"])
@torch.inference_mode()
def test_longrope_is_chosen_by_the_context(random_checkpoint: Callable[..., Path], length: int, context: int) -> None:
    """transformers chooses by the length at hand; so the short factors need a context that never exceeds theirs."""
    import transformers

    folder = random_checkpoint("Phi3", **LONGROPE)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    core = core_of(folder, max_model_len=context)
    prompt = torch.randint(2, 512, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = oracle(torch.tensor([prompt])).logits[0].float()
    assert (logits_of(core, prompt) - expected).abs().max() < 1e-3
    check_greedy(oracle, prompt, generate(core, [prompt], 12)[0], eps=1e-3)


GGUF_PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.03, "logits_scaling": 8.0,
}  # fmt: skip
GGUF_FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
    "granite": (
        "Granite", GRANITE,
        {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.03, "logit_scale": 8.0},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "layer_types": None}, {}),
    "phi3": (
        "Phi3", LONGROPE, {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.2247449},
    ),
}  # fmt: skip


@pytest.mark.parametrize("arch", GGUF_FAMILIES)
@torch.inference_mode()
def test_gguf_families(random_checkpoint: Callable[..., Path], tmp_path: Path, arch: str) -> None:
    """The same weights under llama.cpp's names, order of rows and metadata."""
    import transformers

    from engine.checkpoint import open_checkpoint
    from tests.engine.checkpoint.files import tiny_metadata, write_arrays

    family, fields, metadata = GGUF_FAMILIES[arch]
    folder = random_checkpoint(family, **fields)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = oracle.config
    arrays = {}
    for name, parameter in oracle.state_dict().items():
        values, layer = parameter.clone(), name.removeprefix("model.layers.").partition(".")
        if arch in ("llama", "granite", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = values.view(-1, 2, 8, 64).transpose(1, 2).reshape(values.shape)
        if name.startswith("model.layers."):
            part, _, kind = layer[2].rpartition(".")
            name = f"blk.{layer[0]}.{GGUF_PARTS[part]}.{kind}"
        else:
            tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
            name = tops[name.removesuffix(".weight")] + ".weight"
        arrays[name] = values.numpy()
    if arch == "phi3":
        for kind in ("short", "long"):
            factors = torch.tensor(LONGROPE["rope_parameters"][f"{kind}_factor"])
            arrays[f"rope_factors_{kind}.weight"] = factors.float().numpy()
    if config.tie_word_embeddings:
        arrays.pop("output.weight", None)
    sizes = {
        "block_count": config.num_hidden_layers, "context_length": 512, "embedding_length": 64,
        "feed_forward_length": 160, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"], "attention.key_length": 16,
    }  # fmt: skip
    tiny = {key: value for key, value in tiny_metadata(arch).items() if not key.startswith(f"{arch}.")}
    own = {f"{arch}.{key}": value for key, value in (sizes | metadata).items()}
    write_arrays(tmp_path / "m.gguf", tiny | own, arrays)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    core = build_core(EngineOptions(dtype="float32", kv_cache_tokens=1024), checkpoint=checkpoint)[0]
    prompt = torch.randint(2, 512, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    assert (logits_of(core, prompt) - oracle(torch.tensor([prompt])).logits[0].float()).abs().max() < 1e-3
    check_greedy(oracle, prompt, generate(core, [prompt], 12)[0], eps=1e-3)
