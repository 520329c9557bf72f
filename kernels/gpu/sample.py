"""Logits to tokens in one launch, each row by its own parameters and random stream; and log-probabilities.

    scores = penalise(logits + bias, -inf where a mask forbids) / temperature
    token  = argmax over the kept tokens of scores + Gumbel noise            (a draw from softmax(scores), truncated)
    kept:  fewer than top_k tokens score higher, these have less than top_p of the (top-k) mass, score >= max +
    log(min_p)

No sort: the argmax over *all* tokens is found first, by one program for each BLOCK of the vocabulary. It is the answer
if it is kept, which a single pass over the row shows: count and sum what scores higher. If not, nothing that scores as
low is kept either: take the argmax over what scores higher and look again. The score rises each time, and for top_p =
0.9 the first candidate is kept 9 times of 10. Only top_k and top_p together need a threshold first, for the mass that
top_k leaves: a radix search, 3 of 21 bits a pass. The last program of a row does all this, so a step costs one launch
and no host work.

The noise is named by seed, stream and position (kernels/cpu/philox.py), not by the place in the batch. Roofline: the
logits, read once; rejections read the row again from L2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

BLOCK = 4096  # tokens a program looks at
SCAN = tl.constexpr(
    2
)  # blocks that _above reads at a time: one program must have many bytes in flight to read a row fast
IN_PROMPT = tl.constexpr(1 << 30)  # a bit of `seen`; the bits below count how often the token was generated
STEPS = tl.constexpr(65536.0)  # of a nat, in the radix search
FAR = tl.constexpr((1 << 21) - 1)  # 32 nats below the best token, more than the noise can make up for (19.5)


@triton.jit
def _noise(first, BLOCK: tl.constexpr, seed_low, seed_high, stream, position):
    """Gumbel noise of tokens first .. first + BLOCK; first is a multiple of 4."""
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        block,
        zero + position.to(tl.uint32, bitcast=True),
        zero + stream.to(tl.uint32, bitcast=True),
        zero,
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
    u = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(u))


@triton.jit
def _argmax(value, index):
    """(maximum, its lowest index)"""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, index, 2147483647), 0)


@triton.jit
def _above(scores, score, peak, V, BLOCK: tl.constexpr):
    """Number and sum of exp(s - peak) of the row's scores s > score."""
    i = tl.arange(0, SCAN * BLOCK)
    count = tl.zeros([SCAN * BLOCK], tl.int32)
    mass = tl.zeros([SCAN * BLOCK], tl.float32)
    for first in range(0, V, SCAN * BLOCK):
        s = tl.load(scores + first + i, mask=first + i < V, other=-float("inf"), cache_modifier=".cg")
        count += (s > score).to(tl.int32)
        mass += tl.where(s > score, tl.exp(s - peak), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _best_above(scores, score, floor, V, BLOCK: tl.constexpr, seed_low, seed_high, stream, position):
    """(token, score) with the largest score + noise among scores > score and >= floor."""
    i = tl.arange(0, BLOCK)
    best = -float("inf")
    token = 0
    its_score = -float("inf")
    for first in range(0, V, BLOCK):
        s = tl.load(scores + first + i, mask=first + i < V, other=-float("inf"), cache_modifier=".cg")
        open_ = (s > score) & (s >= floor)
        value = tl.where(open_, s + _noise(first, BLOCK, seed_low, seed_high, stream, position), -float("inf"))
        top, where = _argmax(value, first + i)
        if top > best:
            best = top
            token = where
            its_score = tl.max(tl.where(first + i == where, s, -float("inf")), 0)
    return token, its_score


@triton.jit
def _top_k_mass(scores, k, peak, V, BLOCK: tl.constexpr):
    """Sum of exp(s - peak) over the k largest scores, with those that tie with the last (within a STEP)."""
    i = tl.arange(0, BLOCK)
    bins = tl.arange(0, 8)
    low = 0  # distance from the peak, in steps, where the bracket begins
    nearer = 0  # tokens nearer than that
    for digit in range(7):
        shift = 18 - 3 * digit
        counts = tl.zeros([8], tl.int32)
        for first in range(0, V, BLOCK):
            s = tl.load(scores + first + i, mask=first + i < V, other=-float("inf"), cache_modifier=".cg")
            distance = tl.minimum((peak - s) * STEPS, FAR).to(tl.int32) - low
            inside = (distance >= 0) & (first + i < V)
            counts += tl.sum((((distance >> shift)[None, :] == bins[:, None]) & inside[None, :]).to(tl.int32), 1)
        full = tl.sum((tl.cumsum(counts, 0) + nearer < k).to(tl.int32), 0)
        full = tl.minimum(full, 7)
        nearer += tl.sum(tl.where(bins < full, counts, 0), 0)
        low += full << shift
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        s = tl.load(scores + first + i, mask=first + i < V, other=-float("inf"), cache_modifier=".cg")
        distance = tl.minimum((peak - s) * STEPS, FAR).to(tl.int32)
        mass += tl.where(distance <= low, tl.exp(s - peak), 0.0)
    return tl.sum(mass, 0)


@triton.jit(do_not_specialize=["parts"])
def sample_kernel(
    logits, slots, positions, floats, ints, seen, bias_ids, bias_values, masks, tokens,
    scores, part_values, part_tokens, counters,
    V, parts, s_logits, s_bias, s_masks,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, parts). PARTS: parts rounded up to a power of two."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:  # a padded row
        if part == 0:
            tl.store(tokens + row, 0)
        return
    position = tl.load(positions + row).to(tl.int32)
    temperature = tl.load(floats + slot * 8)
    top_p = tl.load(floats + slot * 8 + 1)
    min_p = tl.load(floats + slot * 8 + 2)
    presence = tl.load(floats + slot * 8 + 3)
    frequency = tl.load(floats + slot * 8 + 4)
    repetition = tl.load(floats + slot * 8 + 5)
    top_k = tl.load(ints + slot * 8)
    seed_low = tl.load(ints + slot * 8 + 1)
    seed_high = tl.load(ints + slot * 8 + 2)
    stream = tl.load(ints + slot * 8 + 3)
    biased = tl.load(ints + slot * 8 + 4)
    banned = tl.load(ints + slot * 8 + 5)
    ban_until = tl.load(ints + slot * 8 + 6)
    masked = tl.load(ints + slot * 8 + 7)
    penalised = (presence != 0) | (frequency != 0) | (repetition != 1)
    limited_k = (top_k > 0) & (top_k < V)
    truncated = (temperature > 0) & (limited_k | (top_p < 1) | (min_p > 0))
    seen += slot * V
    scores += row.to(tl.int64) * V

    # This program's part of the row.
    first = part * BLOCK
    i = first + tl.arange(0, BLOCK)
    s = tl.load(logits + row.to(tl.int64) * s_logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
    for j in range(biased):
        token = tl.load(bias_ids + slot * s_bias + j)
        if (token >= first) & (token < first + BLOCK) & ((j >= banned) | (position < ban_until)):
            s += tl.where(i == token, tl.load(bias_values + slot * s_bias + j), 0.0)
    if penalised:
        history = tl.load(seen + i, mask=i < V, other=0)
        count = history & (IN_PROMPT - 1)
        s = tl.where(history > 0, tl.where(s > 0, tl.div_rn(s, repetition), s * repetition), s)
        s -= tl.where(count > 0, presence, 0.0) + frequency * count.to(tl.float32)
    if masked:  # by subtraction, which lets NaN and infinity through
        word = tl.load(masks + row.to(tl.int64) * s_masks + i // 32, mask=i < V, other=0)
        s -= tl.where((word >> (i % 32)) & 1 != 0, 0.0, float("inf"))
    value = s
    if temperature > 0:
        s = tl.div_rn(s, temperature)
        value = s + _noise(first, BLOCK, seed_low, seed_high, stream, position)
    if truncated:
        tl.store(scores + i, s, mask=i < V)
    best, token = _argmax(value, i)
    peak = tl.max(tl.where(s != s, float("inf"), s), 0)
    at = part_values + (row * parts + part) * 4
    tl.store(at, best)
    tl.store(at + 1, tl.max(tl.where(i == token, s, -float("inf")), 0))
    tl.store(at + 2, peak)
    tl.store(at + 3, tl.sum(tl.exp(s - tl.maximum(peak, -1e30)), 0))
    tl.store(part_tokens + row * parts + part, token)
    tl.debug_barrier()  # every thread's store comes before thread 0's release
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == parts - 1:
        tl.store(counters + row, 0)  # for the next launch or graph replay
        p = tl.arange(0, PARTS)
        found = part_values + (row * parts + p) * 4
        here = p < parts
        part_best = tl.load(found, mask=here, other=-float("inf"), cache_modifier=".cg")
        part_score = tl.load(found + 1, mask=here, other=-float("inf"), cache_modifier=".cg")
        part_peak = tl.load(found + 2, mask=here, other=-float("inf"), cache_modifier=".cg")
        part_mass = tl.load(found + 3, mask=here, other=0.0, cache_modifier=".cg")
        part_token = tl.load(part_tokens + row * parts + p, mask=here, other=2147483647, cache_modifier=".cg")
        _, token = _argmax(part_best, part_token)
        score = tl.max(tl.where(part_token == token, part_score, -float("inf")), 0)
        peak = tl.max(part_peak, 0)
        if tl.abs(peak) < float("inf"):
            if truncated:
                mass = float("inf")
                if top_p < 1:
                    if limited_k:
                        mass = _top_k_mass(scores, top_k, peak, V, BLOCK)
                    else:
                        mass = tl.sum(part_mass * tl.exp(part_peak - peak), 0)
                limit = tl.where(top_p < 1, top_p * mass, float("inf"))
                k = tl.where(limited_k, top_k, V)
                floor = tl.minimum(peak + tl.log(min_p), peak)
                higher, higher_mass = _above(scores, score, peak, V, BLOCK)
                while (score < peak) & ((higher >= k) | (higher_mass >= limit) | (score < floor)):
                    token, score = _best_above(scores, score, floor, V, BLOCK, seed_low, seed_high, stream, position)
                    higher, higher_mass = _above(scores, score, peak, V, BLOCK)
            if penalised:
                tl.store(seen + token, tl.load(seen + token) + 1)
        else:
            token = -1
        tl.store(tokens + row, token)


@triton.jit
def logprobs_kernel(
    logits, tokens, out, ranks, top_tokens, top_logprobs, V, s_logits,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program a row: maxima of its blocks, then the sum, then N times the best of the best block."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * s_logits
    i = tl.arange(0, BLOCK)
    p = tl.arange(0, PARTS)
    maxima = tl.full([PARTS], -float("inf"), tl.float32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + i, mask=first + i < V, other=-float("inf")).to(tl.float32)
        maxima = tl.where(p == first // BLOCK, tl.max(x, 0), maxima)
    peak = tl.max(maxima, 0)
    token = tl.load(tokens + row)
    chosen = tl.load(logits + token).to(tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    higher = tl.zeros([BLOCK], tl.int32)
    for first in range(0, V, BLOCK):
        x = tl.load(logits + first + i, mask=first + i < V, other=-float("inf")).to(tl.float32)
        mass += tl.exp(x - peak)
        higher += (x > chosen).to(tl.int32)
    norm = peak + tl.log(tl.sum(mass, 0))
    tl.store(out + row, chosen - norm)
    tl.store(ranks + row, tl.sum(higher, 0) + 1)
    last = float("inf")  # of those taken so far: they come largest first, lowest token first
    last_token = -1
    for n in range(N):
        _, part = _argmax(maxima, p)
        x_i = part * BLOCK + i
        x = tl.load(logits + x_i, mask=x_i < V, other=-float("inf")).to(tl.float32)
        left = (x < last) | ((x == last) & (x_i > last_token))
        last, last_token = _argmax(tl.where(left, x, -float("inf")), x_i)
        left = (x < last) | ((x == last) & (x_i > last_token))
        maxima = tl.where(p == part, tl.max(tl.where(left, x, -float("inf")), 0), maxima)
        tl.store(top_tokens + row * N + n, last_token)
        tl.store(top_logprobs + row * N + n, last - norm)


class SamplingTable:
    """The parameters of running requests on the device, a row for each slot of the runner; written at admission only.

    floats float32 [slots, 8]: temperature, top_p, min_p, presence, frequency, repetition.
    ints int32 [slots, 8]: top_k, low and high word of the seed, stream, entries of bias, how many of these are bans
    (they come first), position from which they are off, whether there is a mask. seen int32 [slots, V]: see IN_PROMPT.
    bias_ids, bias_values [slots, max_bias]. masks int32 [slots, V / 32 rounded up]: a bit for each token that may be
    drawn; by the row of the launch, not by slot, and read for slots with a mask only; always at the same address, so
    that captured graphs read what was written last.
    """

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str, max_bias: int = 1024) -> None:
        self.floats = torch.zeros(slots, 8, device=device)
        self.ints = torch.zeros(slots, 8, dtype=torch.int32, device=device)
        self.seen = torch.zeros(slots, vocab_size, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(slots, max_bias, dtype=torch.int32, device=device)
        self.bias_values = torch.zeros(slots, max_bias, device=device)
        self.masks = torch.zeros(slots, triton.cdiv(vocab_size, 32), dtype=torch.int32, device=device)

    def set(
        self,
        slot: int,
        *,
        temperature: float,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        repetition: float = 1.0,
        seed: int = 0,
        stream: int = 0,
        bias: Mapping[int, float] | None = None,
        banned: Sequence[int] = (),
        ban_until: int = 0,
        masked: bool = False,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
    ) -> None:
        """Fills a slot. banned: tokens impossible at positions below ban_until. masked: its rows' masks hold. prompt,
        output: the request's tokens so far, for the penalties; the kernel counts those it draws from then on. seed: any
        64-bit integer."""
        ids = [*banned, *(bias or {})]
        values = [-float("inf")] * len(banned) + list((bias or {}).values())
        assert len(ids) <= self.bias_ids.shape[1], f"{len(ids)} biased tokens"
        floats = [temperature, top_p, min_p, presence, frequency, repetition, 0, 0]
        words = [top_k, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, stream, len(ids), len(banned), ban_until, masked]
        words = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
        _put(self.floats[slot], torch.tensor(floats, dtype=torch.float32))
        _put(self.ints[slot], torch.tensor(words, dtype=torch.int32))
        if ids:
            _put(self.bias_ids[slot, : len(ids)], torch.tensor(ids, dtype=torch.int32))
            _put(self.bias_values[slot, : len(ids)], torch.tensor(values))
        if presence or frequency or repetition != 1:
            vocab_size = self.seen.shape[1]
            seen = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=vocab_size).int()
            seen[torch.tensor(prompt, dtype=torch.int64)] |= IN_PROMPT.value
            _put(self.seen[slot], seen)

    def set_masks(self, masks: Mapping[int, NDArray[np.int32]]) -> None:
        """The words of `masks` for these rows of the next launch."""
        if masks:
            host = torch.empty(max(masks) + 1, self.masks.shape[1], dtype=torch.int32)
            for row, words in masks.items():
                host[row] = torch.from_numpy(words)
            _put(self.masks[: len(host)], host)


def _put(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copies from the host in the stream's order, without waiting for what the stream still has to do."""
    target.copy_(values.pin_memory() if target.is_cuda else values, non_blocking=True)


class SampleWorkspace:
    """Scratch for up to `rows` rows: scaled scores, and what each part of a row found. Counters are left at zero."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str, block: int = BLOCK) -> None:
        self.block = block
        self.parts = triton.cdiv(vocab_size, block)
        self.scores = torch.empty(rows, vocab_size, device=device)
        self.part_values = torch.empty(rows, self.parts, 4, device=device)
        self.part_tokens = torch.empty(rows, self.parts, dtype=torch.int32, device=device)
        self.counters = torch.zeros(rows, dtype=torch.int32, device=device)


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: SamplingTable,
    tokens: torch.Tensor,
    workspace: SampleWorkspace,
) -> None:
    """tokens int32 [B]: the token that each row of logits [B, V] (any float dtype) draws. One launch.

    slots int [B]: the row's place in the table, no two alike; negative: a padded row, token 0. positions int [B]: index
    that the token will have in its sequence. A row whose best score is not finite gives -1. Equal scores: the lowest
    token.
    """
    rows, vocab_size = logits.shape
    assert slots.shape == positions.shape == tokens.shape == (rows,) and tokens.dtype == torch.int32
    assert logits.stride(1) == 1 and table.seen.shape[1] == workspace.scores.shape[1] == vocab_size
    assert rows <= workspace.counters.numel(), f"workspace for {workspace.counters.numel()} rows, not {rows}"
    sample_kernel[(rows, workspace.parts)](
        logits, slots, positions, table.floats, table.ints, table.seen, table.bias_ids, table.bias_values,
        table.masks, tokens, workspace.scores, workspace.part_values, workspace.part_tokens, workspace.counters,
        vocab_size, workspace.parts, logits.stride(0), table.bias_ids.stride(0), table.masks.stride(0),
        workspace.block, triton.next_power_of_2(workspace.parts), num_warps=max(4, workspace.block // 256),
    )  # fmt: skip


def logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor,
    ranks: torch.Tensor,
    top_tokens: torch.Tensor,
    top_logprobs: torch.Tensor,
    *,
    block: int = BLOCK,
) -> None:
    """Of softmax(logits [B, V]): natural log-probability out [B] and rank int32 [B] (1: most likely) of tokens [B], and
    the N most likely, best first: top_tokens int32 [B, N], top_logprobs [B, N]; N may be 0. Equal ones: the lowest
    first. One launch."""
    rows, vocab_size = logits.shape
    n = top_tokens.shape[1]
    assert tokens.shape == out.shape == ranks.shape == (rows,) and n <= vocab_size and logits.stride(1) == 1
    assert (
        top_tokens.shape == top_logprobs.shape == (rows, n)
        and top_tokens.is_contiguous()
        and top_logprobs.is_contiguous()
    )
    parts = triton.next_power_of_2(triton.cdiv(vocab_size, block))
    logprobs_kernel[(rows,)](
        logits, tokens, out, ranks, top_tokens, top_logprobs, vocab_size, logits.stride(0),
        n, block, parts, num_warps=max(4, block // 256),
    )  # fmt: skip


def bytes_and_flops(rows: int, vocab_size: int, itemsize: int = 4) -> tuple[int, int]:
    """The logits, once; about 60 operations a token, most of them for the noise (10 rounds of Philox for 4 tokens, two
    logarithms)."""
    return rows * (vocab_size * itemsize + 4), rows * vocab_size * 60
