"""Prices, the cost of a reply, and the ledger as the server shows it."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prices import USE, WORK, parse_price, per_million, price_of, usd
from engine.checkpoint import Tokenizer
from engine.errors import FenError
from engine.ledger import CLASSES
from engine.messages import EngineStats, LedgerSnapshot, Output
from server.cost import reply_cost, summary
from tests.server.live import LiveServer
from tests.server.scripted import INFO, ScriptedEngine, ask

HOUR = 3600.0
SECONDS = {"prompt": 0.25, "cached_prompt": 0.0, "decode": 0.75, "recompute": 0.5}
LEDGER = LedgerSnapshot(
    start=50.0,
    end=150.0,
    seconds=dict(zip(CLASSES, (20.0, 0.0, 30.0, 2.0, 1.0, 0.0, 3.0, 4.0, 25.0, 10.0, 5.0), strict=True)),
    tokens={"prompt": 1000, "cached_prompt": 500, "decode": 300},
)


def test_a_price_is_a_name_or_a_number() -> None:
    shipped, own = parse_price("cpu-4vcpu"), parse_price("2.5")
    assert shipped.usd_per_device_hour == 0.0279 and shipped.date and shipped.source
    assert (own.usd_per_device_hour, own.name, own.source) == (2.5, "given", "--price")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "", "h100", "US$2", "0x10"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(FenError, match=r"--price is .* must be a number above 0.* h100-80gb"):
        parse_price(text)


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA B200", "b200"),
        ("cpu (4 threads)", None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_a_cpu_is_not(device: str, key: str | None) -> None:
    price = price_of(device)
    assert (price and price.name) == key


def test_cost_of_a_reply() -> None:
    cost = reply_cost([SECONDS, SECONDS], parse_price("7.2"), None)
    assert cost["cost"] == pytest.approx(2 * 7.2 / HOUR)
    details = cost["cost_details"]
    assert details["input_usd"] == pytest.approx(0.5 * 7.2 / HOUR) and details["cached_usd"] == 0.0
    assert details["output_usd"] == pytest.approx(1.5 * 7.2 / HOUR)
    assert details["basis"] == "direct" and details["price"]["usd_per_device_hour"] == 7.2
    assert details["device_seconds"] == {"prompt": 0.5, "cached_prompt": 0.0, "decode": 1.5, "recompute": 1.0}
    assert details["reason"] is None


def test_no_cost_without_a_price_or_for_half_a_reply() -> None:
    unpriced = reply_cost([SECONDS], None, "no price")
    assert unpriced["cost"] is None and unpriced["cost_details"]["output_usd"] is None
    assert unpriced["cost_details"]["reason"] == "no price"
    assert unpriced["cost_details"]["device_seconds"]["decode"] == 0.75
    aborted = reply_cost([SECONDS, None], parse_price("1"), None)
    assert aborted["cost"] is None and "aborted" in aborted["cost_details"]["reason"]
    assert aborted["cost_details"]["device_seconds"] is None


def test_prices_of_a_million_tokens_by_hand() -> None:
    costs = per_million(LEDGER, parse_price("3.6"))  # US$0.001 a second
    assert costs["direct"] == pytest.approx(
        {"prompt": 20.0, "cached_prompt": 0.0, "decode": 100.0, "blended_3_to_1": (3 * 0.02 / 1500 * 1e6 + 100) / 4}
    )
    assert costs["busy"]["decode"] == pytest.approx(100 * 60 / 50)  # 50 s of use; 60 with waste and host
    assert costs["wall"]["decode"] == pytest.approx(100 * 100 / 50)
    shown = summary(LEDGER, parse_price("3.6"), None)
    assert shown["utilisation"] == pytest.approx(0.6) and shown["unaccounted_seconds"] == pytest.approx(0.0)
    bill = shown["usd"]
    assert bill == pytest.approx(
        {
            "replies": 0.05,
            "waste": 0.006,
            "host": 0.004,
            "idle": 0.025,
            "startup": 0.01,
            "in_flight": 0.005,
            "bill": 0.1,
        }
    )


amounts = st.floats(0, 1e4)


@given(st.lists(amounts, min_size=11, max_size=11), st.tuples(*[st.integers(0, 10**6)] * 3), st.floats(1e-3, 1e3))
def test_the_parts_add_up_to_the_bill(parts: list[float], counts: tuple[int, int, int], rate: float) -> None:
    """N_in c_in + N_cache c_cached + N_out c_out = 1e6 B on the wall basis; and what was paid for is the bill."""
    seconds = dict(zip(CLASSES, parts, strict=True))
    for name, count in zip(USE, counts, strict=True):
        seconds[name] = seconds[name] if count else 0.0
    ledger = LedgerSnapshot(10.0, 10.0 + sum(seconds.values()), seconds, dict(zip(USE, counts, strict=True)))
    price = parse_price(str(rate))
    wall = per_million(ledger, price)["wall"]
    total = (ledger.end - ledger.start) * price.per_second
    if sum(seconds[name] for name in USE):
        assert sum(count * (wall[name] or 0.0) for name, count in ledger.tokens.items()) == pytest.approx(1e6 * total)
        busy = per_million(ledger, price)["busy"]
        work = sum(seconds[name] for name in WORK) * price.per_second
        assert sum(count * (busy[name] or 0.0) for name, count in ledger.tokens.items()) == pytest.approx(1e6 * work)
    bill = summary(ledger, price, None)["usd"]
    assert bill["bill"] == pytest.approx(total, abs=1e-12)
    assert sum(bill.values()) - bill["bill"] == pytest.approx(bill["bill"], abs=1e-9)


def test_nothing_is_divided_by_nothing() -> None:
    empty = LedgerSnapshot(5.0, 5.0, dict.fromkeys(CLASSES, 0.0), dict.fromkeys(USE, 0))
    shown = summary(empty, parse_price("1"), None)
    assert shown["utilisation"] is None and shown["usd"]["bill"] == 0.0
    assert {value for row in shown["usd_per_million_tokens"].values() for value in row.values()} == {None}


def test_small_amounts_are_readable() -> None:
    assert [usd(value) for value in (12.3456, 0.1, 0.0123, 0.0000031, 0.0)] == [
        "US$12.35", "US$0.10", "US$0.012", "US$0.0000031", "US$0.00",
    ]  # fmt: skip


def scripted(device: str = "NVIDIA H100 80GB HBM3") -> ScriptedEngine:
    last = Output(id="", tokens=[1], finish_reason="length", device_seconds=SECONDS)
    engine = ScriptedEngine(Output(id="", tokens=[1]), last)
    engine.info = msgspec.structs.replace(INFO, device=device)
    engine.stats = EngineStats(ledger=LEDGER)
    return engine


def test_usage_has_the_cost_at_the_price_of_the_gpu(tokenizer: Tokenizer) -> None:
    usage = ask(scripted(), tokenizer, "POST", "/v1/completions", json={"prompt": "x"}).json()["usage"]
    assert usage["cost"] == pytest.approx(2.29 / HOUR)
    assert usage["cost_details"]["price"]["name"] == "h100-80gb"
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    events = ask(scripted(), tokenizer, "POST", "/v1/completions", json=body).text.split("\n\n")
    assert msgspec.json.decode(events[-3].removeprefix("data: "))["usage"] == usage


def test_an_unknown_device_has_no_cost_and_a_reason(tokenizer: Tokenizer) -> None:
    engine = scripted("NVIDIA X9000")
    usage = ask(engine, tokenizer, "POST", "/v1/completions", json={"prompt": "x"}).json()["usage"]
    assert usage["cost"] is None and "NVIDIA X9000" in usage["cost_details"]["reason"]
    shown = ask(engine, tokenizer, "GET", "/v1/cost").json()
    assert shown["usd"] is None and shown["usd_per_million_tokens"] is None and "--price" in shown["reason"]
    assert shown["device_seconds"]["decode"] == 30.0 and shown["energy"]["joules"] is None and shown["energy"]["reason"]
    metrics = ask(engine, tokenizer, "GET", "/metrics").text
    assert "usd" not in metrics and "llm_cost" not in metrics and "fen:device_seconds_total" in metrics


def test_metrics_under_opencosts_names(tokenizer: Tokenizer) -> None:
    lines = ask(scripted(), tokenizer, "GET", "/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    costs = per_million(LEDGER, parse_price("h100-80gb"))
    for basis, ours in (("usage", "busy"), ("allocation", "wall")):
        for phase, kind in (("", "blended_3_to_1"), ("prompt", "prompt"), ("generation", "decode")):
            labels = f'cost_basis="{basis}",model_name="m",phase="{phase}"'
            assert values[f"llm_cost_per_million_tokens{{{labels}}}"] == pytest.approx(costs[ours][kind])
    assert values['fen:device_seconds_total{class="idle",model_name="m"}'] == 25.0
    assert values['fen:cost_usd_total{class="idle",model_name="m"}'] == pytest.approx(25.0 * 2.29 / HOUR)
    assert not any("in_flight" in name and "_total" in name for name in values)
    (price,) = (value for name, value in values.items() if name.startswith("fen:price_usd_per_device_hour{"))
    assert price == 2.29


@pytest.mark.parametrize("price", ["0", "-2", "h900"])
def test_serve_refuses_a_wrong_price_at_once(price: str) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--price", price, "--model", "does-not-matter"]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"fen: --price is {price!r}; it must be a number above 0")


@pytest.mark.parametrize(("model", "count"), [("smollm2", 40), ("small", 500)])
def test_a_live_servers_time_and_money_add_up(
    model: str, count: int, launch: Callable[..., LiveServer], random_checkpoint: Callable[..., Path]
) -> None:
    """Mixed requests with cancels, stop strings, shared prefixes and preemptions; both identities within 0.5%."""
    options: dict[str, Any] = {"kv_cache_tokens": 384, "block_size": 16, "max_model_len": 384}
    if model == "small":
        options["model"] = str(random_checkpoint())
    server = launch(engine=options, price="cpu-4vcpu")
    draw = random.Random(0)
    costs: list[float] = []

    async def one(http: httpx.AsyncClient, number: int) -> None:
        body: dict[str, Any] = {
            "prompt": "Once upon a time " * draw.randrange(1, 20) + str(number),
            "max_tokens": draw.randrange(1, 40),
            "ignore_eos": True,
        }
        if number % 4 == 0:
            body["stop"] = [" the", "and"]
        if number % 5 == 0:  # leaves long before its reply could end
            body |= {"prompt": f"Once {number}", "stream": True, "max_tokens": 340, "stop": []}
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                async for _ in reply.aiter_bytes():
                    return
        reply = await http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        costs.append(reply.json()["usage"]["cost"])

    async def load() -> None:
        limits = httpx.Limits(max_connections=12)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(one(http, number) for number in range(count)))

    before = time.monotonic()
    asyncio.run(load())
    elapsed = time.monotonic() - before
    server.wait_idle()
    time.sleep(2.5)  # an idle engine tells of itself once a second
    shown = server.http.get("/v1/cost").json()
    seconds, wall = shown["device_seconds"], shown["wall_seconds"]
    assert set(seconds) == set(CLASSES) and wall > elapsed
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.005)
    assert seconds["in_flight"] == 0.0 and seconds["idle"] > 1.0 and seconds["startup"] > 0.1
    assert min(seconds[name] for name in ("prompt", "decode", "aborted", "recompute", "host")) > 0
    bill = dict(shown["usd"])
    assert sum(costs) == pytest.approx(bill.pop("replies"), rel=0.005)
    assert sum(costs) + sum(bill.values()) - bill["bill"] == pytest.approx(bill["bill"], rel=0.005)
    assert bill["bill"] == pytest.approx(wall * 0.0279 / HOUR)
    assert shown["notes"] == ["measured on a CPU"] and shown["price"]["name"] == "cpu-4vcpu"
    assert server.metric("vllm:num_preemptions_total") > 0 and shown["tokens"]["cached_prompt"] > 0
    assert len(costs) == count * 4 / 5, "every fifth client leaves"
