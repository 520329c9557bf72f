"""Installs node-llama-cpp with its prebuilt CPU binary from npm: `python -m bench.peers.install DIRECTORY`.

No install script runs, so nothing is compiled and nothing is downloaded beyond the two npm packages and what they need.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "3.22.1"
BINARIES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
}


def default_directory() -> Path:
    """Where the binding is installed unless the user names another directory."""
    return Path.home() / ".cache" / "fen" / "node-llama-cpp"


def installed(directory: Path) -> bool:
    return (directory / "node_modules" / "node-llama-cpp" / "package.json").exists()


def install(directory: Path) -> None:
    """Installs into `directory/node_modules`. Raises RuntimeError with a sentence for the user where that cannot be."""
    machine = platform.system(), platform.machine()
    if machine not in BINARIES:
        raise RuntimeError(f"node-llama-cpp has no prebuilt CPU binary for {' '.join(machine)}")
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise RuntimeError("node and npm are needed for node-llama-cpp and are not installed")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "package.json").write_text('{"private": true}\n')
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{BINARIES[machine]}@{VERSION}"]
    flags = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
    done = subprocess.run([npm, "install", *flags, *packages], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm could not install node-llama-cpp: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else default_directory()
    try:
        install(target)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"node-llama-cpp {VERSION} is in {target}")
