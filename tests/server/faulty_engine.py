"""The engine process of the product, with a runner that goes wrong on order: the faults are real, only their moment is
chosen. A request orders one by its seed, which at temperature 0 changes nothing else.

Run like engine.core.process. FEN_FAULT at load: "memory" asks the system for more than there is.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any

import torch

import engine.core.build
from engine.core.process import _build, run
from engine.core.runner import Runner
from engine.core.step import StepResult
from engine.scheduling.scheduler import Schedule
from engine.scheduling.sequence import Sequence

FIRST = 666_000
RAISE, NAN, NAN_IN_PROMPT, MEMORY, HANG, HANG_WITH_LOCK, PREPARE, EXIT = range(FIRST, FIRST + 8)
AFTER = 2  # tokens that a request gets first
COMMAND = (sys.executable, "-P", __file__)
# Python that makes a server start this instead of engine.core.process.
PRELUDE = f"import engine.core.client as c; c.EngineClient.__init__.__kwdefaults__['command'] = {COMMAND!r}\n"


class FaultyRunner(Runner):
    def __init__(self, *args: Any, **options: Any):
        if os.environ.get("FEN_FAULT") == "memory":
            allocate_too_much()
        super().__init__(*args, **options)

    def launch(self, schedule: Schedule) -> StepResult:
        for chunk in schedule.chunks:
            order, sequence = chunk.sequence.request.params.seed or 0, chunk.sequence
            if order == NAN_IN_PROMPT and chunk.start > 0:
                self.poison(sequence, 0)
            if sequence.num_generated < AFTER:
                continue
            if order == RAISE:
                raise ValueError("this was ordered")
            if order == NAN:
                self.poison(sequence, chunk.start - 1)
            if order == MEMORY:
                allocate_too_much()
            if order == HANG:
                time.sleep(1000)
            if order == HANG_WITH_LOCK:
                ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock: not even a heartbeat leaves
            if order == PREPARE and sequence.num_generated == AFTER:
                self.preparing = "compiling"
                time.sleep(8)
                self.preparing = ""
            if order == EXIT:
                os._exit(3)
        return super().launch(schedule)

    def poison(self, sequence: Sequence, position: int) -> None:
        """Makes one cached key and value of it NaN, in the first layer."""
        block, row = divmod(position, self.block_size)
        self.backend.cache[:2, sequence.blocks[block] * self.block_size + row] = torch.nan


def allocate_too_much() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


if __name__ == "__main__":
    engine.core.build.Runner = FaultyRunner  # type: ignore[misc]
    exit_code = run(sys.argv[1], _build)
    os._exit(exit_code)
