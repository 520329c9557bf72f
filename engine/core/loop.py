"""The loop: schedule a step, launch it, finish the one before. Requests in, outputs out; in the caller's thread."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from engine.core.step import StepResult, StepRunner
from engine.errors import FenError, is_out_of_memory
from engine.grammar import Guide
from engine.ledger import Ledger
from engine.messages import EngineStats, Output, Request, TokenLogprob
from engine.scheduling.scheduler import Chunk, Schedule, Scheduler
from engine.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)


class EngineCore:
    """Drives one runner by one scheduler. `clock` gives seconds and is the clock of `Request.arrival`."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic):
        self.runner = runner
        self.scheduler = scheduler
        self.clock = clock
        self.ledger = Ledger(clock())  # build_core gives it one that is calibrated
        self.forecast = 0.0  # seconds that the step under way should take
        self._in_flight: deque[tuple[Schedule, float, Any]] = deque()  # with the time of the launch, and its handle
        self._outputs: list[Output] = []  # to be returned by step()
        self._compiling: dict[Sequence, concurrent.futures.Future[Guide]] = {}  # waiting for it
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}  # of requests that ask for them, until sent

    def add(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never be served (the engine process answers `Refused`)."""
        grammar = request.params.grammar
        sequence = self.scheduler.add(request, wait=bool(grammar))
        if grammar:
            self._compiling[sequence] = self.runner.grammars.start(grammar)
        self.ledger.runnable(self.clock(), True)
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs[request.id] = [None]

    def cancel(self, ids: Iterable[str]) -> None:
        """Ends requests; step() confirms each with an output "abort". An id that is not being served is ignored."""
        for id in ids:
            sequence = self.scheduler.cancel(id)
            if sequence is not None:
                self._close(sequence)
                self._outputs.append(Output(id=id, finish_reason="abort"))

    def finish(self, id: str, tokens: int, device_seconds: Mapping[str, float]) -> None:
        """Ends a request whose reply is complete: see messages.Finish. No output confirms it."""
        sequence = self.scheduler.cancel(id)
        if sequence is not None:
            self.ledger.close(sequence, (tokens, device_seconds))
            self._close(sequence)

    @property
    def has_work(self) -> bool:
        """False when step() would have nothing to do."""
        return bool(self._outputs or self._in_flight or self.scheduler.has_work)

    def idle(self) -> None:
        """For when there has been nothing to do for a while: what would stop the steps beside the first grammar."""
        self.runner.grammars.prepare()

    @property
    def preparing(self) -> str:
        """As the runner's."""
        return self.runner.preparing

    def stats(self) -> EngineStats:
        if not self._in_flight:
            self.ledger.advance(self.clock())
        stats = self.scheduler.stats()
        stats.ledger = self.ledger.snapshot()
        return stats

    def step(self) -> list[Output]:
        """Launches the next step and finishes an earlier one, so that at most `runner.depth` stay in flight."""
        self._take_compiled()
        while any(_is_guided(schedule) for schedule, _, _ in self._in_flight):
            self._finish()  # the next mask depends on the token
        schedule = self.scheduler.schedule()
        if schedule is not None:
            self._launch(schedule)
        elif self._compiling and not self._in_flight:
            concurrent.futures.wait(self._compiling.values(), 0.02, concurrent.futures.FIRST_COMPLETED)
        if self._in_flight and (schedule is None or len(self._in_flight) > self.runner.depth):
            self._finish()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _take_compiled(self) -> None:
        for sequence, future in [entry for entry in self._compiling.items() if entry[1].done()]:
            del self._compiling[sequence]
            error = future.exception()
            if error is None:
                sequence.guide = future.result()
                self.scheduler.wake(sequence)
            elif sequence.finish_reason is None:
                self._fail(sequence, f"The grammar cannot be followed: {error}")

    def _launch(self, schedule: Schedule) -> None:
        now = self.clock()
        for sequence in schedule.preempted:
            self.runner.release(sequence)
        for chunk in schedule.chunks:
            if chunk.sequence.first_scheduled is None:
                chunk.sequence.first_scheduled = now
        self.forecast = self.ledger.forecast(schedule.chunks)
        launched = self.clock()
        try:
            self._in_flight.append((schedule, launched, self.runner.launch(schedule)))
        except self.runner.fatal:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold its tensors, and what follows needs the room
            self._in_flight.append((schedule, launched, error))
            while self._in_flight:  # the next launch would build on what this one did not give
                self._finish()

    def _finish(self) -> None:
        schedule, started, handle = self._in_flight.popleft()
        try:
            result = self._result(handle)
        except self.runner.fatal:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            self._recover(schedule, error)
            return
        self._account(schedule.chunks, started, result)
        self._take(schedule, result)

    def _result(self, handle: Any) -> StepResult:
        if isinstance(handle, Exception):
            raise handle
        return self.runner.finish(handle)

    def _account(self, chunks: list[Chunk], started: float, result: StepResult) -> None:
        stopped = self.clock()
        if result.started is not None:
            started, stopped = result.started, result.started + result.seconds
        self.ledger.step(chunks, started, stopped, result.seconds, result.padded, result.prepared)

    def _take(self, schedule: Schedule, result: StepResult) -> None:
        for chunk in schedule.chunks:
            if chunk.stale:
                continue
            id = chunk.sequence.id
            if id in result.errors:
                self._fail(chunk.sequence, result.errors[id])
            elif id in result.prompt_logprobs and id in self._prompt_logprobs:
                # After a preemption positions come a second time.
                known = self._prompt_logprobs[id]
                known += result.prompt_logprobs[id][len(known) - chunk.start - 1 :]
        guided = [
            (chunk.sequence.guide, token)
            for chunk in schedule.chunks
            if chunk.sequence.guide is not None and not chunk.stale
            if (token := result.tokens.get(chunk.sequence.id)) is not None and token not in chunk.sequence.eos_token_ids
        ]
        if guided:
            self.runner.grammars.advance(guided)
        for sequence, token in self.scheduler.finish(schedule, result.tokens):
            self._outputs.append(self._output(sequence, token, result))
            if sequence.finish_reason:
                self._close(sequence)

    def _recover(self, schedule: Schedule, error: Exception) -> None:
        """A step went wrong. It is computed once more, and so are those launched after it, which build on it."""
        logger.error("a step of %d tokens failed", schedule.num_tokens, exc_info=error)
        later = list(self._in_flight)
        self._in_flight.clear()
        for step, started, handle in later:
            with contextlib.suppress(Exception):  # the device is done with it, its time was spent
                self._account(step.chunks, started, self._result(handle))
        for step in (schedule, *(step for step, _, _ in later)):
            result = StepResult({})
            self._again([chunk for chunk in step.chunks if not chunk.stale], result)
            self._take(step, result)

    def _again(self, chunks: list[Chunk], result: StepResult) -> None:
        """Computes chunks of a step that failed; if that fails too, in halves, until those at fault are alone."""
        if not chunks:
            return
        for chunk in chunks:
            self.runner.release(chunk.sequence)  # what is kept for it may be half of that step
        decodes = sum(chunk.length == 1 for chunk in chunks)
        self.forecast += self.ledger.forecast(chunks)
        started = self.clock()
        try:
            part = Schedule(chunks, decodes, sum(chunk.length for chunk in chunks), [], set())
            given = self.runner.finish(self.runner.launch(part))
        except self.runner.fatal:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            if len(chunks) == 1:
                self._fail(chunks[0].sequence, _sentence(error))
            else:
                self._again(chunks[: len(chunks) // 2], result)
                self._again(chunks[len(chunks) // 2 :], result)
            return
        self._account(chunks, started, given)
        for name in ("tokens", "logprobs", "prompt_logprobs", "errors"):
            getattr(result, name).update(getattr(given, name))

    def _output(self, sequence: Sequence, token: int | None, result: StepResult) -> Output:
        output = Output(
            id=sequence.id,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        if token is not None:
            output.tokens = [token]
            if sequence.request.params.logprobs is not None:
                output.logprobs = [result.logprobs[sequence.id]]
        if sequence.finish_reason:
            output.device_seconds = self.ledger.close(sequence)
        elif sequence.request.params.stop:
            output.device_seconds = self.ledger.so_far(sequence.id)
        if sequence.num_generated <= 1:  # the first output
            output.cached_tokens = sequence.cached_tokens
            output.prompt_logprobs = self._prompt_logprobs.pop(sequence.id, None)
            if sequence.first_scheduled is not None:
                output.queue_seconds = sequence.first_scheduled - sequence.request.arrival
        return output

    def _fail(self, sequence: Sequence, message: str) -> None:
        self.scheduler.fail(sequence)
        self._close(sequence)
        self._outputs.append(Output(id=sequence.id, finish_reason="error", error=message))

    def _close(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended."""
        self.ledger.close(sequence)
        if not self.scheduler.sequences:
            self.ledger.runnable(self.clock(), False)
        self._prompt_logprobs.pop(sequence.id, None)
        self.runner.release(sequence)


def _is_guided(schedule: Schedule) -> bool:
    return any(chunk.sample and chunk.sequence.guide is not None for chunk in schedule.chunks)


def _sentence(error: Exception) -> str:
    """What the user is told; the log has the rest."""
    if isinstance(error, FenError):
        return str(error)
    if is_out_of_memory(error):
        return "The engine ran out of memory while computing this request; try again later, or with a shorter prompt."
    return "The engine failed while computing this request; its log has the details."
