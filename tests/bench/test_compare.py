"""`fen compare` on small models: what is equal is found equal, and what differs is put in numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import compare as comparison
from bench import results
from bench.compare import parse
from engine.errors import FenError
from engine.messages import EngineOptions
from server.cli import app

RESULTS = Path(results.__file__).with_name("results")
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}


def test_quantize_and_compare(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, small = str(random_checkpoint(**SHAPE)), str(tmp_path / "small")
    made = CliRunner().invoke(app, ["quantize", source, "--to", "w8a8", "--output", small])
    assert made.exit_code == 0 and "MB of weights" in made.stdout
    names = [source, f"{source}:dtype=float32", small, f"{source}:kv_cache_dtype=int8"]
    options = ["--tokens", "80", "--window", "48", "--batch", "2", "--price", "0.5"]
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    shown = CliRunner().invoke(app, ["compare", *names, *options, *files])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("\n") == 6 and "US$/M" in shown.stdout
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["kind"] == "compare" and result["schema"] == "fen-bench"
    first, exact, eight, kv = result["data"]["rows"]
    assert first["kl_nats"] == 0 and first["top1_agreement"] == 1
    assert 0 < exact["kl_nats"] < 1e-2 and exact["kl_nats"] < eight["kl_nats"]
    assert eight["weight_bytes"] < 0.6 * first["weight_bytes"]
    assert kv["kv_bytes_per_token"] == 2 * 2 * 2 * (32 + 4) < first["kv_bytes_per_token"]
    for row in result["data"]["rows"]:
        assert row["perplexity"] > 100 and row["usd_per_million"] > 0 and row["batch_decode_rate"] > 0
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_other_tokenizers_are_refused(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("one two three " * 20)
    small, large = (str(random_checkpoint(**SHAPE, vocab_size=size)) for size in (512, 520))
    shown = CliRunner().invoke(
        app, ["compare", small, large, "--text", str(text), "--tokens", "40", "--window", "40", "--batch", "1"]
    )
    assert shown.exit_code == 1 and "has another tokenizer" in shown.output and "|" not in shown.output
    shown = CliRunner().invoke(app, ["compare", small, "--text", str(text), "--window", "5000"])
    assert shown.exit_code == 1 and "--window is 5000; the context of" in shown.output


def test_a_model_that_is_not_there_is_said_first(random_checkpoint: Callable[..., Path]) -> None:
    said: list[str] = []
    with pytest.raises(FenError, match="there is no model 'no-such-model'"):
        comparison.compare(
            [str(random_checkpoint()), "no-such-model"], EngineOptions(), "one two", 9, 9, 1, None, said.append
        )
    assert not said


@pytest.mark.parametrize("name", ["m:kv_cache_dtype=int4", "m:threads=2", "m:dtype="])
def test_options_of_a_model(name: str) -> None:
    with pytest.raises(FenError, match="is not allowed after the model; dtype=auto"):
        parse(name, EngineOptions())
    options = parse("C:/m:dtype=float32,kv_cache_dtype=fp8", EngineOptions())
    assert (options.model, options.dtype, options.kv_cache_dtype) == ("C:/m", "float32", "fp8")
    assert parse("C:/m", EngineOptions()).model == "C:/m"


def test_the_readme_shows_what_was_measured() -> None:
    path, readme = RESULTS / "compare.json", (RESULTS.parents[1] / "README.md").read_text(encoding="utf-8")
    if not path.exists():
        assert "## What smaller forms cost in quality" not in readme
        return
    result = results.load(path, "compare")
    rows = comparison.rows_of(result)
    assert comparison.table(rows, result.data["batch"]) in readme
    assert " ".join(comparison.conditions(result).split()) in " ".join(readme.split())
    nearest, calibrated = ([row for row in rows if f"-{method}-" in row.name] for method in ("rtn", "gptq"))
    for plain, better in zip(nearest, calibrated, strict=True):
        assert better.kl_nats < plain.kl_nats and better.perplexity < plain.perplexity
        assert f"{better.kl_nats / plain.kl_nats:.0%} in groups of {plain.name[-2:]}" in readme
    assert len(nearest) == 2 and {"w8a16", "w8a8", "fp8"} < {row.name for row in rows}


def test_a_result_that_is_not_whole() -> None:
    for data in ({}, {"rows": [{"name": "m"}]}, {"rows": 7}):
        with pytest.raises(FenError, match="compare is not whole"):
            comparison.rows_of(results.new("compare", data))
