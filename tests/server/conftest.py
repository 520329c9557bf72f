"""A live server with SmolLM2, shared by all tests of this folder, and servers of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, settings


@pytest.fixture(scope="session")
def server(smollm2: Path) -> Iterator[LiveServer]:
    live = LiveServer(settings(str(smollm2)))
    yield live
    assert live.stop() == 0


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
