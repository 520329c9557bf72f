"""The engine on the GPU's kernels in the interpreter: runner, backend and kernels together, against the CPU runner.

All but CUDA graphs, events and the memory measurement runs here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llguidance import LLMatcher

from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.core.build import build_core
from engine.core.device import batch_sizes
from engine.core.gpu_runner import GpuRunner
from engine.core.loop import EngineCore
from engine.core.runner import Runner
from engine.errors import CapacityError
from engine.messages import EngineOptions, Output, Request, SamplingParams
from engine.model.gpu import GpuBackend, GpuLinear
from engine.scheduling.scheduler import Scheduler
from kernels.formats import decode, dequantize
from kernels.gpu import linear_w8

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=2)
PROMPTS = [[5, 9, 300], [17], [40 + i for i in range(19)]]


def core_of(checkpoint: Checkpoint | Path, kind: Any = GpuRunner, **options: Any) -> EngineCore:
    """An engine on one runner: the GPU's in the interpreter, or the CPU's."""
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(str(checkpoint))
    fields = {"dtype": "float32", "kv_cache_tokens": 256, "block_size": 16, "max_num_seqs": 4, "threads": 1}
    settings = EngineOptions(**(fields | {"max_num_batched_tokens": 16} | options))
    runner = kind(checkpoint, settings, **({"device": torch.device("cpu")} if kind is GpuRunner else {}))
    scheduler = Scheduler(
        runner.num_blocks,
        runner.block_size,
        settings.max_num_seqs,
        runner.max_num_batched_tokens,
        runner.max_model_len,
        contiguous=runner.contiguous,
        eos_token_ids=checkpoint.config.eos_token_ids,
    )
    return EngineCore(runner, scheduler)


def generate(
    core: EngineCore, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[list[Output]]:
    outputs: dict[str, list[Output]] = {str(i): [] for i in range(len(prompts))}
    each = params if isinstance(params, list) else [params] * len(prompts)
    for id, prompt, one in zip(outputs, prompts, each, strict=True):
        core.add(Request(id=id, prompt=prompt, params=one))
    while core.has_work:
        for output in core.step():
            outputs[output.id].append(output)
    assert core.stats().blocks_used == 0
    return list(outputs.values())


def tokens_of(outputs: list[Output]) -> list[int]:
    assert all(output.error is None for output in outputs)
    return [token for output in outputs for token in output.tokens]


def entries_of(outputs: list[Output]) -> list[Any]:
    return [entry for output in outputs for entry in output.logprobs or []]


@pytest.fixture(scope="module")
def model(random_checkpoint: Callable[..., Path]) -> Path:
    return random_checkpoint()


@pytest.fixture(scope="module")
def core(model: Path) -> EngineCore:
    return core_of(model, batch_invariant=False)


@pytest.fixture(scope="module")
def cpu_core(model: Path) -> EngineCore:
    return core_of(model, Runner)


def test_smollm2_golden_token(smollm2: Path) -> None:
    """A prefill, and a decode whose input token only the device knows."""
    core = core_of(smollm2, batch_invariant=False, max_num_seqs=1, max_model_len=64, kv_cache_tokens=64)
    tokenizer = open_checkpoint(str(smollm2)).tokenizer
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=3)
    (outputs,) = generate(core, [tokenizer.encode("The capital of France is")], params)
    assert tokenizer.decode(tokens_of(outputs)) == " Paris."
    top = {tokenizer.decode([token]): value for token, value in entries_of(outputs)[0].top}
    assert top == pytest.approx({" Paris": -0.2581, " the": -2.7407, " London": -4.3844}, abs=1e-3)


def test_greedy_batch_equals_the_cpu(core: EngineCore, cpu_core: EngineCore) -> None:
    """Steps of prompts, of decodes, and of both; a prompt in two chunks; alternatives with their log-probabilities."""
    expected = generate(cpu_core, PROMPTS, GREEDY)
    for mine, theirs in zip(generate(core, PROMPTS, GREEDY), expected, strict=True):
        assert len(tokens_of(mine)) == 5 and tokens_of(mine) == tokens_of(theirs)
        for a, b in zip(entries_of(mine), entries_of(theirs), strict=True):
            assert (a.token, a.rank) == (b.token, b.rank) and a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


def test_sampling_equals_the_cpu(core: EngineCore, cpu_core: EngineCore) -> None:
    params = SamplingParams(
        max_tokens=4, temperature=0.9, top_p=0.9, top_k=50, seed=3, repetition_penalty=1.2, frequency_penalty=0.3,
        logit_bias={7: 2.0}, min_tokens=3, stop_token_ids=(11,),
    )  # fmt: skip
    for mine, theirs in zip(generate(core, PROMPTS[:2], params), generate(cpu_core, PROMPTS[:2], params), strict=True):
        assert tokens_of(mine) == tokens_of(theirs)


def test_prompt_logprobs_equal_the_cpu(core: EngineCore, cpu_core: EngineCore) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    mine, theirs = (generate(c, PROMPTS[2:], params)[0][0].prompt_logprobs for c in (core, cpu_core))
    assert mine is not None and theirs is not None and len(mine) == len(theirs) == len(PROMPTS[2])
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert a is not None and b is not None
        assert (a.token, a.rank) == (b.token, b.rank) and a.logprob == pytest.approx(b.logprob, abs=1e-4)


SCHEMA = {
    "type": "object", "properties": {"a": {"enum": ["x", "yes"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a", "n"], "additionalProperties": False,
}  # fmt: skip


def test_grammars_equal_the_cpu(core: EngineCore, cpu_core: EngineCore) -> None:
    """A schema, greedy and drawn, a pattern that ends only when nothing else is left, and two requests without."""
    schema = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    each = [
        SamplingParams(max_tokens=40, temperature=0.0, grammar=schema, logprobs=1),
        SamplingParams(max_tokens=3, temperature=0.8, seed=1),
        SamplingParams(max_tokens=40, temperature=1.0, seed=5, grammar=schema, top_p=0.8, presence_penalty=0.5),
        SamplingParams(max_tokens=9, seed=2, grammar="start: /[ab]{2,4}/", ignore_eos=True, min_tokens=3),
        SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    ]
    prompts = [*PROMPTS, [5], [7, 8]]
    mine, theirs = generate(core, prompts, each), generate(cpu_core, prompts, each)
    assert [tokens_of(outputs) for outputs in mine] == [tokens_of(outputs) for outputs in theirs]
    tokenizer = core.runner.grammars._source
    texts = [tokenizer.decode(tokens_of(outputs)) for outputs in mine]
    for text in (texts[0], texts[2]):
        value = json.loads(text)
        assert value["a"] in ("x", "yes") and value["n"] in range(10)
    assert re.fullmatch("[ab]{4}", texts[3]) and mine[3][-1].finish_reason == "stop"
    assert [entry.rank for entry in entries_of(mine[0])] == [entry.rank for entry in entries_of(theirs[0])]


def test_a_step_for_a_grammar_is_finished_before_the_next(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And others stay in flight."""
    in_flight: list[int] = []
    launch = core.runner.launch
    monkeypatch.setattr(
        core.runner, "launch", lambda schedule: (in_flight.append(len(core._in_flight)), launch(schedule))[1]
    )
    generate(core, [[5]], SamplingParams(max_tokens=6, grammar="start: /[ab]*/", ignore_eos=True))
    assert in_flight == [0] * 6
    in_flight.clear()
    generate(core, [[5]], SamplingParams(max_tokens=6, ignore_eos=True))
    assert in_flight == [0, 1, 1, 1, 1, 1]


def test_a_grammar_that_outgrows_its_limits_fails_its_request_alone(core: EngineCore) -> None:
    hard = "start: A\nA: /(.*a.{10})/ & ~/(.*b.{11})/ & /(.*c.{9}.*)/"
    letters = {core.runner.grammars._source.encode(letter, False)[0]: 50.0 for letter in "abc"}
    params = SamplingParams(max_tokens=20, grammar=hard, seed=1, logit_bias=letters)
    good, bad = generate(core, [[5], [6]], [GREEDY, params])
    assert len(tokens_of(good)) == 5 and "grammar" in (bad[-1].error or "")


def test_preempted_equals_the_cpu(model: Path, cpu_core: EngineCore) -> None:
    core = core_of(model, batch_invariant=False, kv_cache_tokens=64, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    prompts = [[5] * 14, [9] * 14, [23] * 14]
    mine, theirs = generate(core, prompts, params), generate(cpu_core, prompts, params)
    assert [tokens_of(outputs) for outputs in mine] == [tokens_of(outputs) for outputs in theirs]
    assert core.stats().preemptions > 0


def test_batch_invariant(model: Path) -> None:
    """The same bits alone and in a batch, whole and in chunks."""
    core, prompts = core_of(model), [*PROMPTS[:2], PROMPTS[2][:12]]
    assert core.runner.backend.invariant  # type: ignore[attr-defined]
    together = generate(core, prompts, GREEDY)
    small = core_of(model, max_num_batched_tokens=5)
    for prompt, outputs in zip(prompts, together, strict=True):
        assert entries_of(generate(small, [prompt], GREEDY)[0]) == entries_of(outputs)


def test_output_that_is_not_finite(model: Path) -> None:
    """The request fails by name, though a step that feeds on its token is in flight; the engine goes on."""
    core = core_of(model, batch_invariant=False)
    runner = core.runner
    assert isinstance(runner, GpuRunner)
    whole = runner.model
    runner.model = dataclasses.replace(whole, norm=torch.full_like(whole.norm, float("nan")))
    (outputs,) = generate(core, [[5, 9]], GREEDY)
    assert outputs[-1].finish_reason == "error" and "not finite" in (outputs[-1].error or "")
    runner.model = whole
    assert len(tokens_of(generate(core, [[5, 9]], GREEDY)[0])) == 5


def test_more_biases_than_fit(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.core.gpu_runner.MAX_BIASES", 1)
    params = SamplingParams(max_tokens=1, logit_bias={1: 1.0, 2: 1.0})
    (outputs,) = generate(core, [[5]], params)
    assert "logit_bias" in (outputs[-1].error or "")


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", "tie_word_embeddings": True},
    "window": {"family": "Mistral", "sliding_window": 6},
    "granite": {
        "family": "Granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.03,
        "logits_scaling": 8.0,
    },
    "smollm3": {"family": "SmolLM3", "no_rope_layer_interval": 2, "layer_types": None},
    "phi3": {
        "family": "Phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
}  # fmt: skip


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_families(random_checkpoint: Callable[..., Path], config: dict[str, Any]) -> None:
    tokens = [5, 9, 300, 17, 4, 80, 33, 200, 150]
    runners = [core_of(random_checkpoint(**config), kind, max_model_len=64).runner for kind in (GpuRunner, Runner)]
    mine, theirs = (runner.logits(tokens) for runner in runners)  # type: ignore[attr-defined]
    assert (mine - theirs).abs().max() < 1e-3


def four_bit(folder: Path, kind: str) -> Checkpoint:
    """The checkpoint with its matrices as GGUF would store them."""
    from gguf import GGMLQuantizationType, quants

    checkpoint = open_checkpoint(str(folder))
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            raw = torch.from_numpy(tensor.data.copy()).view(tensor.shape[0], -1)
            values = dequantize(decode(tensor.dtype, {"": raw})).numpy()
            data = quants.quantize(values, GGMLQuantizationType[kind])
            tensors[name] = StoredTensor(name, kind, tensor.shape, data)
    return dataclasses.replace(checkpoint, tensors=tensors, quantization=kind)


@pytest.mark.parametrize(("dtype", "kind"), [("auto", "Q4_1"), ("bfloat16", "Q4_0")])
def test_four_bit_weights(random_checkpoint: Callable[..., Path], dtype: str, kind: str) -> None:
    """16-bit activations on 4-bit weights, against float32 on the same weights."""
    checkpoint = four_bit(random_checkpoint(intermediate_size=192), kind)
    core = core_of(checkpoint, dtype=dtype, max_model_len=64)
    assert isinstance(core.runner, GpuRunner)
    assert core.runner.info.dtype == {"auto": "float16"}.get(dtype, dtype)
    tokens = [5, 9, 300, 17, 4]
    mine = core.runner.logits(tokens)
    reference = core_of(checkpoint, Runner, max_model_len=64).runner.logits(tokens)  # type: ignore[attr-defined]
    error = ((mine - reference).norm() / reference.norm()).item()
    assert error < (5e-3 if dtype == "auto" else 4e-2)
    assert len(tokens_of(generate(core, [[5, 9], [4]], GREEDY)[1])) == 5


def test_int8_kv_cache(random_checkpoint: Callable[..., Path]) -> None:
    """As the CPU with an int8 cache: in a prefill, and in the decode behind it."""
    folder = random_checkpoint()
    options = {"max_model_len": 64, "kv_cache_dtype": "int8"}
    runners = [core_of(folder, kind, **options).runner for kind in (GpuRunner, Runner)]
    tokens = [5, 9, 300, 17, 4, 80, 33]
    mine, theirs = (
        torch.cat([runner.logits(tokens[:6]), runner.logits(tokens[6:], 6)])  # type: ignore[attr-defined]
        for runner in runners
    )
    assert (mine - theirs).norm() / theirs.norm() < 1e-2  # a rounding may fall to either side


def test_largest_steps(model: Path) -> None:
    """What a GPU computes before its memory is measured."""
    core = core_of(model, batch_invariant=False, max_num_batched_tokens=11, max_model_len=8, max_num_seqs=3)
    assert isinstance(core.runner, GpuRunner) and core.runner.rehearse() == (0, 0)
    assert len(tokens_of(generate(core, [[5, 9]], GREEDY)[0])) == 5


def test_batch_sizes() -> None:
    assert batch_sizes(1) == [1] and batch_sizes(5) == [1, 2, 4, 5]
    assert batch_sizes(64) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]


def test_refused(model: Path) -> None:
    with pytest.raises(CapacityError, match="dtype 'int8'"):
        core_of(model, dtype="int8")
    with pytest.raises(CapacityError, match="block_size is 24"):
        core_of(model, block_size=24)
    if not torch.cuda.is_available():
        with pytest.raises(CapacityError, match="device is cuda, and there is no NVIDIA GPU"):
            build_core(EngineOptions(model=str(model), device="cuda"))


FUSED: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 192},
    "qwen2": {"family": "Qwen2", "intermediate_size": 192},
    "granite": {
        "family": "Granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.03,
        "logits_scaling": 8.0, "intermediate_size": 192,
    },
}  # fmt: skip


def test_rows_too_long_to_be_rounded_where_they_are_made() -> None:
    """One program would spill: they are written in 16 bits, and rounded by a launch of their own."""
    weight = linear_w8.W8(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 1), None, 1.0, 1, eight_bit_input=True)
    reader = GpuLinear(lambda x: x, weight, None, 0, False)
    backend: Any = SimpleNamespace(invariant=False, device=torch.device("cpu"), activations=torch.float16)
    assert GpuBackend._for(backend, reader, 2, 14336).dtype == torch.int8
    assert GpuBackend._for(backend, reader, 2, 20480).dtype == torch.float16


def test_a_bias_before_silu(random_checkpoint: Callable[..., Path]) -> None:
    """It has no place in an epilogue: such a layer runs as without fusions."""
    checkpoint = four_bit(random_checkpoint(intermediate_size=192, mlp_bias=True), "Q4_1")
    plain, fused = (
        core_of(checkpoint, dtype="auto", max_model_len=64, fusions=fusions).runner for fusions in ("none", "all")
    )
    tokens = [5, 9, 300]
    assert torch.equal(plain.logits(tokens), fused.logits(tokens))  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q4_1"), ("qwen2", "Q8_0"), ("granite", "Q4_1")])
def test_fused_layers(random_checkpoint: Callable[..., Path], family: str, kind: str) -> None:
    """As the plain launches: a prefill of few rows, and a decode behind it. The kernels' launches differ, the error
    against float32 does not."""
    checkpoint = four_bit(random_checkpoint(**FUSED[family]), kind)
    tokens = [5, 9, 300, 17, 4, 80, 33]

    def logits(runner: Any) -> torch.Tensor:
        return torch.cat([runner.logits(tokens[:6]), runner.logits(tokens[6:], 6)])

    options = {"dtype": "auto", "max_model_len": 64}
    exact = logits(core_of(checkpoint, Runner, max_model_len=64).runner)
    plain, fused = (logits(core_of(checkpoint, fusions=fusions, **options).runner) for fusions in ("none", "all"))
    errors = [((found - exact).norm() / exact.norm()).item() for found in (plain, fused)]
    assert errors[1] < min(2 * errors[0], 5e-3) and not torch.equal(plain, fused)


def test_fused_engine_is_the_plain_one(random_checkpoint: Callable[..., Path]) -> None:
    """Batches that grow and shrink, with the same tokens; what cannot be fused runs as it did."""
    checkpoint = four_bit(random_checkpoint(intermediate_size=192), "Q4_1")
    plain, fused = (core_of(checkpoint, dtype="auto", fusions=fusions) for fusions in ("none", "all"))
    for mine, theirs in zip(generate(fused, PROMPTS, GREEDY), generate(plain, PROMPTS, GREEDY), strict=True):
        assert tokens_of(mine) == tokens_of(theirs)
    exact = core_of(checkpoint, fusions="all")  # float32: dense
    assert exact.runner.backend.fusions == "none"  # type: ignore[attr-defined]
