from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Iterator

import pytest

from engine.core.loop import EngineCore
from engine.errors import CapacityError, RequestError, is_out_of_memory
from engine.messages import Output, Request
from engine.scheduling import Scheduler
from tests.engine.scheduling.simulated import (
    EOS,
    VOCABULARY,
    Launched,
    SimulatedRunner,
    context_of,
    logprob_of,
    make_request,
    reference,
)

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_core(depth: int = 0, **options: object) -> tuple[EngineCore, SimulatedRunner, Clock]:
    defaults = {
        "num_blocks": 16,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 32,
        "eos_token_ids": (EOS,),
    }
    scheduler = Scheduler(**{**defaults, **options})
    runner, clock = SimulatedRunner(scheduler.block_size, scheduler.max_num_batched_tokens, depth), Clock()
    return EngineCore(runner, scheduler, clock), runner, clock


def run(core: EngineCore, max_steps: int = 10_000) -> dict[str, list[Output]]:
    """Every output by request id, until the core has nothing to do and every block is free."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            outputs.setdefault(output.id, []).append(output)
    assert not core.has_work
    assert core.stats().blocks_used == core.stats().running == core.stats().waiting == 0
    for given in outputs.values():
        assert [output.finish_reason is not None for output in given] == [False] * (len(given) - 1) + [True]
    return outputs


def text(outputs: list[Output]) -> tuple[list[int], str | None]:
    return [token for output in outputs for token in output.tokens], outputs[-1].finish_reason


@pytest.mark.parametrize("depth", [0, 1])
def test_random_traffic_gives_each_request_what_it_gets_alone(depth: int) -> None:
    """Preemption, cache hits, cancels, failing sequences and steps; in between everybody else is answered right."""
    draw = random.Random(depth)
    core, runner, _ = make_core(depth, num_blocks=12, max_num_seqs=5, max_num_batched_tokens=7)
    requests: dict[str, Request] = {}
    outputs: dict[str, list[Output]] = {}
    touched: set[str] = set()  # cancelled or broken
    for number in range(1500):
        if core.stats().waiting < 4:
            id = str(number)
            prompt = [1, 2] * draw.randrange(6) + [draw.randrange(VOCABULARY)]
            requests[id] = make_request(id, prompt, draw.randrange(1, 18), ignore_eos=draw.random() < 0.7)
            core.add(requests[id])
            if draw.random() < 0.05:
                touched.add(id)
                (runner.broken_ids if draw.random() < 0.5 else runner.raising_ids).add(id)
        fate = draw.random()
        if fate < 0.02:
            ids = draw.sample(sorted(requests), 2)
            touched.update(id for id in ids if id in core.scheduler.sequences)
            core.cancel(ids)
        elif fate < 0.04 and not (runner.break_launch or runner.break_finish):
            runner.break_launch = fate < 0.03
            runner.break_finish = not runner.break_launch
        for output in core.step():
            outputs.setdefault(output.id, []).append(output)
    for id, more in run(core).items():
        outputs.setdefault(id, []).extend(more)
    assert set(outputs) == set(requests)
    wrong = 0
    for id, request in requests.items():
        tokens, reason = text(outputs[id])
        expected = reference(request, 32)
        assert [output.finish_reason for output in outputs[id]].count(None) == len(outputs[id]) - 1
        if reason in ("abort", "error"):
            assert tokens == expected[0][: len(tokens)]
            assert (outputs[id][-1].error is not None) == (reason == "error")
            wrong += id not in touched
        else:
            assert (tokens, reason) == expected
    assert wrong < 10, "a step that fails is computed again; only whom a second fault hits there fails"
    assert len(requests) > 300 and core.stats().preemptions > 10
    assert set(runner.released) == set(requests)
    assert len(runner.released) > len(requests) + core.stats().preemptions, "a step that failed is launched anew"


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_as_many_steps_stay_in_flight_as_the_runner_allows(depth: int) -> None:
    core, _, _ = make_core(depth)
    core.add(make_request("a", [1], 10, ignore_eos=True))
    given = [len(core.step()) for _ in range(12)]
    assert given == [0] * depth + [1] * 10 + [0] * (2 - depth)


def test_the_first_output_says_how_long_it_waited_and_what_was_cached() -> None:
    core, _, clock = make_core()
    core.add(make_request("a", [1] * 9, 2, arrival=99.0))
    first = run(core)["a"]
    clock.now = 110.0
    core.add(make_request("b", [1] * 9, 3, arrival=109.5))
    second = run(core)["b"]
    assert [(output.queue_seconds, output.cached_tokens) for output in first] == [(1.0, 0), (0.0, 0)]
    assert [(output.queue_seconds, output.cached_tokens) for output in second] == [(0.5, 8), (0.0, 0), (0.0, 0)]


@pytest.mark.parametrize("depth", [0, 1])
def test_logprobs_of_every_token(depth: int) -> None:
    """Prompt logprobs come once, whole, with the first output: also in chunks, and when a preemption repeats some."""
    core, _, _ = make_core(depth, num_blocks=8, max_num_batched_tokens=3, watermark=0.0)
    core.add(make_request("old", [4], 26, ignore_eos=True, logprobs=0))
    for _ in range(8):
        core.step()
    prompt = [1, 2, 5, 6, 7] * 4
    core.add(make_request("young", prompt, 4, ignore_eos=True, logprobs=0, prompt_logprobs=0))
    given = run(core)["young"]
    assert core.stats().preemptions > 0
    context = context_of(prompt)
    expected = [None, *(logprob_of(context[i - 1], prompt[i]) for i in range(1, len(prompt)))]
    assert [output.prompt_logprobs for output in given] == [expected, None, None, None]
    tokens = text(given)[0]
    assert tokens == reference(make_request("x", prompt, 4, ignore_eos=True), 32)[0]
    context = context_of(prompt + tokens)
    assert [output.logprobs for output in given] == [
        [logprob_of(context[len(prompt) - 1 + i], token)] for i, token in enumerate(tokens)
    ]


def test_prompt_logprobs_without_an_answer() -> None:
    core, _, _ = make_core()
    core.add(make_request("a", [1, 2, 5], 0, prompt_logprobs=0))
    (output,) = run(core)["a"]
    assert output.tokens == [] and output.finish_reason == "length" and output.logprobs is None
    assert output.prompt_logprobs is not None and [entry and entry.token for entry in output.prompt_logprobs] == [
        None,
        2,
        5,
    ]


@pytest.mark.parametrize("depth", [0, 1])
def test_cancel_frees_at_once_and_is_confirmed_by_the_next_step(depth: int) -> None:
    core, runner, _ = make_core(depth)
    for id in ("running", "other"):
        core.add(make_request(id, [1] * 9, 20, ignore_eos=True))
    core.step()
    core.add(make_request("waiting", [2], 20, ignore_eos=True))
    core.cancel(["running", "waiting", "unknown"])
    assert runner.released == ["running", "waiting"]
    assert set(core.scheduler.sequences) == {"other"}
    assert [(output.id, output.finish_reason, output.tokens) for output in core.step() if output.id != "other"] == [
        ("running", "abort", []),
        ("waiting", "abort", []),
    ]
    assert text(run(core)["other"])[1] == "length"


def test_the_last_cancel_ends_all_work() -> None:
    core, _, _ = make_core(depth=1)
    core.add(make_request("a", [1], 20, ignore_eos=True))
    core.step()
    core.cancel(["a"])
    assert core.has_work
    assert [output.finish_reason for output in core.step()] == ["abort"]
    assert not core.has_work


def test_a_refused_request_changes_nothing() -> None:
    core, _, _ = make_core()
    with pytest.raises(RequestError) as caught:
        core.add(make_request("a", [1] * 40, prompt_logprobs=0))
    assert caught.value.code == "context_length_exceeded"
    assert not core.has_work and not core._prompt_logprobs


def test_an_error_in_one_sequence_fails_that_one_alone() -> None:
    core, runner, _ = make_core(depth=1)
    runner.broken_ids.add("b")
    for id in ("a", "b", "c"):
        core.add(make_request(id, [ord(id)] * 6, 5, ignore_eos=True))
    outputs = run(core)
    assert [text(outputs[id])[1] for id in ("a", "b", "c")] == ["length", "error", "length"]
    assert [output.error for output in outputs["b"]] == ["b is broken."]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["break_launch", "break_finish"])
def test_a_step_that_fails_once_is_computed_again(depth: int, where: str, caplog: pytest.LogCaptureFixture) -> None:
    core, runner, _ = make_core(depth)
    for id in ("a", "b", "c"):
        core.add(make_request(id, [ord(id)] * 6, 9, ignore_eos=True, logprobs=0, prompt_logprobs=0))
    given = [*core.step(), *core.step()]
    setattr(runner, where, True)
    with caplog.at_level(logging.ERROR):
        outputs = run(core)
    assert "is broken" in caplog.text, "the log has the cause"
    for id in ("a", "b", "c"):
        mine = [output for output in given if output.id == id] + outputs[id]
        assert text(mine) == reference(make_request("x", [ord(id)] * 6, 9, ignore_eos=True), 32)
        assert len(mine[0].prompt_logprobs or ()) == 6 and all(len(output.logprobs or ()) == 1 for output in mine)


@pytest.mark.parametrize("depth", [0, 1])
def test_an_exception_fails_only_the_request_at_fault(depth: int, caplog: pytest.LogCaptureFixture) -> None:
    core, runner, _ = make_core(depth, max_num_seqs=8, num_blocks=32)
    ids = [f"r{i}" for i in range(8)]
    for i, id in enumerate(ids):
        core.add(make_request(id, [i] * 3, 9, ignore_eos=True))
    given = [output for _ in range(5) for output in core.step()]
    runner.raising_ids = {"r5"}
    before = len(runner.schedules)
    with caplog.at_level(logging.ERROR):
        given += core.step()
    while core.has_work:
        given += core.step()
    assert "one sequence is broken" in caplog.text and caplog.text.count("a step of") == 1
    assert len(runner.schedules) - before < 20, "the others are found by halving"
    for i, id in enumerate(ids):
        tokens, reason = text([output for output in given if output.id == id])
        expected = reference(make_request("x", [i] * 3, 9, ignore_eos=True), 32)
        assert (
            (tokens == expected[0][: len(tokens)] and reason == "error") if id == "r5" else (tokens, reason) == expected
        )
    (error,) = [output.error for output in given if output.error]
    assert error == "The engine failed while computing this request; its log has the details."


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("where", ["launch", "finish"])
def test_a_failed_steps_memory_is_free_for_the_next(
    depth: int, where: str, without_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traceback of what ran out of memory would hold its tensors, in every halving those of all before it."""
    core, runner, _ = make_core(depth)
    held: list[weakref.ref[set[int]]] = []
    alive: list[int] = []
    given = getattr(runner, where)

    def short_of_memory(argument: object) -> object:
        tensor = {1}
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(tensor))
        schedule = getattr(argument, "schedule", argument)
        if len(schedule.chunks) > 1:
            raise MemoryError("no room")
        return given(argument)

    for i in range(4):
        core.add(make_request(f"r{i}", [i] * 3, 2, ignore_eos=True))
    monkeypatch.setattr(runner, where, short_of_memory)
    assert set(run(core)) == {f"r{i}" for i in range(4)}
    assert len(alive) > 6 and max(alive) == 0, alive


def test_what_it_is_to_be_out_of_memory() -> None:
    for words in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        NO_MEMORY,
        "CUBLAS_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("a step is broken"))


def test_after_a_fatal_exception_nothing_is_tried() -> None:
    core, runner, _ = make_core()
    runner.fatal = (RuntimeError,)
    runner.raising_ids = {"a"}
    core.add(make_request("a", [1], 2))
    with pytest.raises(RuntimeError, match="one sequence"):
        core.step()
    assert len(runner.schedules) == 1


def test_nobody_finds_the_blocks_of_a_request_that_failed() -> None:
    core, runner, _ = make_core()
    core.add(make_request("a", [1] * 9, 2))
    run(core)
    runner.broken_ids = {"b"}
    core.add(make_request("b", [1] * 9, 2))
    assert run(core)["b"][-1].finish_reason == "error"
    core.add(make_request("c", [1] * 9, 2))
    assert run(core)["c"][0].cached_tokens == 0
    core.add(make_request("d", [1] * 9, 2))
    assert run(core)["d"][0].cached_tokens == 8


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError(NO_MEMORY)])
def test_out_of_memory_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    core, runner, _ = make_core()

    def launch(schedule: object) -> Launched:
        raise error

    monkeypatch.setattr(runner, "launch", launch)
    core.add(make_request("a", [1], 2))
    (failed,) = run(core)["a"]
    assert failed.error and "ran out of memory" in failed.error and "shorter prompt" in failed.error


def test_a_step_that_fails_after_its_requests_have_ended() -> None:
    core, runner, _ = make_core(depth=1)
    core.add(make_request("a", [1] * 6, 9, ignore_eos=True, prompt_logprobs=0))
    core.step()
    core.cancel(["a"])
    runner.break_finish = True  # there is nothing to compute again
    assert [(output.finish_reason, output.error) for output in run(core)["a"]] == [("abort", None)]
    assert not runner.break_finish and not core._prompt_logprobs


def test_an_error_meant_for_users_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    core, runner, _ = make_core()

    def launch(schedule: object) -> Launched:
        raise CapacityError("Out of memory; lower kv_cache_tokens.")

    monkeypatch.setattr(runner, "launch", launch)
    core.add(make_request("a", [1], 2))
    assert [output.error for output in run(core)["a"]] == ["Out of memory; lower kv_cache_tokens."]


def test_counters() -> None:
    core, _, _ = make_core()
    core.add(make_request("a", [1] * 9, 4, ignore_eos=True))
    core.step()
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.blocks_total) == (1, 0, 3, 16)
    run(core)
    core.add(make_request("b", [1] * 9, 4, ignore_eos=True))
    run(core)
    stats = core.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps) == (18, 8, 8)
    assert (stats.prefix_queries, stats.prefix_hits) == (18, 8)
    assert stats.ledger is not None and sum(stats.ledger.seconds.values()) == pytest.approx(8 * 0.5)
