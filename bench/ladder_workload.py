"""The ladder's data (bench/ladder.toml): its workload, its rungs, and the least time that the workload can take."""

from __future__ import annotations

import importlib.resources
import random
import tomllib
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from bench.ceilings import Ceilings
from bench.prompts import make_prompt
from engine.errors import FenError
from engine.model.config import ModelConfig


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many requests of how many tokens; bench/ladder.toml says what each field means."""

    requests: int
    concurrency: int
    shared_prefix: int
    tail: tuple[int, int]
    new_tokens: tuple[int, int]
    quality_tokens: int
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return self.shared_prefix + self.tail[1] + self.new_tokens[1]


class Rung(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One real configuration: the rung below it and one technique more."""

    name: str
    technique: str
    runs: Literal["plain", "engine"]
    weights: Literal["dense", "stored", "4-bit", "w8a8", "w8a8 and head", "fp8"]
    sequential: bool = False
    options: dict[str, Any] = {}  # of engine.messages.EngineOptions


class Ladder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    workload: Workload
    gpu_workload: Workload
    cpu: list[Rung]
    gpu: list[Rung]

    def on(self, device: str) -> tuple[Workload, list[Rung]]:
        return (self.gpu_workload, self.gpu) if device == "cuda" else (self.workload, self.cpu)


class Task(msgspec.Struct, frozen=True):
    """One request of the workload."""

    prompt: list[int]
    new_tokens: int


def load(text: str | None = None) -> Ladder:
    """bench/ladder.toml, or another text of its form. Raises FenError naming what is wrong."""
    if text is None:
        text = importlib.resources.files("bench").joinpath("ladder.toml").read_text(encoding="utf-8")
    try:
        ladder = msgspec.convert(tomllib.loads(text), Ladder)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise FenError(f"the ladder's data cannot be used: {error}") from None
    for work in (ladder.workload, ladder.gpu_workload):
        least = min(work.tail[0], work.new_tokens[0], work.quality_tokens - 1, work.requests, work.concurrency)
        if least < 1 or work.shared_prefix < 0:
            raise FenError("the ladder's workload has a count or a length below 1")
        if work.tail[0] > work.tail[1] or work.new_tokens[0] > work.new_tokens[1]:
            raise FenError("the ladder's workload has a range that ends before it begins")
    return ladder


def tasks(workload: Workload, prose: Sequence[int]) -> list[Task]:
    """The requests, the same for the same seed and prose: every second one begins with the shared prefix."""
    draw = random.Random(workload.seed)
    text = list(prose)
    shared = make_prompt(text, workload.shared_prefix)
    offsets = draw.sample(range(1, len(text)), min(workload.requests, len(text) - 1))
    found = []
    for i in range(workload.requests):
        start = offsets[i % len(offsets)]
        tail, new = draw.randint(*workload.tail), draw.randint(*workload.new_tokens)
        if i % 2:
            prompt = shared + make_prompt(text, tail, start)
        else:
            prompt = make_prompt(text, workload.shared_prefix + tail, start)
        found.append(Task(prompt, new))
    return found


def floor_seconds(
    work: Sequence[Task],
    config: ModelConfig,
    ceilings: Ceilings,
    *,
    batch: int,
    rate: str,
    weight_bytes: float,
    kv_bytes: float,
    cached_tokens: int = 0,
) -> float:
    """The least time that the ceilings allow: prompts by their products, answers by products or bytes.

    batch: sequences in a decode step. rate: the key of the ceilings' rate that this rung multiplies at. weight_bytes: a
    decode step reads. kv_bytes: of one position. cached_tokens: of the prompts, that are not computed.
    """
    layers = 2.0 * config.num_layers * config.hidden_size * (
        config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads) + 3 * config.intermediate_size
    )  # fmt: skip
    head = 2.0 * config.vocab_size * config.hidden_size
    score = 4.0 * config.num_layers * config.num_heads * config.head_dim  # one query on one position
    prompt_tokens = sum(len(task.prompt) for task in work)
    computed = 1 - cached_tokens / prompt_tokens  # the scores are cut in the same proportion: a lower bound still
    prompt_scores = sum(len(task.prompt) ** 2 / 2 for task in work) * score
    prompt_flops = (prompt_tokens * layers + prompt_scores) * computed + len(work) * head
    steps = sum(task.new_tokens - 1 for task in work)
    contexts = sum((task.new_tokens - 1) * (len(task.prompt) + task.new_tokens / 2) for task in work)
    decode, _ = ceilings.floor(
        steps / batch * weight_bytes + contexts * kv_bytes, steps * (layers + head) + contexts * score, rate
    )
    return prompt_flops / ceilings.rates[rate] + decode
