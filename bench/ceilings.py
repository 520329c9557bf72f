"""What this CPU can do at best, measured: bytes read a second, and multiply-adds a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

COLUMNS = 4096  # of the matrix that is read
REPETITIONS = 7


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second at which a buffer of `num_bytes` is read, over and over, with torch's current threads.

    The best repetition of the fastest of three operations that read every byte once. A buffer that fits a cache is
    read from there, as a model of that size would be.
    """
    rows = max(1, num_bytes // (4 * COLUMNS))
    matrix = torch.ones(rows, COLUMNS)
    vector, out = torch.ones(COLUMNS), torch.empty(rows)
    operations: list[Callable[[], object]] = [
        lambda: torch.mv(matrix, vector, out=out),
        lambda: matrix.sum(),
        lambda: torch.sum(matrix, 1, out=out),
    ]
    return rows * COLUMNS * 4 / min(_seconds(operation) for operation in operations)


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """FLOPs a second of a square matrix product, with torch's current threads."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: torch.mm(a, b))


def _seconds(operation: Callable[[], object]) -> float:
    operation()
    best = float("inf")
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        operation()
        best = min(best, time.perf_counter() - started)
    return best
