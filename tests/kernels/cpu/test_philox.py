"""The CPU's random numbers against Philox's published vectors and the plain oracle."""

import numpy as np
import torch

from kernels.cpu.philox import gumbel, philox
from kernels.oracle import sample as oracle


def test_published_vectors():
    """The known-answer tests of the Random123 library."""
    ones = 0xFFFFFFFF
    assert oracle.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert oracle.philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert oracle.philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_fast_equals_oracle():
    for seed, stream, position in ((0, 0, 0), (2**63 - 1, 3, 8191), (-5, 2**31, 7)):
        blocks = np.array([0, 1, 77, 2**32 - 1], dtype=np.uint32)
        key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        want = [oracle.philox((int(b), position, stream, 0), key) for b in blocks]
        assert philox(blocks, position, stream, seed).tolist() == [list(w) for w in want]
        torch.testing.assert_close(
            gumbel(1001, seed, stream, position), oracle.gumbel(1001, seed, stream, position), rtol=3e-5, atol=3e-6
        )


def test_noise_is_gumbel_and_draws_follow_the_distribution():
    noise = gumbel(1 << 18, 1, 0, 0)
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - 1.6449) < 0.02
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    draws = torch.stack([(p.log() + gumbel(4, 9, 0, i)).argmax() for i in range(8000)])
    share = torch.bincount(draws, minlength=4) / 8000
    assert (share - p).abs().max() < 0.02, share
