"""A case made ready to run: the same call on several sets of buffers, its baselines, its cost and its error."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.kernel_cases import Case
from bench.timing import Call

OWN = ("bench", "engine", "kernels", "seeds", "server")
Rounding = {torch.float32: 2.0**-21, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # relative, of one rounding


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a case runs. cache_bytes: of the cache that buffers have to exceed (0: one set will do). flex: compile
    FlexAttention for every shape, which takes seconds each. baselines: build them at all. tile: instead of the one that
    the kernel's `config` chooses."""

    device: torch.device
    cache_bytes: int
    flex: bool = False
    baselines: bool = True
    tile: Any = None

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator(seed)).to(dtype)


@dataclasses.dataclass
class Operation:
    """calls: the operation on one set of buffers each. baselines: the same by other means; a text says why one is not
    run. bytes, flops: the least that one call has to move and to do; rate: dtype whose matmul rate bounds the flops.
    error: runs the first call on poisoned outputs; (error against float32, how large it may be), NaN where wrong."""

    calls: list[Call]
    bytes: int
    flops: int
    rate: str
    error: Callable[[], tuple[float, float]]
    baselines: dict[str, list[Call] | str] = dataclasses.field(default_factory=dict)


class BenchError(Exception):
    """A benchmark cannot do what it was asked for; the message is the sentence for the user."""


Prepare = Callable[[Case, Place], Operation]


def add_baseline(operation: Operation, place: Place, name: str, build: Callable[[], Sequence[Call]]) -> None:
    """Builds a baseline and runs it once; what it raises is kept as the reason that it has no time."""
    if not place.baselines:
        return
    try:
        calls = list(build())
        calls[0]()
        if place.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # other people's code on hardware that nobody tried it on
        operation.baselines[name] = reason(error)
    else:
        operation.baselines[name] = calls


def reason(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def outcome(error: Exception) -> dict[str, str]:
    """{"not_run": why} where a machine lacks something: a library, a model's files, memory. Anything else is
    {"failed": why}."""
    engine = sys.modules.get("engine.errors")  # the engine's libraries may be missing; then its errors are not these
    if isinstance(error, ModuleNotFoundError):
        lacking = (error.name or "").partition(".")[0] not in OWN
    elif engine is not None and isinstance(error, (engine.CheckpointError, engine.CapacityError)):
        lacking = True
    else:
        lacking = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return {"not_run" if lacking else "failed": reason(error)}


def largest(*values: float) -> float:
    """Unlike max, NaN if any value is."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact| in the Euclidean norm; NaN if anything is."""
    return ((got.float() - exact).norm() / exact.norm()).item()


def elementwise(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest error of an element relative to it, one rounding of its dtype); near zero, 2e-7 is always allowed."""
    allowed = Rounding[got.dtype] + 1e-6
    return ((got.float() - exact).abs() / (exact.abs() + 2e-7 / allowed)).max().item(), allowed
