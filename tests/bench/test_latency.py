"""fen bench latency on small models, from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import latency
from bench.results import load
from engine.checkpoint import open_checkpoint
from engine.messages import EngineOptions
from server.cli import app


def test_the_table_and_the_json(
    random_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "LARGE_BUFFER", 1 << 20)
    path = tmp_path / "latency.json"
    options = EngineOptions(model=str(random_checkpoint()), dtype="float32", threads=1)
    latency.run(options, prompt_tokens=32, new_tokens=8, repetitions=3, json_path=str(path))
    printed = capsys.readouterr().out
    assert "| pp32 " in printed and "| tg8 " in printed and "GB/s" in printed and "GFLOP/s" in printed
    kept = load(path, "latency")
    result = kept.data
    assert kept.quantization == "float32"
    assert len(result["prefill"]) == len(result["decode"]) == 3
    assert min(*result["prefill"], *result["decode"], result["read_bandwidth"], result["matmul_rate"]) > 0
    assert result["dtype"] == "float32" and result["threads"] == 1


def test_bytes_of_a_token_and_flops_of_a_prompt(random_checkpoint: Callable[..., Path]) -> None:
    untied = open_checkpoint(str(random_checkpoint()))
    tied = open_checkpoint(str(random_checkpoint(tie_word_embeddings=True)))
    matrices = 2 * ((64 + 2 * 32) * 64 + 64 * 64 + 3 * 160 * 64)
    norms = 5 * 64
    head = 512 * 64
    assert latency.bytes_read(untied) == latency.bytes_read(tied) == 4 * (matrices + norms + head)
    attention = 2 * 2 * 4 * 16 * sum(range(1, 11)) * 2
    assert latency.prompt_flops(untied, 10) == 2 * matrices * 10 + attention + 2 * head


def test_the_command(random_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LARGE_BUFFER", 1 << 20)
    options = ["--prompt-tokens", "16", "--new-tokens", "4", "--repetitions", "1", "--threads", "1"]
    model = str(random_checkpoint())
    result = CliRunner().invoke(app, ["bench", "latency", "--model", model, *options])
    assert result.exit_code == 0, result.output
    assert "| pp16 " in result.stdout and "| tg4 " in result.stdout
    result = CliRunner().invoke(app, ["bench", "latency", "--model", model, "--prompt-tokens", "600"])
    assert result.exit_code == 1 and "512" in result.stderr and "Traceback" not in result.stderr
