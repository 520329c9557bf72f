"""What the runner on a GPU prepares while a step waits: compiled kernels and captured graphs, and how long it takes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import triton


class Preparation:
    """state: "compiling" (or reading compiled code from the disk), "capturing", or "" when nothing is prepared.
    seconds: of both since `reset`. `on_change(state)` follows."""

    def __init__(self, on_change: Callable[[str], None]):
        self.state = ""
        self.seconds = {"compiling": 0.0, "capturing": 0.0}
        self._since = 0.0
        self._on_change = on_change
        living = weakref.ref(self)  # the hooks are the process's, and may outlive the runner

        def compiling(state: str) -> None:
            if (preparation := living()) is not None:
                preparation.set(state)

        triton.knobs.runtime.jit_cache_hook = lambda **_: compiling("compiling")
        triton.knobs.runtime.jit_post_compile_hook = lambda **_: compiling("")

    def set(self, state: str) -> None:
        now = time.monotonic()
        if self.state:
            self.seconds[self.state] += now - self._since
        self.state, self._since = state, now
        self._on_change(state)

    def reset(self) -> None:
        """Before a launch: what failed is over."""
        self.set("")
        self.seconds = dict.fromkeys(self.seconds, 0.0)
