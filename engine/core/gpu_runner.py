"""Turns schedules into computation on a GPU. One step stays in flight while the host prepares the next.

A step's inputs are int32 and lie in one buffer on the device, so that one copy brings them (T tokens, D sequences of
one token and P others, S rows that sample):

    sampled | tokens T | sources T | positions T | slots T | lengths D, P | cu_q P+1 | rows S | sampling 2 S | tables
    ^ written by the sampler, row by row; all the rest by the host

`sources` are places in this buffer: an input token lies among `tokens`, or, if the step before is still drawing it, in
`sampled`. It never waits for the host. A step that draws for a grammar is finished before the next is scheduled, since
the next mask depends on the token; the masks lie in the sampling table.

A step of decodes alone is filled up to one of a few batch sizes. Its inputs then lie at the same addresses every time,
and it is captured as a CUDA graph when its size comes for the second time. Eager steps have the same padded shapes.

`device` may be the CPU, for Triton's interpreter: all but graphs, events and the memory measurement is tested there.
Nothing here has run on a GPU yet; GRAPH_BYTES and STEP_TOKENS are estimates.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoint import Checkpoint
from engine.core.device import DeviceClock, batch_sizes
from engine.core.preparation import Preparation
from engine.core.runner import (
    LOGIT_ROWS,
    NOT_FINITE,
    available_memory,
    engine_info,
    kv_blocks,
    prompt_logprobs,
    weights_progress,
)
from engine.core.step import StepResult
from engine.errors import CapacityError
from engine.grammar import Grammars
from engine.messages import EngineOptions, TokenLogprob
from engine.model.decoder import Step
from engine.model.gpu import Batch, GpuBackend
from engine.model.gpu import activations as activations_of
from engine.model.loader import load_decoder
from engine.model.sampler import seed_of
from engine.scheduling.scheduler import Chunk, Schedule
from engine.scheduling.sequence import Sequence
from kernels.gpu.sample import SampleWorkspace, SamplingTable, logprobs, sample
from kernels.gpu.tiles import BUCKETS
from kernels.kv_cache import BLOCK_SIZES

BLOCK_SIZE = 64
STEP_TOKENS = 2048
GRAPH_BYTES = 32 << 20  # of device memory for one captured graph, beside its tensors
MAX_BIASES = 2048  # tokens that one request may bias or ban
TOP_LOGPROBS = 20  # alternatives are computed for this many at least, so that few variants are compiled


@dataclasses.dataclass(slots=True)
class _Run:
    """What the runner keeps for a sequence from its admission to its end."""

    slot: int  # its row of the sampling table and of the block tables
    admission: int
    blocks: int = 0  # how many are in its row of the block tables
    step: int = -1  # the step that drew its last token,
    row: int = 0  # and where in `sampled`
    error: str | None = None


@dataclasses.dataclass(slots=True)
class _Launched:
    """A step in flight. Its tensors on the host are filled when `done` has happened."""

    drawn: list[tuple[int, Sequence, _Run]]  # row of `tokens`
    tokens: torch.Tensor
    logprobs: list[torch.Tensor]  # of each row: log-probability, rank, best tokens, theirs; or empty
    scored: list[tuple[Chunk, torch.Tensor]]  # chunks with prompt logprobs, and their hidden states
    padded: int
    prepared: dict[str, float]  # seconds; "compiling" is between the marks, where the device waits
    started: Any
    done: Any


class GpuRunner:
    """One model on a GPU, and its KV cache. `on_progress(stage, fraction)` follows the loading."""

    depth = 1
    fatal = (torch.AcceleratorError,)
    contiguous = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: EngineOptions,
        on_progress: Callable[[str, float], None] | None = None,
        device: torch.device | None = None,
    ):
        loading = time.monotonic()
        progress = on_progress or (lambda stage, fraction: None)
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self._cuda = self.device.type == "cuda"
        self._check(options)
        torch.set_grad_enabled(False)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self.config = config = checkpoint.config
        activations = activations_of(options.dtype, checkpoint.quantization)
        invariant = options.batch_invariant
        if invariant is None:
            invariant = activations == torch.float32
        self.block_size = options.block_size or BLOCK_SIZE
        self.max_num_batched_tokens = options.max_num_batched_tokens or STEP_TOKENS
        self._max_seqs = options.max_num_seqs
        self._batch_sizes = batch_sizes(self._max_seqs)
        self._seed = options.seed
        self.backend = GpuBackend(
            config, activations, self.block_size, self.device, invariant, options.kv_cache_dtype, options.fusions
        )
        progress("weights", 0.0)
        self.model = load_decoder(checkpoint, self.backend, weights_progress(progress, checkpoint.total_bytes))
        self._synchronize()  # they are there

        self.grammars = Grammars(checkpoint.tokenizer, config.vocab_size, config.eos_token_ids)
        self._table = SamplingTable(self._max_seqs, config.vocab_size, self.device, MAX_BIASES)
        self._workspace = SampleWorkspace(self._max_seqs, config.vocab_size, self.device)
        self._first = -(-self._max_seqs // 4) * 4  # place of the first token in the buffer
        self._runs: dict[str, _Run] = {}
        self._free = list(range(self._max_seqs))
        self._step = 0
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[int] = set()  # batch sizes that have run
        self._use_graphs = self._cuda and not options.enforce_eager
        self._starting: Callable[[str, float], None] | None = progress
        self._preparation = Preparation(self._when_preparing)
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None

        self.max_model_len = options.max_model_len or config.max_position
        progress("warm-up", 0.0)
        self.num_blocks = self._num_blocks(options)
        self.max_model_len = min(self.max_model_len, self.num_blocks * self.block_size)
        self._allocate(self.num_blocks)
        self._clock = DeviceClock(self._cuda)
        if self._use_graphs:
            self._capture_one()
        self._synchronize()
        progress("warm-up", 1.0)
        self._starting = None
        self.info = engine_info(
            checkpoint,
            dtype=activations,
            device=torch.cuda.get_device_name(self.device) if self._cuda else "cpu (Triton's interpreter)",
            max_model_len=self.max_model_len,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            kv_bytes_per_token=self.backend.kv_bytes_per_token,
            load_seconds=time.monotonic() - loading,
            batch_invariant=invariant,
        )

    def _capture_one(self) -> None:
        """The graph of one decode: what may not be captured stops the start, not the first request."""
        nothing = [0]
        inputs = nothing, [self._first], nothing, [-1], 1, [1], nothing, nothing, None, [-1], nothing
        with torch.inference_mode():
            step, slots, positions = self._inputs(*inputs)
            for _ in range(2):
                self._graph(1, lambda: self._draw(self._forward(step), slots, positions))

    def release(self, sequence: Sequence) -> None:
        run = self._runs.pop(sequence.id, None)
        if run is not None:
            self._free.append(run.slot)

    @torch.inference_mode()
    def launch(self, schedule: Schedule) -> _Launched:
        self._preparation.reset()
        chunks = schedule.chunks
        runs = [self._run(chunk.sequence) for chunk in chunks]
        scored = [chunk for chunk in chunks if _is_scored(chunk)]
        fixed = schedule.num_decodes == len(chunks) and not scored  # of a fixed size: decodes alone
        padding = next(n for n in self._batch_sizes if n >= len(chunks)) - len(chunks) if fixed else 0

        tokens: list[int] = []
        sources: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        first_rows: list[int] = []
        size = self.block_size
        for chunk, run in zip(chunks, runs, strict=True):
            sequence, start, end = chunk.sequence, chunk.start, chunk.start + chunk.length
            row = len(tokens)
            first_rows.append(row)
            if chunk.input_pending:
                assert run.step == self._step, "a pending token was not drawn by the step before"
                sources.append(run.row)
                tokens.append(0)
            else:
                sources += range(self._first + row, self._first + row + chunk.length)
                tokens += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [sequence.blocks[p // size] * size + p % size for p in range(start, end)]
        nothing = [0] * padding
        # Of a fixed size every row draws, into slot -1 if its token is not wanted.
        drawing = [i for i, chunk in enumerate(chunks) if chunk.sample or fixed]
        ends = [chunk.start + chunk.length for chunk in chunks]
        rows = [first_rows[i] + chunks[i].length - 1 for i in drawing]
        step, sample_slots, sample_positions = self._inputs(
            tokens + nothing,
            sources + [self._first] * padding,
            positions + nothing,
            slots + [-1] * padding,
            schedule.num_decodes + padding,
            [chunk.length for chunk in chunks] + [1] * padding,
            ends + nothing,
            [run.slot for run in runs] + nothing,
            None if fixed or scored else rows or [0],
            [runs[i].slot if chunks[i].sample else -1 for i in drawing] + [-1] * padding,
            [ends[i] for i in drawing] + nothing,
        )
        self._step += 1
        for row, i in enumerate(drawing):
            runs[i].step, runs[i].row = self._step, row

        drawn = [(row, chunks[i].sequence, runs[i]) for row, i in enumerate(drawing) if chunks[i].sample]
        masks: dict[int, NDArray[np.int32]] = {}
        for row, sequence, run in drawn:
            if sequence.guide is not None:
                masks[row] = sequence.guide.words(sequence.held)
                run.error = run.error or sequence.guide.error
        self._table.set_masks(masks)

        def compute() -> torch.Tensor:
            return self._draw(self._forward(step), sample_slots, sample_positions)

        graph = self._graph(len(chunks) + padding, compute) if fixed else None
        started = self._clock.mark()
        kept: list[tuple[Chunk, torch.Tensor]] = []
        logits: torch.Tensor | None = None
        if graph is not None:
            graph[0].replay()
            logits = graph[1]
        elif fixed:
            logits = compute()
        else:
            hidden = self._forward(step)
            for chunk, row in zip(chunks, first_rows, strict=True):
                if chunk in scored:
                    kept.append((chunk, hidden[row : row + chunk.length]))
            if drawing:
                logits = self._draw(hidden[rows] if scored else hidden, sample_slots, sample_positions)
        entries = self._logprobs(logits, [sequence for _, sequence, _ in drawn]) if logits is not None else []
        fetched = self._fetch(self._buffer[: len(drawing)])
        padded = len(chunks) + padding if padding else 0
        return _Launched(drawn, fetched, entries, kept, padded, self._preparation.seconds, started, self._clock.mark())

    @torch.inference_mode()
    def finish(self, handle: _Launched) -> StepResult:
        result = StepResult({}, padded=handle.padded, prepared=sum(handle.prepared.values()))
        result.started, seconds = self._clock.wait(handle.started, handle.done)
        result.seconds = max(0.0, seconds - handle.prepared["compiling"])
        tokens = handle.tokens.tolist()
        columns = [column.tolist() for column in handle.logprobs]
        for row, sequence, run in handle.drawn:
            token, count = tokens[row], sequence.request.params.logprobs
            if token < 0 or run.error:
                result.errors[sequence.id] = run.error or NOT_FINITE
                continue
            result.tokens[sequence.id] = token
            if count is not None:
                logprob, rank, best, values = (column[row] for column in columns)
                top = list(zip(best[:count], values[:count], strict=True))
                result.logprobs[sequence.id] = TokenLogprob(token, logprob, rank, top)
        for chunk, hidden in handle.scored:
            result.prompt_logprobs[chunk.sequence.id] = prompt_logprobs(self.model, chunk, hidden)
        return result

    def logits(self, tokens: list[int], start: int = 0) -> torch.Tensor:
        """float32 [T, V] of one forward over `tokens` at positions start, start + 1, ..., whose KV goes to the cache's
        first blocks: for tests and benchmarks, while no request runs. Waits for the device."""
        end = start + len(tokens)
        self._tables[0] = np.arange(self._tables.shape[1])
        with torch.inference_mode():
            span = list(range(start, end))
            places = list(range(self._first, self._first + len(tokens)))
            step, _, _ = self._inputs(tokens, places, span, span, 0, [len(tokens)], [end], [0])
            logits = self.model.logits(self._forward(step))
        self._synchronize()
        return logits

    def rehearse(self) -> tuple[int, int]:
        """Computes the largest steps there are on the cache's first block: prompts, then decodes. Returns the bytes
        that the tensors of each took at most (0 without a GPU). Also compiles what these steps need."""
        limit, sequences = self.max_model_len, self._max_seqs
        most = min(self.max_num_batched_tokens, sequences * limit)
        lengths = [min(limit, most - i) for i in range(0, most, limit)]
        positions = [p for length in lengths for p in range(length)]
        slots = [p % self.block_size for p in positions]
        self._tables[:] = 0

        def compute(positions: list[int], slots: list[int], decodes: int, lengths: list[int], draws: int) -> None:
            nothing, rows = [0] * len(positions), [0] * draws
            sources, tables = [self._first] * len(positions), [0] * len(lengths)
            inputs = nothing, sources, positions, slots, decodes, lengths, lengths, tables, rows, [-1] * draws, rows
            step, sample_slots, sample_positions = self._inputs(*inputs)
            self._draw(self._forward(step), sample_slots, sample_positions)

        def decode(n: int) -> None:
            compute([0] * n, [-1] * n, n, [1] * n, n)

        with torch.inference_mode():
            prompts = self._peak(lambda: compute(positions, slots, 0, lengths, sequences))
            for rows in sorted({min(n, most) for n in BUCKETS}):  # each has tiles of its own
                short = [min(limit, rows - i) for i in range(0, rows, limit)]
                compute([p for length in short for p in range(length)], slots[:rows], 0, short, 1)
            for n in sorted({min(n, sequences) for n in (1, *BUCKETS)}):
                decode(n)
            return prompts, self._peak(lambda: decode(sequences))

    def _inputs(
        self,
        tokens: list[int],
        sources: list[int],
        positions: list[int],
        slots: list[int],
        decodes: int,
        lengths: list[int],
        ends: list[int],
        tables: list[int],
        rows: list[int] | None = None,
        sample_slots: list[int] | None = None,
        sample_positions: list[int] | None = None,
    ) -> tuple[Step, torch.Tensor, torch.Tensor]:
        """Brings a step's inputs to the device: see the top of this file. lengths, ends: of each sequence, in the step
        and with what is cached; the first `decodes` have length 1. tables: rows of the block tables."""
        if self.backend.invariant:
            decodes = 0
        cu_q = [0, *itertools.accumulate(lengths[decodes:])]
        arrays: list[Any] = [tokens, sources, positions, slots, ends[:decodes], ends[decodes:], cu_q, rows or []]
        arrays += [sample_slots or [], sample_positions or [], self._tables[tables].reshape(-1)]
        places = list(itertools.accumulate((-(-len(array) // 4) * 4 for array in arrays), initial=0))  # 16-byte aligned
        host = torch.empty(places[-1], dtype=torch.int32, pin_memory=self._cuda)
        values = host.numpy()
        for array, place in zip(arrays, places, strict=False):
            values[place : place + len(array)] = array
        target = self._buffer[self._first : self._first + places[-1]]
        target.copy_(host, non_blocking=True)  # the allocator of pinned memory keeps it until it has been read
        parts = [target[place : place + len(array)] for array, place in zip(arrays, places, strict=False)]
        table = parts[10].view(len(tables), -1)
        batch = Batch(table, parts[4], parts[5], parts[6], max(lengths[decodes:], default=0))
        step = Step(parts[1], parts[3], parts[2], batch, None if rows is None else parts[7])
        return step, parts[8], parts[9]

    def _forward(self, step: Step) -> torch.Tensor:
        """step.tokens: sources. The token after an output that was not finite is -1. One without an embedding, which
        whoever takes requests refuses, would end the process."""
        tokens = self._buffer.index_select(0, step.tokens).clamp_(0, self.config.vocab_size - 1)
        return self.model.forward(dataclasses.replace(step, tokens=tokens))

    def _draw(self, hidden: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] of hidden [S, H]; writes `sampled`."""
        logits = self.model.logits(hidden)
        sample(logits, slots, positions, self._table, self._buffer[: len(slots)], self._workspace)
        return logits

    def _graph(
        self, size: int, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor] | None:
        """The captured step of this many decodes, and where it leaves its logits; None the first time, when eager work
        compiles what capturing may not."""
        if not self._use_graphs or size in self._graphs:
            return self._graphs.get(size)
        if size not in self._seen:
            self._seen.add(size)
            return None
        graph = torch.cuda.CUDAGraph()
        self._preparation.set("capturing")
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = compute()
        except torch.OutOfMemoryError:  # no room for graphs: eager steps need none
            self._use_graphs = False
            return None
        finally:
            self._preparation.set("")
        self._graphs[size] = graph, logits
        return self._graphs[size]

    def _logprobs(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[torch.Tensor]:
        """Of every row of a step in which somebody wants them."""
        counts = [sequence.request.params.logprobs for sequence in sequences]
        if all(count is None for count in counts):
            return []
        most = max(count or 0 for count in counts)
        width = min(max(TOP_LOGPROBS, most), logits.shape[1]) if most else 0
        n = logits.shape[0]
        out, values = (torch.empty(shape, device=self.device) for shape in ((n,), (n, width)))
        ranks, best = (torch.empty(shape, dtype=torch.int32, device=self.device) for shape in ((n,), (n, width)))
        logprobs(logits, self._buffer[:n].clamp(min=0), out, ranks, best, values)
        return [self._fetch(tensor) for tensor in (out, ranks, best, values)]

    def _run(self, sequence: Sequence) -> _Run:
        """Of a sequence that is about to be launched; its row of the block tables is brought up to date."""
        run = self._runs.get(sequence.id)
        if run is None or run.admission != sequence.admission:
            self.release(sequence)
            run = self._runs[sequence.id] = _Run(self._free.pop(), sequence.admission)
            self._set_sampling(sequence, run)
        if run.blocks < len(sequence.blocks):
            self._tables[run.slot, run.blocks : len(sequence.blocks)] = sequence.blocks[run.blocks :]
            run.blocks = len(sequence.blocks)
        return run

    def _set_sampling(self, sequence: Sequence, run: _Run) -> None:
        params = sequence.request.params
        masked = sequence.guide is not None  # what may not be drawn is in the mask
        banned = sequence.eos_token_ids.union(params.stop_token_ids) if params.min_tokens and not masked else ()
        bias = params.logit_bias
        if len(banned) + len(bias) > MAX_BIASES:
            run.error = f"logit_bias names more than {MAX_BIASES} tokens, which is all that a GPU takes."
            banned, bias = (), {}
        self._table.set(
            run.slot, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            presence=params.presence_penalty, frequency=params.frequency_penalty, repetition=params.repetition_penalty,
            seed=seed_of(sequence, self._seed), stream=params.stream, bias=bias, banned=sorted(banned),
            ban_until=sequence.prompt_len + params.min_tokens, masked=masked,
            prompt=sequence.request.prompt, output=sequence.tokens[sequence.prompt_len :],
        )  # fmt: skip

    # Memory and time of the device.

    def _num_blocks(self, options: EngineOptions) -> int:
        """All that --gpu-memory-utilization leaves beside the weights and the largest steps."""
        per_token, wanted = self.backend.kv_bytes_per_token, options.kv_cache_tokens
        if not self._cuda:
            return kv_blocks(wanted, self.max_model_len, per_token, self.block_size, available_memory())
        self._allocate(1)
        prompts, decodes = self.rehearse()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)  # contexts, compiled kernels, other processes
        kept = len(self._batch_sizes) * GRAPH_BYTES + 4 * sum(self._batch_sizes) * self.config.vocab_size  # and logits
        graphs = decodes + kept if self._use_graphs else 0
        scoring = 4 * LOGIT_ROWS * self.config.vocab_size * 4  # prompt logprobs: float32 logits and their like
        used = others + torch.cuda.memory_allocated(self.device) + max(prompts, decodes) + graphs + scoring
        room = max(0, int(total * options.gpu_memory_utilization) - used)
        rows = 2**31 // self.config.num_kv_heads  # a TMA descriptor counts the rows of a layer in 32 bits
        return kv_blocks(wanted, min(room // per_token, rows - self.block_size), per_token, self.block_size, room)

    def _allocate(self, num_blocks: int) -> None:
        self.backend.allocate(num_blocks, self.max_model_len, self._max_seqs)
        width = -(-self.max_model_len // (4 * self.block_size)) * 4  # rows begin at multiples of 16 bytes
        self._tables = np.zeros((self._max_seqs, width), np.int32)
        tokens, sequences = self.max_num_batched_tokens, self._max_seqs
        most = 4 * max(tokens, sequences, self.max_model_len) + sequences * (width + 6) + 64
        self._buffer = torch.zeros(self._first + most, dtype=torch.int32, device=self.device)

    def _peak(self, compute: Callable[[], None]) -> int:
        if not self._cuda:
            compute()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        compute()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, valid once the step is done."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
        return host.copy_(tensor, non_blocking=True)

    @property
    def preparing(self) -> str:
        return self._preparation.state

    def _when_preparing(self, what: str) -> None:
        if self._starting is not None:
            self._starting("kernels" if what else "warm-up", 0.0)

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def _check(self, options: EngineOptions) -> None:
        if options.block_size is not None and options.block_size not in BLOCK_SIZES:
            raise CapacityError(f"block_size is {options.block_size}; on a GPU it must be 16, 32, 64 or 128.")


def _is_scored(chunk: Chunk) -> bool:
    sequence = chunk.sequence
    return sequence.request.params.prompt_logprobs is not None and chunk.start < sequence.prompt_len - 1
