"""A tensor as it lies in a file: its stored type, its shape and its bytes."""

from __future__ import annotations

import dataclasses
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

# Stored type -> (elements in a block, bytes of a block); a dense type is a block of one element.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
}

Bytes = npt.NDArray[np.uint8]


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this stored type and shape takes; the last dimension holds whole blocks."""
    elements, size = BLOCKS[dtype]
    return math.prod(shape) // elements * size


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """dtype: "F32", "F16", "BF16", or a GGUF block type such as "Q4_1" (kept as it is); the keys of `BLOCKS`.

    shape: logical shape, row-major ([out, in] for a linear weight).
    source: uint8 view of the file's bytes (memory-mapped, read-only, one-dimensional), or a function that makes the
        bytes when they are asked for (dummy weights, types that are dequantised).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]

    @property
    def data(self) -> Bytes:
        """The bytes, uint8 [nbytes]. Made anew at each access where `source` is a function: ask once."""
        source = self.source() if callable(self.source) else self.source
        return source.reshape(-1).view(np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of `data`, without touching them."""
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
