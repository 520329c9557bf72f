"""Every second of a simulated clock is found again in one class, whatever is served."""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core.loop import EngineCore
from engine.core.step import StepResult
from engine.ledger import CLASSES, Ledger, Roofline, calibrate, ended, joined
from engine.messages import LedgerSnapshot, Output
from engine.scheduling import Chunk, Schedule, Scheduler, Sequence
from tests.engine.scheduling.simulated import VOCABULARY, Launched, SimulatedRunner, make_request

ROOFLINE = Roofline(weights=0.4, token=0.05, read=0.003, score=0.0007)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Device(SimulatedRunner):
    """Steps take time. With depth 0 the host waits for each; else they queue, and the device tells when one began.

    error: what its timer gets wrong, as a factor.
    """

    def __init__(self, clock: Clock, draw: random.Random, depth: int, error: float = 1.0):
        super().__init__(block_size=4, max_num_batched_tokens=8, depth=depth)
        self.clock, self.draw, self.error = clock, draw, error
        self.free_at = clock()
        self.finished_seconds = 0.0  # of steps that did not fail
        self.ends: dict[int, float] = {}

    def launch(self, schedule: Schedule) -> Launched:
        launched = super().launch(schedule)
        took = self.draw.uniform(0.1, 2.0)
        started = max(self.clock(), self.free_at)
        self.free_at = started + took
        self.ends[id(launched)] = self.free_at
        launched.result.seconds = took * self.error
        if self.depth:
            launched.result.started = started
        else:
            self.clock.now = self.free_at
        if self.draw.random() < 0.3:
            launched.result.padded = schedule.num_decodes + self.draw.randrange(20)
        return launched

    def finish(self, handle: Launched) -> StepResult:
        self.clock.now = max(self.clock(), self.ends.pop(id(handle)))
        result = super().finish(handle)
        self.finished_seconds += result.seconds
        return result


def make_core(draw: random.Random, depth: int, error: float = 1.0) -> tuple[EngineCore, Device, Clock]:
    clock = Clock()
    scheduler = Scheduler(
        num_blocks=10, block_size=4, max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32, watermark=0.0
    )
    device = Device(clock, draw, depth, error)
    core = EngineCore(device, scheduler, clock)
    core.ledger = Ledger(clock() - 3.0, clock(), ROOFLINE)
    return core, device, clock


def snapshot(core: EngineCore) -> LedgerSnapshot:
    ledger = core.stats().ledger
    assert ledger is not None and set(ledger.seconds) == set(CLASSES)
    assert all(value >= -1e-9 for value in ledger.seconds.values())
    return ledger


def check(ledger: LedgerSnapshot, last: LedgerSnapshot | None = None) -> None:
    """The identity; and nothing that only grows has fallen since `last`."""
    assert math.isclose(sum(ledger.seconds.values()), ledger.end - ledger.start, rel_tol=1e-9, abs_tol=1e-6)
    if last is not None:
        for name in set(CLASSES) - {"in_flight"}:
            assert ledger.seconds[name] >= last.seconds[name] - 1e-9, name
        assert all(ledger.tokens[name] >= last.tokens[name] for name in ledger.tokens)


class Traffic:
    """Random requests with shared prefixes, cancels, stop strings, steps that fail, waits of the host."""

    def __init__(self, seed: int, depth: int, error: float = 1.0):
        self.draw = random.Random(seed)
        self.core, self.device, self.clock = make_core(self.draw, depth, error)
        self.last: dict[str, Output] = {}  # by request
        self.prompts: dict[str, int] = {}
        self.replies: dict[str, tuple[int, dict[str, float]]] = {}  # ended by a stop string
        self.generated: dict[str, int] = {}
        self.cached: dict[str, int] = {}
        self.host = self.idle = 0.0

    def wait(self) -> None:
        seconds = self.draw.choice((0.0, 0.0, 0.01, 0.3, 5.0))
        if self.core.scheduler.sequences:
            self.host += seconds
        else:
            self.idle += seconds
        self.clock.now += seconds

    def act(self) -> None:
        draw, core = self.draw, self.core
        self.wait()
        action = draw.random()
        if action < 0.25 and len(core.scheduler.sequences) < 8:
            id = str(len(self.prompts))
            prompt = [1, 2, 5] * draw.randrange(6) + [draw.randrange(VOCABULARY)]
            stop = ("x",) if draw.random() < 0.3 else ()
            core.add(make_request(id, prompt, draw.randrange(1, 13), ignore_eos=True, stop=stop))
            self.prompts[id] = len(prompt)
        elif action < 0.29 and self.prompts:
            core.cancel([draw.choice(sorted(self.prompts))])
        elif action < 0.31:
            self.device.break_launch = True
        elif action < 0.33:
            self.device.break_finish = True
        elif action < 0.4:
            open_replies = [id for id in core.scheduler.sequences if id in self.last and self.last[id].device_seconds]
            if open_replies:
                id = draw.choice(open_replies)
                charged = self.last[id].device_seconds
                assert charged is not None
                self.replies[id] = self.generated[id], charged
                core.finish(id, *self.replies[id])
        self.wait()
        self.step()

    def step(self) -> None:
        for output in self.core.step():
            assert output.id not in self.replies
            self.last[output.id] = output
            self.generated[output.id] = self.generated.get(output.id, 0) + len(output.tokens)
            self.cached[output.id] = max(self.cached.get(output.id, 0), output.cached_tokens)

    def drain(self) -> LedgerSnapshot:
        while self.core.has_work:
            self.step()
        self.wait()
        return snapshot(self.core)


@pytest.mark.parametrize("depth", [0, 1])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), actions=st.integers(1, 120))
def test_every_second_has_a_class(depth: int, seed: int, actions: int) -> None:
    traffic, last = Traffic(seed, depth), None
    for _ in range(actions):
        traffic.act()
        ledger = snapshot(traffic.core)
        check(ledger, last)
        last = ledger
    ledger = traffic.drain()
    check(ledger, last)
    assert ledger.end == traffic.clock() and ledger.seconds["in_flight"] == 0.0
    assert ledger.seconds["startup"] == 3.0

    # What finished replies were told is what was booked, and nothing else was.
    done = {
        id: o for id, o in traffic.last.items() if o.finish_reason in ("stop", "length") and id not in traffic.replies
    }
    told = [o.device_seconds for o in done.values()] + [seconds for _, seconds in traffic.replies.values()]
    for name in ("prompt", "cached_prompt", "decode", "recompute"):
        assert ledger.seconds[name] == pytest.approx(sum(seconds[name] for seconds in told if seconds), abs=1e-9)
    ids = [*done, *traffic.replies]
    cached = sum(traffic.cached[id] for id in ids)
    assert ledger.tokens == {
        "prompt": sum(traffic.prompts[id] for id in ids) - cached,
        "cached_prompt": cached,
        "decode": sum(traffic.generated[id] for id in done) + sum(tokens for tokens, _ in traffic.replies.values()),
    }
    on_device = sum(ledger.seconds[name] for name in CLASSES if name not in ("host", "idle", "startup"))
    assert on_device == pytest.approx(traffic.device.finished_seconds, abs=1e-6)


def test_the_random_traffic_meets_every_class() -> None:
    traffic = Traffic(1, 1)
    for _ in range(1500):
        traffic.act()
    while not traffic.core.scheduler.sequences:
        traffic.act()
    empty = {name for name, value in snapshot(traffic.core).seconds.items() if value == 0.0}
    assert empty == {"cached_prompt", "rejected_draft"}  # a plain hit costs nothing; there are no drafts
    assert traffic.core.stats().preemptions > 10


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_host_and_idle_are_what_the_clock_says(seed: int) -> None:
    """With no step left in flight, the host's own time is known from outside."""
    traffic = Traffic(seed, 0)
    traffic.device.draw = random.Random(seed)
    for _ in range(60):
        traffic.act()
        traffic.device.break_finish = traffic.device.break_launch = False  # their time would count as host's
    ledger = traffic.drain()
    assert ledger.seconds["idle"] == pytest.approx(traffic.idle, abs=1e-9)
    failed = ledger.end - ledger.start - 3.0 - traffic.device.finished_seconds - traffic.host - traffic.idle
    assert ledger.seconds["host"] == pytest.approx(traffic.host + failed, abs=1e-6)


@pytest.mark.parametrize("error", [0.9, 1.1])
def test_a_wrong_timer_breaks_the_identity(error: float) -> None:
    """The gaps are not a remainder that hides it."""
    traffic = Traffic(3, 0, error)
    for _ in range(50):
        traffic.act()
    ledger = traffic.drain()
    missing = ledger.end - ledger.start - sum(ledger.seconds.values())
    assert missing == pytest.approx(traffic.device.finished_seconds * (1 / error - 1), abs=1e-6)
    assert abs(missing) > 1


def a_chunk(id: str, prompt_len: int, start: int, length: int, recomputed: int = 0) -> Chunk:
    sequence = Sequence(make_request(id, [1] * prompt_len), 0, prompt_len, 99, 99, frozenset(), [1] * prompt_len)
    return Chunk(sequence, start, length, True, recomputed, 0)


def test_a_mixed_step_is_shared_out_by_the_time_each_part_takes_alone() -> None:
    ledger = Ledger(0.0, 0.0, ROOFLINE)
    ledger.step([a_chunk("near", 1, 10, 1), a_chunk("far", 1, 1000, 1), a_chunk("new", 12, 0, 12)], 0.0, 8.0, 8.0)
    near, far, new = 11 * 0.003, 1001 * 0.003, 0.0007 * 12 * 12 / 2
    assert new > 12 * 0.003, "its scores take longer than its reads"
    decode, prefill = 0.4 + near + far, 12 * 0.05 + new
    scale = 8.0 / (decode + prefill)
    assert ledger.so_far("near")["decode"] == pytest.approx(scale * (0.2 + near))
    assert ledger.so_far("far")["decode"] == pytest.approx(scale * (0.2 + far))
    assert ledger.so_far("new")["prompt"] == pytest.approx(scale * prefill)
    assert ledger.seconds["in_flight"] == pytest.approx(8.0) == ledger.end


def test_padding_is_the_share_of_decode_that_the_added_rows_took() -> None:
    ledger = Ledger(0.0, 0.0, Roofline(weights=0.1, token=1.0))
    ledger.step([a_chunk("a", 1, 5, 1), a_chunk("b", 1, 5, 1), a_chunk("p", 4, 0, 4)], 0.0, 6.0, 6.0, padded=8)
    assert ledger.seconds["padding"] == pytest.approx(2.0 * (1 - 2 / 8))
    assert ledger.so_far("a")["decode"] == pytest.approx(2.0 * 2 / 8 / 2)
    assert ledger.so_far("p")["prompt"] == pytest.approx(4.0)


def test_recomputed_positions_are_a_class_of_their_own() -> None:
    """Of a chunk of 10: 6 computed before, 2 more of the prompt, then 2 that had been generated."""
    ledger = Ledger(0.0, 0.0)
    ledger.step([a_chunk("a", 8, 0, 10, recomputed=6)], 0.0, 10.0, 10.0)
    assert ledger.so_far("a") == pytest.approx({"prompt": 2.0, "cached_prompt": 0.0, "decode": 2.0, "recompute": 6.0})


def test_a_capture_before_a_step_is_start_up_as_far_as_the_device_waited_for_it() -> None:
    ledger = Ledger(0.0)
    ledger.runnable(0.0, True)
    ledger.step([a_chunk("a", 1, 5, 1)], 1.0, 2.0, 1.0)
    ledger.step([a_chunk("a", 1, 5, 1)], 5.0, 6.0, 1.0, prepared=2.5)  # the device waited for 3 s
    assert ledger.seconds["host"] == 1.5 and ledger.seconds["startup"] == 2.5
    ledger.step([a_chunk("a", 1, 5, 1)], 6.5, 7.0, 0.5, prepared=4.0)  # most of it beside the step before
    assert ledger.seconds["host"] == 1.5 and ledger.seconds["startup"] == 3.0
    assert sum(ledger.seconds.values()) == pytest.approx(7.0)


def test_a_restart_loses_no_second() -> None:
    first = Traffic(5, 1)
    while snapshot(first.core).seconds["in_flight"] == 0.0:
        first.act()
    last = snapshot(first.core)
    dead = ended(last, last.end + 7.0, "aborted")
    check(dead, last)
    assert dead.seconds["in_flight"] == 0.0 and dead.end == last.end + 7.0
    assert dead.seconds["aborted"] == pytest.approx(last.seconds["aborted"] + last.seconds["in_flight"] + 7.0)

    second = Traffic(6, 1)
    second.clock.now = second.device.free_at = dead.end + 5.0
    second.core.ledger = Ledger(dead.end + 2.0, dead.end + 5.0, ROOFLINE)
    for _ in range(30):
        second.act()
    ledger = joined(dead, second.drain())
    check(ledger, dead)
    assert ledger.start == last.start and ledger.end == second.clock()
    assert ledger.seconds["startup"] == 3.0 + 2.0 + 3.0
    assert joined(dead, None) == dead and joined(None, None) is None is ended(None, 1.0, "idle")


def test_calibration_times_no_compiler_and_on_a_gpu_no_python() -> None:
    config = SimpleNamespace(tie_embeddings=True, vocab_size=10, hidden_size=8, num_layers=2, num_heads=2, head_dim=4)
    info = SimpleNamespace(
        max_model_len=1000, parameters=1000, kv_cache_bytes=640, num_blocks=4, block_size=16, weight_bytes=2000
    )
    called: list[int] = []

    def forward(tokens: int) -> None:
        time.sleep(0.002 if tokens in called else 0.15)  # the first call compiles
        called.append(tokens)

    measured = calibrate(forward, config, info)  # type: ignore[arg-type]
    assert measured.weights < 0.1 and measured.token < 0.1 / 32 and set(called) == {1, 32}
    called.clear()
    given = calibrate(forward, config, info, 512, 4000.0)  # type: ignore[arg-type]
    assert given.weights == 0.5 and given.token < 0.1 / 512 and set(called) == {512}
