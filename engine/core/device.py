"""Which device an engine runs on, and its time."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch


def has_gpu() -> bool:
    """Whether PyTorch and Triton find a GPU that the kernels run on: NVIDIA's Ampere or newer."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


class DeviceClock:
    """When the device did what. Without CUDA the host does it, and the marks are times."""

    def __init__(self, cuda: bool):
        self._cuda = cuda
        self._anchor = self.mark(), time.monotonic()  # the device's clock and the host's

    def mark(self) -> Any:
        """A point in the stream of the device's work."""
        if not self._cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, started: Any, done: Any) -> tuple[float, float]:
        """Waits for the second mark. Returns when the first was, on the host's clock, and the seconds between them."""
        if not self._cuda:
            return started, done - started
        waited = not done.query()
        done.synchronize()
        now, seconds = time.monotonic(), started.elapsed_time(done) / 1000
        if waited:  # it happened just now
            self._anchor = done, now
            return now - seconds, seconds
        event, at = self._anchor
        return at + event.elapsed_time(started) / 1000, seconds
