"""The page in a browser: Chromium, headless, started once. Hostile corpora, the mouse, the
keyboard, both themes."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_inspect.reporting.charts.spec import Axis, Chart, Heatmap, Panel, Scale
from moe_inspect.reporting.render.html import Page, Section, chart_section, page_html
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.payload import table_json
from moe_inspect.reporting.report import Report, report
from moe_inspect.text import number, readable
from tests.support.damage import edit_manifest
from tests.support.synthetic import encoder_decoder, uniform_ids, write_counts, write_trace

HOSTILE = '<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">'
LABELS = ("<b>code</b>", "law", "math", "prose")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("REQUIRE_CHROMIUM"),
        reason="no chromium here: apt-get install chromium, or set CHROMIUM to its path",
    ),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """4 × 8: expert 5 of layer 3 takes half, code goes to expert 3 of layer 2; every token id has a
    hostile text."""
    T, E, rng = 6_000, 8, np.random.default_rng(0)
    document, token_id = np.arange(T) // 100, rng.integers(0, 50, T)
    ids = [uniform_ids(rng, T, E, 2) for _ in range(4)]
    code = document % 4 == 0
    ids[2][code] = np.stack([np.full(T, 3), (3 + rng.integers(1, E, T)) % E], axis=1)[code]
    ids[3][rng.random(T) < 0.5] = [5, 2]
    root = tmp_path_factory.mktemp("small") / "t"
    settings: dict[str, Any] = {"document": document, "domain_of_document": LABELS, "words": 50}
    settings |= {"weights": [np.full((T, 2), 0.5, np.float32)] * 4, "token_id": token_id}
    write_trace(root, ids, E, manifest={"model": {"id": HOSTILE}}, **settings)
    words = {"token_id": pa.array(range(50), pa.int32())}
    words |= {"token": pa.array(f"{HOSTILE}\n\u202e{i}" for i in range(50))}
    pq.write_table(pa.table(words), root / "vocabulary.parquet")
    edit_manifest(root, vocabulary=None)  # its hash was of another
    return report(root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "REQUIRE_CHROMIUM is set, and there is none"
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


class Opened:
    """A page in the browser, and all that it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, text: str, **context: Any):
        file.write_text(text, encoding="utf-8")
        self.address, self.requests, self.complaints = file.as_uri(), list[str](), list[str]()
        self.view = browser.new_page(viewport={"width": 1280, "height": 900}, **context)
        self.evaluate, self.locator = self.view.evaluate, self.view.locator
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.on("console", self._complain)
        self.view.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.view.goto(self.address)
        self.view.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)

    def _complain(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def foreign(self) -> list[str]:
        urls = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        return [url for url in urls if url.partition("#")[0] != self.address]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.view.keyboard.press(key)

    def said(self) -> str:
        """What a screen reader is told now."""
        return self.locator("#now").inner_text()

    def map(self, row: int) -> list[float | None]:
        """The values of a row of the map, as drawn."""
        heatmap = "document.querySelector('[data-widget=map] .plot').plot.panel.marks[0]"
        values = self.evaluate(f"{heatmap}.values.map((v) => Number.isNaN(v) ? null : v)")
        columns = self.evaluate(f"{heatmap}.columns")
        return values[row * columns : (row + 1) * columns]

    def until(self, true: str) -> None:
        """Waits for an expression to hold; not by playwright's own way, which evaluates text within
        the page: its policy forbids that."""
        for _ in range(200):
            if self.view.evaluate(true):
                return
            self.view.wait_for_timeout(25)
        raise AssertionError(f"never true: {true}")

    def axe(self, place: str | None = None) -> list[tuple[str, str]]:
        """What axe complains of: each rule, and the first element that breaks it."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        found = axe.run(self.view, place, {"resultTypes": ["violations"]}).response["violations"]
        return [(one["id"], one["nodes"][0]["html"]) for one in found]

    def drawn(self, title: str) -> list[list[dict[str, Any]]]:
        """What is drawn in each panel of a section: its marks."""
        plots = (
            "[...document.querySelectorAll('main section')].find((s) => "
            "s.querySelector('h3')?.firstChild.textContent.trim() === title).querySelectorAll('.plot')"
        )
        return self.evaluate(f"(title) => [...{plots}].map((one) => one.plot.panel.marks)", title)

    def title(self) -> str | None:
        shown = "(card => card && !card.hidden ? card.querySelector('h2').textContent : null)"
        return self.evaluate(f"{shown}(document.getElementById('card'))")

    def opens(self, title: str) -> None:
        """Waits for a card."""
        self.until("!document.getElementById('card').hidden")
        assert self.title() == title


@pytest.fixture(scope="module")
def opened(
    browser: Any, small: Report, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    page = Opened(browser, tmp_path_factory.mktemp("page") / "page.html", report_page(small))
    yield page
    page.view.close()


def test_it_renders_without_a_complaint_and_asks_for_nothing(opened: Opened):
    plots = opened.locator(".plot")
    assert plots.count() >= 4
    assert all(plots.nth(i).locator(".canvas svg").count() for i in range(plots.count()))
    assert opened.complaints == []
    assert opened.foreign() == []
    assert opened.locator("#load h3").text_content().startswith("Load of every expert")


def test_the_map_shows_the_load_table(opened: Opened, small: Report):
    table: Any = small.tables["load"]
    row = table[(table["layer"] == 3) & (table["expert"] == 5)].iloc[0]
    assert opened.map(3)[5] == pytest.approx(row["load_ratio"])
    opened.evaluate("document.querySelector('[data-widget=map] .plot').plot.move(3, 5)")
    said = opened.locator("[data-widget=map] .tip").inner_text()
    assert f"expert 5: {row['load_ratio']:.2f}× the mean load" in said
    assert f"{int(row['assignments']):,} assignments" in said
    assert opened.said() == said


def test_domains_and_order_switch_what_the_map_shows(opened: Opened, small: Report):
    before = opened.map(2)
    opened.locator("#map-domain").select_option(label=LABELS[0])
    table: Any = small.tables["domains"]
    code = table[(table["layer"] == 2) & (table["domain"] == LABELS[0])]["assignments"].to_numpy()
    assert opened.map(2) == pytest.approx(code / code.mean())
    assert opened.map(2) != before
    assert opened.said().count(f"in {LABELS[0]}") == 1
    opened.locator("#map-domain").select_option(label="all domains")
    opened.locator("#map-order").select_option(label="by load")
    load: Any = small.tables["load"][small.tables["load"]["layer"] == 3]
    by_load = load["load_ratio"].sort_values(ascending=False)
    assert opened.map(3) == pytest.approx(by_load.to_numpy())
    opened.locator("[data-widget=map] .plot").focus()
    opened.press("Home", "ArrowDown", "ArrowDown", "ArrowDown", "Home")
    busiest = int(load["expert"].loc[by_load.index[0]])
    assert opened.said().startswith(f"Layer 3, expert {busiest}: ")
    opened.locator("#map-order").select_option(label="by expert id")
    assert opened.map(3) == pytest.approx(load["load_ratio"].to_numpy())


def test_a_click_opens_the_card_of_the_expert(opened: Opened):
    opened.locator("[data-widget=map] .plot").scroll_into_view_if_needed()
    cell = opened.locator("[data-widget=map] .canvas g rect").nth(3 * 8 + 5).bounding_box()
    opened.view.mouse.click(cell["x"] + cell["width"] / 2, cell["y"] + cell["height"] / 2)
    opened.opens("Layer 3 · expert 5")
    opened.press("Escape")
    assert opened.title() is None


def test_the_keyboard_alone_is_enough(opened: Opened):
    opened.locator("[data-widget=map] .plot").focus()
    opened.press("Home", *["ArrowUp"] * 4, "ArrowDown", "ArrowRight", "ArrowRight")
    assert opened.said().startswith("Layer 1, expert 2: ")
    opened.press("Enter")
    assert opened.title() == "Layer 1 · expert 2"
    assert opened.evaluate("document.activeElement.id") == "card"
    opened.press("Escape")
    assert opened.title() is None
    assert opened.evaluate("document.activeElement.parentElement.dataset.widget") == "map"


def test_what_is_hostile_is_text(opened: Opened):
    opened.locator("[data-widget=map] .plot").focus()
    opened.press("Enter")
    card = opened.locator("#card").inner_text()
    assert HOSTILE + r"\n\u202e" in card
    assert "<b>code</b>" in card
    assert HOSTILE in opened.locator("h1").inner_text()
    assert "<b>code</b>" in opened.locator(".ytick").all_text_contents()
    assert opened.evaluate("window.pwned") is None
    assert opened.locator("img").count() == 0
    opened.press("Escape")


CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = (v) => ((v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length && c[3] !== 0) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const query of [
    "h1", ".subtitle", ".verdict li", "p.text", ".facts dd", ".facts dt", ".definitions dd", "td",
    "th", "summary", "button", "select", ".now", ".xtick", ".ytick", ".legend button", ".scale",
    ".xtitle, .ytitle", ".in", ".severity", "figcaption",
  ])
    for (const e of document.querySelectorAll(query)) {
      const style = getComputedStyle(e);
      const under = e.matches(".in") ? parse(e.previousSibling.getAttribute("fill")) : ground(e);
      const ink = light(parse(e instanceof SVGElement ? style.fill : style.color));
      const [a, b] = [ink, light(under)].sort((x, y) => y - x);
      found[query] = Math.min(found[query] ?? 99, (a + 0.05) / (b + 0.05));
    }
  return found;
}"""


def test_both_themes_are_legible(opened: Opened):
    light = opened.evaluate(CONTRAST)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    before = opened.evaluate(paper)
    opened.view.get_by_label("Switch between light and dark").click()
    opened.until("getComputedStyle(document.querySelector('.ytick')).fill.match(/\\d+/)[0] > 128")
    dark = opened.evaluate(CONTRAST)
    assert before != opened.evaluate(paper)
    assert len(light) == len(dark) >= 18
    assert min(light.values()) >= 4.5, light
    assert min(dark.values()) >= 4.5, dark
    opened.evaluate(f"document.querySelector('h1').style.color = {paper}")
    assert min(opened.evaluate(CONTRAST).values()) < 1.1  # what cannot be read is found
    opened.view.get_by_label("Switch between light and dark").click()


def test_the_policy_stops_scripts_and_requests(browser: Any, opened: Opened):
    view = browser.new_page()
    said = list[str]()
    view.on("console", lambda message: said.append(message.text))
    inject = """() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = 1";
      document.head.append(script);
      return fetch("data:text/plain,x").then(() => "fetched", () => "refused");
    }"""
    view.goto("about:blank")
    assert view.evaluate(inject) == "fetched"
    assert view.evaluate("window.ran") == 1
    view.goto(opened.address)
    assert view.evaluate(inject) == "refused"
    assert view.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in said)
    view.close()


def test_every_chart_is_read_with_the_keyboard_and_zoomed_with_the_mouse(opened: Opened):
    plots = opened.locator("[data-panel]")
    for i in range(plots.count()):
        plots.nth(i).focus()
        opened.press("ArrowRight")
        said = plots.nth(i).locator(".unseen").text_content()
        assert plots.nth(i).locator(".tip").is_visible()
        assert re.search(r"\d", said), said
        opened.press("Escape")
        assert not plots.nth(i).locator(".tip").is_visible()
    balance = plots.first
    balance.scroll_into_view_if_needed()
    box = balance.locator(".canvas").bounding_box()
    opened.view.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 60)
    opened.view.mouse.down()
    opened.view.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 60)
    opened.view.mouse.up()
    assert balance.locator(".xtick").all_text_contents() == ["2", "3"]
    balance.get_by_text("Reset zoom").click()
    assert balance.locator(".xtick").all_text_contents() == ["0", "1", "2", "3"]
    before = balance.locator(".canvas circle").count()
    named = balance.locator(".legend button", has_text="uneven layer")
    named.click()
    assert balance.locator(".canvas circle").count() < before
    assert named.get_attribute("aria-pressed") == "false"
    named.click()
    assert balance.locator(".canvas circle").count() == before


def test_ids_are_unique_and_every_figure_is_named(opened: Opened):
    html = opened.view.content()
    assert not re.findall(r'aria-label=""', html)
    unnamed = (
        "[...document.querySelectorAll('.plot, select, button, "
        "[role=dialog]')].filter((e) => !(e.ariaLabel || e.labels?.length || e.textContent || "
        "e.getAttribute('aria-labelledby'))).length"
    )
    assert opened.evaluate(unnamed) == 0
    ids = (
        "[...document.querySelectorAll('main [id], body > [id]')]"
        ".filter((e) => !e.closest('svg')).map((e) => e.id)"
    )
    found = opened.evaluate(ids)
    assert len(found) == len(set(found)) > 0


LACKS = {
    "two stacks": ("Load of every expert", "0 (encoder)"),
    "counts only": (
        "load over time and drift: counts written at once have no order",
        "repetition and locality: counts alone have no order",
        "Experts of a domain",
        "Without recorded weights there is no gate score.",
    ),
    "one token": (
        "drift: no router has load in two whole windows",
        "locality: no token follows another, and no layer another",
    ),
    "three tokens": ("Not in this trace: first choice of the token before, any choice",),
    "one choice, no words": (
        "Not in this trace: first choice at the next layer.",
        "domains: there is only one",
        "co-activation: with one expert per token there are no pairs",
    ),
    "a router without load": (),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_a_trace_lacks_is_left_out_and_said(browser: Any, tmp_path: Path, name: str):
    rng, root = np.random.default_rng(0), tmp_path / "t"
    three, one = uniform_ids(rng, 3, 8, 2), uniform_ids(rng, 300, 8, 1)
    loads = [rng.integers(1, 50, (2, 8)) * ([[1, 1, 1, r, 1, 1, 1, 1]] * 2) for r in (0, 1)]
    written: Any = {
        "two stacks": lambda: encoder_decoder(root),
        "counts only": lambda: write_counts(root, loads, 2, domains=("a", "b")),
        "one token": lambda: write_trace(root, [three[:1]], 8),
        "three tokens": lambda: write_trace(root, [three] * 2, 8, document=np.arange(3)),
        "one choice, no words": lambda: write_trace(root, [one], 8),
        "a router without load": lambda: write_trace(root, [one * 0 + 65535, one], 8),
    }
    page = Opened(browser, tmp_path / "page.html", report_page(report(written[name]())))
    page.locator("[data-widget=map] .plot").focus()
    page.press("Enter")
    assert page.title()
    assert page.complaints == []
    text = page.locator("main").inner_text()
    assert [said for said in LACKS[name] if said not in text] == []
    assert text.count("Not shown:") == 1
    if name == "two stacks":
        address = page.evaluate("location.hash")
        assert re.fullmatch(r"#L0-(en|de)coderE0", address)
        page.press("Escape")
        page.evaluate("(hash) => { location.hash = hash; }", address)
        page.until("!document.getElementById('card').hidden")
        assert "coder) · expert 0" in (page.title() or "")
    page.view.close()


def test_colour_is_for_what_is_wrong(opened: Opened):
    colour = (
        "(kind) => { const li = document.querySelector('#findings li').cloneNode(true); "
        "li.className = kind; document.querySelector('#findings ul').append(li); "
        "const c = getComputedStyle(li.querySelector('b')).color; li.remove(); return c; }"
    )
    of = {kind: opened.evaluate(colour, kind) for kind in ("critical", "warning", "note")}
    assert len(set(of.values())) == 3
    assert opened.evaluate(colour, "good") == of["note"]


def test_an_address_opens_a_card_and_a_click_outside_closes_it(opened: Opened):
    opened.evaluate("location.hash = '#L3E5'")
    opened.opens("Layer 3 · expert 5")
    opened.locator("#card .jump").first.click()  # within the card
    assert opened.evaluate("location.hash") != "#L3E5"
    opened.view.mouse.click(20, 450)
    assert opened.title() is None
    assert opened.evaluate("location.hash") == ""
    opened.locator("#findings a[href^='#L']").first.click()
    opened.until("!document.getElementById('card').hidden")
    opened.press("Escape")
    assert opened.title() is None
    opened.evaluate("location.hash = '#L9E5'")  # there is none
    opened.until("document.getElementById('found').textContent === 'Nothing found.'")
    opened.press("Escape")
    opened.locator("#find").fill("")
    opened.evaluate("history.replaceState(0, '', '#')")


def asked(opened: Opened, text: str) -> list[str]:
    opened.press("/")
    opened.locator("#find").fill(text)
    return opened.locator("#found li").all_inner_texts()


def test_the_search_leads_to_experts_tokens_domains_and_sections(opened: Opened, small: Report):
    for text in ("L2 E3", "layer 2 expert 3", "l2e3", "2 3"):
        assert asked(opened, text) == ["Layer 2, expert 3\nexpert"], text
    opened.press("Enter")
    assert opened.title() == "Layer 2 · expert 3"
    assert opened.evaluate("location.hash") == "#L2E3"
    opened.press("Escape")
    found = asked(opened, "window.pwned")
    assert len(found) == 8
    assert all(HOSTILE in text and text.endswith("token") for text in found)
    opened.press("ArrowDown", "Enter")
    assert opened.title() == f"Token {found[1].rpartition(chr(10))[0]}"
    rows = opened.locator("#card tbody tr").count()
    table: Any = small.tables["vocabulary"]
    word = opened.title() or ""
    assert rows == sum("Token " + readable(text) == word for text in table["token"])
    opened.press("Escape")
    assert asked(opened, "code") == ["<b>code</b>\ndomain"]
    opened.press("Enter")
    assert opened.said().count("in <b>code</b>") == 1
    opened.locator("#map-domain").select_option(label="all domains")
    assert "Locality\nsection" in asked(opened, "local")
    opened.press("Enter")
    assert opened.evaluate("location.hash") == "#locality"
    assert asked(opened, "no such thing") == ["Nothing found."]
    opened.press("Escape")
    opened.locator("#find").fill("")
    assert opened.evaluate("window.pwned") is None


def sheet(opened: Opened, name: str) -> Any:
    opened.evaluate(
        "(name) => { const s = document.querySelector(`#${name} .sheet`); "
        "const d = s.querySelector('details'); if (d) d.open = true; }",
        name,
    )
    return opened.locator(f"#{name} .sheet")


def test_a_table_is_sorted_by_the_head_of_a_column(opened: Opened, small: Report):
    place, table = sheet(opened, "windows"), small.tables["windows"]
    column: Any = list(table.columns).index("max_over_mean")
    cells = place.locator(f"tbody td:nth-child({column + 1})")
    head = place.get_by_role("button", name="max_over_mean", exact=True)
    falling = table["max_over_mean"].sort_values(ascending=False, kind="stable")
    before, values = cells.all_inner_texts(), [*map(number, falling)]
    head.click()
    assert cells.all_inner_texts() == values[: len(before)]
    assert place.locator("th").nth(column).get_attribute("aria-sort") == "descending"
    head.click()
    assert cells.first.inner_text() == number(table["max_over_mean"].min())
    head.click()
    assert cells.all_inner_texts() == before
    place.get_by_role("button", name="Show more").click()
    assert place.locator("tbody tr").count() == len(table)


def test_every_table_is_downloaded_exactly_and_its_python_runs(
    opened: Opened, small: Report, tmp_path: Path
):
    names = opened.locator(".sheet").evaluate_all("(all) => all.map((s) => s.dataset.name)")
    assert len(names) >= 10
    excerpts, downloaded = ("domains", "esft", "coactivation", "transitions"), set[str]()
    for name in names:
        place = sheet(opened, name)
        lines = place.get_attribute("data-python").splitlines()
        made: dict[str, Any] = {}
        exec("\n".join([*lines[:-1], f"table = {lines[-1]}"]), made)
        button = place.get_by_role("button", name="Download csv")
        if not button.count():
            continue
        downloaded.add(name)
        if len(downloaded) % 10 == 0:  # as many as Chromium takes in a second
            opened.view.wait_for_timeout(1100)
        with opened.view.expect_download() as download:
            button.click()
        assert download.value.suggested_filename == f"{name}.csv"
        download.value.save_as(tmp_path / "table.csv")
        with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
            columns, *got = csv.reader(file)
        whole = made["table"]
        assert columns == list(whole.columns), name
        rows = {tuple(map(csv_cell, row)) for row in whole.itertuples(index=False, name=None)}
        assert got, name
        assert {tuple(map(csv_cell, row)) for row in got} <= rows, name
        assert len(got) == len(whole) or name in excerpts
    assert downloaded >= {"load", "balance"}


def csv_cell(value: Any) -> Any:
    """A cell as a number where it is one, else as text: of a table and of its csv alike."""
    if value is None or value is pd.NA or value != value or value == "":
        return None
    try:
        return float(str(value))
    except ValueError:
        return str(value).removeprefix("'")


def test_copy_as_python_copies_the_lines(opened: Opened):
    place = sheet(opened, "balance")
    opened.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { configurable: true, "
        "value: { writeText: async (text) => { window.copied = text; } } })"
    )
    place.get_by_role("button", name="Copy as Python").click()
    opened.until("window.copied !== undefined")
    assert opened.evaluate("window.copied") == place.get_attribute("data-python")
    assert place.get_by_role("status").inner_text() == "Copied."


def test_on_paper_it_is_light_and_without_controls(browser: Any, opened: Opened, tmp_path: Path):
    text = Path(opened.address[7:]).read_text()
    page = Opened(browser, tmp_path / "p.html", text, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.view.emulate_media(media="print")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    for query in (".bar", "#theme", "#map-order", ".tools"):
        assert not page.locator(query).first.is_visible(), query
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") is None
    page.view.close()


def test_labels_of_a_scale_do_not_overlap(browser: Any, tmp_path: Path):
    sections = list[Section]()
    for end, high in product(("domains", "E/k"), (4, 5, 6, 8.5, 12, 15, 20, 31, 40)):
        scale = Scale("ratio", "load", high=high, end=end)
        panel = Panel((Heatmap(np.ones((2, 3)), scale),), Axis("expert"), Axis("layer"))
        sections.append(chart_section(Chart(f"{end} {high}", "c", (panel,))))
    page = Opened(browser, tmp_path / "p.html", page_html(Page("scales", sections=sections)))
    overlapping = """[...document.querySelectorAll('.scale')].filter((scale) => {
      const ends = [...scale.querySelectorAll('.ends b')].map((t) => t.getBoundingClientRect());
      ends.sort((a, b) => a.left - b.left);
      return ends.some((end, i) => i && end.left < ends[i - 1].right);
    }).length"""
    assert page.locator(".scale").count() == len(sections)
    assert page.evaluate(overlapping) == 0
    page.view.close()


def test_numbers_of_a_table_keep_their_kind():
    columns = {
        "whole": ([1, 2], [1, 2]),
        "real": ([float("nan"), float("inf")], [None, "inf"]),
        "nullable": (pd.array([pd.NA, 2**60 + 1], "Int64"), [None, 2**60 + 1]),
        "truth": ([True, False], [True, False]),
        "maybe": (pd.array([pd.NA, True], "boolean"), [None, True]),
        "text": (["a", None], ["a", None]),
    }
    frame = pd.DataFrame({name: given for name, (given, _) in columns.items()})
    for values, (_, expected) in zip(table_json(frame)["values"], columns.values(), strict=True):
        assert [(type(v), v) for v in values] == [(type(v), v) for v in expected]
