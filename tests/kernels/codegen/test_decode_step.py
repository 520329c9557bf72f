"""A whole decode step on the fake driver: how many launches it makes, and that a growing batch compiles nothing."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from engine.checkpoint.names import expected_shapes
from engine.checkpoint.tensors import stored_bytes
from engine.core.gpu_runner import GpuRunner
from engine.core.loop import EngineCore
from engine.messages import EngineOptions, Request, SamplingParams
from engine.scheduling.scheduler import Scheduler
from kernels.gpu import attention, fused, linear_w4, linear_w8, sample, tiles
from tests.kernels.support import fake_driver

KERNELS = (
    attention.decode_kernel,
    attention.prefill_kernel,
    fused.add_rmsnorm_kernel,
    fused.quantise_rows_kernel,
    fused.rope_kernel,
    fused.silu_mul_kernel,
    linear_w4.w4a16_kernel,
    linear_w8.w8_kernel,
    sample.sample_kernel,
)
SILENT = (  # views, and memory that is only reserved
    "empty", "view", "slice", "select", "split", "t", "transpose", "as_strided", "expand", "detach", "flatten",
    "resolve_conj", "resolve_neg",
)  # fmt: skip


class TorchLaunches(TorchDispatchMode):
    """Counts torch's own operators that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        name = "matmul" if name in ("linear", "mm", "addmm") else name
        if name not in SILENT and not (name == "to" and result is args[0]):
            self.count[name] += 1
        return result


@pytest.fixture(scope="module")
def driver() -> Iterator[fake_driver.FakeDriver]:
    tiles.current_gpu.cache_clear()
    for kernel in KERNELS:
        kernel.device_caches.clear()  # what another test compiled reports its launches to another driver
    yield fake_driver.install(90)
    tiles.current_gpu.cache_clear()


def checkpoint_of(layers: int, kind: str) -> Checkpoint:
    """SmolLM2's shape with fewer layers and tokens; every weight is zero. W8A8, FP8: with random ones."""
    if kind in ("W8A8", "FP8"):
        dummy = open_checkpoint(f"smollm2-135m-{kind.lower()}", "dummy")
        return dataclasses.replace(dummy, config=dataclasses.replace(dummy.config, num_layers=layers))
    dummy = open_checkpoint("smollm2-135m", "dummy")
    config = dataclasses.replace(dummy.config, num_layers=layers, vocab_size=8192)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        dtype = kind if len(shape) == 2 else "F32"
        tensors[name] = StoredTensor(name, dtype, shape, np.zeros(stored_bytes(dtype, shape), np.uint8))
    return dataclasses.replace(dummy, config=config, tensors=tensors, quantization=kind)


def core_of(layers: int, kind: str, fusions: str = "none") -> EngineCore:
    options = EngineOptions(
        max_num_seqs=16, max_num_batched_tokens=64, kv_cache_tokens=4096, max_model_len=512, fusions=fusions
    )
    runner = GpuRunner(checkpoint_of(layers, kind), options, device=torch.device("cpu"))
    return EngineCore(runner, Scheduler(runner.num_blocks, runner.block_size, 16, 64, runner.max_model_len))


def decode(core: EngineCore, batch: int, driver: fake_driver.FakeDriver) -> Counter[str]:
    """The launches of one decode step of this many sequences."""
    params = SamplingParams(temperature=0.0, max_tokens=6)
    for i in range(batch):
        core.add(Request(id=f"{batch}-{i}", prompt=[1, 2], params=params))
    for _ in range(2):  # prompts, and a decode
        core.step()
    driver.launches.clear()
    with TorchLaunches() as torch_launches:
        core.step()
    counted = Counter(driver.launches) + torch_launches.count
    while core.has_work:
        core.step()
    return counted


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "BF16"])
def test_nine_launches_a_layer(driver: fake_driver.FakeDriver, kind: str) -> None:
    """norm, qkv, rope and cache, attention, o, norm, gate and up, silu, down; quantised matmuls are ours."""
    two, three = (decode(core_of(layers, kind), 3, driver) for layers in (2, 3))
    layer = three - two
    matmul = {{"Q4_1": "w4a16_kernel", "Q8_0": "w8_kernel"}.get(kind, "matmul"): 4}
    assert layer == {"add_rmsnorm_kernel": 2, "rope_kernel": 1, "decode_kernel": 1, "silu_mul_kernel": 1} | matmul
    assert sum(layer.values()) <= 9
    # Outside of the layers: inputs and the fed token, embedding, last norm, head, sampling, the tokens' way back.
    assert sum(two.values()) - 2 * 9 <= 12, two


@pytest.mark.parametrize("kind", ["W8A8", "FP8"])
def test_ten_launches_with_rounded_activations(driver: fake_driver.FakeDriver, kind: str) -> None:
    """The nine, and one that rounds what attention gives to o; norm and silu round what they make themselves."""
    two, three = (decode(core_of(layers, kind), 3, driver) for layers in (2, 3))
    others = {"rope_kernel": 1, "decode_kernel": 1, "silu_mul_kernel": 1, "quantise_rows_kernel": 1}
    assert three - two == others | {"add_rmsnorm_kernel": 2, "w8_kernel": 4}


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_six_launches_a_layer_with_all_fusions(driver: fake_driver.FakeDriver, kind: str) -> None:
    """qkv, rope and cache, attention, o with residual and norm, gate and up with silu, down with residual and norm."""
    two, three = (decode(core_of(layers, kind, "all"), 3, driver) for layers in (2, 3))
    matmul = {"Q4_1": "w4a16_kernel", "Q8_0": "w8_kernel"}[kind]
    assert three - two == {"rope_kernel": 1, "decode_kernel": 1, matmul: 4}
    assert sum(two.values()) - 2 * 6 <= 13, two  # as below nine, and the norm before the first layer


@pytest.mark.parametrize("fusions", ["none", "all"])
def test_a_growing_batch_compiles_nothing(driver: fake_driver.FakeDriver, fusions: str) -> None:
    core = core_of(2, "Q4_1", fusions)
    decode(core, 1, driver)

    def variants() -> list[int]:
        return [fake_driver.variants(kernel) for kernel in KERNELS]

    before = variants()
    for batch in (2, 3, 5, 8, 11, 16):
        decode(core, batch, driver)
    after = variants()
    prompts = KERNELS.index(linear_w4.w4a16_kernel)  # prompts are longer than 16 rows from batch 11 on: another tile
    assert after[prompts] - before[prompts] <= {"none": 1, "all": 3}[fusions]  # for each epilogue
    assert before[:prompts] + before[prompts + 1 :] == after[:prompts] + after[prompts + 1 :]


def test_rehearsal_compiles_what_serving_needs(driver: fake_driver.FakeDriver) -> None:
    """Every bucket of rows, of prompts and of decodes: a step that compiled would wait for seconds."""
    options = EngineOptions(max_num_seqs=48, max_num_batched_tokens=512, kv_cache_tokens=8192, max_model_len=512)
    runner = GpuRunner(checkpoint_of(1, "Q4_1"), options, device=torch.device("cpu"))
    runner.rehearse()
    before = [fake_driver.variants(kernel) for kernel in KERNELS]
    core = EngineCore(runner, Scheduler(runner.num_blocks, runner.block_size, 48, 512, runner.max_model_len))
    for length in (1, 3, 17, 40, 64, 100, 129, 500):
        core.add(Request(id=f"p{length}", prompt=[1] * length, params=SamplingParams(temperature=0.0, max_tokens=2)))
        while core.has_work:
            core.step()
    for batch in (1, 20, 40):
        decode(core, batch, driver)
    assert [fake_driver.variants(kernel) for kernel in KERNELS] == before


def test_an_engine_that_is_gone_is_gone(driver: fake_driver.FakeDriver) -> None:
    core = core_of(1, "Q4_1")
    decode(core, 2, driver)
    runner = weakref.ref(core.runner)
    del core
    gc.collect()
    assert runner() is None
