"""`fen cost --plan`: what a model takes and costs on a device, from its header, before a weight is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

import seeds
from bench import results
from bench.prices import Price, parse_price, usd
from engine.checkpoint import Checkpoint, open_checkpoint, pull
from engine.checkpoint.dummy import SCHEMES, SHAPES
from engine.errors import FenError
from engine.messages import EngineOptions
from engine.planner import GIB, WEIGHTS, Machine, Plan, check_fit, plan

GPU_SHARE = 0.9  # of a GPU's memory, as --gpu-memory-utilization
NOTE = "Another model's price says nothing about quality."


@dataclasses.dataclass(frozen=True)
class Question:
    """What `fen cost --plan` was asked."""

    model: str
    device: str
    weights: str | None
    dtype: str
    context: int | None
    batches: list[int]
    prompt_tokens: int
    output_tokens: int
    price: str | None


def show_plan(question: Question, console: Console, json_path: str | None) -> None:
    """Raises FenError for what cannot be planned."""
    checkpoint = open_header(question.model)
    if question.weights is not None and question.weights not in WEIGHTS:
        raise FenError(f"--weights is {question.weights!r}; it must be one of {', '.join(WEIGHTS)}")
    if json_path is not None:
        results.check_writable(Path(json_path))
    asked = parse_price(question.price) if question.price is not None else None
    context = question.context or min(checkpoint.config.max_position, question.prompt_tokens + question.output_tokens)
    if context > checkpoint.config.max_position:
        raise FenError(
            f"--context is {context:,}; {checkpoint.name} has positions for {checkpoint.config.max_position:,} tokens"
        )
    options = EngineOptions(dtype=question.dtype, max_num_seqs=max(question.batches))
    if question.device == "cpu":
        machine, price, origin = _this_cpu(console), asked, "measured here, in this run"
    else:
        machine, price = _device(question.device, asked)
        origin = "of the maker's data sheet, not measured"
    planned = plan(checkpoint, machine, options, question.weights, gpu=question.device != "cpu")
    timed = None
    if question.device == "cpu" and question.weights is None:
        check_fit(planned, options)
        timed = _forecast(checkpoint, options, question, console)
    result = describe(checkpoint, planned, question, context, price, timed) | {"machine_figures": origin}
    print_plan(result, console)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    check_fit(planned, options)


def open_header(model: str) -> Checkpoint:
    """The checkpoint without its weights: of a hub id that is not here only config.json is fetched."""
    path = Path(model).expanduser()
    shape = any(model.removesuffix(suffix) in SHAPES for suffix in ("", *SCHEMES))
    if shape or (path.name == "config.json" and path.exists()):
        return open_checkpoint(model, "dummy")
    if path.is_dir() and (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return open_checkpoint(model, "dummy")
    if not path.exists() and pull.is_hub_id(model) and pull.cached(model) is None:
        return open_checkpoint(str(pull.pull_config(model)), "dummy")
    return open_checkpoint(model)


def describe(
    checkpoint: Checkpoint, planned: Plan, question: Question, context: int, price: Price | None, timed: Any
) -> dict[str, Any]:
    """Everything as JSON. Prices are those of the work alone (basis busy), at full load."""
    rows = []
    prompt, output = question.prompt_tokens, question.output_tokens
    for batch in question.batches:
        row: dict[str, Any] = {"batch": batch, "fits": batch <= planned.sequences(context)}
        sources = {"roofline": (planned.prefill(prompt), planned.decode(batch, prompt + output // 2))}
        if timed is not None:
            sources["forecast"] = (timed.prefill, timed.decode[batch])
        for name, (prefill, step) in sources.items():
            row[name] = {
                "prefill_tokens_per_second": prompt / prefill,
                "decode_tokens_per_second": batch / step,
                "usd_per_million_tokens": price and _prices(price, prefill / prompt, step / batch),
            }
        rows.append(row)
    machine = dataclasses.asdict(planned.machine)
    return {
        "model": checkpoint.name,
        "weights": question.weights or checkpoint.quantization,
        "made_up_weights": checkpoint.format == "dummy",
        "machine": machine,
        "price": price and dataclasses.asdict(price),
        "bytes": {
            "weights": planned.weights,
            "read_by_a_decode_step": planned.read,
            "kv_of_a_token": planned.kv,
            "workspace": planned.workspace,
        },
        "kv_tokens": planned.tokens,
        "context": context,
        "sequences": planned.sequences(context),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "basis": "busy, at full load",
        "batches": rows,
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """`plan`: of `describe`."""
    machine, sizes, price = plan["machine"], plan["bytes"], plan["price"]
    console.print(
        f"{plan['model']}, weights {plan['weights']}, on {machine['name']}: {machine['memory'] / GIB:.1f} GiB, "
        f"{machine['bandwidth'] / 1e9:,.0f} GB/s, {machine['rate'] / 1e12:,.1f} TFLOP/s ({plan['machine_figures']})",
        markup=False,
    )
    table = Table("memory", "GiB")
    table.columns[1].justify = "right"
    left = machine["memory"] - sizes["weights"] - sizes["workspace"]
    last = ("left for KV", left) if left >= 0 else ("missing", -left)
    for name, size in (("weights", sizes["weights"]), ("largest step", sizes["workspace"]), last):
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    if left < 0:
        return
    console.print(
        f"KV cache: {sizes['kv_of_a_token'] / 1024:.1f} KiB a token, {plan['kv_tokens']:,} tokens fit; "
        f"{plan['sequences']:,} sequences of {plan['context']:,} tokens",
        markup=False,
    )
    sources = [name for name in ("roofline", "forecast") if name in plan["batches"][0]]
    prices = ["US$/M prompt", "generated", "3:1 blend"] if price else []
    table = Table("batch", "", "prefill tok/s", "decode tok/s", *prices)
    for column in table.columns[2:]:
        column.justify, column.overflow = "right", "fold"  # no figure is cut off
    for row in plan["batches"]:
        for name in sources:
            of = row[name]
            cells = [str(row["batch"]) if name == sources[0] else "", name]
            cells += [f"{of['prefill_tokens_per_second']:,.0f}", f"{of['decode_tokens_per_second']:,.0f}"]
            if price:
                cells += [usd(value).removeprefix("US$") for value in of["usd_per_million_tokens"].values()]
            table.add_row(*cells, end_section=name == sources[-1])
        if not row["fits"]:
            table.add_row("", "does not fit", end_section=True)
    console.print(table)
    lines = [f"Prompts of {plan['prompt_tokens']} tokens, answers of {plan['output_tokens']}; {plan['basis']}."]
    lines.append("The roofline is what no implementation can beat: expect less.")
    if "forecast" in sources:
        lines.append("The forecast carries the time of a few layers over to all of them.")
    if price:
        origin = ", ".join(part for part in (price["name"], price["date"], price["source"]) if part)
        lines.append(f"US${price['usd_per_device_hour']:g} a device-hour ({origin}). {NOTE}")
    else:
        lines.append("No price: --price sets one (US$ per device-hour, or cpu-4vcpu).")
    console.print(" ".join(lines), markup=False)


def _prices(price: Price, prompt: float, generated: float) -> dict[str, float]:
    """US$ of a million tokens, from the seconds of one."""
    million = 1e6 * price.per_second
    blend = (3 * prompt + generated) / 4
    return {"prompt": million * prompt, "generated": million * generated, "blended_3_to_1": million * blend}


def _device(name: str, price: Price | None) -> tuple[Machine, Price]:
    known = {key: row for key, row in seeds.load().devices.items() if row.memory_gb is not None}
    row = known.get(name)
    if row is None or row.memory_gb is None or row.bandwidth_gb_s is None or row.bf16_tflops is None:
        raise FenError(f"--device is {name!r}; it must be cpu (this machine's) or one of {', '.join(known)}")
    memory = int(row.memory_gb * 1e9 * GPU_SHARE)
    return Machine(row.label, memory, row.bandwidth_gb_s * 1e9, row.bf16_tflops * 1e12), price or parse_price(name)


def _this_cpu(console: Console) -> Machine:
    import torch

    from bench.ceilings import matmul_rate, read_bandwidth
    from bench.machine import cpu_name
    from engine.core.runner import available_memory
    from engine.cores import default_threads

    torch.set_num_threads(default_threads())
    with console.status("measuring this CPU"):
        rate = max(matmul_rate(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
        return Machine(cpu_name().split(" (")[0], available_memory(), read_bandwidth(128 << 20), rate)


def _forecast(checkpoint: Checkpoint, options: EngineOptions, question: Question, console: Console) -> Any:
    from bench.forecast import forecast

    with console.status("timing a few layers") as status:
        options = msgspec.structs.replace(options, model=question.model)
        return forecast(checkpoint, options, question.prompt_tokens, question.batches, status.update)
