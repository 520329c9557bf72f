"""Long texts are tokenised in a process of their own, which runs only while nobody else wants its core.

A thread of low priority in the server would not do: holding the interpreter and waiting for a core it would stop the
event loop. As a program this module is that child.
"""

from __future__ import annotations

import os
import sys
from array import array

import msgspec

from engine.checkpoint import open_checkpoint
from engine.checkpoint.tokenizer import Tokenizer
from engine.cores import session_steps_back
from engine.errors import FenError, RequestError
from server.child_process import ChildProcess, read, write
from server.errors import ApiError

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode


class LongTexts(ChildProcess):
    """Encodes as `tokenizer` does, which is that of the checkpoint `model`; blocks, for as long as it takes."""

    def __init__(self, tokenizer: Tokenizer, model: str, load_format: str):
        super().__init__("server.long_texts", (model, load_format), pack(tokenizer.marks), os.environ)

    def encode(self, text: str, add_special_tokens: bool, marked: bool = False) -> list[int]:
        """marked: as Tokenizer.encode_marked. RequestError as from the tokenizer, ApiError 503 without a child."""
        try:
            frame = pack([text, add_special_tokens, marked])
        except UnicodeEncodeError:
            raise RequestError("the text has a surrogate code point (U+D800 to U+DFFF) outside a pair") from None
        try:
            ids, problem = unpack(self.ask(frame))
        except (EOFError, OSError):
            raise ApiError(503, "long texts cannot be tokenised at the moment; try again", retry_after=2) from None
        if problem:
            raise RequestError(problem)
        return array("i", ids).tolist()


def _run() -> None:
    tokenizer = open_checkpoint(sys.argv[1], sys.argv[2]).tokenizer
    tokenizer.marks = unpack(read(sys.stdin.buffer) or b"")
    session_steps_back()
    write(sys.stdout.buffer, b"")
    while (frame := read(sys.stdin.buffer)) is not None:
        text, add_special_tokens, marked = unpack(frame)
        try:
            ids = (tokenizer.encode_marked if marked else tokenizer.encode)(text, add_special_tokens)
            answer = pack([array("i", ids).tobytes(), ""])
        except FenError as error:
            answer = pack([b"", str(error)])
        write(sys.stdout.buffer, answer)


if __name__ == "__main__":
    _run()
