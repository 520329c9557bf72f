"""One request on its way through the engine: its tokens, its block table, and how far it has come."""

from __future__ import annotations

import dataclasses
import enum

from engine.grammar import Guide
from engine.messages import Request


class State(enum.Enum):
    WAITING = "waiting"  # no blocks; in the scheduler's queue
    RUNNING = "running"  # has blocks; is, or soon will be, in a step
    FINISHED = "finished"  # `finish_reason` says why


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request.

    Positions, left to right (each mark is at most the next):

        0 ... kv_done ......... num_computed ........... len(tokens) + num_pending ... max_len
        |KV in its blocks|KV being computed by|not yet computed: the rest of a prompt,|
        |for certain     |the steps in flight |or the token just sampled              |

    The last `num_pending` tokens are being sampled by steps in flight: they have a position but no value here yet.
    """

    request: Request
    number: int  # order of arrival, unique in its scheduler
    prompt_len: int
    max_len: int  # tokens it may have in all, prompt included
    max_computed: int  # positions whose KV it may ever need: the very last token is never fed back
    eos_token_ids: frozenset[int]  # those that stop it: empty with ignore_eos
    tokens: list[int]  # prompt, then generated

    state: State = State.WAITING
    finish_reason: str | None = None  # as in messages.Output
    stop_reason: int | None = None
    num_computed: int = 0
    num_pending: int = 0  # 0 or 1 when schedule() is called; one more between a launch and the finish before it
    kv_done: int = 0
    computed_before: int = 0  # highest num_computed ever, for the accounting of recomputed positions
    blocks: list[int] = dataclasses.field(default_factory=list)  # block table: position p is in blocks[p // block_size]
    hashes: list[bytes] = dataclasses.field(default_factory=list)  # of its full blocks, as far as they were needed
    num_registered: int = 0  # leading blocks that have been offered to the prefix cache (or came from it)
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    admission: int = 0  # grows whenever it loses its blocks: a step launched before that is stale (see Chunk.stale)
    refused_free: int | None = None  # free blocks when its admission was last refused: pointless to retry with no more
    first_scheduled: float | None = None  # seconds, the engine's clock
    guide: Guide | None = None  # where it is in its grammar; set before it is scheduled

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def rank(self) -> tuple[int, int]:
        """Who is served first (smaller) and preempted last."""
        return self.request.priority, self.number

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Positions that could be computed now."""
        return min(len(self.tokens) + self.num_pending, self.max_computed) - self.num_computed

    @property
    def held(self) -> set[int]:
        """Tokens that would end it before they may."""
        params = self.request.params
        held = set(self.eos_token_ids) if params.ignore_eos else set()
        if self.num_generated < params.min_tokens:
            held.update(self.eos_token_ids, params.stop_token_ids)
        return held

    def append(self, token: int) -> None:
        """Takes a sampled token and sets `finish_reason` if it is the last one.

        `min_tokens` holds back eos and stop tokens here as well as in the sampler, which does not draw them unless a
        grammar allows nothing else.
        """
        self.tokens.append(token)
        params = self.request.params
        if self.num_generated >= params.min_tokens or params.grammar:
            if token in self.eos_token_ids:
                self.finish_reason = "stop"
                return
            if token in params.stop_token_ids:
                self.finish_reason, self.stop_reason = "stop", token
                return
        if len(self.tokens) >= self.max_len:
            self.finish_reason = "length"
