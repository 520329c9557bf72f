"""One request over one bare socket, with the time of every piece of the answer. It does as little as it can: what the
client computes is taken from the server, which shares its cores."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Any

LIMIT = 1 << 20


@dataclasses.dataclass(slots=True)
class Answer:
    """started, pieces: time.monotonic() seconds of the connect and of each piece of the body. status: 0 if none came.
    left: the client hung up by itself."""

    started: float
    status: int = 0
    body: bytes = b""
    pieces: list[float] = dataclasses.field(default_factory=list)
    ended: float = 0.0
    left: bool = False

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces: in a stream, between tokens."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]

    def json(self) -> Any:
        return json.loads(self.body)


def request_bytes(method: str, path: str, body: bytes | None = None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + (body or b"")


async def ask(port: int, method: str, path: str, body: Any = None, leave_after: int | None = None) -> Answer:
    """Asks the server on `port` of this machine. body: JSON, or bytes as they are. leave_after: hang up when so many
    pieces of the body have come; 0: as soon as the request is sent."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    answer = Answer(time.monotonic())
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LIMIT)
        writer.write(request_bytes(method, path, data))
        await writer.drain()
        if leave_after == 0:
            answer.left = True
            return answer
        head = await reader.readuntil(b"\r\n\r\n")
        answer.status = int(head.split(b" ", 2)[1])
        parts = []
        while piece := await reader.read(LIMIT):
            parts.append(piece)
            answer.pieces.append(time.monotonic())
            if leave_after is not None and len(parts) >= leave_after:
                answer.left = True
                break
        answer.body = b"".join(parts)
    except (OSError, asyncio.IncompleteReadError):
        pass  # status 0, or a body that breaks off
    finally:
        answer.ended = time.monotonic()
        if writer is not None:
            writer.transport.abort()
    return answer


def completion(prompt: str, tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a completion of exactly so many tokens."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **fields}
