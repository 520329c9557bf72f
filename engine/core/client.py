"""The front end's side of the engine process: starts it, feeds it, watches it, replaces it. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from engine import messages
from engine.errors import EngineDeadError, RequestError
from engine.ledger import Ledger, ended, joined
from engine.messages import EngineInfo, EngineOptions, EngineStats, Output, Request

MAX_FAILURES = 3  # starts in a row that did not become ready, after which the engine is given up
# A step that takes longer than both hangs, and so does a process that says nothing for so long. A little less than what
# is promised, five seconds and ten times the forecast: /health has to have turned by then.
STEP_SECONDS = 4.5
STEP_FORECASTS = 9.0
PREPARING_SECONDS = 600.0  # for compiling kernels and capturing graphs
COUNTERS = (
    "prefix_queries", "prefix_hits", "preemptions", "prompt_tokens", "generation_tokens", "scheduled_tokens", "steps",
)  # fmt: skip

log = logging.getLogger("fen.engine")
OnLoading = Callable[[str, float], None]


class _Process:
    """One engine process and its two sockets, in a private directory: nothing of it survives into the next one."""

    def __init__(self, command: Sequence[str], options: EngineOptions, environment: Mapping[str, str]):
        self.command, self.options, self.environment = command, options, environment
        temporary = tempfile.gettempdir()
        if len(temporary) > 60:  # the path of a socket is limited to 107 bytes, 103 on macOS
            temporary = "/tmp"
        self.directory = tempfile.mkdtemp(prefix="fen-", dir=temporary)
        self.context = zmq.asyncio.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.outbox = zmq.Context(self.context).socket(zmq.PUSH)  # sending never waits, so it need not be awaited
        self.inbox.set_hwm(0)
        self.outbox.set_hwm(0)
        self.inbox.bind(f"ipc://{self.directory}/from_engine")
        self.outbox.connect(f"ipc://{self.directory}/to_engine")  # who connects may send before the other side is there
        self.child: asyncio.subprocess.Process | None = None
        self.heard = time.monotonic()  # when the last message came
        self.step_seconds = 0.0  # as of then
        self.limit = STEP_SECONDS  # of the step under way, or of silence
        self.ready = False
        self.failure: str | None = None  # its own last words, or why it was killed

    async def spawn(self) -> None:
        Path(self.directory, "options").write_bytes(messages.encode(self.options))
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the child imports what this process would
        self.child = await asyncio.create_subprocess_exec(
            *self.command,
            self.directory,
            stdin=asyncio.subprocess.PIPE,  # held open, never written: tells the child that this process lives
            stdout=2,  # standard output belongs to the front end
            env={**os.environ, "PYTHONPATH": path, **self.environment},
            start_new_session=True,  # Ctrl-C in the terminal does not reach it
        )

    def send(self, message: messages.ToEngine) -> None:
        with contextlib.suppress(zmq.ZMQError):  # closed: the process ended, the supervisor fails its requests
            self.outbox.send(messages.encode(message), zmq.NOBLOCK)

    def hangs(self) -> bool:
        """Whether the step under way has been running, or the process has been silent, for too long."""
        return self.step_seconds + time.monotonic() - self.heard > self.limit

    def kill(self, why: str) -> None:
        if self.child is not None and self.child.returncode is None:
            self.failure = self.failure or why
            self.child.kill()

    async def close(self) -> None:
        try:
            self.outbox.close(linger=0)
            self.context.destroy(linger=0)
            if self.child is not None:
                self.kill("the engine was stopped")
                await self.child.wait()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def last_words(self) -> str:
        if self.failure:
            return self.failure
        code = self.child.returncode if self.child is not None else None
        if code is not None and code < 0:
            hint = " (did the system run out of memory? a smaller KV pool may help)" if code == -signal.SIGKILL else ""
            return f"the engine process was killed by {signal.Signals(-code).name}{hint}"
        return f"the engine process ended with exit code {code}"


class EngineClient:
    """An engine in a process of its own, for asyncio. `info` is set once it is ready, `stats` is at most a second old.

    state: "loading" | "ready" | "restarting" | "draining" | "dead"; `reason` says why it is not "ready".
    step_limit: seconds after which a step, or a process that says nothing, counts as hung, and the process is replaced;
    more where the step's own forecast says so.
    environment: variables that the engine process gets on top of this one's.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        environment: Mapping[str, str] | None = None,
        step_limit: float = STEP_SECONDS,
        grace: float = 5.0,
        command: Sequence[str] = (sys.executable, "-P", "-m", "engine.core.process"),
    ):
        self.options = options
        self.info: EngineInfo | None = None
        self.state = "loading"
        self.reason = "the engine is starting"
        self.restarts = 0
        self.activity = "loading"  # the state of the engine's last heartbeat
        self._environment = dict(environment or {})
        self._command = command
        self._step_limit = step_limit
        self._grace = grace
        self._process: _Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._on_loading: OnLoading | None = None
        self._queues: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._stats = EngineStats()
        self._past = EngineStats(ledger=Ledger(time.monotonic()).snapshot())  # totals of the processes that ended

    async def start(self, on_loading: OnLoading | None = None) -> EngineInfo:
        """Returns when the engine is ready; `on_loading(stage, fraction)` follows it. Raises EngineDeadError."""
        assert self._supervisor is None, "started twice"
        self._on_loading = on_loading
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        either: set[asyncio.Future[Any]] = {self._started, self._supervisor}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._started.done():  # stop() was called meanwhile
            raise EngineDeadError(self.reason)
        return self._started.result()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        """The request's outputs; the last one has a finish_reason. Leaving early cancels the request in the engine.

        An id serves one request only: outputs of a cancelled one may still be on their way when its iterator is left.
        Raises RequestError when the engine refuses the request, EngineDeadError when it is not ready or ends meanwhile.
        """
        if self.state != "ready" or self._process is None:
            raise EngineDeadError(self.reason)
        if request.id in self._queues:
            raise RequestError(f"a request with the id {request.id!r} is in flight already", param="request_id")
        queue: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._queues[request.id] = queue
        process = self._process
        process.send(messages.Add(request))
        try:
            while True:
                output = await queue.get()
                if isinstance(output, Exception):
                    raise output
                if output.finish_reason is not None:
                    self._queues.pop(request.id, None)  # before the yield: the consumer may never come back
                    yield output
                    return
                yield output
        finally:
            if self._queues.get(request.id) is queue:
                del self._queues[request.id]
                process.send(messages.Cancel([request.id]))

    async def cancel(self, id: str) -> None:
        """Ends a request in flight: its generate() yields a last output with finish_reason "abort"."""
        queue = self._queues.pop(id, None)
        if queue is not None and self._process is not None:
            self._process.send(messages.Cancel([id]))
            queue.put_nowait(Output(id=id, finish_reason="abort"))

    def finish(self, id: str, tokens: int, device_seconds: dict[str, float]) -> None:
        """Ends a request at a stop string: it has finished (messages.Finish). Its generate() yields nothing more."""
        if self._queues.pop(id, None) is not None and self._process is not None:
            self._process.send(messages.Finish(id, tokens, device_seconds))

    @property
    def in_flight(self) -> int:
        return len(self._queues)

    @property
    def stats(self) -> EngineStats:
        """The latest snapshot. Totals include the processes that ended, so they never fall."""
        return _add_totals(self._stats, self._past)

    def health(self) -> tuple[bool, str]:
        """(can serve now, why not)"""
        if self.state != "ready" or self._process is None:
            return False, self.reason
        if self._process.hangs():
            return False, f"the engine has made no progress for {self._process.limit:.3g} s; it is being replaced"
        return True, ""

    async def drain(self, timeout: float) -> bool:
        """Takes no more requests and waits for those in flight; False if some are left after `timeout` seconds."""
        self.state, self.reason = "draining", "the server is shutting down"
        deadline = time.monotonic() + timeout
        while self._queues and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return not self._queues

    async def stop(self) -> None:
        """Ends the engine process; requests in flight get EngineDeadError."""
        was_ready = self._process is not None and self._process.ready
        self.state, self.reason = "draining", "the server is shutting down"
        self._fail_requests(self.reason)
        if self._supervisor is not None:
            if was_ready and self._process is not None:
                self._process.send(messages.Shutdown())
                await asyncio.wait({self._supervisor}, timeout=self._grace)
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self.state = "dead"

    # Supervision.

    async def _supervise(self) -> None:
        assert self._started is not None
        failures = 0
        while True:
            reason, ready = await self._life()
            kind = "startup" if self._stats.ledger is None else "aborted" if self._queues else "idle"
            self._fail_requests(f"{reason}; the request was not finished")
            self._past = _add_totals(self._stats, self._past)
            self._past.ledger = ended(self._past.ledger, time.monotonic(), kind)
            self._stats = EngineStats()
            if self.state == "draining":
                return
            failures = 1 if ready else failures + 1
            if not self._started.done():
                self.state, self.reason = "dead", reason
                self._started.set_exception(EngineDeadError(reason))
                return
            if failures == MAX_FAILURES:
                self.state = "dead"
                self.reason = f"{reason}; it failed {failures} times in a row and is not restarted again"
                return
            self.state, self.reason = "restarting", f"{reason}; it is being restarted"
            self.restarts += 1
            log.warning("%s", self.reason)
            await asyncio.sleep(0.5 * 2 ** (failures - 1))

    async def _life(self) -> tuple[str, bool]:
        """One process from start to end: why it ended, and whether it was ever ready."""
        process: _Process | None = None
        try:
            process = _Process(self._command, self.options, self._environment)
            await self._watch(process)
        except OSError as error:
            return f"the engine process cannot be started: {error}", False
        finally:
            self._process = None
            if process is not None:
                await process.close()
        return process.last_words(), process.ready

    async def _watch(self, process: _Process) -> None:
        """Serves one process from start to end."""
        await process.spawn()
        assert process.child is not None
        self._process = process
        exited = asyncio.create_task(process.child.wait())
        receiver = asyncio.create_task(self._receive(process))
        try:
            while not exited.done():
                asleep = time.monotonic()
                await asyncio.wait({exited, receiver}, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                if time.monotonic() - asleep > 2.0:  # it is this process that was stopped or starved
                    process.heard = time.monotonic()
                if receiver.done() and not exited.done():
                    process.kill(f"a message of the engine process cannot be read ({receiver.exception()})")
                elif process.ready and process.hangs():
                    process.kill(f"the engine made no progress for {process.limit:.3g} s and was ended")
                    await exited
            await asyncio.wait({receiver}, timeout=0.2)  # what it sent before it ended
        finally:
            exited.cancel()
            receiver.cancel()

    async def _receive(self, process: _Process) -> None:
        while True:
            message: messages.FromEngine = messages.decode_from_engine(await process.inbox.recv())
            process.heard = time.monotonic()
            process.step_seconds = 0.0
            match message:
                case messages.Outputs(outputs, stats):
                    self._stats = stats
                    for output in outputs:
                        self._deliver(output.id, output)
                case messages.Heartbeat(state=state, step_seconds=seconds, forecast=forecast, stats=stats):
                    process.step_seconds, self.activity = seconds, state
                    process.limit = max(self._step_limit, STEP_FORECASTS * forecast)
                    if state in ("compiling", "capturing"):
                        process.limit = PREPARING_SECONDS
                    if state != "loading" and _age(stats) >= _age(self._stats):  # else an Outputs has overtaken it
                        self._stats = stats
                case messages.Refused(id, text, param, code):
                    self._deliver(id, RequestError(text, param=param, code=code))
                case messages.Loading(stage, fraction):
                    self._loading(stage, fraction)
                case messages.Ready(info):
                    process.ready, process.limit = True, self._step_limit
                    self.info = info
                    if self.state != "draining":
                        self.state, self.reason = "ready", ""
                    if self._started is not None and not self._started.done():
                        self._started.set_result(info)
                case messages.Failed(text):
                    process.failure = text

    def _loading(self, stage: str, fraction: float) -> None:
        if self.state == "loading":
            self.reason = f"the engine is loading ({stage}, {fraction:.0%})"
            if self._on_loading is not None:
                self._on_loading(stage, fraction)

    def _deliver(self, id: str, item: Output | Exception) -> None:
        queue = self._queues.get(id)
        if queue is not None:  # else: cancelled while its last output was on the way
            queue.put_nowait(item)

    def _fail_requests(self, sentence: str) -> None:
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.put_nowait(EngineDeadError(sentence))


def _add_totals(stats: EngineStats, past: EngineStats) -> EngineStats:
    totals = {name: getattr(stats, name) + getattr(past, name) for name in COUNTERS}
    step_sizes = [sum(pair) for pair in zip(stats.step_sizes, past.step_sizes, strict=True)]
    return msgspec.structs.replace(stats, ledger=joined(past.ledger, stats.ledger), step_sizes=step_sizes, **totals)


def _age(stats: EngineStats) -> tuple[int, float]:
    return stats.steps, stats.ledger.end if stats.ledger is not None else 0.0
