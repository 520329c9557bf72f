"""Puts an engine together: checkpoint, runner, scheduler, loop. Shared by the engine process and the offline `LLM`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.core.device import copy_bandwidth, has_gpu
from engine.core.loop import EngineCore
from engine.core.runner import Runner, available_memory
from engine.core.stages import Stages
from engine.errors import CapacityError
from engine.ledger import Ledger, calibrate
from engine.messages import EngineInfo, EngineOptions
from engine.planner import Machine, check_fit, plan
from engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from engine.core.gpu_runner import GpuRunner

Progress = Callable[[str, float], None]


def build_core(
    options: EngineOptions, on_progress: Progress | None = None, checkpoint: Checkpoint | None = None
) -> tuple[EngineCore, EngineInfo, Checkpoint]:
    """Loads `options.model`, or `checkpoint` where it is open. `on_progress(stage, fraction)` follows it.

    Raises CheckpointError, or CapacityError before a weight is read for what cannot fit."""
    start = time.monotonic()
    stages = on_progress if isinstance(on_progress, Stages) else Stages(on_progress)
    stages("checkpoint")
    checkpoint = checkpoint or open_checkpoint(options.model, options.load_format)
    stages("device")
    runner = _runner(checkpoint, options, stages)
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=runner.max_num_batched_tokens,
        max_model_len=runner.max_model_len,
        enable_prefix_caching=options.enable_prefix_caching,
        contiguous=runner.contiguous,
        eos_token_ids=checkpoint.config.eos_token_ids,
    )
    stages("calibration")
    many = (min(512, runner.max_num_batched_tokens), copy_bandwidth()) if options.device == "cuda" else ()
    roofline = calibrate(lambda tokens: runner.logits([0] * tokens), checkpoint.config, runner.info, *many)
    core = EngineCore(runner, scheduler)
    core.ledger = Ledger(start, time.monotonic(), roofline)
    runner.info.stages = stages.end()
    return core, runner.info, checkpoint


def _runner(checkpoint: Checkpoint, options: EngineOptions, on_progress: Stages) -> Runner | GpuRunner:
    """device "auto" is the CPU: the GPU runner has seen Triton's interpreter only, so it has to be asked for."""
    if options.device == "cuda" and not has_gpu():
        raise CapacityError(
            "device is cuda, and there is no NVIDIA GPU here (Ampere or newer) that PyTorch and Triton can use; "
            "see fen doctor, or choose auto or cpu."
        )
    if options.device == "cuda":
        from engine.core.gpu_runner import GpuRunner  # imports Triton

        memory = int(torch.cuda.mem_get_info()[1] * options.gpu_memory_utilization)
        raised = "a larger --gpu-memory-utilization" if options.gpu_memory_utilization < 0.9 else ""
        check_fit(plan(checkpoint, Machine("the GPU", memory, 1.0, 1.0), options, gpu=True), options, raised)
        return GpuRunner(checkpoint, options, on_progress)
    check_fit(plan(checkpoint, Machine("the CPU", available_memory(), 1.0, 1.0), options), options)
    return Runner(checkpoint, options, on_progress)
