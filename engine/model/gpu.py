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

import torch
import torch.nn.functional as F

from engine.errors import CapacityError
from engine.model.config import ModelConfig
from engine.model.decoder import Linear, Step
from engine.model.rope import rotations, unrotated
from kernels import kv_cache
from kernels.formats import Weight, decode, dequantize
from kernels.gpu import attention, fused, linear_w4, linear_w8, w4_layout
from kernels.gpu.split_k import Workspace
from kernels.gpu.tiles import current_gpu

X_EXP = 4
SLAB = 128  # rows that a batch-invariant matmul takes at a time
PIECE = 8192  # rows of a weight that are dequantised at a time: bounds the float32 scratch
MOST = min(linear_w4.CROSSOVER, linear_w8.CROSSOVER)  # rows that a matmul takes without a scratch buffer

# x, out, the power of two that x was divided by: out = x @ W^T, with W as it is stored.
Multiply = Callable[[torch.Tensor, torch.Tensor, int], None]


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
    ):
        self.config = config
        self.activations = activations
        self.cache_dtype = kv_cache.EIGHT_BIT.get(kv_dtype, activations)
        if kv_dtype == "fp8" and current_gpu().capability < 89:
            raise CapacityError(f"{current_gpu().name} has no float8; choose --kv-cache-dtype int8 or auto.")
        self.block_size = block_size
        self.device = device
        self.invariant = invariant
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

    def dtype(self, rows: int) -> torch.dtype:
        return self.activations

    def add_rmsnorm(
        self, residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
    ) -> torch.Tensor:
        out = torch.empty(residual.shape, dtype=dtype, device=self.device)
        fused.add_rmsnorm(delta, residual, weight, out, eps=eps)
        return out

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

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, width = gate_up.shape
        out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=self.device)
        fused.silu_mul(gate_up, out, out_exp=X_EXP if out.dtype == torch.float16 else 0)
        return out

    # The parts.

    def vector(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, torch.float32)

    def linear(self, name: str, weight: Weight, bias: torch.Tensor | None) -> Linear:
        x_exp = X_EXP if name.endswith("down_proj") else 0
        bias = None if bias is None else bias.to(self.device, self.activations)
        as_stored = self._as_stored(weight)
        if as_stored is not None:
            return self._slabs(functools.partial(self._linear, as_stored, weight.q.shape[0], bias, x_exp))
        dense = self._dense(weight)
        if self.activations == torch.float16:
            dense *= 2.0**x_exp
        return self._slabs(lambda x: F.linear(x, dense, bias))

    def ends(
        self, table: tuple[torch.Tensor, str], head: Weight | None
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], Linear]:
        """Embedding, from a dense table of which a step reads a few rows; head with float32 logits."""
        raw, kind = table
        weight = decode(kind, {"": raw.to(self.device)})
        rows = self._dense(weight)
        as_stored = self._as_stored(head or weight)
        if as_stored is not None:
            multiply = functools.partial(self._head, as_stored, (head or weight).q.shape[0])
        else:
            multiply = functools.partial(_head, rows if head is None else self._dense(head))
        slabs = self._slabs(multiply)
        return lambda tokens: F.embedding(tokens, rows).float(), lambda x: slabs(x.to(self.activations))

    def _slabs(self, multiply: Linear) -> Linear:
        if not self.invariant:
            return multiply

        def in_slabs(x: torch.Tensor) -> torch.Tensor:
            rows = x.shape[0]
            return torch.cat([multiply(part) for part in F.pad(x, (0, 0, 0, -rows % SLAB)).split(SLAB)])[:rows]

        return in_slabs

    def _linear(
        self, multiply: Multiply, n: int, bias: torch.Tensor | None, x_exp: int, x: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(x.shape[0], n, dtype=x.dtype, device=self.device)
        multiply(x, out, x_exp)
        return out if bias is None else out.add_(bias)

    def _head(self, multiply: Multiply, n: int, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], n, device=self.device)
        for rows, part in zip(x.split(MOST), out.split(MOST), strict=True):
            multiply(rows, part, 0)
        return out

    def _as_stored(self, weight: Weight) -> Multiply | None:
        """The kernel that multiplies by the weight without making it dense; None where there is none."""
        n, k = weight.q.shape
        capability = current_gpu().capability
        eight = linear_w8.takes_eight_bits(weight, capability)
        if weight.d is None or (self.activations == torch.float32 and not eight):
            return None
        packed: w4_layout.W4 | linear_w8.W8
        on_device = weight.rows(lambda x: x.to(self.device))
        if weight.bits == 4 and weight.group in (32, 64, 128, k) and n % 16 == 0 and k % 64 == 0:
            q, d, m, zero_point = w4_layout.parts(on_device)
            packed = w4_layout.pack(q, d, m, kw=w4_layout.lane_order(capability), zero_point=zero_point)
        elif linear_w8.fits(weight):
            packed = linear_w8.pack(on_device, capability)
        else:
            return None
        self._largest = max(self._largest, 0 if eight else n * k)
        order = None if weight.order is None else weight.order.to(self.device)
        return functools.partial(self._multiply, packed, order)

    def _multiply(
        self, weight: w4_layout.W4 | linear_w8.W8, order: torch.Tensor | None, x: torch.Tensor, out: torch.Tensor,
        x_exp: int,
    ) -> None:  # fmt: skip
        x = x if order is None else x[:, order]
        scratch = self._scratch if x.shape[0] > MOST else x  # x: not looked at
        if isinstance(weight, w4_layout.W4):
            linear_w4.matmul_w4(x, weight, out, self.workspace, scratch, x_exp=x_exp)
        else:
            linear_w8.matmul_w8(x, weight, out, self.workspace, scratch, x_exp=x_exp)

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
