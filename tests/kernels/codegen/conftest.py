"""Kernels compiled for sm_80, sm_89 and sm_90, and their host path on a fake driver."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("tests/kernels/codegen compiles kernels: unset TRITON_INTERPRET")
