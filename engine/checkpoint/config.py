"""config.json or GGUF metadata -> ModelConfig. What would change the arithmetic and is not known is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from engine.checkpoint.gguf import GgufFile
from engine.errors import CheckpointError
from engine.model.config import ModelConfig, RopeScaling

HF_ARCHITECTURES = (
    "LlamaForCausalLM",
    "YiForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    "GraniteForCausalLM",
    "SmolLM3ForCausalLM",
)
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "granite", "smollm3")
_GGUF_PERMUTED = ("llama", "granite", "smollm3")  # their converters permute the rows of q and k
_GGUF_UNROTATED = 4  # SmolLM3's every fourth layer has no rope; the file does not say so

# Fields of variants that the decoder does not have, and the value that switches each of them off.
_HF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0,),
    "compression_config": (),  # compressed-tensors' first name for quantization_config (engine.checkpoint.quantized)
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "no_rope_layers": ([],),
    "use_mrope": (False,),
}
# Of these, what a family does have.
_HF_OWN: dict[str, tuple[str, ...]] = {
    "Phi3ForCausalLM": ("partial_rotary_factor",),
    "GraniteForCausalLM": (
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "attention_multiplier",
    ),
    "SmolLM3ForCausalLM": ("no_rope_layers",),
}
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.clamp_kqv": (0.0,),
}


class Fields:
    """Typed, bounded reading of a mapping from a file; a wrong value is a CheckpointError naming its field."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix

    def fail(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {self.prefix}{name} {problem}")

    def get(self, name: str) -> Any:
        return self.values.get(self.prefix + name)

    def _required(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise self.fail(name, "is missing")
        return value

    def integer(self, name: str, high: int, low: int = 1, default: int | None = None) -> int:
        value = default if self.get(name) is None and default is not None else self._required(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"is {_show(value)}; a whole number from {low} to {high} is allowed")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = default if self.get(name) is None and default is not None else self._required(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.fail(name, f"is {_show(value)}; a number from {low:g} to {high:g} is allowed")
        return float(value)

    def optional(self, name: str, low: float, high: float) -> float | None:
        return None if self.get(name) is None else self.number(name, low, high)

    def flag(self, name: str, default: bool = False) -> bool:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise self.fail(name, f"is {_show(value)}; true or false is allowed")
        return value

    def word(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = default if self.get(name) is None and default is not None else self._required(name)
        if value not in allowed:
            raise self.fail(name, f"is {_show(value)}; supported: {', '.join(allowed)}")
        return str(value)

    def refuse(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        for name, values in neutral.items():
            if self.get(name) is not None and self.get(name) not in values:
                off = f"; only {_show(values[0])} is" if values else ""
                raise self.fail(name, f"is {_show(self.get(name))}, which is not supported{off}")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
            raise self.fail(name, f"is {_show(value)}; token ids from 0 to {vocab_size - 1} are allowed")
        return tuple(ids)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB; CheckpointError naming the file for anything else."""
    try:
        if path.stat().st_size > 1 << 26:
            raise CheckpointError(f"{path} is {path.stat().st_size} bytes; 64 MiB are allowed")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def hf_config(values: dict[str, Any], generation: dict[str, Any], where: str) -> ModelConfig:
    """values: config.json; generation: generation_config.json or {}, whose end tokens win. Hugging Face's defaults."""
    fields = Fields(values, where)
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in HF_ARCHITECTURES:
        raise fields.fail("architectures", f"is {_show(architectures)}; supported: {', '.join(HF_ARCHITECTURES)}")
    architecture = architectures[0]
    qwen = architecture.startswith("Qwen")
    own = _HF_OWN.get(architecture, ())
    fields.refuse({name: values for name, values in _HF_NEUTRAL.items() if name not in own})
    shape = _sizes(
        fields,
        names=("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        kv_heads="num_key_value_heads",
        head_dim="head_dim",
        default_head_dim=128 if architecture == "Qwen3ForCausalLM" else None,
    )
    max_position = fields.integer("max_position_embeddings", 1 << 26, default=2048)
    rope_theta, rope_scaling, rotary_dim = _hf_rope(fields, max_position, shape["head_dim"], architecture)
    # yarn is written beside the context before stretching. So is dynamic, which then changes nothing below that length:
    # its context stays what it was, and a longer --max-model-len stretches it.
    if rope_scaling and rope_scaling.kind == "yarn":
        max_position = max(max_position, int(rope_scaling.original_max_position * rope_scaling.factor))
    attention_bias = architecture == "Qwen2ForCausalLM" or fields.flag("attention_bias")
    ends = Fields(generation, "generation_config.json").token_ids("eos_token_id", shape["vocab_size"])
    starts = fields.token_ids("bos_token_id", shape["vocab_size"])
    return ModelConfig(
        architecture=architecture,
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 0, 0.1, default=1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=not qwen and fields.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_hf_window(fields, architecture, shape["num_layers"]),
        rotary_dim=rotary_dim,
        unrotated_layers=_hf_unrotated(fields, shape["num_layers"]) if "no_rope_layers" in own else (),
        attention_scale=fields.optional("attention_multiplier", 1e-6, 1e6),
        embedding_multiplier=fields.number("embedding_multiplier", 1e-6, 1e6, default=1.0),
        residual_multiplier=fields.number("residual_multiplier", 1e-6, 1e6, default=1.0),
        logits_divisor=fields.number("logits_scaling", 1e-6, 1e6, default=1.0),
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=ends or fields.token_ids("eos_token_id", shape["vocab_size"]),
        dtype=_hf_dtype(fields),
        **shape,
    )


class _Sizes(TypedDict):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _sizes(
    fields: Fields, names: tuple[str, ...], kv_heads: str, head_dim: str, default_head_dim: int | None
) -> _Sizes:
    """The bounds are far above any dense model there is and keep every product of two within 2^40."""
    vocab, hidden, ffn, layers, heads = names
    num_heads, hidden_size = fields.integer(heads, 4096), fields.integer(hidden, 1 << 18)
    sizes = _Sizes(
        vocab_size=fields.integer(vocab, 1 << 22),
        hidden_size=hidden_size,
        intermediate_size=fields.integer(ffn, 1 << 20),
        num_layers=fields.integer(layers, 1024),
        num_heads=num_heads,
        num_kv_heads=fields.integer(kv_heads, num_heads, default=num_heads),
        head_dim=fields.integer(head_dim, 1024, default=default_head_dim or hidden_size // num_heads),
    )
    if num_heads % sizes["num_kv_heads"]:
        raise fields.fail(kv_heads, f"is {sizes['num_kv_heads']}, which does not divide the {num_heads} query heads")
    if sizes["head_dim"] % 2:
        raise fields.fail(head_dim, f"is {sizes['head_dim']}; rotary positions need an even one")
    return sizes


def _hf_unrotated(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """SmolLM3: a 1 for each layer with rope, or every so many layers one without."""
    flags = fields.get("no_rope_layers")
    if not flags:
        interval = fields.integer("no_rope_layer_interval", 1 << 20, default=4)
        flags = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(flags, list) or len(flags) != num_layers or not set(flags) <= {0, 1}:
        raise fields.fail("no_rope_layers", f"is {_show(flags)}; {num_layers} zeros and ones are allowed")
    return tuple(layer for layer, rotated in enumerate(flags) if not rotated)


def _hf_rope(
    fields: Fields, max_position: int, head_dim: int, architecture: str
) -> tuple[float, RopeScaling | None, int | None]:
    """rope_theta, the scaling and how much of a head is rotated: from `rope_parameters` (transformers 5), or from
    `rope_theta`, `rope_scaling` and `partial_rotary_factor`."""
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    values = fields.get(name) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise fields.fail(name, "must be one object for all layers")
    rope = Fields(values, f"{fields.where}: {name}")
    theta = rope if rope.get("rope_theta") is not None else fields
    rope_theta = theta.number("rope_theta", 1, 1e12, default=10000.0)
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    kind = "longrope" if rope.get(key) == "su" else rope.word(key, kinds, default="default")
    rope.refuse({"mrope_section": ()})
    rotary_dim = None
    if "partial_rotary_factor" in _HF_OWN.get(architecture, ()):
        place = rope if rope.get("partial_rotary_factor") is not None else fields
        rotary_dim = int(head_dim * place.number("partial_rotary_factor", 1e-3, 1.0, default=1.0))
        if rotary_dim < 2 or rotary_dim % 2:
            raise place.fail("partial_rotary_factor", f"rotates {rotary_dim} of {head_dim}; an even number is needed")
        rotary_dim = None if rotary_dim == head_dim else rotary_dim
    else:
        rope.refuse({"partial_rotary_factor": (1.0,)})
    if kind == "default":
        return rope_theta, None, rotary_dim
    place = fields if kind == "longrope" and rope.get("original_max_position_embeddings") is None else rope
    original = place.integer("original_max_position_embeddings", 1 << 26, default=max_position)
    if kind == "dynamic":  # transformers stretches from max_position_embeddings, whatever the other field says
        original = max_position
    stretch = max_position / original if kind in ("yarn", "longrope") else None
    pairs = (rotary_dim or head_dim) // 2 if kind == "longrope" else 0
    scaling = RopeScaling(
        kind=kind,
        factor=rope.number("factor", 1, 1e6, default=stretch),
        original_max_position=original,
        low_freq_factor=rope.number("low_freq_factor", 1e-6, 1e6, default=1.0),
        high_freq_factor=rope.number("high_freq_factor", 1e-6, 1e6, default=4.0),
        beta_fast=rope.number("beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-6, 1e6, default=1.0),
        attention_factor=rope.optional("attention_factor", 1e-6, 1e6),
        mscale=rope.optional("mscale", 0, 1e6),
        mscale_all_dim=rope.optional("mscale_all_dim", 0, 1e6),
        truncate=rope.flag("truncate", default=True),
        short_factors=_factors(rope, "short_factor", pairs),
        long_factors=_factors(rope, "long_factor", pairs),
    )
    return rope_theta, scaling, rotary_dim


def _factors(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    values = fields.get(name) if count else []
    if not isinstance(values, list) or len(values) != count:
        raise fields.fail(name, f"is {_show(values)}; {count} numbers are needed")
    return tuple(Fields({name: value}, fields.where).number(name, 1e-6, 1e9) for value in values)


def _hf_window(fields: Fields, architecture: str, num_layers: int) -> int | None:
    """Mistral has one window for all layers; Qwen switches it on from a layer upwards, or by a list of layer types."""
    qwen = architecture.startswith("Qwen")
    switched = qwen or architecture == "SmolLM3ForCausalLM"
    if architecture not in ("MistralForCausalLM", "Phi3ForCausalLM") and not (
        switched and fields.flag("use_sliding_window")
    ):
        return None
    if fields.get("sliding_window") is None:
        return None
    window = fields.integer("sliding_window", 1 << 26)
    layers = fields.get("layer_types")
    if layers is None and qwen:
        full = fields.integer("max_window_layers", 1 << 20, low=0, default=0)
        layers = ["full_attention" if index < full else "sliding_attention" for index in range(num_layers)]
    kinds = set(layers or ["sliding_attention"])
    if kinds == {"sliding_attention"}:
        return window
    if kinds == {"full_attention"}:
        return None
    raise fields.fail("layer_types", f"mixes {', '.join(sorted(map(str, kinds)))}; all layers must be of one kind")


def _hf_dtype(fields: Fields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    return fields.word(name, ("float32", "float16", "bfloat16"), default="float32")


def gguf_config(file: GgufFile) -> ModelConfig:
    """The config of a GGUF's metadata. Biases, q/k norm and tied embeddings show in which tensors there are."""
    where, metadata, tensors = file.path.name, file.metadata, file.tensors
    arch = Fields(metadata, where).word("general.architecture", GGUF_ARCHITECTURES)
    fields = Fields(metadata, where, prefix=arch + ".")
    own = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale") if arch == "granite" else ()
    fields.refuse({name: values for name, values in _GGUF_NEUTRAL.items() if name not in own})
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{where} lacks the tensor token_embd.weight")
    shape = _sizes(
        Fields({f"{arch}.vocab_size": tensors["token_embd.weight"].shape[0]} | metadata, where, prefix=arch + "."),
        names=("vocab_size", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
        kv_heads="attention.head_count_kv",
        head_dim="attention.key_length",
        default_head_dim=None,
    )
    head_dim = shape["head_dim"]
    rotary_dim = fields.integer("rope.dimension_count", 1 << 20, default=head_dim)
    for name, value in (
        ("attention.value_length", fields.integer("attention.value_length", 1 << 20, default=head_dim)),
        ("rope.dimension_count", head_dim if arch == "phi3" and rotary_dim < head_dim else rotary_dim),
    ):
        if value != head_dim:
            raise fields.fail(name, f"is {fields.get(name)}; only the head size, {head_dim}, is supported")
    tokenizer = Fields(metadata, where, prefix="tokenizer.ggml.")
    ends = (tokenizer.token_ids(name, shape["vocab_size"]) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    starts = tokenizer.token_ids("bos_token_id", shape["vocab_size"])
    dense = {"F32": "float32", "F16": "float16"}
    window = fields.integer("attention.sliding_window", 1 << 26, low=0, default=0)
    max_position = fields.integer("context_length", 1 << 26)
    return ModelConfig(
        architecture=arch,
        max_position=max_position,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 0, 0.1),
        rope_theta=fields.number("rope.freq_base", 1, 1e12, default=10000.0),
        rope_scaling=_gguf_longrope(file, fields, max_position, rotary_dim) or _gguf_rope(fields, max_position),
        rope_factors=_gguf_rope_factors(file, "rope_freqs.weight", head_dim),
        rope_interleaved=arch in _GGUF_PERMUTED,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        unrotated_layers=tuple(range(_GGUF_UNROTATED - 1, shape["num_layers"], _GGUF_UNROTATED))
        if arch == "smollm3"
        else (),
        attention_scale=fields.number("attention.scale", 0, 1e6, default=0.0) or None,
        embedding_multiplier=fields.number("embedding_scale", 0, 1e6, default=0.0) or 1.0,
        residual_multiplier=fields.number("residual_scale", 0, 1e6, default=0.0) or 1.0,
        logits_divisor=fields.number("logit_scale", 0, 1e6, default=0.0) or 1.0,
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        sliding_window=window or None,
        bos_token_id=starts[0] if starts else None,
        eos_token_ids=tuple(dict.fromkeys(token for ids in ends for token in ids)),
        dtype=dense.get(file.types.get("blk.0.attn_q.weight", ""), "bfloat16"),
        **shape,
    )


def _gguf_rope(fields: Fields, max_position: int) -> RopeScaling | None:
    kind = fields.word("rope.scaling.type", ("none", "linear", "yarn"), default="none")
    factor = fields.number("rope.scaling.factor", 0, 1e6, default=0.0)
    if fields.get("rope.scale_linear") is not None:  # the old spelling
        kind, factor = "linear", fields.number("rope.scale_linear", 0, 1e6)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    original = fields.integer("rope.scaling.original_context_length", 1 << 26, default=max_position)
    fields.refuse({"rope.scaling.yarn_ext_factor": (1.0, -1.0), "rope.scaling.yarn_log_multiplier": (0.0,)})
    attention = fields.number("rope.scaling.yarn_attn_factor", 1e-6, 1e6, default=1.0)
    attention *= fields.number("rope.scaling.attn_factor", 1e-6, 1e6, default=1.0)
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, default=1.0),
        # llama.cpp multiplies the factor of the paper by this one
        attention_factor=None if attention == 1.0 else attention * (0.1 * math.log(factor) + 1.0),
    )


def _gguf_longrope(file: GgufFile, fields: Fields, max_position: int, rotary_dim: int) -> RopeScaling | None:
    """Phi-3's, whose two sets of divisors are tensors."""
    short, long = (_gguf_rope_factors(file, f"rope_factors_{name}.weight", rotary_dim) for name in ("short", "long"))
    if short is None or long is None:
        return None
    original = fields.integer("rope.scaling.original_context_length", 1 << 26, default=max_position)
    attention = fields.number("rope.scaling.attn_factor", 1e-6, 1e6, default=1.0)
    return RopeScaling(
        "longrope", max_position / original, original, attention_factor=attention,
        short_factors=short, long_factors=long,
    )  # fmt: skip


def _gguf_rope_factors(file: GgufFile, name: str, rotary_dim: int) -> tuple[float, ...] | None:
    """Divisors of the frequencies, which GGUF holds finished in a tensor (Llama 3's stretch, LongRoPE)."""
    tensor = file.tensors.get(name)
    if tensor is None:
        return None
    values = tensor.data.view(np.float32) if tensor.dtype == "F32" else np.empty(0)
    if tensor.shape != (rotary_dim // 2,) or not (np.isfinite(values) & (values > 0)).all() or not len(values):
        raise CheckpointError(f"{file.path.name}: {name} must be {rotary_dim // 2} positive F32 values")
    return tuple(float(value) for value in values)
