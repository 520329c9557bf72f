"""A matrix [N, K] -> integers (or fp8) and scales, by rounding to the nearest or by GPTQ.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds column after column and moves each column's error
into those that are not yet rounded, weighted by the inputs' second moments H = X^T X of a calibration text: it
minimises |X W^T - X W'^T| instead of |W - W'|. Columns go in order of falling H_ii; their groups stay where they are,
so that no g_idx is needed. Scales are those of 20 shrunk ranges that lose least, weighted by H_ii.
"""

from __future__ import annotations

import dataclasses

import torch

GROUPS = (128, 64, 32)
BLOCK = 128  # columns whose errors are moved at once into the rest
DAMPING = 0.01  # of the mean of H's diagonal
SHRINK = [1 - 0.02 * i for i in range(20)]
E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Target:
    """bits 8 or 4; floating: e4m3; grouped: in groups of columns rather than rows; layout: compressed-tensors' name."""

    name: str
    layout: str
    bits: int
    floating: bool = False
    grouped: bool = False
    activations: bool = False  # rounded to the same type, for each token

    @property
    def top(self) -> float:
        return E4M3_MAX if self.floating else 2 ** (self.bits - 1) - 1


TARGETS = {
    target.name: target
    for target in (
        Target("w4a16", "pack-quantized", 4, grouped=True),
        Target("w8a16", "pack-quantized", 8),
        Target("w8a8", "int-quantized", 8, activations=True),
        Target("fp8", "float-quantized", 8, floating=True, activations=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Rounded:
    """q [N, K] int8 or float8_e4m3fn, scale [N, groups]: w = q * scale."""

    q: torch.Tensor
    scale: torch.Tensor


def group_size(target: Target, columns: list[int], wanted: int | None = None) -> int:
    """`wanted`, or the largest of GROUPS that divides every matrix; 0: a row. ValueError if it does not, or none."""
    if not target.grouped:
        if wanted is not None:
            raise ValueError(f"{target.name} has one scale a row and takes no --group-size")
        return 0
    fitting = [size for size in GROUPS if all(k % size == 0 for k in columns)]
    if not fitting:
        raise ValueError("no group of 128, 64 or 32 columns divides every matrix of this model")
    if wanted not in (None, *fitting):
        raise ValueError(
            f"its matrices divide into groups of {' or '.join(map(str, fitting))} columns, not of {wanted}"
        )
    return wanted or fitting[0]


def nearest(w: torch.Tensor, target: Target, group: int, dtype: torch.dtype) -> Rounded:
    """w float32 [N, K]; group 0: a row; dtype: of the stored scales, which are rounded before the integers are made."""
    parts = w.unflatten(1, (-1, group or w.shape[1]))
    scale = _stored(parts.abs().amax(-1) / _reach(target), dtype)
    q = _to_steps(parts / scale.float()[..., None], target).flatten(1)
    return Rounded(q.to(torch.float8_e4m3fn if target.floating else torch.int8), scale)


def gptq(w: torch.Tensor, h: torch.Tensor, target: Target, group: int, dtype: torch.dtype) -> Rounded:
    """h float32 [K, K]: the sum of x x^T over the inputs x of the calibration."""
    n, k = w.shape
    group = group or k
    dead = h.diagonal() == 0
    h = h / h.diagonal().mean()
    h.diagonal()[dead] = 1.0
    scale = _searched(w, h.diagonal(), target, group, dtype)
    order = h.diagonal().argsort(descending=True)
    w = w[:, order].clone()
    w[:, dead[order]] = 0
    h = h[order][:, order]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    steps = scale.float()[:, order // group]
    q = torch.empty(n, k, dtype=torch.int8)
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors = torch.empty(n, last - first)
        for i in range(first, last):
            rounded = _to_steps(w[:, i] / steps[:, i], target)
            q[:, i] = rounded.to(torch.int8)
            errors[:, i - first] = (w[:, i] - rounded * steps[:, i]) / inverse[i, i]
            w[:, i:last] -= torch.outer(errors[:, i - first], inverse[i, i:last])
        w[:, last:] -= errors @ inverse[first:last, last:]
    return Rounded(q[:, order.argsort()], scale)


def _searched(w: torch.Tensor, weight: torch.Tensor, target: Target, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Of each group, the scale whose rounding loses least of the output."""
    parts, weight = w.unflatten(1, (-1, group)), weight.view(-1, group)
    full = parts.abs().amax(-1) / _reach(target)
    best, least = _stored(full, dtype), torch.full_like(full, torch.inf)
    for share in SHRINK:
        scale = _stored(full * share, dtype)
        steps = scale.float()[..., None]
        lost = (((_to_steps(parts / steps, target) * steps - parts) ** 2) * weight).sum(-1)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def _reach(target: Target) -> float:
    """What the largest weight of a group becomes: half a step beyond the largest integer, as in compressed-tensors."""
    return target.top if target.floating else target.top + 0.5


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.where(scale > 0, scale, 1.0).clamp(min=1e-7 if dtype == torch.float16 else 1e-30).to(dtype)


def _to_steps(x: torch.Tensor, target: Target) -> torch.Tensor:
    if target.floating:
        return x.clamp(-E4M3_MAX, E4M3_MAX)
    return x.round().clamp(-target.top - 1, target.top)
