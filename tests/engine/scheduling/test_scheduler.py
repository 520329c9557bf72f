from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import CapacityError, RequestError
from engine.messages import Request
from engine.scheduling import Schedule, Scheduler, Sequence, State
from tests.engine.scheduling.simulated import EOS, VOCABULARY, Launched, SimulatedRunner, make_request, reference


class Simulation:
    """A scheduler and a simulated runner, driven by hand: launches and finishes may alternate in any way."""

    def __init__(self, depth: int = 0, **options: object):
        defaults = {
            "num_blocks": 16,
            "block_size": 4,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 32,
            "eos_token_ids": (EOS,),
        }
        self.scheduler = Scheduler(**{**defaults, **options})
        self.runner = SimulatedRunner(self.scheduler.block_size, self.scheduler.max_num_batched_tokens, depth)
        self.in_flight: list[Launched] = []
        self.requests: dict[str, Request] = {}
        self.generated: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        self.requests[request.id] = request
        self.generated[request.id] = []
        return sequence

    def launch(self) -> Schedule | None:
        schedule = self.scheduler.schedule()
        if schedule is not None:
            self.in_flight.append(self.runner.launch(schedule))
        return schedule

    def finish(self) -> None:
        launched = self.in_flight.pop(0)
        for sequence, token in self.scheduler.finish(launched.schedule, launched.result.tokens):
            if token is not None:
                self.generated[sequence.id].append(token)
            if sequence.finish_reason:
                self.ended[sequence.id] = sequence.finish_reason
                got = self.generated[sequence.id], sequence.finish_reason
                assert got == reference(self.requests[sequence.id], self.scheduler.max_model_len)

    def step(self) -> None:
        """As the engine's loop does it."""
        launched = self.launch()
        if self.in_flight and (launched is None or len(self.in_flight) > self.runner.depth):
            self.finish()

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left; then everything must have ended and every block be free."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "starved or stuck"
        assert set(self.ended) == set(self.requests)
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        assert all(self.scheduler.pool.is_free(block) for block in range(self.scheduler.pool.num_blocks))

    def check(self) -> None:
        """What holds between any two calls."""
        scheduler = self.scheduler
        running, size = scheduler._running, scheduler.block_size
        assert len(running) <= scheduler.max_num_seqs
        assert [sequence.rank for sequence in running] == sorted(sequence.rank for sequence in running)
        owners: dict[int, list[tuple[int, Sequence]]] = {}
        for sequence in running:
            assert sequence.state is State.RUNNING
            assert sequence.kv_done <= sequence.num_computed <= len(sequence.tokens) + sequence.num_pending
            for index, block in enumerate(sequence.blocks):
                owners.setdefault(block, []).append((index, sequence))
        assert scheduler.pool.num_blocks - scheduler.pool.num_free == len(owners)
        for block, users in owners.items():
            assert scheduler.pool._refs[block] == len(users)
            prefixes = {(user.request.cache_salt, *user.tokens[: (index + 1) * size]) for index, user in users}
            assert len(users) == 1 or (len(prefixes) == 1 and all(user.kv_done >= (i + 1) * size for i, user in users))
        for sequence in scheduler.sequences.values():
            assert sequence.state in (State.WAITING, State.RUNNING)
            assert sequence.state is State.RUNNING or not sequence.blocks
        waiting = [entry[2] for entry in scheduler._waiting if entry[2].state is State.WAITING]
        assert len(waiting) == len(set(waiting)) == scheduler._num_waiting
        assert set(waiting) | set(running) == set(scheduler.sequences.values())


# Random traffic.

OPTIONS = {
    "num_blocks": st.integers(3, 14),
    "block_size": st.sampled_from([1, 2, 4, 5]),
    "max_num_seqs": st.integers(1, 6),
    "max_num_batched_tokens": st.sampled_from([1, 2, 3, 5, 8, 64]),
    "max_model_len": st.integers(2, 30),
    "enable_prefix_caching": st.booleans(),
    "watermark": st.sampled_from([0.0, 0.01, 0.3]),
    "contiguous": st.booleans(),
}
PREFIXES = [[], [1, 2, 1, 2, 1, 2, 1, 2, 1], [1, 2, 1, 2, 5], [4] * 12]
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.builds(
            lambda prefix, rest: prefix + rest,
            st.sampled_from(PREFIXES),
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        ),
        "max_tokens": st.integers(0, 14),
        "min_tokens": st.sampled_from([0, 0, 3]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), (), (7,)]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "priority": st.sampled_from([0, 0, 0, -1, 2]),
        "cache_salt": st.sampled_from(["", "", "salt"]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any traffic over any pool: tokens as if alone, steps in any overlap, and nothing left behind."""

    @initialize(depth=st.integers(0, 2), options=st.fixed_dictionaries(OPTIONS))
    def start(self, depth: int, options: dict[str, object]) -> None:
        self.simulation = Simulation(depth, **options)
        self.count = 0

    @rule(fields=REQUESTS)
    def add(self, fields: dict[str, object]) -> None:
        self.count += 1
        try:
            self.simulation.add(make_request(f"r{self.count}", **fields))
        except RequestError as error:
            assert error.code == "context_length_exceeded"

    @precondition(lambda self: len(self.simulation.in_flight) <= self.simulation.runner.depth)
    @rule()
    def launch(self) -> None:
        before = self.simulation.scheduler.has_work
        assert self.simulation.launch() or self.simulation.in_flight or not before, "nobody can go on"

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def finish(self) -> None:
        self.simulation.finish()

    @precondition(lambda self: self.simulation.scheduler.sequences)
    @rule(data=st.data(), error=st.booleans())
    def drop(self, data: st.DataObject, error: bool) -> None:
        simulation = self.simulation
        id = data.draw(st.sampled_from(sorted(simulation.scheduler.sequences)))
        sequence = simulation.scheduler.sequences[id]
        if error:
            simulation.scheduler.fail(sequence)
        else:
            assert simulation.scheduler.cancel(id) is sequence
        assert not sequence.blocks
        simulation.ended[id] = "error" if error else "abort"
        assert sequence.finish_reason == simulation.ended[id]

    @invariant()
    def consistent(self) -> None:
        self.simulation.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.run()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("contiguous", [False, True])
def test_thousands_of_steps_under_load(depth: int, contiguous: bool) -> None:
    """A pool for about two sequences, always more requests than it can hold, a tenth of them cancelled midway."""
    draw = random.Random(depth)
    simulation = Simulation(depth, num_blocks=14, max_num_seqs=6, max_num_batched_tokens=9, contiguous=contiguous)
    for number in range(3000):
        if simulation.scheduler.stats().waiting < 5:
            prompt = PREFIXES[draw.randrange(4)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 6))]
            simulation.add(make_request(str(number), prompt, draw.randrange(1, 18), ignore_eos=draw.random() < 0.8))
        if draw.random() < 0.02:
            id = draw.choice(sorted(simulation.scheduler.sequences))
            simulation.scheduler.cancel(id)
            simulation.ended[id] = "abort"
        simulation.step()
        simulation.check()
    simulation.run()
    stats = simulation.scheduler.stats()
    assert stats.preemptions > 50 and stats.prefix_hits > 500 and stats.steps > 2500


@pytest.mark.parametrize("budget", [1, 3, 7, 64])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_more_than_the_pool_holds_at_once(budget: int, prefix_caching: bool) -> None:
    """A pool for two sequences, eight long requests: all finish, by preemption."""
    options = {"num_blocks": 16, "max_num_seqs": 8, "max_num_batched_tokens": budget}
    simulation = Simulation(1, enable_prefix_caching=prefix_caching, **options)
    for number in range(8):
        simulation.add(make_request(str(number), [number, 1, 2], 29, ignore_eos=True))
    simulation.run()
    assert set(simulation.ended.values()) == {"length"}
    assert simulation.scheduler.stats().generation_tokens == 8 * 29


# One behaviour each.


def test_decodes_come_before_prefill_chunks_and_the_budget_holds() -> None:
    simulation = Simulation(max_num_batched_tokens=6, num_blocks=32)
    simulation.add(make_request("a", [1], 20, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("b", [2] * 11, 20, ignore_eos=True))
    shapes = []
    for _ in range(4):
        schedule = simulation.launch()
        assert schedule is not None
        shapes.append([(chunk.sequence.id, chunk.start, chunk.length, chunk.sample) for chunk in schedule.chunks])
        simulation.finish()
    assert shapes == [
        [("a", 1, 1, True), ("b", 0, 5, False)],
        [("a", 2, 1, True), ("b", 5, 5, False)],
        [("a", 3, 1, True), ("b", 10, 1, True)],
        [("a", 4, 1, True), ("b", 11, 1, True)],
    ]


def test_smaller_priority_first_then_arrival() -> None:
    simulation = Simulation(max_num_seqs=1)
    for id, priority in [("late", 5), ("first", 0), ("second", 0), ("urgent", -1)]:
        simulation.add(make_request(id, [1], 2, priority=priority))
    simulation.run()
    assert list(simulation.ended) == ["urgent", "first", "second", "late"]


def test_the_last_in_rank_is_preempted_and_returns_first() -> None:
    options = {"num_blocks": 6, "max_num_seqs": 2, "max_num_batched_tokens": 4, "watermark": 0.0}
    simulation = Simulation(**options, enable_prefix_caching=False)
    low = simulation.add(make_request("low", [1, 2, 3], 14, ignore_eos=True, priority=1))
    simulation.step()
    high = simulation.add(make_request("high", [2, 2, 3], 14, ignore_eos=True, priority=0))
    waiting = simulation.add(make_request("waiting", [4] * 3, 1, priority=1))
    preempted: list[Sequence] = []
    while not preempted:
        schedule = simulation.launch()
        assert schedule is not None
        preempted += schedule.preempted
        simulation.finish()
    assert preempted == [low] and high.state is State.RUNNING
    assert low.tokens[:3] == [1, 2, 3] and low.num_generated > 0, "it keeps what was generated"
    simulation.run()
    chunks = [chunk for schedule in simulation.runner.schedules for chunk in schedule.chunks]
    again = [index for index, chunk in enumerate(chunks) if chunk.recomputed]
    assert {chunks[index].sequence for index in again} == {low}
    assert again[0] < next(index for index, chunk in enumerate(chunks) if chunk.sequence is waiting)
    recomputed = sum(chunk.recomputed for chunk in chunks)
    assert sum(chunk.length for chunk in chunks if chunk.sequence is low) == low.max_computed + recomputed


def test_a_large_request_is_not_overtaken() -> None:
    simulation = Simulation(num_blocks=8, max_num_seqs=4, watermark=0.0, enable_prefix_caching=False)
    simulation.add(make_request("running", [1] * 9, 8, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("large", [2] * 25, 1))
    simulation.add(make_request("small", [3], 1))
    simulation.run()
    order = dict.fromkeys(chunk.sequence.id for schedule in simulation.runner.schedules for chunk in schedule.chunks)
    assert list(order) == ["running", "large", "small"]


def test_admission_leaves_the_watermark_to_those_that_run() -> None:
    def admitted(watermark: float) -> int:
        simulation = Simulation(num_blocks=10, max_num_seqs=9, max_num_batched_tokens=64, watermark=watermark)
        for number in range(9):
            simulation.add(make_request(str(number), [number] * 4, 20, ignore_eos=True))
        simulation.launch()
        return simulation.scheduler.stats().running

    assert [admitted(watermark) for watermark in (0.0, 0.1, 0.5)] == [9, 9, 5]
    assert admitted(1.0) == 1, "the only one is admitted in any case"


def test_an_equal_prompt_waits_for_the_block_that_is_being_computed() -> None:
    """n choices of one prompt: it is computed once, but for the tokens after its last full block."""
    simulation = Simulation(depth=1, max_num_batched_tokens=64)
    sequences = [simulation.add(make_request(str(i), [1, 2, 3, 4, 5, 6, 7, 8, 9], 3)) for i in range(4)]
    simulation.run()
    assert [sequence.cached_tokens for sequence in sequences] == [0, 8, 8, 8]
    assert simulation.runner.prompt_tokens_computed == 9 + 3
    stats = simulation.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (36, 24, 36)


def test_a_prompt_in_the_cache_still_computes_its_last_token() -> None:
    simulation = Simulation()
    for id in ("a", "b"):
        sequence = simulation.add(make_request(id, [1, 2, 3, 4, 5, 6, 7, 8], 2))
        simulation.run()
    assert sequence.cached_tokens == 4


@pytest.mark.parametrize("fields", [{"cache_salt": "mine"}, {"prompt_logprobs": 0}])
def test_what_bypasses_the_prefix_cache(fields: dict[str, object]) -> None:
    simulation = Simulation()
    simulation.add(make_request("a", [1] * 9, 2))
    simulation.run()
    sequence = simulation.add(make_request("b", [1] * 9, 2, **fields))
    simulation.run()
    assert sequence.cached_tokens == 0


def test_generated_tokens_are_cached_too() -> None:
    """The next turn of a chat finds the answer of the last one."""
    simulation = Simulation()
    first = simulation.add(make_request("a", [1, 2, 3], 10, ignore_eos=True))
    simulation.run()
    second = simulation.add(make_request("b", [*first.tokens, 5, 6], 2))
    simulation.run()
    assert second.cached_tokens == 12 == (first.max_len - 1) // 4 * 4


def test_only_what_finished_steps_have_computed_is_cached() -> None:
    simulation = Simulation(depth=1, max_num_batched_tokens=4)
    sequence = simulation.add(make_request("a", [1] * 9, 2))
    simulation.launch()
    simulation.launch()
    cached = []
    for _ in range(2):
        simulation.finish()
        cached.append([simulation.scheduler.pool.lookup(hash) for hash in sequence.hashes])
    assert cached == [[sequence.blocks[0], None], sequence.blocks[:2]]
    simulation.run()


def test_nothing_is_scheduled_beyond_the_last_token() -> None:
    """With a step in flight the end by max_tokens or context is known in advance; only eos comes as a surprise."""
    for max_tokens, limit in [(3, 32), (50, 7)]:
        simulation = Simulation(depth=1, max_model_len=limit)
        simulation.add(make_request("a", [1, 2, 3, 4], max_tokens, ignore_eos=True))
        simulation.run()
        assert simulation.ended == {"a": "length"}
        assert sum(schedule.num_tokens for schedule in simulation.runner.schedules) == 4 + 3 - 1


def test_max_tokens_0_computes_the_prompt_alone() -> None:
    simulation = Simulation(max_model_len=9)
    simulation.add(make_request("a", [1] * 9, 0))
    simulation.run()
    assert simulation.ended == {"a": "length"}
    assert simulation.generated == {"a": []}
    assert simulation.runner.prompt_tokens_computed == 9


def test_stop_rules() -> None:
    prompt = [1, 2]
    tokens, _ = reference(make_request("x", prompt, 20, ignore_eos=True), 32)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    at = tokens.index(stop) + 1

    def end(eos: tuple[int, ...] = (), **fields: object) -> tuple[int, str | None, int | None]:
        simulation = Simulation(eos_token_ids=eos)
        sequence = simulation.scheduler.add(make_request("a", prompt, 20, **fields))
        while simulation.scheduler.has_work:
            launched = simulation.runner.launch(simulation.scheduler.schedule())  # type: ignore[arg-type]
            simulation.scheduler.finish(launched.schedule, launched.result.tokens)
        return sequence.num_generated, sequence.finish_reason, sequence.stop_reason

    assert end() == (20, "length", None)
    assert end(eos=(stop,)) == (at, "stop", None)
    assert end(eos=(stop,), ignore_eos=True) == (20, "length", None)
    assert end(stop_token_ids=(stop,)) == (at, "stop", stop)
    assert end(eos=(stop,), stop_token_ids=(stop,)) == (at, "stop", None)
    assert end(eos=(stop,), ignore_eos=True, stop_token_ids=(stop,)) == (at, "stop", stop)
    assert end(eos=(stop,), min_tokens=at) == (at, "stop", None)
    assert end(eos=(stop,), min_tokens=at + 1)[0] > at


def test_cancel_frees_blocks_at_once_and_drops_the_result_in_flight() -> None:
    simulation = Simulation(depth=1)
    simulation.add(make_request("a", [1] * 9, 20, ignore_eos=True))
    simulation.launch()
    assert simulation.scheduler.stats().blocks_used == 3
    sequence = simulation.scheduler.cancel("a")
    assert sequence is not None and sequence.finish_reason == "abort"
    assert simulation.scheduler.stats().blocks_used == 0
    assert simulation.scheduler.cancel("a") is None
    assert simulation.scheduler.has_work, "its step is still to be finished"
    # Another request takes the same blocks, and another the same id, while the step is in flight.
    simulation.add(make_request("b", [2] * 9, 4))
    simulation.add(make_request("a", [1] * 9, 4))
    simulation.ended.pop("a", None)
    simulation.launch()
    simulation.finish()
    assert sequence.tokens == [1] * 9
    assert simulation.scheduler.sequences["a"].num_registered == 0, "what the cancelled one computed is not cached"
    simulation.run()


def test_cancelled_while_waiting_leaves_no_trace() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add(make_request("running", [1], 20, ignore_eos=True))
    simulation.step()
    for number in range(1000):
        simulation.scheduler.add(make_request(str(number), [1], 2, priority=1))
    simulation.add(make_request("waiting", [1], 2, priority=1))
    for number in range(1000):
        simulation.scheduler.cancel(str(number))
    assert len(simulation.scheduler._waiting) < 32
    assert simulation.scheduler.stats().waiting == 1
    simulation.run()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "at least one token"),
        ({"prompt": [1] * 32}, "prompt", "32 tokens; the model's context is 32"),
        ({"prompt": [1] * 33, "max_tokens": 0}, "prompt", "33 tokens"),
        ({"prompt": [1] * 4, "max_tokens": -1}, "max_tokens", "at least 0"),
        ({"prompt": [1] * 25, "max_tokens": 1}, "prompt", "25 tokens of KV cache; the whole cache has 24"),
        ({"prompt": [1] * 24, "max_tokens": 2}, "max_tokens", "kv_cache_tokens"),
    ],
)
def test_what_can_never_be_served_is_refused(fields: dict[str, object], param: str, words: str) -> None:
    simulation = Simulation(num_blocks=6)
    with pytest.raises(RequestError, match=words) as caught:
        simulation.scheduler.add(make_request("a", **fields))  # type: ignore[arg-type]
    assert caught.value.param == param
    assert not simulation.scheduler.has_work


def test_the_largest_that_fits_is_served() -> None:
    for prompt, max_tokens in [([1] * 24, 1), ([1] * 24, 0), ([1], 24)]:
        simulation = Simulation(num_blocks=6, watermark=0.5)
        simulation.add(make_request("a", prompt, max_tokens, ignore_eos=True))
        simulation.run()


def test_an_id_is_used_once_at_a_time() -> None:
    simulation = Simulation()
    simulation.add(make_request("a", [1], 2))
    with pytest.raises(RequestError, match="'a' is in use"):
        simulation.scheduler.add(make_request("a", [1], 2))
    simulation.run()
    simulation.add(make_request("a", [1], 2))


@pytest.mark.parametrize(
    "name", ["num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"]
)
def test_sizes_below_1_are_refused_by_name(name: str) -> None:
    with pytest.raises(CapacityError, match=f"{name} is 0"):
        Simulation(**{name: 0})


def test_no_torch() -> None:
    import subprocess
    import sys

    code = "import engine.scheduling, engine.core.loop, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
