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

model: Any


def load(path: str, threads: int, dtype: str) -> dict[str, Any]:
    global model
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    file = Path(path)
    source: dict[str, Any] = {}
    if file.suffix == ".gguf":
        source = {"gguf_file": file.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent if source else file, dtype=getattr(torch, dtype), **source
    ).eval()
    return {
        "settings": f"{threads} threads, {dtype}, eager, use_cache, attention {model.config._attn_implementation}, "
        "a plain loop without generate()",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }


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
