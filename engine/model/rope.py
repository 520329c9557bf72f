"""Rotary position embedding: the table of rotations, one complex number for each position and pair of dimensions.

The engine rotates pairs (2i, 2i + 1) of a head for every model; the loader reorders the rows of checkpoints that pair
(i, i + D/2). Scalings follow Hugging Face's `modeling_rope_utils`, which is their reference.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from engine.model.config import ModelConfig, RopeScaling


def rotations(config: ModelConfig, max_len: int) -> torch.Tensor:
    """complex64 [max_len, D/2]: a * exp(i * position * frequency), a the attention factor of yarn (else 1).

    Dimensions that are not rotated have frequency 0. A scale of the scores other than D ** -0.5 is in a, half of it for
    q and half for k.
    """
    frequencies, factor = _frequencies(config, max_len)
    magnitudes = torch.full((config.head_dim // 2,), unrotated(config))
    magnitudes[: len(frequencies)] *= factor
    frequencies = F.pad(frequencies, (0, config.head_dim // 2 - len(frequencies)))
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    return torch.polar(magnitudes.expand_as(angles).contiguous(), angles)


def unrotated(config: ModelConfig) -> float:
    """What q and k are multiplied with where they are not rotated."""
    return math.sqrt((config.attention_scale or config.head_dim**-0.5) * config.head_dim**0.5)


def _frequencies(config: ModelConfig, max_len: int) -> tuple[torch.Tensor, float]:
    dim, theta, scaling = config.rotary_dim or config.head_dim, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inverse = 1.0 / theta**exponents
    if config.rope_factors is not None:  # a divisor for each pair, as GGUF stores llama3's scaling
        return inverse / torch.tensor(config.rope_factors), 1.0
    if scaling is None:
        return inverse, 1.0
    match scaling.kind:
        case "linear":
            return inverse / scaling.factor, 1.0
        case "dynamic":
            # Beyond the trained context the base grows with the length. A KV cache needs one base for all positions:
            # that of the longest sequence this engine admits.
            if max_len > scaling.original_max_position:
                stretch = scaling.factor * max_len / scaling.original_max_position - (scaling.factor - 1)
                inverse = 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponents
            return inverse, 1.0
        case "llama3":
            return _llama3(inverse, scaling), 1.0
        case "yarn":
            return _yarn(inverse, scaling, dim, theta)
        case "longrope":
            return _longrope(inverse, scaling, max_len)
        case kind:
            raise AssertionError(f"rope scaling {kind!r} should have been refused with the config")


def _llama3(inverse: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_position / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    long = wavelength > scaling.original_max_position / low
    short = wavelength < scaling.original_max_position / high
    return torch.where(long, inverse / scaling.factor, torch.where(short, inverse, blended))


def _longrope(inverse: torch.Tensor, scaling: RopeScaling, max_len: int) -> tuple[torch.Tensor, float]:
    """LongRoPE (Ding et al., arXiv 2402.13753): a divisor for each pair. As with "dynamic", a KV cache needs one set
    for all positions: the long one if this engine admits sequences beyond the original context."""
    original, attention = scaling.original_max_position, scaling.attention_factor
    if attention is None:
        attention = math.sqrt(1 + math.log(scaling.factor) / math.log(original)) if scaling.factor > 1 else 1.0
    factors = scaling.long_factors if max_len > original else scaling.short_factors
    return inverse / torch.tensor(factors), attention


def _yarn(inverse: torch.Tensor, scaling: RopeScaling, dim: int, theta: float) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): interpolate slow dimensions, keep fast ones, ramp between; and a factor on
    attention."""

    def dimension(turns: float) -> float:
        return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def mscale(factor: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.attention_factor
    if attention is None:
        if scaling.mscale and scaling.mscale_all_dim:
            attention = mscale(scaling.factor, scaling.mscale) / mscale(scaling.factor, scaling.mscale_all_dim)
        else:
            attention = mscale(scaling.factor)
    return inverse / scaling.factor * ramp + inverse * (1 - ramp), attention
