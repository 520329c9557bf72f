"""Attention of single rows over the paged cache on a CPU: flash attention over each run of consecutive slots, joined.

A sequence's blocks lie in one run, or in a few: a prefix that it shares with others, and its own. Each run is read in
place. A run that several sequences share is read once for all of them. What the runs of a sequence give is joined by
their log-sum-exps. Only a sequence in many runs is gathered, a copy of its KV in each layer.
"""

from __future__ import annotations

import dataclasses

import torch

from kernels.cpu.span import Span

MAX_RUNS = 4  # beyond it a copy is cheaper than that many calls


@dataclasses.dataclass(slots=True, eq=False)
class _Piece:
    """Keys that the rows `rows` see. views: K and V [1, kv_heads, keys, D] of layer 0, of layer 1, ...; or the slots
    to gather."""

    rows: list[int]
    views: tuple[torch.Tensor, ...] | None
    slots: torch.Tensor | None = None
    index: torch.Tensor | None = None  # of the rows, where there are several


class DecodeAttention:
    """Of one step. spans: of one row each. window: tokens a query sees, itself included. caches: as for `Attention`."""

    def __init__(self, spans: list[Span], caches: torch.Tensor, block_size: int, window: int | None):
        self._caches = caches
        runs: dict[tuple[int, int], _Piece] = {}
        gathered: list[_Piece] = []
        places: list[list[_Piece]] = []
        for row, span in enumerate(spans):
            start = max(0, span.length - window) if window else 0
            found = _runs(span, block_size, start)
            if len(found) > MAX_RUNS:
                gathered.append(_Piece([row], None, torch.cat([torch.arange(a, a + n) for a, n in found])))
                places.append([gathered[-1]])
                continue
            places.append([])
            for first, length in found:
                piece = runs.get((first, length))
                if piece is None:
                    view = caches.narrow(1, first, length).transpose(1, 2).unsqueeze(1)
                    piece = runs[first, length] = _Piece([], view.unbind(0))
                piece.rows.append(row)
                places[-1].append(piece)
        self._pieces = [*runs.values(), *gathered]
        for piece in self._pieces:
            piece.index = torch.tensor(piece.rows) if len(piece.rows) > 1 else None
        self._order, self._padding = self._joins(places)

    def _joins(self, places: list[list[_Piece]]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For each row its results among those of all pieces, [rows, most pieces of a row], and -inf where there are
        fewer; None, None where the pieces are one row each, in order."""
        if [piece.rows for piece in self._pieces] == [[row] for row in range(len(places))]:
            return None, None
        first, starts = 0, {}
        for piece in self._pieces:
            starts[id(piece)] = first
            first += len(piece.rows)
        width = max(map(len, places))
        order = torch.zeros(len(places), width, dtype=torch.int64)
        padding = torch.full((len(places), width, 1), -torch.inf)
        for row, pieces in enumerate(places):
            for i, piece in enumerate(pieces):
                order[row, i] = starts[id(piece)] + piece.rows.index(row)
                padding[row, i] = 0
        return order, padding

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q [rows, heads, D] in the cache's dtype -> [rows, heads, D]."""
        rows, heads, dim = q.shape
        kv_heads = self._caches.shape[2]
        each = q.view(rows, 1, kv_heads, heads // kv_heads, dim).unbind(0)
        outs, sums = [], []
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for piece in self._pieces:
            k, v = self._keys(piece, layer)
            if piece.index is None:
                out, lse = flash(each[piece.rows[0]], k, v)
                outs.append(out.reshape(1, heads, dim))
                sums.append(lse.reshape(1, heads))
                continue
            n, group = len(piece.rows), heads // kv_heads
            together = q.index_select(0, piece.index).view(n, kv_heads, group, dim).transpose(0, 1)
            out, lse = flash(together.reshape(1, kv_heads, n * group, dim), k, v)
            outs.append(out.reshape(kv_heads, n, group, dim).transpose(0, 1).reshape(n, heads, dim))
            sums.append(lse.reshape(kv_heads, n, group).transpose(0, 1).reshape(n, heads))
        result = torch.cat(outs) if len(outs) > 1 else outs[0]
        if self._order is None:
            return result
        assert self._padding is not None
        weights = (torch.cat(sums)[self._order] + self._padding).softmax(1)
        return (result[self._order] * weights.unsqueeze(-1)).sum(1).to(q.dtype)

    def _keys(self, piece: _Piece, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if piece.views is not None:
            return piece.views[2 * layer], piece.views[2 * layer + 1]
        assert piece.slots is not None
        k, v = (
            self._caches[2 * layer : 2 * layer + 2].index_select(1, piece.slots).transpose(1, 2).unsqueeze(1).unbind(0)
        )
        return k, v


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
