"""The seconds of a start by stage."""

from __future__ import annotations

import pytest

from engine.core.stages import Stages


def test_stages_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    seen: list[tuple[str, float]] = []
    stages = Stages(lambda name, fraction: seen.append((name, fraction)))
    for name, seconds in (("libraries", 2.0), ("weights", 1.0), ("weights", 0.5), ("kernels", 3.0), ("weights", 0.25)):
        stages(name)
        now[0] += seconds
    assert stages.end() == [("libraries", 2.0), ("weights", 1.75), ("kernels", 3.0)]
    now[0] += 100
    assert sum(seconds for _, seconds in stages.end()) == 6.75 and len(seen) == 5
