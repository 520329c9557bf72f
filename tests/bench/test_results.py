"""The form of every file under bench/results/: what is written is read again, what is not of it is a sentence."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.prices import parse_price
from engine.errors import FenError

COMMITTED = sorted((Path(results.__file__).parent / "results").glob("**/*.json"))


def kept(path: Path, **changes: Any) -> Path:
    results.save(path, results.new("serve", {"runs": [1.5, math.nan]}, model="m", price=parse_price("cpu-4vcpu")))
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = kept(tmp_path / "results" / "serve.json")
    result = results.load(path, "serve")
    assert result.data == {"runs": [1.5, None]}, "NaN is no JSON"
    assert result.model == "m" and result.quantization is None and result.commit and result.versions["python"]
    assert result.price == parse_price("cpu-4vcpu") and "CPUs" in result.device
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schema_version": 0}, r"older schema version \(0\); this version of Fen reads 1"),
        ({"schema_version": 9}, r"unknown schema version \(9\)"),
        ({"schema_version": "1"}, "unknown schema version"),
        ({"schema": None}, "not a benchmark result of this version"),
        ({"data": [1]}, "not a whole benchmark result: data is list"),
        ({"device": None}, "device is not text"),
        ({"price": {"usd": 3}}, "unexpected keyword argument 'usd'"),
        ({"price": {"usd_per_device_hour": 0, "name": "", "date": "", "source": ""}}, "price must be above 0"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"kind": "ladder"}, "the kind 'ladder', not 'serve'"),
    ],
)
def test_what_is_not_of_this_form_is_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FenError, match=sentence) as caught:
        results.load(kept(tmp_path / "serve.json", **changes), "serve")
    assert "serve.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff", '{"date": "2026-11-23"}'])
def test_what_is_no_result_at_all_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FenError, match=r"x\.json is not a benchmark result"):
        results.load(path)
    with pytest.raises(FenError, match="cannot be read"):
        results.load(tmp_path / "absent.json")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_results_are_of_this_form(path: Path) -> None:
    result = results.load(path)
    assert result.commit != "unknown" and result.command and result.data


def test_the_command_line_names_no_folder_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/usr/bin/fen", "bench", "--model", "/home/me/a model", "--header=k=v", "--header", "a=b", "--json=/x/y"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert results.command_line() == "fen bench --model 'a model' --header=… --header … --json=y"
