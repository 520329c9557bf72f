"""`fen cost --plan`, as a user types it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from tests.server.test_cli import fen_process


def test_a_plan_for_a_card_says_what_it_assumes(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = fen_process(
        "cost", "--plan", "llama-3-8b", "--device", "h100-80gb", "--weights", "w4a16", "--json", str(out)
    )
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for part in ("data sheet, not measured", "US$2.29 a device-hour", "says nothing about quality", "at full load"):
        assert part in text
    plan = json.loads(out.read_text())
    assert plan["bytes"]["weights"] < 8e9
    assert [row["batch"] for row in plan["batches"]] == [1, 8, 64]
    for row in plan["batches"]:
        prices = row["roofline"]["usd_per_million_tokens"]
        assert math.isclose(prices["generated"], 1e6 * 2.29 / 3600 / row["roofline"]["decode_tokens_per_second"])


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
    }
    config |= {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model in (tmp_path, tmp_path / "config.json"):
        result = fen_process("cost", "--plan", str(model), "--device", "l4", "--context", "4096")
        assert result.returncode == 0, result.stderr
        assert "3 sequences of 4,096 tokens" in " ".join(result.stdout.split())


def test_what_cannot_fit_or_is_not_known_is_one_sentence() -> None:
    for arguments, words in {
        ("--plan", "yi-34b", "--device", "l4"): "does not fit",
        ("--plan", "yi-34b", "--device", "h10"): "it must be cpu (this machine's) or one of h100-80gb",
        ("--plan", "yi-34b", "--device", "l4", "--weights", "w3"): "--weights is 'w3'; it must be one of",
        ("--plan", "yi-34b", "--device", "h200", "--price", "0"): "must be a number above 0",
        ("--plan", "no-such-model", "--device", "h200"): "there is no model 'no-such-model'",
        ("--plan", "/no/such/config.json", "--device", "h200"): "there is no model '/no/such/config.json'",
        (
            "--plan",
            "llama-3-8b-w4a16",
            "--device",
            "h200",
            "--context",
            "9999999",
        ): "--context is 9,999,999; llama-3-8b",
    }.items():
        result = fen_process("cost", *arguments)
        assert result.returncode == 1
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_this_cpu_is_measured(smollm2: Path) -> None:
    result = fen_process(
        "cost", "--plan", str(smollm2), "--prompt-tokens", "16", "--batch", "1", "--price", "cpu-4vcpu"
    )
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "measured here, in this run" in text
    assert "forecast" in text
