"""Kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# The same draws in every run. An iteration of a kernel's loop costs 2 ms: no deadline, few examples.
settings.register_profile(
    "interpreter",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=12,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("tests/kernels/interpreter needs TRITON_INTERPRET=1 in the environment")
    from tests.kernels.support import interpreter

    interpreter.install()
    settings.load_profile("interpreter")
    torch.set_num_threads(1)
