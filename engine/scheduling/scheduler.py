"""Which tokens of which sequences run in the next step: one token budget, decodes first, prefill in what is left.

Steps overlap: `schedule()` may be called again before the step that was scheduled last is finished. A sequence that was
scheduled to sample a token then has one pending: its position is known, its value only to the device.

A sequence can lose its blocks (finished, cancelled, failed, preempted) while a launched step still writes to them. They
are free at once, for three reasons. The device runs steps in order, so whoever gets a block writes it in a later step,
after the stale write, and reads only positions that it wrote itself. The stale step never writes into a block of the
prefix cache: a block is registered once finished steps have computed its every position, and a step in flight computes
later ones. Its own result is dropped: the sequence's `admission` has moved on from the chunk's (`Chunk.stale`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable

import msgspec

from engine.errors import CapacityError, RequestError
from engine.messages import STEP_SIZES, EngineStats, Request
from engine.scheduling.block_pool import BlockPool, block_hash, root_hash
from engine.scheduling.sequence import Sequence, State

CROWD = 8  # sequences; what more of them read, a CPU reads block by block wherever it lies


@dataclasses.dataclass(slots=True, eq=False)
class Chunk:
    """Positions start .. start + length - 1 of one sequence, computed in one step. Its block table covers them."""

    sequence: Sequence
    start: int
    length: int
    sample: bool  # a token is sampled after the last position
    recomputed: int  # how many of the positions this sequence had computed before it was preempted
    admission: int  # of the sequence, when scheduled

    @property
    def input_pending(self) -> bool:
        """At launch: the one input token is still being sampled by the step before; only the device knows its value."""
        return self.start >= len(self.sequence.tokens)

    @property
    def stale(self) -> bool:
        """True when the sequence lost its blocks after this was scheduled: the result means nothing."""
        return self.admission != self.sequence.admission


@dataclasses.dataclass(slots=True, eq=False)
class Schedule:
    """One step. Every sequence occurs at most once."""

    chunks: list[Chunk]  # those of length 1 first
    num_decodes: int  # how many of length 1: decodes, and prompts of which one token was left
    num_tokens: int
    preempted: list[Sequence]  # lost their blocks to the others in this step; they are waiting again
    prefilling: set[bytes]  # hashes of the prompt blocks that this step completes


class Scheduler:
    """Holds every sequence from `add` until it is finished.

    num_blocks, block_size: the KV pool, in blocks and in tokens a block. max_num_seqs: sequences that run at a time.
    max_num_batched_tokens: token budget of a step. max_model_len: tokens of a sequence, prompt included.
    watermark: share of the pool that admission leaves to the growth of those that run. contiguous: see BlockPool.
    eos_token_ids: the model's. Raises CapacityError naming the option that is too small.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        watermark: float = 0.01,
        contiguous: bool = False,
        eos_token_ids: Iterable[int] = (),
    ):
        sizes = {
            "num_blocks": num_blocks,
            "block_size": block_size,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_model_len": max_model_len,
        }
        for name, value in sizes.items():
            if value < 1:
                raise CapacityError(f"{name} is {value}; it must be at least 1.")
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks, contiguous)
        self.sequences: dict[str, Sequence] = {}  # waiting or running, by request id
        self._watermark_blocks = math.ceil(watermark * num_blocks)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._number = 0
        # A heap by rank: O(log n). A preempted sequence returns with its old rank, hence to the front of its priority.
        # Cancelled ones stay in the heap until they come up, or until they are half of it.
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._num_waiting = 0
        # Sorted by rank, found by bisection. At most max_num_seqs, all of which a step looks at anyway.
        self._running: list[Sequence] = []
        self._in_flight: list[Schedule] = []
        self._stats = EngineStats(blocks_total=num_blocks)

    # What comes in and goes out.

    def add(self, request: Request, wait: bool = False) -> Sequence:
        """Queues a request. Raises RequestError if it can never be served. wait: not to be scheduled before `wake`."""
        prompt_len, params = len(request.prompt), request.params
        if request.id in self.sequences:
            raise RequestError(f"The request id {request.id!r} is in use; ids must be unique.", "id")
        if prompt_len == 0:
            raise RequestError("The prompt is empty; it must have at least one token.", "prompt")
        if params.max_tokens < 0:
            raise RequestError(f"max_tokens is {params.max_tokens}; it must be at least 0.", "max_tokens")
        if prompt_len + min(params.max_tokens, 1) > self.max_model_len:
            raise RequestError(
                f"The prompt has {prompt_len} tokens; the model's context is {self.max_model_len} tokens, "
                "of which at least one is needed for the answer.",
                "prompt",
                "context_length_exceeded",
            )
        max_len = min(prompt_len + params.max_tokens, self.max_model_len)
        max_computed = max(max_len - 1, prompt_len)
        if self._blocks_for(max_computed) > self.pool.num_blocks:
            raise RequestError(
                f"The prompt's {prompt_len} tokens and max_tokens {params.max_tokens} need {max_computed} tokens of KV "
                f"cache; the whole cache has {self.pool.num_blocks * self.block_size} (option kv_cache_tokens).",
                "max_tokens" if self._blocks_for(prompt_len) <= self.pool.num_blocks else "prompt",
                "context_length_exceeded",
            )
        eos = frozenset() if params.ignore_eos and not params.grammar else self._eos_token_ids
        sequence = Sequence(request, self._number, prompt_len, max_len, max_computed, eos, list(request.prompt))
        self._number += 1
        self.sequences[request.id] = sequence
        if wait:
            self._num_waiting += 1
        else:
            self._push_waiting(sequence)
        return sequence

    def wake(self, sequence: Sequence) -> None:
        """Queues a sequence that was added to wait."""
        if sequence.state is State.WAITING:
            self._num_waiting -= 1
            self._push_waiting(sequence)

    def cancel(self, id: str) -> Sequence | None:
        """Ends a request now, as "abort"; None if there is none of that id (any more). Its blocks are free at once."""
        sequence = self.sequences.get(id)
        if sequence is not None:
            self._end(sequence, "abort")
        return sequence

    def fail(self, sequence: Sequence) -> None:
        """Ends a sequence whose computation went wrong, as "error". Nobody finds its KV, which may be why."""
        if sequence.state is not State.FINISHED:
            self.pool.forget(sequence.blocks)
            self._end(sequence, "error")

    @property
    def has_work(self) -> bool:
        """False when every sequence has ended and no step is in flight."""
        return bool(self.sequences or self._in_flight)

    def stats(self) -> EngineStats:
        """Counters since the start, and what runs now."""
        return msgspec.structs.replace(
            self._stats,
            running=len(self._running),
            waiting=self._num_waiting,
            blocks_used=self.pool.num_blocks - self.pool.num_free,
            step_sizes=list(self._stats.step_sizes),
        )

    # A step.

    def schedule(self) -> Schedule | None:
        """The next step, or None if no sequence can run before a step in flight is finished.

        Somebody can always go on: the first in rank gets the blocks of all others if need be, and alone it fits.
        """
        step = Schedule([], 0, 0, [], set())
        self._schedule_decodes(step)
        self._schedule_prefills(step)
        self._admit(step)
        if not step.chunks:
            return None
        step.chunks.sort(key=lambda chunk: chunk.length > 1)
        step.num_decodes = sum(chunk.length == 1 for chunk in step.chunks)
        self._stats.steps += 1
        self._stats.scheduled_tokens += step.num_tokens
        self._stats.step_sizes[bisect_left(STEP_SIZES, step.num_tokens)] += 1
        self._in_flight.append(step)
        return step

    def finish(self, step: Schedule, tokens: dict[str, int]) -> list[tuple[Sequence, int | None]]:
        """Takes the sampled tokens (by request id) of a step that the device has done; steps finish in order.

        Returns each sequence that got a token or ended, with the token; None where the end came without one
        (max_tokens 0). Sequences that have ended are no longer held. Those of a step that went wrong are ended by
        `fail` before.
        """
        self._in_flight.remove(step)
        results: list[tuple[Sequence, int | None]] = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if chunk.stale:
                continue
            sequence.kv_done = chunk.start + chunk.length
            token = None
            if chunk.sample:
                token = tokens[sequence.id]
                sequence.num_pending -= 1
                sequence.append(token)
                self._stats.generation_tokens += 1
            elif sequence.kv_done == sequence.max_len:  # max_tokens 0
                sequence.finish_reason = "length"
            self._register(sequence)
            if sequence.num_generated == 1 or (token is None and sequence.finish_reason):
                self._stats.prompt_tokens += sequence.prompt_len
            if sequence.finish_reason:
                self._end(sequence, sequence.finish_reason)
            if sequence.finish_reason or token is not None:
                results.append((sequence, token))
        return results

    def _schedule_decodes(self, step: Schedule) -> None:
        """One token for each running sequence that has just one to compute, by rank; the last in rank are preempted."""
        index = 0
        while index < len(self._running) and step.num_tokens < self.max_num_batched_tokens:
            sequence = self._running[index]
            index += 1
            if sequence.remaining != 1:
                continue
            if sequence.num_computed == len(sequence.blocks) * self.block_size:
                # Victims rank after this one, so none of them is in the step yet. The last in rank does not preempt
                # itself: it keeps what it has and waits for a block (those before it go on, or take its blocks).
                while not self.pool.num_free and self._running[-1] is not sequence:
                    self._preempt(step)
                if not self.pool.num_free:
                    return
                sequence.blocks += self.pool.allocate(1, sequence.blocks[-1], self._room(sequence))
            self._take(step, sequence, 1)

    def _schedule_prefills(self, step: Schedule) -> None:
        """The next chunk of running sequences that are only partly computed; they got its blocks when admitted."""
        for sequence in self._running:
            budget = self.max_num_batched_tokens - step.num_tokens
            if not budget:
                return
            if sequence.remaining > 1:
                self._take(step, sequence, min(sequence.remaining, budget))

    def _admit(self, step: Schedule) -> None:
        """Waiting sequences by rank, while there is budget, and blocks for all of their tokens beyond the watermark.

        The first that does not fit holds up those behind it, so that a large one is not overtaken for ever. Nobody is
        admitted in a step that had to preempt: the victim, which lost a pending token too, might fit again at once.
        """
        while step.num_tokens < self.max_num_batched_tokens and len(self._running) < self.max_num_seqs:
            sequence = self._first_waiting()
            if sequence is None or step.preempted:
                return
            free = self.pool.num_free
            if sequence.refused_free is not None and free <= sequence.refused_free:
                return
            cached = self._find_cached(sequence, step)
            if cached is None:
                return
            wanted = self._blocks_for(len(sequence.tokens)) - len(cached)
            left = free - wanted - sum(map(self.pool.is_free, cached))
            if left < (self._watermark_blocks if self._running else 0):
                sequence.refused_free = free
                return
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            self._start(sequence, cached, wanted)
            self._take(step, sequence, min(sequence.remaining, self.max_num_batched_tokens - step.num_tokens))

    def _find_cached(self, sequence: Sequence, step: Schedule) -> list[int] | None:
        """Blocks of the prefix cache that hold the beginning of the sequence; its last token is always left to compute.

        None if it should wait, because a step in flight is computing the very block it lacks (n choices of one
        prompt; many requests with one system prompt): that block will be found when that step is finished.
        """
        if not self.enable_prefix_caching or sequence.request.params.prompt_logprobs is not None:
            return []
        limit = (len(sequence.tokens) - 1) // self.block_size
        self._hash_blocks(sequence, limit)
        found: list[int] = []
        for hash in sequence.hashes[:limit]:
            block = self.pool.lookup(hash)
            if block is None:
                if any(hash in other.prefilling for other in (step, *self._in_flight)):
                    return None
                break
            found.append(block)
        return found

    def _start(self, sequence: Sequence, cached: list[int], wanted: int) -> None:
        """Gives a waiting sequence its blocks: those found in the cache, and `wanted` more."""
        for block in cached:
            self.pool.share(block)
        sequence.blocks = cached
        sequence.blocks = cached + self.pool.allocate(wanted, cached[-1] if cached else None, self._room(sequence))
        sequence.num_registered = len(cached)
        sequence.num_computed = sequence.kv_done = len(cached) * self.block_size
        sequence.refused_free = None
        if sequence.admission == 0:
            sequence.cached_tokens = sequence.num_computed
            self._stats.prefix_queries += sequence.prompt_len
            self._stats.prefix_hits += sequence.cached_tokens
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_rank)

    def _room(self, sequence: Sequence) -> int:
        """Blocks that it may need beyond those it has; beside many others it is to lie close to them instead."""
        if len(self._running) >= CROWD:
            return 0
        return -(-sequence.max_computed // self.block_size) - len(sequence.blocks)

    def _take(self, step: Schedule, sequence: Sequence, length: int) -> None:
        """Puts the next `length` positions of a running sequence into the step."""
        start = sequence.num_computed
        end = start + length
        sample = end == len(sequence.tokens) + sequence.num_pending and sequence.request.params.max_tokens > 0
        recomputed = max(0, min(end, sequence.computed_before) - start)
        step.chunks.append(Chunk(sequence, start, length, sample, recomputed, sequence.admission))
        step.num_tokens += length
        sequence.num_computed = end
        sequence.computed_before = max(sequence.computed_before, end)
        sequence.num_pending += sample
        if self.enable_prefix_caching and end <= len(sequence.tokens):
            self._hash_blocks(sequence, end // self.block_size)
            step.prefilling.update(sequence.hashes[start // self.block_size : end // self.block_size])

    def _preempt(self, step: Schedule) -> None:
        """The last in rank gives up its blocks and waits again with its known tokens; a pending one is sampled anew."""
        sequence = self._running[-1]
        self._free(sequence)
        sequence.state = State.WAITING
        self._push_waiting(sequence)
        step.preempted.append(sequence)
        self._stats.preemptions += 1

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.state is State.RUNNING:
            self._free(sequence)
        else:
            self._num_waiting -= 1
        sequence.finish_reason = reason
        sequence.state = State.FINISHED
        del self.sequences[sequence.id]
        if len(self._waiting) > 2 * self._num_waiting + 16:
            self._waiting = [entry for entry in self._waiting if entry[2].state is State.WAITING]
            heapq.heapify(self._waiting)

    def _free(self, sequence: Sequence) -> None:
        """Takes the blocks from a running sequence; steps in flight no longer count for it."""
        del self._running[bisect_left(self._running, sequence.rank, key=_rank)]
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.kv_done = sequence.num_pending = sequence.num_registered = 0
        sequence.admission += 1

    def _register(self, sequence: Sequence) -> None:
        """Offers the blocks that finished steps have filled to the prefix cache."""
        if self.enable_prefix_caching:
            full = sequence.kv_done // self.block_size
            self._hash_blocks(sequence, full)
            for index in range(sequence.num_registered, full):
                self.pool.register(sequence.blocks[index], sequence.hashes[index])
            sequence.num_registered = full

    def _hash_blocks(self, sequence: Sequence, count: int) -> None:
        """Extends `sequence.hashes` to its first `count` blocks, whose tokens are all known."""
        size, hashes = self.block_size, sequence.hashes
        for index in range(len(hashes), count):
            parent = hashes[-1] if hashes else root_hash(sequence.request.cache_salt)
            hashes.append(block_hash(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _first_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][2].state is not State.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][2] if self._waiting else None

    def _push_waiting(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (*sequence.rank, sequence))
        self._num_waiting += 1

    def _blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_size)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
