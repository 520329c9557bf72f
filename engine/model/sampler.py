"""Logits -> tokens, each request by its own parameters and its own random stream (kernels.cpu.philox), so that what
else is in the batch changes nothing. kernels.oracle.sample says the same plainly; the tests compare."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import torch

from engine.messages import SamplingParams, TokenLogprob
from engine.scheduling.sequence import Sequence
from kernels.cpu.philox import gumbel_of

NOISE_RANGE = 19.6  # nats between the largest and the smallest Gumbel value: a token further behind cannot win


@dataclasses.dataclass(slots=True)
class Seen:
    """Which tokens a request with penalties has seen; follows `sequence.tokens`."""

    counts: torch.Tensor  # int32 [V]: how often generated
    in_prompt: torch.Tensor  # bool [V]
    length: int  # tokens counted so far


class Sampler:
    """Picks one token a row. `eos_token_ids`: banned while fewer than min_tokens were generated. `seed`: of requests
    that bring none; mixed with their id."""

    def __init__(self, eos_token_ids: tuple[int, ...], seed: int):
        self._eos = eos_token_ids
        self._seed = seed
        self._seen: dict[str, Seen] = {}

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
        """logits float32 [S, V], row i for the next token of sequences[i]. None where a row is not finite at its
        maximum, or its grammar cannot be followed."""
        best, argmax = logits.max(-1)
        best_values, tokens = best.tolist(), argmax.tolist()
        chosen: list[int | None] = []
        for row, sequence in enumerate(sequences):
            if not math.isfinite(best_values[row]):
                chosen.append(None)
                continue
            params = sequence.request.params
            scores = logits[row]
            if _adjusts(params, sequence):
                scores = self._adjust(scores, sequence)
                if sequence.guide is not None and sequence.guide.error:
                    chosen.append(None)
                    continue
                if params.temperature == 0:
                    tokens[row] = int(scores.argmax())
            chosen.append(tokens[row] if params.temperature == 0 else self._draw(scores, sequence))
        return chosen

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence.id, None)

    def _adjust(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """Bias, the repetition penalty on all tokens seen, presence and frequency on those generated; the grammar."""
        params = sequence.request.params
        scores = logits.clone()
        if params.logit_bias:
            scores[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()))
        if _penalises(params):
            seen = self._update_seen(sequence, scores.shape[0])
            generated = seen.counts > 0
            if params.repetition_penalty != 1:
                penalised = torch.where(
                    scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty
                )
                scores = torch.where(seen.in_prompt | generated, penalised, scores)
            scores -= params.presence_penalty * generated + params.frequency_penalty * seen.counts
        if sequence.guide is not None:
            allowed = sequence.guide.allowed(sequence.held)
            scores.masked_fill_(torch.from_numpy(~allowed), -torch.inf)
        elif sequence.held:
            scores[list(sequence.held)] = -torch.inf
        return scores

    def _update_seen(self, sequence: Sequence, vocab_size: int) -> Seen:
        seen = self._seen.get(sequence.id)
        if seen is None:
            in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
            in_prompt[sequence.request.prompt] = True
            seen = Seen(torch.zeros(vocab_size, dtype=torch.int32), in_prompt, sequence.prompt_len)
            self._seen[sequence.id] = seen
        for token in sequence.tokens[seen.length :]:
            seen.counts[token] += 1
        seen.length = len(sequence.tokens)
        return seen

    def _draw(self, scores: torch.Tensor, sequence: Sequence) -> int:
        """Gumbel-max over the tokens that the truncations keep: argmax of scores / temperature + noise."""
        params = sequence.request.params
        scaled = scores / params.temperature
        top = scaled.max().item()
        floor = max(_floor(scaled, params), top - NOISE_RANGE)
        ids = (scaled >= floor).nonzero().view(-1)
        if len(ids) == 1:
            return int(ids[0])
        seed = seed_of(sequence, self._seed)
        noise = gumbel_of(ids.numpy().astype(np.uint32), seed, params.stream, len(sequence.tokens))
        return int(ids[(scaled[ids] + noise).argmax()])


def seed_of(sequence: Sequence, engine_seed: int) -> int:
    """The request's own, else one made of the engine's and the request's id."""
    if sequence.request.params.seed is not None:
        return sequence.request.params.seed
    key = engine_seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(sequence.id.encode(), digest_size=8, key=key)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _adjusts(params: SamplingParams, sequence: Sequence) -> bool:
    biased = bool(params.logit_bias) or _penalises(params) or sequence.num_generated < params.min_tokens
    return biased or sequence.guide is not None


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _floor(scaled: torch.Tensor, params: SamplingParams) -> float:
    """The smallest score that top-k, top-p and min-p keep; equal scores stay or go together."""
    floor = -math.inf
    vocab_size = scaled.shape[0]
    if 0 < params.top_k < vocab_size:
        floor = scaled.topk(params.top_k).values[-1].item()
    if params.top_p < 1:
        kept = scaled[scaled >= floor]
        total = kept.double().logsumexp(0)
        for count in (64, 1024, len(kept)):  # most of the mass is mostly in few tokens: rarely is all to be sorted
            count = min(count, len(kept))
            order = kept.topk(count).values
            mass = (order.double() - total).exp().cumsum(0)
            if count == len(kept) or mass[-1] >= params.top_p:
                break
        floor = order[min(int((mass < params.top_p).sum()), count - 1)].item()
    if params.min_p > 0:
        floor = max(floor, scaled.max().item() + math.log(params.min_p))
    return floor


def token_logprobs(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Of each row of logits float32 [S, V]: the log-probability and rank of tokens[i], and the counts[i] best."""
    values = logits.log_softmax(-1)
    chosen = values.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))
    ranks = (values > chosen).sum(-1).add_(1).tolist()
    best, ids = values.topk(min(max(counts, default=0), values.shape[1]), -1)
    result = []
    for token, logprob, rank, n, row, row_ids in zip(
        tokens, chosen.view(-1).tolist(), ranks, counts, best.tolist(), ids.tolist(), strict=True
    ):
        result.append(TokenLogprob(token, logprob, rank, list(zip(row_ids[:n], row[:n], strict=True))))
    return result
