"""A runner without tensors whose "model" reads what lies in the blocks, so that a wrong block table gives wrong tokens.

The KV of a position is a hash of its token and the KV of the position before; a sampled token is a hash of all KV of
the sequence, gathered through the block table. `reference` says the same from the tokens alone.
"""

from __future__ import annotations

import dataclasses
import hashlib

from engine.core.step import StepResult
from engine.messages import Request, SamplingParams, TokenLogprob
from engine.scheduling import Chunk, Schedule, Sequence

VOCABULARY = 17
EOS = 3


def kv_of(before: bytes, token: int) -> bytes:
    return hashlib.md5(before + bytes([token])).digest()


def sampled(context: list[bytes]) -> int:
    return hashlib.md5(b"".join(context)).digest()[0] % VOCABULARY


def logprob_of(before: bytes, token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(kv_of(before, token)[0]), 1, [])


def context_of(tokens: list[int]) -> list[bytes]:
    kv: list[bytes] = []
    for token in tokens:
        kv.append(kv_of(kv[-1] if kv else b"", token))
    return kv


def reference(request: Request, max_model_len: int) -> tuple[list[int], str]:
    """What `request` must get, whatever else is served: generated tokens and finish reason."""
    tokens, params = list(request.prompt), request.params
    limit = min(len(tokens) + params.max_tokens, max_model_len)
    while len(tokens) < limit:
        token = sampled(context_of(tokens))
        tokens.append(token)
        generated = len(tokens) - len(request.prompt)
        stops = (() if params.ignore_eos else (EOS,)) + params.stop_token_ids
        if token in stops and generated >= params.min_tokens:
            return tokens[len(request.prompt) :], "stop"
    return tokens[len(request.prompt) :], "length"


def make_request(id: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> Request:
    """A Request; `fields` that Request itself has go there, the others to its SamplingParams."""
    own = {key: fields.pop(key) for key in ("priority", "cache_salt", "arrival") if key in fields}
    return Request(id=id, prompt=prompt, params=SamplingParams(max_tokens=max_tokens, **fields), **own)


@dataclasses.dataclass
class Launched:
    schedule: Schedule
    result: StepResult


class SimulatedRunner:
    """Computes at launch, as a device does that runs steps in order; the host sees the result at finish.

    Checks of each schedule what any runner relies on. `seconds` is what every step claims to take.
    """

    def __init__(self, block_size: int, max_num_batched_tokens: int, depth: int = 0, seconds: float = 0.5):
        self.block_size = block_size
        self.max_num_batched_tokens = max_num_batched_tokens
        self.depth = depth
        self.seconds = seconds
        self.kv: dict[tuple[int, int], bytes] = {}  # (block, offset) -> KV
        self.last_token: dict[Sequence, int] = {}  # what the device sampled last
        self.prompt_tokens_computed = 0
        self.schedules: list[Schedule] = []
        self.released: list[str] = []
        self.break_launch = self.break_finish = False
        self.raising_ids: set[str] = set()  # whoever computes these raises
        self.fatal: tuple[type[Exception], ...] = ()
        self.preparing = ""
        self.broken_ids: set[str] = set()

    def launch(self, schedule: Schedule) -> Launched:
        self.schedules.append(schedule)
        if self.break_launch:
            self.break_launch = False
            raise RuntimeError("launch is broken")
        self._check(schedule)
        if any(chunk.sequence.id in self.raising_ids for chunk in schedule.chunks):
            raise RuntimeError("one sequence is broken")
        result = StepResult({}, seconds=self.seconds)
        for chunk in schedule.chunks:
            self._write(chunk)
        for chunk in schedule.chunks:
            self._sample(chunk, result)
        return Launched(schedule, result)

    def finish(self, handle: Launched) -> StepResult:
        if self.break_finish:
            self.break_finish = False
            raise RuntimeError("finish is broken")
        return handle.result

    def release(self, sequence: Sequence) -> None:
        self.released.append(sequence.id)

    def _check(self, schedule: Schedule) -> None:
        chunks = schedule.chunks
        assert chunks
        assert len({chunk.sequence.id for chunk in chunks}) == len(chunks)
        assert sum(chunk.length for chunk in chunks) == schedule.num_tokens <= self.max_num_batched_tokens
        assert [chunk.length == 1 for chunk in chunks] == [i < schedule.num_decodes for i in range(len(chunks))]
        assert not set(schedule.preempted) & {chunk.sequence for chunk in chunks}
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            assert not chunk.stale
            assert chunk.length >= 1
            if end < sequence.num_computed:
                continue  # a step that failed when the next one was launched already, and is computed again
            assert end == sequence.num_computed <= sequence.max_computed
            assert len(set(sequence.blocks)) == len(sequence.blocks) == -(-end // self.block_size) or (
                end < len(sequence.tokens)  # a partly computed prompt holds the blocks of the rest too
                and len(sequence.blocks) == -(-len(sequence.tokens) // self.block_size)
            )
            assert chunk.sample == (
                end == len(sequence.tokens) + sequence.num_pending - chunk.sample
                and sequence.request.params.max_tokens > 0
            )

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // self.block_size], position % self.block_size

    def _write(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        tokens = sequence.tokens[chunk.start : chunk.start + chunk.length]
        if chunk.input_pending:
            tokens = [self.last_token[sequence]]
        assert len(tokens) == chunk.length
        before = self.kv[self._place(sequence, chunk.start - 1)] if chunk.start else b""
        for position, token in enumerate(tokens, chunk.start):
            before = kv_of(before, token)
            self.kv[self._place(sequence, position)] = before
        self.prompt_tokens_computed += max(0, min(chunk.start + chunk.length, sequence.prompt_len) - chunk.start)

    def _sample(self, chunk: Chunk, result: StepResult) -> None:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        context = [self.kv[self._place(sequence, position)] for position in range(end)]
        if sequence.id in self.broken_ids:
            result.errors[sequence.id] = f"{sequence.id} is broken."
            self.last_token[sequence] = 0  # a device samples something from NaN too
            return
        if sequence.request.params.prompt_logprobs is not None:
            result.prompt_logprobs[sequence.id] = [
                logprob_of(context[position - 1], sequence.tokens[position])
                for position in range(chunk.start + 1, min(end + 1, sequence.prompt_len))
            ]
        if chunk.sample:
            token = self.last_token[sequence] = result.tokens[sequence.id] = sampled(context)
            if sequence.request.params.logprobs is not None:
                result.logprobs[sequence.id] = logprob_of(context[-1], token)
