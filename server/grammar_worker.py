"""Compiles grammars under limits that hold: `python -m server.grammar_worker MODEL LOAD_FORMAT`.

llguidance's own limits do not: a line of its grammar can take minutes and gigabytes. So this process loads the
tokenizer once and forks for each grammar a child that the kernel ends after SECONDS or beyond BYTES. Frames on standard
input and output: four bytes of length, then msgpack, [number, kind, text] -> [number, grammar or null, what is wrong].
Its end of input ends it. Imports no torch and starts no thread.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import struct
import sys

import msgspec

from engine.checkpoint import open_checkpoint
from engine.cores import session_steps_back
from engine.errors import FenError
from engine.grammar import Grammars
from server.structured import grammar_of

SECONDS = 2.0  # of a processor
WALL_SECONDS = 10.0  # more, since it runs only where nobody else wants a core
BYTES = 512 << 20  # beyond what the process has already
CHILDREN = 4
LOADING_NICE = 5  # while it loads: slows the engine by less than an equal would, and is there after a few seconds
TOO_HARD = f"it takes more than {SECONDS:g} s or {BYTES >> 20} MiB to compile; simplify it"

Reply = tuple[str | None, str]


def compile_one(grammars: Grammars, kind: str, text: str) -> Reply:
    """(the grammar, "") or (None, what is wrong with it)."""
    try:
        grammar = grammar_of(kind, text)
        grammars.guide(grammar)
    except (FenError, ValueError) as error:
        return None, " ".join(str(error).split())[:400]
    return grammar, ""


def child(grammars: Grammars, kind: str, text: str, pipe: int) -> None:
    """Never returns. An alarm's default action ends the process, whatever code is running."""
    with contextlib.suppress(BaseException):
        for timer, alarm, seconds in (
            (signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
            (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS),
        ):
            signal.signal(alarm, signal.SIG_DFL)
            signal.setitimer(timer, seconds)
        with open("/proc/self/statm") as statm:
            size = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic prints
        reply = msgspec.msgpack.encode(compile_one(grammars, kind, text))
        with open(pipe, "wb") as file:
            file.write(reply)
    os._exit(0)


def serve(grammars: Grammars) -> None:
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, int, bytearray]] = {}  # by pipe: the request's number, the child, what it said
    queue: list[tuple[int, str, str]] = []
    buffer = bytearray()
    while True:
        for key, _ in selector.select():
            pipe = key.fd
            data = os.read(pipe, 1 << 16)
            if pipe == 0:
                if not data:
                    return
                buffer += data
                while len(buffer) >= 4 and len(buffer) >= 4 + (length := struct.unpack_from("<I", buffer)[0]):
                    queue.append(msgspec.msgpack.decode(buffer[4 : 4 + length], type=tuple[int, str, str]))
                    del buffer[: 4 + length]
            elif data:
                running[pipe][2].extend(data)
            else:
                selector.unregister(pipe)
                os.close(pipe)
                number, process, said = running.pop(pipe)
                os.waitpid(process, 0)
                grammar, problem = msgspec.msgpack.decode(said) if said else (None, TOO_HARD)
                answer = msgspec.msgpack.encode([number, grammar, problem])
                sys.stdout.buffer.write(struct.pack("<I", len(answer)) + answer)
                sys.stdout.buffer.flush()
        while queue and len(running) < CHILDREN:
            number, kind, text = queue.pop(0)
            ours, theirs = os.pipe()
            process = os.fork()
            if process == 0:
                child(grammars, kind, text, theirs)
            os.close(theirs)
            selector.register(ours, selectors.EVENT_READ)
            running[ours] = number, process, bytearray()


def main() -> None:
    session_steps_back(LOADING_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    checkpoint = open_checkpoint(sys.argv[1], sys.argv[2])
    config = checkpoint.config
    grammars = Grammars(checkpoint.tokenizer, config.vocab_size, config.eos_token_ids)
    grammars.vocabulary  # noqa: B018 (made once, for all children)
    session_steps_back()
    serve(grammars)


if __name__ == "__main__":
    main()
