"""Attention of single rows over the paged cache on a CPU: one kernel over all parts of all sequences, and their join.

As in Flash-Decoding (https://pytorch.org/blog/flash-decoding): a sequence's keys are cut into parts of PART, which the
threads take one after another, and what the parts give is joined by their largest scores. Parts of several sequences
that begin at the same slot (a shared prefix) follow each other, so that memory is read once for all of them. What a row
gets depends on nothing else in the step.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from kernels.cpu import vector
from kernels.cpu.span import Span
from kernels.cpu.vector import F32, FLOATS, I64, WIDTH, Builder, Kernel, Value, at, load, store

PART = 256  # keys
AHEAD = 32  # keys that are fetched into the cache before they are needed
LINE = 64  # bytes that are fetched at a time
REGISTERS = 16  # vectors of sums that a loop over V keeps

# What the kernels' arguments are, by their places.
COUNTER, UNITS, KV_HEADS, Q, K, V, K_SCALES, V_SCALES, ROWS, BEGINS, FIRSTS, COUNTS, SUMS, STATES = range(14)


def supported(dtype: torch.dtype, dim: int) -> bool:
    """Whether there is a kernel for a cache of this dtype and heads of this size."""
    return vector.available() and dtype in vector.STORED and dim % WIDTH == 0


class DecodeAttention:
    """Of one step. spans: of one row each. window: tokens a query sees, itself included. caches, scales: as for
    `Attention`, of a dtype and size that are `supported`."""

    def __init__(
        self,
        spans: list[Span],
        caches: torch.Tensor,
        block_size: int,
        heads: int,
        window: int | None,
        scales: torch.Tensor | None = None,
    ):
        kv_heads, dim = caches.shape[2:]
        units = [(row, runs) for row, span in enumerate(spans) for runs in _parts(span, block_size, window)]
        order = sorted(range(len(units)), key=lambda i: units[i][1][0][0])
        runs = [run for i in order for run in units[i][1]]
        rows = np.array([units[i][0] for i in order])
        self._arrays = (
            rows,
            _begins([len(units[i][1]) for i in order]),
            np.array([first for first, _ in runs]),
            np.array([count for _, count in runs]),
            np.empty((len(units), heads, dim), np.float32),
            np.empty((len(units), heads, 2), np.float32),
            np.argsort(rows, kind="stable"),
            _begins(np.bincount(rows)),
        )
        addresses = [array.ctypes.data for array in self._arrays]
        self._caches, self._scales = caches, scales
        self._arguments = np.array([0, len(units), kv_heads, 0, 0, 0, 0, 0, *addresses[:6]])
        self._attend = _attend(dim, heads // kv_heads, caches.dtype, scales is not None)
        self._out = torch.empty(len(spans), heads, dim)
        self._join_arguments = np.array([0, len(spans), heads, *addresses[4:], self._out.data_ptr()])
        self._join = _join(dim)

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q [rows, heads, D] float32 -> [rows, heads, D] float32, which the next layer overwrites."""
        q, both = q.contiguous(), (2 * layer, 2 * layer + 1)
        self._arguments[COUNTER] = self._join_arguments[COUNTER] = 0
        self._arguments[Q] = q.data_ptr()
        self._arguments[K : V + 1] = [self._caches[i].data_ptr() for i in both]
        if self._scales is not None:
            self._arguments[K_SCALES : V_SCALES + 1] = [self._scales[i].data_ptr() for i in both]
        self._attend(self._arguments)
        self._join(self._join_arguments)
        return self._out


def _begins(counts: list[int] | np.ndarray) -> np.ndarray:
    """Where each of consecutive groups begins, and where the last ends; int64."""
    return np.concatenate([[0], np.cumsum(counts)])


def _parts(span: Span, block_size: int, window: int | None) -> list[list[tuple[int, int]]]:
    """The keys that a span of one row sees: of each part its runs of consecutive slots, as (first, count)."""
    start = max(0, span.length - window) if window else 0
    blocks = None if span.blocks is None else span.blocks.tolist()
    parts = []
    for begin in range(start // PART * PART, span.length, PART):
        low, high = max(begin, start), min(begin + PART, span.length)
        runs: list[tuple[int, int]] = []
        while low < high:
            if blocks is None:
                first, count = span.first + low, high - low
            else:
                block, place = divmod(low, block_size)
                first, count = blocks[block] * block_size + place, min(block_size - place, high - low)
            if runs and sum(runs[-1]) == first:
                runs[-1] = runs[-1][0], runs[-1][1] + count
            else:
                runs.append((first, count))
            low += count
        parts.append(runs)
    return parts


@functools.cache
def _attend(dim: int, group: int, dtype: torch.dtype, scaled: bool) -> Kernel:
    """Of each unit (a part of a row's keys) and head: the sum of V weighted by 2^(score - the largest score); and
    that score and the sum of the weights."""
    return Kernel(lambda b, arguments: _Attend(b, arguments, dim, group, dtype, scaled).write())


class _Attend:
    """Writes the kernel of `_attend`. scores: of one unit, [heads, room], later the weights."""

    def __init__(self, b: Builder, arguments: Value, dim: int, group: int, dtype: torch.dtype, scaled: bool):
        self.b, self.dim, self.group, self.dtype, self.scaled = b, dim, group, dtype, scaled
        self.counter, self.units = at(b, arguments, COUNTER), b.load(at(b, arguments, UNITS))
        self.kv_heads = b.load(at(b, arguments, KV_HEADS))
        self.heads = b.mul(self.kv_heads, I64(group))
        stored = vector.STORED[dtype]
        kinds = {K: stored, V: stored} | dict.fromkeys((ROWS, BEGINS, FIRSTS, COUNTS), I64)
        places = range(Q, STATES + 1)
        self.at = {i: vector.address(b, b.load(at(b, arguments, i)), kinds.get(i, F32)) for i in places}
        self.room = PART + WIDTH
        self.scores = b.alloca(F32, b.mul(self.heads, I64(self.room)))
        self.strides = range(0, dim, LINE // dtype.itemsize)

    def write(self) -> None:
        b = self.b
        with vector.each_of(b, self.counter, self.units) as unit:
            self._weigh(unit, self._score(unit))
            self._sum(unit)

    def _runs(self, unit: Value) -> tuple[Value, Value]:
        return self.b.load(at(self.b, self.at[BEGINS], unit)), self.b.load(at(self.b, self.at[BEGINS], unit, 1))

    def _line(self, head: Value, g: Value | int) -> Value:
        """Where the scores of a query head are: the g-th of a KV head."""
        return at(self.b, self.scores, (head, self.group * self.room), (g, self.room))

    def _score(self, unit: Value) -> Value:
        """The scores of WIDTH keys at a time, those behind a run's last too: the next run's overwrite them. Returns how
        many keys there are."""
        b, dim, kv_heads = self.b, self.dim, self.kv_heads
        q = at(b, self.at[Q], (b.load(at(b, self.at[ROWS], unit)), self.heads, dim))
        done = vector.variable(b, I64, I64(0))
        with vector.loop(b, *self._runs(unit)) as run:
            first, count = (b.load(at(b, self.at[i], run)) for i in (FIRSTS, COUNTS))
            groups = b.udiv(b.add(count, I64(WIDTH - 1)), I64(WIDTH))
            with vector.loop(b, I64(0), groups) as i, vector.loop(b, I64(0), kv_heads) as head:
                begin = b.mul(i, I64(WIDTH))
                key = b.add(first, begin)
                dots = self._dots(
                    at(b, q, (head, self.group * dim)), at(b, self.at[K], (key, kv_heads, dim), (head, dim))
                )
                scale = vector.floats(math.log2(math.e) / math.sqrt(dim))
                if self.scaled:
                    scales = at(b, self.at[K_SCALES], (key, kv_heads), head)
                    scale = b.fmul(scale, vector.gather(b, scales, kv_heads))
                for g in range(self.group):
                    store(b, b.fmul(dots[g], scale), at(b, self._line(head, g), b.load(done), begin))
            b.store(b.add(b.load(done), count), done)
        return b.load(done)

    def _dots(self, q: Value, k: Value) -> list[Value]:
        """Of the query heads at q with WIDTH keys from k on."""
        b, columns = self.b, range(0, self.dim, WIDTH)
        queries = [[load(b, at(b, q, g * self.dim + d)) for d in columns] for g in range(self.group)]
        products: list[list[Value]] = [[] for _ in queries]
        for j in range(WIDTH):
            row = at(b, k, (self.kv_heads, self.dim * j))
            for d in self.strides:
                vector.prefetch(b, at(b, row, (self.kv_heads, self.dim * AHEAD), d))
            parts = [load(b, at(b, row, d), self.dtype) for d in columns]
            for query, found in zip(queries, products, strict=True):
                total = b.fmul(query[0], parts[0])
                for x, y in zip(query[1:], parts[1:], strict=True):
                    total = vector.add_product(b, total, x, y)
                found.append(total)
        return [vector.sums(b, found) for found in products]

    def _weigh(self, unit: Value, keys: Value) -> None:
        """Scores become weights; their largest and the sum of the weights are kept."""
        b = self.b
        steps = b.udiv(b.add(keys, I64(WIDTH - 1)), I64(WIDTH))
        with vector.loop(b, I64(0), self.heads) as head:
            line = at(b, self.scores, (head, self.room))
            store(b, vector.floats(-math.inf), at(b, line, keys))  # what lies behind the last key
            most = vector.variable(b, FLOATS, vector.floats(-math.inf))
            with vector.loop(b, I64(0), steps) as i:
                b.store(vector.larger(b, load(b, at(b, line, (i, WIDTH))), b.load(most)), most)
            largest = vector.largest_of(b, b.load(most))
            total = vector.variable(b, FLOATS, vector.floats(0))
            with vector.loop(b, I64(0), steps) as i:
                place = at(b, line, (i, WIDTH))
                weight = vector.exp2(b, b.fsub(load(b, place), vector.splat(b, largest)))
                store(b, weight, place)
                b.store(b.fadd(b.load(total), weight), total)
            state = at(b, self.at[STATES], (unit, self.heads, 2), (head, 2))
            b.store(largest, state)
            b.store(vector.total_of(b, b.load(total)), at(b, state, 1))

    def _sum(self, unit: Value) -> None:
        """V weighted, as many columns at a time as the registers hold sums of."""
        b, dim, kv_heads = self.b, self.dim, self.kv_heads
        slab = max(1, REGISTERS // self.group) * WIDTH
        with vector.loop(b, I64(0), kv_heads) as head:
            for low in range(0, dim, slab):
                columns = range(low, min(low + slab, dim), WIDTH)
                held = [[vector.variable(b, FLOATS, vector.floats(0)) for _ in columns] for _ in range(self.group)]
                done = vector.variable(b, I64, I64(0))
                with vector.loop(b, *self._runs(unit)) as run:
                    first, count = (b.load(at(b, self.at[i], run)) for i in (FIRSTS, COUNTS))
                    with vector.loop(b, I64(0), count) as j:
                        key = b.add(first, j)
                        v = at(b, self.at[V], (key, kv_heads, dim), (head, dim))
                        for d in self.strides if low == 0 else ():
                            vector.prefetch(b, at(b, v, (kv_heads, dim * AHEAD), d))
                        parts = [load(b, at(b, v, d), self.dtype) for d in columns]
                        for g in range(self.group):
                            weight = b.load(at(b, self._line(head, g), b.load(done), j))
                            if self.scaled:
                                weight = b.fmul(weight, b.load(at(b, self.at[V_SCALES], (key, kv_heads), head)))
                            weight = vector.splat(b, weight)
                            for place, part in zip(held[g], parts, strict=True):
                                b.store(vector.add_product(b, b.load(place), weight, part), place)
                    b.store(b.add(b.load(done), count), done)
                for g in range(self.group):
                    out = at(b, self.at[SUMS], (unit, self.heads, dim), (head, self.group * dim), g * dim)
                    for d, place in zip(columns, held[g], strict=True):
                        store(b, b.load(place), at(b, out, d))


@functools.cache
def _join(dim: int) -> Kernel:
    """A row's units, each by 2^(its largest score - the largest of all), over the weights' sum."""

    def write(b: Builder, arguments: Value) -> None:
        rows, heads, *addresses = (b.load(at(b, arguments, i)) for i in range(1, 8))
        kinds = (F32, F32, I64, I64, F32)
        sums, states, units, begins, out = (vector.address(b, *x) for x in zip(addresses, kinds, strict=True))
        with vector.each_of(b, at(b, arguments, COUNTER), rows) as row, vector.loop(b, I64(0), heads) as head:
            ends = b.load(at(b, begins, row)), b.load(at(b, begins, row, 1))
            most = vector.variable(b, F32, F32(-math.inf))
            with vector.loop(b, *ends) as i:
                state = at(b, states, (b.load(at(b, units, i)), heads, 2), (head, 2))
                b.store(vector.larger(b, b.load(state), b.load(most)), most)
            total = vector.variable(b, FLOATS, vector.floats(0))
            held = [vector.variable(b, FLOATS, vector.floats(0)) for _ in range(0, dim, WIDTH)]
            with vector.loop(b, *ends) as i:
                unit = b.load(at(b, units, i))
                state = at(b, states, (unit, heads, 2), (head, 2))
                weight = vector.exp2(b, vector.splat(b, b.fsub(b.load(state), b.load(most))))
                b.store(vector.add_product(b, b.load(total), weight, vector.splat(b, b.load(at(b, state, 1)))), total)
                line = at(b, sums, (unit, heads, dim), (head, dim))
                for d, place in enumerate(held):
                    b.store(vector.add_product(b, b.load(place), weight, load(b, at(b, line, d * WIDTH))), place)
            line = at(b, out, (row, heads, dim), (head, dim))
            for d, place in enumerate(held):
                store(b, b.fdiv(b.load(place), b.load(total)), at(b, line, d * WIDTH))

    return Kernel(write)
