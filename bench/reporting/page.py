"""The report as one HTML file that needs nothing else, and as Markdown."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import seeds
from bench.report import markdown_table
from bench.reporting.charts import Axis, Chart, escape
from bench.reporting.section import NARROW, WIDE, Figure, Section
from bench.results import Result

TITLE = "What a million tokens cost"
QUALITY = "Beating another model's price says nothing about quality."
LOW, HIGH = 0.01, 20.0  # of the slider: US$ a device-hour


@dataclasses.dataclass(frozen=True)
class Report:
    """shown: (file, result, section). missing: what was not measured. empty: files without a figure to draw. unread:
    sentences. files: everything that was read."""

    shown: Sequence[tuple[str, Result, Section]]
    missing: Sequence[str]
    empty: Sequence[str]
    unread: Sequence[str]
    files: Sequence[tuple[str, Result]]


def file(name: str) -> str:
    return importlib.resources.files("bench.reporting").joinpath(name).read_text(encoding="utf-8")


def gaps(report: Report) -> list[str]:
    """What the report leaves out, in sentences."""
    lines = [f"Not measured: {what}." for what in report.missing]
    lines += [f"Nothing to draw in {name}." for name in report.empty]
    return lines + list(report.unread)


def price_lines() -> list[str]:
    """What the three price lines are, with the caveats of seeds/prices.toml."""
    apis = seeds.load().apis.values()
    return [f"{api.label}, US${api.usd_per_million_tokens:.2f} a million tokens: {api.note}" for api in apis]


def html_page(report: Report) -> str:
    sections = "".join(html_section(section) for _, _, section in report.shown)
    scenarios = [dataclasses.asdict(scenario) for _, _, section in report.shown for scenario in section.scenarios]
    links = "".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for _, _, section in report.shown)
    data = json.dumps(scenarios).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Fen: {TITLE.lower()}</title>
<style>{page_css()}</style>
</head>
<body>
<header>
<h1>{TITLE}</h1>
<p class="lead">Measured with Fen, with everything that each figure depends on. {QUALITY}</p>
<button type="button" id="theme" aria-label="Colours: as the system">◐</button>
<nav aria-label="Sections">{links}{'<a href="#what-if">What if</a>' if scenarios else ""}<a href="#provenance">Provenance</a></nav>
</header>
<main>
{sections}
{what_if() if scenarios else ""}
<section id="prices"><h2>The price lines</h2>
<p class="note">List prices of APIs, as the articles behind this project state them (seeds/README.md), under the articles' own names.</p>
{html_list(price_lines())}<p><strong>{QUALITY}</strong></p></section>
{gaps_section(report)}
<section id="provenance"><h2>Provenance</h2>{html_table(*provenance(report))}</section>
</main>
<script type="application/json" id="scenarios">{data}</script>
<script>{file("report.js")}</script>
</body>
</html>
"""  # noqa: E501


def page_css() -> str:
    """The charts' own colours follow the page's choice, not only the system's."""
    charts = file("charts.css")
    rule, dark = (part.split("{", 1)[1] for part in charts.split("svg.chart", 2)[1:])
    dark = dark.split("}", 1)[0]
    return (
        file("report.css")
        + f"svg.chart {{{rule.split('}', 1)[0]}}}\n"
        + f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) svg.chart {{{dark}}} }}\n"
        + f"[data-theme=dark] svg.chart {{{dark}}}\n"
        + charts.split("} }", 1)[1]
    )


def html_section(section: Section) -> str:
    figures = "".join(html_figure(figure) for figure in section.figures)
    table = html_table(section.header, section.rows) if section.rows else ""
    notes = html_list(section.notes) if section.notes else ""
    return (
        f'<section id="{section.key}"><h2>{escape(section.title)}</h2>'
        f'<p class="conditions">{escape(section.conditions)}</p>'
        f'<div class="figures">{figures}</div>{table}{notes}</section>\n'
    )


def html_figure(figure: Figure) -> str:
    wide = figure.draw(2 * WIDE - 160 if figure.broad else WIDE).svg()
    narrow = figure.draw(NARROW).svg()
    kind = ' class="broad"' if figure.broad else ""
    return (
        f'<figure{kind}><figcaption>{escape(figure.title)}</figcaption><div class="wide">{wide}</div>'
        f'<div class="narrow">{narrow}</div></figure>'
    )


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {escape(header[0] or header[1])}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def html_list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def gaps_section(report: Report) -> str:
    lines = gaps(report)
    return f'<section id="gaps"><h2>Not in this report</h2>{html_list(lines)}</section>' if lines else ""


def what_if() -> str:
    """Sliders for price and utilisation; report.js does the arithmetic of docs/cost.md."""
    apis = "".join(
        f'<tr data-price="{api.usd_per_million_tokens}"><th scope="row">{escape(api.label)}</th>'
        f"<td>US${api.usd_per_million_tokens:.2f}</td><td></td><td></td></tr>"
        for api in seeds.load().apis.values()
    )
    devices = "".join(
        f'<option value="{device.usd_per_hour}">{escape(device.label)}, US${device.usd_per_hour:g} '
        f"({escape(device.date)}, {escape(device.source)})</option>"
        for device in seeds.load().devices.values()
    )
    return f"""<section id="what-if"><h2>What if</h2>
<p class="note">The device time was measured; the price and the utilisation are yours to choose. Another device's price does not
make this one as fast as that.</p>
<div class="controls">
<label for="scenario">Measurement</label><select id="scenario"></select>
<label for="device-price">Price of the device <output id="price-out" for="device-price"></output></label>
<input type="range" id="device-price" min="0" max="1000" step="1" data-low="{LOW}" data-high="{HIGH}">
<label for="list-price">or a list price</label><select id="list-price"><option value="">as measured</option>{devices}</select>
<label for="utilisation">Utilisation <output id="utilisation-out" for="utilisation"></output></label>
<input type="range" id="utilisation" min="1" max="100" step="1" value="100">
</div>
<p class="big" aria-live="polite"><span><b id="wall-out"></b> US$ per million tokens, 3:1, wall</span>
<span><b id="busy-out"></b> busy, at 100%</span></p>
<div class="wide">{what_if_scale(2 * WIDE - 160).svg()}</div><div class="narrow">{what_if_scale(NARROW).svg()}</div>
<div class="scroll" tabindex="0" role="region" aria-label="Against list prices"><table><thead><tr><th scope="col">list price</th><th scope="col">a million</th><th scope="col">this setting</th>
<th scope="col">break-even utilisation</th></tr></thead><tbody id="against">{apis}</tbody></table></div>
<p class="conditions" id="scenario-conditions"></p><p><strong>{QUALITY}</strong></p></section>
"""  # noqa: E501


def what_if_scale(width: int) -> Chart:
    """A scale of US$ with the price lines, on which report.js moves a mark. data-scale: left, right, low, high."""
    apis = sorted(seeds.load().apis.values(), key=lambda api: api.usd_per_million_tokens)
    axis = Axis("", 0.001, 100.0, [0.001, 0.01, 0.1, 1.0, 10.0, 100.0], True)
    chart = Chart(width, 104, "Where this setting lies beside the list prices")
    left, right = 16.0, width - 26.0

    def at(value: float) -> float:
        return left + axis.share(value) * (right - left)

    chart.rule(left, 78, right, 78, "axis")
    for tick in axis.ticks:
        chart.rule(at(tick), 74, at(tick), 82, "axis")
        chart.text(at(tick), 98, axis.write(tick), "tick", "middle")
    for i, api in enumerate(apis):
        chart.rule(at(api.usd_per_million_tokens), 16 + 16 * i, at(api.usd_per_million_tokens), 78, "mark")
        chart.text(at(api.usd_per_million_tokens) + 4, 20 + 16 * i, api.label, "marked")
    scale = f"{left},{right},{axis.low},{axis.high}"
    chart.parts.append(f'<g class="here" data-scale="{scale}"><path d="M0 70l7-13h-14z" class="s0 dot"/></g>')
    return chart


def provenance(report: Report) -> tuple[list[str], list[list[str]]]:
    header = ["file", "kind", "date", "commit", "device", "model", "price", "versions", "command"]
    rows = []
    for name, result in report.files:
        price = result.price
        rows.append(
            [
                name,
                result.kind,
                result.date,
                result.commit,
                result.device,
                " ".join(part for part in (result.model, result.quantization) if part) or "–",
                f"US${price.usd_per_device_hour:g}/h ({price.name}, {price.date or 'no date'})" if price else "–",
                ", ".join(f"{package} {version}" for package, version in result.versions.items()),
                result.command,
            ]
        )
    return header, rows


def markdown_page(report: Report, pictures: Mapping[str, Path], folder: Path) -> str:
    """pictures: the exported file of each figure; they are linked relative to `folder`."""
    parts = [f"# {TITLE}", f"Measured with Fen, with everything that each figure depends on. {QUALITY}"]
    for _, _, section in report.shown:
        parts += [f"## {section.title}", section.conditions]
        for figure in section.figures:
            if figure.name in pictures:
                parts.append(f"![{figure.title}]({Path(os.path.relpath(pictures[figure.name], folder)).as_posix()})")
        if section.rows:
            rows = [[cell.replace("|", "\\|") for cell in row] for row in section.rows]
            parts.append(markdown_table(section.header, rows))
        if section.notes:
            parts.append(bullets(section.notes))
    parts += ["## The price lines", bullets(price_lines()), QUALITY]
    if lines := gaps(report):
        parts += ["## Not in this report", bullets(lines)]
    header, rows = provenance(report)
    parts += ["## Provenance", markdown_table(header, [[cell.replace("|", "\\|") for cell in row] for row in rows])]
    return "\n\n".join(parts) + "\n"


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
