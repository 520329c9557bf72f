"""Chooses which of the two Triton test folders a pytest process collects.

`@triton.jit` decides when it decorates whether a kernel is interpreted or compiled: a process can hold only one kind.

    TRITON_INTERPRET=1 pytest tests/kernels/interpreter     numbers: every kernel against its float32 oracle
    pytest tests/kernels/codegen                            machine code and host path, for GPUs that need not be here

A run that names neither (`pytest`, `pytest tests`) leaves both out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
OWN_PROCESS = (HERE / "interpreter", HERE / "codegen")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in OWN_PROCESS:
        return None
    named = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True
