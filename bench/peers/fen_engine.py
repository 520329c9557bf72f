"""This engine as a worker: the in-process engine with its scheduler, paging and sampler, prefix cache off."""

from __future__ import annotations

from typing import Any

import torch

from bench.local_engine import LocalEngine, Timing
from bench.machine import commit
from bench.peers.worker import serve
from engine.messages import EngineOptions

engine: LocalEngine


def load(model: str, threads: int, kv_cache_tokens: int) -> dict[str, Any]:
    global engine
    options = EngineOptions(
        model=model, device="cpu", threads=threads, kv_cache_tokens=kv_cache_tokens, enable_prefix_caching=False
    )
    engine = LocalEngine(options)
    info = engine.info
    return {
        "settings": f"{torch.get_num_threads()} threads, {info.dtype} activations, {info.quantization} weights, "
        f"KV blocks of {info.block_size}, prefix cache off",
        "versions": {"fen": commit(), "torch": torch.__version__},
    }


def generate(prompts: list[list[int]], new_tokens: int) -> Timing:
    return engine.generate(prompts, new_tokens)


if __name__ == "__main__":
    serve(load, generate)
