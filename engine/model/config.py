"""What makes one LLaMA-family model differ from another: flags, read by the one decoder. Imports no torch."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context; `kind` as in Hugging Face's `rope_type`."""

    kind: str  # "linear" | "dynamic" | "llama3" | "yarn" | "longrope"
    factor: float
    original_max_position: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: from the factor (see engine.model.rope)
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the inverse frequencies, up to the original context,
    long_factors: tuple[float, ...] = ()  # and beyond


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and variant flags of a dense LLaMA-family decoder. Sizes count elements, `max_position` counts tokens."""

    architecture: str  # as the checkpoint names it, e.g. "LlamaForCausalLM" or GGUF's "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_factors: tuple[float, ...] | None = None  # head_dim/2 divisors of the inverse frequencies (GGUF's rope_freqs)
    # q/k rows as stored: True pairs (0,1), (2,3).. (GGUF "llama"), False pairs (i, i + head_dim/2) (Hugging Face)
    rope_interleaved: bool = False
    rotary_dim: int | None = None  # only the first so many dimensions of a head are rotated (Phi-4-mini); None: all
    unrotated_layers: tuple[int, ...] = ()  # layers without rope (SmolLM3)
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm per head on q and k before rope (Qwen3)
    sliding_window: int | None = None  # tokens a query sees, itself included
    attention_scale: float | None = None  # of the scores (Granite); None: head_dim ** -0.5
    embedding_multiplier: float = 1.0  # Granite
    residual_multiplier: float = 1.0  # Granite: of what a block adds to the residual stream
    logits_divisor: float = 1.0  # Granite
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # that the dense weights were stored in

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V one token takes at 2 bytes an element, all layers."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim
