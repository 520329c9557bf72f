"""The Triton kernels, each beside what PyTorch has for the same work, and its float32 oracle."""

from __future__ import annotations

import functools
import importlib
import math

import torch
import torch.nn.functional as F

from bench import attention_operations, eight_bit_operations, layer_operations
from bench.gpu_packing import FP16_ARITHMETIC, copy_of, packed_weight
from bench.kernel_cases import Case
from bench.operations import Operation, Place, Prepare, Rounding, add_baseline, elementwise, largest, relative
from bench.timing import Call, copies
from kernels import kv_cache
from kernels.cpu.philox import gumbel
from kernels.gpu import fused, linear, linear_w4, sample, w4_layout
from kernels.gpu.tiles import current_gpu
from kernels.oracle import fused as fused_oracle
from kernels.oracle import linear_w4 as linear_oracle
from kernels.oracle import sample as sample_oracle

NAN = math.nan
SMALL_M = 64  # rows up to which torch's weight-only kernels are worth their time


def prepare(case: Case, place: Place) -> Operation:
    """Raises what the kernel raises for sizes or dtypes it does not have."""
    return KERNELS[case.kernel](case, place)


def w4a16(case: Case, place: Place) -> Operation:
    """The product as the engine calls it: fused up to the cross-over, dequantise and torch.mm above."""
    weight, parts = packed_weight(case, place)
    m, n, k = case.rows, weight.n, weight.k
    x = place.normal(m, k, dtype=torch.float16)
    weights = [weight] + [copy_of(weight) for _ in range(copies(weight.bytes, place.cache_bytes) - 1)]
    out = torch.empty(m, n, dtype=torch.float16, device=place.device)
    workspace = linear_w4.Workspace(current_gpu(), place.device)
    large = linear_w4.config(m, n, k, weight.group, x.dtype, current_gpu()) is None
    scratch = torch.empty(n * k if large else 0, dtype=torch.float16, device=place.device)

    def multiply(w: w4_layout.W4) -> None:
        if place.tile is None:
            linear.multiply(x, w, out, workspace, scratch)
        else:
            linear_w4.w4a16(x, w, out, workspace, tile=place.tile)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        workspace.partials.fill_(NAN)
        multiply(weight)
        exact = linear_oracle.linear(x, linear_oracle.dequantise(*parts))
        return relative(out, exact), FP16_ARITHMETIC + Rounding[torch.float16]

    calls: list[Call] = [functools.partial(multiply, w) for w in weights]
    operation = Operation(calls, *linear_w4.bytes_and_flops(m, n, k, weight.group), "float16", error)

    def mm() -> list[Call]:
        dense = [
            place.normal(n, k, dtype=torch.bfloat16, seed=i) for i in range(copies(2 * n * k, place.cache_bytes, 64))
        ]
        x_bf16, y = x.bfloat16(), torch.empty(m, n, dtype=torch.bfloat16, device=place.device)
        return [functools.partial(torch.mm, x_bf16, w.t(), out=y) for w in dense]

    add_baseline(operation, place, "torch.mm bf16", mm)
    if m <= SMALL_M and place.device.type == "cuda":
        add_baseline(operation, place, "torch int4", lambda: _torch_int4(x.bfloat16(), parts, place))
        add_baseline(operation, place, "torch int8", lambda: _torch_int8(x.bfloat16(), n, k, place))
        add_baseline(operation, place, "gemlite", lambda: _gemlite(x, parts))
    return operation


def _torch_int4(x: torch.Tensor, parts: w4_layout.Parts, place: Place) -> list[Call]:
    """tinygemm: its weight is (q - 8) s + z."""
    q, d, m, zero_point = parts
    k, group = q.shape[1], q.shape[1] // d.shape[1]
    pairs = (q[:, ::2] << 4 | q[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8 if k % 128 == 0 else 4)
    zero = (8 - m.float()) * d.float() if zero_point else m.float() + 8 * d.float()
    scales = torch.stack([d.float(), zero], -1).transpose(0, 1).bfloat16().contiguous()
    op = torch.ops.aten._weight_int4pack_mm
    weights = [packed] + [packed.clone() for _ in range(copies(packed.nbytes, place.cache_bytes) - 1)]
    return [functools.partial(op, x, w, group, scales) for w in weights]


def _torch_int8(x: torch.Tensor, n: int, k: int, place: Place) -> list[Call]:
    rng = place.generator(2)
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=place.device, generator=rng)
    scales = torch.full((n,), 0.01, dtype=torch.bfloat16, device=place.device)
    op = torch.ops.aten._weight_int8pack_mm
    weights = [q] + [q.clone() for _ in range(copies(q.nbytes, place.cache_bytes) - 1)]
    return [functools.partial(op, x, w, scales) for w in weights]


def _gemlite(x: torch.Tensor, parts: w4_layout.Parts) -> list[Call]:
    """One set of buffers: it may gain from the cache."""
    core = importlib.import_module("gemlite.core")
    q, d, m, zero_point = parts
    zero = m if zero_point else -m.float() / d.float()
    layer = core.GemLiteLinearTriton(
        4,
        group_size=q.shape[1] // d.shape[1],
        in_features=q.shape[1],
        out_features=q.shape[0],
        input_dtype=core.DType.FP16,
        output_dtype=core.DType.FP16,
    )
    layer.pack(q, d, zero.half(), None)
    return [functools.partial(layer, x)]


def dequant_w4(case: Case, place: Place) -> Operation:
    weight, parts = packed_weight(case, place)
    weights = [weight] + [copy_of(weight) for _ in range(copies(weight.bytes, place.cache_bytes) - 1)]
    out = torch.empty(weight.n, weight.k, dtype=torch.float16, device=place.device)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        linear_w4.dequant_w4(weight, out)
        exact = linear_oracle.as_fp16(linear_oracle.dequantise(*parts), weight.alpha)
        return relative(out, exact), 1e-6  # where the oracle rounds twice, a last bit may differ

    calls: list[Call] = [functools.partial(linear_w4.dequant_w4, w, out) for w in weights]
    return Operation(calls, weight.bytes + out.nbytes, 2 * out.numel(), "float32", error)


def add_rmsnorm(case: Case, place: Place) -> Operation:
    m, h, dtype = case.rows, case.shape.hidden, getattr(torch, case.dtype)
    cost = fused.add_rmsnorm_bytes_and_flops(m, h, dtype.itemsize)
    sets = copies(cost[0], place.cache_bytes, 64)
    x, residual = (place.normal(sets, m, h, dtype=dtype, seed=s) for s in (1, 2))
    weight, out = place.normal(h, dtype=dtype, seed=3), torch.empty(m, h, dtype=dtype, device=place.device)

    def call(i: int) -> None:
        fused.add_rmsnorm(x[i], residual[i], weight, out, eps=1e-5)

    def error() -> tuple[float, float]:
        residual[0].copy_(place.normal(m, h, dtype=dtype, seed=4))  # not what the calls so far have added up to
        want_residual, want = fused_oracle.add_rmsnorm(x[0], residual[0], weight, 1e-5)
        out.fill_(NAN)
        call(0)
        found, allowed = elementwise(out, want)
        return (found if torch.equal(residual[0], want_residual) else NAN), allowed

    def eager(i: int) -> None:
        residual[i].add_(x[i])
        F.rms_norm(residual[i], (h,), weight, 1e-5)

    operation = Operation([functools.partial(call, i) for i in range(sets)], *cost, "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [functools.partial(eager, i) for i in range(sets)])
    return operation


def silu_mul(case: Case, place: Place) -> Operation:
    m, inner, dtype = case.rows, case.shape.intermediate, getattr(torch, case.dtype)
    cost = fused.silu_mul_bytes_and_flops(m, inner, dtype.itemsize)
    sets = copies(cost[0], place.cache_bytes, 64)
    gate_up = place.normal(sets, m, 2 * inner, dtype=dtype)
    out = torch.empty(m, inner, dtype=dtype, device=place.device)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        fused.silu_mul(gate_up[0], out)
        return elementwise(out, fused_oracle.silu_mul(gate_up[0]))

    calls: list[Call] = [functools.partial(fused.silu_mul, gate_up[i], out) for i in range(sets)]
    operation = Operation(calls, *cost, "float32", error)

    def eager(i: int) -> torch.Tensor:
        return F.silu(gate_up[i, :, :inner]) * gate_up[i, :, inner:]

    add_baseline(operation, place, "torch eager", lambda: [functools.partial(eager, i) for i in range(sets)])
    return operation


def rope_and_cache_write(case: Case, place: Place) -> Operation:
    """dtype: of the cache. A cache of 8 bits is written from bfloat16."""
    shape, m, cache_dtype = case.shape, case.rows, getattr(torch, case.dtype)
    heads, kv_heads, d = shape.heads, shape.kv_heads, shape.head_dim
    dtype = torch.bfloat16 if cache_dtype in kv_cache.QMAX else cache_dtype
    cost = fused.rope_bytes_and_flops(m, heads, kv_heads, d, dtype.itemsize, cache_dtype.itemsize)
    sets = copies(cost[0], place.cache_bytes, 64)
    qkv = place.normal(sets, m, (heads + 2 * kv_heads) * d, dtype=dtype)
    blocks = -(-m // case.block_size) + 1
    cache = kv_cache.allocate(blocks, kv_heads, case.block_size, d, cache_dtype, place.device)
    slots = torch.randperm(blocks * case.block_size, device=place.device, generator=place.generator(5))[:m].int()
    positions = torch.arange(m, dtype=torch.int32, device=place.device)
    angle = torch.arange(m)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos_sin = torch.stack([angle.cos(), angle.sin()], -1).float().to(place.device)

    def call(i: int) -> None:
        fused.rope_and_cache_write(qkv[i], positions, slots, cos_sin, cache, heads)

    def error() -> tuple[float, float]:
        qkv[0].copy_(place.normal(m, qkv.shape[2], dtype=dtype, seed=6))
        q, k, v = (t.unflatten(1, (-1, d)) for t in qkv[0].clone().split([heads * d, kv_heads * d, kv_heads * d], 1))
        wanted = [fused_oracle.rope(x, positions, cos_sin, None, 0.0) for x in (q, k)]
        call(0)
        stored = [t.transpose(1, 2).flatten(0, 1)[slots.long()] for t in kv_cache.unpack(cache)]
        found, allowed = elementwise(qkv[0, :, : heads * d].unflatten(1, (-1, d)), wanted[0])
        for got, want in zip(stored, (wanted[1], v.float()), strict=True):
            if cache_dtype in kv_cache.QMAX:  # at most one step of the 8-bit numbers away, where a tie rounds apart
                step = want.abs().amax(-1, keepdim=True) / kv_cache.QMAX[cache_dtype]
                step = step * (1.001 if cache_dtype is torch.int8 else 33.0)
                found = found if ((got - want).abs() <= step).all() else NAN
            else:
                found = largest(found, elementwise(got.to(cache_dtype), want)[0])
        return found, allowed

    operation = Operation([functools.partial(call, i) for i in range(sets)], *cost, "float32", error)
    pages = torch.zeros(2, blocks * case.block_size, kv_heads, d, dtype=dtype, device=place.device)
    rotations, places = torch.view_as_complex(cos_sin)[:, None], slots.long()

    def eager(i: int) -> None:
        x = qkv[i].view(m, -1, d)
        rotated = torch.view_as_complex(x[:, : heads + kv_heads].float().unflatten(-1, (-1, 2))) * rotations
        both = torch.view_as_real(rotated).flatten(-2).to(dtype)
        pages[0, places], pages[1, places] = both[:, heads:], x[:, heads + kv_heads :]

    add_baseline(operation, place, "torch eager", lambda: [functools.partial(eager, i) for i in range(sets)])
    return operation


def sample_token(case: Case, place: Place) -> Operation:
    rows, vocab = case.rows, case.shape.vocab
    request = dict(case.options)
    if "top_k" in request:
        request["top_k"] = int(request["top_k"])
    table = sample.SamplingTable(rows, vocab, place.device, max_bias=8)
    for slot in range(rows):
        table.set(slot, **request, seed=slot)  # type: ignore[arg-type]
    cost = sample.bytes_and_flops(rows, vocab, getattr(torch, case.dtype).itemsize)
    sets = copies(cost[0], place.cache_bytes, 64)
    logits = (place.normal(sets, rows, vocab) * 3).to(getattr(torch, case.dtype))
    slots, positions = (torch.arange(rows, dtype=torch.int32, device=place.device) + base for base in (0, 100))
    tokens = torch.empty(rows, dtype=torch.int32, device=place.device)
    workspace = sample.SampleWorkspace(rows, vocab, place.device)

    def call(i: int) -> None:
        sample.sample(logits[i], slots, positions, table, tokens, workspace)

    def error() -> tuple[float, float]:
        """The share of rows that draw another token than the oracle would."""
        tokens.fill_(-7)
        call(0)
        checked = range(min(rows, 8))
        wrong = sum(int(tokens[row]) not in _draws(logits[0, row].cpu().float(), row, request) for row in checked)
        return wrong / len(checked), 0.0

    operation = Operation([functools.partial(call, i) for i in range(sets)], *cost, "float32", error)
    eager = functools.partial(_eager_sample, request=request)
    name = "torch argmax" if request["temperature"] == 0 else "torch sort" if len(request) > 1 else "torch softmax"
    add_baseline(operation, place, name, lambda: [functools.partial(eager, logits[i]) for i in range(sets)])
    return operation


def _draws(logits: torch.Tensor, row: int, request: dict[str, float]) -> set[int]:
    """What the oracle may draw: the truncated mass ends where float32 has it end."""
    truncation = {name: value for name, value in request.items() if name != "temperature"}
    noise, found = gumbel(len(logits), row, 0, 100 + row), set()
    for slack in (-1e-5, 0.0, 1e-5):
        moved = truncation | {"top_p": truncation["top_p"] + slack} if "top_p" in truncation else truncation
        found.add(sample_oracle.draw(logits, noise, request["temperature"], **moved))
    return found


def _eager_sample(logits: torch.Tensor, request: dict[str, float]) -> torch.Tensor:
    """Temperature, top-k, top-p by a sort, and a draw by dividing by exponential noise, as gpt-fast does it."""
    if request["temperature"] == 0:
        return logits.argmax(-1)
    scores = logits / request["temperature"]
    if "top_k" in request:
        scores = scores.masked_fill(scores < scores.topk(int(request["top_k"])).values[:, -1:], -torch.inf)
    if "top_p" in request:
        order, index = scores.sort(descending=True)
        p = order.softmax(-1)
        order = order.masked_fill(p.cumsum(-1) - p >= request["top_p"], -torch.inf)
        scores = torch.empty_like(scores).scatter_(1, index, order)
    p = scores.softmax(-1)
    return (p / torch.empty_like(p).exponential_(1)).argmax(-1)


def logprobs(case: Case, place: Place) -> Operation:
    rows, vocab, n, dtype = case.rows, case.shape.vocab, 5, getattr(torch, case.dtype)
    sets = copies(rows * vocab * dtype.itemsize, place.cache_bytes, 64)
    logits = place.normal(sets, rows, vocab, dtype=dtype)
    tokens = torch.randint(0, vocab, (rows,), device=place.device, generator=place.generator(1)).int()
    out, ranks = torch.empty(rows, device=place.device), torch.empty_like(tokens)
    top, top_logprobs = (torch.empty(rows, n, dtype=t, device=place.device) for t in (torch.int32, torch.float32))

    def call(i: int) -> None:
        sample.logprobs(logits[i], tokens, out, ranks, top, top_logprobs)

    def error() -> tuple[float, float]:
        out.fill_(NAN)
        top_logprobs.fill_(NAN)
        call(0)
        worst = 0.0
        for row in range(min(rows, 8)):
            want, rank, best = sample_oracle.logprobs(logits[0, row].cpu(), int(tokens[row]), n)
            same = int(ranks[row]) == rank and top[row].tolist() == [token for token, _ in best]
            values = top_logprobs[row].cpu() - torch.tensor([value for _, value in best])
            worst = largest(worst, abs(out[row].item() - want), values.abs().max().item()) if same else NAN
        return worst, 1e-4

    def eager(i: int) -> None:
        values = logits[i].float().log_softmax(-1)
        values.topk(n)
        chosen = values.gather(1, tokens.long()[:, None])
        (values > chosen).sum(-1)

    cost = rows * vocab * dtype.itemsize, 4 * rows * vocab
    operation = Operation([functools.partial(call, i) for i in range(sets)], *cost, "float32", error)
    add_baseline(operation, place, "torch eager", lambda: [functools.partial(eager, i) for i in range(sets)])
    return operation


KERNELS: dict[str, Prepare] = {
    "w4a16": w4a16,
    "dequant_w4": dequant_w4,
    "w8a16": eight_bit_operations.prepare,
    "w8a8": eight_bit_operations.prepare,
    "layer": layer_operations.layer,
    "dequant_w8": eight_bit_operations.dequant_w8,
    "quantise_rows": eight_bit_operations.rows_in_eight_bits,
    "decode": attention_operations.decode,
    "prefill": attention_operations.prefill,
    "add_rmsnorm": add_rmsnorm,
    "silu_mul": silu_mul,
    "rope_and_cache_write": rope_and_cache_write,
    "sample": sample_token,
    "logprobs": logprobs,
}
