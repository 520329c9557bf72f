"""The examples of README.md, each run as it stands there but for the server's address."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
EXAMPLES = [*sorted((HERE / "examples").iterdir()), *sorted((HERE / "node").glob("*.mjs"))]
Run = Callable[..., str]


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    """run("openai_client.py") -> what the example prints; files that it reads lie in tmp_path."""

    def run_example(name: str, **replace: str) -> str:
        (path,) = (path for path in EXAMPLES if path.name == name)
        text = path.read_text().replace("http://127.0.0.1:8000", url)
        for old, new in replace.items():
            assert old in text
            text = text.replace(old, new)
        # node finds packages beside the file
        folder = path.parent if path.suffix == ".mjs" else tmp_path
        copy = folder / f".run-{path.name}" if path.suffix == ".mjs" else folder / path.name
        copy.write_text(text)
        programs = {".py": [sys.executable], ".mjs": [shutil.which("node") or "node"], ".sh": ["sh", "-e"]}
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
        environment |= {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}
        try:
            done = subprocess.run(
                [*programs[path.suffix], str(copy)], cwd=folder, env=environment, capture_output=True, text=True,
                timeout=300,
            )  # fmt: skip
        finally:
            copy.unlink()
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run_example


@pytest.fixture(scope="session")
def node_modules() -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    command = ["npm", "ci", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(command, cwd=HERE / "node", check=True, timeout=600)


def test_openai(run: Run) -> None:
    assert "Paris" in run("openai_client.py")


def test_langchain(run: Run) -> None:
    text = run("langchain_client.py")
    assert text.count("Paris") >= 2, text


def test_litellm(run: Run) -> None:
    assert "Paris" in run("litellm_client.py")


def test_instructor(run: Run) -> None:
    assert re.search(r"name='.*' country='.*' population=\d+", run("instructor_client.py"))


@pytest.mark.usefixtures("node_modules")
@pytest.mark.parametrize("name", ["openai_client.mjs", "ai_sdk.mjs"])
def test_node(run: Run, name: str) -> None:
    assert "Paris" in run(name)


def test_lm_eval(run: Run, tmp_path: Path) -> None:
    """A task of our own, whose questions lie beside it: the tasks that it ships fetch theirs from a hub. The
    log-probabilities come by echo, the tokens by /tokenize."""
    questions = [
        '{"question": "The capital of France is", "choices": [" Paris", " banana", " seven"], "answer": 0}',
        '{"question": "Two plus two equals", "choices": [" purple", " four", " Berlin"], "answer": 1}',
        '{"question": "The opposite of hot is", "choices": [" table", " nineteen", " cold"], "answer": 2}',
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    (tmp_path / "task.yaml").write_text(
        "task: questions\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: questions.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ntarget_delimiter: ''\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    text = run("lm_eval.sh", **{"--tasks arc_easy": "--tasks questions --include_path ."})
    assert re.search(r"acc\s*\|↑\s*\|\s*1(\.0+)?\|", text), text


def test_guidellm(run: Run, tmp_path: Path) -> None:
    prompts = [{"prompt": f"Tell me about the number {i}.", "output_tokens_count": 8} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    text = run("guidellm.sh", **{"count=20": "count=6"})
    assert "concurrent" in text.lower()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_readme_shows_the_example(path: Path) -> None:
    assert path.read_text().strip() in README.read_text()
