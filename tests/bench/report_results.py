"""Results for tests of `fen bench report`, in the form that the benchmarks write; their figures are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import results
from bench.prices import Price, per_million
from bench.results import Result
from engine.messages import LedgerSnapshot

PRICE = Price(0.0279, "cpu-4vcpu", "2026", "public cloud price lists")
RUNGS = [  # name, seconds of prompt and decode, top-1 agreement
    ("plain PyTorch", 210.0, 420.0, 1.0),
    ("fused operators", 120.0, 260.0, 0.995),
    ("4-bit weights", 115.0, 150.0, 0.97),
    ("continuous batching", 88.0, 60.0, 0.97),
    ("8-bit products", 31.0, 38.0, 0.96),
    ("prefix cache", 17.0, 38.0, 0.96),
]
CLASSES = ("prompt", "cached_prompt", "decode", "padding", "recompute", "rejected_draft", "aborted", "host", "idle",
           "startup", "in_flight")  # fmt: skip


def result(kind: str, data: dict[str, Any], price: Price | None = PRICE) -> Result:
    return results.new(kind, data, model="smollm2-135m-instruct", quantization="Q4_1", price=price)


def blends(seconds: dict[str, float], tokens: dict[str, int], price: Price) -> dict[str, Any]:
    return per_million(LedgerSnapshot(0.0, sum(seconds.values()), seconds, tokens), price)


def ladder(price: Price | None = PRICE, rungs: int = len(RUNGS)) -> Result:
    tokens = {"prompt": 27_648, "cached_prompt": 0, "decode": 6_144}
    entries: list[dict[str, Any]] = []
    for name, prompt, decode, same in RUNGS[:rungs]:
        seconds = dict.fromkeys(CLASSES, 0.0) | {"prompt": prompt, "decode": decode, "host": 1.0}
        per_second = blends(seconds, tokens, Price(3600.0, "", "", ""))["busy"]
        blend = per_second["blended_3_to_1"]
        first = entries[0]["seconds_per_million"]["blended_3_to_1"] if entries else blend
        entries.append({
            "name": name, "technique": f"{name} and no more", "settings": "settings", "batch": 1, "tokens": tokens,
            "device_seconds": seconds, "tokens_per_second": 6_144 / (prompt + decode + 1), "roofline_share": 0.3,
            "seconds_per_million": per_second, "cut": 1 - blend / first, "perplexity": 14.2, "top1_agreement": same,
            "usd_per_million": blends(seconds, tokens, price)["busy"] if price else None, "greedy_agreement": same,
        })  # fmt: skip
    work = {"requests": 48, "concurrency": 24, "shared_prefix": 512, "tail": [32, 96], "new_tokens": [96, 160]}
    baseline = {"dtype": "bfloat16", "speed_against_transformers": 1.04}
    data = {"device_kind": "cpu", "threads": 2, "load_format": "auto", "basis": "busy", "workload": work,
            "baseline": baseline, "target_cut": 0.9, "complete": rungs == len(RUNGS), "rungs": entries}  # fmt: skip
    return result("ladder", data, price)


def point(concurrency: int, price: Price | None = PRICE, completed: int = 32) -> dict[str, Any]:
    out, seconds_long = 64 * completed, 40.0
    seconds = dict.fromkeys(CLASSES, 0.0) | {
        "prompt": 6.0, "decode": 60.0 / (1 + concurrency), "host": 0.4, "idle": 4.0, "aborted": 1.0,
    }  # fmt: skip
    wall = sum(seconds.values())
    tokens = {"prompt": 128 * completed, "cached_prompt": 0, "decode": out}
    rows = blends(seconds, tokens, price) if price and completed else None
    throughput = out / seconds_long * concurrency**0.7
    latencies = {f"{kind}_{name}_ms": value * factor if completed else None
                 for name, value in (("ttft", 90.0 * concurrency), ("tpot", 25.0 * concurrency**0.4))
                 for kind, factor in (("median", 1.0), ("p99", 2.3))}  # fmt: skip
    return {
        "max_concurrency": concurrency, "completed": completed, "failed": 0, "cancelled": 0,
        "total_input_tokens": 128 * completed, "total_output_tokens": out, "output_throughput": throughput,
        "total_token_throughput": 3 * throughput, "device_seconds": seconds, "wall_seconds": wall,
        "utilisation": (wall - 4) / wall, "ledger_tokens": tokens, "usd_per_million_tokens": rows, **latencies,
    }  # fmt: skip


def sweep(price: Price | None = PRICE, points: list[dict[str, Any]] | None = None) -> Result:
    if points is None:
        points = [point(concurrency, price) for concurrency in (1, 2, 4, 8, 16)]
    server = {"notes": ["measured on a CPU"]}
    return result("sweep", {"model_id": "smollm2-135m-instruct", "dataset_name": "random", "num_runs": 3,
                            "interrupted": False, "server": server, "points": points}, price)  # fmt: skip


def kernels() -> Result:
    ceilings = {"bandwidth": 4e10, "rates": {"bfloat16": 2e12, "float32": 3e11}, "measured": "best of 7"}
    rows: list[dict[str, Any]] = []
    for kernel, flops, speed in (("w4a16", 4e9, 1.8), ("attention", 2e8, 3.1), ("rmsnorm", 1e6, 0.9)):
        for i in (1, 4, 16):
            rows.append({
                "kernel": kernel, "case": f"shape M{i}", "rows": i, "error": 1e-3, "allowed": 1e-2, "us": 100.0,
                "bytes": 1e7, "flops": flops * i, "rate": "bfloat16", "gb_s": 10.0, "tflop_s": flops * i**0.5 / 3e10,
                "limit": "bytes", "share": 0.6, "baselines": {"torch": {"us": 1.0, "speedup": speed * i**0.2}},
            })  # fmt: skip
    return result("kernels", {"ceilings": ceilings, "rows": rows, "threads": 2, "others_cpu_share": 0.02}, None)


def write(folder: Path, *made: Result) -> list[str]:
    """A file for each."""
    names = []
    for i, one in enumerate(made):
        path = folder / f"{one.kind}_{i}.json"
        results.save(path, one)
        names.append(str(path))
    return names
