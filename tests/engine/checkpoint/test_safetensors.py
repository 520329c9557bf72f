"""safetensors: exact reading, single and sharded; headers that lie are errors; pickles are never opened."""

from __future__ import annotations

import contextlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from engine.checkpoint import open_checkpoint
from engine.checkpoint.safetensors import INDEX, read_safetensors, safetensors_files
from engine.errors import CheckpointError


def read(folder: Path) -> dict[str, Any]:
    return read_safetensors(safetensors_files(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_same_bytes_as_the_library(random_checkpoint: Callable[..., Path], dtype: str) -> None:
    import torch

    folder = random_checkpoint(dtype=dtype)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantization == checkpoint.config.dtype == dtype
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(checkpoint.tensors)
        for name in file.keys():  # noqa: SIM118
            theirs, ours = file.get_tensor(name), checkpoint.tensors[name]
            assert ours.shape == tuple(theirs.shape)
            assert np.array_equal(ours.data, theirs.reshape(-1).view(torch.uint8).numpy())


def test_sharded_equals_single(random_checkpoint: Callable[..., Path]) -> None:
    single, sharded = random_checkpoint(dtype="bfloat16"), random_checkpoint(dtype="bfloat16", max_shard_size="80KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / INDEX).is_file()
    one, many = open_checkpoint(str(single)), open_checkpoint(str(sharded))
    assert list(one.tensors) == list(many.tensors) and one.total_bytes == many.total_bytes
    assert {name: t.shape for name, t in one.tensors.items()} == {name: t.shape for name, t in many.tensors.items()}


@pytest.fixture
def sharded(random_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint(dtype="bfloat16", max_shard_size="80KB"), tmp_path / "sharded"))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 7, None])
def test_an_index_that_leaves_its_folder(sharded: Path, file: Any) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in .*no file of this folder"):
        open_checkpoint(str(sharded))


def test_an_index_that_does_not_fit_its_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {moved: second}}))
    with pytest.raises(CheckpointError, match=f"{second} lacks {moved}"):
        open_checkpoint(str(sharded))
    (sharded / INDEX).write_text(json.dumps(index))
    (sharded / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} cannot be read"):
        open_checkpoint(str(sharded))
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"files and no model\.safetensors\.index\.json"):
        open_checkpoint(str(sharded))


def write(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        (len(text) if length is None else length).to_bytes(8, "little") + text + data
    )
    return folder


def tensor(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIES: dict[str, tuple[Any, bytes, int | None, str]] = {
    "length beyond the file": ({}, b"", 1 << 62, "header claims"),
    "length beyond the bound": ({}, bytes(100), (1 << 23) + 1, "header claims"),
    "not JSON": (b"{not json", b"", None, "not JSON"),
    "deep JSON": (b"[" * 100_000, b"", None, "not JSON"),
    "not an object": ([1], b"", None, "not a JSON object"),
    "same name twice": (b'{"a": {}, "a": {}}', b"", None, "same name twice"),
    "no fields": ({"a": {}}, b"", None, "'a' has no proper"),
    "entry is a number": ({"a": 7}, b"", None, "'a' has no proper"),
    "negative shape": ({"a": tensor(0, 4, [-1])}, bytes(4), None, "'a' has no proper"),
    "shape of bools": ({"a": tensor(0, 4, [True])}, bytes(4), None, "'a' has no proper"),
    "nine dimensions": ({"a": tensor(0, 4, [1] * 9)}, bytes(4), None, "'a' has no proper"),
    "three offsets": ({"a": tensor(0, 4, [1]) | {"data_offsets": [0, 4, 8]}}, bytes(8), None, "'a' has no proper"),
    "unknown dtype": ({"a": tensor(0, 4, [4], "F8_E5M2")}, bytes(4), None, "dtype F8_E5M2; supported: F32"),
    "dtype is a list": ({"a": tensor(0, 4, [1]) | {"dtype": ["F32"]}}, bytes(4), None, "dtype ['F32']"),
    "end beyond the data": ({"a": tensor(0, 8, [2])}, bytes(4), None, "outside the 4 bytes"),
    "end before start": ({"a": tensor(4, 0, [1])}, bytes(4), None, "outside the 4 bytes"),
    "shape and bytes differ": ({"a": tensor(0, 4, [2])}, bytes(4), None, "takes another number"),
    "huge shape": ({"a": tensor(0, 4, [1 << 40, 1 << 40])}, bytes(4), None, "takes another number"),
    "overlap": ({"a": tensor(0, 8, [2]), "b": tensor(4, 8, [1])}, bytes(8), None, "overlaps"),
    "hole": ({"a": tensor(0, 4, [1]), "b": tensor(8, 12, [1])}, bytes(12), None, "hole"),
    "bytes left over": ({"a": tensor(0, 4, [1])}, bytes(8), None, "8 follow the header"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    header, data, length, named = LIES[case]
    folder = write(tmp_path, header, data, length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read(folder)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert named in str(error.value) and len(str(error.value)) < 500


def test_files_too_short_for_a_header(tmp_path: Path) -> None:
    for size in range(10):
        (tmp_path / "model.safetensors").write_bytes(bytes(size))
        with pytest.raises(CheckpointError):
            read(tmp_path)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_bytes_give_tensors_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    header = {"a": tensor(0, 8, [2, 1]), "__metadata__": {"format": "pt"}, "b": tensor(8, 12, [2, 3], "BF16")}
    header["b"] = tensor(8, 20, [2, 3], "BF16")
    path = write(folder, header, bytes(20)) / "model.safetensors"
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        for found in read(folder).values():
            assert found.data.size == found.nbytes


def test_pickles_are_refused_unopened(random_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    import pickle

    shutil.copy(random_checkpoint() / "config.json", tmp_path)
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        for model in (tmp_path, tmp_path / name):
            with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
                open_checkpoint(str(model))
        (tmp_path / name).unlink()
    assert not (tmp_path / "opened").exists()
