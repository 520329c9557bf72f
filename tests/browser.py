"""A headless Chromium for tests: Debian's own `chromium` and `chromedriver`, driven by selenium; nothing is fetched."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

# Of every element that shows text of its own: is its contrast with what is painted behind it at least 4.5, or 3 where
# the text is large (WCAG 2.2 AA)? -> the ones that fail.
CONTRAST = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const rgba = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const ground = element => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const colour = rgba(getComputedStyle(at).backgroundColor);
    if (colour[3]) layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((under, layer) => over(layer, under), rgba("Canvas"));
};
const poor = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility({visibilityProperty: true}) || element.closest("svg, option")) continue;
  const box = element.getBoundingClientRect();
  if (box.width <= 1 || element.closest(".skip")) continue;
  const style = getComputedStyle(element), behind = ground(element);
  const ink = over(rgba(style.color), behind);
  const [high, low] = [luminance(ink), luminance(behind)].sort((a, b) => b - a);
  const ratio = (high + 0.05) / (low + 0.05), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) poor.push(`${element.tagName}.${element.className} ${ratio.toFixed(2)}: ${element.textContent.trim().slice(0, 40)}`);
}
return poor;
"""  # noqa: E501

# What must have a name; beside an open dialog nothing can be reached.
NAMED = """
const all = document.querySelector("dialog[open]") || document;
return [...all.querySelectorAll("button, select, input, textarea, summary, a[href], [role=region], meter")].filter(e => e.checkVisibility());
"""  # noqa: E501

# What else a checker of accessibility would list. -> sentences
STRUCTURE = """
const wrong = [], seen = new Set();
if (!document.documentElement.lang) wrong.push("the document has no language");
if (!document.title) wrong.push("the document has no title");
if (document.querySelectorAll("h1").length !== 1) wrong.push("there is not exactly one h1");
if (document.querySelectorAll("main").length !== 1) wrong.push("there is not exactly one main");
for (const element of document.querySelectorAll("[id]")) {
  if (seen.has(element.id)) wrong.push(`the id ${element.id} is there twice`);
  seen.add(element.id);
}
for (const name of ["for", "aria-labelledby", "aria-describedby"])
  for (const element of document.querySelectorAll(`[${name}]`))
    for (const id of element.getAttribute(name).split(" "))
      if (!seen.has(id)) wrong.push(`${name}=${id} names nothing`);
for (const image of document.querySelectorAll("img:not([alt])")) wrong.push(`${image.src} has no alt`);
for (const link of document.querySelectorAll("[target=_blank]:not([rel*=noopener])")) wrong.push(`${link} opens a window that can reach this one`);
let level = 0;
for (const heading of document.querySelectorAll("h1,h2,h3,h4,h5,h6")) {
  if (!heading.checkVisibility()) continue;
  if (+heading.tagName[1] > level + 1) wrong.push(`${heading.tagName} "${heading.textContent}" skips a level`);
  level = +heading.tagName[1];
}
for (const control of document.querySelectorAll("button, select, input, textarea, summary")) {
  if (!control.checkVisibility()) continue;
  const box = control.getBoundingClientRect();
  if (box.width && Math.min(box.width, box.height) < 23.5) wrong.push(`${control.id || control.textContent} is ${box.width}x${box.height}, too small to touch`);
}
if (document.documentElement.scrollWidth > innerWidth) wrong.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${innerWidth}`);
return wrong;
"""  # noqa: E501


class Browser:
    """One window; `driver` is selenium's."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, url: str, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        """`width` and `height` of the page in CSS pixels, also below what a window can have; `scheme`: light, dark."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.set_scheme(scheme)
        self.driver.get(url)

    def new_tab(self) -> None:
        """A tab that remembers nothing, in place of the present one."""
        old = self.driver.current_window_handle
        self.driver.switch_to.new_window("tab")
        new = self.driver.current_window_handle
        self.driver.switch_to.window(old)
        self.driver.close()
        self.driver.switch_to.window(new)
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
        self.complaints()

    def set_scheme(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        """The first element; NoSuchElementException where there is none."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """The first true value of `condition`."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(
            self.driver, seconds, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return waiting.until(lambda _: condition(), f"waited {seconds:g} s for: {what}")

    def picture(self, path: Path) -> None:
        path.write_bytes(self.driver.get_screenshot_as_png())

    def complaints(self) -> list[str]:
        """What the page has written to the console as an error or a warning since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def accessibility(self) -> list[str]:
        """What is wrong with names, contrast and structure in the present state of the page."""
        nameless = [
            f"no name: {element.get_attribute('outerHTML')[:80]}"
            for element in self.run(NAMED)
            if not element.accessible_name
        ]
        poor = [f"contrast of {line}" for line in self.run(CONTRAST)]
        return nameless + poor + self.run(STRUCTURE)

    def tab_stops(self, limit: int = 80) -> list[str]:
        """Press Tab until the page has been gone round; -> each stop's id or text, " (unmarked)" where the focus cannot
        be seen."""
        from selenium.webdriver.common.keys import Keys

        self.run(
            "document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus(); window.met = new Set()"
        )
        stops: list[str] = []
        for _ in range(limit):
            self.press(Keys.TAB)
            name, seen, end = self.run(
                "const e = document.activeElement, s = getComputedStyle(e), end = e === document.body || met.has(e);"
                "const name = e.id || (e.getAttribute('aria-label') || e.textContent).trim().slice(0, 30);"
                "met.add(e); return [name, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2, end]"
            )
            if end:
                break
            stops.append(name if seen else f"{name} (unmarked)")
        self.run("document.body.removeAttribute('tabindex')")
        return stops


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a profile of its own."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for switch in (
            "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
            "disable-background-networking", "disable-component-update", "disable-dev-shm-usage", "hide-scrollbars",
            "force-color-profile=srgb", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
        try:
            yield Browser(driver)
        finally:
            driver.quit()
