"""Which device an engine runs on."""

from __future__ import annotations

import importlib.util

import torch


def has_gpu() -> bool:
    """Whether PyTorch and Triton find a GPU that the kernels run on: NVIDIA's Ampere or newer."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)
