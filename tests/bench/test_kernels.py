"""fen bench kernels, step and tune on the CPU, and the figures they are made of."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import kernel_cases, kernels, step, tune
from bench.ceilings import Ceilings
from bench.kernel_cases import TINY, Case
from bench.operations import Operation, Place, add_baseline, elementwise, largest, relative
from bench.results import load
from bench.timing import copies, wall_time
from server.cli import app

CPU = Place(torch.device("cpu"), 0)
LIMITS = Ceilings(1e9, {"bfloat16": 2e9, "float16": 2e9, "float32": 1e9}, "made up")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device: LIMITS)
    monkeypatch.setattr(step, "measure_ceilings", lambda device: LIMITS)


def operation(error: float, seconds: float = 0.0) -> Operation:
    return Operation([lambda: None], 1000, 4000, "float16", lambda: (error, 1e-3))


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in (kernel_cases.full(), kernel_cases.short(), kernel_cases.checks(), kernel_cases.cpu(), tune.cases()):
        assert len({(case.kernel, case.label) for case in cases}) == len(cases) > 10


def test_full_covers_what_is_asked_for() -> None:
    cases = kernel_cases.full()
    assert {case.shape.name for case in cases} == {"smollm2-135m", "yi-6b", "llama-3-8b", "yi-34b"}
    linears = [case for case in cases if case.kernel == "w4a16"]
    assert {case.rows for case in linears} >= {1, 16, 64, 256, 1024, 4096}
    contexts = {n for case in cases if case.kernel in ("decode", "prefill") for n in case.kv_lens}
    assert {128, 1024, 8192, 32768} <= contexts


def test_floor_is_the_larger_of_two_times() -> None:
    assert LIMITS.floor(1000, 100, "float16") == (1e-6, "memory")
    assert LIMITS.floor(1000, 4000, "float16") == (2e-6, "compute")


def test_copies_exceed_the_cache() -> None:
    assert copies(10, 100) == 20 and copies(1000, 100) == 2 and copies(1, 10**9, limit=64) == 64 and copies(5, 0) == 1


def test_wall_time_goes_through_all_calls() -> None:
    seen: list[int] = []
    time = wall_time([lambda: seen.append(0), lambda: seen.append(1)], 1e-4)
    assert seen[:4] == [0, 1, 0, 1] and len(seen) >= 8 and 0 < time.low <= time.median <= time.high


def test_errors_are_not_lost() -> None:
    exact = torch.tensor([1.0, 2.0, 1e-9])
    assert math.isnan(relative(torch.tensor([1.0, math.nan, 0.0]), exact)) and math.isnan(largest(0.1, math.nan))
    found, allowed = elementwise(torch.tensor([1.0, 2.1, 0.0]), exact)
    assert found == pytest.approx(0.1 / (2 + 2e-7 / allowed), rel=1e-4) and allowed < 1e-5
    assert elementwise(exact, exact)[0] == 0


def test_wrong_and_failing_kernels_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    def prepare(case: Case, place: Place) -> Operation:
        if case.rows == 3:
            raise RuntimeError("broken\nin two lines")
        made = operation(math.nan if case.rows == 2 else 1e-4)
        add_baseline(made, place, "same", lambda: made.calls)
        add_baseline(made, place, "other", lambda: [lambda: 1 / 0])
        return made

    cases = [Case("silu_mul", TINY, m) for m in (1, 2, 3)]
    rows = list(kernels.measured(cases, prepare, CPU, LIMITS, 0.0))
    assert [kernels.row_is_right(row) for row in rows] == [True, False, False]
    right = rows[0]
    assert right["share"] == pytest.approx(2e-6 / (right["us"] * 1e-6)) and right["limit"] == "compute"
    assert right["gb_s"] == pytest.approx(1000 / right["us"] / 1e3)
    assert right["baselines"]["same"]["speedup"] > 0 and "ZeroDivisionError" in right["baselines"]["other"]["not_run"]
    text = kernels.table(rows)
    assert "WRONG: over 1e-03" in text and "FAILED silu_mul" in text and "broken in two lines" in text
    assert "other: not run, ZeroDivisionError" in text


def test_targets_speak_of_the_faster_baseline() -> None:
    row = {
        "share": 0.9,
        "baselines": {"sdpa flash": {"us": 1, "speedup": 1.2}, "sdpa cudnn": {"us": 1, "speedup": 0.8}},
    }
    assert kernels._against("sdpa", row) == 0.8 and kernels._against("ceiling", row) == 0.9
    assert kernels._against("sdpa", {"baselines": {"sdpa flash": {"not_run": "no"}}}) is None
    large = kernel_cases.linear(kernel_cases.YI_34B, "gate_up", 16, "W4 g128")
    assert kernel_cases.target(large) == ("torch.mm bf16", 3.0)
    assert kernel_cases.target(dataclasses.replace(large, dtype="Q4_1")) == ("torch.mm bf16", 2.5)
    assert kernel_cases.target(kernel_cases.linear(kernel_cases.SMOLLM2, "qkv", 1, "Q4_1")) is None


@pytest.mark.parametrize("case", [case for case in kernel_cases.cpu(TINY) if case.rows == 16], ids=lambda c: c.label)
def test_cpu_operations_are_right_and_timed(case: Case) -> None:
    from bench.cpu_operations import prepare

    (row,) = kernels.measured([case], prepare, CPU, LIMITS, 0.0)
    assert kernels.row_is_right(row) and row["us"] > 0 and row["baselines"], row


def test_the_command_keeps_json_csv_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cases_for", lambda device, quick: kernel_cases.cpu(TINY)[:3])
    result = CliRunner().invoke(app, ["bench", "kernels", "--threads", "1", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no GPU" in result.stdout and "| linear" in result.stdout
    kept = load(tmp_path / "kernels.json", "kernels").data
    assert len(kept["rows"]) == 3 and kept["ceilings"]["bandwidth"] == LIMITS.bandwidth
    with (tmp_path / "kernels.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == [row["case"] for row in kept["rows"]] and float(lines[0]["us"]) > 0
    for name in ("roofline.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["kernels", "--only", "nothing"], "No case contains 'nothing'"),
        (["step", "--model", "gpt-2"], "known are smollm2-135m"),
        (["step", "--weights", "W4 g128"], "runs on a GPU"),
        (["tune"], "finds none here"),
        (["step", "--fused"], "finds none here"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU refuses less")
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1 and sentence in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_six_launches_or_nine() -> None:
    """The launches of a step as they are measured, and that what is fused moves no more than it has to."""
    code = (
        "import torch; from bench import kernel_cases as k, step; from bench.operations import Place;"
        "args = k.TINY, 2, 40, 'Q4_1', Place(torch.device('cpu'), 0);"
        "print(*('|'.join(f'{x.name} {x.count} {x.operation.bytes}' for x in step.gpu_launches(*args, fused=f)) "
        "for f in (False, True)), sep='\\n')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    plain, fused = ([line.rsplit(" ", 2) for line in text.split("|")] for text in result.stdout.strip().split("\n"))
    assert [len([name for name, count, _ in rows if count == "2"]) for rows in (plain, fused)] == [9, 6]
    assert [name for name, _, _ in fused[:6]] == [
        "qkv + norm", "rope, cache write", "attention", "o + addition", "gate_up + norm + silu", "down + addition",
    ]  # fmt: skip
    assert sum(int(moved) for _, _, moved in fused) < sum(int(moved) for _, _, moved in plain)


def test_a_steps_column_adds_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(kernel_cases.MODELS, "tiny", TINY)
    path = tmp_path / "step.json"
    options = ["--model", "tiny", "--context", "70", "--threads", "1", "--json", str(path)]
    result = CliRunner().invoke(app, ["bench", "step", *options])
    assert result.exit_code == 0, result.output
    kept = load(path, "step").data
    assert sum(row["us"] for row in kept["launches"]) == pytest.approx(kept["us"])
    assert sum(row["count"] for row in kept["launches"]) == 9 * TINY.layers + 3
    assert "| the step" in result.stdout and "of the roofline" in result.stdout


def test_a_step_runs_in_the_order_of_a_forward_pass() -> None:
    order: list[str] = []

    def launch(name: str, count: int) -> step.Launch:
        made = operation(0.0)
        made.calls = [lambda i=i: order.append(f"{name}{i}") for i in range(count)]  # type: ignore[misc]
        return step.Launch(name, count, made)

    step._step([launch("a", 2), launch("b", 2), launch("end", 1)])
    assert order == ["a0", "b0", "a1", "b1", "end0"]


@dataclasses.dataclass(frozen=True)
class Pair:
    x: int
    y: int


def test_tuning_descends_to_the_fastest_that_works() -> None:
    def time(tile: Pair) -> float:
        return math.inf if tile.x == 9 else 1 + abs(tile.x - 4) + abs(tile.y - 3)

    assert tune.descend(Pair(1, 1), {"x": (1, 2, 4, 9), "y": (1, 3)}, time) == (Pair(4, 3), 1)
    assert tune.descend(Pair(1, 1), {"x": (1, 2)}, lambda tile: 1 - tile.x / 100) == (Pair(1, 1), 0.99)  # noise


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_tuned_tiles_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.gpu import attention, epilogue, linear_w4, linear_w8, tiles

    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    chosen = [kernel_cases.decode(kernel_cases.YI_6B, (8192,)), kernel_cases.linear(TINY, "qkv", 16, "Q4_1")]
    chosen += [*kernel_cases.eight_bit(TINY, "qkv", (16,), ("int8 row",)), Case("layer", TINY, 16, "Q4_1")]
    entries: dict[str, dict[str, object]] = {}
    for case, name, tile in tune.named(chosen, tiles.H100):
        better = {"silu": True, "norm": True} if case.kernel == "layer" else {"num_stages": 7}
        better = dataclasses.asdict(dataclasses.replace(tile, **better))
        entries.setdefault(case.kernel, {})[name] = {"tile": better, "us": 1.0}
    tiles.tuned_path(tiles.H100.name).write_text(json.dumps(entries))
    for cache in (tiles._measured, linear_w4.config, linear_w8.config):
        cache.cache_clear()
    try:
        found = [tile for _, _, tile in tune.named(chosen, tiles.H100)]
        assert [tile.num_stages for tile in found[:-1]] == [7] * 4
        assert found[-1] == epilogue.Fusions(silu=True, norm=True)
        assert not epilogue.config(16, 256, 192, "w4 g128", tiles.H100).silu, "of other weights nothing is known"
        assert not epilogue.config(65, 256, 192, "w4 g32", tiles.H100).silu
        assert attention.decode_config(32, 4, 128, 16, torch.bfloat16, tiles.H100).num_stages != 7
    finally:
        for cache in (tiles._measured, linear_w4.config, linear_w8.config):
            cache.cache_clear()


def test_float8_only_where_there_are_instructions_for_it() -> None:
    cases = kernel_cases.checks() + kernel_cases.full()
    left = kernel_cases.possible(cases, (8, 0))
    gone = [case for case in cases if case not in left]
    assert {case.kernel for case in gone} == {"w8a8", "quantise_rows", "decode", "prefill", "rope_and_cache_write"}
    assert any(case.kernel == "w8a16" and case.dtype == "fp8 row" for case in left)
    assert kernel_cases.possible(cases, (8, 9)) == cases


def test_gpu_command_needs_none_of_the_engines_libraries() -> None:
    """A machine that only has PyTorch and Triton can run it."""
    missing = ["msgspec", "zmq", "fastapi", "gguf", "uvicorn", "typer", "tokenizers", "transformers", "llvmlite"]
    code = f"import sys\nfor name in {missing!r}:\n    sys.modules[name] = None\nimport bench.gpu_sections, bench.gpu"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_its_sections_of_the_engine_need_no_http() -> None:
    missing = ["zmq", "fastapi", "gguf", "uvicorn", "typer", "h11", "httpx", "prometheus_client", "llvmlite"]
    code = f"import sys\nfor name in {missing!r}:\n    sys.modules[name] = None\n"
    code += "import bench.gpu_sweep, bench.ladder_rung, bench.local_engine, bench.throughput, engine.core.gpu_runner"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_one_case_through_pytest_benchmark() -> None:
    pytest_command = [sys.executable, "-m", "pytest", "bench/test_kernels.py", "-q", "-p", "no:cacheprovider"]
    select = ["-k", "add_rmsnorm", "--benchmark-only", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    result = subprocess.run([*pytest_command, *select], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "2 passed" in result.stdout, result.stdout + result.stderr
