"""The engine process: builds the engine, then loops over receive, step, send.

Started by engine.core.client as `python -m engine.core.process DIRECTORY`. DIRECTORY is private to the pair and holds
`options` (an EngineOptions) and two sockets: `to_engine` (ToEngine messages) and `from_engine` (FromEngine messages).
Standard input is a pipe that nobody writes to: its end means that the front end is gone, and this process ends too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from engine import cores, messages
from engine.core.stages import Stages
from engine.errors import FenError, RequestError, is_out_of_memory
from engine.messages import EngineInfo, EngineOptions, EngineStats, Output, Request, encode

HEARTBEAT_SECONDS = 1.0
IDLE_MILLISECONDS = 300  # without work, until it counts as idle: a pause between requests is often no longer
FLUSH_MILLISECONDS = 2000  # how long the last message may take to leave
NO_MEMORY = "there is not enough memory for this engine; choose a smaller model or a smaller --kv-cache-tokens"


class Core(Protocol):
    """What the loop needs of engine.core.loop.EngineCore."""

    @property
    def has_work(self) -> bool: ...
    @property
    def preparing(self) -> str: ...
    @property
    def forecast(self) -> float: ...
    def add(self, request: Request) -> object: ...
    def cancel(self, ids: list[str]) -> object: ...
    def finish(self, id: str, tokens: int, device_seconds: dict[str, float]) -> object: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...
    def idle(self) -> None: ...


Progress = Callable[[str, float], None]
Build = Callable[[EngineOptions, Progress], tuple[Core, EngineInfo]]


class Status:
    """Where the loop is. Written by the loop, read by the heartbeat thread; single attribute writes need no lock."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.core: Core | None = None  # until then it is loading
        self.step_started: float | None = None
        self.prepared = 0.0  # when it was last seen to prepare: a step's own time begins after that

    def heartbeat(self) -> messages.Heartbeat:
        started, core = self.step_started, self.core
        if core is None:
            return messages.Heartbeat(state="loading")
        if started is None:
            return messages.Heartbeat(state="idle", stats=self.stats)
        now, state = time.monotonic(), core.preparing or "busy"
        if state == "busy":
            started = max(started, self.prepared)
        else:
            self.prepared = now
        return messages.Heartbeat(state, now - started, core.forecast, self.stats)


def beat(directory: str, status: Status) -> None:
    """Heartbeats until the front end is gone, then ends the process. In a thread, so that a step that hangs is seen."""
    socket = zmq.Context().socket(zmq.PUSH)  # a socket belongs to one thread, and this context is never waited for
    socket.set_hwm(2)
    socket.connect(f"ipc://{directory}/from_engine")
    while True:
        front_end_gone, _, _ = select.select([sys.stdin.fileno()], [], [], HEARTBEAT_SECONDS)
        if front_end_gone:
            shutil.rmtree(directory, ignore_errors=True)
            os._exit(1)
        with contextlib.suppress(zmq.Again):  # the front end is not reading at the moment
            socket.send(encode(status.heartbeat()), zmq.NOBLOCK)


def serve(core: Core, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes], status: Status) -> None:
    """Runs until a Shutdown arrives. With nothing to do it sleeps in poll, and now and then is idle and tells so."""
    while True:
        if not core.has_work and not inbox.poll(IDLE_MILLISECONDS):
            core.idle()
            status.stats = core.stats()
            continue
        while inbox.poll(0):
            message = messages.decode_to_engine(inbox.recv())
            if isinstance(message, messages.Add):
                try:
                    core.add(message.request)
                except RequestError as error:
                    outbox.send(encode(messages.Refused(message.request.id, str(error), error.param, error.code)))
            elif isinstance(message, messages.Cancel):
                core.cancel(message.ids)
            elif isinstance(message, messages.Finish):
                core.finish(message.id, message.tokens, message.device_seconds)
            elif isinstance(message, messages.Shutdown):
                return
        status.step_started = time.monotonic()
        outputs = core.step() if core.has_work else []
        status.step_started = None
        status.stats = core.stats()
        if outputs or not core.has_work:
            outbox.send(encode(messages.Outputs(outputs, status.stats)))


def run(directory: str, build: Build) -> int:
    """The process from start to end; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front end, which drains first
    options = msgspec.msgpack.decode(Path(directory, "options").read_bytes(), type=EngineOptions)
    status = Status()
    threading.Thread(target=beat, args=(directory, status), daemon=True).start()
    context = zmq.Context()
    outbox, inbox = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    outbox.set_hwm(0)  # the loop never waits for the front end
    inbox.set_hwm(0)
    outbox.connect(f"ipc://{directory}/from_engine")
    inbox.bind(f"ipc://{directory}/to_engine")
    code = 0
    try:
        core, info = build(options, lambda stage, fraction: outbox.send(encode(messages.Loading(stage, fraction))))
        status.core = core
        outbox.send(encode(messages.Ready(info)))
        serve(core, inbox, outbox, status)
    except FenError as error:
        outbox.send(encode(messages.Failed(str(error))))
        code = 1
    except Exception as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        sentence = NO_MEMORY if is_out_of_memory(error) else f"the engine stopped on an internal error ({detail})"
        outbox.send(encode(messages.Failed(sentence)))
        with contextlib.suppress(OSError):  # a full disk
            traceback.print_exc()  # for the log; the user gets the sentence
        code = 1
    context.destroy(linger=FLUSH_MILLISECONDS)
    return code


def _build(options: EngineOptions, progress: Progress) -> tuple[Core, EngineInfo]:
    stages = Stages(progress)
    stages("libraries")
    if options.device != "cuda":
        cores.bind(options.threads or cores.default_threads())
    from engine.core.build import build_core  # imports torch: after the first heartbeat

    core, info, _ = build_core(options, stages)
    return core, info


if __name__ == "__main__":
    exit_code = run(sys.argv[1], _build)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(exit_code)  # no interpreter teardown: the heartbeat thread is still in its socket
