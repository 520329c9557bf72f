"""The report's charts as files: SVG, and PNG where a Chromium is installed to draw it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.reporting.page import Report
from bench.reporting.section import WIDE
from engine.errors import FenError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60


def export_pictures(report: Report, folder: Path) -> dict[str, Path]:
    """Writes them; figure name -> its SVG, which follows the reader's light or dark scheme. Raises FenError."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print("no PNG: none of chromium and google-chrome is installed to draw them", file=sys.stderr)
    found: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _, _, section in report.shown:
            for figure in section.figures:
                chart = figure.draw(2 * WIDE - 160 if figure.broad else WIDE)
                found[figure.name] = folder / f"{figure.name}.svg"
                found[figure.name].write_text(chart.standalone(), encoding="utf-8")
                if browser is not None:
                    draw(browser, found[figure.name], chart.width, int(chart.height) + 1)
    except OSError as error:
        raise FenError(f"the pictures cannot be written into {folder}: {error.strerror}") from None
    return found


def draw(browser: str, svg: Path, width: int, height: int) -> None:
    """`svg` as a PNG beside it, two dots for each of its units, light."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--force-device-scale-factor=2", f"--window-size={width},{height}",
            f"--screenshot={svg.with_suffix('.png').resolve()}", svg.resolve().as_uri(),
        ]  # fmt: skip
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        except (subprocess.SubprocessError, OSError) as error:
            raise FenError(f"{browser} did not draw {svg.name}: {type(error).__name__}") from None
