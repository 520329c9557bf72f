"""Pictures of `fen bench kernels`: where each kernel stands under the roofline, and its speed-up against M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.ceilings import Ceilings

Row = dict[str, Any]


def plot(folder: Path, rows: list[Row], ceilings: Ceilings) -> list[str]:
    """Writes the pictures that the rows have data for; their file names."""
    timed = [row for row in rows if "us" in row]
    names = []
    if timed:
        _roofline(folder / "roofline.png", timed, ceilings)
        names.append("roofline.png")
    linears = [row for row in timed if row["kernel"] in ("w4a16", "w8a16", "w8a8", "linear") and row["baselines"]]
    if linears:
        _speedup(folder / "speedup.png", linears)
        names.append("speedup.png")
    return names


def _roofline(path: Path, rows: list[Row], ceilings: Ceilings) -> None:
    """FLOPs a byte against FLOPs a second, both logarithmic, under the limits that the run has measured."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        points = [row for row in rows if row["kernel"] == kernel and row["flops"]]
        x, y = [row["flops"] / row["bytes"] for row in points], [row["tflop_s"] for row in points]
        axes.scatter(x, y, s=12, label=kernel)
    intensities = [row["flops"] / row["bytes"] for row in rows if row["flops"]]
    low, high = min(intensities) / 2, max(intensities) * 2
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    for dtype, rate in ceilings.rates.items():
        roof = [min(x * ceilings.bandwidth, rate) / 1e12 for x in steps]
        axes.plot(steps, roof, linewidth=1, label=f"limit, {dtype}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _speedup(path: Path, rows: list[Row]) -> None:
    """How many times faster than the first baseline, against the number of rows."""
    figure, axes = plt.subplots(figsize=(8, 5))
    lines: dict[str, list[tuple[int, float]]] = {}
    baseline = next(iter(rows[0]["baselines"]))
    for row in rows:
        entry = next(iter(row["baselines"].values()))
        if "us" in entry:
            name = row["case"].rsplit(" M", 1)[0]
            lines.setdefault(name, []).append((row["rows"], entry["speedup"]))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker=".", linewidth=1, label=name)
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set(xscale="log", xlabel="rows", ylabel=f"times faster than {baseline.split(' ')[0]} in the same run")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
