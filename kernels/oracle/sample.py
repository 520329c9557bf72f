"""Sampling written down plainly, one request at a time, with a sort: what kernels.gpu.sample and the CPU sampler must
equal."""

from __future__ import annotations

import torch

NOISE_RANGE = 19.5  # nats between the largest and the smallest Gumbel value that 23 bits give


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, as in the paper (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3; SC11)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def gumbel(vocab_size: int, seed: int, stream: int, position: int) -> torch.Tensor:
    """float32 [vocab_size]: token v's noise is lane v % 4 of philox((v // 4, position, stream, 0), (low, high word of
    seed))."""
    key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    words = [w for block in range(-(-vocab_size // 4)) for w in philox((block, position, stream, 0), key)]
    u = (torch.tensor(words[:vocab_size]) >> 9).double().add(0.5).mul(2.0**-23)
    return -torch.log(-torch.log(u)).float()


def penalise(
    logits: torch.Tensor,
    *,
    output_counts: torch.Tensor,
    in_prompt: torch.Tensor,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    bias: dict[int, float] | None = None,
) -> torch.Tensor:
    """float32 [V]: bias first, then the repetition penalty on every token seen (prompt or output; divides what is
    positive, multiplies what is not), then presence and frequency on what the request has generated.

    logits [V]; output_counts int [V], how often each token was generated; in_prompt bool [V].
    """
    scores = logits.float().clone()
    for token, value in (bias or {}).items():
        scores[token] += value
    seen = in_prompt | (output_counts > 0)
    scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    return scores - presence * (output_counts > 0) - frequency * output_counts


def kept(scores: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """bool [V]: the tokens that may be drawn; scores [V] are already divided by the temperature. Equal scores stay or
    go together.

    top_k: the k most likely. top_p: the most likely tokens until their share of what top_k left reaches top_p, the one
    that crosses included. min_p: those at least min_p times as likely as the most likely. 0, 1 and 0 switch them off.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.numel():
        keep &= scores >= scores.topk(top_k).values[-1]
    if top_p < 1:
        order = torch.where(keep, scores, -torch.inf).sort(descending=True).values
        mass = order.double().softmax(0).cumsum(0)
        keep &= scores >= order[min(int((mass < top_p).sum()), scores.numel() - 1)]
    if min_p > 0:
        keep &= scores >= scores.max() + torch.log(torch.tensor(min_p))
    return keep


def draw(scores: torch.Tensor, noise: torch.Tensor, temperature: float, **truncation: float) -> int:
    """The token drawn: argmax of scores / temperature + noise over the kept ones; at temperature 0 the argmax of
    scores, lowest id on ties."""
    if temperature == 0:
        return int((scores == scores.max()).nonzero()[0])
    scaled = scores / temperature
    return int(torch.where(kept(scaled, **truncation), scaled + noise, -torch.inf).argmax())  # type: ignore[arg-type]


def logprobs(logits: torch.Tensor, token: int, n: int) -> tuple[float, int, list[tuple[int, float]]]:
    """Log-probability and rank (1: most likely) of token under softmax(logits [V]); the n most likely (id,
    log-probability), ties by id."""
    values = logits.double().log_softmax(0)
    order = values.sort(descending=True, stable=True).indices[:n]
    rank = 1 + int((values > values[token]).sum())
    return values[token].item(), rank, [(int(i), values[i].item()) for i in order]
