"""What the ledger itself takes of a decode step: `python -m bench.ledger_overhead [MODEL]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import results
from engine.core.build import build_core
from engine.messages import EngineOptions, Request, SamplingParams

STEPS = 16
RESULTS = Path(__file__).resolve().parent / "results"


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def measure(core: Any, sequences: int) -> tuple[float, float]:
    """Seconds of a decode step of `sequences` sequences, with the statistics that follow it; of these, the ledger's."""
    params = SamplingParams(max_tokens=STEPS + 8, ignore_eos=True, temperature=0.0)
    for i in range(sequences):
        core.add(Request(id=str(i), prompt=[5 + i] * 8, params=params))
    while any(sequence.num_generated < 2 for sequence in core.scheduler.sequences.values()):
        core.step()
    spent: list[float] = []
    ledger = core.ledger
    for name in ("step", "snapshot", "advance"):
        setattr(ledger, name, timed(getattr(ledger, name), spent))
    started = time.perf_counter()
    for _ in range(STEPS):
        core.step()
        core.stats()
    seconds = time.perf_counter() - started
    for name in ("step", "snapshot", "advance"):
        delattr(ledger, name)
    core.cancel([str(i) for i in range(sequences)])
    core.step()
    return seconds / STEPS, sum(spent) / STEPS


def main() -> None:
    options = EngineOptions(**({"model": sys.argv[1]} if sys.argv[1:] else {}))
    core, info, _ = build_core(options)
    print(f"{info.model} ({info.quantization}) on {info.device}: decode steps, and the ledger's share")
    rows = []
    for sequences in (1, 8, 64):
        step, ledger = measure(core, sequences)
        rows.append({"sequences": sequences, "step_seconds": step, "ledger_seconds": ledger, "share": ledger / step})
        print(f"{sequences:3} sequences: {step * 1e3:7.2f} ms, {ledger * 1e6:6.1f} us, {ledger / step:.3%}")
    data = {"threads": torch.get_num_threads(), "steps": STEPS, "rows": rows}
    path = RESULTS / "ledger_overhead.json"
    device = None if info.device.startswith("cpu") else info.device
    found = results.new("ledger_overhead", data, model=info.model, quantization=info.quantization, device=device)
    results.save(path, found)
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
