"""A tensor as it lies in a file: its stored type, its shape and its bytes."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Stored type -> (elements in a block, bytes of a block); a dense type is a block of one element.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "F8_E4M3": (1, 1),
    "I8": (1, 1),
    "I32": (1, 4),
    "I64": (1, 8),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
FLOATS = ("F32", "F16", "BF16")

Bytes = npt.NDArray[np.uint8]


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this stored type and shape takes; the last dimension holds whole blocks."""
    elements, size = BLOCKS[dtype]
    return math.prod(shape) // elements * size


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """dtype: a key of `BLOCKS`, kept as it is; or, of a weight that lies in several tensors, how those make it up
        (engine.checkpoint.quantized).

    shape: logical shape, row-major ([out, in] for a linear weight).
    source: uint8 view of the file's bytes (memory-mapped, read-only, one-dimensional), or a function that makes the
        bytes when they are asked for (dummy weights, types that are dequantised).
    parts: the tensors that make up a quantised weight, by the last part of their names ("qweight", "scales", ...).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]
    parts: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)

    @property
    def data(self) -> Bytes:
        """The bytes, uint8 [nbytes]. Made anew at each access where `source` is a function: ask once."""
        source = self.source() if callable(self.source) else self.source
        return source.reshape(-1).view(np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of `data` or of all parts, without touching them."""
        if self.parts:
            return sum(part.nbytes for part in self.parts.values())
        return stored_bytes(self.dtype, self.shape)

    def drop_pages(self) -> None:
        """Gives back the memory of the file's mapping: pages that were read count as this process's until then. They
        are read again when touched."""
        base: Any = self.source
        while isinstance(base, np.ndarray):
            base = base.base
        mapping = base.obj if isinstance(base, memoryview) else base
        if isinstance(mapping, mmap.mmap) and hasattr(mapping, "madvise"):
            mapping.madvise(mmap.MADV_DONTNEED)
