"""What the page of a report promises, in a browser, from one token to 58 × 256: its first screen,
menu, search, links and tables, the text with its routes, contexts on cards, that axe-core
finds nothing that keeps people out, and that what fails says so in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe_inspect.public import report
from moe_inspect.reporting.charts.spec import Chart, chart_of
from moe_inspect.reporting.render import html
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.texts import TEXT_BYTES, text_section
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.verdict.findings import verdict_of
from tests.conftest import ROOT, OpenPage
from tests.support.browser import MAP, Opened
from tests.support.synthetic import write_trace

SMALL = {"L": 4, "E": 8, "k": 2}
# name → tokens and shape
TRACES = {
    "1 token": {"T": 1} | SMALL,
    "3 tokens": {"T": 3} | SMALL,
    "top-1": {"T": 151, "L": 4, "E": 8, "k": 1},
    "58 × 256": {"T": 1_500, "L": 58, "E": 256, "k": 8},
}


class Shown(NamedTuple):
    page: Opened
    of: Report
    size: int

    def first_document(self) -> Any:
        """The routes of the one that the text shows at first."""
        said = self.page.locator("#text-document option").first.text_content()
        return self.of.trace.document(int(re.findall(r"document (\d+)", said)[0]))


def made(root: Path, T: int, L: int, E: int, k: int) -> Report:
    """Without gate weights where k is 1; layer 3 sends every second token to the first experts."""
    rng, t = np.random.default_rng(T), np.arange(T)
    steps = [(rng.integers(0, E, (T, 1)), rng.integers(1, E // 8 + 1, (T, 1))) for _ in range(L)]
    ids = [((first + np.arange(k) * step) % E).astype(np.uint16) for first, step in steps]
    ids[3][::2] = np.arange(k)
    weights = [-np.sort(-rng.random((T, k), np.float32), axis=1) for _ in range(L)]
    given: Any = {"document": 5 * t // T, "domain_of_document": ("law", "math"), "words": 500}
    given |= {"token_id": rng.integers(0, 500, T), "weights": weights if k > 1 else None}
    return report(write_trace(root, ids, E, **given))


@pytest.fixture(scope="module", params=["demo", *TRACES])
def shown(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    place, name = tmp_path_factory.mktemp("page"), request.param
    demo = ROOT / "sample_traces" / "collapsed"
    of = report(demo) if name == "demo" else made(place / "t", **TRACES[name])
    text = report_page(of)
    with Opened(browser, place / "page.html", text) as page:
        yield Shown(page, of, len(text.encode()))


def on(*names: str) -> pytest.MarkDecorator:
    """A test of some of the pages: others are like these."""
    return pytest.mark.parametrize("shown", names, indirect=True)


@on("demo", "58 × 256")
def test_the_first_screen_has_the_headline_figures_map_and_findings(shown: Shown) -> None:
    page, verdict = shown.page, verdict_of(shown.of)
    page.resize(1440)
    bottom = "(all) => all.map((e) => e.getBoundingClientRect().bottom)"
    first = (".headline", ".figures", "#findings > .verdict li", "[data-widget=map] .canvas")
    for query in first:
        assert 0 < max(page.locator(query).evaluate_all(bottom)) <= 900, query
    assert verdict.headline.text in page.locator(".headline").inner_text()
    findings = page.locator("#findings > .verdict li").all_inner_texts()
    folded = page.locator("#findings details li").all_text_contents()
    assert len(findings) == min(verdict.most_others, len(verdict.others))
    for text, one in zip([*findings, *folded], verdict.others, strict=True):
        assert text.lower().startswith(one.severity)
        assert one.text in text
    assert not any(one.is_grave for one in verdict.others[len(findings) :])
    load = shown.of.tables["load"]
    busiest = load.loc[load["load_ratio"].idxmax()]
    said = f"Layer {busiest['layer']:.0f}, expert {busiest['expert']:.0f}: "
    assert page.locator("#now").inner_text().startswith(said)
    titles = page.locator(".group > h2:not(.unseen)").all_inner_texts()
    assert titles == [name for name in html.GROUPS if name in titles]
    assert {"Balance", "Specialization", "Serving"} <= {*titles}
    page.resize()


@on("demo")
def test_the_page_of_the_bundled_model_is_short(shown: Shown) -> None:
    for width, height, most in ((1440, 900, 6_000), (390, 844, 12_000)):
        shown.page.resize(width, height)
        assert shown.page.evaluate("document.documentElement.scrollHeight") <= most
    shown.page.resize()


@on("58 × 256")
def test_a_large_model_fits(shown: Shown) -> None:
    page = shown.page
    assert shown.size <= 3_000_000  # a megabyte of text
    assert len(page.map(57)) == 256
    assert page.map(58) == []
    with page.view.expect_download() as download:  # all of it, more than a table shows
        page.sheet("load").get_by_role("button", name="Download csv").click()
    assert len(download.value.path().read_text().splitlines()) == 1 + 58 * 256
    ends = "(all) => all.map((e) => e.getBoundingClientRect()).map((r) => [r.top, r.bottom])"
    ticks = sorted(page.locator("[data-widget=map] .ytick").evaluate_all(ends))
    assert len(ticks) > 20
    assert all(above[1] <= below[0] + 2 for above, below in pairwise(ticks))
    assert page.drawn("Drift")[0][0]["rows"] == 58
    assert [len(marks[0]["x"]) for marks in page.drawn("Drift")[1:]] == [58]
    entries = "(plots) => plots.map((plot) => plot.querySelectorAll('.legend button').length)"
    assert max(page.locator(".plot").evaluate_all(entries)) <= 12
    assert page.crowded(".panels .plot", ".xtick") == 0
    label = "document.querySelector('.panels .xtick').textContent"
    page.evaluate(f"{label} = 'wide enough for the next two'")
    assert page.crowded(".panels .plot", ".xtick") == 1
    page.locator(MAP).focus()
    page.press("End", "ArrowDown", "Enter")
    assert page.title() == "Layer 4 · expert 255"  # below the busiest, where the map opens
    page.press("Escape")
    # a megabyte of text, and every expert has its contexts
    text: Any = text_section(shown.of)
    one = html.packed({**text.data, "contexts": None})
    assert TEXT_BYTES / 3 < len(one) <= TEXT_BYTES
    said = r"Shown: \d of 5 documents: those of each domain whose experts differ most"
    assert re.search(said, text.text)
    assert page.locator(".routed .ids i").count() > 20
    page.evaluate("location.hash = '#L57E255'")
    page.until("document.querySelectorAll('#card .context').length === 4")
    page.press("Escape")


@on("demo", "58 × 256")
def test_on_a_phone_nothing_is_cut_the_header_stays_and_its_menu_works(shown: Shown) -> None:
    page, view = shown.page, shown.page.view
    page.resize(390, 844)
    marked = "[...document.querySelectorAll('main .scale, main .scale b')]"
    page.until(f"Math.max(...{marked}.map((e) => e.getBoundingClientRect().right)) <= 380")
    assert page.crowded(".scale", ".ends b", 2) == 0
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
    view.get_by_role("button", name="Sections").click()
    menu = view.locator("#menu")
    box = menu.bounding_box()
    assert 0 <= box["x"] <= 390 - box["width"]
    menu.get_by_role("link", name="Chosen together").click()
    assert not menu.is_visible()
    top = "document.getElementById('coactivation').getBoundingClientRect().top"
    page.until(f"{top} >= 0 && {top} < 300")
    assert view.locator(".bar").bounding_box()["y"] == 0
    page.resize()


@on("demo", "58 × 256")
def test_tokens_have_the_colours_and_routes_of_the_trace(shown: Shown) -> None:
    page, trace, rows = shown.page, shown.of.trace, shown.first_document()
    texts = page.tokens()
    first = rows[rows["router"] == 0].iloc[: len(texts)]
    assert texts == [text.replace("\n", "↵\n") for text in first["text"]]
    last = len(trace.routers) - 1
    mine = rows[rows["router"] == last].iloc[: len(texts)]
    page.locator("#text-layer").fill(str(last))
    colours: dict[str, list[str]] = {}
    for mode in ("first", "weight", "margin"):
        page.locator("#text-mode").select_option(mode)
        colours[mode] = page.colours()
    page.view.get_by_label("Switch between light and dark").click()  # still by margin
    assert page.colours() != colours["margin"]
    page.view.get_by_label("Switch between light and dark").click()
    assert page.colours() == colours["margin"]
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
    found, token = page.route(), first["token"].iloc[9]
    for chips, row in zip(found, rows[rows["token"] == token].itertuples(), strict=True):
        for slot, chip in enumerate(chips):
            shown_id, weight = chip.split()
            assert int(shown_id) == getattr(row, f"expert_{slot}")
            assert abs(float(weight) - getattr(row, f"weight_{slot}")) < 0.03
    page.locator(".routed").focus()
    page.press("Escape")


def test_a_card_and_the_text_show_the_routes(shown: Shown) -> None:
    page, of = shown.page, shown.of
    page.locator("#text-document").select_option("0")
    page.locator(".routed .body span").first.click()
    experts = [int(chip.split()[0]) for chip in page.route()[0]]
    first = shown.first_document().query("router == 0").iloc[0]
    assert experts == [first[f"expert_{slot}"] for slot in range(of.trace.routers[0].top_k)]
    page.locator(".routed").focus()
    page.press("Escape")
    expert = of.trace.document(0)["expert_0"].iloc[0]
    page.evaluate(f"location.hash = '#L0E{expert}'")
    page.opens(f"Layer 0 · expert {expert}")
    assert page.locator("#card .context").count() > 0
    assert page.locator("#card .warning, main .widget .warning").count() == 0
    page.press("Escape")


@on("demo", "58 × 256")
def test_a_card_has_contexts_from_all_domains_and_leads_to_the_text(shown: Shown) -> None:
    page, of = shown.page, shown.of
    layer, domains = of.trace.routers[-1].layer, set[str]()
    expert = int(of.counts.load_E(len(of.trace.routers) - 1).argmax())  # the busiest
    for one in (expert ^ 1, expert):
        page.evaluate(f"location.hash = '#L{layer}E{one}'")
        page.opens(f"Layer {layer} · expert {one}")
        mine = of.trace.tokens_of(layer, one)
        texts = {text.replace("\n", "↵") for text in mine["text"]}
        contexts = page.locator("#card .context").all()
        assert len(contexts) > 1
        for context in contexts:
            weight, domain = context.locator("small").text_content().split(" · ")
            assert context.locator("mark").text_content() in texts
            assert np.abs(mine["weight"] - float(weight)).min() < 0.02
            domains.add(domain)
    assert len(domains) > 1
    page.view.get_by_text("Show its tokens in the text").click()
    assert page.locator("#text-expert").input_value() == str(expert)
    assert page.locator("#text-layer").input_value() == str(len(of.trace.routers) - 1)
    page.locator("#text-mode").select_option("first")


@on("3 tokens", "demo")
def test_axe_finds_nothing(shown: Shown) -> None:
    page = shown.page
    page.evaluate("location.hash = '#L0E1'")
    page.opens("Layer 0 · expert 1")
    assert page.axe() == []
    page.evaluate("document.querySelector('#menu-button').removeAttribute('aria-label')")
    assert [rule for rule, _ in page.axe("#menu-button")] == ["button-name"]
    page.press("Escape")


@on("3 tokens")
def test_key_figures_claim_no_more_than_the_findings(shown: Shown) -> None:
    figures = shown.page.locator(".figures").inner_text()
    assert re.search(r"\d+ of 32 experts without load", figures)
    assert not re.search("dead|hides|uneven", figures)
    assert "without load" in shown.page.locator("#load figcaption").inner_text()


@on("demo")
def test_the_chart_of_domains_has_a_uniform_row(shown: Shown) -> None:
    page, of = shown.page, shown.of
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


@on("demo")
def test_a_tip_goes_with_escape_wherever_the_focus_is(shown: Shown) -> None:
    page = shown.page
    page.locator("#find").focus()
    for place, target in (
        ("[data-panel]", "[data-panel] .canvas >> nth=0"),
        (MAP, f"{MAP} .canvas >> nth=0"),
        ("#text", ".routed .body span >> nth=4"),
    ):
        tip = page.locator(f"{place} .tip").first
        page.locator(target).hover()
        assert tip.is_visible(), place
        page.press("Escape")
        assert not tip.is_visible(), place


@on("demo")
def test_the_keyboard_skips_what_stands_on_every_page(shown: Shown) -> None:
    page = shown.page
    page.evaluate("document.activeElement.blur()")
    page.view.reload()
    page.ready()
    page.press("Tab")
    assert page.view.get_by_text("Skip to content").bounding_box()["y"] >= 0
    assert page.evaluate("getComputedStyle(document.activeElement).clipPath") == "none"
    page.press("Enter", "Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


def test_what_fails_says_so_and_the_rest_works(open_page: OpenPage, tmp_path: Path) -> None:
    broken = {  # file → where it fails
        "text.js": "const routes = moe.routes(data);",
        "card.js": "if (!data.load.length) return [];",
        "map.js": "const domainPlot =",
    }
    text = report_page(made(tmp_path / "t", T=97, **SMALL))
    [script] = re.findall(r"<script>(.*?)</script>", text, re.S)
    failing = script
    for name, at in broken.items():
        assert failing.count(at) == 1
        failing = failing.replace(at, f'throw new Error("{name}");{at}')
    hashes = [html.script_hash(one) for one in (script, failing)]
    page = open_page(text.replace(script, failing).replace(*hashes))
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
    assert page.ask("l2 e3") == ["Layer 2, expert 3\nexpert"]
    page.view.get_by_label("Switch between light and dark").click()
    assert page.complaints == ["map.js", "text.js", "card.js"]
    page.complaints.clear()
