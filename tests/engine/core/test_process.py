"""The engine process and its supervision: faults with a fake core, then the real engine."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.core.client import EngineClient
from engine.core.process import Status, serve
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineOptions, EngineStats, Output, Request, SamplingParams, Shutdown, encode

FAKE = (sys.executable, "-P", str(Path(__file__).with_name("fake_engine.py")))
ENDLESS, DIE, HANG, REFUSE, NORMAL = 1, 2, 3, 4, 5


def request(id: str, order: int, max_tokens: int = 3) -> Request:
    return Request(id=id, prompt=[order], params=SamplingParams(max_tokens=max_tokens))


def test_a_step_s_time_begins_when_what_is_done_once_is_done() -> None:
    """Compiling may take a minute; the rest of that step is not that minute late."""
    status, core = Status(), SimpleNamespace(preparing="compiling", forecast=0.1)
    status.core = core  # type: ignore[assignment]
    status.step_started = time.monotonic() - 60
    assert status.heartbeat().state == "compiling" and status.heartbeat().step_seconds > 59
    core.preparing = ""
    beat = status.heartbeat()
    assert beat.state == "busy" and beat.step_seconds < 5
    status.step_started = time.monotonic() - 7
    status.prepared -= 60  # that was long ago: a step that hangs is seen
    assert status.heartbeat().step_seconds > 6


def test_after_a_while_without_work_the_core_is_told() -> None:
    told: list[str] = []
    core = SimpleNamespace(has_work=False, idle=lambda: told.append("idle"), stats=EngineStats)
    polls = iter([0, 1, 1, 0])  # nothing came; then something did
    inbox = SimpleNamespace(poll=lambda _: next(polls), recv=lambda: encode(Shutdown()))
    serve(core, inbox, SimpleNamespace(), Status())  # type: ignore[arg-type]
    assert told == ["idle"]


def with_client(test: Callable[[EngineClient], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        client = EngineClient(EngineOptions(), command=FAKE, **options)  # type: ignore[arg-type]
        try:
            await client.start()
            await test(client)
        finally:
            await client.stop()

    asyncio.run(run())


async def tokens_of(client: EngineClient, request: Request) -> list[int]:
    return [token async for output in client.generate(request) for token in output.tokens]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


def pid_of(client: EngineClient) -> int:
    assert client._process is not None and client._process.child is not None
    return client._process.child.pid


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def idle_share(pid: int, seconds: float = 2.0) -> float:
    before, started = cpu_seconds(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (cpu_seconds(pid) - before) / (time.monotonic() - started)


def test_serves_many_at_once() -> None:
    async def test(client: EngineClient) -> None:
        assert client.state == "ready" and client.health() == (True, "")
        assert client.info is not None and client.info.model == "fake"
        replies = await asyncio.gather(*(tokens_of(client, request(f"r{i}", NORMAL, 1 + i % 7)) for i in range(40)))
        assert replies == [list(range(100, 101 + i % 7)) for i in range(40)]
        await until(lambda: client.stats.running == 0)
        assert client.stats.generation_tokens == sum(1 + i % 7 for i in range(40))
        assert client.in_flight == 0

    with_client(test)


def test_leaving_the_iterator_cancels() -> None:
    async def test(client: EngineClient) -> None:
        async with aclosing(client.generate(request("left", ENDLESS))) as outputs:
            async for _ in outputs:
                break
        await until(lambda: client.stats.running == 0)
        steps = client.stats.steps
        task = asyncio.create_task(tokens_of(client, request("cancelled", ENDLESS)))
        await until(lambda: client.stats.steps > steps)
        task.cancel()
        await until(lambda: client.stats.running == 0)
        assert client.in_flight == 0

    with_client(test)


def test_cancel_by_id_ends_the_stream() -> None:
    async def test(client: EngineClient) -> None:
        outputs: list[Output] = []
        async for output in client.generate(request("a", ENDLESS)):
            outputs.append(output)
            if len(outputs) == 2:
                await client.cancel("a")
        assert outputs[-1].finish_reason == "abort"
        await until(lambda: client.stats.running == 0)
        await client.cancel("never heard of")

    with_client(test)


def test_refused_request_and_id_in_use() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(RequestError, match="the prompt is too long") as refusal:
            await tokens_of(client, request("a", REFUSE))
        assert (refusal.value.param, refusal.value.code) == ("prompt", "context_length_exceeded")
        stream = client.generate(request("b", ENDLESS))
        await anext(stream)
        with pytest.raises(RequestError, match="in flight already"):
            await tokens_of(client, request("b", NORMAL))
        await anext(stream)  # the first one is not disturbed
        await stream.aclose()
        assert await tokens_of(client, request("c", NORMAL)) == [100, 101, 102]

    with_client(test)


def test_killed_process_fails_requests_and_is_replaced() -> None:
    async def test(client: EngineClient) -> None:
        await tokens_of(client, request("before", NORMAL))
        await until(lambda: client.stats.generation_tokens == 3)
        task = asyncio.create_task(tokens_of(client, request("in flight", ENDLESS)))
        await until(lambda: client.stats.running == 1)
        total = client.stats.generation_tokens
        pid = pid_of(client)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match=r"killed by SIGKILL.*the request was not finished"):
            await task
        assert client.state == "restarting"
        healthy, why = client.health()
        assert not healthy and "it is being restarted" in why
        with pytest.raises(EngineDeadError, match="being restarted"):
            await tokens_of(client, request("too early", NORMAL))
        await until(lambda: client.state == "ready")
        assert pid_of(client) != pid and not alive(pid) and client.restarts == 1
        assert await tokens_of(client, request("after", NORMAL)) == [100, 101, 102]
        await until(lambda: client.stats.running == 0)
        assert client.stats.generation_tokens >= total + 3  # totals do not start again

    with_client(test)


def test_an_exception_in_the_loop_is_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(EngineDeadError, match=r"internal error \(ValueError: two\)"):
            await tokens_of(client, request("a", DIE))
        await until(lambda: client.state == "ready")
        assert await tokens_of(client, request("b", NORMAL)) == [100, 101, 102]

    with_client(test)
    assert "Traceback" in capfd.readouterr().err  # in the log, for us


def test_a_step_that_hangs_is_ended() -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(EngineDeadError, match=r"no progress for 1\.5 s"):
            await tokens_of(client, request("a", HANG))
        await until(lambda: client.state == "ready")
        assert await tokens_of(client, request("b", NORMAL)) == [100, 101, 102]

    with_client(test, step_limit=1.5)


def test_gives_up_after_three_failures_in_a_row() -> None:
    async def test(client: EngineClient) -> None:
        client._environment["FEN_FAKE"] = "crash"  # for the processes to come
        os.kill(pid_of(client), signal.SIGKILL)
        await until(lambda: client.state == "dead")
        assert client.restarts == 2
        assert "failed 3 times in a row" in client.health()[1]
        with pytest.raises(EngineDeadError, match="not restarted again"):
            await tokens_of(client, request("a", NORMAL))

    with_client(test)


def test_a_load_that_fails_says_why() -> None:
    async def run() -> None:
        for fault, sentence in [("fail", "the file is not a checkpoint"), ("crash", "killed by SIGKILL")]:
            client = EngineClient(EngineOptions(), command=FAKE, environment={"FEN_FAKE": fault})
            with pytest.raises(EngineDeadError, match=sentence):
                await client.start()
            assert client.state == "dead"
            await client.stop()
        client = EngineClient(EngineOptions(), command=("/nowhere/python",))
        with pytest.raises(EngineDeadError, match="cannot be started"):
            await client.start()
        await client.stop()

    asyncio.run(run())


def test_loading_is_reported_and_can_be_stopped() -> None:
    async def run() -> None:
        client = EngineClient(EngineOptions(), command=FAKE, environment={"FEN_FAKE": "slow"}, step_limit=0.5)
        stages: list[tuple[str, float]] = []
        await client.start(on_loading=lambda stage, fraction: stages.append((stage, fraction)))
        assert ("weights", 0.5) in stages  # and a load of 2 s is not a step that hangs
        await client.stop()

        client = EngineClient(EngineOptions(), command=FAKE, environment={"FEN_FAKE": "slow"})
        start = asyncio.create_task(client.start())
        await until(lambda: "weights, 50%" in client.health()[1])
        pid = pid_of(client)
        await client.stop()
        with pytest.raises(EngineDeadError):
            await start
        assert not alive(pid)

    asyncio.run(run())


def test_stop_and_drain() -> None:
    async def test(client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request("a", NORMAL, max_tokens=40)))
        await until(lambda: client.in_flight == 1)
        assert await client.drain(timeout=20)
        assert await task == list(range(100, 140))
        with pytest.raises(EngineDeadError, match="shutting down"):
            await tokens_of(client, request("b", NORMAL))
        pid, directory = pid_of(client), client._process.directory  # type: ignore[union-attr]
        await client.stop()
        assert client.state == "dead" and not alive(pid) and not os.path.exists(directory)

    with_client(test)

    async def in_flight(client: EngineClient) -> None:
        task = asyncio.create_task(tokens_of(client, request("a", ENDLESS)))
        await until(lambda: client.stats.running == 1)
        assert not await client.drain(timeout=0.1)
        await client.stop()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await task

    with_client(in_flight)


def test_idle_costs_no_cpu() -> None:
    async def test(client: EngineClient) -> None:
        await tokens_of(client, request("a", NORMAL))
        assert await idle_share(pid_of(client)) < 0.05

    with_client(test)


PARENT = """
import asyncio, sys
from engine.core.client import EngineClient
from engine.core.process import Status, serve
from engine.messages import EngineOptions
async def main():
    client = EngineClient(EngineOptions(), command={command!r})
    await client.start()
    print(client._process.child.pid, client._process.directory, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_ends_with_its_parent(how: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(command=FAKE)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        assert alive(int(pid))
        os.kill(int(pid), signal.SIGINT)  # Ctrl-C is not for the engine process
    finally:
        parent.send_signal(how)
        parent.wait()
    deadline = time.monotonic() + 20
    while alive(int(pid)) or os.path.exists(directory):
        assert time.monotonic() < deadline, "the engine process outlives its parent"
        time.sleep(0.01)


def test_the_front_end_imports_no_torch() -> None:
    check = "import sys, engine, engine.core.client, engine.chat, engine.detokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# The real engine.


def real(checkpoint: Path) -> EngineClient:
    options = EngineOptions(model=str(checkpoint), dtype="float32", kv_cache_tokens=1024, block_size=16, threads=2)
    return EngineClient(options)


def real_request(id: str, max_tokens: int = 12) -> Request:
    return Request(
        id=id, prompt=[5, 6, 7], params=SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    )


def test_real_engine_killed_cancelled_idle(random_checkpoint: Callable[..., Path]) -> None:
    async def run() -> None:
        client, born = real(random_checkpoint()), time.monotonic()
        stages = []
        try:
            info = await client.start(lambda stage, fraction: stages.append(stage))
            assert stages[0] == "libraries" and "weights" in stages and info.num_blocks == 64
            text = await tokens_of(client, real_request("first"))
            assert len(text) == 12

            # A request that is left frees its blocks.
            async with aclosing(client.generate(real_request("left", 400))) as outputs:
                await anext(outputs)
            await until(lambda: client.stats.running == 0 and client.stats.blocks_used == 0)
            assert client.stats.generation_tokens < 400

            # OpenMP's threads and ours sleep when there is nothing to do.
            assert await idle_share(pid_of(client)) < 0.05

            # Killed with several in flight: each fails with a sentence, the next ones are answered as before.
            tasks = [asyncio.create_task(tokens_of(client, real_request(f"r{i}", 400))) for i in range(4)]
            await until(lambda: client.stats.running == 4)
            os.kill(pid_of(client), signal.SIGKILL)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineDeadError) and "killed by SIGKILL" in str(result)
            assert not client.health()[0]
            await until(lambda: client.state == "ready", seconds=60)
            assert await tokens_of(client, real_request("after")) == text

            # The ledger of both processes: every second since the client was made has a class.
            ledger = client.stats.ledger
            assert ledger is not None and ledger.start < born + 0.1 and time.monotonic() - ledger.end < 0.5
            assert abs(sum(ledger.seconds.values()) / (ledger.end - ledger.start) - 1) < 0.005
            assert ledger.tokens["decode"] == 24 and min(ledger.seconds[name] for name in ("prompt", "decode")) > 0
            assert ledger.seconds["aborted"] > 0 and ledger.seconds["startup"] > 2 * info.load_seconds
            assert ledger.seconds["idle"] > 2.0 and ledger.seconds["host"] > 0
        finally:
            await client.stop()

    asyncio.run(run())


def test_real_engine_refuses_and_fails_to_load(random_checkpoint: Callable[..., Path]) -> None:
    async def run() -> None:
        client = real(random_checkpoint())
        try:
            await client.start()
            long = Request(id="long", prompt=[5] * 600, params=SamplingParams())
            with pytest.raises(RequestError, match="600") as refusal:
                await tokens_of(client, long)
            assert refusal.value.code == "context_length_exceeded"
            assert len(await tokens_of(client, real_request("next"))) == 12
        finally:
            await client.stop()
        client = real(Path("/nowhere/model.gguf"))
        with pytest.raises(EngineDeadError, match="there is no model"):
            await client.start()
        await client.stop()

    asyncio.run(run())
