"""The log: a line for each request, no forged lines, and a disk that is full hurts nobody."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import FenError
from server.logs import JsonFormat, LogWriter, TextFormat, log_request
from tests.server.live import LiveServer
from tests.test_deploy import exported_by, named_in

FORGED = 'x\n2026-11-23T00:00:00.000Z INFO request status=200\r\x1b[2J\u2028\u202e"\\'


@pytest.fixture
def kept() -> Iterator[list[logging.LogRecord]]:
    """The records that reach the log meanwhile."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler, ours = Keep(), logging.getLogger("fen")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield records
    ours.removeHandler(handler)


def scope(path: str = "/v1/completions", **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "client": ("10.0.0.1", 9), **more}


def test_both_formats(kept: list[logging.LogRecord]) -> None:
    reply = {"id": "cmpl-1", "model": "m", "prompt_tokens": 5, "cached_tokens": 0, "cost": 1e-07, "seconds": 9.9}
    log_request(scope(**{"fen.reply": reply, "fen.key": 2}), "abc", 200, 0.25)
    text = TextFormat().format(kept[0])
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO request id=abc client=10\.0\.0\.1 key=2 ", text)
    assert text.endswith("status=200 seconds=0.25 reply=cmpl-1 model=m prompt_tokens=5 cached_tokens=0 usd=1e-07")
    entry = json.loads(JsonFormat().format(kept[0]))
    assert (
        entry["event"] == "request" and entry["level"] == "info" and entry["usd"] == 1e-07 and entry["seconds"] == 0.25
    )


def test_no_text_of_a_caller_makes_a_line(kept: list[logging.LogRecord]) -> None:
    log_request(scope(f"/{FORGED}" * 50, **{"fen.reply": {"model": FORGED}}), "id", 404, 0.1)
    logging.getLogger("fen.server").warning("odd: %s", FORGED)
    for record in kept:
        for format in (TextFormat(), JsonFormat()):
            line = format.format(record)
            assert line.isprintable() and len(line) < 1000, line
    assert json.loads(JsonFormat().format(kept[0]))["model"] == FORGED
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("fen.server").exception("failed")
    first, *rest = TextFormat().format(kept[-1]).split("\n")
    assert first.endswith("ERROR failed") and rest and all(line.startswith("  | ") for line in rest)
    assert all(line.isprintable() for line in rest)
    assert "ValueError" in json.loads(JsonFormat().format(kept[-1]))["exception"]


def test_probes_are_quiet_until_they_fail(kept: list[logging.LogRecord]) -> None:
    class Route:
        path = "/health"

    for status in (200, 503):
        log_request(scope(route=Route()), "id", status, 0.001)
    (record,) = kept
    assert record.levelno == logging.WARNING


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("fen", logging.INFO, "", 0, text, None, None)


def test_a_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    writer = LogWriter(str(file), "text")
    for name in ("one", "two"):
        writer.handle(record(name))
        while not file.exists() or not lines_of(file):
            time.sleep(0.01)
        file.rename(tmp_path / name)
    writer.handle(record("three"))
    writer.close()
    assert [lines_of(tmp_path / name)[0].split()[-1] for name in ("one", "two", "log")] == ["one", "two", "three"]


def test_a_full_disk_costs_lines_and_no_more(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: a line is torn, others are lost, and then there is room again."""
    code = """
import logging, resource, sys, time
from server.logs import LogWriter
writer = LogWriter(sys.argv[1], "text")
def write(text):
    writer.handle(logging.LogRecord("fen", logging.INFO, "", 0, text, None, None))
    time.sleep(0.2)
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
write("first")
limit(60)
for _ in range(3):
    write("x" * 100)
limit(resource.RLIM_INFINITY)
write("last")
writer.close()
print(writer.lost)
"""
    file = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n", done.stderr
    first, torn, last = lines_of(file)
    assert first.endswith("first") and last.endswith("INFO last") and 0 < len(torn) < 60


def test_a_pipe_that_nobody_reads_does_not_hold_up(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = LogWriter(str(pipe), "text")
    began = time.monotonic()
    for _ in range(12_000):
        writer.handle(record("x" * 100))
    assert writer.lost > 0 and time.monotonic() - began < 30
    os.close(reader)
    writer.close()


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FenError, match=r"--log-file .*none/log cannot be written: No such file"):
        LogWriter(str(tmp_path / "none" / "log"), "text")


def test_a_server_logs_requests(launch: Callable[..., LiveServer], tmp_path: Path) -> None:
    file = tmp_path / "fen.log"
    server = launch(log_file=str(file), log_format="json", price="3.6", served_model_name=["a", "b"])
    server.complete(max_tokens=3, ignore_eos=True, model="b")
    list(server.stream("/v1/chat/completions", messages=[{"role": "user", "content": FORGED}], max_tokens=2))
    server.http.get("/nowhere")
    server.complete(temperature=9)
    exported = exported_by(server.http.get("/metrics").text)
    assert named_in("grafana.json") | named_in("alerts.yml") <= exported  # of a live server that has a price
    assert server.metric("fen:http_responses_total") >= 4
    assert server.stop() == 0
    entries = [json.loads(line) for line in lines_of(file)]
    assert entries[0]["route"] == "/ready" and entries[0]["status"] == 503  # while it loaded
    entries = [entry for entry in entries if entry.get("route") != "/ready"]
    assert [entry["event"] for entry in entries] == ["ready", *["request"] * 4, "draining"]
    whole, stream, missing, bad = entries[1:5]
    assert whole["route"] == "/v1/completions" and whole["status"] == 200 and whole["model"] == "b"
    assert whole["completion_tokens"] == 3 and whole["prompt_tokens"] == 5 and whole["finish_reason"] == "length"
    assert 0 < whole["usd"] < 0.1 and 0 < whole["time_to_first_token_ms"] / 1e3 < whole["seconds"]
    assert stream["route"] == "/v1/chat/completions" and stream["completion_tokens"] == 2 and stream["model"] == "a"
    assert missing["route"] == "/nowhere" and missing["status"] == 404
    assert bad["status"] == 400 and "usd" not in bad


def test_a_server_on_a_full_disk_serves(launch: Callable[..., LiveServer]) -> None:
    server = launch(log_file="/dev/full")
    for _ in range(5):
        assert server.complete(max_tokens=2).json()["choices"][0]["text"] == " Paris."
    assert server.metric("fen:log_lines_lost_total") >= 5
    assert httpx.get(server.url + "/health").status_code == 200
    assert server.stop() == 0
