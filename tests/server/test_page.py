"""The page at /, used in a real browser: chat, stop, errors, reload, keyboard, narrow and wide, light and dark."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.web_page import files
from tests.browser import Browser, chromium, needs_chromium
from tests.server.live import LiveServer

ENTER, ESCAPE = "\ue007", "\ue00c"
LONG = {"temperature": "0", "max_tokens": "400", "system": "Count as far as you can."}
SIZES = {"phone": (360, 740), "tablet": (800, 1000), "desktop": (1280, 800), "wide": (1900, 1000)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Browser]:
    """The page of the shared server in a window that remembers nothing; afterwards the console must be empty."""
    browser.new_tab()
    browser.open(server.url)
    yield browser
    assert not browser.complaints()


def ask(page: Browser, question: str, settings: dict[str, str] | None = None) -> None:
    for name, value in (settings or {}).items():
        page.run(
            "const f = document.querySelector('#settings-form').elements[arguments[0]];"
            "f.value = arguments[1]; f.dispatchEvent(new Event('input', {bubbles: true}))",
            name, value,
        )  # fmt: skip
    page.find("#input").send_keys(question, ENTER)


def open_with(page: Browser, url: str, turns: list[dict[str, Any]], *look: Any) -> None:
    """The page as a reload after this conversation shows it."""
    page.driver.get(f"{url}/version")  # of the same origin, and without a script
    page.run("sessionStorage.setItem('fen.chat', arguments[0])", json.dumps(turns))
    page.open(url, *look)


def answer(page: Browser, number: int = 1) -> str:
    """The finished answer `number`, once it is there."""
    page.wait(lambda: len(page.all(".assistant .foot")) >= number, f"answer {number}", 60)
    return page.all(".assistant .body")[number - 1].text


def test_small_and_complete_in_itself(server: LiveServer) -> None:
    """Hand-written, under 60 KB, nothing inline, nothing from another place."""
    assert sum(len(content) for content, _, _ in files().values()) < 60_000
    html = files()["index.html"][0].decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", html)
    for name, (content, _, _) in files().items():
        addresses = re.findall(r"https?://[\w./-]+", content.decode())
        assert all(address == "http://www.w3.org/2000/svg" for address in addresses), (name, addresses)
    assert server.http.get("/").headers["content-security-policy"].startswith("default-src 'self'")
    for reference in re.findall(r'(?:src|href)="(page/[^"]+)"', html):
        reply = server.http.get(f"/{reference}")
        assert reply.status_code == 200 and reply.content == files()[reference.removeprefix("page/")][0]


def test_files_are_sent_once(server: LiveServer) -> None:
    first = server.http.get("/page/chat.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = server.http.get("/page/chat.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/page/..%2fapp.py").status_code == 404
    assert server.http.get("/page/nothing.js").status_code == 404
    assert server.http.head("/").headers["content-type"] == "text/html; charset=utf-8"


def test_live_reply(server: LiveServer) -> None:
    """What the tiles and the table live on."""
    before = server.http.get("/v1/live").json()
    reply = server.chat(max_tokens=8).json()
    server.wait_idle()
    after = server.http.get("/v1/live").json()
    assert after["ready"] is True and after["reason"] is None and after["model"] == "smollm2"
    assert after["time"] > before["time"]
    assert after["tokens"]["generation"] - before["tokens"]["generation"] >= reply["usage"]["completion_tokens"]
    assert after["load"].keys() == server.load().keys()
    newest = after["requests"][0]
    assert newest["id"] == reply["id"] and newest["finish_reason"] == reply["choices"][0]["finish_reason"]
    usage = reply["usage"]
    assert [newest[name] for name in ("prompt_tokens", "completion_tokens", "cost")] == [
        usage[name] for name in ("prompt_tokens", "completion_tokens", "cost")
    ]
    assert newest["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert newest["time_to_first_token_ms"] == reply["metrics"]["time_to_first_token_ms"]
    assert "France" not in json.dumps(after)  # numbers only
    for _ in range(50):
        server.complete(max_tokens=1)
    server.wait_idle()
    assert len(server.http.get("/v1/live").json()["requests"]) == 50


@needs_chromium
def test_chat(page: Browser, server: LiveServer) -> None:
    page.wait(lambda: page.text("#state-text") == "ready", "the state")
    assert page.text("#model").startswith("smollm2 · Q4_1 · cpu")
    ask(page, "What is the capital of France?", {"temperature": "0"})
    assert "Paris" in answer(page)
    summary = page.text(".foot summary")
    usage = server.http.get("/v1/live").json()["requests"][0]
    assert f"{usage['completion_tokens']} tokens" in summary
    page.click(".foot summary")
    assert "no price is known" in page.text(".foot details p")
    ask(page, "And of Italy?")
    assert "Rome" in answer(page, 2)
    page.wait(lambda: len(page.all("#requests tr")) > 1, "two rows in the table")
    newest = page.all("#requests tr:first-child td")
    assert [newest[-1].text, newest[2].text] != ["", ""]
    page.wait(lambda: page.text("#ttft").endswith("s"), "the time to first token")
    assert page.text("#announce").startswith("Answer: ")


@needs_chromium
def test_cost_where_there_is_a_price(browser: Browser, launch: Callable[..., LiveServer]) -> None:
    live = launch(price="cpu-4vcpu")
    browser.open(live.url)
    ask(browser, "What is the capital of France?", {"temperature": "0", "max_tokens": "16"})
    answer(browser)
    cost = live.http.get("/v1/live").json()["requests"][0]["cost"]
    assert cost > 0
    shown = browser.text(".foot summary b").removeprefix("US$")
    assert float(shown) == pytest.approx(cost, rel=0.06)
    browser.click(".foot summary")
    assert "direct basis, at US$0.0279 a device-hour (cpu-4vcpu" in browser.text(".foot details p")
    rows = [row.text.split() for row in browser.all(".foot tbody tr")]
    assert [row[0] for row in rows] == ["input", "cached", "output"]
    assert sum(float(row[-1]) for row in rows) == pytest.approx(cost, rel=0.1)

    def tile() -> float:
        return float(browser.text("#usd-decode").replace("–", "0"))

    busy = browser.wait(tile, "US$ per million output tokens", 10)
    assert "measured on a CPU" in browser.text("#price-note") and "cpu-4vcpu" in browser.text("#price-note")
    browser.run("const b = document.getElementById('basis'); b.value = 'wall'; b.dispatchEvent(new Event('change'))")
    assert tile() > busy and browser.text("#basis-note").startswith("wall")
    assert not browser.complaints()


@needs_chromium
@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(page: Browser, server: LiveServer, how: str) -> None:
    ask(page, "Count from one to two hundred, in words.", LONG)
    page.wait(lambda: len(page.text(".assistant .body")) > 20, "the beginning of an answer")
    assert page.find("#send").is_displayed() is False
    if how == "button":
        page.click("#stop")
    else:
        page.press(ESCAPE)
    text = answer(page)
    assert "aborted" in page.text(".foot") and page.find("#send").is_displayed()
    server.wait_idle()
    assert server.http.get("/v1/live").json()["requests"][0]["finish_reason"] == "abort"
    assert page.all(".assistant .body")[0].text == text  # nothing came after it
    ask(page, "What is the capital of France?", {"max_tokens": "24", "system": ""})
    assert answer(page, 2)


@needs_chromium
def test_text_stays_text(page: Browser, server: LiveServer) -> None:
    """Whatever a user or a model writes becomes text, and Markdown becomes elements of a short list."""
    evil = "<img src=x onerror=document.title='owned'> <script>1</script> [a](javascript:alert(1)) **b** `<i>`"
    markdown = (
        "# Title\n\n1. one\n   - inner\n2. two\n\n```html\n<b>code</b>\n```\n> quoted\n\n[this](https://example.org/x)"
    )
    turns = [{"role": "user", "content": evil}, {"role": "assistant", "content": f"{evil}\n\n{markdown}"}]
    open_with(page, server.url, turns)
    body = page.find(".assistant .body")
    tags = page.run(
        "return [...new Set([...arguments[0].querySelectorAll('*')].map(e => e.tagName.toLowerCase()))]", body
    )
    assert set(tags) == {"p", "strong", "code", "ol", "ul", "li", "pre", "blockquote", "a"}
    assert page.text(".user .body") == evil and page.text(".assistant pre") == "<b>code</b>"
    assert [a.get_attribute("href") for a in page.all(".assistant .body a")] == ["https://example.org/x"]
    assert "owned" not in page.driver.title


@needs_chromium
def test_reload_keeps_the_conversation_and_the_settings(page: Browser) -> None:
    ask(page, "What is the capital of France?", {"temperature": "0", "max_tokens": "16", "stop": "zzz"})
    text = answer(page)
    page.driver.refresh()
    assert answer(page) == text and page.find(".foot summary").is_displayed()
    assert page.text("#open-settings") == "Sampling (3 set)"
    page.click("#open-settings")
    page.click("#reset-settings")
    assert page.find("#temperature").get_attribute("value") == "0.7"
    page.press(ESCAPE)
    ask(page, "Count from one to two hundred, in words.", LONG)
    page.wait(lambda: len(page.all(".assistant .body")[-1].text) > 20, "the beginning of an answer")
    page.driver.refresh()  # in the middle of an answer: what has come stays
    assert answer(page, 2) and "interrupted" in page.all(".foot")[1].text
    page.click("#new-chat")
    assert not page.all("#messages li") and page.find("#welcome").is_displayed()


@needs_chromium
def test_errors_are_sentences(page: Browser, server: LiveServer) -> None:
    page.run("document.getElementById('input').value = 'word '.repeat(600)")
    ask(page, "the end")
    page.wait(lambda: page.all(".failed"), "the error")
    assert "this model's context is 512 tokens" in page.text(".failed").lower()
    page.driver.get_log("browser")  # the browser itself notes the 400
    ask(page, "What is the capital of France?", {"temperature": "0", "max_tokens": "16"})  # the failed one is left out
    assert "Paris" in answer(page, 2)
    page.click(".foot .actions button:last-child")  # of the last: try again
    assert "Paris" in answer(page, 2)


@needs_chromium
def test_engine_and_server_that_go_away(browser: Browser, launch: Callable[..., LiveServer]) -> None:
    live = launch()
    browser.open(live.url)
    ask(browser, "Count from one to two hundred, in words.", LONG)
    browser.wait(lambda: len(browser.text(".assistant .body")) > 20, "the beginning of an answer")
    psutil.Process(live.engine_pid()).send_signal(signal.SIGKILL)
    browser.wait(lambda: browser.all(".failed"), "the error")
    assert len(browser.text(".assistant .body p")) > 20, "what had come before is kept"
    browser.wait(lambda: browser.text("#state-text") != "ready", "the state")
    browser.wait(lambda: browser.text("#state-text") == "ready", "the new engine", 90)
    ask(browser, "What is the capital of France?", {"max_tokens": "16", "system": ""})
    assert answer(browser, 2)
    live.process.kill()
    browser.wait(lambda: browser.text("#state-text") == "the server does not answer", "the state")
    ask(browser, "Hello?")
    browser.wait(lambda: len(browser.all(".failed")) == 2, "the error")
    assert browser.all(".failed")[1].text == "The server does not answer. Is it running?"


@needs_chromium
def test_api_key(browser: Browser, launch: Callable[..., LiveServer], tmp_path: Path) -> None:
    """Asked for where the server wants one, once for all calls; kept in this tab, and nowhere else."""
    (tmp_path / "keys").write_text("a-key-of-the-test\n")
    live = launch(api_key_file=str(tmp_path / "keys"))

    def give(key: str) -> None:
        browser.wait(lambda: browser.find("#key").is_displayed(), "the question for a key")
        browser.find("#key-input").send_keys(key, ENTER)

    browser.new_tab()
    browser.open(live.url)
    browser.wait(lambda: browser.find("#key").is_displayed(), "the question for a key")
    assert browser.accessibility() == []
    browser.click("#key-cancel")
    browser.wait(lambda: browser.text("#state-text") == "no key", "the state")
    ask(browser, "What is the capital of France?", {"temperature": "0", "max_tokens": "16"})
    give("not-the-key-of-it")
    browser.wait(lambda: browser.text("#key-why") == "The server did not accept this key.", "the second question")
    give("a-key-of-the-test")
    assert "Paris" in answer(browser)
    browser.wait(lambda: browser.text("#state-text") == "ready", "the state")
    browser.driver.refresh()
    browser.wait(lambda: browser.text("#state-text") == "ready", "the state")
    assert "a-key-of-the-test" not in browser.run(
        "return document.documentElement.outerHTML + JSON.stringify(localStorage)"
    )
    browser.new_tab()
    browser.open(live.url)
    browser.wait(lambda: browser.find("#key").is_displayed(), "the question for a key")


@needs_chromium
def test_keyboard(page: Browser) -> None:
    """Everything is reached by Tab, in order, and shows where the focus is."""
    page.wait(lambda: page.text("#state-text") == "ready", "the state")
    stops = page.tab_stops()
    assert not [stop for stop in stops if "unmarked" in stop], stops
    wanted = ["Skip to the message box", "theme", "scroller", "input", "open-settings", "new-chat", "send", "basis"]
    assert [stop for stop in stops if stop in wanted] == wanted
    page.run("document.getElementById('open-settings').focus()")
    page.press(ENTER)
    assert page.run("return document.getElementById('settings').contains(document.activeElement)")
    page.press(ESCAPE)
    assert page.run("return document.activeElement.id") == "open-settings"
    page.run("document.getElementById('input').focus()")
    from selenium.webdriver.common.keys import Keys

    page.find("#input").send_keys("two", Keys.SHIFT + ENTER + Keys.NULL, "lines")
    assert page.find("#input").get_attribute("value") == "two\nlines" and not page.all("#messages li")
    page.find("#input").clear()


@needs_chromium
@pytest.mark.parametrize("size", SIZES)
def test_looks(page: Browser, server: LiveServer, size: str) -> None:
    """Names, contrast, structure and room, in both colour schemes, with an answer, an error and the drawer open."""
    usage = {"prompt_tokens": 70, "completion_tokens": 9, "cost": 3e-6, "prompt_tokens_details": {"cached_tokens": 64}}
    usage["cost_details"] = {"device_seconds": {"prompt": 0.1, "cached_prompt": 0, "decode": 0.3}, "basis": "direct"}
    metrics = {"tokens_per_second": 20, "time_to_first_token_ms": 120}
    text = "# Title\n\nText with `code`.\n\n```\n" + "wide " * 60 + "\n```"
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "A question with a very" + "long" * 40 + "word"},
        {"role": "assistant", "content": text, "finish": "length", "usage": usage, "metrics": metrics},
        {"role": "user", "content": "Another"},
        {"role": "assistant", "content": "", "error": "The queue is full."},
    ]
    for scheme in ("light", "dark"):
        open_with(page, server.url, turns, *SIZES[size], scheme)
        page.wait(lambda: page.text("#state-text") == "ready", "the state")
        page.click(".foot summary")
        assert page.accessibility() == []
        if page.find("nav").is_displayed():
            page.click("#view-live")
            assert page.accessibility() == []
            page.click("#view-chat")
        page.click("#open-settings")
        assert page.accessibility() == []
        page.press(ESCAPE)


@needs_chromium
def test_colours_can_be_chosen(page: Browser) -> None:
    def ground() -> str:
        return page.run("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.click("#theme")
    page.click("#theme")
    dark = ground()
    assert light != dark and page.find("#theme").accessible_name == "Colours: dark"
    page.driver.refresh()
    assert ground() == dark
    page.click("#theme")
    assert ground() == light
    page.set_scheme("dark")
    assert ground() == dark


@needs_chromium
@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_docs(page: Browser, server: LiveServer, size: str) -> None:
    for scheme in ("light", "dark"):
        page.open(f"{server.url}/docs", *SIZES[size], scheme)
        assert page.run("return getComputedStyle(document.querySelector('th')).textAlign") == "left"  # it has its style
        assert page.accessibility() == []


def test_page_needs_no_engine(launch: Callable[..., LiveServer]) -> None:
    """It is there while the model loads, and says so."""
    live = launch(wait=False)
    reply = None
    while reply is None:
        try:
            reply = httpx.get(live.url, timeout=5)
        except httpx.TransportError:
            assert live.process.poll() is None, live.printed()
    assert reply.status_code == 200 and "<title>Fen</title>" in reply.text
    state = httpx.get(f"{live.url}/v1/live").json()
    assert state["ready"] or state["reason"]
