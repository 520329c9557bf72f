"""fen bench serve and sweep against a live server, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import results
from bench.serving.client import Client, HttpError, events
from server.cli import app
from tests.server.live import LiveServer, free_port, settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--random-input-len", "24", "--random-output-len", "6", "--num-prompts", "4", "--num-runs", "1"]


@pytest.fixture(scope="module")
def live(random_checkpoint: Callable[..., Path]) -> Iterator[LiveServer]:
    """A small random model behind a real server with a price."""
    asked = settings(str(random_checkpoint()), {"kv_cache_tokens": 2048}, price="cpu-4vcpu")
    server = LiveServer(asked)
    yield server
    assert server.stop() == 0


def test_lengths_are_right_whoever_has_the_tokenizer(live: LiveServer) -> None:
    """The server is named after a model with another tokenizer; --tokenizer names the right one; nobody has one."""
    named = ["--tokenizer", live.settings.engine.model]
    for words in ([], named, ["--served-model-name", "smollm2", "--model", "of-somebody-else"]):
        done = bench(live, *words)
        assert done.exit_code == 0 and "Total input tokens:                      96\n" in done.stdout, done.output


def bench(live: LiveServer, *words: str, command: str = "serve") -> Any:
    return CliRunner().invoke(app, ["bench", command, "--base-url", live.url, *SMALL, *words])


def test_it_prints_vllms_block_and_keeps_vllms_keys(live: LiveServer, tmp_path: Path) -> None:
    words = [
        "--num-runs",
        "2",
        "--max-concurrency",
        "1,3",
        "--goodput",
        "ttft:60000",
        "e2el:60000",
        "--num-warmups",
        "2",
    ]
    kept = ["--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "x.json"]
    done = bench(live, *words, *kept, "--metadata", "a=b", "--percentile-metrics", "ttft,tpot,itl,e2el")
    assert done.exit_code == 0, done.output
    for text in ("Serving Benchmark Result", "Medians of 2 runs", "Request goodput (req/s)", "P99 E2EL (ms)",
                 "US$ per million, busy, 3:1 blend", "US$ per million, wall, generated", "measured on a CPU",
                 "Utilisation of the device", "24 tokens in, 6 out, concurrency 3"):  # fmt: skip
        assert text in done.stdout, text
    result = results.load(tmp_path / "x.json", "serve")
    assert result.model == "smollm2" and result.price is not None and result.price.name == "cpu-4vcpu"
    assert result.device.startswith("cpu") and result.quantization == "float32"
    assert result.data["metadata"] == {"a": "b"} and not result.data["interrupted"]
    points = result.data["points"]
    assert [point["max_concurrency"] for point in points] == [1, 3]
    for run in (run for point in points for run in point["runs"]):
        assert run["completed"] == 4 and run["failed"] == 0
        assert run["total_input_tokens"] == 4 * 24 and run["total_output_tokens"] == 4 * 6
        assert run["total_cached_tokens"] == 0, "every run has fresh prompts"
        assert run["request_goodput"] == run["request_throughput"] == pytest.approx(4 / run["duration"])
        assert run["max_concurrent_requests"] <= 3 and len(run["ttfts"]) == len(run["itls"]) == 4
        assert run["ledger_tokens"] == {"prompt": 96, "cached_prompt": 0, "decode": 24}
        assert sum(run["device_seconds"].values()) == pytest.approx(run["wall_seconds"], rel=0.02, abs=0.01)
        assert run["wall_seconds"] == pytest.approx(run["duration"], rel=0.05)
        assert sum(run["usd"].values()) == pytest.approx(2 * run["usd"]["bill"], rel=0.02)
    keys = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
            "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts",
            "itls", "latencies", "start_times", "queue_times", "generated_texts", "errors", "max_output_tokens_per_s",
            "max_concurrent_requests"}  # fmt: skip
    keys |= {
        f"{word}_{name}_ms" for word in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")
    }
    assert keys <= points[0]["runs"][0].keys()


@pytest.mark.parametrize(
    "words",
    [
        ["--dataset-name", "prefix_repetition", "--prefix-repetition-prefix-len", "64", "--ignore-eos",
         "--prefix-repetition-suffix-len", "8", "--prefix-repetition-num-prefixes", "1", "--output-len", "4"],
        ["--dataset-name", "multi_turn", "--multi-turn-num-turns", "4", "--input-len", "40", "--output-len", "6"],
        ["--dataset-name", "multi_turn", "--input-len", "40", "--output-len", "6", "--backend", "openai-chat"],
    ],
)  # fmt: skip
def test_prompts_that_share_beginnings_are_found_in_the_cache(
    live: LiveServer, words: list[str], tmp_path: Path
) -> None:
    kept = [
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--result-filename",
        "x.json",
        "--max-concurrency",
        "1",
        "--save-detailed",
    ]
    done = bench(live, *words, *kept)
    assert done.exit_code == 0, done.output
    (point,) = results.load(tmp_path / "x.json").data["points"]
    assert point["completed"] == 4 and point["total_output_tokens"] > 0, point["runs"][0]["errors"]
    assert point["total_cached_tokens"] == point["ledger_tokens"]["cached_prompt"] > 0


def test_arrivals_at_a_rate_take_their_time(live: LiveServer, tmp_path: Path) -> None:
    kept = ["--save-result", "--result-dir", str(tmp_path)]
    done = bench(live, "--request-rate", "8", "--burstiness", "0.5", "--price", "3.6", *kept)
    assert done.exit_code == 0 and "Request rate configured (RPS):           8.00" in done.stdout, done.output
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-8.0qps-smollm2-")
    result = results.load(path)
    assert result.data["points"][0]["duration"] >= 0.5 and result.price is not None and result.price.source == "--price"


def test_a_sweep_has_a_table_a_file_and_pictures(live: LiveServer, tmp_path: Path) -> None:
    done = bench(live, "--max-concurrency", "1", "2", "--output", str(tmp_path), command="sweep")
    assert done.exit_code == 0 and "tokens/s/user" in done.stdout, done.output
    result = results.load(tmp_path / "sweep.json", "sweep")
    rows = result.data["sweep"]
    assert [row["concurrency"] for row in rows] == [1, 2] and len(result.data["points"]) == 2
    assert any(row["pareto_device"] for row in rows) and any(row["pareto_usd_wall"] for row in rows)
    assert all(
        row["user"] == pytest.approx(1e3 / p["median_tpot_ms"])
        for row, p in zip(rows, result.data["points"], strict=True)
    )
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        tmp_path / "sweep.svg"
    ).read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--base-url", "http://127.0.0.1:9"], "There is no server to measure: no answer from http://127.0.0.1:9"),
        (["--base-url", "ftp://x"], "--base-url: 'ftp://x' is not an address"),
        (["--model", "gpt-5"], "does not serve 'gpt-5'; it serves smollm2"),
        (["--random-input-len", "4000"], "None of the 4 requests was answered; the first: the server answers 400"),
        (["--endpoint", "/v1/nothing"], "the server answers 404: there is no such route"),
        (["--price", "0"], "--price is '0'; it must be a number above 0"),
        (["--price", "-1"], "--price is '-1'; it must be a number above 0"),
        (["--tokenizer", "no/such/tokenizer"], "no/such/tokenizer"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(live: LiveServer, words: list[str], sentence: str) -> None:
    done = bench(live, *words)
    assert done.exit_code == 1 and sentence in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("fen: ") or done.stderr.count("\n") <= 2


def test_ctrl_c_keeps_what_was_measured(live: LiveServer, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "bench", "serve", "--base-url", live.url, "--request-rate", "5"]
    kept = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "x.json", "--max-concurrency", "1,2"]
    command += [*SMALL, "--num-prompts", "1000", *kept]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while live.metric("vllm:request_success_total") < 30 and time.monotonic() < deadline:
        time.sleep(0.1)
    before = live.metric("vllm:request_success_total")
    while live.metric("vllm:request_success_total") < before + 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "Cut short: " in out and "Mean TTFT (ms)" in out
    data = results.load(tmp_path / "x.json").data
    (point,) = data["points"]
    assert data["interrupted"] and point["completed"] > 0 and point["completed"] + point["cancelled"] == 1000
    live.wait_idle()


def test_a_server_of_its_own(random_checkpoint: Callable[..., Path]) -> None:
    """--launch starts it, and it is gone afterwards; one that does not start is a sentence."""
    words = ["bench", "serve", *SMALL, "--launch", f"--model {random_checkpoint()} --threads 1 --kv-cache-tokens 1024"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "Successful requests:                     4" in done.stdout, done.output
    assert "US$: none: no price is known for the device" in done.stdout
    done = CliRunner().invoke(app, ["bench", "serve", *SMALL, "--launch", "--model no/such/model.gguf"])
    assert done.exit_code == 1 and "no/such/model.gguf" in done.stderr and "Traceback" not in done.stderr


# Servers that misbehave

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(handle: Handler) -> AsyncIterator[Client]:
    server = await asyncio.start_server(handle, "127.0.0.1", port := free_port())
    async with server:
        with contextlib.closing(Client(f"http://127.0.0.1:{port}/v1x/")) as client:
            yield client


async def request(reader: asyncio.StreamReader) -> str:
    """The first line of a request whose body is empty."""
    head = await reader.readuntil(b"\r\n\r\n")
    return head.decode().split("\r\n")[0]


def answering(*parts: bytes, close: bool = False, requests: list[str] | None = None) -> Handler:
    """Every request gets the parts, a moment apart; a whole answer if they are one."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                line = await request(reader)
                if requests is not None:
                    requests.append(line)
                for part in parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
                if close:
                    break
        writer.close()

    return handle


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"


def test_a_connection_is_kept_and_one_that_was_closed_is_opened_again() -> None:
    async def ask(close: bool) -> list[str]:
        requests: list[str] = []
        async with scripted(answering(OK + b'{"a": 1}', close=close, requests=requests)) as client:
            for _ in range(3):
                assert await client.get("/v1/models") == {"a": 1}
                await asyncio.sleep(0.05)
        return requests

    for close in (False, True):
        assert asyncio.run(ask(close)) == ["GET /v1x/v1/models HTTP/1.1"] * 3


@pytest.mark.parametrize(
    ("parts", "status", "sentence"),
    [
        ((b'HTTP/1.1 503 X\r\nContent-Length: 8\r\n\r\n{"error"',), 503, "answers 503$"),
        ((b'HTTP/1.1 429 X\r\nContent-Length: 31\r\n\r\n{"error": {"message": "later"}}',), 429, "429: later"),
        ((OK + b"not JSON",), 0, "answers /x with what is no JSON"),
        ((OK + b"123",), 0, "closed the connection|peer closed"),
        ((b"220 smtp ready\r\n",), 0, "no answer from"),
        ((b"",), 0, "closed the connection"),
    ],
)
def test_answers_that_are_none(parts: tuple[bytes, ...], status: int, sentence: str) -> None:
    async def ask() -> None:
        async with scripted(answering(*parts, close=True)) as client:
            await client.get("/x")

    with pytest.raises(HttpError, match=sentence) as caught:
        asyncio.run(ask())
    assert caught.value.status == status


def test_events_come_in_any_pieces() -> None:
    text = b': ping\r\n\r\ndata: {"a": 1}\r\n\r\ndata:{"b": "x\\u00e9"}\n\nid: 3\n\ndata: [DONE]\n\n'

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for i in range(0, len(text), size):
            yield text[i : i + size]

    async def read(size: int) -> list[bytes]:
        return [event async for event in events(pieces(size))]

    for size in range(1, len(text) + 1):
        assert asyncio.run(read(size)) == [b'{"a": 1}', b'{"b": "x\\u00e9"}', b"[DONE]"], size


def test_a_stream_that_breaks_is_a_failed_request_among_good_ones(tmp_path: Path) -> None:
    """Every second answer ends in the middle, with an error event, or is no event at all."""
    event = b'data: {"choices": [{"text": "x"}]}\n\n'
    end = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    bodies = [event + event + end, event, b'data: {"error": {"message": "the engine died"}}\n\n', b"data: 7\n\n"]
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /v1/models"):
                body = b'{"data": [{"id": "m"}]}'
            elif not head.startswith(b"POST /v1/completions"):
                body = b"{}"
            else:
                body = bodies[count % 4]
                count += 1
            length = len(body) + (10 if body == event else 0)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (length, body))
            await writer.drain()
        writer.close()

    async def run() -> str:
        server = await asyncio.start_server(handle, "127.0.0.1", port := free_port())
        async with server:
            command = ["-m", "server.cli", "bench", "serve", "--port", str(port), *SMALL, "--num-prompts", "8"]
            kept = ["--price", "2", "--num-devices", "2", "--save-result", "--save-detailed"]
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, *kept, "--max-concurrency", "1", "--result-dir", str(tmp_path),
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "200"},
            )  # fmt: skip
            out, _ = await process.communicate()
            assert process.returncode == 0, out.decode()
            return out.decode()

    printed = asyncio.run(run())
    assert "Failed requests:                         6" in printed and "6 requests failed" in printed
    assert "US$ per million, wall, all:" in printed and "utilisation unknown" in printed and "in words" in printed
    (path,) = tmp_path.iterdir()
    result = results.load(path)
    (point,) = result.data["points"]
    assert point["completed"] == 2 and point["total_output_tokens"] == 4 and point["total_input_tokens"] == 6
    assert point["usd"]["bill"] == pytest.approx(2 * 2 / 3600 * point["duration"])
    assert json.loads(path.read_text())["device"].startswith("unknown")
    errors = point["runs"][0]["errors"]
    assert len(errors) == 8 and "the engine died" in errors[2] and "not those of the OpenAI API" in errors[3]
