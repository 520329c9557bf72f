"""The picture of a sweep: two panels with the same horizontal axis, what one user gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(folder: Path, rows: Sequence[dict[str, Any]], caption: str) -> list[str]:
    """Writes sweep.png and sweep.svg; without a price the panel of US$ is left out."""
    rows = [row for row in rows if row["user"] is not None]
    if not rows:
        return []
    priced = any(row["usd_busy"] is not None for row in rows)
    figure, panels = plt.subplots(1, 2 if priced else 1, figsize=(10 if priced else 5.5, 4.2), squeeze=False)
    _panel(panels[0][0], rows, "device", "generated tokens/s of the device")
    if priced:
        _panel(panels[0][1], rows, "usd_busy", "US$ per million tokens (3:1)", "busy")
        _panel(panels[0][1], rows, "usd_wall", "US$ per million tokens (3:1)", "wall")
        panels[0][1].legend()
    figure.suptitle(caption, fontsize=8)
    figure.tight_layout()
    names = ["sweep.png", "sweep.svg"]
    for name in names:
        figure.savefig(folder / name, dpi=150)
    plt.close(figure)
    return names


def _panel(axes: Any, rows: Sequence[dict[str, Any]], name: str, label: str, series: str | None = None) -> None:
    """The front as a line, every concurrency as a point with its number."""
    shown = [row for row in rows if row[name] is not None]
    best = sorted((row["user"], row[name]) for row in shown if row[f"pareto_{name}"])
    (line,) = axes.plot(*zip(*best, strict=True), linewidth=1, label=series)
    axes.scatter([row["user"] for row in shown], [row[name] for row in shown], color=line.get_color(), s=18)
    for row in shown:
        text = str(row["concurrency"] or "∞")
        axes.annotate(text, (row["user"], row[name]), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="generated tokens/s of one user (1 / median TPOT)", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.grid(linewidth=0.3)
