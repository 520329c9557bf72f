"""Reads safetensors files, one or sharded, by mmap, with the header checked against the file before it is believed.

The format: https://github.com/huggingface/safetensors#format. The library would do, but it loads tensors into a
framework's arrays; here the bytes stay in the file until they are asked for.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from engine.checkpoint.config import read_json
from engine.checkpoint.tensors import FLOATS, StoredTensor, stored_bytes
from engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 1 << 23  # the largest real ones (1,000 tensors) have some 150 kB
_KEPT_TYPES = (*FLOATS, "F8_E4M3", "I8", "I32", "I64")


def safetensors_files(folder: Path) -> dict[Path, list[str]]:
    """The files that hold a folder's model -> the tensors that an index promises in them (none without an index)."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX}: weight_map must be an object of tensor names and file names")
        files: dict[Path, list[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise CheckpointError(f"{folder / INDEX}: {tensor} is in {str(file)[:80]!r}, no file of this folder")
            files.setdefault(folder / file, []).append(tensor)
        return files
    if (folder / "model.safetensors").is_file():
        return {folder / "model.safetensors": []}
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return {found[0]: []}
    if found:
        raise CheckpointError(f"{folder} has {len(found)} .safetensors files and no {INDEX} that joins them")
    return {}


def read_safetensors(files: dict[Path, list[str]]) -> dict[str, StoredTensor]:
    """All tensors of all files by the files' own names; a name that two files hold, or that one lacks, is an error."""
    tensors: dict[str, StoredTensor] = {}
    for path, promised in files.items():
        found = _read_file(path)
        if lacking := [name for name in promised if name not in found]:
            raise CheckpointError(f"{path} lacks {lacking[0]}, which {INDEX} says it holds")
        if twice := [name for name in found if name in tensors]:
            raise CheckpointError(f"{path} holds {twice[0]}, which another file holds too")
        tensors |= found
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a usable safetensors file: {problem}")

    try:
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 10 or length > min(len(buffer) - 8, _MAX_HEADER_BYTES):
        raise fail(f"its header claims {length} bytes, in a file of {len(buffer)} (8 MiB are allowed)")
    try:
        header = json.loads(buffer[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise fail(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise fail("its header is not a JSON object")
    header.pop("__metadata__", None)

    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    data_start, data_size = 8 + length, len(buffer) - 8 - length
    for name, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not _whole_numbers(shape) or len(shape) > 8 or not _whole_numbers(offsets) or len(offsets) != 2:
            raise fail(f"{name[:80]!r} has no proper dtype, shape and data_offsets")
        if dtype not in _KEPT_TYPES:
            raise fail(f"{name[:80]!r} has the dtype {str(dtype)[:40]}; supported: {', '.join(_KEPT_TYPES)}")
        start, end = offsets
        if not start <= end <= data_size:
            raise fail(f"{name[:80]!r} has the data_offsets {offsets}, outside the {data_size} bytes of data")
        if end - start != stored_bytes(dtype, tuple(shape)):
            raise fail(f"{name[:80]!r} has {end - start} bytes, but {dtype} of shape {shape} takes another number")
        spans.append((start, end, name))
        raw = np.frombuffer(buffer, np.uint8, end - start, data_start + start)
        tensors[name] = StoredTensor(name, dtype, tuple(shape), raw)
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise fail(f"{name[:80]!r} overlaps another tensor or leaves a hole before it")
        position = end
    if position != data_size:
        raise fail(f"its tensors take {position} bytes, but {data_size} follow the header")
    return tensors


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 1 << 60 for i in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("it has the same name twice")
    return result
