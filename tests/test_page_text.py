"""The text on the page and the contexts on the cards, in a browser: what is drawn is what the trace
holds, in every script, and nothing of it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.texts import text_section
from moe_inspect.reporting.report import Report, report
from tests.conftest import ROOT
from tests.support.damage import edit_manifest
from tests.support.synthetic import uniform_ids, write_counts, write_trace
from tests.test_page import HOSTILE, Opened, browser, pytestmark  # noqa: F401 (a fixture, a mark)

# a byte-level "é", a combining mark of its own, Hebrew, an Arabic word in two tokens, a bidi
# override, a control character
PIECES = ["caf", "<0xC3>", "<0xA9>", "▁e", "\u0301", "\n", "שלום", "▁مر", "حبا"]
PIECES += ["\u202eevil", "\x1b[31m", HOSTILE]
# an Indic conjunct cut within a letter, emoji joined to one, with a skin tone, a flag
CUT = ["<0xE0><0xA4>", "<0x95>", "्", "षि", "▁", "👩", "\u200d", "💻", "👍", "🏽", "🇩", "🇪"]
JOINED = ["क्षि", "", "", "", " ", "👩\u200d💻", "", "", "👍🏽", "", "🇩🇪", ""]
COLOUR = (
    "(n) => getComputedStyle(document.querySelectorAll('.routed .body span')[n]).backgroundColor"
)


def scripts(root: Path, pieces: Sequence[str] = PIECES) -> Report:
    """Two documents of 12 tokens, 2 × 8: at layer n token t goes to experts t + n and t + n + 1."""
    t, both = np.arange(24), np.arange(2)
    ids = [((t[:, None] + layer + both) % 8).astype(np.uint16) for layer in both]
    weights = [np.tile(np.float32([0.75, 0.25]), (24, 1))] * 2
    settings: dict[str, Any] = {"document": t // 12, "token_id": t % 12, "words": 12}
    write_trace(root, ids, 8, weights=weights, domain_of_document=("a", "b"), **settings)
    table = pa.table({"token_id": pa.array(range(12), pa.int32()), "token": pieces})
    pq.write_table(table, root / "vocabulary.parquet")
    edit_manifest(root, vocabulary=None)
    return report(root)


@pytest.fixture(scope="module")
def demo() -> Report:
    return report(ROOT / "sample_traces" / "collapsed")


@pytest.fixture(scope="module")
def opened(
    browser: Any, demo: Report, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    page = Opened(browser, tmp_path_factory.mktemp("page") / "page.html", report_page(demo))
    yield page
    page.view.close()


def spans(page: Opened) -> list[str]:
    return page.locator(".routed .body span").all_text_contents()


def route(page: Opened) -> list[list[str]]:
    """Of each layer the experts with their weights, as the panel beside the text shows them."""
    rows = page.locator(".route tbody tr")
    return [rows.nth(i).locator(".chip").all_text_contents() for i in range(rows.count())]


def test_a_token_is_pinned_and_the_keyboard_reads_the_text(opened: Opened, demo: Report) -> None:
    number = opened.locator("#text-document option").first.text_content()
    rows = demo.trace.document(int(re.search(r"document (\d+)", number)[1]))
    opened.locator(".routed .body span").nth(9).click()
    pinned = route(opened)
    instant = "(e) => e.scrollIntoView({ behavior: 'instant', block: 'end' })"
    opened.locator("#text .stage").evaluate(instant)
    opened.locator(".routed .body span").nth(2).hover()
    assert route(opened) == pinned
    text, tip = (opened.locator(f"#text {of}").bounding_box() for of in (".routed", ".tip"))
    assert tip["y"] >= text["y"] + text["height"], "it covers text"
    opened.locator(".routed").focus()
    opened.press("Escape")
    opened.press("Home", "ArrowRight")
    assert route(opened) != pinned
    row = rows[(rows["router"] == 2) & (rows["position"] == 1)].iloc[0]
    opened.locator("#text-layer").fill("2")
    opened.locator(".routed").focus()
    opened.press("PageUp", "PageDown")
    said = opened.locator("[data-widget=text] > .unseen").text_content()
    assert said.startswith(f"layer 2: experts {row['expert_0']} (")
    assert opened.complaints == []


SHOWN = ["caf", "é", " e\u0301", "↵\n", "שלום", " مر", "حبا", r"\u202eevil", r"\x1b[31m", HOSTILE]
WHOLE = {"é part 2 of 2": (PIECES, SHOWN), "क्षि part 3 of 4": (CUT, [*filter(None, JOINED)])}


@pytest.mark.parametrize("part", WHOLE)
def test_characters_are_whole_in_every_script_and_what_is_hostile_is_text(
    browser: Any, tmp_path: Path, part: str
) -> None:
    pieces, whole = WHOLE[part]
    page = Opened(browser, tmp_path / "p.html", report_page(scripts(tmp_path / "t", pieces)))
    assert spans(page) == whole
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    # a byte within a character, by the keyboard
    page.locator(".routed").focus()
    page.press("Home", "ArrowRight", "ArrowRight", "Enter")
    assert page.locator(".route .token").text_content() == f"{part} token 3, pinned"
    assert route(page) == [["2 0.75", "3 0.25"], ["3 0.75", "4 0.25"]]
    page.evaluate("location.hash = '#L0E2'")
    page.until("document.querySelectorAll('#card .context').length > 0")
    marked = page.locator("#card .context mark").all_text_contents()
    assert pieces is PIECES or set(marked) <= {*whole, "␣"}
    page.press("Escape")
    page.view.set_viewport_size({"width": 390, "height": 800})
    page.until("document.documentElement.scrollWidth <= 390")
    assert page.complaints == []
    page.view.close()


def test_which_documents_are_the_most_telling(tmp_path: Path) -> None:
    """Documents 0, 2, … are of "a", the others of "b". Document 4 goes to the expert of its domain
    only, the others of its domain in half of their tokens."""
    T, rng = 2_000, np.random.default_rng(0)
    document = np.arange(T) // 100
    ids = uniform_ids(rng, T, 8, 1)
    ids[(document % 2 == 0) & (rng.random(T) < 0.5)] = 3
    ids[document == 4] = 3
    given: Any = {"document": document, "domain_of_document": ("a", "b"), "words": 5}
    trace = write_trace(tmp_path / "t", [ids], 8, **given)
    made: Any = text_section(report(trace), 1)
    assert [d["domain"] for d in made.data["documents"]] in (["a", "b"], ["b", "a"])
    assert 4 in [d["number"] for d in made.data["documents"]]
    everything: Any = text_section(report(trace), "all")
    assert len(everything.data["documents"]) == 20
    assert "Shown in full: 20 documents." in everything.text
    only: Any = text_section(report(trace, domains="b"), "all")
    assert {d["number"] for d in only.data["documents"]} == set(range(1, 20, 2))


def test_a_trace_without_text_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 300, 8, 2)]
    silent = write_trace(tmp_path / "a", ids, 8, manifest={"capture": {"text": False}})
    said = "This trace was recorded without its text (trace --no-text)"
    page, short = report_page(report(silent)), report_page(report(silent), text=0)
    assert page.count(said) == 1
    assert said not in short
    told = "91% of the tokens were recovered from expert selections (arXiv:2602.04105)"
    assert page.count(told) == 2, "in the place of the text, and under the facts"
    assert told in short
    counts = write_counts(tmp_path / "b", [rng.integers(1, 50, (2, 8))], 2, domains=("a", "b"))
    assert text_section(report(counts)) == "text: counts alone hold no tokens"
    words = write_trace(tmp_path / "c", ids, 8, words=5)
    assert told not in report_page(report(words))
    monkeypatch.setattr("moe_inspect.reporting.render.texts.MOST_BYTES", 100)
    with pytest.raises(MoeInspectError, match="ask for fewer documents or layers"):
        text_section(report(words), "all")


def test_two_traces_are_compared_in_the_text(browser: Any, tmp_path: Path) -> None:
    T, rng = 600, np.random.default_rng(0)
    a = uniform_ids(rng, T, 8, 2)
    b = a.copy()
    b[100:120] = (b[100:120] + 1) % 8  # of document 1
    given: Any = {"document": np.arange(T) // 100, "token_id": np.arange(T) % 50, "words": 50}
    traces = [
        write_trace(tmp_path / name, [a, ids], 8, **given) for name, ids in (("a", a), ("b", b))
    ]
    page = Opened(browser, tmp_path / "p.html", moe_inspect.compare(*traces).page())
    listed = page.locator("#text-document option").all_text_contents()
    assert listed == ["text · document 1 · 100 tokens"]
    assert page.locator("#text-layer").input_value() == "1"  # which differs most
    coloured = [page.evaluate(COLOUR, n) != "rgba(0, 0, 0, 0)" for n in range(100)]
    differ = [set(x) != set(y) for x, y in zip(a[100:200], b[100:200], strict=True)]
    assert coloured == differ
    assert sum(differ) > 10
    page.locator(".routed .body span").first.click()
    at_1 = page.locator(".route tbody tr").nth(1).locator("div")
    assert at_1.nth(0).locator(".chip").all_text_contents() == [str(e) for e in a[100]]
    assert at_1.nth(1).locator(".chip").all_text_contents() == [str(e) for e in b[100]]
    assert page.complaints == []
    page.view.close()
