"""GET /docs: docs/api.md as HTML, with nothing fetched from elsewhere."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from server.api_page import page

router = APIRouter()


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    body = "\n".join(_blocks(page(request.app.openapi())))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += '<link rel="stylesheet" href="page/docs.css"><link rel="icon" href="page/icon.svg">'
    link = '<p>For programs: <a href="openapi.json">openapi.json</a></p>'
    return HTMLResponse(
        f'<!doctype html><html lang="en"><title>Fen: HTTP API</title>{head}<main>{link}{body}</main></html>'
    )


def _blocks(markdown: str) -> Iterator[str]:
    """The kinds of blocks that server.api_page writes: headings, tables, lists, paragraphs."""
    for block in re.split(r"\n\n+", markdown.strip()):
        lines = block.split("\n")
        if block.startswith("<!--"):
            continue
        if heading := re.fullmatch(r"(#+) (.*)", block):
            level, text = len(heading[1]), heading[2]
            yield f'<h{level} id="{html.escape(text.lower().replace(" ", "-"))}">{_inline(text)}</h{level}>'
        elif block.startswith("|"):
            rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
            head, *body = [rows[0], *rows[2:]]
            yield f"<table>{_row(head, 'th')}{''.join(_row(row, 'td') for row in body)}</table>"
        elif block.startswith("- "):
            yield f"<ul>{''.join(f'<li>{_inline(line[2:])}</li>' for line in lines)}</ul>"
        else:
            yield f"<p>{_inline(block)}</p>"


def _row(cells: list[str], tag: str) -> str:
    texts = [_inline(cell.strip().replace("\\|", "|")) for cell in cells]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"


def _inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    text = re.sub(r"\[([^]]*)\]\((#[\w-]*)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\*\*([^*]*)\*\*", r"<strong>\1</strong>", text)
