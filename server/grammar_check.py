"""The server's side of server.grammar_worker: a grammar is checked and compiled there before the engine sees it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import struct
import sys
from collections import OrderedDict

import msgspec

from engine.errors import RequestError
from server.errors import MAX_ECHO, ApiError
from server.structured import Structure

CACHED = 256
MAX_WAITING = 64
START_SECONDS = 30.0  # for the process to load its tokenizer, and for those in front in its queue

Answer = tuple[str | None, str]  # as server.grammar_worker.Reply


class GrammarCheck:
    """Starts the process when it is first needed, and anew when it ended. Runs on the event loop."""

    def __init__(self, model: str, load_format: str):
        self._command = (sys.executable, "-P", "-m", "server.grammar_worker", model, load_format)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}  # for this process
        self._known: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def grammar(self, structure: Structure) -> str:
        """For the engine. Raises RequestError naming the field when it cannot be followed or is too hard."""
        key = structure.kind, structure.text
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        try:
            async with asyncio.timeout(START_SECONDS):
                try:
                    grammar, problem = await self._ask(structure)
                except ConnectionError:  # it ended since the last time: once more with a new one
                    grammar, problem = await self._ask(structure)
        except (TimeoutError, ConnectionError):
            raise ApiError(503, "grammars cannot be compiled at the moment; try again", retry_after=2) from None
        if grammar is None:
            raise refusal(structure, problem)
        self._known[key] = grammar
        if len(self._known) > CACHED:
            self._known.popitem(last=False)
        return grammar

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _ask(self, structure: Structure) -> Answer:
        number = next(self._numbers)
        try:
            data = msgspec.msgpack.encode([number, structure.kind, structure.text])
        except UnicodeEncodeError:
            return None, "it has a surrogate code point (U+D800 to U+DFFF) outside a pair"
        process, waiting = await self._running()
        assert process.stdin is not None
        if len(waiting) >= MAX_WAITING:
            raise TimeoutError
        future = waiting[number] = asyncio.get_running_loop().create_future()
        try:
            process.stdin.write(struct.pack("<I", len(data)) + data)
            await process.stdin.drain()
            return await future
        finally:
            waiting.pop(number, None)

    async def _running(self) -> tuple[asyncio.subprocess.Process, dict[int, asyncio.Future[Answer]]]:
        async with self._lock:
            if self._process is None or self._process.returncode is not None:
                path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,
                )
                self._waiting = {}
                self._reader = asyncio.create_task(self._read(self._process, self._waiting))
            return self._process, self._waiting

    async def _read(self, process: asyncio.subprocess.Process, waiting: dict[int, asyncio.Future[Answer]]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                (length,) = struct.unpack("<I", await process.stdout.readexactly(4))
                number, grammar, problem = msgspec.msgpack.decode(await process.stdout.readexactly(length))
                if (future := waiting.get(number)) is not None and not future.done():
                    future.set_result((grammar, problem))
        await process.wait()
        for future in waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("ended"))


def refusal(structure: Structure, problem: str) -> RequestError:
    """What llguidance says, without what it quotes of a grammar that is ours; of tools, naming the one at fault."""
    param = structure.param
    text = re.split(r" \d+ \| ", problem, maxsplit=1)[0]
    place = re.match(r"at (\d+)\(\d+\): (?:failed to compile JSON schema: )?", text)
    if place is not None and structure.kind != "grammar":
        text = text[place.end() :]
        for tool in re.findall(r"^arguments_(\d+):", structure.text.split("\n")[int(place[1]) - 1]):
            param = f"tools[{tool}].function.parameters"
    if regex := re.search(r"regex parse error: .* error: (.*)", text):
        text = f"this is no regular expression: {regex[1]}"
    shown = text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…"
    return RequestError(f"{param}: {shown}", param, "invalid_grammar")
