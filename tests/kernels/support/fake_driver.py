"""Runs the host side of Triton on a machine without a GPU: real specialisation, real compilation, fake launches.

Outputs are not written. What it shows: how many launches a call makes, and whether a call compiles a new variant.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.kernels.support.codegen import SHARED_MEMORY

MULTIPROCESSORS = {80: 108, 89: 128, 90: 132}


class FakeDriver(DriverBase):
    """A CUDA driver of the given compute capability whose tensors live on the CPU. `launches[kernel name]` counts."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.launches: Counter[str] = Counter()
        self.utils = self
        launches = self.launches

        class Launcher:  # one per compiled kernel
            def __init__(self, src: Any, metadata: Any) -> None:
                self.name = src.fn.__name__

            def __call__(self, *args: Any, **kwargs: Any) -> None:
                launches[self.name] += 1

        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.capability],
            "multiprocessor_count": MULTIPROCESSORS[self.capability],
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads a block may have

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "void*"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        raise NotImplementedError("the fake driver has no device to time on")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the fake driver has no device to time on")

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError("the fake driver has no device to time on")

    def clear_cache(self, cache: Any) -> None:
        pass


def install(capability: int = 90) -> FakeDriver:
    """Makes Triton use a new fake driver from now on. Variants compiled before it stay cached in their kernels."""
    driver = FakeDriver(capability)
    triton.runtime.driver.set_active(driver)
    return driver


def variants(kernel: Any) -> int:
    """Number of compiled specialisations of a `@triton.jit` function so far."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())
