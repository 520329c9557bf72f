"""fen bench throughput on a small model, from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.results import load
from server.cli import app

WORDS = ["--threads", "1", "--kv-cache-tokens", "2048", "--input-len", "20", "--output-len", "5", "--num-prompts", "6"]


def test_tokens_are_counted_and_paid(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    words = ["bench", "throughput", "--model", str(random_checkpoint()), *WORDS, "--num-runs", "2"]
    path = tmp_path / "x.json"
    done = CliRunner().invoke(app, [*words, "--price", "cpu-4vcpu", "--output-json", str(path)])
    assert done.exit_code == 0, done.output
    assert "requests/s" in done.stdout and "Total num prompt tokens:  120" in done.stdout
    assert "US$ per million tokens, busy" in done.stdout and "6 requests at once" in done.stdout
    result = load(path, "throughput")
    assert result.price is not None and len(result.data["runs"]) == 2
    for run in result.data["runs"]:
        assert run["total_input_tokens"] == 120 and run["total_output_tokens"] == 30
        assert run["tokens_per_second"] == pytest.approx(150 / run["elapsed_time"])
        assert sum(run["device_seconds"].values()) == pytest.approx(run["elapsed_time"], rel=0.1)
        assert run["usd_per_million_tokens"]["wall"]["decode"] > 0 and 0 < run["utilisation"] <= 1
    done = CliRunner().invoke(app, [*words, "--num-runs", "1"])
    assert done.exit_code == 0 and "US$: none: no price is known" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--price", "0"], "--price is '0'"), (["--input-len", "600"], "512"), (["--dataset-name", "custom"], "a file")],
)
def test_refusals(random_checkpoint: Callable[..., Path], words: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["bench", "throughput", "--model", str(random_checkpoint()), *WORDS, *words])
    assert done.exit_code == 1 and sentence in done.stderr and "Traceback" not in done.stderr
