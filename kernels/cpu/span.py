"""Where a sequence's part of a step lies, in the batch and in the paged cache."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(slots=True)
class Span:
    """One sequence in a step: queries are its last `rows` positions of `length`, rows `row`.. of the batch.

    blocks: its block table as far as needed, int64 [P]; None when block_0 .. are consecutive from `first` (a slot).
    """

    row: int
    rows: int
    length: int
    first: int
    blocks: torch.Tensor | None
