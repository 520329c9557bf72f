"""The log: one line for each request and each event, as key=value or as JSON, that never holds a request up.

Lines are handed to a thread that writes them. When nothing more can be written (a full disk, a pipe nobody reads),
lines are dropped and counted, serving goes on, and so does the log once there is room.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import threading
import time
from typing import Any

from starlette.types import Scope

from engine.errors import FenError

log = logging.getLogger("fen.server")

STANDARD_ERROR = 2
MAX_WAITING = 10_000  # lines
# Asked for again and again by machines: in the log only when they fail.
QUIET = frozenset({"/health", "/ready", "/metrics", "/load", "/v1/live"})
KEY = "fen.key"  # in a request's scope: the place of the caller's key, counted from 1
REPLY = "fen.reply"  # and what a generated reply was made of, as server.recent has it
BARE = re.compile(r"[A-Za-z0-9_.:/@%+-]+")
CLOSE_SECONDS = 2.0


def log_request(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One line for a request that was answered."""
    route = getattr(scope.get("route"), "path", None)
    if route in QUIET and status < 400:
        return
    fields: dict[str, Any] = {
        "id": request_id,
        "client": scope["client"][0] if scope.get("client") else None,
        "key": scope.get(KEY),
        "method": scope["method"],
        "route": route or scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 6),
    }
    for name, value in scope.get(REPLY, {}).items():
        fields.setdefault("reply" if name == "id" else "usd" if name == "cost" else name, value)
    log.log(logging.WARNING if status >= 500 else logging.INFO, "request", extra={"fields": fields})


def printable(text: str) -> str:
    """`text` with every character that could break a line or steer a terminal written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormat(logging.Formatter):
    """`2026-11-23T06:40:46.123Z INFO request id=… status=200`; a traceback follows in lines that begin with `  | `."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_time(record), record.levelname, printable(record.getMessage())]
        for name, value in getattr(record, "fields", {}).items():
            if value is not None:
                shown = value if isinstance(value, str) else json.dumps(value)
                parts.append(f"{name}={shown if BARE.fullmatch(shown) else json.dumps(shown)}")
        lines = [" ".join(parts)]
        if record.exc_info:
            lines += ["  | " + printable(line) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class JsonFormat(logging.Formatter):
    """One object a line, in ASCII: time, level, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"


class LogWriter(logging.Handler):
    """Writes to the file `path`, or to standard error. `lost` counts the lines that could not be written."""

    def __init__(self, path: str | None, format: str):
        super().__init__()
        self.path = None if path is None else os.path.expanduser(path)
        try:
            self._fd = STANDARD_ERROR if self.path is None else self._open()
        except OSError as error:
            raise FenError(f"--log-file {path} cannot be written: {error.strerror}") from None
        self.setFormatter(JsonFormat() if format == "json" else TextFormat())
        self.lost = 0
        self._torn = False  # the last line was written in part
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait((self.format(record) + "\n").encode("utf-8", "backslashreplace"))
        except queue.Full:
            self.lost += 1
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Writes what is left, for at most CLOSE_SECONDS."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._reopen()
                self._write((b"\n" if self._torn else b"") + line)
            except OSError:
                self.lost += 1

    def _write(self, data: bytes) -> None:
        while data:
            written = os.write(self._fd, data)
            self._torn = data[written - 1 : written] != b"\n"
            data = data[written:]

    def _open(self) -> int:
        assert self.path is not None
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _reopen(self) -> None:
        """After somebody moved the file away (logrotate does), begin a new one."""
        if self.path is None:
            return
        try:
            there, here = os.stat(self.path), os.fstat(self._fd)
            if (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
                return
        except FileNotFoundError:
            pass
        fd = self._open()
        os.close(self._fd)
        self._fd, self._torn = fd, False


@contextlib.contextmanager
def logging_to(path: str | None, format: str) -> Any:
    """Send this process's log there meanwhile: our own from INFO on, that of libraries from WARNING on. -> LogWriter"""
    writer = LogWriter(path, format)
    root, ours = logging.getLogger(), logging.getLogger("fen")
    before = root.level, ours.level
    root.addHandler(writer)
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    try:
        yield writer
    finally:
        root.removeHandler(writer)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        writer.close()
