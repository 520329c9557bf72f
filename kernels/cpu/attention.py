"""Attention over the paged cache on a CPU: torch's flash attention (SDPA), one call a sequence;
single rows, as decode steps have them, in kernels.cpu.decode.

A layer's cache is [2, slots, kv_heads, D] (K and V; slot = block * block_size + row), so that consecutive blocks are
consecutive tokens: a sequence whose blocks lie in one run, which the block pool aims for, is read in place through a
view. One whose blocks are scattered is gathered first, a copy of its KV per layer.
`Attention` is the metadata of one step, prepared once and used by every layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kernels.cpu.decode import DecodeAttention, supported
from kernels.cpu.span import Span

__all__ = ["KEY_TILE", "Attention", "Span"]

# Batch-invariant: what SDPA computes for a query depends neither on the other queries nor on how many keys are masked,
# if there are whole tiles of both. It takes larger tiles, with other sums, from 192 queries on: hence the slabs.
QUERY_TILE = 32
QUERY_SLAB = 160
KEY_TILE = 256  # sums over keys are taken in parts of this many


class Attention:
    """The attention of one step. spans: in order of their rows, together all rows of the batch.

    caches: K and V of all layers, [2 * layers, slots, kv_heads, D]; with 8 bits, `scales` float32 [2 * layers, slots,
    kv_heads, 1] are those of their rows. heads: of q. window: tokens a query sees, itself included. What lies in a
    sequence's last block behind its last token must be finite (`CpuBackend.clear`).
    dtype: of the arithmetic where more than one row is computed; single rows run in float32, where there is a kernel.
    """

    def __init__(
        self,
        spans: list[Span],
        caches: torch.Tensor,
        block_size: int,
        heads: int,
        dtype: torch.dtype,
        window: int | None,
        batch_invariant: bool,
        scales: torch.Tensor | None = None,
    ):
        self.rows = sum(span.rows for span in spans)
        self._caches = caches
        # float8 as integers: not every op takes it
        self._pools = [caches] if scales is None else [caches.view(torch.int8), scales]
        self._block_size = block_size
        self._invariant = batch_invariant
        self._window = window
        # Batch-invariant: how a prompt is cut into steps, and so which rows are single, depends on the others.
        apart = batch_invariant or not supported(caches.dtype, caches.shape[3])  # every span by itself, in `dtype`
        self.decode_only = not apart and all(span.rows == 1 for span in spans)
        self.dtype = torch.float32 if self.decode_only else dtype
        # Per span and pool: K, V of layer 0, K, V of layer 1, ...
        self._views: list[list[tuple[torch.Tensor, ...]] | None] = []
        self._masks: list[torch.Tensor | None] = []
        single = [] if apart else [span for span in spans if span.rows == 1]
        self._decode = DecodeAttention(single, caches, block_size, heads, window, scales) if single else None
        self._single = torch.tensor([span.row for span in single])
        self._spans = [span for span in spans if apart or span.rows > 1]
        for span in self._spans:
            start, end = self._keys(span)
            if span.blocks is None:
                run = span.first + start, end - start
                views = (pool.narrow(1, *run).transpose(1, 2).unsqueeze(1) for pool in self._pools)
                self._views.append([view.unbind(0) for view in views])
            else:
                missing = -(-end // block_size) - len(span.blocks)  # of a masked tile: any block will do
                span.blocks = F.pad(span.blocks, (0, missing))
                self._views.append(None)
            self._masks.append(self._mask(span, start, end))

    def __call__(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """q [T, heads, D] of this step -> [T, heads * D], the dtype of q or, of single rows, float32."""
        tokens, heads, dim = q.shape
        if self.decode_only:
            assert self._decode is not None
            return self._decode(q, layer).view(tokens, heads * dim)
        out = torch.empty(tokens, heads, dim, dtype=q.dtype)
        if self._decode is not None:
            single = self._decode(q.index_select(0, self._single).float(), layer)
            out.index_copy_(0, self._single, single.to(q.dtype))
        for i, span in enumerate(self._spans):
            k, v = (x.to(q.dtype) for x in self._kv(i, layer))
            if self._invariant:
                k, v = _bounded(k, v, span.length)
            x = q.narrow(0, span.row, span.rows).transpose(0, 1).unsqueeze(0)
            mask = self._masks[i]
            if mask is None:
                y = _chunk(x, k, v)
            elif self._invariant:
                y = torch.cat(
                    [
                        _masked(part, k, v, mask[first : first + QUERY_SLAB])
                        for first, part in zip(range(0, span.rows, QUERY_SLAB), x.split(QUERY_SLAB, 2), strict=True)
                    ],
                    2,
                )
            else:
                y = _masked(x, k, v, mask)
            out.narrow(0, span.row, span.rows).copy_(y[0].transpose(0, 1))
        return out.view(tokens, heads * dim)

    def _keys(self, span: Span) -> tuple[int, int]:
        """First and last + 1 position whose key any query of the span sees."""
        if self._invariant:
            return 0, -(-span.length // KEY_TILE) * KEY_TILE
        start = max(0, span.length - span.rows + 1 - self._window) if self._window else 0
        return start, span.length

    def _kv(self, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [1, kv_heads, keys, D] of one span; from 8 bits in `dtype`."""
        views = self._views[index]
        if views is not None:
            parts = [(view[2 * layer], view[2 * layer + 1]) for view in views]
        else:
            parts = [self._gathered(pool, index, layer) for pool in self._pools]
        if len(parts) == 1:
            return parts[0]
        k, v = ((x.view(self._caches.dtype).float() * scale).to(self.dtype) for x, scale in zip(*parts, strict=True))
        return k, v

    def _gathered(self, pool: torch.Tensor, index: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a span whose blocks are scattered, copied."""
        span = self._spans[index]
        assert span.blocks is not None
        start, end = self._keys(span)
        cache = pool[2 * layer : 2 * layer + 2]
        blocks = cache.view(2, -1, self._block_size * cache.shape[2] * cache.shape[3])
        tokens = blocks.index_select(1, span.blocks).view(2, -1, *cache.shape[2:])
        if tokens.shape[1] < end:  # a block may be smaller than a tile of keys
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, end - tokens.shape[1]))
        tokens = tokens.narrow(1, start, end - start)
        k, v = tokens.transpose(1, 2).unsqueeze(1).unbind(0)
        return k, v

    def _mask(self, span: Span, start: int, end: int) -> torch.Tensor | None:
        """Additive [rows, keys], rows in whole tiles if batch-invariant; None where `_chunk` does."""
        context = span.length - span.rows
        if not self._invariant and (not self._window or end - start <= self._window):
            return None
        padding = -span.rows % QUERY_TILE if self._invariant else 0
        queries = torch.arange(context, span.length + padding).unsqueeze(1)
        keys = torch.arange(start, end)
        seen = keys <= queries
        if self._window:
            seen &= keys > queries - self._window
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)


def _chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last positions: q [1, H, rows, D], k and v [1, Hkv, keys, D] -> [1, H, rows, D].

    No mask is read, which would cost more than the scores: one call for the keys that every query sees, one for the
    diagonal, joined by the weights that their log-sum-exps give.
    """
    _, heads, rows, dim = q.shape
    _, kv_heads, keys, _ = k.shape
    context, group = keys - rows, heads // kv_heads
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    late_k, late_v = (x[:, :, context:].repeat_interleave(group, 1) for x in (k, v))
    diagonal, diagonal_lse = flash(q, late_k, late_v, 0.0, True)
    if not context:
        return diagonal  # type: ignore[no-any-return]
    grouped = q.reshape(1, kv_heads, group * rows, dim)
    past, past_lse = flash(grouped, k[:, :, :context], v[:, :, :context])
    weight = torch.sigmoid(diagonal_lse - past_lse.reshape(diagonal_lse.shape)).unsqueeze(-1).to(q.dtype)
    return torch.lerp(past.reshape(q.shape), diagonal, weight)


def _bounded(k: torch.Tensor, v: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values from `length` on are masked and may be another sequence's; NaN would come through the mask."""
    if math.isfinite(k[:, :, length:].sum() + v[:, :, length:].sum()):
        return k, v
    padding = (0, 0, 0, k.shape[2] - length)
    return F.pad(k[:, :, :length], padding), F.pad(v[:, :, :length], padding)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention under an additive mask that may have more rows than q, which is padded to them."""
    rows = q.shape[2]
    q = F.pad(q, (0, 0, 0, mask.shape[0] - rows))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)[:, :, :rows]
