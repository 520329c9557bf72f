"""Causal attention over a paged cache, written down plainly: what kernels.gpu.attention must equal."""

from __future__ import annotations

import torch

from kernels.kv_cache import KVCache, unpack


def attention(
    q: torch.Tensor,
    cache: KVCache,
    block_table: torch.Tensor,
    cu_q: torch.Tensor,
    kv_len: torch.Tensor,
    scale: float,
    window: int = 0,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """softmax(scale * q k^T) v for sequences whose last tokens are the queries.

    q [T, heads, head_dim], sequence b owns rows cu_q[b]:cu_q[b+1]; they are its last positions of kv_len[b].
    block_table int [B, P]. window: a query sees that many tokens, itself included; 0: all.
    compute: what the operands of both matrix products are rounded to (sums stay float32). float32 is the definition, a
    narrower one shows the error that a kernel at that precision may make. Returns float32 [T, heads, head_dim].
    """
    heads = q.shape[1]
    k_pages, v_pages = unpack(cache)
    group = heads // k_pages.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32)
    for b, n in enumerate(kv_len.tolist()):
        start, stop = int(cu_q[b]), int(cu_q[b + 1])
        pages = block_table[b, : -(-n // cache.block_size)].long()
        k, v = (  # [heads, n, head_dim]
            x[pages].transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(group, 0).to(compute).float()
            for x in (k_pages, v_pages)
        )
        rows = q[start:stop].transpose(0, 1).to(compute).float()
        scores = rows @ k.transpose(1, 2) * scale
        position = torch.arange(n - (stop - start), n)[:, None]
        key = torch.arange(n)[None, :]
        hidden = (key > position) | (key <= position - window if window else torch.zeros(()).bool())
        scores = scores.masked_fill(hidden, -torch.inf)
        p = torch.exp(scores - scores.amax(-1, keepdim=True)) if n else scores
        out[start:stop] = ((p.to(compute).float() @ v) / p.sum(-1, keepdim=True)).transpose(0, 1)
    return out
