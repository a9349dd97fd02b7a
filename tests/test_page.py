"""The page: what a hostile corpus cannot do to it, what its tables read like; and in a browser: the
mouse, the keyboard, both themes."""

from __future__ import annotations

import base64
import csv
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.public import report
from moe_inspect.reporting.render import payload
from moe_inspect.reporting.render.html import Page, Section, page_html
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.report import Report
from moe_inspect.text import number, readable
from tests.conftest import ROOT, OpenPage
from tests.support.browser import HOSTILE, MAP, PAPER, Opened
from tests.support.synthetic import encoder_decoder, uniform_ids, write_counts, write_trace

LABELS = ("<b>code</b>", "law", "math", "prose")


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
    given: Any = {"document": document, "domain_of_document": LABELS, "token_id": token_id}
    given |= {"weights": [np.full((T, 2), 0.5, np.float32)] * 4}
    given |= {"words": [f"{HOSTILE}\n\u202e{i}" for i in range(50)]}
    given |= {"manifest": {"model": {"id": HOSTILE}}}
    return report(write_trace(tmp_path_factory.mktemp("small") / "t", ids, E, **given))


@pytest.fixture(scope="module")
def opened(
    browser: Any, small: Report, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    file = tmp_path_factory.mktemp("page") / "page.html"
    with Opened(browser, file, report_page(small)) as page:
        yield page


def test_the_map_shows_the_load_table(opened: Opened, small: Report):
    table: Any = small.tables["load"]
    row = table[(table["layer"] == 3) & (table["expert"] == 5)].iloc[0]
    assert opened.map(3)[5] == pytest.approx(row["load_ratio"])
    opened.evaluate(f"document.querySelector('{MAP}').plot.move(3, 5)")
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
    opened.locator(MAP).focus()
    opened.press("Home", *["ArrowDown"] * 3, "Home")
    busiest = int(load["expert"].loc[by_load.index[0]])
    assert opened.said().startswith(f"Layer 3, expert {busiest}: ")
    opened.locator("#map-order").select_option(label="by expert id")
    assert opened.map(3) == pytest.approx(load["load_ratio"].to_numpy())


def test_a_click_opens_the_card_of_the_expert(opened: Opened):
    opened.locator("[data-widget=map] .canvas g rect").nth(3 * 8 + 5).click()
    opened.opens("Layer 3 · expert 5")
    opened.press("Escape")
    assert opened.title() is None


def test_the_keyboard_alone_is_enough_and_what_is_hostile_is_text(opened: Opened):
    opened.locator(MAP).focus()
    opened.press("Home", *["ArrowUp"] * 4, "ArrowDown", "ArrowRight", "ArrowRight")
    assert opened.said().startswith("Layer 1, expert 2: ")
    opened.press("Enter")
    assert opened.title() == "Layer 1 · expert 2"
    assert opened.evaluate("document.activeElement.id") == "card"
    card = opened.locator("#card").inner_text()
    assert HOSTILE + r"\n\u202e" in card
    assert LABELS[0] in card
    opened.press("Escape")
    assert opened.title() is None
    assert opened.evaluate("document.activeElement.parentElement.dataset.widget") == "map"
    assert HOSTILE in opened.locator("h1").inner_text()
    assert LABELS[0] in opened.locator(".ytick").all_text_contents()
    assert opened.evaluate("window.pwned") is None
    assert opened.locator("img").count() == 0


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
    "h1", ".subtitle", ".verdict li", "p.text", ".headline", ".figures", ".definitions dd", "td",
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
    light, before = opened.evaluate(CONTRAST), opened.evaluate(PAPER)
    theme = opened.view.get_by_label("Switch between light and dark")
    theme.click()
    opened.until("getComputedStyle(document.querySelector('.ytick')).fill.match(/\\d+/)[0] > 128")
    dark = opened.evaluate(CONTRAST)
    assert before != opened.evaluate(PAPER)
    assert len(light) == len(dark) >= 18
    assert min(light.values()) >= 4.5, light
    assert min(dark.values()) >= 4.5, dark
    opened.evaluate(f"document.querySelector('h1').style.color = {PAPER}")
    assert min(opened.evaluate(CONTRAST).values()) < 1.1  # what cannot be read is found
    theme.click()


def test_the_policy_stops_scripts_and_requests(browser: Any, opened: Opened):
    view, said = browser.new_page(), list[str]()
    view.on("console", lambda message: said.append(message.text))
    inject = """() => {
      const script = document.createElement("script");
      script.textContent = "window.ran = 1";
      document.head.append(script);
      return fetch("data:text/plain,x").then(() => "fetched", () => "refused");
    }"""
    for address, fetched, ran in (("about:blank", "fetched", 1), (opened.address, "refused", None)):
        view.goto(address)
        assert view.evaluate(inject) == fetched
        assert view.evaluate("window.ran") == ran
    assert any("Content Security Policy" in text for text in said)
    view.close()


def test_every_chart_is_read_with_the_keyboard_and_zoomed_with_the_mouse(opened: Opened):
    plots = opened.locator(".plot").all()
    assert len(plots) >= 4
    assert all(plot.locator(".canvas svg").count() for plot in plots)
    assert opened.read_charts() >= 4
    balance = opened.locator("[data-panel]").first
    balance.scroll_into_view_if_needed()
    box = balance.locator(".canvas").bounding_box()
    opened.view.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + 60)
    opened.view.mouse.down()
    opened.view.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + 60)
    opened.view.mouse.up()
    assert balance.locator(".xtick").all_text_contents() == ["2", "3"]
    balance.get_by_text("Reset zoom").click()
    assert balance.locator(".xtick").all_text_contents() == ["0", "1", "2", "3"]
    dots = balance.locator(".canvas circle")
    before, named = dots.count(), balance.locator(".legend button", has_text="uneven layer")
    named.click()
    assert dots.count() < before
    assert named.get_attribute("aria-pressed") == "false"
    named.click()
    assert dots.count() == before


RNG = np.random.default_rng(0)
THREE, ONE = uniform_ids(RNG, 3, 8, 2), uniform_ids(RNG, 300, 8, 1)
LOADS = [RNG.integers(1, 50, (2, 8)) * ([[1, 1, 1, r, 1, 1, 1, 1]] * 2) for r in (0, 1)]
LACKS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "two stacks": (encoder_decoder, ("Load of every expert", "0 (encoder)")),
    "counts only": (
        lambda root: write_counts(root, LOADS, 2, domains=("a", "b")),
        (
            "load over time and drift: counts written at once have no order",
            "repetition: counts alone have no order",
        ),
    ),
    "one token": (
        lambda root: write_trace(root, [THREE[:1]], 8),
        ("drift: no router has load in two whole windows",),
    ),
    "three tokens": (
        lambda root: write_trace(root, [THREE] * 2, 8, document=np.arange(3)),
        ("repetition: first choices are unknown, or no token follows another",),
    ),
    "one choice, no words": (
        lambda root: write_trace(root, [ONE], 8),
        (
            "transitions: no two layers follow each other",
            "domains: there is only one",
            "co-activation: with one expert per token there are no pairs",
        ),
    ),
    "a router without load": (lambda root: write_trace(root, [ONE * 0 + 65535, ONE], 8), ()),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_a_trace_lacks_is_left_out_and_said(open_page: OpenPage, tmp_path: Path, name: str):
    write, says = LACKS[name]
    page = open_page(report_page(report(write(tmp_path / "t"))))
    page.locator(MAP).focus()
    page.press("Enter")
    assert page.title()
    text = page.locator("main").inner_text()
    assert [said for said in says if said not in text] == []
    assert text.count("Not shown:") == 1
    if name == "two stacks":
        address = page.evaluate("location.hash")
        assert re.fullmatch(r"#L0-(en|de)coderE0", address)
        page.press("Escape")
        page.evaluate("(hash) => { location.hash = hash; }", address)
        page.until("!document.getElementById('card').hidden")
        assert "coder) · expert 0" in (page.title() or "")


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


def test_the_search_leads_to_experts_tokens_domains_and_sections(opened: Opened, small: Report):
    for text in ("L2 E3", "layer 2 expert 3", "l2e3", "2 3"):
        assert opened.ask(text) == ["Layer 2, expert 3\nexpert"], text
    opened.press("Enter")
    assert opened.title() == "Layer 2 · expert 3"
    assert opened.evaluate("location.hash") == "#L2E3"
    opened.press("Escape")
    found = opened.ask("window.pwned")
    assert len(found) == 8
    assert all(HOSTILE in text and text.endswith("token") for text in found)
    opened.press("ArrowDown", "Enter")
    word = found[1].rpartition("\n")[0]
    assert opened.title() == f"Token {word}"
    table: Any = small.tables["vocabulary"]
    same = sum(readable(text) == word for text in table["token"])
    assert opened.locator("#card tbody tr").count() == same
    opened.press("Escape")
    assert opened.ask("code") == ["<b>code</b>\ndomain"]
    opened.press("Enter")
    assert opened.said().count("in <b>code</b>") == 1
    opened.locator("#map-domain").select_option(label="all domains")
    assert "Repetition\nsection" in opened.ask("repet")
    opened.press("Enter")
    assert opened.evaluate("location.hash") == "#repetition"
    assert opened.ask("no such thing") == ["Nothing found."]
    opened.press("Escape")
    opened.locator("#find").fill("")
    assert opened.evaluate("window.pwned") is None


def test_a_table_is_sorted_by_the_head_of_a_column(opened: Opened, small: Report):
    place, table = opened.sheet("windows"), small.tables["windows"]
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


def csv_cell(value: Any) -> Any:
    """A cell as a number where it is one, else as text: of a table and of its csv alike."""
    if value is None or value is pd.NA or value != value or value == "":
        return None
    try:
        return float(str(value))
    except ValueError:
        return str(value).removeprefix("'")


def test_every_table_is_downloaded_exactly_and_its_python_runs(opened: Opened, tmp_path: Path):
    names = opened.locator(".sheet").evaluate_all("(all) => all.map((s) => s.dataset.name)")
    assert len(names) >= 10
    excerpts, downloaded = ("domains", "coactivation", "transitions"), set[str]()
    for name in names:
        place = opened.sheet(name)
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


def test_copy_as_python_copies_the_lines(opened: Opened):
    place = opened.sheet("balance")
    opened.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { configurable: true, "
        "value: { writeText: async (text) => { window.copied = text; } } })"
    )
    place.get_by_role("button", name="Copy as Python").click()
    opened.until("window.copied !== undefined")
    assert opened.evaluate("window.copied") == place.get_attribute("data-python")
    assert place.get_by_role("status").inner_text() == "Copied."


def test_on_paper_it_is_light_and_without_controls(open_page: OpenPage, opened: Opened):
    page = open_page(Path(opened.address[7:]).read_text(), color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.view.emulate_media(media="print")
    assert page.evaluate(PAPER) == "rgb(255, 255, 255)"
    for query in (".bar", "#theme", "#map-order", ".tools"):
        assert not page.locator(query).first.is_visible(), query
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") is None


# --- without a browser


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
    for values, (_, expected) in zip(
        payload.table_json(frame)["values"], columns.values(), strict=True
    ):
        assert [(type(v), v) for v in values] == [(type(v), v) for v in expected]


def test_a_page_shows_what_is_hostile_and_runs_none_of_it():
    table = pd.DataFrame({"token": [HOSTILE, "\x1b[31m\u202eevil\n"], HOSTILE: [1, 2]})
    sections = [Section(HOSTILE, HOSTILE, table=table, definitions={HOSTILE: HOSTILE})]
    lists: Any = {name: [HOSTILE] for name in ("warnings", "figures", "left_out")}
    lists["verdict"] = [HOSTILE, HOSTILE]
    page = Page(HOSTILE, HOSTILE, sections=sections, footer=HOSTILE, **lists)
    made = page_html(page)
    assert "<img" not in made
    assert made.count("<script>") == 1  # the page's own
    assert "&lt;/script&gt;&lt;script&gt;window.pwned" in made
    assert "onerror=&#34;window.pwned" in made
    assert not {"\x1b", "\u202e"} & set(made)
    assert r"\x1b[31m\u202eevil\n" in made


CELLS: list[tuple[object, str]] = [
    *((missing, "–") for missing in (float("nan"), None, pd.NA)),
    *((0.12345, "0.123"), (0.0, "0.000"), (1e-5, "1.0e-05"), (12345, "12,345"), (True, "True")),
    *((np.int64(7), "7"), ("▁the", "▁the"), (" a b ", "␣a b␣"), ("\n", r"\n")),
    *(("\u200b", r"\u200b"), ("<0xE2>", "<0xE2>")),
    *((text, text) for text in ("می\u200cخواهم", "👩\u200d💻")),  # joined
    *(("a\u200db \u200d", r"a\u200db \u200d"), ("\u200d", r"\u200d")),
]


def test_cells_are_readable():
    assert [(value, number(value)) for value, _ in CELLS] == CELLS


def test_a_long_table_is_cut_and_sections_of_one_title_have_ids_of_their_own():
    long = Section("Load", table=pd.DataFrame({"a": range(1_234)}))
    made = page_html(Page("t", sections=[Section("Load"), long]))
    ids = re.findall(r'\bid="([^"]*)"', made)
    assert len(ids) == len(set(ids))
    assert made.count("<tr>") == payload.MOST_ROWS + 1
    assert "1,134 more rows" in made


def test_a_page_does_not_say_in_which_folder_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = report_page(report("sample_traces/collapsed"))
    packed = [base64.b64decode(text) for text in re.findall(r"H4sI[\w+/=]{100,}", page)]
    inside = "".join(gzip.decompress(data).decode() for data in packed)
    assert "moe_inspect.report(&#39;sample_traces/collapsed&#39;)" in page
    assert '"domains"' in inside
    assert str(ROOT) not in page + inside
