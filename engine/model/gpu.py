"""The GPU backend of the decoder: kernels.gpu, bound to one model's weights and KV cache.

Activations are float16, bfloat16 or float32 throughout, the residual float32. Quantised weights stay as they are for
16-bit activations (4 bits, or 5 to 8 in bytes), those made for 8-bit activations for all; what has no kernel becomes
dense in the activations' type. float16 holds silu(gate) * up times 2^-X_EXP, and the matmul behind it multiplies by
2^X_EXP. `device` is a CUDA device, or the CPU in Triton's interpreter: what runs
there is tested in CI. No speed of this file has been measured yet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from engine.errors import CapacityError
from engine.model.config import ModelConfig
from engine.model.decoder import Layer, Linear, Step
from engine.model.rope import rotations, unrotated
from kernels import kv_cache
from kernels.formats import Weight, decode, dequantize
from kernels.gpu import attention, epilogue, fused, linear, linear_w8, w4_layout
from kernels.gpu.epilogue import PLAIN, Epilogue, Fusions
from kernels.gpu.fused import Rounded
from kernels.gpu.split_k import Workspace
from kernels.gpu.tiles import current_gpu

X_EXP = 4
SLAB = 128  # rows that a batch-invariant matmul takes at a time
PIECE = 8192  # rows of a weight that are dequantised at a time: bounds the float32 scratch

Packed = w4_layout.W4 | linear_w8.W8
NO_FUSIONS, ALL_FUSIONS = (Fusions(silu=on, norm=on) for on in (False, True))


@dataclasses.dataclass(frozen=True, eq=False)
class GpuLinear:
    """product: the linear. weight: as it was stored, if there is a kernel for that. turns: rows of gate and up come in
    turns."""

    product: Linear
    weight: Packed | None
    bias: torch.Tensor | None
    x_exp: int
    turns: bool

    def __call__(self, x: Any) -> torch.Tensor:
        return self.product(x)

    @property
    def rounds(self) -> torch.dtype | None:
        """The 8-bit type that x is rounded to, if it is, and may be before."""
        weight = self.weight
        eight = isinstance(weight, linear_w8.W8) and weight.eight_bit_input and weight.order is None
        return weight.q.dtype if eight else None  # type: ignore[union-attr]

    @property
    def fusable(self) -> Packed | None:
        """The weight, if its launch can have an epilogue."""
        weight = self.weight
        return None if weight is None or weight.order is not None or self.rounds is not None else weight


@dataclasses.dataclass(slots=True)
class Batch:
    """What attention needs to know of a step, int32 on the device. First come D sequences of one token each, then P
    with rows cu_q[i] .. cu_q[i + 1] (of those behind the first D)."""

    table: torch.Tensor  # [D + P, blocks]: the block tables
    decode_len: torch.Tensor  # [D]: positions, the step's own included; 0: a padded row
    prefill_len: torch.Tensor  # [P]: the same
    cu_q: torch.Tensor  # [P + 1]
    max_q: int  # the longest of the P


class GpuBackend:
    """Makes the decoder's parts from a checkpoint's tensors (engine.model.loader.Parts), and runs its operations.

    invariant: a row's bits do not depend on the rows beside it. Matmuls then take SLAB rows at a time, filled up with
    zeros, so that cuBLAS sees one shape; attention always takes the prefill kernel.
    """

    def __init__(
        self,
        config: ModelConfig,
        activations: torch.dtype,
        block_size: int,
        device: torch.device,
        invariant: bool,
        kv_dtype: str = "auto",
        fusions: str = "auto",
    ):
        self.config = config
        self.activations = activations
        self.cache_dtype = kv_cache.EIGHT_BIT.get(kv_dtype, activations)
        if kv_dtype == "fp8" and current_gpu().capability < 89:
            raise CapacityError(f"{current_gpu().name} has no float8; choose --kv-cache-dtype int8 or auto.")
        self.block_size = block_size
        self.device = device
        self.invariant = invariant
        self.fusions = "none" if invariant or activations != torch.float16 else fusions
        self.cache: list[kv_cache.KVCache] = []
        self.workspace = Workspace(current_gpu(), device)
        self._largest = 0  # elements of the largest weight that is dequantised for many rows

    @property
    def backend(self) -> GpuBackend:
        return self

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return config.num_layers * kv_cache.bytes_per_token(config.num_kv_heads, config.head_dim, self.cache_dtype)

    def allocate(self, num_blocks: int, max_len: int, max_batch: int) -> None:
        """Zeroed pages, and what depends on the longest sequence and the most decodes in a step."""
        config, device = self.config, self.device
        shape = (num_blocks, config.num_kv_heads, self.block_size, config.head_dim)
        self.cache.clear()  # before the new pages are made
        self.cache += [kv_cache.allocate(*shape, self.cache_dtype, device) for _ in range(config.num_layers)]
        self._cos_sin = torch.view_as_real(rotations(config, max_len)).contiguous().to(device)
        if config.unrotated_layers:
            self._unrotated = torch.zeros_like(self._cos_sin)
            self._unrotated[..., 0] = unrotated(config)
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        # Sequences may be as long as the block table is wide, which is a multiple of four.
        longest = -(-max_len // (4 * self.block_size)) * 4 * self.block_size
        self._decode_workspace = attention.decode_workspace(max_batch, *heads, longest, device)

    # The operations, see engine.model.decoder.Backend.

    def add_rmsnorm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
        reader: Linear | None,
    ) -> torch.Tensor | Rounded:  # fmt: skip
        out = self._for(reader, *residual.shape) if reader else torch.empty(residual.shape, device=self.device)
        fused.add_rmsnorm(delta, residual, weight, out, eps=eps)
        return out

    def _for(self, reader: Linear, rows: int, columns: int) -> torch.Tensor | Rounded:
        """Memory for what this linear reads."""
        rounds = reader.rounds if isinstance(reader, GpuLinear) and not self.invariant else None
        if rounds is not None and columns <= fused.MOST_ROUNDED:
            return Rounded.empty(rows, columns, rounds, self.device)
        return torch.empty(rows, columns, dtype=self.activations, device=self.device)

    def rope_and_cache_write(
        self, qkv: torch.Tensor, step: Step, layer: int, qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None
    ) -> torch.Tensor:
        heads, cache = self.config.num_heads, self.cache[layer]
        q, k, eps = qk_norm or (None, None, 0.0)
        cos_sin = self._unrotated if layer in self.config.unrotated_layers else self._cos_sin
        fused.rope_and_cache_write(
            qkv, step.rotations, step.slots, cos_sin, cache, heads, q_weight=q, k_weight=k, eps=eps
        )
        return qkv[:, : heads * self.config.head_dim].view(qkv.shape[0], heads, -1)

    def attention(self, q: torch.Tensor, step: Step, layer: int) -> torch.Tensor:
        batch: Batch = step.attention
        cache = self.cache[layer]
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window or 0
        out = torch.empty(q.shape, dtype=q.dtype, device=self.device)
        n = batch.decode_len.shape[0]
        if n:
            attention.decode(
                q[:n], cache, batch.table[:n], batch.decode_len, out[:n], self._decode_workspace,
                scale=scale, window=window,
            )  # fmt: skip
        if batch.prefill_len.shape[0]:
            attention.prefill(
                q[n:], cache, batch.table[n:], batch.cu_q, batch.prefill_len, out[n:],
                max_q=batch.max_q, scale=scale, window=window,
            )  # fmt: skip
        return out.flatten(1)

    def gated(
        self, gate_up: Linear, x: torch.Tensor | Rounded, reader: Linear, norm: epilogue.Norm | None = None
    ) -> torch.Tensor | Rounded:
        """norm: what x was scaled by."""
        rows = x.shape[0]
        turns = isinstance(gate_up, GpuLinear) and gate_up.turns
        if self._fusions(gate_up, rows).silu:
            return self._behind(gate_up, x, Epilogue(norm, silu=True, out_exp=X_EXP))
        both = gate_up(x) if norm is None else self._behind(gate_up, x, Epilogue(norm))
        out = self._for(reader, rows, both.shape[1] // 2)
        out_exp = X_EXP if out.dtype == torch.float16 else 0
        fused.silu_mul(both, out, out_exp=out_exp, turn=epilogue.TURN if turns else None)
        return out

    def run_layers(
        self, layers: list[Layer], residual: torch.Tensor, step: Step, eps: float, multiplier: float
    ) -> bool:
        """With RMSNorm spread over the matmuls (kernels/gpu/epilogue.py)."""
        if not self._fusions(layers[0].gate_up, residual.shape[0]).norm or not all(map(_fusable, layers)):
            return False
        x = torch.empty(residual.shape, dtype=self.activations, device=self.device)
        norm = fused.start_norm(residual, layers[0].input_norm, x, eps)
        following = [layer.input_norm for layer in layers[1:]] + [layers[-1].post_norm]  # the last one's x is not read
        for index, (layer, next_norm) in enumerate(zip(layers, following, strict=True)):
            qkv = self._behind(layer.qkv, x, Epilogue(norm))
            mixed = self.attention(self.rope_and_cache_write(qkv, step, index, layer.qk_norm), step, index)
            x = self._behind(layer.output, mixed, Epilogue(norm, layer.post_norm, factor=multiplier))
            norm = norm.added()
            inner = self.gated(layer.gate_up, x, layer.down, norm)
            x = self._behind(layer.down, inner, Epilogue(norm, next_norm, factor=multiplier))
            norm = norm.added()
        return True

    def _fusions(self, gate_up: Linear, rows: int) -> Fusions:
        if not isinstance(gate_up, GpuLinear):
            return NO_FUSIONS
        weight = gate_up.fusable
        if weight is None or self.fusions == "none" or rows > epilogue.MOST_ROWS:
            return NO_FUSIONS
        if self.fusions == "all":
            chosen = ALL_FUSIONS
        else:
            chosen = epilogue.config(rows, weight.n, weight.k, weight.name, current_gpu())
        # A bias comes before silu, where an epilogue has no place for it.
        return dataclasses.replace(chosen, silu=chosen.silu and gate_up.turns and gate_up.bias is None)

    def _behind(self, linear: Linear, x: torch.Tensor | Rounded, tail: Epilogue) -> torch.Tensor:
        """A linear with an epilogue, in one launch, and one more for a bias."""
        assert isinstance(linear, GpuLinear) and linear.weight is not None
        return self._linear(linear.weight, linear.bias, linear.x_exp, x, tail)

    # The parts.

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, torch.float32)

    def linear(self, name: str, weight: Weight, bias: torch.Tensor | None) -> Linear:
        x_exp = X_EXP if name.endswith("down_proj") else 0
        inner = self.config.intermediate_size
        turns = name.endswith("gate_proj") and weight.q.shape[0] == 2 * inner and inner % epilogue.TURN == 0
        if turns:
            weight, bias = weight.rows(epilogue.in_turns), None if bias is None else epilogue.in_turns(bias)
        bias = None if bias is None else bias.to(self.device, self.activations)
        packed = self._as_stored(weight)
        if packed is not None:
            product: Linear = functools.partial(self._linear, packed, bias, x_exp)
        else:
            dense = self._dense(weight)
            if self.activations == torch.float16:
                dense *= 2.0**x_exp
            product = functools.partial(F.linear, weight=dense, bias=bias)
        return GpuLinear(self._slabs(product), packed, bias, x_exp, turns)

    def ends(
        self, table: tuple[torch.Tensor, str], head: Weight | None
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], Linear]:
        """Embedding, from a dense table of which a step reads a few rows; head with float32 logits."""
        raw, kind = table
        weight = decode(kind, {"": raw.to(self.device)})
        rows = self._dense(weight)
        packed = self._as_stored(head or weight)
        if packed is not None:
            product = functools.partial(self._head, packed)
        else:
            product = functools.partial(_head, rows if head is None else self._dense(head))
        slabs = self._slabs(product)
        return lambda tokens: F.embedding(tokens, rows).float(), lambda x: slabs(x.to(self.activations))

    def _slabs(self, multiply: Linear) -> Linear:
        if not self.invariant:
            return multiply

        def in_slabs(x: torch.Tensor) -> torch.Tensor:
            rows = x.shape[0]
            return torch.cat([multiply(part) for part in F.pad(x, (0, 0, 0, -rows % SLAB)).split(SLAB)])[:rows]

        return in_slabs

    def _linear(
        self, weight: Packed, bias: torch.Tensor | None, x_exp: int, x: torch.Tensor | Rounded, tail: Epilogue = PLAIN
    ) -> torch.Tensor:
        out = torch.empty(tail.out_shape(x.shape[0], weight.n), dtype=self.activations, device=self.device)
        self._multiply(weight, x, out, x_exp, tail)
        return out if bias is None else out.add_(bias)

    def _head(self, weight: Packed, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], weight.n, device=self.device)
        for rows, part in zip(x.split(linear.MOST), out.split(linear.MOST), strict=True):
            self._multiply(weight, rows, part, 0, PLAIN)
        return out

    def _multiply(
        self, weight: Packed, x: torch.Tensor | Rounded, out: torch.Tensor, x_exp: int, tail: Epilogue
    ) -> None:
        """out = x @ W^T, of x times 2^-x_exp."""
        if weight.order is not None:
            assert isinstance(x, torch.Tensor)
            x = x[:, weight.order]
        scratch = self._scratch if x.shape[0] > linear.MOST else out  # out: not looked at
        linear.multiply(x, weight, out, self.workspace, scratch, x_exp=x_exp, epilogue=tail)

    def _as_stored(self, weight: Weight) -> Packed | None:
        """For the kernels that multiply by a weight without making it dense; None where there is none."""
        n, k = weight.q.shape
        capability = current_gpu().capability
        eight = linear_w8.takes_eight_bits(weight, capability)
        if weight.d is None or (self.activations == torch.float32 and not eight):
            return None
        packed: Packed
        on_device = weight.rows(lambda x: x.to(self.device))
        if weight.bits == 4 and weight.group in (32, 64, 128, k) and n % 16 == 0 and k % 64 == 0:
            q, d, m, zero_point = w4_layout.parts(on_device)
            packed = w4_layout.pack(q, d, m, kw=w4_layout.lane_order(capability), zero_point=zero_point)
        elif linear_w8.fits(weight):
            packed = linear_w8.pack(on_device, capability)
        else:
            return None
        self._largest = max(self._largest, 0 if eight else n * k)
        return dataclasses.replace(packed, order=None if weight.order is None else weight.order.to(self.device))

    @functools.cached_property
    def _scratch(self) -> torch.Tensor:
        """Room for one dequantised weight. First used by the warm-up, hence not in a graph's own memory."""
        return torch.empty(self._largest, dtype=self.activations, device=self.device)

    def _dense(self, weight: Weight) -> torch.Tensor:
        pieces = (weight[i : i + PIECE].rows(lambda x: x.to(self.device)) for i in range(0, weight.q.shape[0], PIECE))
        return torch.cat([dequantize(piece, self.activations) for piece in pieces])


def _head(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32 x @ weight^T: 16-bit logits of 20 would come in steps of 1/64 or 1/8."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def activations(name: str, quantization: str) -> torch.dtype:
    """auto: float16 for quantised weights, whose kernels compute in it; bfloat16 otherwise."""
    if name == "auto":
        name = "bfloat16" if quantization in ("bfloat16", "float32") else "float16"
    if name not in ("bfloat16", "float16", "float32"):
        raise CapacityError(f"dtype {name!r} is not supported; it must be auto, bfloat16, float16 or float32.")
    return getattr(torch, name)  # type: ignore[no-any-return]


def _fusable(layer: Layer) -> bool:
    """Whether all its matmuls can have epilogues; behind an addition there is no place for a bias."""
    linears = (layer.qkv, layer.output, layer.gate_up, layer.down)
    return all(
        isinstance(linear, GpuLinear) and linear.fusable is not None and (linear is layer.qkv or linear.bias is None)
        for linear in linears
    )
