"""`make test` cannot pass by not testing: missing programs fail under CI, and a failing suite fails the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import run

ROOT = Path(__file__).resolve().parent.parent
SKIPPING = """
import pytest

def test_program():
    pytest.skip("needs node")

def test_hardware():
    pytest.skip("needs a GPU")

def test_fine():
    pass
"""
MODULE = 'import pytest\npytest.skip("needs chromium", allow_module_level=True)\n'


@pytest.mark.parametrize(
    ("ci", "counts"), [("true", "1 failed, 1 passed, 1 skipped, 1 error"), ("", "1 passed, 3 skipped")]
)
def test_a_missing_program_is_a_failure_under_ci(tmp_path: Path, ci: str, counts: str) -> None:
    (tmp_path / "test_example.py").write_text(SKIPPING)
    (tmp_path / "test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.skips", "-c", os.devnull]
    result = subprocess.run(
        [*command, "--continue-on-collection-errors", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert counts in result.stdout.splitlines()[-1], result.stdout
    assert result.returncode == (1 if ci else 0)


@pytest.mark.parametrize(("body", "status"), [("assert True", 0), ("assert False", 1)])
def test_a_suite_reports_its_status_and_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, status: int
) -> None:
    (tmp_path / "test_example.py").write_text(f"def test_it():\n    {body}\n")
    suite = run.Suite("example", [str(tmp_path / "test_example.py")], {})
    passed_on, held_back = run.run_suite(suite, []), run.run_suite(suite, [], hold=True)
    assert passed_on.status == held_back.status == status
    for outcome in (passed_on, held_back):
        assert ("1 failed" if status else "1 passed") in outcome.last
    assert capsys.readouterr().out.count("passed") == (0 if status else 1)
    assert passed_on.held == "" and held_back.last in held_back.held
