"""What a result says of where it was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import torch

from bench.ceilings import matmul_rate, read_bandwidth
from bench.machine import Disturbance, _hash_of_files, commit, cpu_name, versions


def test_device_versions_and_commit() -> None:
    assert str(os.cpu_count()) in cpu_name()
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.startswith(commit().removesuffix("-dirty"))
    else:
        assert commit().startswith("files-")
    assert re.fullmatch("[0-9a-f]{12}", _hash_of_files())


def test_others_are_seen_and_oneself_is_not() -> None:
    spin = [sys.executable, "-c", "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass"]
    watched = subprocess.Popen(spin)
    try:
        mine, both = Disturbance(os.getpid(), watched.pid), Disturbance(os.getpid())
        time.sleep(0.5)
        known, unknown = mine.share(), both.share()
    finally:
        watched.wait()
    # Whatever else runs is in both; the spinning process is in one of them only.
    assert 0 <= known < unknown


def test_ceilings_are_rates_of_this_machine() -> None:
    assert 1e8 < read_bandwidth(4 << 20) < 1e13
    assert 1e8 < matmul_rate(torch.float32, 256) < 1e14


def test_a_tiny_buffer_has_a_bandwidth_too() -> None:
    assert read_bandwidth(1) > 0
