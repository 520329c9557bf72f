"""The files in deploy/: every metric they name is exported, every option exists, and systemd reads the unit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

import server.run
from engine.checkpoint import Tokenizer, open_checkpoint
from engine.messages import EngineStats, LedgerSnapshot
from server.cli import app
from server.cost import USE, WASTE
from tests.server.scripted import ScriptedEngine, ask

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"\b((?:vllm|fen):\w+|llm_\w+|process_\w+)")


@pytest.fixture(scope="module")
def exported(smollm2: Path) -> set[str]:
    """The sample names of /metrics once something ran, at a price."""
    tokenizer: Tokenizer = open_checkpoint(str(smollm2)).tokenizer
    classes = (*USE, *WASTE, "host", "idle", "startup", "in_flight")
    ledger = LedgerSnapshot(0.0, 10.0, dict.fromkeys(classes, 1.0), dict.fromkeys(USE, 100))
    engine = ScriptedEngine()
    engine.stats = EngineStats(ledger=ledger)
    engine.info = msgspec.structs.replace(engine.info, device="NVIDIA H100 80GB HBM3")  # one whose price is known
    return exported_by(ask(engine, tokenizer, "GET", "/metrics").text)


def exported_by(text: str) -> set[str]:
    """The names in a reply of /metrics."""
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    # A counter with labels has no sample before its first event; its family is announced all the same.
    families = re.findall(r"^# TYPE (\S+) (\S+)", text, re.MULTILINE)
    return names | {name for name, _ in families}


def expressions(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value[key] for key in ("expr", "query") if isinstance(value.get(key), str)]
        return own + [text for item in value.values() for text in expressions(item)]
    return [text for item in value for text in expressions(item)] if isinstance(value, list) else []


def named_in(file: str) -> set[str]:
    """The metrics that a file of deploy/ asks for."""
    content = yaml.safe_load((DEPLOY / file).read_text(encoding="utf-8"))  # JSON is YAML
    return {name for text in expressions(content) for name in METRIC.findall(text)}


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml"])
def test_every_metric_that_is_named_is_exported(exported: set[str], file: str) -> None:
    named = named_in(file)
    assert len(named) >= 4 and named <= exported, sorted(named - exported)


def test_vllms_own_dashboard_finds_its_metrics(exported: set[str]) -> None:
    """The names in the Grafana dashboard that vLLM publishes."""
    histograms = (
        "e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_prompt_tokens", "request_generation_tokens", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_max_num_generation_tokens",
    )  # fmt: skip
    plain = (
        "prompt_tokens_total", "generation_tokens_total", "num_requests_running", "num_requests_waiting",
        "kv_cache_usage_perc", "request_success_total", "prefix_cache_hits_total", "prefix_cache_queries_total",
    )  # fmt: skip
    wanted = {f"vllm:{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    wanted |= {f"vllm:{name}" for name in plain}
    assert wanted <= exported, sorted(wanted - exported)


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"].values()) for panel in panels]
    assert len(set(places)) == len(places)


def test_prometheus_scrapes_the_port_that_is_the_default() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["static_configs"][0]["targets"] == ["127.0.0.1:8000"]
    assert all((DEPLOY / file).is_file() for file in config["rule_files"])


def test_the_example_configuration_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(server.run, "serve", asked.append)
    lines = (DEPLOY / "fen.toml").read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("# ") for line in lines if re.match(r"(# )?[a-z-]+ = ", line)]
    file = tmp_path / "all.toml"
    file.write_text("\n".join(options))
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert result.exit_code == 0, result.stderr
    assert asked[0].api_key_file and asked[0].request_timeout == 600 and asked[0].log_format == "json"


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "fen.service").read_text(encoding="utf-8")
    assert "fen serve --config" in unit
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "fen"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "fen.service"
    copy.write_text(re.sub(r"ExecStart=\S+", f"ExecStart={program}", unit))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_image_is_made_of_what_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [part for line in lines if line.startswith("COPY") for part in line.split()[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    packages = re.search(r"packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert packages and set(re.findall(r'"(\w+)"', packages[1])) <= set(copied)
    variables = re.findall(r"\bFEN_(\w+)=", "\n".join(lines))
    assert {"HOST", "LOG_FORMAT", "CACHE"} <= set(variables)
