"""Request state, block pool and scheduler. Pure Python: no torch, no tensors, no clock."""

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Chunk, Schedule, Scheduler
from engine.scheduling.sequence import Sequence, State

__all__ = ["BlockPool", "Chunk", "Schedule", "Scheduler", "Sequence", "State"]
