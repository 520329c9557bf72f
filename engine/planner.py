"""What a model takes and what it can give on a device, from its header alone: memory, sequences, the roofline's speed.

Decode reads every weight once a step, and K and V of every sequence; prefill multiplies every token with every weight.
A step takes the larger of bytes / bandwidth and FLOPs / rate: no implementation can be faster, and this one is slower.
"""

from __future__ import annotations

import dataclasses
import math

from engine.checkpoint import Checkpoint
from engine.errors import CapacityError
from engine.messages import EngineOptions
from engine.model.config import ModelConfig

GIB = 2**30
# Bytes of a weight of the layers in the formats that a checkpoint may be made into (scales of groups of 128 included).
WEIGHTS = {"float32": 4.0, "bfloat16": 2.0, "w8a16": 1.0, "w8a8": 1.0, "fp8": 1.0, "w4a16": 0.5 + 2 / 128}
# The same of GGUF's, as a GPU's kernels read them: fp16 pairs for 4 bits, above that bytes and float32 scales.
GPU_BYTES = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), 0.5 + 4 / 32),
    **dict.fromkeys(("Q5_0", "Q8_0"), 1 + 4 / 32),
    **dict.fromkeys(("Q5_1", "Q5_K"), 1 + 8 / 32),
    "Q6_K": 1 + 4 / 16,
    "F32": 2.0,  # in the activations' 16 bits
}
KV_BYTES = {"auto": 2.0, "float32": 4.0, "int8": 1.0, "fp8": 1.0}  # of an element
TABLE = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Machine:
    """memory: bytes that the engine may take. bandwidth: bytes/s. rate: FLOPs/s of a matrix product, 16-bit."""

    name: str
    memory: int
    bandwidth: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes: weights, resident; read, of the weights that a decode step reads; kv, of one token; workspace."""

    config: ModelConfig
    machine: Machine
    weights: int
    read: int
    kv: float
    workspace: int

    @property
    def tokens(self) -> int:
        """Of KV cache that fit beside the weights."""
        return max(0, int((self.machine.memory - self.weights - self.workspace) / self.kv))

    def sequences(self, context: int) -> int:
        return self.tokens // context

    def decode(self, batch: int, context: int) -> float:
        """Seconds of the step that gives `batch` sequences of `context` tokens one token more."""
        return self._seconds(self.read + batch * self._seen(context) * self.kv, batch, batch * self._seen(context))

    def prefill(self, tokens: int) -> float:
        """Seconds of a prompt, in one step and alone."""
        seen = (
            sum(self._seen(i + 1) for i in range(tokens)) if self.config.sliding_window else tokens * (tokens + 1) / 2
        )
        return self._seconds(self.read + tokens * self.kv, tokens, seen, logits=1)

    def _seen(self, context: int) -> int:
        return min(context, self.config.sliding_window or context)

    def _seconds(self, num_bytes: float, tokens: int, seen: float, logits: int | None = None) -> float:
        config = self.config
        head = config.vocab_size * config.hidden_size * (tokens if logits is None else logits)
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * seen
        flops = 2 * (tokens * layer_weights(config) + head + attention)
        return max(num_bytes / self.machine.bandwidth, flops / self.machine.rate)


def layer_weights(config: ModelConfig) -> int:
    """Elements of all matrices of all layers."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)


def plan(
    checkpoint: Checkpoint, machine: Machine, options: EngineOptions, weights: str | None = None, copies: float = 0.0,
    gpu: bool = False,
) -> Plan:  # fmt: skip
    """Of the checkpoint as it is stored, or with its layers in the format `weights` (a key of WEIGHTS).

    copies: bytes of a second form that each weight of the layers is kept in (a CPU's, for many rows). gpu: as a GPU's
    kernels read them, instead of as they lie in the file.
    """
    config = checkpoint.config
    dense = 4 if options.dtype == "float32" else 2
    matrices = layer_weights(config)
    tensors = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.layers.")]
    layers = sum(
        int(math.prod(x.shape) * GPU_BYTES[x.dtype]) if gpu and x.dtype in GPU_BYTES else x.nbytes for x in tensors
    )
    if options.dtype == "float32" or weights is not None:
        layers = int(matrices * (dense if options.dtype == "float32" else WEIGHTS[weights or "float32"]))
    head = config.vocab_size * config.hidden_size * dense
    table = 0 if config.tie_embeddings else checkpoint.tensors[TABLE].nbytes
    step = (options.max_num_batched_tokens or 2048) * 2 * (2 * config.intermediate_size + 4 * config.hidden_size)
    logits = 2 * 4 * options.max_num_seqs * config.vocab_size
    heads = 2 * config.num_layers * config.num_kv_heads
    kind = "float32" if options.dtype == "float32" and options.kv_cache_dtype == "auto" else options.kv_cache_dtype
    kv = heads * (config.head_dim * KV_BYTES[kind] + (4 if kind in ("int8", "fp8") else 0))  # a scale a row
    return Plan(config, machine, int(layers + matrices * copies) + head + table, layers + head, kv, step + logits)


def check_fit(plan: Plan, options: EngineOptions, share: str = "") -> None:
    """Raises CapacityError for a start that cannot succeed, naming what would make it fit.

    share: the flag that gives the engine more of the memory, where there is one.
    """
    config, memory = plan.config, plan.machine.memory
    needed = plan.weights + plan.workspace
    have = f"{memory / GIB:.1f} GiB that this engine may take on {plan.machine.name}"
    if needed > memory:
        ways = []
        if options.dtype == "float32":
            ways.append("--dtype bfloat16, which takes half")
        small = layer_weights(config) * WEIGHTS["w4a16"] + (plan.weights - plan.read) + plan.workspace
        small += config.vocab_size * config.hidden_size * 2
        if small < memory and small < 0.7 * needed:
            ways.append(f"a 4-bit copy of it, {small / GIB:.1f} GiB (fen quantize --to w4a16)")
        ways += [share] if share else []
        raise CapacityError(
            f"The model does not fit: its weights take {plan.weights / GIB:.1f} GiB and the largest step "
            f"{plan.workspace / GIB:.1f} GiB, of the {have}; choose {' or '.join([*ways, 'a smaller model'])}."
        )
    flags = {"--kv-cache-tokens": options.kv_cache_tokens or 0, "--max-model-len": options.max_model_len or 0}
    for flag, tokens in flags.items():
        if tokens > plan.tokens:
            raise CapacityError(
                f"{flag} {tokens} takes {tokens * plan.kv / GIB:.1f} GiB of KV cache, and "
                f"{plan.tokens * plan.kv / GIB:.1f} GiB are left beside the weights, of the {have}; "
                f"{flag} {_round(plan.tokens)} would fit."
            )


def _round(tokens: int) -> int:
    """Down to two significant digits, so that small changes of free memory do not matter."""
    digits = max(0, int(math.log10(max(1, tokens))) - 1)
    return int(tokens // 10**digits * 10**digits)
