"""Puts an engine together: checkpoint, runner, scheduler, loop. Shared by the engine process and the offline `LLM`."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.core.loop import EngineCore
from engine.core.runner import Runner
from engine.ledger import Ledger, calibrate
from engine.messages import EngineInfo, EngineOptions
from engine.scheduling.scheduler import Scheduler


def build_core(
    options: EngineOptions, on_progress: Callable[[str, float], None] | None = None
) -> tuple[EngineCore, EngineInfo, Checkpoint]:
    """Loads `options.model`. `on_progress(stage, fraction)` follows it. Raises CheckpointError or CapacityError."""
    start = time.monotonic()
    checkpoint = open_checkpoint(options.model, options.load_format)
    runner = Runner(checkpoint, options, on_progress)
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
    roofline = calibrate(lambda tokens: runner.logits([0] * tokens), checkpoint.config, runner.info)
    core = EngineCore(runner, scheduler)
    core.ledger = Ledger(start, time.monotonic(), roofline)
    return core, runner.info, checkpoint
