"""Attention of single rows over the paged cache on a CPU: flash attention over pieces of the cache in place, joined.

A few rows are read run by run: a sequence's blocks lie in one run of consecutive slots, or in a few. Many rows are read
block by block, all blocks of all sequences in one call, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding):
the call's cost is paid once and the threads get equal shares. Either way what several sequences share is read once for
all of them, and what the pieces of a sequence give is joined by their log-sum-exps.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from kernels.cpu.span import Span

MANY = 8  # rows from which one call for all blocks is cheaper than one for each run
MAX_RUNS = 4  # of a sequence, beyond which its blocks are not worth a call for each run
GAP = 8  # blocks of nobody in this step that are computed along, which is cheaper than another call


@dataclasses.dataclass(slots=True, eq=False)
class _Piece:
    """`units` parts of `length` consecutive slots each, side by side from slot `first` on.

    rows int64 [units, R]: whose queries each part meets; -1: nobody's. mask: additive [units, 1, R or R * group,
    length], or None.
    """

    first: int
    length: int
    rows: np.ndarray
    mask: torch.Tensor | None = None
    views: tuple[torch.Tensor, ...] = ()  # K, V [units, kv_heads, length, D] of layer 0, of layer 1, ...
    queries: torch.Tensor | None = None  # int64 [units * R]: rows; None: the only one


@dataclasses.dataclass(slots=True, eq=False)
class _Joins:
    """How the results [N, D] of all pieces, of one row and head each, make those of the rows [rows * heads, D]."""

    order: torch.Tensor  # int64 [rows * heads, W]: the results of a row and head; W: the most of any
    padding: torch.Tensor  # [rows * heads, W]: -inf where there are fewer
    kept: torch.Tensor  # int64: the others' places in it
    index: torch.Tensor  # int64: `order` at `kept`
    offsets: torch.Tensor  # int64 [rows * heads]: where each one begins in `index`


class DecodeAttention:
    """Of one step. spans: of one row each. window: tokens a query sees, itself included. caches: as for `Attention`;
    what lies in a sequence's last block behind its last token must be finite."""

    def __init__(self, spans: list[Span], caches: torch.Tensor, block_size: int, heads: int, window: int | None):
        self._group = heads // caches.shape[2]
        starts = [max(0, span.length - window) if window else 0 for span in spans]
        runs = [_runs(span, block_size, start) for span, start in zip(spans, starts, strict=True)]
        if len(spans) >= MANY or max(map(len, runs)) > MAX_RUNS:
            self._pieces = _by_block(spans, starts, block_size, self._group, caches.dtype)
        else:
            self._pieces = _by_run(runs)
        for piece in self._pieces:
            units = piece.rows.shape[0]
            view = caches.narrow(1, piece.first, units * piece.length)
            piece.views = view.unflatten(1, (units, piece.length)).transpose(2, 3).unbind(0)
            piece.queries = torch.from_numpy(piece.rows.clip(0).reshape(-1)) if len(spans) > 1 else None
        alone = len(self._pieces) == 1 and len(spans) == 1 and self._pieces[0].rows.size == 1
        self._joins = None if alone else _joins(self._pieces, len(spans), caches.shape[2], self._group)

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q [rows, heads, D] in the cache's dtype -> [rows, heads, D]."""
        rows, heads, dim = q.shape
        group = self._group
        kv_heads = heads // group
        outs, sums = [], []
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for piece in self._pieces:
            units, each = piece.rows.shape
            x = q if piece.queries is None else q.index_select(0, piece.queries)
            x = x.view(-1, each, kv_heads, group, dim).transpose(1, 2).reshape(-1, kv_heads, each * group, dim)
            k, v = piece.views[2 * layer], piece.views[2 * layer + 1]
            out, lse = flash(x.expand(units, -1, -1, -1), k, v, attn_mask=piece.mask)
            if self._joins is None:
                return out.reshape(rows, heads, dim)  # type: ignore[no-any-return]
            outs.append(out.transpose(1, 2).reshape(-1, dim))
            sums.append(lse.transpose(1, 2).reshape(-1))
        joins = self._joins
        assert joins is not None
        results, lse = (torch.cat(x) if len(x) > 1 else x[0] for x in (outs, sums))
        weights = (lse[joins.order] + joins.padding).softmax(1).view(-1)[joins.kept]
        joined = F.embedding_bag(joins.index, results.float(), joins.offsets, mode="sum", per_sample_weights=weights)
        return joined.view(rows, heads, dim).to(q.dtype)


def _by_run(runs: list[list[tuple[int, int]]]) -> list[_Piece]:
    owners: dict[tuple[int, int], list[int]] = {}
    for row, found in enumerate(runs):
        for run in found:
            owners.setdefault(run, []).append(row)
    return [_Piece(first, length, np.array([rows])) for (first, length), rows in owners.items()]


def _by_block(spans: list[Span], starts: list[int], size: int, group: int, dtype: torch.dtype) -> list[_Piece]:
    """Blocks that equally many rows read and that lie close together make one piece."""
    entries = []  # row, block, first and last + 1 of its slots that the row sees
    for row, (span, start) in enumerate(zip(spans, starts, strict=True)):
        index = np.arange(start // size, -(-span.length // size))
        blocks = index + span.first // size if span.blocks is None else span.blocks.numpy()[index]
        low, high = np.maximum(start - index * size, 0), np.minimum(span.length - index * size, size)
        entries.append(np.stack([np.full_like(index, row), blocks, low, high]))
    row, block, low, high = np.concatenate(entries, 1)
    _, inverse, counts = np.unique(block, return_inverse=True, return_counts=True)
    readers = counts[inverse]
    pieces = []
    for each in np.unique(readers).tolist():
        found = np.flatnonzero(readers == each)
        chosen = found[np.lexsort((row[found], block[found]))].reshape(-1, each)
        breaks = np.flatnonzero(np.diff(block[chosen[:, 0]]) > GAP) + 1
        for part in np.split(chosen, breaks):
            first = int(block[part[0, 0]])
            place = block[part[:, 0]] - first
            rows = np.full((int(place[-1]) + 1, each), -1)
            rows[place] = row[part]
            mask = None
            if low[part].any() or (high[part] < size).any():
                slots = np.arange(size)
                hidden = (slots < low[part][..., None]) | (slots >= high[part][..., None])
                values = np.zeros((len(rows), each, size), np.float32)
                values[place] = np.where(hidden, -np.inf, 0)
                mask = torch.from_numpy(values).to(dtype).unsqueeze(1)
                mask = mask if each == 1 else mask.repeat_interleave(group, 2)
            pieces.append(_Piece(first * size, size, rows, mask))
    return pieces


def _joins(pieces: list[_Piece], rows: int, kv_heads: int, group: int) -> _Joins:
    each = [piece.rows.reshape(-1) for piece in pieces]
    row = np.concatenate(each)
    base = np.flatnonzero(row >= 0)
    base = base[np.argsort(row[base], kind="stable")]
    row = row[base]
    counts = np.bincount(row, minlength=rows)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(row)) - starts[row]
    base *= group * kv_heads
    order = base[starts][:, None, None].repeat(counts.max(), 2)  # padded with its own: another's may be NaN
    padding = np.full(order.shape, -np.inf, np.float32)
    order[row, 0, place], padding[row, 0, place] = base, 0
    # A piece's results lie as [units, R, group, kv_heads]; a row's heads as [kv_heads, group].
    order = order + np.arange(group * kv_heads).reshape(group, kv_heads).T.reshape(1, -1, 1)
    padding = padding.repeat(order.shape[1], 1)
    kept = np.flatnonzero(padding == 0)
    ends = np.cumsum(np.repeat(counts, group * kv_heads))
    shape = rows * group * kv_heads, -1
    return _Joins(
        order=torch.from_numpy(order.reshape(shape)),
        padding=torch.from_numpy(padding.reshape(shape)),
        kept=torch.from_numpy(kept),
        index=torch.from_numpy(order.reshape(-1)[kept]),
        offsets=torch.from_numpy(np.concatenate([[0], ends[:-1]])),
    )


def _runs(span: Span, block_size: int, start: int) -> list[tuple[int, int]]:
    """(first slot, slots) of each run of consecutive slots that hold the positions from `start` on."""
    if span.blocks is None:
        return [(span.first + start, span.length - start)]
    blocks = span.blocks.tolist()
    runs: list[tuple[int, int]] = []
    for index in range(start // block_size, -(-span.length // block_size)):
        low, high = max(start - index * block_size, 0), min(span.length - index * block_size, block_size)
        first = blocks[index] * block_size + low
        if runs and runs[-1][0] + runs[-1][1] == first:
            runs[-1] = runs[-1][0], runs[-1][1] + high - low
        else:
            runs.append((first, high - low))
    return runs
