"""What the page of a report promises, on the demo (4 × 8) and on a model of 58 × 256, in a browser:
its first screen, menu, search, links and tables, the text with its routes, contexts on cards."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe_inspect.reporting.render.html import GROUPS, packed
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.texts import TEXT_BYTES, text_section
from moe_inspect.reporting.report import Report, report
from tests.conftest import ROOT
from tests.support.synthetic import write_trace
from tests.test_page import Opened, asked, browser, pytestmark, sheet  # noqa: F401 (fixtures)
from tests.test_page_text import COLOUR, route, spans

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


class Shown(NamedTuple):
    page: Opened
    of: Report
    document: int  # the first in its text
    size: int
    cpu_s: float


def wide(root: Path) -> Report:
    """58 × 256 × 8; layer 3 sends every second token to experts 0 to 7."""
    L, E, k, T, rng = 58, 256, 8, 1_500, np.random.default_rng(0)
    steps = [(rng.integers(0, E, (T, 1)), rng.integers(1, 31, (T, 1))) for _ in range(L)]
    ids = [((first + np.arange(k) * step) % E).astype(np.uint16) for first, step in steps]
    ids[3][::2] = np.arange(k)
    weights = [-np.sort(-rng.random((T, k), np.float32), axis=1) for _ in range(L)]
    settings: dict[str, Any] = {"domain_of_document": ("a", "b"), "words": 500}
    settings |= {"document": np.arange(T) // 300, "token_id": rng.integers(0, 500, T)}
    return report(write_trace(root, ids, E, weights=weights, **settings))


@pytest.fixture(scope="module", params=["demo", "58 × 256"])
def shown(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    place = tmp_path_factory.mktemp("page")
    demo = request.param == "demo"
    of = report(ROOT / "sample_traces" / "balanced") if demo else wide(place / "t")
    began = time.process_time()
    text = report_page(of)
    cpu_s = time.process_time() - began
    page = Opened(browser, place / "page.html", text)
    said = page.locator("#text-document option").first.text_content()
    document = re.search(r"document (\d+)", said)
    assert document
    yield Shown(page, of, int(document[1]), len(text.encode()), cpu_s)
    assert page.complaints == []
    assert page.foreign() == []
    page.view.close()


def test_it_is_small_made_quickly_and_painted_at_once(shown: Shown) -> None:
    assert shown.size <= 6_000_000
    assert shown.cpu_s <= 12  # 6 s of a machine with nothing else to do
    painted = list[float]()
    for _ in range(3):  # the machine may be busy
        shown.page.view.reload()
        shown.page.view.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
        shown.page.until(f"{PAINTED} !== undefined")
        painted.append(shown.page.evaluate(PAINTED))
    assert 0 < min(painted) <= 1_000


def test_the_first_screen_has_figures_map_and_the_gravest_findings(shown: Shown) -> None:
    view, found = shown.page.view, shown.of.verdict()
    view.set_viewport_size({"width": 1440, "height": 900})
    bottom = "(q) => [...document.querySelectorAll(q)].map((e) => e.getBoundingClientRect().bottom)"
    for query in (".facts > div", "#findings li", "[data-widget=map] .canvas"):
        assert 0 < max(view.evaluate(bottom, query)) <= 900, query
    said = view.locator("#findings li").all_inner_texts()
    others = view.locator("#more-findings li").all_inner_texts()
    assert len(said) == min(3, len(found))
    for text, one in zip(said, found, strict=False):
        assert text.lower().startswith(one.severity)
        assert one.text in text
    assert len(others) == len(found) - len(said)
    titles = view.locator(".group > h2:not(.unseen)").all_inner_texts()
    assert titles == [name for name in GROUPS if name in titles]
    assert {"Balance", "Specialization", "Serving"} <= {*titles}
    view.set_viewport_size({"width": 1280, "height": 900})


def test_a_large_model_fits(shown: Shown) -> None:
    page = shown.page
    if len(shown.of.trace.routers) < 58:
        pytest.skip("the demo is small")
    assert shown.size <= 3_000_000  # a megabyte of text
    assert len(page.map(57)) == 256
    assert page.map(58) == []
    with page.view.expect_download() as download:  # all of it, more than a table shows
        sheet(page, "load").get_by_role("button", name="Download csv").click()
    assert len(download.value.path().read_text().splitlines()) == 1 + 58 * 256
    places = ".map((t) => t.getBoundingClientRect()).map((r) => [r.top, r.bottom])"
    of_map = "[...document.querySelectorAll('[data-widget=map] .ytick')]"
    ticks = sorted(page.evaluate(of_map + places))
    assert len(ticks) > 20
    assert all(above[1] <= below[0] + 2 for above, below in pairwise(ticks))
    assert page.drawn("Drift")[0][0]["rows"] == 58
    by_layer = page.drawn("Drift")[1:] + page.drawn("Locality")
    assert [len(marks[0]["x"]) for marks in by_layer] == [58] * 6
    heatmap = page.drawn("Experts of a domain")[0][0]
    assert (heatmap["rows"], heatmap["columns"]) == (2, 58)
    entries = "(plots) => plots.map((plot) => plot.querySelectorAll('.legend button').length)"
    assert max(page.locator(".plot").evaluate_all(entries)) <= 12
    crowded = """[...document.querySelectorAll('.panels .plot')].filter((plot) => {
      const ends = [...plot.querySelectorAll('.xtick')].map((t) => t.getBoundingClientRect());
      ends.sort((a, b) => a.left - b.left);
      return ends.some((end, i) => i && end.left < ends[i - 1].right);
    }).length"""
    assert page.evaluate(crowded) == 0
    label = "document.querySelector('.panels .xtick').textContent"
    page.evaluate(f"{label} = 'wide enough for the next two'")
    assert page.evaluate(crowded) == 1
    page.locator("[data-widget=map] .plot").focus()
    page.press("End", "ArrowDown", "Enter")
    assert page.title() == "Layer 1 · expert 255"
    page.press("Escape")


def test_the_header_stays_and_its_menu_works_on_a_phone(shown: Shown) -> None:
    view = shown.page.view
    view.set_viewport_size({"width": 390, "height": 844})
    shown.page.until("document.documentElement.scrollWidth <= 390")
    view.get_by_role("button", name="Sections").click()
    menu = view.locator("#menu")
    box = menu.bounding_box()
    assert 0 <= box["x"] <= 390 - box["width"]
    menu.get_by_role("link", name="Chosen together").click()
    assert not menu.is_visible()
    top = "document.getElementById('coactivation').getBoundingClientRect().top"
    shown.page.until(f"{top} >= 0 && {top} < 300")
    assert view.locator(".bar").bounding_box()["y"] == 0
    view.set_viewport_size({"width": 1280, "height": 900})


def test_tokens_have_the_colours_and_routes_of_the_trace(shown: Shown) -> None:
    page, trace = shown.page, shown.of.trace
    rows = trace.document(shown.document)
    texts = spans(page)
    first = rows[rows["router"] == 0].iloc[: len(texts)]
    assert texts == [text.replace("\n", "↵\n") for text in first["text"]]
    last = len(trace.routers) - 1
    mine = rows[rows["router"] == last].iloc[: len(texts)]
    page.locator("#text-layer").fill(str(last))
    colours: dict[str, list[str]] = {}
    for mode in ("first", "weight", "margin"):
        page.locator("#text-mode").select_option(mode)
        colours[mode] = [page.evaluate(COLOUR, n) for n in range(len(texts))]
    by_expert = dict(zip(mine["expert_0"], colours["first"], strict=True))
    assert colours["first"] == [by_expert[expert] for expert in mine["expert_0"]]
    assert len(set(colours["first"])) > 4
    k = trace.routers[last].top_k
    margin = np.log(mine[f"weight_{k - 2}"]) - np.log(mine[f"weight_{k - 1}"])
    for mode, values in (("weight", mine["weight_0"]), ("margin", margin)):
        light = [sum(map(float, re.findall(r"[\d.]+", c)[:3])) for c in colours[mode]]
        assert np.corrcoef(light, np.minimum(values, np.quantile(values, 0.95)))[0, 1] < -0.8, mode
    expert = int(mine["expert_1"].iloc[2])
    page.locator("#text-mode").select_option("expert")
    page.locator("#text-expert").fill(str(expert))
    reached = (mine.filter(regex="^expert_") == expert).any(axis=1)
    assert page.locator(".routed .body .reached").count() == reached.sum() > 0
    page.locator("#text-mode").select_option("first")
    page.locator(".routed .body span").nth(9).click()  # pinned
    page.locator(".routed .body span").nth(2).hover()
    found, token = route(page), first["token"].iloc[9]
    for chips, row in zip(found, rows[rows["token"] == token].itertuples(), strict=True):
        for slot, chip in enumerate(chips):
            shown_id, weight = chip.split()
            assert int(shown_id) == getattr(row, f"expert_{slot}")
            assert abs(float(weight) - getattr(row, f"weight_{slot}")) < 0.03
    page.locator(".routed").focus()
    page.press("Escape")


def test_a_card_has_contexts_from_all_domains_and_leads_to_the_text(shown: Shown) -> None:
    page, of = shown.page, shown.of
    layer, domains = of.trace.routers[-1].layer, set[str]()
    expert = int(of.counts.load_E(len(of.trace.routers) - 1).argmax())  # the busiest
    for one in (expert ^ 1, expert):
        page.evaluate(f"location.hash = '#L{layer}E{one}'")
        title = f"Layer {layer} · expert {one}"
        page.until(f"document.querySelector('#card h2')?.textContent === '{title}'")
        found, mine = page.locator("#card .context"), of.trace.tokens_of(layer, one)
        texts = {text.replace("\n", "↵") for text in mine["text"]}
        assert found.count() > 1
        for at in range(found.count()):
            weight, domain = found.nth(at).locator("small").text_content().split(" · ")
            assert found.nth(at).locator("mark").text_content() in texts
            assert np.abs(mine["weight"] - float(weight)).min() < 0.02
            domains.add(domain)
    assert len(domains) > 1
    page.view.get_by_text("Show its tokens in the text").click()
    assert page.locator("#text-expert").input_value() == str(expert)
    assert page.locator("#text-layer").input_value() == str(len(of.trace.routers) - 1)
    page.locator("#text-mode").select_option("first")


def test_a_large_model_has_a_megabyte_of_text_and_every_expert_its_contexts(shown: Shown) -> None:
    if len(shown.of.trace.routers) < 58:
        pytest.skip("the demo is small")
    made: Any = text_section(shown.of)
    one = packed({**made.data, "contexts": None})
    assert TEXT_BYTES / 3 < len(one) <= TEXT_BYTES
    said = r"Shown: \d of 5 documents: those of each domain whose experts differ most"
    assert re.search(said, made.text)
    assert shown.page.locator(".routed .ids i").count() > 20
    shown.page.evaluate("location.hash = '#L57E255'")
    shown.page.until("document.querySelectorAll('#card .context').length === 4")
    shown.page.press("Escape")
