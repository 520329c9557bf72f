"""What a decode layer does beside attention, with its element-wise work in launches of its own or in the matmuls'."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from bench.gpu_packing import FP16_ARITHMETIC, copy_of, packed_weight
from bench.kernel_cases import Case
from bench.operations import Operation, Place, add_baseline, largest, relative
from bench.timing import Call, copies
from kernels.gpu import epilogue, fused, linear_w4, split_k
from kernels.gpu.epilogue import Epilogue, Fusions, Norm
from kernels.gpu.tiles import current_gpu
from kernels.gpu.w4_layout import W4, lane_order, pack
from kernels.oracle import fused as fused_oracle
from kernels.oracle import linear_w4 as linear_oracle

EPS = 1e-5
X_EXP = 4
ALL = Fusions(silu=True, norm=True)
PLAIN = Fusions(silu=False, norm=False)


@dataclasses.dataclass(frozen=True)
class Part:
    """One launch, with a call for each set of weights, and what it has to move and to do."""

    name: str
    calls: list[Call]
    bytes: int
    flops: int


class Products:
    """The four matmuls and the norms of a layer of a case's shape, rows and 4-bit format, on random numbers.

    `launches(fusions)` has them in order, on several sets of weights which together exceed the cache. Attention is left
    out: its output is a tensor that stays as it is.
    """

    def __init__(self, case: Case, place: Place):
        shape, m = case.shape, case.rows
        self.case, self.place = case, place
        half, device = torch.float16, place.device
        self.parts = {}
        first: dict[str, W4] = {}
        for layer in shape.linears:
            first[layer], self.parts[layer] = packed_weight(dataclasses.replace(case, layer=layer), place)
        q, d, minimum, zero_point = self.parts["gate_up"]
        turned = map(epilogue.in_turns, (q, d, minimum))
        first["gate_up"] = pack(*turned, kw=lane_order(current_gpu().capability), zero_point=zero_point)
        self.bytes = sum(weight.bytes for weight in first.values())
        more = copies(self.bytes, place.cache_bytes, 64) - 1
        self.sets = [first, *({name: copy_of(weight) for name, weight in first.items()} for _ in range(more))]
        self.workspace = split_k.Workspace(current_gpu(), device)
        self.input_norm, self.post_norm = (1 + 0.1 * place.normal(shape.hidden, seed=s) for s in (1, 2))
        self.start, self.residual = (place.normal(m, shape.hidden, seed=3) for _ in range(2))
        self.mixed = place.normal(m, shape.linears["o"][1], dtype=half, seed=4)
        self.x, self.delta = (torch.empty(m, shape.hidden, dtype=half, device=device) for _ in range(2))
        self.qkv, self.both = (
            torch.empty(m, shape.linears[name][0], dtype=half, device=device) for name in ("qkv", "gate_up")
        )
        self.inner = torch.empty(m, shape.intermediate, dtype=half, device=device)
        squares = (torch.empty(epilogue.squares_shape(self.residual), device=device) for _ in range(2))
        self.norm = Norm(self.residual, *squares, EPS)

    def launches(self, fusions: Fusions) -> list[Part]:
        x, inner, norm, after = self.x, self.inner, self.norm, self.norm.added()
        m, hidden, intermediate = self.case.rows, self.case.shape.hidden, self.case.shape.intermediate
        scaled = after if fusions.norm else None
        done: list[Part] = []

        def product(
            layer: str, x: torch.Tensor, out: torch.Tensor, tail: Epilogue = epilogue.PLAIN, x_exp: int = 0
        ) -> None:
            multiply: Callable[..., None] = functools.partial(linear_w4.w4a16, x_exp=x_exp, epilogue=tail)
            calls = [functools.partial(multiply, x, weights[layer], out, self.workspace) for weights in self.sets]
            weight = self.sets[0][layer]
            moved, flops = linear_w4.bytes_and_flops(m, weight.n, weight.k, weight.group)
            tails = [word for word, there in (
                ("norm", tail.norm and tail.weight is None), ("addition", tail.weight is not None), ("silu", tail.silu),
            ) if there]  # fmt: skip
            moved += 8 * out.numel() if tail.weight is not None else 0  # the residual, read and written
            moved -= out.nbytes if tail.silu else 0  # half as wide
            done.append(Part(" + ".join([layer, *tails]), list(calls), moved, flops))

        def add_rmsnorm(name: str, weight: torch.Tensor) -> None:
            call = functools.partial(fused.add_rmsnorm, self.delta, self.residual, weight, x, eps=EPS)
            moved = m * hidden * 12 + 4 * hidden  # delta, out: fp16; the residual, read and written: float32
            done.append(Part(name, [call] * len(self.sets), moved, 5 * m * hidden))

        if fusions.norm:
            product("qkv", x, self.qkv, Epilogue(norm))
            product("o", self.mixed, x, Epilogue(norm, self.post_norm))
        else:
            add_rmsnorm("norm before attention", self.input_norm)
            product("qkv", x, self.qkv)
            product("o", self.mixed, self.delta)
            add_rmsnorm("norm before MLP", self.post_norm)
        if fusions.silu:
            product("gate_up", x, inner, Epilogue(scaled, silu=True, out_exp=X_EXP))
        else:
            product("gate_up", x, self.both, Epilogue(scaled))
            call = functools.partial(fused.silu_mul, self.both, inner, out_exp=X_EXP, turn=epilogue.TURN)
            done.append(Part("silu · up", [call] * len(self.sets), *fused.silu_mul_bytes_and_flops(m, intermediate)))
        if fusions.norm:
            product("down", inner, x, Epilogue(after, self.input_norm), X_EXP)
        else:
            product("down", inner, self.delta, x_exp=X_EXP)
        return done

    def error(self, fusions: Fusions) -> tuple[float, float]:
        """Of qkv and of what a layer adds to the residual."""
        self.residual.copy_(self.start)
        self.delta.zero_()
        self.workspace.partials.fill_(torch.nan)
        if fusions.norm:
            norm = fused.start_norm(self.residual, self.input_norm, self.x, EPS)
            self.norm.now.copy_(norm.now)
            self.norm.before.copy_(norm.before)
        for part in self.launches(fusions):
            part.calls[0]()
        added = self.residual - self.start if fusions.norm else self.residual + self.delta - self.start

        def weight(layer: str) -> torch.Tensor:
            return linear_oracle.dequantise(*self.parts[layer])

        def normed(residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return fused_oracle.add_rmsnorm(None, residual, weight, EPS)[1]

        qkv = linear_oracle.linear(normed(self.start, self.input_norm), weight("qkv"))
        between = self.start + linear_oracle.linear(self.mixed, weight("o"))
        both = linear_oracle.linear(normed(between, self.post_norm), weight("gate_up"))
        want = between - self.start + linear_oracle.linear(fused_oracle.silu_mul(both), weight("down"))
        return largest(relative(self.qkv, qkv), relative(added, want)), 4 * FP16_ARITHMETIC


def layer(case: Case, place: Place) -> Operation:
    """All of it with the fusions of place.tile, or all of them; beside it the plain launches."""
    products, fusions = Products(case, place), place.tile or ALL
    parts = products.launches(fusions)
    cost = sum(part.bytes for part in parts), sum(part.flops for part in parts)

    def calls(chosen: Fusions) -> list[Call]:
        one_after_another = zip(*(part.calls for part in products.launches(chosen)), strict=True)
        return [functools.partial(_all, launches) for launches in one_after_another]

    operation = Operation(calls(fusions), *cost, "float16", functools.partial(products.error, fusions))
    add_baseline(operation, place, "plain launches", lambda: calls(PLAIN))
    return operation


def _all(launches: tuple[Call, ...]) -> None:
    for launch in launches:
        launch()
