"""The CPU runner: how many rows it computes at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.build import build_core
from engine.core.runner import Runner
from engine.messages import EngineOptions, Request, SamplingParams


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_see_few_numbers_of_rows(random_checkpoint: Any, dtype: str) -> None:
    """Whatever comes, so that what oneDNN keeps for each of them is bounded (and small)."""
    model: Path = random_checkpoint(eos_token_id=None, max_position_embeddings=1024)
    options = EngineOptions(model=str(model), dtype=dtype, kv_cache_tokens=8192, enable_prefix_caching=False)
    core, _, _ = build_core(options)
    runner = core.runner
    assert isinstance(runner, Runner)
    seen: set[int] = set()

    def watched(linear: Any) -> Any:
        def multiply(x: torch.Tensor) -> torch.Tensor:
            seen.add(x.shape[0])
            return linear(x)  # type: ignore[no-any-return]

        return multiply

    decoder = runner.model
    layers = [dataclasses.replace(layer, qkv=watched(layer.qkv), down=watched(layer.down)) for layer in decoder.layers]
    runner.model = dataclasses.replace(decoder, layers=layers, head=watched(decoder.head))

    def run(lengths: list[int]) -> None:
        for i, length in enumerate(lengths):
            params = SamplingParams(max_tokens=2, temperature=0.0)
            core.add(Request(id=str(i), prompt=[5] * length, params=params))
        while core.has_work:
            for output in core.step():
                assert output.error is None, output.error

    for length in [*range(1, 100), *range(100, 530, 13), 512]:
        run([length])
    for count in (2, 7, 8, 9, 15, 31, 39):
        run([3 + i % 5 for i in range(count)])
    assert seen <= {*range(1, 9), *range(16, 65, 8), *range(80, 513, 16)}
    assert {1, 8, 16, 64, 80, 512} <= seen
