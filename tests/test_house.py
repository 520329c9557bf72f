"""The rules of the house that a machine can check: floors, size, what loads without torch and without Triton."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import doctor
from tests.size import LIMIT, core_size, lines_of_code

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("server", "bench", "engine", "kernels")  # an import only ever points to the right
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TORCH_FREE = [
    "server",
    "seeds",
    "engine/scheduling",
    "engine/ledger",
    "engine/checkpoint",
    "engine/messages.py",
    "engine/errors.py",
    "engine/chat.py",
    "engine/detokenizer.py",
    "engine/core/client.py",
    "bench/serving",
    "bench/results.py",
    "bench/prices.py",
    "bench/local_server.py",
]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module


def module_names(*places: str) -> list[str]:
    files = [file for place in places for file in ([ROOT / place] if place.endswith(".py") else sources(place))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def test_imports_point_down() -> None:
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for level, floor in enumerate(FLOORS)
        for path in sources(floor)
        for line, module in imported(path)
        if module.split(".")[0] in (*FLOORS[:level], "tests")
    ]
    assert not upward


def test_the_core_is_small() -> None:
    assert core_size() <= LIMIT


def test_lines_of_code() -> None:
    source = '"""Doc."""\n\nx = 1  # why\n# alone\ndef f():\n    """Two\n    lines."""\n    return """a\nb"""\n'
    assert lines_of_code(source) == 4


def test_no_file_needs_a_tenth_screen() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources(*FLOORS, "seeds", "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_front_end_does_not_load_torch() -> None:
    names = module_names(*TORCH_FREE)
    assert "server.cli" in names and "engine.scheduling.scheduler" in names
    loaded = run_python(
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "print(sorted({'torch', 'triton', 'transformers'} & sys.modules.keys()))"
    )
    assert loaded == "[]"


def test_the_command_line_starts_without_the_server_and_torch() -> None:
    heavy = {"torch", "fastapi", "pydantic", "zmq", "numpy", "tokenizers", "huggingface_hub", "jinja2"}
    assert run_python(f"import sys, server.cli\nprint(sorted({heavy!r} & sys.modules.keys()))") == "[]"


def test_the_cpu_path_needs_no_triton() -> None:
    run_python(
        "import sys\nsys.modules['triton'] = None\nimport kernels, engine.core.build, engine.core.process, engine.llm"
    )


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in entries}


def test_every_dependency_is_pinned_to_a_public_version() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[\s\[<>=!;]", line)[0].lower().replace("_", "-")
        for line in [*PROJECT["project"]["dependencies"], *extras["bench"], *extras["dev"]]
    } - {"fen-engine"}
    pinned = pins()
    assert wanted <= pinned.keys()
    assert not [version for version in pinned.values() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)]


@pytest.mark.parametrize("name", doctor.TESTED)
def test_doctor_knows_the_range_that_is_declared(name: str) -> None:
    (declared,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith(name))
    first, end = doctor.TESTED[name]
    assert f"{name}>={first[0]}.{first[1]},<{end[0]}.{end[1]}" == declared.split(";")[0].strip()


def test_doctor_looks_for_every_dependency() -> None:
    declared = {re.split(r"[\s<>=;]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert declared == set(doctor.LIBRARIES)


def test_the_documents_name_files_that_exist() -> None:
    for document in (
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        ROOT / "docs" / "architecture.md",
        ROOT / "seeds" / "README.md",
    ):
        text = document.read_text(encoding="utf-8")
        named = set(re.findall(r"`((?:engine|kernels|server|bench|seeds|tests|docs|deploy)/[\w./*-]*)`", text))
        named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
        missing = [name for name in sorted(named) if not _exists(name, ROOT) and not _exists(name, document.parent)]
        assert not missing, document


def _exists(pattern: str, folder: Path) -> bool:
    return any(True for _ in folder.glob(pattern.rstrip("/")))
