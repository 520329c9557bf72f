"""What `fen bench load` keeps, it does not measure again, and the README shows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench import results
from bench.load import command
from bench.load.scenarios import Beside
from bench.report import markdown_table
from engine.messages import EngineOptions

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "bench" / "results" / "load.json"


def lines() -> list[command.Line]:
    scenarios = results.load(KEPT, "load").data["scenarios"]
    return [command.Line(**line) for name in command.SCENARIOS for line in scenarios[name]["lines"]]


def test_resume_measures_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "load.json"
    shutil.copy(KEPT, path)
    before = path.read_bytes()
    command.run(EngineOptions(), 120.0, str(path), resume=True)  # nothing is: no server starts
    printed = capsys.readouterr().out
    assert all(line.what in printed for line in lines())
    assert path.read_bytes() == before


def test_the_readme_shows_what_is_kept() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in markdown_table(["line", "wanted", "measured", ""], [line.row() for line in lines()]).splitlines():
        assert f"  {row}\n" in readme, row


def test_a_turn_that_something_else_disturbed_does_not_decide() -> None:
    quiet, loud = [0.02] * 100, [0.03] * 100
    seen = Beside([quiet, quiet, quiet], [loud, [1.0] * 100, loud])
    assert seen.ratios() == pytest.approx([1.5, 50, 1.5])
