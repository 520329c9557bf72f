"""HTTP/1.1 for a load generator: asyncio streams with h11's framing, connections that are kept, and little work for
each chunk, because what the client spends is taken for the server's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Any

import h11

CONNECT_SECONDS = 10.0
CHUNK = 65536


class HttpError(Exception):
    """No answer, or one that is not 200; the text is one sentence. status: 0 when there was no answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Link:
    """One connection; one exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.protocol = h11.Connection(h11.CLIENT)
        self.used = False

    async def ask(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> h11.Response:
        """Sends, and waits for the head of the answer."""
        send = self.protocol.send
        parts = [send(h11.Request(method=method, target=target, headers=headers))]
        parts += [send(h11.Data(data=body)), send(h11.EndOfMessage())]
        self.writer.write(b"".join(part for part in parts if part))
        while not isinstance(event := await self._next(), h11.Response):
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("the server closed the connection")
        return event

    async def chunks(self) -> AsyncIterator[bytes]:
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionResetError("the server closed the connection before the end of its answer")
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    def reuse(self) -> bool:
        """Makes it ready for the next exchange, if both sides are through with this one and will go on."""
        if self.protocol.our_state is not h11.DONE or self.protocol.their_state is not h11.DONE:
            return False
        self.protocol.start_next_cycle()
        self.used = True
        return True

    def close(self) -> None:
        self.writer.transport.abort()

    async def _next(self) -> Any:
        while (event := self.protocol.next_event()) is h11.NEED_DATA:
            data = await self.reader.read(CHUNK)
            if not data and self.protocol.their_state is h11.SEND_RESPONSE:
                raise ConnectionResetError("the server closed the connection")
            self.protocol.receive_data(data)
        return event


class Client:
    """Of one server. `headers` go with every request; insecure: do not verify its certificate."""

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None, insecure: bool = False):
        """Raises ValueError for what is no address."""
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not an address such as http://127.0.0.1:8000")
        self.url = base_url.rstrip("/")
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = None
        if parts.scheme == "https":
            self._tls = ssl._create_unverified_context() if insecure else ssl.create_default_context()
        self._headers = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*"} | dict(headers or {})
        self._idle: list[Link] = []

    async def get(self, path: str) -> Any:
        """The JSON that a GET answers. Raises HttpError."""
        return await self._json("GET", path)

    async def post(self, path: str, body: Any) -> Any:
        """The JSON that a POST of JSON answers. Raises HttpError."""
        return await self._json("POST", path, json.dumps(body).encode())

    async def _json(self, method: str, path: str, body: bytes = b"") -> Any:
        async with self.open(method, path, body) as chunks:
            text = b"".join([chunk async for chunk in chunks])
        try:
            return json.loads(text)
        except ValueError:
            raise HttpError(0, f"the server at {self.url} answers {path} with what is no JSON") from None

    @contextlib.asynccontextmanager
    async def open(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of the answer's body as they come. Raises HttpError for a status other than 200."""
        headers = {**self._headers, "Content-Length": str(len(body))}
        if body:
            headers.setdefault("Content-Type", "application/json")
        link: Link | None = None
        try:
            link, response = await self._exchange(method, self._path + path, list(headers.items()), body)
            if response.status_code != 200:
                text = b"".join([chunk async for chunk in link.chunks()])
                raise HttpError(response.status_code, _reason(response.status_code, text))
            yield link.chunks()
        except (OSError, h11.RemoteProtocolError, TimeoutError) as error:
            raise HttpError(0, f"no answer from {self.url} ({_cause(error)})") from None
        finally:
            if link is not None:
                if link.reuse():
                    self._idle.append(link)
                else:
                    link.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _exchange(
        self, method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[Link, h11.Response]:
        while True:
            link = self._idle.pop() if self._idle else await self._connect()
            try:
                return link, await link.ask(method, target, headers, body)
            except (ConnectionError, h11.RemoteProtocolError):
                link.close()
                if not link.used:  # a kept connection may have been closed by the server meanwhile; a new one not
                    raise
            except BaseException:
                link.close()
                raise

    async def _connect(self) -> Link:
        async with asyncio.timeout(CONNECT_SECONDS):
            return Link(*await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=CHUNK))


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events; comments are left out."""
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n")
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event[5:].strip()
    if buffer.startswith(b"data:"):
        yield buffer[5:].strip()


def _reason(status: int, body: bytes) -> str:
    """The server's own words, where it has OpenAI's form of error."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        message = None
    return f"the server answers {status}" + (f": {str(message)[:300]}" if message else "")


def _cause(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return "timed out"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
