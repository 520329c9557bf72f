"""Where the options of `fen serve` come from: the command line, then the environment, then a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

import server.run
from engine.messages import EngineOptions
from server.cli import app
from server.settings import ServerSettings


class Asked(Exception):
    """serve() was reached."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """serve(toml, *args, **environment) -> the settings, or what was said when there are none."""
    for name in [name for name in os.environ if name.startswith("FEN_")]:
        monkeypatch.delenv(name)
    asked: list[ServerSettings] = []
    monkeypatch.setattr(server.run, "serve", asked.append)
    file = tmp_path / "fen.toml"

    def call(toml: str | bytes | None, *args: str, **environment: str) -> ServerSettings | str:
        asked.clear()
        options = ["--config", str(file)] if toml is not None else []
        if toml is not None:
            file.write_bytes(toml if isinstance(toml, bytes) else toml.encode())
        result = CliRunner().invoke(app, ["serve", *options, *args], env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert bool(asked) == (result.exit_code == 0) and "Traceback" not in result.stderr
        return asked[0] if asked else result.stderr

    return call


EVERY_KIND = """
model = "some/model"
port = 9000
drain-timeout = 5
gpu-memory-utilization = 0.5
served-model-name = ["a", "b"]
cors-origins = "https://a.example, https://b.example"
enable-prefix-caching = false
enforce_eager = true
dtype = "float32"
"""


def test_a_file_gives_every_kind_of_option(serve: Any) -> None:
    settings = serve(EVERY_KIND)
    assert settings.port == 9000 and settings.drain_timeout == 5.0 and settings.served_model_name == ["a", "b"]
    assert settings.cors_origins == ["https://a.example", "https://b.example"]
    engine = settings.engine
    assert engine.model == "some/model" and engine.dtype == "float32" and engine.gpu_memory_utilization == 0.5
    assert engine.enable_prefix_caching is False and engine.enforce_eager is True
    assert settings.max_queue == 256 and engine.max_num_seqs == 64  # what nobody gave


def test_the_command_line_wins_over_the_environment_over_the_file(serve: Any) -> None:
    assert serve("max-queue = 1").max_queue == 1
    assert serve("max-queue = 1", FEN_MAX_QUEUE="2").max_queue == 2
    assert serve("max-queue = 1", "--max-queue", "3", FEN_MAX_QUEUE="2").max_queue == 3
    assert serve("enable-prefix-caching = false", "--enable-prefix-caching").engine.enable_prefix_caching is True
    assert serve("enable-prefix-caching = true", FEN_ENABLE_PREFIX_CACHING="0").engine.enable_prefix_caching is False
    assert serve('served-model-name = "a"', FEN_SERVED_MODEL_NAME="b,c").served_model_name == ["b", "c"]


def test_a_price_is_a_number_or_a_name(serve: Any) -> None:
    assert serve("price = 2.5").price == "2.5" and serve("price = 'h200'").price == "h200"
    assert "price" in serve("price = true")


def test_every_option_has_a_variable(serve: Any) -> None:
    samples = {
        "load_format": "dummy",
        "fusions": "all",
        "kv_cache_dtype": "int8",
        "device": "cpu",
        "dtype": "float32",
        "log_format": "json",
        "block_size": "32",
    }
    names = [field.name for struct in (EngineOptions, ServerSettings) for field in msgspec.structs.fields(struct)]
    for name in names:
        if name != "engine":
            default = getattr(EngineOptions(), name, getattr(ServerSettings(), name, None))
            sample = "0" if default is True else "1" if isinstance(default, bool) else samples.get(name, "1")
            settings = serve(None, **{f"FEN_{name.upper()}": sample})
            assert not isinstance(settings, str), (name, settings)
            changed = getattr(settings, name, None) if hasattr(settings, name) else getattr(settings.engine, name)
            assert changed != default, name


def test_several_names(serve: Any) -> None:
    assert serve(None, "--served-model-name", "a", "--served-model-name", "b").served_model_name == ["a", "b"]
    assert serve(None, "--served-model-name", "a, b,").served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("max-queu = 3", "'max-queu'; the nearest is 'max-queue'"),
        ("config = 'x'", "there is no option 'config'"),
        ("[server]\nport = 1", "there is no option 'server'"),
        ("port = '9000'", "port: expected `int`, got `str`"),
        ("port = true", "port: expected `int`, got `bool`"),
        ("port = 99999", "port: Input should be less than or equal to 65535"),
        ("enforce-eager = 1", "enforce-eager: expected `bool`, got `int`"),
        ("dtype = 'int7'", "dtype: 'int7' is not one of"),
        ("served-model-name = [1]", "served-model-name: expected `str`, got `int`"),
        ("port = ", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        ("port = 1\nport = 2", "is not TOML"),
    ],
)
def test_a_bad_file_is_named_with_the_key(serve: Any, toml: str | bytes, says: str) -> None:
    said = serve(toml)
    assert says in said and "fen.toml" in said and "--config" in said


def test_a_file_that_is_not_there(serve: Any, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in serve(None, "--config", str(tmp_path / "none.toml"))
    assert "cannot be read: Is a directory" in serve(None, "--config", str(tmp_path))


def test_a_bad_variable_is_named(serve: Any) -> None:
    said = serve(None, FEN_PORT="tcp://10.0.0.1:80")
    assert "'--port'" in said and "FEN_PORT is set to 'tcp://10.0.0.1:80'" in said
    assert "FEN_DTYPE" in serve(None, FEN_DTYPE="int7")
