"""What is booked as compiling and capturing, and that Triton's hooks keep no engine alive."""

from __future__ import annotations

import gc
import sys
import time
import weakref

import pytest

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")


def test_seconds_of_each_and_a_new_count_for_each_launch() -> None:
    import triton

    from engine.core.preparation import Preparation

    seen: list[str] = []
    preparation = Preparation(seen.append)
    triton.knobs.runtime.jit_cache_hook(key="a kernel")
    assert preparation.state == "compiling"
    time.sleep(0.02)
    triton.knobs.runtime.jit_post_compile_hook(key="a kernel")
    preparation.set("capturing")
    time.sleep(0.01)
    preparation.set("")
    first = preparation.seconds
    assert first["compiling"] >= 0.02 and first["capturing"] >= 0.01
    assert seen == ["compiling", "", "capturing", ""]
    preparation.set("compiling")  # and fails
    preparation.reset()
    assert preparation.state == "" and preparation.seconds == {"compiling": 0.0, "capturing": 0.0}
    assert first["compiling"] >= 0.02, "a launch keeps its own"


def test_the_hooks_outlive_it() -> None:
    import triton

    from engine.core.preparation import Preparation

    preparation = Preparation(lambda state: None)
    gone = weakref.ref(preparation)
    del preparation
    gc.collect()
    assert gone() is None
    assert not triton.knobs.runtime.jit_cache_hook(key="a kernel") and not triton.knobs.runtime.jit_post_compile_hook()
