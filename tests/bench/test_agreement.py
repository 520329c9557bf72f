"""What python -m bench.agreement makes of two clients' figures; the clients themselves run when it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.agreement import LABELS, compare, render


def figures(rate: float, ttft: float) -> dict[str, float]:
    return dict.fromkeys(LABELS, 10.0) | {"output_throughput": rate, "median_ttft_ms": ttft}


def test_medians_are_held_against_each_other() -> None:
    runs = {"fen": [figures(95.1, 200), figures(99, 100), figures(60, 115)], "aiperf": [figures(100, 100)] * 3}
    found = compare(runs)
    assert found["output_throughput"]["fen"] == 95.1 and found["output_throughput"]["met"]
    assert found["median_ttft_ms"]["difference"] == 0.15 and found["median_ttft_ms"]["met"]
    assert found["median_itl_ms"]["met"] is None, "nothing is wanted of it"
    runs["fen"] = [figures(94, 84)] * 3
    found = compare(runs)
    assert not found["output_throughput"]["met"] and not found["median_ttft_ms"]["met"]
    text = render(runs, found)
    assert "6.0%" in text and "5%: missed" in text and "15%: missed" in text


def test_without_the_peer_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.agreement", "--peer-venv", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 1 and "There is no bin/aiperf" in done.stderr and "Traceback" not in done.stderr
