"""`fen bench kernels`: every kernel beside what PyTorch has for the same work, and beside the limit of the machine.

On a GPU these are the Triton kernels, replayed in CUDA graphs over buffers larger than the L2 cache. Without one they
are the operations of the CPU path. The limits are measured in the same run, and so is each error against float32.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench import kernel_cases, results
from bench.ceilings import Ceilings, measure_ceilings
from bench.kernel_cases import Case
from bench.machine import Disturbance, cpu_name
from bench.operations import BenchError, Operation, Place, Prepare, reason
from bench.report import markdown_table
from bench.timing import measure

Row = dict[str, Any]
SECONDS = 0.1  # of repetitions for each figure
COLUMNS = ("kernel", "case", "rows", "us", "us_low", "us_high", "gb_s", "tflop_s", "limit", "share", "error", "allowed")


def run(
    only: str = "", quick: bool = False, flex: bool = False, threads: int | None = None, output: str | None = None
) -> bool:
    """Measures the cases whose "kernel case" contains `only` (quick: fewer of them), prints tables as they fill, and
    writes kernels.json, kernels.csv and plots into the folder `output`. Whether every case was right. BenchError: no
    such case."""
    torch.set_grad_enabled(False)
    place, prepare = choose(flex, threads)
    cases = cases_for(place.device, quick)
    cases = [case for case in cases if only in f"{case.kernel} {case.label}"]
    if not cases:
        raise BenchError(f"No case contains {only!r}; they are named like 'w4a16 llama-3-8b gate_up W4 g128 M16'.")
    if output is not None:
        results.check_writable(Path(output) / "kernels.json")
    if place.device.type == "cpu":
        print(
            "There is no GPU here that PyTorch can use: the Triton kernels are not timed. What follows are the "
            f"operations of the CPU path, on {torch.get_num_threads()} threads."
        )
    meanwhile = Disturbance(os.getpid())
    ceilings = measure_ceilings(place.device)
    print(describe(ceilings, device_name(place.device)))
    rows: list[Row] = []
    for kernel in dict.fromkeys(case.kernel for case in cases):
        chosen = [case for case in cases if case.kernel == kernel]
        rows += list(measured(chosen, prepare, place, ceilings, SECONDS))
        print("\n" + table([row for row in rows if row["kernel"] == kernel]), flush=True)
    print("\n" + disturbed(meanwhile))
    if output is not None:
        kept = results.new(
            "kernels", conditions(ceilings, meanwhile) | {"rows": rows}, device=device_name(place.device)
        )
        save(Path(output), rows, kept, ceilings)
    return bool(rows) and all(row_is_right(row) for row in rows)


def choose(flex: bool = False, threads: int | None = None) -> tuple[Place, Prepare]:
    """The GPU and its kernels, or the CPU and its operations."""
    if torch.cuda.is_available():
        from bench import gpu_operations

        return Place(torch.device("cuda"), l2_bytes(), flex), gpu_operations.prepare
    from bench import cpu_operations

    if threads is not None:
        torch.set_num_threads(threads)
    return Place(torch.device("cpu"), 0), cpu_operations.prepare


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    if device.type == "cuda":
        cases = kernel_cases.short() if quick else kernel_cases.full()
        return kernel_cases.possible(cases, torch.cuda.get_device_capability(device))
    return [case for case in kernel_cases.cpu() if not quick or case.rows == 1]


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def measured(
    cases: Iterable[Case], prepare: Prepare, place: Place, ceilings: Ceilings, seconds: float, timed: bool = True,
    known: Mapping[tuple[str, str], tuple[float, float]] = MappingProxyType({}),
) -> Iterator[Row]:  # fmt: skip
    """A row for each case; a case that fails gives a row that says so. timed False: the error only. known: (error,
    allowed) of (kernel, case) that need not be looked for again. Ends early where the device itself has failed: nothing
    after that would be true."""
    for case in cases:
        row: Row = {"kernel": case.kernel, "case": case.label, "rows": case.rows}
        try:
            operation = prepare(case, place)
            row["error"], row["allowed"] = known.get((case.kernel, case.label)) or operation.error()
            if timed:
                row |= _figures(case, operation, place, ceilings, seconds)
        except Exception as error:
            row["failed"] = reason(error)
        yield row
        operation = None  # type: ignore[assignment]  # its buffers make room for the next
        if "failed" in row and not _alive(place.device):
            return


def _figures(case: Case, operation: Operation, place: Place, ceilings: Ceilings, seconds: float) -> Row:
    time = measure(operation.calls, place.device, seconds)
    floor, limit = ceilings.floor(operation.bytes, operation.flops, operation.rate)
    row: Row = {
        "us": time.median * 1e6,
        "us_low": time.low * 1e6,
        "us_high": time.high * 1e6,
        "bytes": operation.bytes,
        "flops": operation.flops,
        "rate": operation.rate,
        "copies": len(operation.calls),
        "gb_s": operation.bytes / time.median / 1e9,
        "tflop_s": operation.flops / time.median / 1e12,
        "limit": limit,
        "share": floor / time.median,
        "baselines": {},
    }
    for name, calls in operation.baselines.items():
        if isinstance(calls, str):
            row["baselines"][name] = {"not_run": calls}
            continue
        try:
            other = measure(calls, place.device, seconds).median
        except Exception as error:
            row["baselines"][name] = {"not_run": reason(error)}
        else:
            row["baselines"][name] = {"us": other * 1e6, "speedup": other / time.median}
    if place.device.type == "cuda" and (wanted := kernel_cases.target(case)) is not None:
        row["target"] = {"against": wanted[0], "wanted": wanted[1], "got": _against(wanted[0], row)}
    return row


def _against(what: str, row: Row) -> float | None:
    """The figure that a target speaks of: of several baselines that begin so, the fastest."""
    if what == "ceiling":
        return float(row["share"])
    ratios = [entry["speedup"] for name, entry in row["baselines"].items() if name.startswith(what) and "us" in entry]
    return min(ratios, default=None)


def _alive(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


def row_is_right(row: Row) -> bool:
    return "failed" not in row and row["error"] <= row["allowed"]  # NaN is not


def describe(ceilings: Ceilings, device: str) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:,.3g}" for name, rate in ceilings.rates.items())
    return f"{device}\nlimits here ({ceilings.measured}): {ceilings.bandwidth / 1e9:,.1f} GB/s; TFLOP/s: {rates}"


def table(rows: list[Row]) -> str:
    """The rows of one kernel: a column for each baseline, how many times faster than it."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("baselines", {})))
    header = [
        rows[0]["kernel"],
        "µs",
        "GB/s",
        "TFLOP/s",
        "of limit",
        *(f"× {name}" for name in names),
        "error",
        "target",
    ]
    body = [_cells(row, names) for row in rows]
    if not any(cells[-1] for cells in body):
        header, body = header[:-1], [cells[:-1] for cells in body]
    notes = dict.fromkeys(
        f"{name}: not run, {entry['not_run']}"
        for row in rows
        for name, entry in row.get("baselines", {}).items()
        if "not_run" in entry
    )
    failed = [f"FAILED {row['kernel']} {row['case']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([markdown_table(header, body), *notes, *failed])


def _cells(row: Row, names: list[str]) -> list[str]:
    if "failed" in row:
        return [row["case"], "failed", *[""] * (5 + len(names))]
    wrong = "" if row_is_right(row) else f" WRONG: over {row['allowed']:.0e}"
    error = f"{row['error']:.1e}{wrong}"
    if "us" not in row:
        return [row["case"], *[""] * (4 + len(names)), error, ""]
    entries = [row["baselines"].get(name, {}) for name in names]
    ratios = [f"{entry['speedup']:.2f}" if "us" in entry else "-" if entry else "" for entry in entries]
    target = row.get("target")
    wanted = f"≥ {target['wanted']:g} {target['against']}" if target else ""
    return [
        row["case"],
        f"{row['us']:,.1f}",
        f"{row['gb_s']:,.1f}",
        f"{row['tflop_s']:,.3f}",
        f"{row['share']:.0%} {row['limit']}",
        *ratios,
        error,
        wanted,
    ]


def disturbed(meanwhile: Disturbance) -> str:
    return f"Other processes used {meanwhile.share():.0%} of the CPUs meanwhile."


def save(folder: Path, rows: list[Row], kept: results.Result, ceilings: Ceilings) -> None:
    """kernels.json, kernels.csv, and plots where matplotlib is installed."""
    results.save(folder / "kernels.json", kept)
    write_csv(folder / "kernels.csv", rows)
    try:
        from bench.plots import plot
    except ImportError as error:
        print(f"no plots: {error}")
        names = []
    else:
        names = plot(folder, rows, ceilings)
    print(f"kept in {folder}: kernels.json, kernels.csv{''.join(f', {name}' for name in names)}")


def conditions(ceilings: Ceilings, meanwhile: Disturbance) -> dict[str, Any]:
    """What kernels were measured beside."""
    return {
        "threads": torch.get_num_threads(),
        "ceilings": {"bandwidth": ceilings.bandwidth, "rates": ceilings.rates, "measured": ceilings.measured},
        "others_cpu_share": meanwhile.share(),
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """A line for each case; for each baseline its µs and how many times faster the kernel is."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("baselines", {})))
    fields = [*COLUMNS, "failed", *(f"{name} {what}" for name in names for what in ("us", "speedup"))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            baselines: Mapping[str, Mapping[str, float]] = row.get("baselines", {})
            ratios = {
                f"{name} {what}": entry[what]
                for name, entry in baselines.items()
                for what in ("us", "speedup")
                if what in entry
            }
            writer.writerow(row | ratios)
