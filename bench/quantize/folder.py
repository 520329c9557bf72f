"""The files of a quantised model: compressed-tensors safetensors (https://github.com/vllm-project/compressed-tensors),
one shard a layer, with config.json and tokenizer, as transformers and other engines load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.quantize.rounding import Rounded, Target
from engine.checkpoint import Checkpoint
from engine.errors import FenError

# GGUF's architectures whose config.json can be made from the metadata -> its names there.
ARCHITECTURES = {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}
ARCHITECTURES["qwen3"] = ("Qwen3ForCausalLM", "qwen3")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".bin.index.json")
_SHAPE = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "max_position_embeddings": "max_position", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "tie_word_embeddings": "tie_embeddings", "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias", "bos_token_id": "bos_token_id",
}  # fmt: skip


def parts_of(name: str, rounded: Rounded, target: Target) -> dict[str, torch.Tensor]:
    """name: of a linear -> its tensors in the target's layout."""
    if target.layout != "pack-quantized":
        return {f"{name}.weight": rounded.q, f"{name}.weight_scale": rounded.scale}
    n, k = rounded.q.shape
    per = 32 // target.bits
    q = rounded.q.to(torch.int64) + 2 ** (target.bits - 1)
    q = torch.nn.functional.pad(q, (0, -k % per)).view(n, -1, per)
    words = (q << torch.arange(0, 32, target.bits)).sum(-1)
    return {
        f"{name}.weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32),
        f"{name}.weight_scale": rounded.scale,
        f"{name}.weight_shape": torch.tensor([n, k]),
    }


def fuse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer with q, k and v as one matrix, and gate and up as another, as Phi-3 has them."""
    fused: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for linear, parts in FUSED.items():
            for part in parts:
                name = name.replace(f".{part}.", f".{linear}.")
        fused.setdefault(name, []).append(tensor)
    return {
        name: torch.stack([sum(shape[0] for shape in parts), parts[0][1]])  # type: ignore[arg-type]
        if name.endswith("weight_shape")
        else torch.cat(parts)
        for name, parts in fused.items()
    }


def quantization_config(target: Target, group: int) -> dict[str, Any]:
    kind = "float" if target.floating else "int"
    common = {"num_bits": target.bits, "type": kind, "symmetric": True}
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    weights = common | strategy | {"dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax"}
    tokens = common | {"strategy": "token", "dynamic": True, "group_size": None, "observer": None}
    return {
        "quant_method": "compressed-tensors",
        "format": target.layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": tokens if target.activations else None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def config_json(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """The folder's own, or what the metadata of a GGUF file say. FenError where that cannot be said in config.json."""
    if checkpoint.format == "safetensors":
        values: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
        return {name: value for name, value in values.items() if name != "torch_dtype"} | {"dtype": dtype}
    config = checkpoint.config
    if config.architecture not in ARCHITECTURES or config.rope_scaling is not None or config.rope_factors is not None:
        raise FenError(
            f"{checkpoint.path.name} is a GGUF file whose architecture or rope scaling has no config.json here; "
            f"GGUF files of {', '.join(ARCHITECTURES)} without rope scaling can be quantised, and safetensors folders."
        )
    architecture, model_type = ARCHITECTURES[config.architecture]
    values = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "dtype": dtype}
    return values | {name: getattr(config, ours) for name, ours in _SHAPE.items()} | {
        "eos_token_id": list(config.eos_token_ids)
    }  # fmt: skip


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the folder's small files, or writes tokenizer.json and tokenizer_config.json from the GGUF file's."""
    if checkpoint.format == "safetensors":
        for path in checkpoint.path.iterdir():
            if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
                shutil.copyfile(path, folder / path.name)
        return
    tokenizer = checkpoint.tokenizer
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    settings |= {"chat_template": tokenizer.chat_template, "model_max_length": checkpoint.config.max_position}
    adds_bos = tokenizer.bos_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_id]
    settings |= {"add_bos_token": adds_bos, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": list(checkpoint.config.eos_token_ids)})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Shards:
    """model-00001-of-00032.safetensors and so on, written one at a time, and the index that joins them."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self.weight_map: dict[str, str] = {}
        self.bytes = 0

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        number = len(set(self.weight_map.values())) + 1
        name = f"model-{number:05}-of-{self.count:05}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, self.folder / name, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(value.nbytes for value in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)
