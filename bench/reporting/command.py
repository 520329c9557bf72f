"""`fen bench report`: finds the results, turns each into a section, writes the page, the Markdown and the pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.reporting import kernels, ladder, load, single
from bench.reporting.page import Report, html_page, markdown_page
from bench.reporting.pictures import export_pictures
from bench.reporting.section import Section
from bench.results import Result
from bench.results import load as read_result
from engine.errors import FenError

RESULTS = Path(__file__).resolve().parent.parent / "results"
SKIPPED = {"parts", "reports"}  # folders of what is no result of its own
# kind of a result -> its section. The order is that of the report.
SECTIONS: dict[str, Callable[[Result, str], Section | None]] = {
    "ladder": ladder.section,
    "sweep": load.section,
    "serve": load.section,
    "compare-cpu": single.compared,
    "gpu": kernels.section,
    "kernels": kernels.section,
    "latency": single.latency,
    "forecast": single.forecast,
    "quality": single.quality,
}
# What a report without it says was not measured, and the command that measures it.
WANTED = {
    "the cost ladder": (("ladder",), "fen bench ladder"),
    "serving under load": (("sweep", "serve"), "fen bench sweep"),
    "kernels under the roofline": (("gpu", "kernels"), "fen bench kernels --output FOLDER"),
    "other engines on this CPU": (("compare-cpu",), "make bench-cpu"),
}


def run(files: Sequence[str], html: str, markdown: str, export: str | None) -> None:
    """`files`: results, or folders of them; none: bench/results. Raises FenError in one sentence."""
    results, unread = read(files)
    made: list[tuple[str, Result, Section]] = []
    empty: list[str] = []
    for path, result in results:
        section = section_of(path, result, len(made))
        if section is None:
            empty.append(f"{path.name} ({result.kind})")
        else:
            made.append((path.name, result, section))
    if not made:
        raise FenError(
            f"there is nothing to show: {', '.join(path.name for path, _ in results) or 'what was given'} holds no "
            "figure that the report draws; `fen bench sweep` and `fen bench ladder` measure some"
        )
    known = {result.kind for _, result, _ in made}
    missing = [f"{what} (`{how}`)" for what, (kinds, how) in WANTED.items() if not known & set(kinds)]
    report = Report(made, missing, empty, unread, [(path.name, result) for path, result in results])
    pictures = export_pictures(report, Path(export)) if export else {}
    for name, text in ((html, html_page(report)), (markdown, markdown_page(report, pictures, Path(markdown).parent))):
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise FenError(f"{path} cannot be written: {error.strerror}") from None
    for line in [*unread, *(f"not measured: {what}" for what in missing)]:
        print(line, file=sys.stderr)
    print(f"wrote {html} and {markdown}" + (f", and {len(pictures)} pictures into {export}" if export else ""))


def read(files: Sequence[str]) -> tuple[list[tuple[Path, Result]], list[str]]:
    """-> (results in the order of the report, sentences about files of a folder that are none). A file that was named
    and cannot be read is an error."""
    results: list[tuple[Path, Result]] = []
    unread: list[str] = []
    for given in [Path(file) for file in files] or [RESULTS]:
        if not given.is_dir():
            results.append((given, read_result(given)))
            continue
        found = sorted(path for path in given.rglob("*.json") if not SKIPPED & set(path.relative_to(given).parts))
        if not found:
            raise FenError(
                f"there is no result in the folder {given}; `fen bench sweep` and `fen bench ladder` make some"
            )
        for path in found:
            try:
                results.append((path, read_result(path)))
            except FenError as error:
                unread.append(str(error))
    order = list(SECTIONS)
    results.sort(key=lambda entry: order.index(entry[1].kind) if entry[1].kind in order else len(order))
    return results, unread


def section_of(path: Path, result: Result, number: int) -> Section | None:
    make = SECTIONS.get(result.kind)
    if make is None:
        return None
    try:
        return make(result, f"{result.kind}-{number + 1}")
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FenError(
            f"{path} is not a whole result of the kind {result.kind!r} ({type(error).__name__}: {error}); measure it "
            "again"
        ) from None
