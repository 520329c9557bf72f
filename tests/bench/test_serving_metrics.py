"""fen bench serve without a server: the figures of given answers, arrivals, prompts, options, the front of a sweep."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prices import parse_price
from bench.serving import bill, metrics, sweep
from bench.serving.datasets import load
from bench.serving.load import Answer, Run, arrival_times
from bench.serving.options import ServeOptions
from bench.serving.vocabulary import Vocabulary, open_vocabulary
from engine.checkpoint import open_checkpoint
from engine.errors import FenError
from server.bench_flags import SERVE, repeated

WORDS = Vocabulary(None, None)


def answers() -> list[Answer]:
    """0.55 s to the first piece, then 0.1 s a piece; the second one starts when the first has one second left."""
    first = Answer(10, start=5.0, ttft=0.55, itl=[0.1] * 10, latency=1.55, output_tokens=11, text="a")
    second = Answer(20, start=5.5, ttft=0.25, itl=[0.2], latency=0.45, output_tokens=2, queue_time=0.5)
    return [first, second, Answer(30, start=5.2, error="the server answers 500")]


def test_the_figures_are_vllms() -> None:
    options = ServeOptions(goodput=["ttft:300", "tpot:300"], metric_percentiles="50,99.9")
    found = metrics.measured(Run(answers(), 2.0, [0.0, 0.001], 0.25), options)
    assert found["completed"] == 2 and found["failed"] == 1 and found["duration"] == 2.0
    assert found["total_input_tokens"] == 30 and found["total_output_tokens"] == 13, "what failed does not count"
    assert found["request_throughput"] == 1.0 and found["output_throughput"] == 6.5
    assert found["total_token_throughput"] == 21.5
    assert found["request_goodput"] == 0.5, "the first one's TTFT is over 300 ms"
    assert found["mean_ttft_ms"] == pytest.approx(400) and found["median_ttft_ms"] == pytest.approx(400)
    assert found["mean_tpot_ms"] == pytest.approx(150), "(1.55 - 0.55) / 10 and (0.45 - 0.25) / 1"
    assert found["mean_itl_ms"] == pytest.approx((10 * 100 + 200) / 11)
    assert found["median_e2el_ms"] == pytest.approx(1000) and found["std_ttft_ms"] == pytest.approx(150)
    assert found["p50_ttft_ms"] == pytest.approx(400) and "p99.9_itl_ms" in found
    assert found["median_e2el_including_client_queue_ms"] == pytest.approx((1550 + 950) / 2)
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == 7.0, "0.55 to 0.95 s of the first, 0.75 and 0.95 s of the second"
    text = metrics.block(metrics.together([found]), options)
    for line in (
        "============ Serving Benchmark Result ============",
        "Successful requests:                     2",
        "Total generated tokens:                  13",
        "Request goodput (req/s):                 0.50",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          400.00",
        "P99.9 TPOT (ms):",
    ):
        assert line in text
    assert "Request rate configured" not in text and "End-to-end" not in text


def test_nothing_answered_has_no_latencies_and_divides_by_nothing() -> None:
    found = metrics.measured(Run(answers()[2:], 2.0, [], 0.0), ServeOptions(goodput=["ttft:1"]))
    assert found["completed"] == found["output_throughput"] == found["request_goodput"] == 0
    assert found["median_ttft_ms"] is None and found["max_output_tokens_per_s"] == 0
    assert "TTFT (ms)" not in metrics.block(metrics.together([found]), ServeOptions())


def test_several_runs_become_medians_with_their_spread() -> None:
    runs = [{"a": a, "usd": {"busy": {"decode": 2.0 * a}}, "none": None, "ttfts": [1], "ok": True} for a in (3, 1, 2)]
    found = metrics.together(runs)
    assert found["a"] == 2 and found["usd"]["busy"]["decode"] == 4.0 and found["none"] is None
    assert found["spread"]["a"] == [1, 3] and found["spread"]["usd.busy.decode"] == [2.0, 6.0]
    assert "ttfts" not in found and "spread" not in metrics.together(runs[:1])


def test_a_client_that_is_the_bottleneck_says_so() -> None:
    calm = {"client_cpu_share": 0.2, "client_lag_p99_ms": 4.0, "median_itl_ms": 10.0, "failed": 0}
    assert metrics.warnings(calm) == []
    assert "95% of a core" in metrics.warnings(calm | {"client_cpu_share": 0.95})[0]
    assert "up to 9.0 ms late" in metrics.warnings(calm | {"client_lag_p99_ms": 9.0})[0]
    assert metrics.warnings(calm | {"client_lag_p99_ms": 9.0, "median_itl_ms": 100.0}) == []
    assert "3 requests failed" in metrics.warnings(calm | {"failed": 3})[0]


@given(st.integers(1, 200), st.floats(0.1, 100), st.sampled_from([0.25, 1.0, 5.0, math.inf]), st.integers(0, 9))
def test_arrivals_keep_their_rate(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = arrival_times(ServeOptions(request_rate=rate, burstiness=burstiness), count, seed)
    assert len(times) == count and times == sorted(times) and times[0] >= 0
    assert times[-1] == pytest.approx(count / rate)
    assert times == arrival_times(ServeOptions(request_rate=rate, burstiness=burstiness), count, seed)


def test_arrivals_at_once_evenly_in_bursts_and_faster_and_faster() -> None:
    assert arrival_times(ServeOptions(), 3, 0) == [0.0] * 3
    assert arrival_times(ServeOptions(request_rate=2, burstiness=math.inf), 3, 0) == pytest.approx([0.5, 1.0, 1.5])

    def variation(burstiness: float) -> float:
        times = arrival_times(ServeOptions(request_rate=1, burstiness=burstiness), 4000, 0)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return statistics.pstdev(gaps) / statistics.mean(gaps)

    assert variation(1.0) == pytest.approx(1.0, abs=0.06), "a Poisson process"
    assert variation(0.25) == pytest.approx(2.0, abs=0.2) and variation(4.0) == pytest.approx(0.5, abs=0.05)
    ramp = ServeOptions(ramp_up_strategy="linear", ramp_up_start_rps=1, ramp_up_end_rps=10, burstiness=math.inf)
    gaps = [b - a for a, b in itertools.pairwise(arrival_times(ramp, 10, 0))]
    assert gaps == pytest.approx([1 / rate for rate in range(2, 11)])


def test_random_prompts_have_the_length_asked_for(random_checkpoint: Callable[..., Path]) -> None:
    vocabulary = Vocabulary("x", open_checkpoint(str(random_checkpoint())).tokenizer)
    options = ServeOptions(num_prompts=20, random_input_len=30, random_output_len=8, random_range_ratio=0.5)
    prompts = [turn for (turn,) in load(options, vocabulary, "0")]
    assert all(vocabulary.count(turn.text) == turn.tokens for turn in prompts)
    assert {turn.tokens for turn in prompts} <= set(range(15, 46)) and len({turn.tokens for turn in prompts}) > 5
    assert {turn.new_tokens for turn in prompts} <= set(range(4, 13))
    assert len({turn.text for turn in prompts}) == 20
    assert load(options, vocabulary, "0") == [[turn] for turn in prompts] != load(options, vocabulary, "1")
    shared = ServeOptions(num_prompts=5, random_input_len=10, random_prefix_len=40)
    (first,), *others = load(shared, vocabulary, "0")
    assert first.tokens == 50 and all(turn.text[:80] == first.text[:80] != "" for (turn,) in others)


def test_prompts_that_share_prefixes_and_conversations() -> None:
    options = ServeOptions(dataset_name="prefix_repetition", num_prompts=12, prefix_repetition_num_prefixes=3)
    prompts = [turn for (turn,) in load(options, WORDS, "0")]
    prefixes = [" ".join(turn.text.split()[:256]) for turn in prompts]
    assert len(prompts) == 12 and sorted(map(prefixes.count, set(prefixes))) == [4, 4, 4]
    assert all(len(turn.text.split()) == turn.tokens == 512 and turn.new_tokens == 128 for turn in prompts)
    options = ServeOptions(dataset_name="multi_turn", num_prompts=10, multi_turn_prefix_len=7)
    talks = load(options, WORDS, "0")
    assert [len(talk) for talk in talks] == [4, 4, 4], "ten turns, to the next whole conversation"
    assert len({" ".join(talk[0].text.split()[:7]) for talk in talks}) == 1
    assert len(talks[0][0].text.split()) == 7 + 128 and len(talks[0][1].text.split()) == 128


def test_prompts_from_files(tmp_path: Path) -> None:
    def talk(question: int, answer: int) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": "w " * question}, {"from": "gpt", "value": "w " * answer}]}

    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([talk(10, 20), talk(3, 20), talk(2000, 20), talk(10, 2), talk(900, 1200), {"id": 1}]))
    options = ServeOptions(dataset_name="sharegpt", dataset_path=str(path), num_prompts=3)
    found = load(options, WORDS, "0")
    assert [(turn.tokens, turn.new_tokens) for (turn,) in found] == [(10, 20)] * 3, (
        "too short and too long are left out"
    )
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "a b c", "output_tokens": 5}\n\n{"prompt": "d"}\n')
    options = ServeOptions(dataset_name="custom", dataset_path=str(path), num_prompts=2, disable_shuffle=True)
    assert [(t.text, t.tokens, t.new_tokens) for (t,) in load(options, WORDS, "0")] == [
        ("a b c", 3, 256),
        ("d", 1, 256),
    ]


@pytest.mark.parametrize(
    ("name", "text", "more", "sentence"),
    [
        ("sharegpt", "[1]", {}, "entry 1 is not"),
        ("sharegpt", "{", {}, "not the JSON that sharegpt takes"),
        ("sharegpt", '[{"conversations": []}]', {}, "no prompt of a usable length"),
        ("custom", "[]", {}, 'entry 1 has no "prompt"'),
        ("custom", "", {}, "holds no list of entries"),
        ("custom", '{"prompt": "x"}', {"custom_output_len": -1}, 'no "output_tokens" of 1 or more'),
    ],
)
def test_files_that_are_not_right(tmp_path: Path, name: str, text: str, more: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(FenError, match=sentence):
        load(ServeOptions(dataset_name=name, dataset_path=str(path), **more), WORDS, "0")
    with pytest.raises(FenError, match="cannot be read"):
        load(ServeOptions(dataset_name=name, dataset_path=str(tmp_path / "absent")), WORDS, "0")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"backend": "tgi"}, "--backend takes openai, vllm, openai-chat"),
        ({"dataset_name": "custom"}, "needs a file: --dataset-path"),
        ({"dataset_path": "x"}, "takes no --dataset-path"),
        ({"request_rate": 0.0}, "must be above 0"),
        ({"request_rate": math.nan}, "must be above 0"),
        ({"burstiness": -1.0}, "must be above 0"),
        ({"random_range_ratio": 1.0}, "below 1"),
        ({"max_concurrency": ["1", "0"]}, "--max-concurrency takes numbers from 1 on"),
        ({"goodput": ["itl:5"]}, "--goodput takes ttft, tpot, e2el"),
        ({"goodput": ["ttft"]}, "pairs such as ttft:200"),
        ({"metric_percentiles": "99,101"}, "--metric-percentiles takes numbers"),
        ({"percentile_metrics": "ttft,x"}, "--percentile-metrics takes"),
        ({"header": ["x"]}, "--header takes KEY=VALUE"),
        ({"extra_body": "[1]"}, "--extra-body takes a JSON object"),
        ({"ramp_up_strategy": "linear"}, "needs --ramp-up-start-rps"),
        ({"ramp_up_start_rps": 1.0}, "need --ramp-up-strategy"),
    ],
)
def test_options_that_cannot_be_run(fields: dict[str, Any], sentence: str) -> None:
    ServeOptions().check()
    with pytest.raises(FenError, match=sentence):
        ServeOptions(**fields).check()


def test_options_as_vllm_takes_them() -> None:
    assert set(SERVE) == set(ServeOptions.__struct_fields__), "every field is an option"
    words = ["--goodput", "ttft:200", "tpot:50", "--seed", "3", "--max-concurrency", "1", "2"]
    assert list(repeated(words)) == [
        "--goodput", "ttft:200", "--goodput", "tpot:50", "--seed", "3",
        "--max-concurrency", "1", "--max-concurrency", "2",
    ]  # fmt: skip
    options = ServeOptions(max_concurrency=["1,2", "4"], base_url="http://h:1/v1/", backend="openai-chat")
    assert options.concurrencies == [1, 2, 4] and options.url == "http://h:1" and options.path == "/v1/chat/completions"
    assert ServeOptions().body == {"ignore_eos": True} and ServeOptions(ignore_eos=False).body == {}
    assert ServeOptions(dataset_name="prefix_repetition", top_k=3).body == {"top_k": 3}


def test_a_tokenizer_that_was_named_has_to_be_there(tmp_path: Path, random_checkpoint: Callable[..., Path]) -> None:
    assert not open_vocabulary(None, "a-model-of-somebody-else").exact
    assert open_vocabulary(str(random_checkpoint()), "x").exact
    assert open_vocabulary(str(random_checkpoint() / "tokenizer.json"), "x").exact
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FenError, match="tokenizer"):
        open_vocabulary(str(tmp_path), "x")


LEDGER = {"prompt": 2.0, "cached_prompt": 0.0, "decode": 3.0, "padding": 0.0, "recompute": 0.5, "rejected_draft": 0.0,
          "aborted": 0.0, "host": 0.5, "idle": 10.0, "startup": 4.0, "in_flight": 0.0}  # fmt: skip


def test_the_cost_of_a_run_is_what_the_ledger_grew_by() -> None:
    before = {
        "device_seconds": dict(LEDGER),
        "wall_seconds": 20.0,
        "tokens": {"prompt": 1, "cached_prompt": 2, "decode": 3},
    }
    after = {
        "device_seconds": LEDGER | {"prompt": 4.0, "decode": 7.0, "host": 1.5, "idle": 12.5},
        "wall_seconds": 29.5,
        "tokens": {"prompt": 101, "cached_prompt": 2, "decode": 43},
        "energy": {"joules": None, "reason": "no counter"},
    }
    figures = {"duration": 8.0, "total_input_tokens": 100, "total_output_tokens": 40, "failed": 0, "cancelled": 0}
    found = bill.account(before, after, figures, parse_price("3.6"), 1)
    assert found["wall_seconds"] == pytest.approx(8.0), "1.5 s before and after the run do not belong to it"
    assert found["device_seconds"]["idle"] == pytest.approx(1.0) and found["unaccounted_seconds"] == pytest.approx(0)
    assert found["utilisation"] == pytest.approx(7 / 8) and found["joules"] is None and found["joules_reason"]
    assert found["usd"]["bill"] == pytest.approx(0.008)
    assert sum(found["usd"].values()) == pytest.approx(2 * 0.008)
    wall = found["usd_per_million_tokens"]["wall"]
    assert wall["prompt"] * 100 + wall["decode"] * 40 == pytest.approx(1e6 * 0.008)
    assert bill.warnings(found, figures) == []
    assert "others used the server" in bill.warnings(found, figures | {"total_input_tokens": 60})[0]
    other = bill.account(None, None, figures, parse_price("3.6"), 2)
    assert other["usd"] == {"bill": pytest.approx(0.016)}
    assert other["usd_per_million_tokens"]["wall"]["all"] == pytest.approx(0.016e6 / 140)
    nothing = figures | {"total_input_tokens": 0, "total_output_tokens": 0}
    assert bill.account(None, None, nothing, parse_price("3.6"), 1)["usd_per_million_tokens"]["wall"]["all"] is None
    assert bill.account(None, None, figures, None, 1)["usd"] is None


@given(st.lists(st.tuples(st.integers(1, 9) | st.none(), st.integers(1, 9) | st.none()), min_size=1))
def test_the_front_is_what_nothing_beats(places: list[tuple[int | None, int | None]]) -> None:
    rows: list[dict[str, Any]] = [{"user": user, "usd_busy": usd} for user, usd in places]
    best = [place for place, on in zip(places, sweep.pareto(rows, "usd_busy"), strict=True) if on]
    known = [(user, usd) for user, usd in places if user is not None and usd is not None]
    assert bool(best) == bool(known)
    for user, usd in known:
        assert any(a >= user and b <= usd for a, b in best), "something on the front is as good"
        beaten = any((a > user and b <= usd) or (a >= user and b < usd) for a, b in known)
        assert ((user, usd) in best) == (not beaten)
