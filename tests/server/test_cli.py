"""The command line: what it says when something is wrong, and what `run`, `chat` and `serve` do with the real model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import doctor
from server.cli import app
from server.flags import ENGINE, SERVER
from server.version import version
from tests.server.live import LiveServer

ROOT = Path(__file__).resolve().parent.parent.parent
COMMANDS = ("serve", "chat", "run", "pull", "doctor", "bench", "version")
SMALL = ["--kv-cache-tokens", "2048", "--max-model-len", "1024", "--max-num-seqs", "4"]


def fen(*args: str) -> tuple[int, str, str]:
    """In this process: exit status, standard output, standard error."""
    result = CliRunner().invoke(app, args)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def fen_process(*args: str, text: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *args],
        cwd=ROOT,
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


# Without a model


def test_help_names_every_command() -> None:
    status, out, _ = fen("--help")
    assert status == 0
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    status, out, _ = fen(name, "--help")
    assert status == 0 and out.startswith(f"Usage: fen {name}")


def test_version() -> None:
    assert fen("version") == (0, f"{version()}\n", "")


def test_the_readme_explains_every_option() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    options = {"--" + name.replace("_", "-") for name in (*ENGINE, *SERVER)}
    assert not sorted(option for option in options if f"`{option}" not in readme and f"no-{option[2:]}`" not in readme)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["serve", "--dtyp", "float32"], "--dtype"),
        (["serve", "--dtype", "int7"], "'float32'"),
        (["serve", "--port", "99999"], "65535"),
        (["serve", "--max-num-seqs", "0"], "greater than or equal to 1"),
        (["serve", "somewhere/model.gguf"], "--model"),
        (["sevre"], "serve"),
        (["run", "two", "words"], "quotes"),
        (["run", "hello", "--temperature", "nan"], "--temperature"),
        (["run", "hello", "--stop", ""], "--stop"),
        (["run"], "PROMPT"),
        (["chat", "--url"], "--url"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(args: list[str], says: str) -> None:
    status, out, err = fen(*args)
    assert status == 2 and out == ""
    assert says in err and "Traceback" not in err


def one_sentence(err: str) -> str:
    """The one line that an error is; asserts that it is one."""
    (line,) = err.strip().splitlines()
    assert line.startswith("fen: ")
    return line


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["run", "hello"]])
def test_a_wrong_path_is_answered_with_near_names(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "smollm2.gguf").touch()
    status, _, err = fen(*command, "--model", str(tmp_path / "smolm2.gguf"))
    assert status == 1
    assert str(tmp_path / "smollm2.gguf") in one_sentence(err)


def test_a_busy_port_is_named_with_another() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        status, _, err = fen("serve", "--port", str(port))
    assert status == 1
    assert str(port) in one_sentence(err) and "--port" in err


def test_pull_refuses_a_name_it_does_not_know() -> None:
    status, out, err = fen("pull", "no such thing")
    assert status == 1 and out == ""
    assert "no such thing" in one_sentence(err)


def test_chat_says_when_no_server_is_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        status, _, err = fen("chat", "--url", url)
    assert status == 1
    assert url in one_sentence(err) and "fen serve" in err


def test_fen_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = fen_process("run", "hello", "--model", str(tmp_path / "none.gguf"), FEN_DEBUG="1")
    assert "Traceback" in result.stderr and result.returncode == 1


def test_output_that_cannot_be_written_is_said_before_the_work(tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "file").touch()
    there = str(tmp_path / "file" / "x.json")
    for arguments, named in (
        (("compare", str(smollm2), "--json", there), f"{there} cannot be written: "),
        (("compare", str(smollm2), "--json", str(tmp_path)), "is a folder; name a file"),
        (("compare", str(smollm2), "--plot", "x.txt"), "--plot is 'x.txt'; the name of a picture ends in .png"),
        (("bench", "step", "--json", there), f"{there} cannot be written: "),
        (("bench", "kernels", "--output", there), "cannot be written: "),
        (("quantize", str(smollm2), "--to", "w8a16", "--output", there), f"{there}.partial: Not a directory"),
    ):
        result = fen_process(*arguments)
        assert result.returncode == 1 and named in result.stderr, result.stderr
        assert "bug" not in result.stderr and "|" not in result.stdout


def test_doctor_knows_what_triton_compiles_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert "python3-dev" in doctor.triton_lacks()
    (tmp_path / "Python.h").touch()
    assert doctor.triton_lacks() == ""
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in doctor.triton_lacks()


def test_doctor_says_what_there_is() -> None:
    result = fen_process("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for word in ("Installation", "Libraries", "Machine", "Devices", "Models", "torch", "CPU", "Memory"):
        assert word in result.stdout
    assert "nothing is wrong" in result.stdout


def test_another_package_named_kernels_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from server.cli import app; app(sys.argv[1:])"

    def shadowed(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)

    found = shadowed("doctor")
    assert found.returncode == 1 and "pip uninstall kernels" in found.stdout
    run = shadowed("run", "hello")
    assert run.returncode == 1 and "pip uninstall kernels" in one_sentence(run.stderr)


# With SmolLM2


@pytest.fixture(scope="module")
def model(smollm2: Path) -> list[str]:
    return ["--model", str(smollm2), *SMALL]


def test_run_prints_the_completion_and_nothing_else(model: list[str]) -> None:
    result = fen_process("run", "The capital of France is", "--max-tokens", "19", "--dtype", "float32", *model)
    assert result.returncode == 0, result.stderr
    assert result.stdout == " Paris.\n\nThe answer is: 2018-01-22\n"
    assert "19 tokens" in result.stderr and "tokens/s" in result.stderr


def test_run_reads_standard_input_and_ends_before_a_stop(model: list[str]) -> None:
    result = fen_process("run", "-", "--stop", ".", "--dtype", "float32", *model, text="The capital of France is")
    assert result.stdout == " Paris\n", result.stderr


def test_a_prompt_longer_than_the_context_is_refused(model: list[str]) -> None:
    result = fen_process("run", "word " * 2000, *model)
    assert result.returncode == 1
    assert "--max-model-len" in one_sentence(result.stderr)


def test_chat_answers_in_a_conversation(model: list[str]) -> None:
    questions = "My name is Ada.\nWhat is my name?\n/new\n/exit\n"
    result = fen_process("chat", "--temperature", "0", "--max-tokens", "30", *model, text=questions)
    assert result.returncode == 0, result.stderr
    assert "Ada" in result.stdout and len(re.findall(r"[\d.]+ tokens/s", result.stdout)) == 2
    assert re.search(r"[1-9]\d* from the cache", result.stdout)  # the second turn finds the first


def test_serve_says_what_to_try_and_ends_with_status_0(model: list[str]) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *model]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        banner = ""
        for line in process.stderr:
            banner += line
            if found := re.search(r"curl (http://[\d.:]+)/v1", line):
                break
        assert found, banner
        with urllib.request.urlopen(f"{found[1]}/ready", timeout=10) as reply:
            assert reply.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_chat_with_a_running_server(server: LiveServer) -> None:
    question = "What is the capital of France?\n/exit\n"
    result = fen_process("chat", "--url", server.url, "--temperature", "0", "--max-tokens", "20", text=question)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout and re.search(r"[\d.]+ tokens/s", result.stdout)


def test_chat_says_what_a_turn_cost(launch: Callable[..., LiveServer], model: list[str]) -> None:
    """A turn's device seconds without a price, US$ with one: of the server, or of an engine of one's own."""
    line, priced = r"\d\.\d\d device-seconds", r"US\$0\.0*[1-9]\d? at US\$0\.0279 a device-hour"
    question = "Hi\n/exit\n"
    options = ("--max-tokens", "5")
    assert re.search(line, fen_process("chat", *options, *model, text=question).stdout)
    own = fen_process("chat", *options, "--price", "cpu-4vcpu", *model, text=question)
    assert re.search(priced, own.stdout), own.stderr
    server = launch(price="0.0279")
    assert re.search(priced, fen_process("chat", "--url", server.url, *options, text=question).stdout)
    both = fen_process("chat", "--url", server.url, "--price", "1", text=question)
    assert both.returncode == 2 and "--price" in both.stderr
    shown = fen_process("cost", "--url", server.url)
    assert shown.returncode == 0, shown.stderr
    assert "US$0.0279 a device-hour" in shown.stdout and "measured on a CPU" in shown.stdout
    assert re.search(r"startup +│ +\d+\.\d{3} │ +\d+\.\d\d% │ +0\.\d{8}", shown.stdout), shown.stdout
    assert re.search(r"wall +│ +US\$\d", shown.stdout) and "energy: the model runs on a CPU" in shown.stdout


def test_cost_without_a_server_is_one_sentence() -> None:
    result = fen_process("cost", "--url", "http://127.0.0.1:9")
    assert result.returncode == 1 and "cannot be reached" in one_sentence(result.stderr)


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: LiveServer) -> None:
    command = [sys.executable, "-u", "-m", "server.cli", "chat", "--url", server.url, "--temperature", "0"]
    question = "Write a long story about a dragon and a knight."
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{question}\n".encode())
        seen = b""
        while len(seen.partition(b"> ")[2]) < 10:
            data = process.stdout.read(1024)
            assert data, seen
            seen += data
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(b"/exit\n", timeout=60)
    assert process.returncode == 0, seen + out
    assert b"stopped" in seen + out
    server.wait_idle()
