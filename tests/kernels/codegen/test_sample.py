"""Sampling: machine code and launches."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu import sample
from tests.kernels.support import fake_driver
from tests.kernels.support.codegen import MachineCode, compile_only

GPUS = (80, 89, 90)


@pytest.mark.parametrize(("capability", "logits"), ((80, "bf16"), (89, "fp32"), (90, "fp32"), (90, "bf16")))
def test_sample(capability: int, logits: str) -> None:
    types = dict(logits=f"*{logits}", slots="*i32", positions="*i32", floats="*fp32", ints="*i32", seen="*i32")
    types |= dict(
        bias_ids="*i32", bias_values="*fp32", masks="*i32", tokens="*i32", scores="*fp32", part_values="*fp32"
    )
    types |= dict(
        part_tokens="*i32", counters="*i32", V="i32", parts="i32", s_logits="i32", s_bias="i32", s_masks="i32"
    )
    compiled = compile_only(
        sample.sample_kernel,
        types,
        dict(BLOCK=sample.BLOCK, PARTS=32),
        capability,
        num_warps=16,
        num_stages=3,
        divisible_by_16=("V", "s_logits", "s_bias", "s_masks"),
    )
    code = MachineCode(compiled)
    assert code.spills == 0 and code.registers <= 128  # 512 threads
    assert (
        code.widths("LDG")["128"] >= 8 and code.widths("STG")["128"] == 2
    )  # rows are read and written 16 bytes at a time
    # The fast logarithm is 0 for the numbers next to 1: its Gumbel noise would be infinite.
    assert "lg2.approx" not in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", GPUS)
def test_logprobs(capability: int) -> None:
    types = dict(logits="*fp32", tokens="*i32", out="*fp32", ranks="*i32", top_tokens="*i32", top_logprobs="*fp32")
    types |= dict(V="i32", s_logits="i32")
    compiled = compile_only(
        sample.logprobs_kernel,
        types,
        dict(N=20, BLOCK=sample.BLOCK, PARTS=32),
        capability,
        num_warps=16,
        num_stages=3,
        divisible_by_16=("V", "s_logits"),
    )
    code = MachineCode(compiled)
    assert code.spills == 0 and code.registers <= 64 and code.widths("LDG")["128"] >= 6


def test_one_launch_and_no_recompilation() -> None:
    driver = fake_driver.install(90)
    vocab_size = 49152
    table, workspace = sample.SamplingTable(64, vocab_size, "cpu"), sample.SampleWorkspace(64, vocab_size, "cpu")
    sample.sample_kernel.device_caches.clear()  # what another test compiled reports its launches to another driver
    before = fake_driver.variants(sample.sample_kernel)
    for calls, rows in enumerate((1, 2, 16, 17, 64), 1):
        indices = torch.zeros(rows, dtype=torch.int32)
        sample.sample(torch.zeros(rows, vocab_size), indices, indices, table, indices, workspace)
        assert dict(driver.launches) == {"sample_kernel": calls}
    assert fake_driver.variants(sample.sample_kernel) == before + 1
