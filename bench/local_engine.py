"""The engine in this process, with a stopwatch: scheduler, paging, sampler and loop are those of the product."""

from __future__ import annotations

import dataclasses
import itertools
import time

from engine.checkpoint import Checkpoint
from engine.core.build import build_core
from engine.errors import FenError
from engine.messages import EngineOptions, Request, SamplingParams


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of prompts that were given together and completed greedily, each by the same number of new tokens.

    first_seconds: until every prompt had its first token. seconds: until all were done. tokens: new ones, by prompt.
    """

    first_seconds: float
    seconds: float
    tokens: list[list[int]]

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first of each."""
        return sum(len(tokens) - 1 for tokens in self.tokens) / (self.seconds - self.first_seconds)

    @property
    def total_rate(self) -> float:
        """New tokens a second, the prompts' time included."""
        return sum(map(len, self.tokens)) / self.seconds


class LocalEngine:
    """Raises CheckpointError or CapacityError, as the engine does."""

    def __init__(self, options: EngineOptions, checkpoint: Checkpoint | None = None):
        """checkpoint: instead of `options.model`."""
        self.core, self.info, self.checkpoint = build_core(options, checkpoint=checkpoint)
        self._ids = itertools.count()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Timing:
        """Completes `prompts` together. Raises RequestError for what cannot fit, FenError for what fails."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        ids = [f"bench-{next(self._ids)}" for _ in prompts]
        tokens: dict[str, list[int]] = {id: [] for id in ids}
        started = time.monotonic()
        first = started
        for id, prompt in zip(ids, prompts, strict=True):
            self.core.add(Request(id=id, prompt=prompt, params=params, arrival=started))
        while self.core.has_work:
            for output in self.core.step():
                if output.error:
                    raise FenError(output.error)
                if output.tokens and not tokens[output.id]:
                    first = time.monotonic()
                tokens[output.id] += output.tokens
        return Timing(first - started, time.monotonic() - started, [tokens[id] for id in ids])
