"""transformers as a worker: eager, its own KV cache, the weights of the GGUF file dequantised to one dtype."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

# Nothing is fetched, and its optional package `kernels` cannot be mistaken for the one of this project.
os.environ.update(USE_HUB_KERNELS="NO", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
import transformers

from bench.local_engine import Timing
from bench.peers.worker import serve
from engine.model.config import ModelConfig

model: Any


def load(path: str, threads: int, dtype: str) -> dict[str, Any]:
    global model
    torch.set_num_threads(threads)
    model = load_model(Path(path), dtype)
    return {
        "settings": f"{threads} threads, {dtype}, eager, use_cache, attention {model.config._attn_implementation}, "
        "a plain loop without generate()",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


def load_model(file: Path, dtype: str) -> Any:
    """A GGUF file, dequantised, or a folder."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source: dict[str, Any] = {}
    if file.suffix == ".gguf":
        source = {"gguf_file": file.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent if source else file, dtype=getattr(torch, dtype), **source
    ).eval()


def random_model(config: ModelConfig, dtype: str, device: str) -> Any:
    """Random weights of a LLaMA's shape."""
    transformers.logging.set_verbosity_error()
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_dim,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_position,
        tie_word_embeddings=config.tie_embeddings, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype)).eval()


@torch.inference_mode()
def generate(prompts: list[list[int]], new_tokens: int) -> Timing:
    """The prompts must be of one length: no padding costs this peer anything."""
    started = time.monotonic()
    output = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    steps = [output.logits[:, -1].argmax(-1)]
    rows = [steps[0].tolist()]  # a server would send each token as it comes
    first = time.monotonic()
    while len(rows) < new_tokens:
        output = model(steps[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits[:, -1].argmax(-1))
        rows.append(steps[-1].tolist())
    tokens = [list(column) for column in zip(*rows, strict=True)]
    return Timing(first - started, time.monotonic() - started, tokens)


if __name__ == "__main__":
    serve(load, generate)
