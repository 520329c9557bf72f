"""Medians, tables, files."""

from __future__ import annotations

import json
from pathlib import Path

from bench.report import markdown_table, median_and_spread, write_json


def test_median_and_spread() -> None:
    assert median_and_spread([3.0, 1.0, 2.04]) == "2.0 (1.0 to 3.0)"
    assert median_and_spread([1.0, 2.0]) == "1.5 (1.0 to 2.0)"
    assert median_and_spread([1234.56]) == "1,234.6"
    assert median_and_spread([10.4, 11.6, 30.0], digits=0) == "12 (10 to 30)"


def test_markdown_table() -> None:
    assert markdown_table(["", "a"], [["row", "1"], ["x", "22.5"]]).splitlines() == [
        "|     |    a |",
        "| :-- | ---: |",
        "| row |    1 |",
        "| x   | 22.5 |",
    ]


def test_write_json_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2.5]})
    assert json.loads(path.read_text()) == {"a": [2.5]}
    assert list(path.parent.iterdir()) == [path]
