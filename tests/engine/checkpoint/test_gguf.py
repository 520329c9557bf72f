"""The bounded reader: what the gguf package writes is read exactly, a damaged file does no more than raise an error."""

from __future__ import annotations

import contextlib
import logging
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf import read_gguf
from engine.errors import CheckpointError
from tests.engine.checkpoint.files import TENSORS, tiny_metadata, write_gguf

KEPT = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "a.gguf")
    file = read_gguf(tmp_path / "a.gguf")
    expected = tiny_metadata()
    for key, value in expected.items():
        found = file.metadata[key]
        if isinstance(value, float):
            assert found == pytest.approx(value)
        else:
            assert np.array_equal(found, value), key
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == TENSORS
    for name, array in stored.items():
        assert file.tensors[name].data.tobytes() == array.tobytes()
        assert file.tensors[name].nbytes == array.nbytes


def test_the_default_model(smollm2: Path) -> None:
    file = read_gguf(smollm2)
    assert len(file.tensors) == 272 and len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file.types["token_embd.weight"] == "Q8_0" and file.types["blk.0.attn_q.weight"] == "Q4_1"
    last = max(file.tensors.values(), key=lambda tensor: tensor.data.__array_interface__["data"][0])
    assert sum(tensor.nbytes for tensor in file.tensors.values()) <= smollm2.stat().st_size
    assert last.data.size == last.nbytes


@pytest.mark.parametrize("kind", KEPT)
def test_kept_types(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name = "blk.0.ffn_down.weight"
    stored = write_gguf(tmp_path / "a.gguf", kinds={name: kind})
    tensor = read_gguf(tmp_path / "a.gguf").tensors[name]
    assert (tensor.dtype, tensor.shape) == (kind, TENSORS[name])
    assert tensor.data.tobytes() == stored[name].tobytes() and not caplog.records


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "TQ1_0"])
def test_other_types_are_dequantised_with_one_warning(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The package cannot write these, so a row of random blocks takes the place of a tensor of the same bytes."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * size), np.uint8)
    path = tmp_path / "a.gguf"
    number, offset = int(GGMLQuantizationType[kind]), -(-raw.nbytes // 32) * 32
    entries = [(name, [2 * block, 3], number, at) for name, at in (("w", 0), ("x", offset))]
    path.write_bytes(_file(entries, data=raw.tobytes() + bytes(offset - raw.nbytes) + raw.tobytes()))
    with caplog.at_level(logging.WARNING):
        tensor = read_gguf(path).tensors["w"]
    assert len(caplog.records) == 1 and kind in caplog.text and "Q6_K are kept as they are" in caplog.text
    expected = dequantize(raw, GGMLQuantizationType[kind])
    assert tensor.shape == (3, 2 * block)
    assert np.array_equal(tensor.data.view(np.float32), expected.reshape(-1), equal_nan=True)


# Files byte by byte, for what no writer would write.


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return _string(key.encode()) + struct.pack("<I", kind) + value


def _file(
    tensors: list[tuple[str, list[int], int, int]] = [],  # noqa: B006
    entries: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """tensors: name, dimensions (fastest first), type, offset."""
    counts = counts or (len(tensors), len(entries))
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries)
    for name, shape, kind, offset in tensors:
        header += _string(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return header + bytes(-len(header) % 32) + data


HUGE = 1 << 62
TEXT = _entry("general.architecture", 8, _string(b"llama"))
BAD = {
    "empty": (b"", "cannot be read"),
    "short": (b"GGUF\3\0\0\0", "fixed header"),
    "magic": (_file(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (_file(version=1), "version is 1"),
    "big-endian": (_file(version=0x03000000), "big-endian"),
    "tensor count": (_file(counts=(HUGE, 0)), "tensor_count"),
    "entry count": (_file(counts=(0, HUGE)), "metadata_kv_count"),
    "plausible entry count": (_file(counts=(0, 2), entries=[TEXT] * 2), "twice"),
    "key length": (_file(counts=(0, 1), entries=[struct.pack("<Q", HUGE) + bytes(40)]), "key 0"),
    "key text": (_file(entries=[_string(b"\xff\xfe") + struct.pack("<IQ", 8, 0)]), "UTF-8"),
    "value type": (_file(entries=[_entry("a.b", 99, bytes(8))]), "a.b has the unknown value type 99"),
    "string length": (_file(entries=[_entry("a.b", 8, struct.pack("<Q", HUGE))]), "a.b"),
    "array count": (_file(entries=[_entry("a.b", 9, struct.pack("<IQ", 8, HUGE))]), "a.b needs"),
    "number array count": (_file(entries=[_entry("a.b", 9, struct.pack("<IQ", 4, HUGE))]), "a.b needs"),
    "array type": (_file(entries=[_entry("a.b", 9, struct.pack("<IQ", 77, 0))]), "a.b is an array of unknown"),
    "nested array": (_file(entries=[_entry("a.b", 9, struct.pack("<IQ", 9, 1) * 50)]), "array of arrays"),
    "alignment zero": (_file(entries=[_entry("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment"),
    "alignment odd": (_file(entries=[_entry("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment"),
    "alignment text": (_file(entries=[_entry("general.alignment", 8, _string(b"32"))]), "general.alignment"),
    "one of several": (_file(entries=[_entry("split.count", 2, struct.pack("<H", 3))]), "split.count"),
    "no dimension": (_file([("w", [], 0, 0)]), "0 dimensions"),
    "dimensions": (_file([("w", [1] * 9, 0, 0)]), "9 dimensions"),
    "zero dimension": (_file([("w", [4, 0], 0, 0)]), "shape of 'w'"),
    "huge dimension": (_file([("w", [HUGE, HUGE], 0, 0)]), "shape of 'w'"),
    "unknown type": (_file([("w", [32], 99, 0)], data=bytes(128)), "type of 'w' is 99"),
    "type without dequantisation": (_file([("w", [32], 27, 0)], data=bytes(256)), "I64, which cannot"),
    "part of a block": (_file([("w", [33], 8, 0)], data=bytes(256)), "whole Q8_0 blocks"),
    "past the end": (_file([("w", [32], 0, 0)], data=bytes(127)), "ends at byte"),
    "far offset": (_file([("w", [32], 0, HUGE)], data=bytes(128)), "ends at byte"),
    "misaligned": (_file([("w", [8], 0, 4)], data=bytes(128)), "offset 4"),
    "overlap": (_file([("w", [16], 0, 0), ("x", [8], 0, 32)], data=bytes(128)), "'w' and 'x' overlap"),
    "same name": (_file([("w", [8], 0, 0), ("w", [8], 0, 32)], data=bytes(128)), "'w' is listed twice"),
    "empty name": (_file([("", [8], 0, 0)], data=bytes(128)), "name of tensor 0"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused_by_field_in_little_memory(tmp_path: Path, case: str) -> None:
    content, named = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert named in str(error.value) and len(str(error.value)) < 400


@pytest.mark.timeout(20)
def test_a_file_of_a_hundred_million_empty_strings(tmp_path: Path) -> None:
    """Its counts are true (the file is sparse), so only the bound on the number of strings stops the reader."""
    path = tmp_path / "large.gguf"
    path.write_bytes(_file(entries=[_entry("a.b", 9, struct.pack("<IQ", 8, 30_000_000))]))
    with open(path, "r+b") as file:
        file.truncate(1 << 29)
    with pytest.raises(CheckpointError, match="number of strings"):
        read_gguf(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def _open_all(path: Path) -> None:
    checkpoint = open_checkpoint(str(path))
    checkpoint.tokenizer.encode("hello")
    for tensor in checkpoint.tensors.values():
        assert tensor.data.size == tensor.nbytes


def test_the_undamaged_file_opens(tiny: Path) -> None:
    _open_all(tiny)


@pytest.mark.timeout(120)
def test_cut_anywhere(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400), *range(400, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            _open_all(path)


def test_the_default_model_cut_short(smollm2: Path, tmp_path: Path) -> None:
    with open(smollm2, "rb") as file:
        content = file.read(3_000_000)
    for length in (100, 5_000, 500_000, 1_500_000, 3_000_000):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(str(tmp_path / "cut.gguf"))


@pytest.fixture(scope="module")
def damaged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[tuple[int, int]]], Path]:
    content, path = tiny.read_bytes(), tmp_path_factory.mktemp("damaged") / "x.gguf"
    header = content.index(b"output_norm.weight") + 60

    def write(changes: list[tuple[int, int]]) -> Path:
        changed = bytearray(content)
        for position, value in changes:
            changed[position % header] = value
        path.write_bytes(changed)
        return path

    return write


@pytest.mark.timeout(120)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_bytes_of_the_header_give_a_model_or_an_error(
    damaged: Callable[[list[tuple[int, int]]], Path], changes: list[tuple[int, int]]
) -> None:
    with contextlib.suppress(CheckpointError):
        _open_all(damaged(changes))
