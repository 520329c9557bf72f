"""A pytest plugin: under CI=true a test that skips because a program is missing has failed.

Such skips say "needs node", "needs chromium". What no installation provides may still skip: a GPU, CPU instructions.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

HARDWARE = ("GPU", "AMX", "AVX")


def _forbidden(reason: str) -> bool:
    return (
        os.environ.get("CI", "").lower() in ("1", "true")
        and "needs " in reason.lower()
        and not any(word in reason for word in HARDWARE)
    )


def _fail_if_forbidden(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome == "skipped" and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if _forbidden(reason):
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: skipped under CI=true: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_forbidden(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _fail_if_forbidden(report)
    return report
