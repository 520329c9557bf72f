"""Turns schedules into tensors and computation on a CPU. A step is computed as it is launched: none stays in flight."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from engine.checkpoint import Checkpoint
from engine.core.step import StepResult
from engine.cores import default_threads
from engine.errors import CapacityError
from engine.grammar import Grammars
from engine.messages import EngineInfo, EngineOptions, TokenLogprob
from engine.model.cpu import CpuBackend
from engine.model.decoder import Decoder, Step
from engine.model.loader import CpuParts, load_decoder
from engine.model.rope import rotations
from engine.model.sampler import Sampler, token_logprobs
from engine.scheduling.scheduler import Chunk, Schedule
from engine.scheduling.sequence import Sequence
from kernels.cpu.attention import Span
from kernels.cpu.linear import plan

BLOCK_SIZE = 64
STEP_TOKENS = 512  # a prefill chunk on a CPU: large enough for full speed, short enough for the streams beside it
# oneDNN compiles for each number of rows anew, and keeps some 2 MiB of it: there are few numbers, the next multiple of
# 8 or, from ROWS_APART on, of 16. Up to 8 rows are as they are: there each one costs.
ROWS_APART = 64
LOGIT_ROWS = 64  # rows of prompt logits computed at a time: bounds the [rows, vocabulary] scratch
PROGRESS_BYTES = 4 << 20
NOT_FINITE = "The model's output for this request is not finite (NaN or infinity)."


class Runner:
    """One model on the CPU, and its KV cache. `on_progress(stage, fraction)` follows the loading."""

    depth = 0
    fatal: tuple[type[Exception], ...] = ()
    preparing = ""
    contiguous = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        on_progress: Callable[[str, float], None] | None = None,
    ):
        started = time.monotonic()
        progress = on_progress or (lambda stage, fraction: None)
        if options.device not in ("auto", "cpu"):
            raise CapacityError(f"device {options.device!r} is not supported; it must be auto, cpu or cuda.")
        torch.set_num_threads(options.threads or default_threads())
        torch.set_grad_enabled(False)
        self.config = config = checkpoint.config
        dtype = _dtype(options.dtype)
        self._invariant = options.batch_invariant if options.batch_invariant is not None else dtype == torch.float32
        available = available_memory()
        dense_bytes = 2 * checkpoint.parameters
        self._plan = plan(dtype, self._invariant, available // 8, dense_bytes)
        if checkpoint.quantization.startswith("W8A8"):
            self._plan = dataclasses.replace(self._plan, eight_bit_input=True)
        self.block_size = options.block_size or BLOCK_SIZE
        self.max_num_batched_tokens = options.max_num_batched_tokens or STEP_TOKENS

        progress("weights", 0.0)
        parts = CpuParts(config, self._plan, self.block_size, options.kv_cache_dtype)
        self.model = load_decoder(checkpoint, parts, weights_progress(progress, checkpoint.total_bytes))
        backend = self.model.backend
        assert isinstance(backend, CpuBackend)
        self.backend = backend
        context = options.max_model_len or config.max_position
        free, per_token = available_memory(), backend.kv_bytes_per_token
        default = min(4 * context, free // 4 // per_token)
        self.num_blocks = kv_blocks(options.kv_cache_tokens, default, per_token, self.block_size, free)
        self.max_model_len = min(context, self.num_blocks * self.block_size)
        self._rotations = rotations(config, self.max_model_len).unsqueeze(1)
        self.sampler = Sampler(config.eos_token_ids, options.seed)
        self.grammars = Grammars(checkpoint.tokenizer, config.vocab_size, config.eos_token_ids)
        backend.allocate(self.num_blocks)
        self._runs: dict[str, _Run] = {}
        progress("warm-up", 0.0)
        self._warm_up()
        progress("warm-up", 1.0)
        self.info = engine_info(
            checkpoint,
            dtype=dtype if dtype == torch.float32 else self._plan.few,
            device=f"cpu ({torch.get_num_threads()} threads)",
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            kv_bytes_per_token=backend.kv_bytes_per_token,
            load_seconds=time.monotonic() - started,
            batch_invariant=self._invariant,
        )

    def launch(self, schedule: Schedule) -> StepResult:
        started = time.monotonic()
        with torch.inference_mode():
            result = self._compute(schedule)
        result.seconds = time.monotonic() - started
        return result

    def finish(self, handle: StepResult) -> StepResult:
        return handle

    def release(self, sequence: Sequence) -> None:
        self._runs.pop(sequence.id, None)
        self.sampler.forget(sequence)

    def _compute(self, schedule: Schedule) -> StepResult:
        """One forward over all chunks, then a token for each chunk that samples."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        rows: list[int] = []  # of the step whose logits are wanted: the last of each sampling chunk
        sampling: list[Sequence] = []
        scored: list[tuple[Chunk, int]] = []  # chunks with prompt logprobs, and their first row
        for chunk in schedule.chunks:
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
            row = len(tokens)
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            spans.append(self._span(sequence, row, chunk.length, end, slots))
            if chunk.sample:
                rows.append(end - start + row - 1)
                sampling.append(sequence)
            if sequence.request.params.prompt_logprobs is not None and start < sequence.prompt_len - 1:
                scored.append((chunk, row))
        every = bool(scored) or len(rows) == len(tokens)
        padding = _padding(len(tokens))
        step = Step(
            tokens=torch.tensor(tokens + [0] * padding),
            slots=torch.tensor(slots + [self.num_blocks * self.block_size] * padding),  # behind the pool
            rotations=self._rotations[torch.tensor(positions + [0] * padding)],
            attention=self.backend.prepare(spans),
            logit_rows=None if every else torch.tensor(rows + [0] * _padding(len(rows)), dtype=torch.int64),
        )
        hidden = self.model.forward(step)
        result = StepResult({})
        for chunk, row in scored:
            of_chunk = prompt_logprobs(self.model, chunk, hidden[row : row + chunk.length])
            result.prompt_logprobs[chunk.sequence.id] = of_chunk
        if sampling:
            self._sample(hidden[rows] if scored else hidden, sampling, result)
        return result

    def _sample(self, hidden: torch.Tensor, sequences: list[Sequence], result: StepResult) -> None:
        logits = self.model.logits(hidden)
        wanted: list[int] = []
        for row, (sequence, token) in enumerate(zip(sequences, self.sampler.sample(logits, sequences), strict=True)):
            if token is None:
                result.errors[sequence.id] = (sequence.guide and sequence.guide.error) or NOT_FINITE
                continue
            result.tokens[sequence.id] = token
            if sequence.request.params.logprobs is not None:
                wanted.append(row)
        if wanted:
            chosen = [sequences[row] for row in wanted]
            counts = [sequence.request.params.logprobs or 0 for sequence in chosen]
            picked = [result.tokens[sequence.id] for sequence in chosen]
            entries = token_logprobs(logits[wanted], picked, counts)
            result.logprobs = {sequence.id: entry for sequence, entry in zip(chosen, entries, strict=True)}

    def _span(self, sequence: Sequence, row: int, length: int, end: int, slots: list[int]) -> Span:
        """The sequence's part of the step; appends the slots of its `length` last positions before `end`."""
        run = self._runs.get(sequence.id)
        if run is None or run.admission != sequence.admission:
            run = self._runs[sequence.id] = _Run(sequence.admission)
        size, blocks = self.block_size, sequence.blocks
        needed = -(-end // size)
        while run.checked < needed and run.consecutive:
            run.consecutive = run.checked == 0 or blocks[run.checked] == blocks[run.checked - 1] + 1
            run.checked += 1
        first = blocks[0] * size
        start = end - length
        if end % size and start <= (needed - 1) * size:
            self.backend.clear(blocks[needed - 1 : needed])  # written from its first slot on, but not to its end
        if run.consecutive:
            slots += range(first + start, first + end)
            return Span(row, length, end, first, None)
        slots += [blocks[p // size] * size + p % size for p in range(start, end)]
        return Span(row, length, end, first, torch.tensor(blocks[:needed]))

    def logits(self, tokens: list[int], start: int = 0) -> torch.Tensor:
        """float32 [T, V] of one forward over `tokens` at positions start, start + 1, ..., whose KV goes to the cache's
        first blocks: for warm-up, tests and benchmarks, while no request runs."""
        end = start + len(tokens)
        with torch.inference_mode():
            step = Step(
                tokens=torch.tensor(tokens),
                slots=torch.arange(start, end),
                rotations=self._rotations[start:end],
                attention=self.backend.prepare([Span(0, len(tokens), end, 0, None)]),
                logit_rows=None,
            )
            return self.model.logits(self.model.forward(step))

    def _warm_up(self) -> None:
        """One short prefill and one decode, so that the first request does not pay for oneDNN's code generation."""
        for rows in (1, min(16, self.max_model_len)):
            self.logits([0] * rows)


def _padding(rows: int) -> int:
    """Rows to be computed along, whose results nobody takes."""
    return 0 if rows <= 8 else -rows % (8 if rows <= ROWS_APART else 16)


class _Run:
    """Whether a sequence's blocks lie one after another, as far as they were looked at."""

    __slots__ = ("admission", "checked", "consecutive")

    def __init__(self, admission: int):
        self.admission = admission
        self.checked = 0
        self.consecutive = True


def engine_info(
    checkpoint: Checkpoint, *, dtype: torch.dtype, num_blocks: int, block_size: int, kv_bytes_per_token: int, **of: Any
) -> EngineInfo:
    """What every runner says of itself. `of`: the fields of EngineInfo that are the runner's own as they are."""
    return EngineInfo(
        model=checkpoint.name,
        path=str(checkpoint.path),
        architecture=checkpoint.config.architecture,
        parameters=checkpoint.parameters,
        quantization=checkpoint.quantization,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=checkpoint.config.vocab_size,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * block_size * kv_bytes_per_token,
        weight_bytes=checkpoint.total_bytes,
        **of,
    )


def weights_progress(progress: Callable[[str, float], None], total: int) -> Callable[[int], None]:
    """Of the bytes read so far makes the stage "weights"."""
    last = 0

    def on_bytes(done: int) -> None:
        nonlocal last
        if done - last >= PROGRESS_BYTES or done == total:
            last = done
            progress("weights", done / total)

    return on_bytes


def prompt_logprobs(model: Decoder, chunk: Chunk, hidden: torch.Tensor) -> list[TokenLogprob]:
    """Of the prompt tokens at start + 1 .. start + length, as far as they lie in the prompt; hidden [length, H]."""
    sequence = chunk.sequence
    targets = sequence.request.prompt[chunk.start + 1 : chunk.start + chunk.length + 1]
    top = sequence.request.params.prompt_logprobs or 0
    result: list[TokenLogprob] = []
    for first in range(0, len(targets), LOGIT_ROWS):
        part = targets[first : first + LOGIT_ROWS]
        logits = model.logits(hidden[first : first + len(part)])
        result += token_logprobs(logits, part, [top] * len(part))
    return result


def kv_blocks(wanted: int | None, default: int, per_token: int, block_size: int, free: int) -> int:
    """Blocks of a KV cache of `wanted` tokens (None: `default`), of which each takes per_token bytes of `free`."""
    tokens = default if wanted is None else wanted
    if wanted is not None and wanted * per_token > free:
        raise CapacityError(
            f"A KV cache of {wanted} tokens takes {wanted * per_token / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of "
            "memory are free; choose a smaller --kv-cache-tokens."
        )
    if tokens < block_size:
        raise CapacityError(
            f"A KV cache of {tokens} tokens does not hold one block of {block_size} ({block_size * per_token} bytes); "
            "choose a larger --kv-cache-tokens or a smaller --block-size."
        )
    return tokens // block_size


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _dtype(name: str) -> torch.dtype:
    if name not in ("auto", "bfloat16", "float32"):
        raise CapacityError(f"dtype {name!r} is not supported on a CPU; it must be auto, bfloat16 or float32.")
    return torch.float32 if name == "float32" else torch.bfloat16
