"""What a result was measured on: the device, the versions, the commit, and who else used the CPUs meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "numpy")


def cpu_name() -> str:
    """The model name as the system gives it, with the instruction sets that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    present = [flag for flag in CPU_FLAGS if flag in flags]
    return f"{fields.get('model name', platform.machine())}, {os.cpu_count()} CPUs" + (
        f" ({', '.join(present)})" if present else ""
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the clone this runs from, "-dirty" with changes to tracked files; "unknown" outside a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


class Disturbance:
    """Measures the share of all CPUs that others used since it was made; None where the system does not say."""

    def __init__(self, *pids: int):
        """pids: the processes that are being measured, and so are not "others"."""
        self._pids = pids
        self._busy, self._own, self._time = _busy_seconds(), self._own_seconds(), time.monotonic()

    def share(self) -> float | None:
        busy, own, now = _busy_seconds(), self._own_seconds(), time.monotonic()
        if busy is None or self._busy is None or own is None or self._own is None:
            return None
        others = (busy - self._busy) - (own - self._own)
        return max(0.0, others / ((now - self._time) * (os.cpu_count() or 1)))

    def _own_seconds(self) -> float | None:
        seconds = [_process_seconds(pid) for pid in self._pids]
        return None if None in seconds else sum(second for second in seconds if second is not None)


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the start, and those the hypervisor gave to other machines."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float | None:
    """CPU seconds of a process and of its children that ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")
