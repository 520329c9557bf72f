"""What the kernels know about the GPU they run on, and tile choices measured on it.

Every kernel has a pure function `config(...)` that chooses its tile from shapes and a `Gpu`. Choices measured on one
kind of GPU override it: `kernels/gpu/tuned/<name>.json`, written by `fen bench tune`, where <name> is the GPU's name in
lower case with everything else as underscores ("NVIDIA H100 80GB HBM3" -> nvidia_h100_80gb_hbm3):

    {"decode": {"bfloat16 d128 g4 block64": {"tile": {"block_n": 64, "num_warps": 4, "num_stages": 3}, "us": 41.2}}}

The outer key is the kernel, the inner one the case as that kernel's `config` writes it, `tile` fields of its tile.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import TypeVar

import torch
import triton

TUNED = Path(__file__).parent / "tuned"
Tile = TypeVar("Tile")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The properties that a tile choice depends on."""

    name: str
    capability: int  # 90: sm_90
    multiprocessors: int
    shared_memory: int  # bytes one program may use


A100 = Gpu("NVIDIA A100-SXM4-80GB", 80, 108, 166_912)
L40S = Gpu("NVIDIA L40S", 89, 142, 101_376)
H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 132, 232_448)


@functools.lru_cache
def current_gpu() -> Gpu:
    """The GPU that Triton would launch on. In the interpreter, which has none: an H100."""
    if triton.knobs.runtime.interpret:
        return H100
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    properties = driver.utils.get_device_properties(device)
    capability = int(driver.get_current_target().arch)
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else f"sm_{capability}"
    return Gpu(name, capability, properties["multiprocessor_count"], properties["max_shared_mem"])


BUCKETS = (16, 32, 64, 128, 256)


def bucket(m: int) -> int:
    """The row counts that share a tile: up to 16, 32, 64, 128, and everything above."""
    return next((b for b in BUCKETS if m <= b), BUCKETS[-1])


def tuned(gpu: Gpu, kernel: str, case: str, default: Tile) -> Tile:
    """`default` (a dataclass of tile sizes) with the fields replaced that were measured to be better for this case."""
    entry = _measured(gpu.name).get(kernel, {}).get(case)
    if entry is None:
        return default
    unknown = sorted(set(entry["tile"]) - {field.name for field in dataclasses.fields(default)})  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"{tuned_path(gpu.name).name}: {kernel}: {case}: unknown tile fields {', '.join(unknown)}")
    return dataclasses.replace(default, **entry["tile"])  # type: ignore[type-var]


def tuned_path(name: str) -> Path:
    """The file of the GPU of this name."""
    return TUNED / (re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json")


@functools.lru_cache
def _measured(name: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    path = tuned_path(name)
    return json.loads(path.read_text()) if path.exists() else {}
