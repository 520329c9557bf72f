"""The one GPU command: its dry mode from end to end, and what it makes of results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_sweep, ladder_workload
from bench.gpu import Section
from bench.results import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
COMMAND = [sys.executable, "-m", "bench.gpu"]


def test_dry_run_goes_to_its_end(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*COMMAND, "--dry", "--output", str(tmp_path)], capture_output=True, text=True, env=environment, timeout=280
    )
    assert result.returncode == 0, result.stdout + result.stderr
    kept = load(tmp_path / "gpu.json", "gpu").data
    assert kept["dry"] and set(kept["sections"]) >= {"ceilings", "time w4", "step", "end to end tiny", "transformers"}
    unfinished = {name: section for name, section in kept["sections"].items() if not section["complete"]}
    assert not unfinished
    checked = [row for name, section in kept["sections"].items() if name.startswith("check") for row in section["rows"]]
    assert {row["kernel"] for row in checked} == {
        "w4a16", "dequant_w4", "w8a16", "w8a8", "dequant_w8", "quantise_rows", "decode", "prefill", "add_rmsnorm",
        "silu_mul", "rope_and_cache_write", "sample", "logprobs", "layer",
    }  # fmt: skip
    assert all(row["error"] <= row["allowed"] for row in checked)
    assert all(row["equal"] for row in kept["sections"]["graph equals eager"]["rows"])
    assert len(kept["sections"]["transformers"]["rows"]) == 2
    names = [row["name"] for row in kept["sections"]["ladder llama-3-8b"]["rows"]]
    assert [name.partition(", ")[2] for name in names] == [rung.name for rung in ladder_workload.load().gpu]
    (sweep,) = (section for name, section in kept["sections"].items() if name.startswith("sweep"))
    assert [row["concurrency"] for row in sweep["rows"]] == [1, 2]
    assert all(0 < row["usd_per_million"]["busy"] <= row["usd_per_million"]["wall"] for row in sweep["rows"])
    assert "below Yi-Lightning's US$0.14 a million from" in result.stdout
    assert "DRY RUN" in result.stdout and "the step" in result.stdout
    assert "six launches a layer" in result.stdout and "gate_up + norm + silu" in result.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = subprocess.run([*COMMAND, "--output", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "no GPU here" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_wrong_options_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, named in (
        (["--only", "zzz"], "--only is 'zzz'; sections are machine, ceilings, check w4 1 of 1,"),
        (["--output", str(tmp_path / "file" / "x")], "cannot be written: Not a directory"),
    ):
        command = [*COMMAND, "--dry", "--output", str(tmp_path), *options]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 2 and named in result.stderr and "Traceback" not in result.stderr


def _good(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    (folder / "ran").write_text((folder / "ran").read_text() + "x" if (folder / "ran").exists() else "x")
    yield {"value": 2}


def _raises(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    raise RuntimeError("the device is gone")


def _dies(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    os._exit(3)


def _hangs(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    time.sleep(60)
    yield {"value": 2}


def _lacks_memory(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    raise torch.OutOfMemoryError("3 GiB")


def _lacks_a_library(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    import no_such_library  # noqa: F401


def _lacks_our_own(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"value": 1}
    import kernels.no_such_part  # noqa: F401


def _absent(dry: bool, folder: Path) -> Iterator[dict[str, Any]]:
    yield {"not_run": "no such library"}


def test_sections_fail_alone_and_keep_what_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    batch = [
        Section("good", _good, 50, together=True),
        Section("raises", _raises, 50, together=True),
        Section("dies", _dies, 50, together=True),
        Section("absent", _absent, 50, together=True),
        Section("lacks memory", _lacks_memory, 50, together=True),
        Section("lacks a library", _lacks_a_library, 50, together=True),
        Section("lacks our own", _lacks_our_own, 50, together=True),
        Section("hangs", _hangs, 6, together=True),
    ]
    results = gpu.run_batch(batch, tmp_path, True, time.monotonic() + 60)
    assert results["good"]["complete"] and results["good"]["value"] == 2
    assert results["raises"]["not_finished"] == "RuntimeError: the device is gone"
    assert results["dies"]["not_finished"] == "the process ended with status 3"
    assert "cut_short" in results["hangs"] and results["absent"]["not_run"] == "no such library"
    assert all(results[name]["value"] == 1 for name in ("raises", "dies", "hangs"))
    assert {line.split(":")[0] for line in gpu.wrong(results)} == {"raises", "dies", "lacks our own"}
    assert results["lacks memory"]["not_run"] == "OutOfMemoryError: 3 GiB"
    assert "no_such_library" in results["lacks a library"]["not_run"]
    # Started again: what is complete is not done again.
    again = gpu.run_batch(batch[:1], tmp_path, True, time.monotonic() + 60)
    assert again["good"] == results["good"] and (tmp_path / "ran").read_text() == "x"
    monkeypatch.setattr(gpu, "commit", lambda: "def")
    assert gpu.run_batch(batch[:1], tmp_path, True, time.monotonic() + 60)["good"]["commit"] == "def"
    late = gpu.run_batch([Section("late", _good, 50)], tmp_path, True, time.monotonic())
    assert late == {"late": {"not_run": "no time left"}}


def test_from_which_concurrency_on_a_million_tokens_are_cheaper() -> None:
    rows = [
        {"concurrency": count, "usd_per_million": {"busy": busy, "wall": busy * 1.5}}
        for count, busy in ((1, 9.0), (8, 0.25), (64, 0.1))
    ]
    found = {line["usd_per_million"]: line["concurrency"] for line in gpu_sweep.cheaper_from([*rows, {"name": "x"}])}
    assert found == {0.14: {"busy": 64, "wall": None}, 0.26: {"busy": 8, "wall": 64}, 4.40: {"busy": 8, "wall": 8}}
    assert gpu_sweep.cheaper_from([{"name": "x", "not_run": "no memory"}]) == []


def test_report_names_what_is_wrong_and_what_was_not_run() -> None:
    row = {"kernel": "decode", "case": "x", "error": 1e-3, "allowed": 1e-2}
    target = {"against": "ceiling", "wanted": 0.85, "got": 0.5}
    baselines = {"gemlite": {"not_run": "ModuleNotFoundError"}}
    results: dict[str, Any] = {
        "machine": {"device": "a card", "capability": [8, 0]},
        "check attention 1 of 1": {"rows": [row | {"error": float("nan")}]},
        "time attention": {"rows": [row | {"us": 5.0, "target": target, "baselines": baselines}]},
        "graph equals eager": {"rows": [{"model": "m", "equal": False, "first": 7}]},
        "end to end": {
            "rows": [
                {"name": "llama", "tokens_per_second": 123.4, "wanted": 170.0},
                {"name": "yi", "failed": "KeyError"},
            ]
        },
        "transformers": {"not_run": "no time left"},
    }
    text = gpu.report(results, dry=False)
    assert "0.50 misses" in text and "123" in text and "not run: gemlite: ModuleNotFoundError" in text
    assert "not run: transformers: no time left" in text
    assert "WRONG: decode x: error nan" in text and "WRONG: m: graphs and eager execution differ from token 7" in text
    assert "WRONG: yi: KeyError" in text and "not run: float8 caches and products" in text


def test_errors_are_taken_from_the_checks_of_this_code_alone(tmp_path: Path) -> None:
    """One that is no number, one that is too large, a check that broke, and one of other code are looked at again."""
    from bench.gpu_sections import _checked
    from bench.machine import commit

    def row(case: str, error: float | None) -> dict[str, Any]:
        return {"kernel": "w4a16", "case": case, "error": error, "allowed": 1e-3}

    parts = tmp_path / "parts"
    parts.mkdir()
    rows = [row("right", 1e-4), row("nan", None), row("wrong", 1.0), {"kernel": "w4a16", "case": "x", "failed": "why"}]
    for name, part in {
        "check-w4": {"commit": commit(), "rows": rows},
        "check-w8": {"commit": commit(), "not_finished": "the process ended"},
        "check-other": {"commit": "0", "rows": [row("old", 1e-4)]},
    }.items():
        (parts / f"{name}.json").write_text(json.dumps(part))
    assert _checked(tmp_path) == {("w4a16", "right"): (1e-4, 1e-3)}
