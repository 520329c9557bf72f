"""What the loop needs of a runner, and what a runner gives back for a step. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from engine.grammar import Grammars
from engine.messages import TokenLogprob
from engine.scheduling.scheduler import Schedule
from engine.scheduling.sequence import Sequence


@dataclasses.dataclass(slots=True)
class StepResult:
    """Everything by request id.

    tokens: one for each chunk with `sample`. logprobs: of that token, where the request asked for them.
    prompt_logprobs: where asked for, those of the prompt tokens that this chunk predicts: positions start + 1 ..
    start + length as far as they lie in the prompt. errors: a sentence for each sequence whose computation went wrong;
    it needs no entry elsewhere. seconds: that the device took for the step, by its own timer. started: when the device
    began it, on the loop's clock; None: as it was launched, and it ended when `finish` returned. padded: rows of decode
    that were computed, if more than were scheduled (captured graphs). prepared: seconds of capturing before it.
    """

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprob] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    started: float | None = None
    padded: int = 0
    prepared: float = 0.0


class StepRunner(Protocol):
    """Turns schedules into computation, in the order of their launch."""

    @property
    def depth(self) -> int:
        """Steps that may stay in flight while the host goes on: 0 finishes each step at once. None does that draws for
        a grammar."""

    @property
    def fatal(self) -> tuple[type[Exception], ...]:
        """Exceptions after which the device computes nothing more."""

    @property
    def preparing(self) -> str:
        """What launches do once and may take long over: "compiling", "capturing"; "" while they do nothing of it."""

    @property
    def grammars(self) -> Grammars:
        """Compiles what `Sequence.guide` follows."""

    def launch(self, schedule: Schedule) -> Any:
        """Starts a step and returns a handle for `finish`."""

    def finish(self, handle: Any) -> StepResult:
        """Waits for a launched step."""

    def release(self, sequence: Sequence) -> None:
        """The sequence ended, was preempted or is launched anew: forget what is kept for it. A launched step may still
        compute it.

        Called once or more, also for a sequence that was never launched.
        """
