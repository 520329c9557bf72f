"""Cores: how many threads compute, which stay on a core of their own, and which give way to them. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import sys

_CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, else the cores that this process was given."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(_CORES)


def bind(threads: int) -> None:
    """Where OpenMP has a thread for every core, each stays on its own. Before torch is loaded.

    Beside another program the system would put two of them on one core, where each of the hundreds of barriers of a
    step lasts a turn of the scheduler.
    """
    if threads == len(_CORES):
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("OMP_PLACES", "threads")


def roam() -> None:
    """The calling thread may run on every core again, though the thread that started it is bound to one."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, _CORES)


def step_back() -> None:
    """The calling thread runs on any core, and only while nobody else wants that one."""
    roam()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def session_steps_back(nice: int = 10) -> None:
    """As step_back, for the only process of a session and its children.

    Linux shares its cores among sessions first, and within each by priority: without this an idle session counts as
    much as the one that computes. A tenth of that is left to it where all cores are busy, lest nobody ever be answered;
    a third at `nice` 5.
    """
    step_back()
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write(str(nice))
