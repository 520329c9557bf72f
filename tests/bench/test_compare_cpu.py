"""The comparison: its arithmetic, and real workers of this engine and of transformers on a small model."""

from __future__ import annotations

import contextlib
import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import compare_cpu
from bench.compare_cpu import METRICS, agreement, best_of, measure, start_engines, table, verdict
from bench.local_engine import Timing
from bench.peers import install
from bench.peers.worker import PeerError, Worker
from bench.prompts import make_prompt, prose_tokens
from engine.checkpoint import open_checkpoint

RATES = {
    "fen": {"decode at 100": [90.0, 100.0, 95.0]},
    "llama.cpp": {"decode at 100": [60.0, 50.0, 70.0]},
    "transformers bfloat16": {"decode at 100": [20.0, 21.0, 19.0]},
    "transformers float32": {"decode at 100": [25.0, 26.0, 24.0]},
}


def test_rates_of_a_timing() -> None:
    timing = Timing(first_seconds=2.0, seconds=4.0, tokens=[[1] * 11, [2] * 11])
    assert timing.decode_rate == 20 / 2
    assert timing.total_rate == 22 / 4
    by_name = {metric.name: metric for metric in METRICS}
    assert by_name["prefill of 512"].rate(timing) == 256
    assert by_name["decode at 100"].rate(timing) == 10
    assert by_name["16 streams"].rate(timing) == 5.5


def test_every_metric_of_the_comparison_is_there() -> None:
    assert [metric.name for metric in METRICS] == [
        "decode at 100",
        "decode at 1000",
        "prefill of 512",
        "prefill of 2048",
        "16 streams",
    ]


@pytest.mark.parametrize(
    ("ratio", "least", "aim", "text"),
    [
        (0.99, 1.0, 1.3, "missed: 1× wanted"),
        (1.0, 1.0, 1.3, "met: 1×, aim 1.3× not reached"),
        (1.31, 1.0, 1.3, "met: 1×, aim 1.3× reached"),
        (3.2, 3.0, None, "met: 3× wanted"),
    ],
)
def test_verdict(ratio: float, least: float, aim: float | None, text: str) -> None:
    assert verdict(ratio, least, aim) == text


def test_the_better_dtype_is_the_peer() -> None:
    assert best_of("transformers", RATES, "decode at 100") == 25.0
    assert best_of("llama.cpp", RATES, "decode at 100") == 60.0
    assert best_of("vllm", RATES, "decode at 100") is None


def test_table() -> None:
    header, _, row = table(RATES, METRICS[:1]).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")][-2:] == ["fen / llama.cpp", "fen / transformers"]
    assert "95.0 (90.0 to 100.0)" in row
    assert "1.58× (met: 1×, aim 1.3× reached)" in row
    assert "3.80× (met: 3× wanted)" in row
    without = {name: rates for name, rates in RATES.items() if name != "llama.cpp"}
    assert "llama.cpp" not in table(without, METRICS[:1])


def test_agreement() -> None:
    assert agreement([1, 2, 3], [1, 2, 3]) == 3
    assert agreement([1, 9, 3], [1, 2, 3]) == 1
    assert agreement([], []) == 0


def test_workers_measure_one_model(random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_cpu, "STREAMS", 3)
    checkpoint = open_checkpoint(str(random_checkpoint()))
    metrics = [
        compare_cpu.Metric("decode", 1, 20, 6, lambda timing: timing.decode_rate, {}),
        compare_cpu.Metric("streams", 3, 10, 4, lambda timing: timing.total_rate, {}),
    ]
    with contextlib.ExitStack() as stack:
        workers, missing = start_engines(checkpoint, 1, ["fen", "transformers"], stack)
        assert list(workers) == ["fen", "transformers bfloat16", "transformers float32"]
        assert missing == {"llama.cpp": "left out on request"}
        prose = prose_tokens(checkpoint.tokenizer)
        kept: list[dict[str, Any]] = []
        measure(workers, prose, metrics, 2, lambda measured: kept.append(copy.deepcopy(measured)))
        with pytest.raises(PeerError, match="context"):  # a failure is an answer, and the worker lives on
            workers["fen"].generate([make_prompt(prose, 600)], 4)
        assert workers["fen"].generate([make_prompt(prose, 20)], 6).seconds > 0
    for repetition, measured in enumerate(kept, start=1):  # a run that is cut short keeps what it has
        assert measured["repetitions"] == repetition
        for by_metric in measured["tokens_per_second"].values():
            assert all(len(values) == repetition and min(values) > 0 for values in by_metric.values())
    assert len(kept) == 2
    # The same weights on the same tokens: bfloat16 may part from float32 later, not at once.
    assert min(kept[0]["tokens_as_float32"].values()) >= 1
    assert kept[0]["tokens_as_float32"]["transformers float32"] == 6


def test_a_worker_that_does_not_start_or_dies_is_named() -> None:
    with pytest.raises(PeerError, match="does not start: No such file"):
        Worker(["no-such-program"], {})
    with pytest.raises(PeerError, match="ended with status 3"):
        Worker([sys.executable, "-c", "raise SystemExit(3)"], {})
    with pytest.raises(PeerError, match="no AVX"):
        Worker([sys.executable, "-c", 'input(); print(\'{"error": "no AVX"}\')'], {})


def test_llama_cpp_is_not_run_on_what_it_cannot_read(random_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(str(random_checkpoint()))
    with contextlib.ExitStack() as stack:
        assert start_engines(checkpoint, 1, ["llama.cpp"], stack)[1]["llama.cpp"] == "it reads GGUF files only"


def test_install_without_node_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="node"):
        install.install(tmp_path)
    assert not install.installed(tmp_path)


def test_prompts_have_the_length_asked_for() -> None:
    assert make_prompt([5, 6, 7], 7, offset=2) == [7, 5, 6, 7, 5, 6, 7]
