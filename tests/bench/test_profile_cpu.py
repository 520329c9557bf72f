"""The profile accounts for the whole time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.local_engine import LocalEngine
from bench.profile_cpu import operations
from engine.messages import EngineOptions


def test_shares_add_up(random_checkpoint: Callable[..., Path]) -> None:
    options = EngineOptions(model=str(random_checkpoint()), dtype="float32", threads=1, kv_cache_tokens=256)
    seconds, rows = operations(LocalEngine(options), [[5, 6, 7, 8]], 6)
    assert seconds > 0
    names = {name for name, _, _ in rows}
    assert "outside" in names and any(name.startswith("aten::") for name in names)
    assert sum(share for _, _, share in rows) == pytest.approx(1.0, abs=1e-6)
    assert [share for _, _, share in rows] == sorted((share for _, _, share in rows), reverse=True)
