"""`fen bench kernels` and `python -m bench.gpu`: under the roofline, and beside what PyTorch has for the same work."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from bench.reporting.charts import Axis, Chart, Plot, number
from bench.reporting.section import Figure, Section, is_cpu, share
from bench.results import Result

Row = dict[str, Any]


def section(result: Result, key: str) -> Section | None:
    """None where nothing was timed, or only tried out (--dry)."""
    rows, ceilings = rows_and_ceilings(result)
    timed = [row for row in rows if "us" in row]
    if not timed or not ceilings or result.data.get("dry"):
        return None
    compared = pairs(timed)
    figures = [Figure(f"{key}-roofline", "Under the roofline", functools.partial(roofline, timed, ceilings))]
    if compared:
        figures.append(
            Figure(f"{key}-speedup", "Beside PyTorch, each case a dot", functools.partial(speedups, compared))
        )
    wrong = [row for row in rows if not is_right(row)]
    notes = [f"Not right: {row['kernel']} {row['case']}." for row in wrong] or [
        "Each case was held against float32 in the same run and is within its allowed error."
    ]
    missed = [row for row in timed if row.get("target") and (row["target"]["got"] or 0) < row["target"]["wanted"]]
    notes += [
        f"Misses its target: {row['kernel']} {row['case']}, {number(row['target']['got'] or 0)} of "
        f"{row['target']['wanted']:g} × {row['target']['against']}."
        for row in missed
    ]
    if result.kind == "gpu":
        notes += whole_engine(result)
    kernels = list(dict.fromkeys(row["kernel"] for row in timed))
    others = result.data.get("others_cpu_share")
    busy = f"; other processes used {others:.0%} of the CPUs meanwhile" if others is not None else ""
    return Section(
        key=key,
        title=f"Kernels on a {'CPU' if is_cpu(result) else 'GPU'}",
        conditions=(
            f"{result.device}, random weights and inputs{busy}. Limits measured in the same run "
            f"({ceilings['measured']}): {ceilings['bandwidth'] / 1e9:,.0f} GB/s; TFLOP/s "
            + ", ".join(f"{name} {number(rate / 1e12)}" for name, rate in ceilings["rates"].items())
            + "."
        ),
        figures=figures,
        header=["kernel", "cases", "share of the limit, median", "best", *(name for name in baselines(timed))],
        rows=[kernel_row(kernel, timed) for kernel in kernels],
        notes=[*notes, "× columns: how many times faster than that baseline, median of the cases that have it."],
    )


def is_right(row: Row) -> bool:
    """An error that is no number is null in a file."""
    return "failed" not in row and row["error"] is not None and row["error"] <= row["allowed"]


def whole_engine(result: Result) -> list[str]:
    """What `python -m bench.gpu` measured end to end, and what it could not run."""
    found = []
    for name, part in result.data["sections"].items():
        if not name.startswith(("end to end", "transformers")):
            continue
        rows = [row for row in part.get("rows", []) if "tokens_per_second" in row]
        found += [f"{row['name']}: {row['tokens_per_second']:,.0f} tokens/s." for row in rows]
        if "not_run" in part:
            found.append(f"Not run: {name}, {part['not_run']}.")
    return found


def rows_and_ceilings(result: Result) -> tuple[list[Row], dict[str, Any] | None]:
    if result.kind == "kernels":
        return result.data["rows"], result.data["ceilings"]
    sections = result.data["sections"]
    rows = [row for name, part in sections.items() if name.startswith("time") for row in part.get("rows", [])]
    limits = sections.get("ceilings", {})
    return rows, limits if "bandwidth" in limits else None


def baselines(rows: list[Row]) -> list[str]:
    return [f"× {name}" for name in dict.fromkeys(name for row in rows for name in row["baselines"])]


def kernel_row(kernel: str, rows: list[Row]) -> list[str]:
    own = [row for row in rows if row["kernel"] == kernel]
    shares = [row["share"] for row in own]
    cells = [kernel, str(len(own)), share(statistics.median(shares)), share(max(shares))]
    for name in baselines(rows):
        ratios = [entry["speedup"] for row in own if "speedup" in (entry := row["baselines"].get(name[2:], {}))]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    return cells


def pairs(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, str]]]:
    """(kernel, baseline) -> (times faster, case) of each case."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in rows:
        for name, entry in row["baselines"].items():
            if "speedup" in entry:
                found.setdefault((row["kernel"], name), []).append((entry["speedup"], row["case"]))
    return found


def roofline(rows: list[Row], ceilings: dict[str, Any], width: int) -> Chart:
    points = [row for row in rows if row["flops"]]
    intensity = [row["flops"] / row["bytes"] for row in points]
    bandwidth, rates = ceilings["bandwidth"], ceilings["rates"]
    low, high = min(intensity) / 1.5, max([*intensity, *(rate / bandwidth for rate in rates.values())]) * 1.5
    floor = min([row["tflop_s"] for row in points] + [low * bandwidth / 1e12])
    kernels = list(dict.fromkeys(row["kernel"] for row in points))
    x = Axis.logarithmic("FLOPs a byte", [low, high])
    y = Axis.logarithmic("TFLOP/s", [floor, max(rates.values()) / 1e12])
    plot = Plot(width, 360, "Kernels under the roofline of this device", x, y, kernels)
    labels: dict[float, list[str]] = {}  # TFLOP/s -> the dtypes whose limits lie there
    for name, rate in sorted(rates.items(), key=lambda entry: -entry[1]):
        ridge = rate / bandwidth
        start = max(x.low, y.low * 1e12 / bandwidth)
        line = [(start, start * bandwidth / 1e12), (ridge, rate / 1e12), (x.high, rate / 1e12)]
        plot.path([plot.at(*point) for point in line if x.low <= point[0] <= x.high], "axis")
        place = plot.at(x.high, rate / 1e12)
        near = [other for other in labels if abs(plot.at(x.high, other)[1] - place[1]) < 12]
        labels.setdefault(near[0] if near else rate / 1e12, []).append(name)
    for level, names in labels.items():
        plot.text(*plot.at(x.high, level * 1.04), ", ".join(names), "tick", "end")
    for row, at in zip(points, intensity, strict=True):
        place = plot.at(at, row["tflop_s"])
        plot.dot(
            *place, kernels.index(row["kernel"]), f"{row['kernel']} {row['case']}: {share(row['share'])} of the limit"
        )
    return plot


def speedups(found: dict[tuple[str, str], list[tuple[float, str]]], width: int) -> Chart:
    """A row for each kernel and baseline; the line is where both are equally fast."""
    values = [speed for cases in found.values() for speed, _ in cases]
    axis = Axis.logarithmic("times faster", [*values, 1.0])
    height = 22 + 40 * len(found) + 42
    chart = Chart(width, height, "How many times faster than PyTorch's own, each case a dot")

    def at(value: float) -> float:
        return 10 + axis.share(value) * (width - 20)

    bottom = height - 42
    for tick in axis.ticks:
        chart.rule(at(tick), 6, at(tick), bottom, "grid")
        chart.text(at(tick), bottom + 16, number(tick), "tick", "middle")
    chart.rule(at(1.0), 2, at(1.0), bottom, "mark")
    chart.text(
        width / 2, height - 8, "times faster than the baseline; the dashed line: equally fast", "label", "middle"
    )
    for i, ((kernel, baseline), cases) in enumerate(found.items()):
        y = 20 + 40 * i
        middle = statistics.median(speed for speed, _ in cases)
        chart.text(10, y, f"{kernel} against {baseline}: {number(middle)}×", "name")
        for speed, case in cases:
            chart.dot(at(speed), y + 14, i, f"{case}: {number(speed)}×")
    return chart
