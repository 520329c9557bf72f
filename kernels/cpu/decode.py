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


@dataclasses.dataclass(slots=True, eq=False)
class _Joins:
    """How the results [N, D] of all pieces, of one row and head each, make those of the rows [rows * heads, D]."""

    order: torch.Tensor  # int64 [W * rows * heads]: the first result of each row and head, the second, ...
    padding: torch.Tensor  # [W, rows * heads]: -inf where there are fewer than W, the most of any
    kept: torch.Tensor  # int64: places in [W, rows * heads] of what there is, one row and head after another
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
        rows, kv_heads, dim = len(spans), caches.shape[2], caches.shape[3]
        self._joins = None
        if len(self._pieces) > 1 or rows > 1 or self._pieces[0].rows.size > 1:
            self._joins = _joins(self._pieces, rows, kv_heads, self._group)
            self._queries = _queries(self._pieces, kv_heads, self._group)
            # Of every layer in turn: [units, R * group, kv_heads, D], the order in which flash attention writes them.
            sizes = [piece.rows.size * heads for piece in self._pieces]
            self._results = torch.empty(sum(sizes), dim)
            parts = zip(self._pieces, self._results.split(sizes), strict=True)
            self._parts = [part.view(len(piece.rows), -1, kv_heads, dim) for piece, part in parts]
            self._sizes = sizes
        for piece in self._pieces:
            units = piece.rows.shape[0]
            view = caches.narrow(1, piece.first, units * piece.length)
            piece.views = view.unflatten(1, (units, piece.length)).transpose(2, 3).unbind(0)

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q [rows, heads, D] in the cache's dtype -> [rows, heads, D]; float32, but for one piece alone that of q."""
        rows, heads, dim = q.shape
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        joins = self._joins
        if joins is None:
            (piece,) = self._pieces
            x = q.view(1, heads // self._group, self._group, dim)
            out, _ = flash(x, *piece.views[2 * layer : 2 * layer + 2], attn_mask=piece.mask)
            return out.reshape(rows, heads, dim)  # type: ignore[no-any-return]
        sums: list[torch.Tensor] = []
        asked = q.reshape(-1, dim).index_select(0, self._queries).split(self._sizes)
        for piece, x, results in zip(self._pieces, asked, self._parts, strict=True):
            k, v = piece.views[2 * layer : 2 * layer + 2]
            x = x.view(k.shape[0], k.shape[1], -1, dim)
            out, lse = flash(x, k, v, attn_mask=piece.mask)
            results.copy_(out.transpose(1, 2))
            sums.append(lse.transpose(1, 2).reshape(-1))
        weights = torch.cat(sums).index_select(0, joins.order).view(joins.padding.shape).add_(joins.padding).softmax(0)
        weights = weights.view(-1).index_select(0, joins.kept)
        joined, *_ = torch.embedding_bag(self._results, joins.index, joins.offsets, False, 0, False, weights)
        return joined.view(rows, heads, dim)


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


def _queries(pieces: list[_Piece], kv_heads: int, group: int) -> torch.Tensor:
    """int64: which of the queries [rows * heads, D] each piece takes, in turn, as [units, kv_heads, R * group]."""
    head = np.arange(kv_heads * group).reshape(kv_heads, 1, group)
    found = [piece.rows.clip(0)[:, None, :, None] * kv_heads * group + head for piece in pieces]
    return torch.from_numpy(np.concatenate([x.reshape(-1) for x in found]))


def _joins(pieces: list[_Piece], rows: int, kv_heads: int, group: int) -> _Joins:
    row = np.concatenate([piece.rows.reshape(-1) for piece in pieces])
    base = np.flatnonzero(row >= 0)
    base = base[np.argsort(row[base], kind="stable")]
    row = row[base]
    counts = np.bincount(row, minlength=rows)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(row)) - starts[row]
    heads = kv_heads * group
    base *= heads
    order = base[starts].repeat(counts.max()).reshape(rows, -1)  # padded with its own: another's may be NaN
    padding = np.full(order.shape, -np.inf, np.float32)
    order[row, place], padding[row, place] = base, 0
    # A piece's results lie as [units, R, group, kv_heads]; a row's heads as [kv_heads, group].
    order = order.T[:, :, None] + np.arange(heads).reshape(group, kv_heads).T.reshape(-1)
    padding = padding.T.repeat(heads, 1)
    order = order.reshape(padding.shape)
    columns, places = np.nonzero(padding.T == 0)
    return _Joins(
        order=torch.from_numpy(order.reshape(-1)),
        padding=torch.from_numpy(padding),
        kept=torch.from_numpy(places * padding.shape[1] + columns),
        index=torch.from_numpy(order[places, columns]),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(np.repeat(counts, heads))[:-1]])),
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
