"""`fen bench report`: what it shows, what it refuses, and the page in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import seeds
from bench.prices import Price
from bench.reporting.charts import Axis, nice, number
from bench.reporting.command import run
from engine.errors import FenError
from server.cli import app
from tests.bench import report_results as made
from tests.browser import Browser, chromium, needs_chromium

Pages = tuple[Path, Path]
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """report(*results) -> (HTML, Markdown)."""

    def make(*results: made.Result) -> tuple[str, str]:
        files = made.write(tmp_path, *results)
        run(files, str(tmp_path / "r.html"), str(tmp_path / "r.md"), None)
        return (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()

    return make


def test_a_figure_stands_with_its_conditions(report: Callable[..., tuple[str, str]]) -> None:
    """docs/cost.md: no US$ without model, quantization, device, lengths, concurrency, utilisation and basis."""
    for text in report(made.ladder(), made.sweep(), made.kernels()):
        for words in (
            "smollm2-135m-instruct (Q4_1)", "measured on a CPU", "128 tokens in", "64 tokens out",
            "concurrency 1, 2, 4, 8, 16",
            "Basis busy, utilisation 100%", "prompts of 544 to 608 tokens", "cpu-4vcpu, 2026, public cloud price lists",
            "Beating another model's price says nothing about quality.",
        ):  # fmt: skip
            assert words in text.replace("&#x27;", "'"), words
        for api in seeds.load().apis.values():
            assert f"{api.label}, US${api.usd_per_million_tokens:.2f} a million tokens" in text
        for result in (made.ladder(), made.sweep(), made.kernels()):
            assert result.commit in text and result.device in text and result.versions["torch"] in text


def test_the_page_needs_nothing_else(report: Callable[..., tuple[str, str]]) -> None:
    html, _ = report(made.ladder(), made.sweep(), made.kernels())
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[\w/.-]*", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:link|img|iframe)|\bsrc=|@import|url\(", html)
    assert "default-src 'none'" in html


def test_what_was_not_measured_is_named_and_left_out(report: Callable[..., tuple[str, str]]) -> None:
    html, markdown = report(made.kernels())
    for text in (html, markdown):
        assert "Not measured: the cost ladder (`fen bench ladder`)." in text
        assert "Not measured: serving under load (`fen bench sweep`)." in text
    assert 'id="what-if"' not in html and "rung" not in markdown and "<svg" in html


def test_without_a_price_seconds_and_no_dollars(report: Callable[..., tuple[str, str]]) -> None:
    html, markdown = report(made.ladder(price=None), made.sweep(price=None))
    assert "no price was given, so there is no US$ figure" in markdown
    shown = re.sub(r'<section id="(what-if|prices)".*?</section>', "", html, flags=re.S)
    assert not re.search(r"US\$\d", shown)
    assert "device seconds per million tokens" in html


def test_the_ladder_says_whether_its_target_is_met(report: Callable[..., tuple[str, str]]) -> None:
    _, whole = report(made.ladder())
    cut = made.ladder().data["rungs"][-1]["cut"]
    assert cut > 0.9 and f"The last rung is {cut:.1%} below the first" in whole and ", is met." in whole
    _, part = report(made.ladder(rungs=3))
    assert "Not complete: 3 rungs are measured" in part and ", is met." not in part
    short = made.ladder()
    short.data["rungs"][-1]["cut"] = 0.5
    assert ", is missed." in report(short)[1]


def test_concurrency_at_which_a_price_is_passed(report: Callable[..., tuple[str, str]]) -> None:
    rows = [made.point(1, Price(30.0, "given", "", "")), made.point(16, Price(0.01, "given", "", ""))]
    _, markdown = report(made.sweep(Price(1.0, "given", "", ""), rows))
    assert "Below GPT-4o's US$4.40 (busy) from concurrency 16 on" in markdown


def test_points_without_an_answer_are_left_out(report: Callable[..., tuple[str, str]]) -> None:
    _, markdown = report(made.sweep(points=[made.point(1), made.point(2), made.point(4, completed=0)]))
    assert "Concurrency 4: no request was answered, so it is left out." in markdown


FREE = {"usd_per_device_hour": 0, "name": "", "date": "", "source": ""}


def test_kernels_that_are_wrong_are_named(report: Callable[..., tuple[str, str]]) -> None:
    result = made.kernels()
    result.data["rows"][0]["error"] = None  # NaN, as a file has it
    result.data["rows"].append({"kernel": "sample", "case": "M9", "rows": 9, "failed": "out of memory"})
    _, markdown = report(result)
    assert "Not right: w4a16 shape M1." in markdown and "Not right: sample M9." in markdown


def test_a_gpu_run_as_bench_gpu_keeps_it(report: Callable[..., tuple[str, str]]) -> None:
    rows = made.kernels().data["rows"]
    ceilings = made.kernels().data["ceilings"]
    speed = {"rows": [{"name": "llama-3-8b W4A16", "tokens_per_second": 1234.4}]}
    sections = {"ceilings": ceilings, "time w4": {"rows": rows}, "end to end": speed,
                "transformers": {"not_run": "not installed"}}  # fmt: skip
    _, markdown = report(made.result("gpu", {"dry": False, "sections": sections}, None))
    assert "llama-3-8b W4A16: 1,234 tokens/s." in markdown and "Not run: transformers, not installed." in markdown
    with pytest.raises(FenError, match="nothing to show"):
        report(made.result("gpu", {"dry": True, "sections": sections}, None))


def broken(change: Callable[[dict], object]) -> str:
    raw = json.loads(json.dumps({"schema": "fen-bench", "schema_version": 1, "kind": "sweep", "date": "", "commit": "",
                                 "command": "", "device": "", "versions": {}, "model": "m", "quantization": None,
                                 "price": None, "data": {"points": []}}))  # fmt: skip
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a benchmark result"),
        ('{"date": "2025"}', "Results from before the schema have to be measured again"),
        (broken(lambda raw: raw.update(schema_version=0)), "an older schema version (0)"),
        (broken(lambda raw: raw.update(schema_version=99)), "an unknown schema version (99)"),
        (broken(lambda raw: raw.update(schema_version="1")), "an unknown schema version"),
        (broken(lambda raw: raw.update(kind="tea")), "nothing to show"),
        (broken(lambda raw: None), "nothing to show"),
        (broken(lambda raw: raw.update(data={})), "not a whole result of the kind 'sweep'"),
        (broken(lambda raw: raw.update(data={"points": [{"completed": 3}]})), "not a whole result of the kind 'sweep'"),
        (broken(lambda raw: raw.update(kind="ladder", data={"rungs": []})), "nothing to show"),
        (broken(lambda raw: raw.update(kind="ladder", data={"rungs": [{}]})), "not a whole result"),
        (broken(lambda raw: raw.update(price=FREE)), "above 0"),
        (broken(lambda raw: raw.update(price=FREE | {"usd_per_device_hour": -1})), "above 0"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    got = CliRunner().invoke(app, ["bench", "report", str(path), "--html", str(tmp_path / "r.html")])
    assert got.exit_code == 1 and got.output.startswith("fen: ") and got.output.count("\n") == 1
    assert sentence in got.output and not (tmp_path / "r.html").exists()


def test_files_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FenError, match="cannot be read"):
        run([str(tmp_path / "no.json")], "r.html", "r.md", None)
    with pytest.raises(FenError, match="no result in the folder"):
        run([str(tmp_path)], "r.html", "r.md", None)
    (tmp_path / "file").write_text("")
    files = made.write(tmp_path, made.kernels())
    with pytest.raises(FenError, match="cannot be written"):
        run(files, str(tmp_path / "file" / "r.html"), "r.md", None)


def test_a_stray_file_in_a_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write(tmp_path, made.kernels())
    (tmp_path / "old.json").write_text("{}")
    run([str(tmp_path)], str(tmp_path / "r.html"), str(tmp_path / "r.md"), None)
    assert "old.json is not a benchmark result" in capsys.readouterr().err
    assert "old.json is not a benchmark result" in (tmp_path / "r.md").read_text()


def test_the_results_of_the_repository(tmp_path: Path) -> None:
    run([], str(tmp_path / "r.html"), str(tmp_path / "r.md"), None)
    text = (tmp_path / "r.md").read_text()
    assert all(path.name in text for path in RESULTS.glob("*.json"))


def test_axes() -> None:
    assert nice(0, 9.3) == [0, 2, 4, 6, 8, 10] and number(0.00123456) == "0.00123" and number(12345.6) == "12,346"
    axis = Axis.logarithmic("", [0.02, 4.4])
    assert axis.ticks[0] >= axis.low and axis.share(axis.low) == 0 and axis.share(axis.high) == pytest.approx(1)
    assert Axis.linear("", []).high > 0


@needs_chromium
def test_export(tmp_path: Path) -> None:
    files = made.write(tmp_path, made.ladder(), made.sweep())
    run(files, str(tmp_path / "r.html"), str(tmp_path / "r.md"), str(tmp_path / "pictures"))
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert {path.suffix for path in pictures} == {".svg", ".png"} and len(pictures) == 14
    for path in pictures:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 4000
        else:
            assert f"](pictures/{path.name})" in (tmp_path / "r.md").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@needs_chromium
def test_clicking_through(browser: Browser, tmp_path: Path) -> None:
    files = made.write(tmp_path, made.ladder(), made.sweep(), made.kernels())
    run([*files, str(RESULTS)], str(tmp_path / "r.html"), str(tmp_path / "r.md"), None)
    url = (tmp_path / "r.html").as_uri()
    for width in (375, 1280):
        for scheme in ("light", "dark"):
            browser.open(url, width, 900, scheme)
            assert browser.accessibility() == []
            charts = [chart for chart in browser.all("svg.chart") if chart.is_displayed()]
            assert len(charts) >= 8 and all(chart.size["width"] <= width for chart in charts)
    for link in browser.all("nav a"):
        link.click()
        target = link.get_attribute("href").split("#")[1]
        assert (
            abs(browser.run("return document.getElementById(arguments[0]).getBoundingClientRect().top", target)) < 900
        )
    assert_sliders(browser)
    browser.set_scheme("light")
    ground = "return getComputedStyle(document.body).backgroundColor"
    ink = "return getComputedStyle(document.querySelector('.chart text')).fill"
    light = browser.run(ground), browser.run(ink)
    browser.click("#theme")
    browser.click("#theme")
    dark = browser.run(ground), browser.run(ink)
    assert light[0] != dark[0] and light[1] != dark[1]
    assert browser.accessibility() == [] and browser.complaints() == []


def assert_sliders(browser: Browser) -> None:
    """The arithmetic of docs/cost.md: wall = busy / utilisation, and both are in proportion to the price."""

    def figure(name: str) -> float:
        return float(browser.text(f"#{name}-out"))

    def slide(name: str, value: str) -> None:
        browser.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name, value,
        )  # fmt: skip

    rung = made.ladder().data["rungs"][-1]
    assert figure("busy") == pytest.approx(rung["usd_per_million"]["blended_3_to_1"], rel=0.04)
    assert figure("wall") == figure("busy")
    slide("utilisation", "50")
    assert figure("wall") == pytest.approx(2 * rung["usd_per_million"]["blended_3_to_1"], rel=0.04)
    place = browser.find(".here").get_attribute("transform")
    slide("list-price", "2.29")
    seconds = rung["seconds_per_million"]["blended_3_to_1"]
    assert figure("busy") == pytest.approx(seconds * 2.29 / 3600, rel=0.04)
    assert browser.find(".here").get_attribute("transform") != place
    even = seconds * 2.29 / 3600 / 4.40
    cell = browser.all("#against tr")[2].text
    assert f"{100 * even:.0f}%" in cell or "cannot match" in cell
    slide("device-price", "1000")
    assert figure("busy") == pytest.approx(seconds * 20 / 3600, rel=0.04)
    assert "cannot match it" in browser.all("#against tr")[0].text
    labels = [option.text for option in browser.all("#scenario option")]  # committed results are among them
    slide("scenario", str(next(i for i, label in enumerate(labels) if label.endswith("concurrency 1"))))
    assert "concurrency 1" in browser.text("#scenario-conditions")
    assert "Utilisation then" in browser.text("#scenario-conditions")
