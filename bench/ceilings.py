"""What this machine can do at best, measured: bytes moved a second, and multiply-adds a second."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable

import torch

from bench.timing import graph_time

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 4096  # of the matrix that is read
REPETITIONS = 7


def read_bandwidth(num_bytes: int) -> float:
    """Bytes a second at which the CPU reads a buffer of `num_bytes`, over and over, with torch's current threads.

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
    """FLOPs a second of a square matrix product on the CPU, with torch's current threads."""
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


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes a second. rates: FLOPs a second of a matrix product, by dtype. measured: how, in words."""

    bandwidth: float
    rates: dict[str, float]
    measured: str

    def floor(self, num_bytes: float, flops: float, dtype: str) -> tuple[float, str]:
        """Seconds that no implementation can be faster than, and which limit that is: "memory" or "compute"."""
        by_bytes = num_bytes / self.bandwidth
        by_flops = flops / self.rates[dtype] if dtype in self.rates else 0.0  # 8 bits: not every device has a rate
        return (by_bytes, "memory") if by_bytes >= by_flops else (by_flops, "compute")


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """The limits of a device, measured now; `small`: on sizes that say nothing, to try the code out."""
    if device.type == "cpu":
        size, side = (1 << 20, 64) if small else (96 << 20, 1024)
        rates = {str(d).removeprefix("torch."): matmul_rate(d, side) for d in DTYPES}
        return Ceilings(read_bandwidth(size), rates, f"read of {size >> 20} MiB, matrix products of {side}")
    num_bytes, side = 1 << 30, 8192
    source = torch.empty(num_bytes // 2, dtype=torch.float16, device=device).normal_()
    target = torch.empty_like(source)
    copy = graph_time([lambda: target.copy_(source)], 0.2)
    rates = {}
    for dtype in DTYPES:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates[str(dtype).removeprefix("torch.")] = (
            2.0 * side**3 / graph_time([functools.partial(torch.mm, a, b, out=out)], 0.2).median
        )
    rates |= _eight_bit_rates(device, side)
    return Ceilings(
        2 * num_bytes / copy.median, rates, f"copy of {num_bytes >> 30} GiB, read and written; products of {side}"
    )


def _eight_bit_rates(device: torch.device, side: int) -> dict[str, float]:
    """Of torch's int8 and float8 products, where the device has them."""
    one, found = torch.ones((), device=device), {}
    scaled = functools.partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    products: dict[torch.dtype, Callable[..., object]] = {torch.int8: torch._int_mm, torch.float8_e4m3fn: scaled}
    for dtype, product in products.items():
        a, b = (torch.randint(-9, 9, (side, side), device=device).to(dtype) for _ in range(2))
        try:
            seconds = graph_time([functools.partial(product, a, b.t())], 0.2).median
        except (RuntimeError, ValueError):
            continue
        found[str(dtype).removeprefix("torch.")] = 2.0 * side**3 / seconds
    return found
