"""The one GPU command: `python -m bench.gpu` checks and measures everything on the GPU of this machine.

Is every kernel right on the device; what can the device do; how fast is each kernel; one decode step launch by launch;
the engine with and without CUDA graphs, end to end; and its peers. Each section is a process of its own, so that a
kernel that breaks the device takes nothing else with it, and leaves a file: a run cut short keeps what it has, and
starting it again does what is missing. Eight minutes (--minutes), the most important first; what was not run is named.

`--dry` does all of it on the CPU in Triton's interpreter, at sizes that say nothing: it shows that the command works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bench import results as kept
from bench.kernel_cases import FLOAT8
from bench.machine import commit
from bench.report import markdown_table, write_json

Result = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
PARTS = "parts"  # folder of what each section has left; gpu.json holds all of it
CHECKERS = {"w4": 4, "w8": 3, "attention": 8, "other": 2}  # processes that compile and check side by side


@dataclasses.dataclass(frozen=True)
class Section:
    """run yields its result so far, whole each time. limit: seconds. together: side by side with others so marked."""

    name: str
    run: Callable[[bool, Path], Iterator[Result]]
    limit: int
    together: bool = False


def sections(dry: bool) -> list[Section]:
    from bench.gpu_sections import (
        END_TO_END,
        LADDERS,
        ceilings,
        check,
        end_to_end,
        graph_equals_eager,
        ladder,
        machine,
        step,
        timing,
        transformers,
    )  # fmt: skip
    from bench.gpu_sweep import SHAPES, sweep

    checks = [
        Section(f"check {family} {i + 1} of {count}", check(family, i, count), 150, together=True)
        for family, count in ((family, 1 if dry else count) for family, count in CHECKERS.items())
        for i in range(count)
    ]
    timings = [Section(f"time {family}", timing(family), limit) for family, limit in
               (("w4", 110), ("attention", 70), ("w8", 50), ("other", 50))]  # fmt: skip
    return [
        Section("machine", machine, 60),
        Section("ceilings", ceilings, 90),
        *checks,
        Section("graph equals eager", graph_equals_eager, 90),
        *timings,
        Section("step", step, 60),
        *(Section(f"end to end {model}", end_to_end(model), 150) for model in (("tiny",) if dry else END_TO_END)),
        Section("transformers", transformers, 120),
        *(Section(f"ladder {shape}", ladder(shape), 420) for shape in (LADDERS[:1] if dry else LADDERS)),
        *(Section(f"sweep {shape}", sweep(shape), 150) for shape in (SHAPES[:1] if dry else SHAPES)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--dry", action="store_true", help="on the CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--output", type=Path, help="folder of the results, also of a run to go on with")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not done by then is named and not done")
    parser.add_argument("--only", default="", help="sections whose name contains this, besides the first two")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["USE_HUB_KERNELS"] = "NO"  # transformers' optional package `kernels` is not this project's
    folder: Path = arguments.output or (Path(tempfile.mkdtemp()) if arguments.dry else RESULTS / "gpu")
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {folder} cannot be written: {error.strerror}")
    deadline = time.monotonic() + 60 * arguments.minutes
    results: dict[str, Result] = {}
    waiting = sections(arguments.dry)
    chosen = [section for section in waiting if arguments.only in section.name]
    if not chosen:
        parser.error(f"--only is {arguments.only!r}; sections are {', '.join(section.name for section in waiting)}")
    waiting = waiting[:2] + [section for section in waiting[2:] if section in chosen]
    while waiting:
        batch = [waiting.pop(0)]
        while waiting and batch[0].together and waiting[0].together:
            batch.append(waiting.pop(0))
        results |= run_batch(batch, folder, arguments.dry, deadline)
        if "stop" in results["machine"]:
            sys.exit(results["machine"]["stop"])
        kept.save(folder / "gpu.json", summary(results, arguments.dry))
    print(report(results, arguments.dry))
    print(f"kept in {folder}")
    sys.exit(1 if wrong(results) else 0)


def run_batch(batch: list[Section], folder: Path, dry: bool, deadline: float) -> dict[str, Result]:
    """Runs sections side by side, each in a forked process; takes what an earlier run of this commit has finished."""
    context = multiprocessing.get_context("fork")
    running: dict[str, tuple[BaseProcess, float]] = {}
    results: dict[str, Result] = {}
    for section in batch:
        earlier = _read(folder, section)
        left = min(float(section.limit), deadline - time.monotonic())
        if earlier.get("complete") and _same_code(earlier) and section.name != "machine":
            results[section.name] = earlier
            print(f"{section.name}: kept from {earlier['date']}", flush=True)
        elif left < 5:
            results[section.name] = earlier or {"not_run": "no time left"}
        else:
            _path(folder, section).unlink(missing_ok=True)
            process = context.Process(target=_child, args=(section, folder, dry))
            process.start()
            running[section.name] = process, time.monotonic() + left
    for section in batch:
        if section.name in running:
            process, end = running[section.name]
            process.join(max(0.0, end - time.monotonic()))
            results[section.name] = _collect(section, process, folder)
            print(f"{section.name}: {_state(results[section.name])}", flush=True)
    return results


def _same_code(earlier: Result) -> bool:
    now = commit()
    return earlier["commit"] == now and not now.endswith("-dirty")


def _collect(section: Section, process: BaseProcess, folder: Path) -> Result:
    late = process.is_alive()
    if late:
        process.terminate()  # a ladder ends the process of its rung then, which would keep the device
        process.join(10)
        process.kill()
        process.join()
    result = _read(folder, section)
    if late:
        result["cut_short"] = f"its {section.limit} s, or the time of the run, were up"
    elif process.exitcode != 0 and "not_finished" not in result:
        result["not_finished"] = f"the process ended with status {process.exitcode}"
    result["complete"] = result.get("complete", False) and not late
    return result


def _child(section: Section, folder: Path, dry: bool) -> None:
    """The process of one section: writes the result whenever there is more of it."""
    started = time.monotonic()
    result: Result = {}
    found: Result = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
    try:
        with contextlib.suppress(ImportError):
            import torch

            torch.set_grad_enabled(False)
            if section.together:  # oracles on the CPU: not each with all its cores
                torch.set_num_threads(1)
        for result in section.run(dry, folder):
            write_json(_path(folder, section), found | result | {"complete": False})
        done: Result = {"complete": "not_run" not in result}
    except Exception as error:
        from bench.operations import outcome

        done = {"complete": False} | {key.replace("failed", "not_finished"): why for key, why in outcome(error).items()}
    found |= result | done | {"seconds": time.monotonic() - started}
    write_json(_path(folder, section), found)


def _path(folder: Path, section: Section) -> Path:
    return folder / PARTS / f"{section.name.replace(' ', '-')}.json"


def _read(folder: Path, section: Section) -> Result:
    path = _path(folder, section)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _state(result: Result) -> str:
    for key in ("not_run", "not_finished", "cut_short"):
        if key in result:
            return f"{key.replace('_', ' ')}: {result[key]}"
    return f"{result['seconds']:.0f} s"


def summary(results: dict[str, Result], dry: bool) -> kept.Result:
    """Everything, in one file."""
    machine = results.get("machine", {})
    data = {"dry": dry, "driver": machine.get("driver"), "system": platform.platform(), "sections": results}
    result = kept.new("gpu", data, device=machine.get("device"))
    result.versions |= machine.get("versions", {})
    return result


def rows_of(results: dict[str, Result], prefix: str) -> list[Result]:
    return [row for name, result in results.items() if name.startswith(prefix) for row in result.get("rows", [])]


def wrong(results: dict[str, Result]) -> list[str]:
    """What is not as it should be: failed or inexact kernels, graphs that give other tokens, sections that broke."""
    from bench.kernels import row_is_right

    found = [
        f"{row['kernel']} {row['case']}: {row.get('failed') or _error(row)}"
        for row in rows_of(results, "check") + rows_of(results, "time")
        if not row_is_right(row)
    ]
    different = [row for row in rows_of(results, "graph equals eager") if row.get("equal") is False]
    found += [f"{row['model']}: graphs and eager execution differ from token {row['first']} on" for row in different]
    found += [f"{row['name']}: {row['failed']}" for row in rows_of(results, "") if "name" in row and "failed" in row]
    return found + [f"{name}: {r['not_finished']}" for name, r in results.items() if "not_finished" in r]


def _error(row: Result) -> str:
    return f"error {row['error']:.1e}, allowed {row['allowed']:.1e}"


def report(results: dict[str, Result], dry: bool) -> str:
    """The short table: what is right, what misses its target, what was not run."""
    checked = rows_of(results, "check")
    lines = ["", "DRY RUN on a CPU: the times mean nothing." if dry else f"{results['machine'].get('device')}"]
    lines += [results[name]["text"] for name in ("ceilings", "step") if "text" in results.get(name, {})]
    lines.append(f"{len(checked)} cases checked against float32")
    targets = [
        [
            f"{row['kernel']} {row['case']}",
            f"{row['us']:,.1f}",
            _got(row),
            f"{row['target']['wanted']:g}",
            row["target"]["against"],
        ]
        for row in rows_of(results, "time")
        if "target" in row
    ]
    if targets:
        lines.append(markdown_table(["kernel", "µs", "is", "wanted", "of"], targets))
    speeds = [
        [row["name"], f"{row['tokens_per_second']:,.0f}", f"{row['wanted']:g}" if row.get("wanted") else ""]
        for row in rows_of(results, "end to end")
        + rows_of(results, "transformers")
        + rows_of(results, "ladder")
        + rows_of(results, "sweep")
        if "tokens_per_second" in row
    ]
    if speeds:
        lines.append(markdown_table(["end to end", "tokens/s", "wanted"], speeds))
    lines += [
        f"{name}: below {line['label']}'s US${line['usd_per_million']:.2f} a million from "
        + ", ".join(
            f"{count or 'no measured number'} at a time ({basis})" for basis, count in line["concurrency"].items()
        )
        for name, result in results.items()
        for line in result.get("cheaper_from", [])
    ]
    reasons = {
        (name, entry["not_run"]): None
        for row in rows_of(results, "time")
        for name, entry in row.get("baselines", {}).items()
        if "not_run" in entry
    }
    lines += [f"not run: {name}: {why}" for name, why in reasons]
    if tuple(results["machine"].get("capability", FLOAT8)) < FLOAT8:
        lines.append("not run: float8 caches and products, for which this GPU has no instructions (sm_89 and later do)")
    lines += [f"not run: {name}: {r['not_run']}" for name, r in results.items() if "not_run" in r]
    lines += [f"cut short: {name}: {r['cut_short']}" for name, r in results.items() if "cut_short" in r]
    lines += [f"not run: {row['name']}: {row['not_run']}" for row in rows_of(results, "") if "not_run" in row]
    return "\n".join([*lines, *(f"WRONG: {line}" for line in wrong(results))])


def _got(row: Result) -> str:
    got = row["target"]["got"]
    return "no baseline" if got is None else f"{got:.2f}{'' if got >= row['target']['wanted'] else ' misses'}"


if __name__ == "__main__":
    main()
