"""The seconds of a start, stage by stage. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable


class Stages:
    """A progress function `stages(name, fraction)` that also times: a stage lasts until another is named.

    `seconds` by name, in the order of their first appearance; a stage that comes back adds to what it had.
    """

    def __init__(self, on_progress: Callable[[str, float], None] | None = None):
        self.seconds: dict[str, float] = {}
        self.name = ""
        self._since = time.monotonic()
        self._on_progress = on_progress

    def __call__(self, name: str, fraction: float = 0.0) -> None:
        if name != self.name:
            self.end()
            self.name = name
        if self._on_progress is not None:
            self._on_progress(name, fraction)

    def end(self) -> list[tuple[str, float]]:
        """Closes the current stage; all of them so far."""
        now = time.monotonic()
        if self.name:
            self.seconds[self.name] = self.seconds.get(self.name, 0.0) + now - self._since
        self._since, self.name = now, ""
        return list(self.seconds.items())
