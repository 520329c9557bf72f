"""Which device an engine runs on, and its time."""

from __future__ import annotations

import importlib.util
import itertools
import time
from typing import Any

import torch


def has_gpu() -> bool:
    """Whether PyTorch and Triton find a GPU that the kernels run on: NVIDIA's Ampere or newer."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def copy_bandwidth() -> float:
    """Bytes a second that the GPU's memory moves, read and written; 0.0 where there is no room to measure it."""
    try:
        source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
    except torch.OutOfMemoryError:
        return 0.0
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for event in events:
        event.record()
        target.copy_(source)
    torch.cuda.synchronize()
    best: float = min(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return 2000 * source.nbytes / best


def batch_sizes(most: int) -> list[int]:
    """Of captured decodes: 1, 2, 4, 8, 12, 16, 24, 32, 48 ... and `most`."""
    sizes = {1, 2, 4, most} | {n << i for i in range(most.bit_length()) for n in (8, 12)}
    return sorted(n for n in sizes if n <= most)


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
