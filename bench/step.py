"""`fen bench step`: one decode step, launch by launch, on random weights of a model's shape.

Every launch is timed by itself, in a graph of its own (CPU: a loop of its own) over the buffers of all layers; then the
whole step. What is left between the sum and the step has a row, so the column adds up to the step. Beside each stands
the least time that its bytes and its FLOPs take at the limits measured in the same run; these add up to the roofline.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import kernel_cases, kernels, results
from bench.ceilings import Ceilings, measure_ceilings
from bench.kernel_cases import FORMATS, Case, Shape
from bench.machine import Disturbance
from bench.operations import BenchError, Operation, Place
from bench.report import markdown_table
from bench.timing import Call, measure


@dataclasses.dataclass(frozen=True)
class Launch:
    """count: times in a step. operation: its calls, one for each layer or more than one for what comes once."""

    name: str
    count: int
    operation: Operation


@dataclasses.dataclass(frozen=True)
class StepTime:
    """us: of the whole step. rows: one for each kind of launch, microseconds of all its launches in a step."""

    us: float
    rows: list[dict[str, Any]]


def run(
    model: str, batch: int, context: int, weights: str, threads: int | None = None, json_path: str | None = None,
    fused: bool = False,
) -> None:  # fmt: skip
    """Prints the table of a step of `batch` sequences with `context` tokens each. BenchError: an unknown model or
    format, or `fused` on a CPU."""
    if model not in kernel_cases.MODELS:
        raise BenchError(f"{model!r} is not a known shape; known are {', '.join(kernel_cases.MODELS)}.")
    if weights not in FORMATS:
        raise BenchError(f"{weights!r} is not a known format; known are {', '.join(FORMATS)}.")
    torch.set_grad_enabled(False)
    place, _ = kernels.choose(threads=threads)
    cpu = place.device.type == "cpu"
    if cpu and weights != "Q4_1":
        raise BenchError(f"On a CPU the 4-bit weights are Q4_1; {weights} runs on a GPU.")
    if cpu and fused:
        raise BenchError("--fused are launches of a GPU, and PyTorch finds none here.")
    if json_path is not None:
        results.check_writable(Path(json_path))
    meanwhile = Disturbance(os.getpid())
    ceilings = measure_ceilings(place.device)
    print(kernels.describe(ceilings, kernels.device_name(place.device)))
    shape = kernel_cases.MODELS[model]
    make = (
        functools.partial(cpu_launches, shape, batch, context)
        if cpu
        else functools.partial(gpu_launches, shape, batch, context, weights, fused=fused)
    )
    timed = measure_step(make(place), place.device, ceilings, kernels.SECONDS)
    kind = f"{weights}{', fused' if fused else ''}"
    print(f"\n{model}, {kind}, random weights: one decode step of {batch} sequences with {context} tokens each")
    print(render(timed))
    print(kernels.disturbed(meanwhile))
    if json_path is not None:
        data = kernels.conditions(ceilings, meanwhile) | {"batch": batch, "context": context, "fused": fused}
        data |= {"us": timed.us, "launches": timed.rows}
        device = kernels.device_name(place.device)
        results.save(Path(json_path), results.new("step", data, model=model, quantization=weights, device=device))


def measure_step(launches: Sequence[Launch], device: torch.device, ceilings: Ceilings, seconds: float) -> StepTime:
    rows = []
    for launch in launches:
        operation = launch.operation
        each = measure(operation.calls, device, seconds).median * 1e6
        rows.append(
            {
                "launch": launch.name,
                "count": launch.count,
                "us": each * launch.count,
                "bytes_us": launch.count * operation.bytes / ceilings.bandwidth * 1e6,
                "flops_us": launch.count * operation.flops / ceilings.rates[operation.rate] * 1e6,
            }
        )
    whole = measure([functools.partial(_step, launches)], device, 5 * seconds).median * 1e6
    between = whole - sum(row["us"] for row in rows)
    rows.append({"launch": "between launches", "count": 0, "us": between, "bytes_us": 0.0, "flops_us": 0.0})
    return StepTime(whole, rows)


def _step(launches: Sequence[Launch]) -> None:
    """All launches in the order of a forward pass: what comes once a layer, layer by layer, then the rest."""
    layers = max(launch.count for launch in launches)
    for layer in range(layers):
        for launch in launches:
            if launch.count == layers:
                launch.operation.calls[layer % len(launch.operation.calls)]()
    for launch in launches:
        if launch.count < layers:
            launch.operation.calls[0]()


def render(timed: StepTime) -> str:
    cells = [
        [
            row["launch"],
            str(row["count"] or ""),
            f"{row['us']:,.1f}",
            f"{row['bytes_us']:,.1f}",
            f"{row['flops_us']:,.1f}",
            f"{row['us'] - max(row['bytes_us'], row['flops_us']):,.1f}",
        ]
        for row in timed.rows
    ]
    floor = sum(max(row["bytes_us"], row["flops_us"]) for row in timed.rows)
    totals = [f"{sum(row[key] for row in timed.rows):,.1f}" for key in ("bytes_us", "flops_us")]
    cells.append(
        [
            "the step",
            str(sum(row["count"] for row in timed.rows)),
            f"{timed.us:,.1f}",
            *totals,
            f"{timed.us - floor:,.1f}",
        ]
    )
    header = ["launch", "in a step", "µs", "bytes, µs", "FLOPs, µs", "gap, µs"]
    return markdown_table(header, cells) + f"\n{floor / timed.us:.0%} of the roofline"


def gpu_launches(
    shape: Shape, batch: int, context: int, weights: str, place: Place, fused: bool = False
) -> list[Launch]:
    """The plain set of the GPU path: nine launches a layer, then norm, head and sampling; fused: six a layer.
    Activations are float16; the head is dense float16."""
    from bench import gpu_operations, layer_operations
    from bench.timing import copies

    place = dataclasses.replace(place, baselines=False)
    wanted = dataclasses.replace(place, cache_bytes=0)
    layers = shape.layers
    once = functools.partial(_once, layers)

    def each(name: str, operation: Operation) -> Launch:
        return Launch(name, layers, operation)

    case = Case("layer", shape, batch, weights)
    one = layer_operations.Products(case, wanted)
    products = layer_operations.Products(case, dataclasses.replace(place, cache_bytes=one.bytes * layers // 2))
    fusions = layer_operations.ALL if fused else layer_operations.PLAIN
    parts = [
        each(part.name, Operation(part.calls, part.bytes, part.flops, "float16", lambda: (0.0, 0.0)))
        for part in products.launches(fusions)
    ]
    behind_qkv = next(i for i, part in enumerate(parts) if part.name.startswith("qkv")) + 1
    rope = each(
        "rope, cache write", gpu_operations.prepare(Case("rope_and_cache_write", shape, batch, "float16"), wanted)
    )
    attention = kernel_cases.decode(shape, (context,) * batch, "float16")
    pages = gpu_operations.prepare(attention, wanted)
    pages = gpu_operations.prepare(attention, dataclasses.replace(place, cache_bytes=pages.bytes * layers // 2))
    n, k = shape.vocab, shape.hidden
    x = place.normal(batch, k, dtype=torch.float16)
    logits = torch.empty(batch, n, device=place.device)
    heads = [place.normal(n, k, dtype=torch.float16, seed=i) for i in range(copies(2 * n * k, place.cache_bytes, 8))]
    calls: list[Call] = [functools.partial(_head, x, head, logits) for head in heads]
    head = Operation(calls, 2 * n * k + batch * (2 * k + 4 * n), 2 * batch * n * k, "float16", lambda: (0.0, 0.0))
    sampled = Case("sample", shape, batch, "float32", options=kernel_cases.SAMPLING[0])
    return [
        *parts[:behind_qkv],
        rope,
        each("attention", pages),
        *parts[behind_qkv:],
        once("last norm", gpu_operations.prepare(Case("add_rmsnorm", shape, batch, "float16"), wanted)),
        once("head", head),
        once("sampling", gpu_operations.prepare(sampled, place)),
    ]


def _head(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:  # the interpreter's float32 logits, at the price of a copy
        torch.mm(x.float(), weight.float().t(), out=logits)


def _once(layers: int, name: str, operation: Operation) -> Launch:
    assert layers > 1, "a step of one layer has no order"
    return Launch(name, 1, operation)


def cpu_launches(shape: Shape, batch: int, context: int, place: Place) -> list[Launch]:
    """The CPU path: 4-bit weights as they are for few rows, packed ones above; a head in packed float16 or float32."""
    from bench import cpu_operations
    from kernels.cpu.linear import head_plan, plan

    place = dataclasses.replace(place, baselines=False)
    body = plan(torch.bfloat16, False, 1 << 40, 0)
    few = batch <= body.few_rows
    dtype = str(body.dtype(batch)).removeprefix("torch.")
    logits = str(head_plan(body).few).removeprefix("torch.")

    def each(kernel: str, name: str) -> Launch:
        return Launch(name, shape.layers, cpu_operations.prepare(Case(kernel, shape, batch, dtype), place))

    def linear(layer: str) -> Launch:
        case = Case("linear", shape, batch, "Q4_1" if few else dtype, layer)
        return Launch(layer, shape.layers, cpu_operations.prepare(case, place))

    attention = kernel_cases.decode(shape, (context,) * batch, "float16")
    vocabulary = dataclasses.replace(shape, layers=1, intermediate=shape.vocab // 2)  # the head as a gate_up
    head = cpu_operations.prepare(Case("linear", vocabulary, batch, logits, "gate_up"), place)
    sampled = Case("sample", shape, batch, "float32", options=kernel_cases.SAMPLING[1])
    once = functools.partial(_once, shape.layers)
    return [
        each("add_rmsnorm", "norm before attention"),
        linear("qkv"),
        each("rope_and_cache_write", "rope, cache write"),
        Launch("attention", shape.layers, cpu_operations.prepare(attention, place)),
        linear("o"),
        each("add_rmsnorm", "norm before MLP"),
        linear("gate_up"),
        each("silu_mul", "silu · up"),
        linear("down"),
        once("last norm", cpu_operations.prepare(Case("add_rmsnorm", shape, batch, dtype), place)),
        once("head", head),
        once("sampling", cpu_operations.prepare(sampled, place)),
    ]
