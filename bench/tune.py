"""`fen bench tune`: tries tiles on this GPU and writes the faster ones to kernels/gpu/tuned/<gpu>.json, with their µs.

From the tile that `config` gives, one field after another takes the value that is fastest, until a round changes
nothing. A tile counts only if its result is right. The kernels read the file at start (kernels/gpu/tiles.py); nothing
is tuned while serving.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from bench import kernel_cases, kernels
from bench.kernel_cases import EIGHT_BITS, FORMATS, MODELS, Case
from bench.operations import BenchError, Place
from bench.report import write_json
from bench.timing import measure

Tile = TypeVar("Tile")
MARGIN = 0.98  # of the time before: less of a gain is noise
MATMUL = {
    "block_n": (64, 128, 256),
    "block_k": (64, 128),
    "split": (1, 2, 3, 4, 6, 8, 12, 16),
    "num_stages": (2, 3, 4, 5),
    "num_warps": (4, 8),
}
CHOICES: dict[str, dict[str, Sequence[int]]] = {
    "w4a16": MATMUL,
    "w8a16": MATMUL,
    "w8a8": MATMUL,
    "decode": {"block_n": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (2, 4, 8)},
    "layer": {"silu": (False, True), "norm": (False, True)},
    "prefill": {"block_m": (64, 128), "block_n": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
}


def run(only: str = "") -> None:
    """Tunes the cases whose "kernel case" contains `only`. BenchError without a GPU, or if there is no such case."""
    if not torch.cuda.is_available():
        raise BenchError("Tuning measures on a GPU, and PyTorch finds none here.")
    from kernels.gpu import tiles

    torch.set_grad_enabled(False)
    place = Place(torch.device("cuda"), kernels.l2_bytes(), baselines=False)
    gpu = tiles.current_gpu()
    chosen = [case for case in cases() if only in f"{case.kernel} {case.label}"]
    if not chosen:
        raise BenchError(f"No case contains {only!r}; they are named like 'decode llama-3-8b bfloat16 kv 16x8192'.")
    path = tiles.tuned_path(gpu.name)
    entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for case, name, default in named(chosen, gpu):
        time = functools.lru_cache(None)(functools.partial(seconds, case, place))
        tile, best = descend(default, CHOICES[case.kernel], time)
        before = time(default)
        print(f"{case.kernel} {case.label}: {before * 1e6:,.1f} -> {best * 1e6:,.1f} µs {tile}", flush=True)
        if tile != default:
            entry = {"tile": dataclasses.asdict(tile), "us": best * 1e6, "before_us": before * 1e6}
            entries.setdefault(case.kernel, {})[name] = entry
            write_json(path, entries)
            _forget()
    print(f"kept in {path}" if path.exists() else "No tile was found that is faster: no file is written.")


def _forget() -> None:
    """Of what the file said so far: layers are measured last, on the tiles that they will have."""
    from kernels.gpu import linear_w4, linear_w8, tiles

    for cache in (tiles._measured, linear_w4.config, linear_w8.config):
        cache.cache_clear()


def cases() -> list[Case]:
    """One for each entry that a kernel's `config` looks up for the four models."""
    found = []
    for shape in MODELS.values():
        formats = ["Q4_1"] if shape is kernel_cases.SMOLLM2 else [f for f in FORMATS if "zero" not in f]
        rows = (16, 32, 64, 128, 512)
        found += [kernel_cases.linear(shape, layer, m, f) for layer in shape.linears for f in formats for m in rows]
        found += [Case("layer", shape, m, formats[-1]) for m in (16, 32, 64)]
        for layer in shape.linears:
            eight = kernel_cases.eight_bit(shape, layer, rows, (*kernel_cases.PER_ROW, "int8 g128", "Q6_K"))
            found += [case for case in eight if (case.kernel, case.dtype) != ("w8a16", "fp8 row")]  # int8's tile
        for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn"):
            found.append(kernel_cases.decode(shape, (8192,) * 16, dtype))
            found.append(kernel_cases.prefill(shape, (4096,), dtype=dtype))
    return found


def named(chosen: Sequence[Case], gpu: Any) -> Iterator[tuple[Case, str, Any]]:
    """Each case with its name in the file and the tile that it has now."""
    from kernels.gpu import attention, epilogue, linear_w4, linear_w8

    for case in chosen:
        shape = case.shape
        if case.kernel == "layer":
            group, zero_point = FORMATS[case.dtype]
            sizes = case.rows, *shape.linears["gate_up"], f"w4 g{group}{' zero' if zero_point else ''}"
            yield case, epilogue.case_name(*sizes), epilogue.config(*sizes, gpu)
            continue
        if case.kernel == "w4a16":
            n, k = shape.linears[case.layer]
            sizes = case.rows, n, k, FORMATS[case.dtype][0], torch.float16
            tile = linear_w4.config(*sizes, gpu)
            if tile is not None:
                yield case, linear_w4.case_name(*sizes), tile
        elif case.kernel in ("w8a16", "w8a8"):
            kind, group, _ = EIGHT_BITS[case.dtype]
            n, k = shape.linears[case.layer]
            x_dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind] if case.kernel == "w8a8" else torch.float16
            if x_dtype == torch.float8_e4m3fn and gpu.capability < 89:
                continue
            sizes = case.rows, n, k, group or k, x_dtype
            tile = linear_w8.config(*sizes, gpu)
            if tile is not None:
                yield case, linear_w8.case_name(*sizes), tile
        else:
            config = attention.decode_config if case.kernel == "decode" else attention.prefill_config
            key = shape.heads, shape.kv_heads, shape.head_dim, case.block_size, getattr(torch, case.dtype), gpu
            yield case, attention.case_name(*key), config(*key)


def seconds(case: Case, place: Place, tile: Any) -> float:
    """Of one call with this tile; infinite where it does not compile, does not fit or is not right."""
    from bench.gpu_operations import prepare

    try:
        operation = prepare(case, dataclasses.replace(place, tile=tile))
        error, allowed = operation.error()
        return measure(operation.calls, place.device, 0.05).median if error <= allowed else math.inf
    except Exception:
        torch.cuda.synchronize()  # what has broken the device ends the run here
        return math.inf


def descend(tile: Tile, choices: Mapping[str, Sequence[int]], time: Callable[[Tile], float]) -> tuple[Tile, float]:
    """The fastest tile that is reached from `tile` by changing one field at a time, and its time."""
    best, changed = time(tile), True
    while changed:
        changed = False
        for field, values in choices.items():
            for value in values:
                other = dataclasses.replace(tile, **{field: value})  # type: ignore[type-var]
                if other != tile and (found := time(other)) < MARGIN * best:
                    tile, best, changed = other, found, True
    return tile, best
