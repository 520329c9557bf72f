"""The GET routes, tokenising, headers, and what the server process is made of."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import psutil
import pytest

from engine.checkpoint import Tokenizer
from engine.errors import FenError
from server.app import api
from tests.server.live import LiveServer
from tests.server.scripted import ScriptedEngine, ask


def test_models(server: LiveServer) -> None:
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert card["id"] == "smollm2" and card["max_model_len"] == 512 and card["object"] == "model"
    assert server.http.get("/v1/models/smollm2").json() == card
    missing = server.http.get("/v1/models/org/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/version", "/load", "/v1/live", "/", "/metrics", "/v1/models", "/v1/cost", "/openapi.json"],
)
def test_get_and_head(server: LiveServer, path: str) -> None:
    assert server.http.get(path).status_code == 200
    head = server.http.head(path)
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"]) > 0


def test_metrics_count_requests(server: LiveServer) -> None:
    server.wait_idle()
    names = {
        "vllm:request_success_total": 2,
        "vllm:prompt_tokens_total": 10,
        "vllm:generation_tokens_total": 8,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 6,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_queue_time_seconds_count": 2,
        "vllm:request_generation_tokens_sum": 8,
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:num_preemptions_total": 0,
        "vllm:iteration_tokens_total_sum": 16,  # of the prompts, and all but the last that is generated
        "vllm:iteration_tokens_total_count": 8,
    }
    before = {name: server.metric(name) for name in names}
    for _ in range(2):
        server.complete(max_tokens=4)
    server.wait_idle()
    assert {name: server.metric(name) - before[name] for name in names} == names
    text = server.http.get("/metrics").text
    assert 'vllm:request_success_total{finished_reason="length",model_name="smollm2"}' in text
    assert 'vllm:time_to_first_token_seconds_bucket{le="0.001",model_name="smollm2"}' in text
    sizes = re.findall(r'vllm:iteration_tokens_total_bucket{le="(.*?)",model_name="smollm2"} (.*)', text)
    bounds = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, math.inf]
    assert [float(bound) for bound, _ in sizes] == bounds
    assert float(sizes[-1][1]) == server.metric("vllm:iteration_tokens_total_count")


def test_tokenize_and_back(server: LiveServer) -> None:
    text = "The 巴黎 🥖<|im_end|>"
    reply = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) and reply["max_model_len"] == 512
    assert reply["token_strs"][0] == "The"
    assert server.http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "hi"}]
    chat = server.http.post("/tokenize", json={"messages": messages}).json()
    usage = server.chat("hi", max_tokens=1).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    shown = server.http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert shown.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_tokenizer_info_is_enough_for_a_client_without_a_tokenizer(server: LiveServer) -> None:
    """As lm-eval reads it: the names of the ends, whose ids come from /tokenize, and the template."""
    info = server.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["vocab_size"]) == ("<|im_start|>", "<|im_end|>", 49152)
    assert "<|im_start|>" in info["chat_template"]
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert server.http.post("/tokenize", json=body).json()["tokens"] == [2]


@pytest.mark.parametrize(("given", "echoed"), [("abc-1", "abc-1"), ("a b\tc<x>", "abcx"), ("z" * 100, "z" * 64)])
def test_request_id(server: LiveServer, given: str, echoed: str) -> None:
    for path in ("/health", "/nothing"):
        assert server.http.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == echoed
    first, second = (server.http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_cors_only_where_asked_for(tokenizer: Tokenizer) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    path, engine = "/v1/completions", ScriptedEngine()
    allowed = ask(engine, tokenizer, "OPTIONS", path, cors="https://a.example", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    for cors in ("https://b.example", ""):
        refused = ask(engine, tokenizer, "OPTIONS", path, cors=cors, headers=headers)
        assert refused.status_code >= 400 and "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", "https://a b", "https://a.example/app", "null"])
def test_an_origin_that_no_browser_sends(tokenizer: Tokenizer, origin: str) -> None:
    with pytest.raises(FenError, match="--cors-origins"):
        ask(ScriptedEngine(), tokenizer, "GET", "/health", cors=origin)


def test_docs(server: LiveServer) -> None:
    assert server.http.get("/openapi.json").json() == api().openapi()
    docs = server.http.get("/docs").text
    assert "<code>repetition_penalty</code>" in docs and "`" not in docs
    links = set(re.findall(r'(?:href|src)="([^"]*)"', docs))
    assert len(links) > 30  # to what stands on the page itself, and to the description
    others = {link for link in links if link[1:] not in re.findall(r'id="([^"]*)"', docs)}
    assert others == {"openapi.json", "page/docs.css", "page/icon.svg"}
    assert all(server.http.get(f"/{link}").status_code == 200 for link in others)


def test_the_http_process_has_no_torch() -> None:
    code = "import sys, server.run, server.app; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_http_process_is_small(server: LiveServer) -> None:
    process = psutil.Process(server.process.pid)
    assert not any("libtorch" in mapped.path for mapped in process.memory_maps())
    private = process.memory_full_info().uss / 2**20
    assert private < 200, f"{private:.0f} MiB"
