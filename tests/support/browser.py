"""A page in Chromium, and what tests ask of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

HOSTILE = '</script><script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">'
MAP = "[data-widget=map] .plot"
PAPER = "getComputedStyle(document.documentElement).backgroundColor"
TITLE = (
    "((card) => card && !card.hidden ? card.querySelector('h2').textContent : null)"
    "(document.getElementById('card'))"
)
# elements in which texts that stand in a line overlap
CROWDED = """([within, texts, apart]) => [...document.querySelectorAll(within)].filter((one) => {
  const ends = [...one.querySelectorAll(texts)].map((text) => text.getBoundingClientRect());
  ends.sort((a, b) => a.left - b.left);
  return ends.some((end, i) => i && end.left < ends[i - 1].right + apart);
}).length"""


class Opened:
    """A page in the browser, and all that it asked for and complained of: nothing, at its end."""

    def __init__(self, browser: Any, file: Path, text: str, **context: Any):
        file.write_text(text, encoding="utf-8")
        self.address, self.requests, self.complaints = file.as_uri(), list[str](), list[str]()
        self.view = browser.new_page(viewport={"width": 1280, "height": 900}, **context)
        self.evaluate, self.locator = self.view.evaluate, self.view.locator
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.on("console", self._complain)
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.goto(self.address)
        self.ready()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.view.close()
        assert self.complaints == []
        assert self.foreign() == []

    def _complain(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def foreign(self) -> list[str]:
        urls = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        return [url for url in urls if url.partition("#")[0] != self.address]

    def ready(self) -> None:
        self.view.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)

    def until(self, true: str) -> None:
        """Waits for an expression to hold; not by playwright's own way, which evaluates text within
        the page: its policy forbids that."""
        for _ in range(200):
            if self.evaluate(true):
                return
            self.view.wait_for_timeout(25)
        raise AssertionError(f"never true: {true}")

    def resize(self, width: int = 1280, height: int = 900) -> None:
        """Nothing is cut at the side."""
        self.view.set_viewport_size({"width": width, "height": height})
        self.until(f"document.documentElement.scrollWidth <= {width}")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.view.keyboard.press(key)

    def said(self) -> str:
        """What a screen reader is told now."""
        return self.locator("#now").inner_text()

    def title(self) -> str | None:
        """Of the card that is shown."""
        return self.evaluate(TITLE)

    def opens(self, title: str) -> None:
        """Waits for a card."""
        self.until(f"{TITLE} === {json.dumps(title)}")

    def ask(self, text: str) -> list[str]:
        """What the search finds."""
        self.press("/")
        self.locator("#find").fill(text)
        return self.locator("#found li").all_inner_texts()

    def map(self, row: int) -> list[float | None]:
        """The values of a row of the map, as drawn."""
        heatmap = f"document.querySelector('{MAP}').plot.panel.marks[0]"
        values = self.evaluate(f"{heatmap}.values.map((v) => Number.isNaN(v) ? null : v)")
        columns = self.evaluate(f"{heatmap}.columns")
        return values[row * columns : (row + 1) * columns]

    def drawn(self, title: str) -> list[list[dict[str, Any]]]:
        """What is drawn in each panel of a section: its marks."""
        section = (
            "[...document.querySelectorAll('main section')].find((s) => "
            "s.querySelector('h3')?.firstChild.textContent.trim() === title)"
        )
        marks = f"[...{section}.querySelectorAll('.plot')].map((one) => one.plot.panel.marks)"
        return self.evaluate(f"(title) => {marks}", title)

    def sheet(self, name: str) -> Any:
        """The table of a section, unfolded."""
        unfold = "(all) => all.forEach((details) => { details.open = true; })"
        self.locator(f"#{name} .sheet details").evaluate_all(unfold)
        return self.locator(f"#{name} .sheet")

    def tokens(self) -> list[str]:
        """Of the text with its routes."""
        return self.locator(".routed .body span").all_text_contents()

    def colours(self) -> list[str]:
        """Of each token."""
        colours = "(all) => all.map((e) => getComputedStyle(e).backgroundColor)"
        return self.locator(".routed .body span").evaluate_all(colours)

    def route(self) -> list[list[str]]:
        """Of each layer the experts with their weights, as the panel beside the text shows them."""
        rows = self.locator(".route tbody tr").all()
        return [row.locator(".chip").all_text_contents() for row in rows]

    def read_charts(self) -> int:
        """Every chart says a number when an arrow is pressed; how many charts there are."""
        plots = self.locator("[data-panel]")
        for plot in plots.all():
            plot.focus()
            self.press("ArrowRight")
            assert re.search(r"\d", plot.locator(".unseen").text_content())
            assert plot.locator(".tip").is_visible()
            self.press("Escape")
            assert not plot.locator(".tip").is_visible()
        return plots.count()

    def crowded(self, within: str, texts: str, apart: int = 0) -> int:
        return self.evaluate(CROWDED, [within, texts, apart])

    def axe(self, place: str | None = None) -> list[tuple[str, str]]:
        """What axe complains of: each rule, and the first element that breaks it."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        found = axe.run(self.view, place, {"resultTypes": ["violations"]}).response["violations"]
        return [(one["id"], one["nodes"][0]["html"]) for one in found]
