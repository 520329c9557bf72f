"""The one form of every file under bench/results/: an envelope that says what was measured, when, with what, on what;
and `data`, whose keys belong to the kind of measurement.

A reader of a file asks `load` for the kind it understands, and gets one sentence for what it does not.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import commit, cpu_name, versions

if TYPE_CHECKING:
    from bench.prices import Price

SCHEMA = "fen-bench"
VERSION = 1  # counts up when a reader of the last version would misread a file
SECRETS = ("--header", "--api-key")  # options whose values stay out of a file


@dataclasses.dataclass(kw_only=True)
class Result:
    """One measurement. `price`: of the device, where the kind has US$ figures."""

    kind: str  # e.g. "serve"
    date: str  # ISO 8601 with the offset
    commit: str
    command: str
    device: str
    versions: dict[str, str]
    model: str | None
    quantization: str | None
    price: Price | None
    data: dict[str, Any]


def new(
    kind: str,
    data: dict[str, Any],
    *,
    model: str | None = None,
    quantization: str | None = None,
    device: str | None = None,
    price: Price | None = None,
) -> Result:
    """A result of now, of this commit and command line; device None: this machine's CPU."""
    return Result(
        kind=kind,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit(),
        command=command_line(),
        device=device or cpu_name(),
        versions=versions(),
        model=model,
        quantization=quantization,
        price=price,
        data=data,
    )


def check_writable(path: Path) -> None:
    """Makes the folder that `path` is to be in. FenError if nothing can be written there: said before a measurement
    rather than after it."""
    from engine.errors import FenError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FenError(f"{path} cannot be written: {error.strerror}.") from None
    if path.is_dir():
        raise FenError(f"{path} is a folder; name a file.")


def save(path: Path, result: Result) -> None:
    """Writes it so that a run cut short leaves the previous file whole. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    head = {"schema": SCHEMA, "schema_version": VERSION}
    text = json.dumps(_finite(head | dataclasses.asdict(result)), indent=2, ensure_ascii=False, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path, kind: str | None = None) -> Result:
    """Raises FenError, in one sentence, for a file that is missing, malformed, of another version or not of `kind`."""
    from engine.errors import FenError  # here: what only writes results runs without the engine's libraries

    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise FenError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise FenError(f"{path} is not a benchmark result: it is not valid JSON.") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise FenError(
            f'{path} is not a benchmark result of this version: it has no "schema": "{SCHEMA}". '
            "Results from before the schema have to be measured again."
        )
    version = raw.get("schema_version")
    if version != VERSION:
        age = "an older" if isinstance(version, int) and version < VERSION else "an unknown"
        raise FenError(f"{path} has {age} schema version ({version!r}); this version of Fen reads {VERSION}.")
    try:
        result = _result({key: value for key, value in raw.items() if key not in ("schema", "schema_version")})
    except (TypeError, ValueError) as error:
        raise FenError(f"{path} is not a whole benchmark result: {str(error).replace('__init__() ', '')}.") from None
    if kind is not None and result.kind != kind:
        raise FenError(f"{path} holds a result of the kind {result.kind!r}, not {kind!r}.")
    return result


def _result(raw: dict[str, Any]) -> Result:
    """Raises TypeError or ValueError that names the field which is missing, unknown or not of its type."""
    from bench.prices import Price

    if raw.get("price") is not None:
        raw["price"] = Price(**raw["price"])
        if not (isinstance(raw["price"].usd_per_device_hour, int | float) and raw["price"].usd_per_device_hour > 0):
            raise ValueError("the price must be above 0")
    result = Result(**raw)
    for name, kind in {"versions": dict, "data": dict, "model": str | None, "quantization": str | None}.items():
        if not isinstance(raw[name], kind):
            raise ValueError(f"{name} is {type(raw[name]).__name__}")
    for name in ("kind", "date", "commit", "command", "device"):
        if not isinstance(raw[name], str):
            raise ValueError(f"{name} is not text")
    return result


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line() -> str:
    """What was typed, without the folders of this machine and without secrets."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = Path(sys.argv[0]).name if module is None or module.name == "server.cli" else f"python -m {module.name}"
    words = ["fen" if program in ("cli.py", "fen") else program]
    for word, before in zip(sys.argv[1:], sys.argv, strict=False):
        option, equals, value = word.partition("=")
        if before in SECRETS or (option in SECRETS and equals):
            word = f"{option}=…" if equals and option in SECRETS else "…"
        elif word.startswith("/"):
            word = Path(word).name
        elif equals and value.startswith("/"):
            word = f"{option}={Path(value).name}"
        words.append(f"'{word}'" if " " in word else word)
    return " ".join(words)
