"""`fen doctor`: what is installed, what this machine has, what will run and why not. Only `devices` imports torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import urllib.parse
import urllib.request
from pathlib import Path

from engine.errors import FenError
from engine.messages import EngineOptions
from server.version import SOURCE_TREE, version

PACKAGES = ("engine", "kernels", "server", "bench", "seeds")
LIBRARIES = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub",
    "llguidance", "llvmlite", "fastapi", "uvicorn", "pyzmq", "msgspec", "prometheus_client", "typer", "rich",
)  # fmt: skip
# Releases that the project is tested with: (first, first that is too new).
TESTED = {"torch": ((2, 11), (2, 14)), "triton": ((3, 6), (3, 8))}
# /proc/cpuinfo's flag -> what it gives, best first; what the CPU kernels profit from.
CPU_FEATURES = {
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}
INSTALL = "run `make serve` in the repository, or `pip install -e .` there"


@dataclasses.dataclass
class Report:
    """Rows are (section, name, text); a problem is a sentence with the way out and keeps something from running."""

    rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, section: str, name: str, text: str) -> None:
        self.rows.append((section, name, text))


def examine() -> Report:
    """Everything `fen doctor` prints. Nothing is loaded or downloaded."""
    report = Report(problems=installation_problems())
    installation(report)
    libraries(report)
    machine(report)
    devices(report)
    models(report)
    return report


def installation_problems() -> list[str]:
    """What is wrong with the installation itself; cheap, so that `fen serve` can ask before it starts.

    The package on PyPI named `kernels`, which transformers imports when it is there, has the name of ours, and so has
    anything called `engine`, `server` or `bench`: whichever comes first on sys.path wins.
    """
    home = Path(__file__).resolve().parent.parent
    problems = []
    for name in PACKAGES:
        found = _folder(name)
        if found is None:
            problems.append(
                f"the package {name!r} cannot be found beside {home.name}/server: the installation is broken; {INSTALL}"
            )
        elif found.parent != home and name == "kernels":
            problems.append(
                "another package named 'kernels' (from PyPI, an add-on of transformers) hides Fen's own: "
                "run `pip uninstall kernels` in this environment, or install Fen in an environment of its own"
            )
        elif found.parent != home:
            problems.append(
                f"another package named {name!r} in {found.parent} hides Fen's own: "
                "remove it, or install Fen in an environment of its own"
            )
    return problems


def _folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # absent, or a folder without __init__.py
        return None
    return Path(spec.origin).resolve().parent


def _editable_source() -> Path | None:
    """The folder that `pip install -e` was run in; None for any other kind of installation."""
    try:
        text = importlib.metadata.distribution("fen-engine").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(text or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(urllib.request.url2pathname(urllib.parse.urlparse(origin["url"]).path))


def installation(report: Report) -> None:
    home, source = Path(__file__).resolve().parent.parent, _editable_source()
    if source is not None and source.resolve() != home:
        how = f"but `fen` in this environment belongs to {source}" + ("" if source.is_dir() else ", which is gone")
    else:
        how = (
            "editable"
            if source
            else "installed"
            if version() != SOURCE_TREE
            else "found through the path, not installed"
        )
    report.add("Installation", "Fen", f"{version()} in {home}, {how}")
    report.add("Installation", "Python", f"{platform.python_version()}, {sys.executable}")
    report.add("Installation", "System", f"{platform.system()} {platform.release()}, {platform.machine()}")


def libraries(report: Report) -> None:
    for name in LIBRARIES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "triton" and platform.system() != "Linux":
                report.add("Libraries", name, "none: it exists for Linux only, and only a GPU needs it")
                continue
            report.add("Libraries", name, "missing")
            report.problems.append(f"the package {name!r} is not installed; {INSTALL}")
            continue
        note = ""
        if name in TESTED:
            first, end = TESTED[name]
            if not first <= _release(found) < end:
                note = f" (tested with {_dotted(first)} up to {_dotted((end[0], end[1] - 1))})"
        report.add("Libraries", name, found + note)


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


def machine(report: Report) -> None:
    model, flags = _cpu()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.add("Machine", "CPU", f"{model}, {usable} cores")
    features = [label for flag, label in CPU_FEATURES.items() if flag in flags]
    if flags:
        without = "none of AMX, AVX-512 and AVX2: the CPU path works, slowly"
        report.add("Machine", "CPU features", ", ".join(features) or without)
    memory = _memory()
    if memory:
        report.add("Machine", "Memory", f"{memory[0] / 2**30:.1f} GiB, {memory[1] / 2**30:.1f} GiB available")


def _cpu() -> tuple[str, set[str]]:
    """(name, instruction set flags); the flags are empty where there is no /proc/cpuinfo."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return model, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return model, flags


def _memory() -> tuple[int, int] | None:
    """(total, available) bytes."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemTotal"], sizes["MemAvailable"]


def devices(report: Report) -> None:
    """Asks torch, because what torch sees is what the engine can use."""
    try:
        import torch
    except (ImportError, OSError) as error:
        report.add("Devices", "torch", "cannot be imported")
        report.problems.append(f"PyTorch cannot be imported ({error}); {INSTALL}")
        return
    report.add(
        "Devices", "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()} in PyTorch"
    )
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why = "this PyTorch is built without CUDA"
        elif not Path("/dev/nvidiactl").exists():
            why = "no NVIDIA driver is loaded"
        else:
            why = "PyTorch finds no GPU it can use"
        report.add("Devices", "cuda", f"none: {why}")
    else:
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            report.add(
                "Devices",
                f"cuda:{index}",
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}, "
                f"CUDA {torch.version.cuda}",
            )
    from engine.core.device import has_gpu

    if has_gpu() and (lacking := triton_lacks()):
        report.problems.append(f"Triton compiles its launchers here and finds no {lacking}; no GPU kernel can start")
    report.add("Devices", "used", "cpu; --device cuda runs on the GPU, untried so far" if has_gpu() else "cpu")


def triton_lacks() -> str:
    """What its first launch would miss (triton/runtime/build.py)."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "C compiler (gcc or clang)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.is_file() else "Python.h (Debian's package python3-dev)"


def models(report: Report) -> None:
    """The models in the caches, and for each whether it can be opened."""
    from engine.checkpoint import pull

    default = EngineOptions().model
    if pull.cached(default) is None:
        report.add("Models", default, "not here yet: `fen serve` or `fen pull` fetches it (about 96 MB)")
    names = {str(path.resolve()): default if path == pull.cached(default) else str(path) for path in _gguf_files()}
    for name in [*names.values(), *_hub_models()]:
        report.add("Models", name, _verdict(name))


def _gguf_files() -> list[Path]:
    from engine.checkpoint import pull

    return sorted(pull.cache_folder().glob("*.gguf"))


def _hub_models() -> list[str]:
    """Ids in Hugging Face's cache that have weights we could read."""
    import huggingface_hub

    from engine.checkpoint import pull

    try:
        found = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.errors.CacheNotFound:
        return []
    return sorted(repo.repo_id for repo in found if repo.repo_type == "model" and pull.cached(repo.repo_id))


def _verdict(model: str) -> str:
    from engine.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(model)
        size = checkpoint.total_bytes
        text = (
            f"runs: {checkpoint.config.architecture}, {checkpoint.parameters / 1e6:,.0f}M parameters, "
            f"{checkpoint.quantization}, {size / 2**20:,.0f} MiB"
        )
    except FenError as error:
        return f"does not run: {error}"
    memory = _memory()
    if memory and size > memory[1]:
        return text.replace("runs:", "does not fit into memory:", 1)
    return text
