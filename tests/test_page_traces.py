"""Pages of six traces in a browser, from one token to 61 × 256: each has a card and the text,
axe-core finds nothing that keeps people out, and what fails says so in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.reporting.charts.spec import Chart, chart_of
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.report import Report, report
from tests.conftest import ROOT
from tests.support.synthetic import write_trace
from tests.test_page import Opened, asked, browser, pytestmark  # noqa: F401 (a fixture, a mark)

SMALL = {"L": 4, "E": 8, "k": 2}
# name → tokens and shape
TRACES = {
    **{f"{T} tokens": {"T": T} | SMALL for T in (1, 3, 97)},
    "top-1": {"T": 151, "L": 4, "E": 8, "k": 1},
    "61 × 256": {"T": 301, "L": 61, "E": 256, "k": 1},
}


def on(*names: str) -> pytest.MarkDecorator:
    """A test of some of the pages: others are like these."""
    return pytest.mark.parametrize("shown", names, indirect=True)


def made(root: Path, T: int, L: int, E: int, k: int) -> Report:
    """Without gate weights where k is 1."""
    rng, t = np.random.default_rng(T), np.arange(T)
    first = [rng.integers(0, E, (T, 1)) for _ in range(L)]
    ids = [((first_T1 + 3 * np.arange(k)) % E).astype(np.uint16) for first_T1 in first]
    weights = [-np.sort(-rng.random((T, k), np.float32), axis=1) for _ in range(L)]
    given: Any = {"document": 12 * t // T, "domain_of_document": ("law", "math"), "words": 50}
    given |= {"token_id": rng.integers(0, 50, T), "weights": weights if k > 1 else None}
    return report(write_trace(root, ids, E, **given))


@pytest.fixture(scope="module", params=[*TRACES, "demo"])
def shown(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Opened, Report]]:
    place, name = tmp_path_factory.mktemp("page"), request.param
    demo = ROOT / "sample_traces" / "collapsed"
    of = report(demo) if name == "demo" else made(place / "t", **TRACES[name])
    page = Opened(browser, place / "p.html", report_page(of))
    yield page, of
    assert page.complaints == []
    page.view.close()


def test_a_card_and_the_text_show_the_routes(shown: tuple[Opened, Report]) -> None:
    page, of = shown
    token = of.trace.document(0).iloc[0]
    page.locator("#text-document").select_option("0")
    page.locator(".routed .body span").first.click()
    chips = page.locator(".route tbody tr").first.locator(".chip")
    number = page.locator("#text-document option:checked").text_content()
    rows = of.trace.document(int(number.split("document ")[1].split()[0]))
    first = rows[rows["router"] == 0].iloc[0]
    k = of.trace.routers[0].top_k
    experts = [first[f"expert_{slot}"] for slot in range(k)]
    assert [int(chip.split()[0]) for chip in chips.all_text_contents()] == experts
    page.evaluate(f"location.hash = '#L0E{token['expert_0']}'")
    page.opens(f"Layer 0 · expert {token['expert_0']}")
    assert page.locator("#card .context").count() > 0
    assert page.locator("#card .warning, main .widget .warning").count() == 0


@on("3 tokens", "demo")
def test_axe_finds_nothing(shown: tuple[Opened, Report]) -> None:
    page, _ = shown
    page.evaluate("location.hash = '#L0E1'")
    page.opens("Layer 0 · expert 1")
    assert page.axe() == []
    page.evaluate("document.querySelector('#menu-button').removeAttribute('aria-label')")
    assert [rule for rule, _ in page.axe("#menu-button")] == ["button-name"]


@on("3 tokens")
def test_key_figures_claim_no_more_than_the_findings(shown: tuple[Opened, Report]) -> None:
    page, _ = shown
    figures = page.locator(".facts").inner_text()
    assert figures.count("too little data to judge") == 2
    assert "experts without load" in figures
    assert not re.search("dead|hides|0 of 4", figures)
    assert "without load" in page.locator("#load figcaption").inner_text()


@on("demo")
def test_the_chart_of_domains_has_a_uniform_row(shown: tuple[Opened, Report]) -> None:
    page, of = shown
    plot = "document.querySelector('[data-widget=domains] .plot').plot"
    page.locator("[data-widget=domains] select").select_option("2")
    assert page.evaluate(f"{plot}.panel.y.labels") == [*of.counts.domains, "uniform"]
    values = page.evaluate(f"{plot}.panel.marks[0].values.slice(-8)")
    table: Any = of.tables["domains"]
    mean = table[table["router"] == 2].groupby("expert")["activation"].mean()
    assert values == pytest.approx((2 / 8 / mean).tolist(), rel=1e-3)
    chart = chart_of(of, "domains")
    assert isinstance(chart, Chart)
    [heatmap] = [p.heatmap for p in chart.panels if p.title == "layer 2" and p.heatmap]
    assert heatmap.values[-1] == pytest.approx(values, rel=1e-3)
    page.evaluate(f"{plot}.move(6, 0)")
    said = page.locator("[data-widget=domains] .tip").inner_text()
    assert "uniform, expert 0\ntakes 25% of the tokens" in said
    page.press("Escape")


@on("61 × 256", "demo")
def test_nothing_is_cut_on_a_phone(shown: tuple[Opened, Report]) -> None:
    page, _ = shown
    page.press("Escape")
    page.view.set_viewport_size({"width": 390, "height": 844})
    marked = "[...document.querySelectorAll('main .scale, main .scale b')]"
    ends = f"{marked}.map((e) => e.getBoundingClientRect().right)"
    page.until("document.documentElement.scrollWidth <= 390")
    page.until(f"Math.max(...{ends}) <= 380")
    crowded = """[...document.querySelectorAll('.scale')].filter((scale) => {
      const ends = [...scale.querySelectorAll('.ends b')].map((t) => t.getBoundingClientRect());
      ends.sort((a, b) => a.left - b.left);
      return ends.some((end, i) => i && end.left < ends[i - 1].right + 2);
    }).length"""
    assert page.evaluate(crowded) == 0
    page.locator("#find").fill("domain")
    lines = """(all) => all.map((e) => {
      const range = document.createRange();
      range.selectNodeContents(e);
      return [e.textContent, range.getClientRects().length];
    })"""
    kinds = page.locator("#found li span").evaluate_all(lines)
    assert ["section", 1] in kinds
    assert {n for _, n in kinds} == {1}
    page.locator("#find").fill("")
    page.view.set_viewport_size({"width": 1280, "height": 900})


@on("demo")
def test_a_tip_goes_with_escape_wherever_the_focus_is(shown: tuple[Opened, Report]) -> None:
    page, _ = shown
    page.locator("#find").focus()
    for place in ("[data-panel]", "[data-widget=map] .plot", "#text .routed"):
        tip = page.locator("#text .tip" if "routed" in place else f"{place} .tip").first
        target = ".routed .body span >> nth=4" if "routed" in place else f"{place} .canvas >> nth=0"
        page.locator(target).hover()
        assert tip.is_visible(), place
        page.press("Escape")
        assert not tip.is_visible(), place


@on("demo")
def test_the_keyboard_skips_what_stands_on_every_page(shown: tuple[Opened, Report]) -> None:
    page, _ = shown
    page.evaluate("document.activeElement.blur()")
    page.view.reload()
    page.view.wait_for_selector("html[data-ready]", state="attached")
    page.press("Tab")
    skip = page.view.get_by_text("Skip to content")
    assert skip.bounding_box()["y"] >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).clipPath") == "none"
    page.press("Enter", "Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_what_fails_says_so_and_the_rest_works(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {  # file → where it fails
        "text.js": "const routes = moe.routes(data);",
        "card.js": "if (!data.load.length) return [];",
        "map.js": "const domainPlot =",
    }
    whole = html.asset

    def asset(name: str) -> str:
        at = broken.get(name, "")
        assert at in whole(name)
        return whole(name).replace(at, f'throw new Error("{name}");{at}') if at else whole(name)

    monkeypatch.setattr(html, "asset", asset)
    page = Opened(browser, tmp_path / "p.html", report_page(made(tmp_path / "t", T=97, **SMALL)))
    said = "“{}” could not be drawn ({}); the rest of the page works."
    sections = page.locator("main section .warning[role=alert]").all_text_contents()
    of = {"Text": "text.js", "Domains and experts": "map.js"}
    assert sections == [said.format(*item) for item in of.items()]
    page.evaluate("location.hash = '#L1E2'")
    page.opens("Layer 1 · expert 2")
    warnings = page.locator("#card .warning").all_text_contents()
    assert warnings == [said.format("Domains", "card.js")]
    assert "Chosen together with" in page.locator("#card h3").all_text_contents()
    page.press("Escape")
    assert asked(page, "l2 e3") == ["Layer 2, expert 3\nexpert"]
    page.view.get_by_label("Switch between light and dark").click()
    assert page.complaints == ["map.js", "text.js", "card.js"]
    page.view.close()
