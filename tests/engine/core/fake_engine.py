"""An engine process with a core that does no arithmetic, for the faults that a real one does not have on request.

Run like engine.core.process. Each step gives every request one token, 100, 101, ...; a prompt's first token is an
order: 1 never ends, 2 dies by an exception, 3 is a step that hangs, 4 is refused; else params.max_tokens tokens.
FEN_FAKE: "fail" cannot load, "crash" is killed while loading, "slow" loads for two seconds.
"""

import os
import signal
import sys
import time

from engine.core.process import run
from engine.errors import CheckpointError, RequestError
from engine.messages import EngineInfo, EngineOptions, EngineStats, Output, Request

INFO = EngineInfo(
    model="fake",
    path="",
    architecture="none",
    parameters=0,
    quantization="",
    dtype="",
    device="",
    vocab_size=1000,
    max_model_len=1000,
    block_size=16,
    num_blocks=100,
    kv_cache_bytes=0,
    weight_bytes=0,
    load_seconds=0.0,
    batch_invariant=False,
)


class FakeCore:
    preparing = ""
    forecast = 0.0

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.given: dict[str, int] = {}
        self.totals = EngineStats()

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        if request.prompt[0] == 4:
            raise RequestError("the prompt is too long", param="prompt", code="context_length_exceeded")
        self.requests[request.id] = request
        self.given[request.id] = 0

    def cancel(self, ids: list[str]) -> None:
        for id in ids:
            self.requests.pop(id, None)

    def step(self) -> list[Output]:
        time.sleep(0.005)
        self.totals.steps += 1
        outputs = []
        for id, request in list(self.requests.items()):
            if request.prompt[0] == 2:
                raise ValueError("two")
            if request.prompt[0] == 3:
                time.sleep(1000)
            output = Output(id=id, tokens=[100 + self.given[id]])
            self.given[id] += 1
            self.totals.generation_tokens += 1
            if request.prompt[0] != 1 and self.given[id] == request.params.max_tokens:
                output.finish_reason = "length"
                del self.requests[id]
            outputs.append(output)
        return outputs

    def idle(self) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.requests), steps=self.totals.steps, generation_tokens=self.totals.generation_tokens
        )


def build(options: EngineOptions, progress):
    progress("weights", 0.5)
    fault = os.environ.get("FEN_FAKE", "")
    if fault == "fail":
        raise CheckpointError("the file is not a checkpoint")
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        time.sleep(2)
    return FakeCore(), INFO


if __name__ == "__main__":
    code = run(sys.argv[1], build)
    os._exit(code)
