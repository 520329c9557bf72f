"""Start of a real server on a small model, and the memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import cold_start

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux has smaps_rollup")


def test_memory_of_a_process_and_its_children() -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'x = bytearray(80 << 20); print(); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        watch = cold_start.MemoryWatch(process.pid)
        watch.start()
        while watch.processes < 2:
            pass
        watch.stop()
        process.stdin.close()
    assert 80 << 20 < watch.proportional <= watch.resident < 400 << 20
    assert watch.processes == 2
    assert cold_start.memory(process.pid) == (0, 0)


def test_a_server_from_start_to_first_token(random_checkpoint: Callable[..., Path]) -> None:
    model = random_checkpoint(max_position_embeddings=8192)
    run = cold_start.measure(["--model", str(model), "--kv-cache-tokens", "8192"])
    assert 0 < run["ready_seconds"] < run["first_token_seconds"]
    assert 50e6 < run["proportional_bytes"] <= run["resident_bytes"]
    stages = run["stages"]
    assert list(stages) == ["front end", "libraries", "checkpoint", "device", "weights", "warm-up", "calibration"]
    assert sum(stages.values()) == pytest.approx(run["ready_seconds"]) and min(stages.values()) >= 0
    assert stages["libraries"] > 0.1 and stages["weights"] > 0
    assert run["processes"] == 3  # HTTP, the engine, and what renders chat templates


def test_a_server_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the server ended with status"):
        cold_start.measure(["--model", "no/such/model.gguf"])


def test_targets_are_judged() -> None:
    run: dict[str, Any] = {
        "ready_seconds": 3.0,
        "first_token_seconds": 3.5,
        "resident_bytes": 1.2e9,
        "proportional_bytes": 9e8,
    }
    run["stages"] = {"libraries": 2.0, "kernels": 0.5, "weights": 1.6}
    text = cold_start.render([run])
    assert "below 8 s: met" in text and "below 1000 MB: missed" in text
    assert "2.5 s: kept" in text and "1.5 s: exceeded" in text and "| kernels" in text
