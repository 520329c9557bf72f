"""What a result was measured on: the device, the versions, the commit, and who else used the CPUs meanwhile."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
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


@functools.cache
def _hash_of_files() -> str:
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in ("bench", "engine", "kernels") for path in (root / folder).rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def commit() -> str:
    """The commit of the clone this runs from, "-dirty" with changes to tracked files; outside a clone a hash of the
    files."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return f"files-{_hash_of_files()}"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


class Disturbance:
    """The share of all CPUs that other processes, or other machines of the same host, used since this was made.

    Reads /proc: NaN on a system without it.
    """

    def __init__(self, *pids: int):
        """pids: the processes that are being measured, and so are not "others"."""
        self._pids = pids
        self._others, self._time = self._others_seconds(), time.monotonic()

    def share(self) -> float:
        seconds = time.monotonic() - self._time
        return max(0.0, (self._others_seconds() - self._others) / (seconds * (os.cpu_count() or 1)))

    def _others_seconds(self) -> float:
        try:
            ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            idle = ticks[3] + ticks[4]
            own = 0
            for pid in self._pids:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])  # user and system time of all its threads
        except OSError:
            return math.nan
        return (sum(ticks) - idle - own) / os.sysconf("SC_CLK_TCK")
