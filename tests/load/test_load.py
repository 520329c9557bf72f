"""A server under more load than it can take, at full size (`make test-load`; some minutes). What is right or wrong
about it; how fast it is, `fen bench load` measures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from bench.load import scenarios
from bench.load.server import Server, running

SEQS, QUEUE = 16, 64
GROWTH = {"front end": 16 * scenarios.MIB, "engine": 32 * scenarios.MIB}  # from one thousand connections to the next
SLOPE = scenarios.FLAT * scenarios.MIB  # a minute


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    arguments = ["--kv-cache-tokens", "8192", "--max-model-len", "1024"]
    with running([*arguments, "--max-num-seqs", str(SEQS), "--max-queue", str(QUEUE)]) as server:
        yield server


@pytest.fixture(scope="module")
def roomy() -> Iterator[Server]:
    """With a queue for everybody."""
    with running(["--kv-cache-tokens", "8192", "--max-model-len", "1024"]) as server:
        yield server


def test_a_thousand_connections(server: Server) -> None:
    """As many as fit are served, whole; all others are turned away with 429, and none of it stays in memory."""

    async def run() -> None:
        memory = []
        await server.calm()  # what it makes when it is first idle, it has
        for _ in range(3):
            seen = await scenarios.burst(server)
            assert set(seen.statuses) == {200, 429}, seen.statuses
            assert seen.admitted_first >= SEQS + QUEUE
            for answer in seen.answers:
                if answer.status == 200:
                    assert answer.json()["usage"]["completion_tokens"] == 16
                else:
                    assert answer.json()["error"]["type"] == "rate_limit_error"
            load = await server.wait_idle()
            assert load["kv_blocks_used"] == load["server_load"] == 0, load
            memory.append(server.memory())
        for process, growth in GROWTH.items():
            assert memory[2][process] - memory[1][process] < growth, memory

    asyncio.run(run())


def test_200_cancelled_long_requests(roomy: Server) -> None:
    async def run() -> None:
        answer = await scenarios.cancelled(roomy)
        assert answer.status == 200 and answer.json()["choices"][0]["text"].startswith(" Paris.")
        load = await roomy.wait_idle(5)
        assert load["kv_blocks_used"] == load["server_load"] == load["waiting"] == 0, load

    asyncio.run(run())


def test_two_minutes_of_everything(server: Server) -> None:
    async def run() -> None:
        seen = await scenarios.soak(server)
        assert not [status for status in seen.statuses if status >= 500], seen.statuses
        assert seen.statuses[200] > 100 and seen.statuses[400] > 50, seen.statuses
        assert not any(seen.after[name] for name in ("server_load", "running", "waiting", "kv_blocks_used")), seen.after
        assert seen.answer.json()["choices"][0]["text"].startswith(" Paris.")
        samples = [memory for _, memory in seen.memory]
        for process in ("front end", "engine"):
            assert seen.slope(process) < SLOPE, samples[::10]

    asyncio.run(run())
