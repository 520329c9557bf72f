"""Fen's engine. `from engine import LLM` for offline use; torch is imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.messages import SamplingParams

if TYPE_CHECKING:
    from engine.llm import LLM, Completion

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        import engine.llm

        return getattr(engine.llm, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
