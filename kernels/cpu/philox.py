"""The sampler's random numbers on a CPU: Philox4x32-10 (Salmon et al., SC11), counter-based, so a draw depends on
nothing but its name.

The noise of token v of a request is lane v % 4 of philox(counter = (v // 4, position, stream, 0), key = (seed & 2^32-1,
seed >> 32)): the same whatever else is in the batch, and the same on a GPU (kernels.gpu.sample). A 32-bit word x
becomes u = ((x >> 9) + 0.5) * 2^-23, which float32 holds exactly and which is never 0 or 1, and then a standard Gumbel
variable -log(-log(u)), between -2.9 and 16.7. argmax(log p + Gumbel) is a draw from p.
"""

from __future__ import annotations

import numpy as np
import torch

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(blocks: np.ndarray, position: int, stream: int, seed: int) -> np.ndarray:
    """uint32 [n, 4]: the four words of each counter (block, position, stream, 0); blocks uint32 [n], seed any 64-bit
    integer."""
    mask = 0xFFFFFFFF
    x = np.empty((2, blocks.size), np.uint32)  # words 0 and 2 of the counter, multiplied in each round
    y = np.empty((2, blocks.size), np.uint32)  # words 1 and 3
    x[0], x[1], y[0], y[1] = blocks, stream & mask, position & mask, 0
    key0, key1 = seed & mask, seed >> 32 & mask
    products = [
        np.empty((2, blocks.size), np.uint64) for _ in range(2)
    ]  # two, because y is a view of the previous round's
    for i in range(10):
        np.multiply(x, _MULTIPLIERS, out=products[i % 2])
        halves = products[i % 2].view(np.uint32).reshape(2, -1, 2)[::-1]  # little-endian: low word, high word
        np.bitwise_xor(halves[:, :, 1], y, out=x)
        x ^= np.array([[key0], [key1]], dtype=np.uint32)
        y = halves[:, :, 0]
        key0, key1 = key0 + _WEYL[0] & mask, key1 + _WEYL[1] & mask
    return np.stack([x[0], y[0], x[1], y[1]], axis=1)


def gumbel_of(tokens: np.ndarray, seed: int, stream: int, position: int) -> torch.Tensor:
    """float32 [n]: the Gumbel noise of tokens uint32 [n] for the draw at `position` of random stream (seed, stream)."""
    words = philox(tokens >> 2, position, stream, seed)[np.arange(tokens.size), tokens & 3]
    return _gumbel(words)


def gumbel(vocab_size: int, seed: int, stream: int, position: int) -> torch.Tensor:
    """float32 [vocab_size]: the same for all tokens 0 .. vocab_size - 1."""
    words = philox(np.arange(-(-vocab_size // 4), dtype=np.uint32), position, stream, seed).reshape(-1)[:vocab_size]
    return _gumbel(words)


def _gumbel(words: np.ndarray) -> torch.Tensor:
    u = torch.from_numpy((words >> np.uint32(9)).astype(np.float32)).add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()
