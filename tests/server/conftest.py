"""Live servers with SmolLM2: two that all tests of this folder share, and those of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import Tokenizer, open_checkpoint
from tests.server.live import LiveServer, settings


@pytest.fixture(scope="session")
def server(smollm2: Path) -> Iterator[LiveServer]:
    """As a user gets it."""
    live = LiveServer(settings(str(smollm2)))
    yield live
    assert live.stop() == 0


@pytest.fixture(scope="session")
def exact(smollm2: Path) -> Iterator[LiveServer]:
    """In float32, where texts can be compared whatever else is in the batch; slower."""
    live = LiveServer(settings(str(smollm2), {"dtype": "float32"}))
    yield live
    assert live.stop() == 0


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return open_checkpoint(str(smollm2)).tokenizer


@pytest.fixture
def launch(smollm2: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server of one's own: launch(engine={...}, **ServerSettings fields); see LiveServer for the others."""
    started: list[LiveServer] = []

    def start(engine: dict[str, Any] | None = None, wait: bool = True, prelude: str = "", **server: Any) -> LiveServer:
        started.append(LiveServer(settings(str(smollm2), engine, **server), wait, prelude))
        return started[-1]

    yield start
    for live in started:
        if live.process.poll() is None:
            live.process.kill()
            live.process.wait()
