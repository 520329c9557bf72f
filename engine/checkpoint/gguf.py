"""Reads a GGUF file by mmap with every count, length and offset checked against the file before it is believed.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. The `gguf`
package supplies the tables of the rarer block types; its reader is not used, because it trusts the counts in the file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.checkpoint.tensors import BLOCKS, StoredTensor
from engine.errors import CheckpointError

log = logging.getLogger(__name__)

_KEPT_TYPES = {
    0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K",
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Far above any real model (the largest vocabularies have 300,000 tokens and 500,000 merges), and low enough that a
# hostile header of legal counts is still turned down within a second.
_MAX_HEADER_BYTES = 1 << 28
_MAX_STRINGS = 2_000_000
_MAX_ENTRIES = 100_000
_MAX_DIMENSION = 1 << 40


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """metadata: strings, numbers and bools; arrays are lists of str or numpy vectors. tensors: by the file's own names.

    types: the type each tensor has in the file; the tensor's `dtype` is another one where it is dequantised on reading.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    types: dict[str, str]


class _Header:
    """A cursor over the mapped file that cannot leave it."""

    def __init__(self, path: Path, buffer: mmap.mmap):
        self.path, self.buffer, self.position = path, buffer, 0
        self.limit = min(len(buffer), _MAX_HEADER_BYTES)
        self.strings_left = _MAX_STRINGS

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is not a usable GGUF file: {message}")

    def need(self, count: int, field: str) -> None:
        if count > self.limit - self.position:
            left = self.limit - self.position
            raise self.fail(f"{field} needs {count} bytes at offset {self.position}, where {left} are left")

    def number(self, code: str, field: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, field)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.position)
        self.position += size
        return value

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        """`count` strings in one tight loop: a vocabulary of 50,000 tokens and its merges take tens of milliseconds."""
        self.need(8 * count, field)  # each has a length of 8 bytes, so a false count fails before anything is allocated
        self.strings_left -= count
        if self.strings_left < 0:
            raise self.fail(f"{field} brings the number of strings over {_MAX_STRINGS}")
        buffer, limit, position, result = self.buffer, self.limit, self.position, []
        length_at = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(buffer, position)[0]
                if position > limit:
                    raise self.fail(f"{field} has a string of {position - start} bytes at offset {start}, past the end")
                result.append(str(buffer[start:position], "utf-8"))
        except struct.error:
            raise self.fail(f"{field} runs past the end of the file") from None
        except UnicodeDecodeError:
            raise self.fail(f"{field} is not UTF-8 text") from None
        self.position = position
        return result

    def array(self, field: str) -> list[str] | npt.NDArray[Any]:
        kind, count = self.number("I", field), self.number("Q", field)
        if kind == _STRING:
            return self.strings(count, field)
        if kind == _ARRAY:
            raise self.fail(f"{field} is an array of arrays, which no key that this engine reads is")
        if kind not in _SCALARS:
            raise self.fail(f"{field} is an array of unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        self.need(count * dtype.itemsize, field)
        values = np.frombuffer(self.buffer, dtype, count, self.position).copy()
        self.position += count * dtype.itemsize
        return values

    def value(self, field: str) -> Any:
        kind = self.number("I", field)
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self.array(field)
        if kind not in _SCALARS:
            raise self.fail(f"{field} has the unknown value type {kind}")
        return self.number(_SCALARS[kind], field)


def read_gguf(path: Path) -> GgufFile:
    """Parses the header; tensor bytes stay in the file until touched. Raises CheckpointError naming the field."""
    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    header = _Header(path, buffer)
    header.need(24, "the fixed header")
    if buffer[:4] != b"GGUF":
        raise header.fail(f"it begins with {buffer[:4]!r} instead of b'GGUF'")
    header.position = 4
    version = header.number("I", "version")
    if version not in (2, 3):
        hint = " (a big-endian file)" if version in (0x02000000, 0x03000000) else ""
        raise header.fail(f"version is {version}{hint}; little-endian versions 2 and 3 are supported")
    tensor_count, entry_count = header.number("Q", "tensor_count"), header.number("Q", "metadata_kv_count")
    # The smallest entry has a key, a type and a byte of value; the smallest tensor a name, one dimension, type, offset.
    for field, count, smallest in (("metadata_kv_count", entry_count, 14), ("tensor_count", tensor_count, 33)):
        if count > min(_MAX_ENTRIES, (header.limit - header.position) // smallest):
            raise header.fail(f"{field} is {count}, more than a file of {len(buffer)} bytes can hold")

    metadata: dict[str, Any] = {}
    for index in range(entry_count):
        key = header.string(f"key {index} of the metadata")
        if key in metadata:
            raise header.fail(f"the metadata has the key {key[:80]!r} twice")
        metadata[key] = header.value(key[:80])
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise header.fail(f"general.alignment is {str(alignment)[:40]}; it must be a power of two from 8 to 65536")
    if metadata.get("split.count", 0) not in (0, 1):
        raise header.fail("split.count says it is one of several parts; merge them with `gguf-split --merge` first")

    entries = [_tensor_entry(header, index) for index in range(tensor_count)]
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    types: dict[str, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise header.fail(f"the tensor {name!r} is listed twice")
        kind, block, block_bytes = _type(type_id, name, header)
        if shape[-1] % block:
            raise header.fail(f"the rows of {name!r} have {shape[-1]} elements, not whole {kind} blocks of {block}")
        size = math.prod(shape) // block * block_bytes
        start = data_start + offset
        if offset % alignment:
            raise header.fail(f"the offset {offset} of {name!r} is not a multiple of general.alignment, {alignment}")
        if start + size > len(buffer):
            raise header.fail(f"{name!r} ends at byte {start + size}, the file at {len(buffer)} (is it cut short?)")
        spans.append((start, start + size, name))
        raw = np.frombuffer(buffer, np.uint8, size, start)
        types[name] = kind
        if type_id in _KEPT_TYPES:
            tensors[name] = StoredTensor(name, kind, shape, raw)
        else:
            tensors[name] = StoredTensor(name, "F32", shape, functools.partial(_dequantize, raw, shape, type_id))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise header.fail(f"the tensors {first!r} and {second!r} overlap")
    if others := sorted(set(types.values()) - set(_KEPT_TYPES.values())):
        log.warning(
            "%s: %s tensors are dequantised to float32 on loading; %s are kept as they are",
            path.name, ", ".join(others), ", ".join(_KEPT_TYPES.values()),
        )  # fmt: skip
    return GgufFile(path, metadata, tensors, types)


def _tensor_entry(header: _Header, index: int) -> tuple[str, tuple[int, ...], int, int]:
    """name, row-major shape (the file lists the fastest dimension first), type number, offset in the data section."""
    name = header.string(f"the name of tensor {index}")
    if not 0 < len(name) <= 256:
        raise header.fail(f"the name of tensor {index} has {len(name)} characters; 1 to 256 are allowed")
    dimensions = header.number("I", f"the dimensions of {name!r}")
    if not 1 <= dimensions <= 4:
        raise header.fail(f"{name!r} has {dimensions} dimensions; 1 to 4 are allowed")
    shape = tuple(header.number("Q", f"the shape of {name!r}") for _ in range(dimensions))[::-1]
    if not all(0 < size <= _MAX_DIMENSION for size in shape) or math.prod(shape) > _MAX_DIMENSION:
        raise header.fail(f"the shape of {name!r} is {shape}, which no tensor has")
    return name, shape, header.number("I", f"the type of {name!r}"), header.number("Q", f"the offset of {name!r}")


def _type(type_id: int, tensor: str, header: _Header) -> tuple[str, int, int]:
    """Name, elements of a block and bytes of a block of a GGUF type; the rarer ones are the `gguf` package's."""
    if type_id in _KEPT_TYPES:
        kind = _KEPT_TYPES[type_id]
        return kind, *BLOCKS[kind]
    try:
        return _rare_type(type_id)
    except ValueError:
        raise header.fail(f"the type of {tensor!r} is {type_id}, which is unknown") from None
    except NotImplementedError as error:
        kept = ", ".join(_KEPT_TYPES.values())
        raise header.fail(
            f"{tensor!r} is stored as {error}, which cannot be dequantised; {kept} and all K and I quants can be read"
        ) from None


@functools.cache
def _rare_type(type_id: int) -> tuple[str, int, int]:
    """Raises ValueError for a number that is no type, NotImplementedError(name) for one that cannot be dequantised."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # only here: importing it takes 0.1 s
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(type_id)
    block, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        raise NotImplementedError(kind.name) from None
    return kind.name, block, size


def _dequantize(raw: npt.NDArray[np.uint8], shape: tuple[int, ...], type_id: int) -> npt.NDArray[Any]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = raw.reshape(math.prod(shape[:-1]), -1)
    values: npt.NDArray[Any] = dequantize(rows, GGMLQuantizationType(type_id)).astype(np.float32, copy=False)
    return values.reshape(shape)
