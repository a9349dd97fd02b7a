"""The text on the page and the contexts on the cards, in a browser: what is drawn is what the trace
holds, in every script, and nothing of it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.texts import text_section
from moe_inspect.reporting.report import Report, report
from tests.conftest import ROOT, OpenPage
from tests.support.browser import HOSTILE
from tests.support.synthetic import uniform_ids, write_counts, write_trace

# a byte-level "é", a combining mark of its own, Hebrew, an Arabic word in two tokens, a bidi
# override, a control character
PIECES = ["caf", "<0xC3>", "<0xA9>", "▁e", "\u0301", "\n", "שלום", "▁مر", "حبا"]
PIECES += ["\u202eevil", "\x1b[31m", HOSTILE]
# an Indic conjunct cut within a letter, emoji joined to one, with a skin tone, a flag
CUT = ["<0xE0><0xA4>", "<0x95>", "्", "षि", "▁", "👩", "\u200d", "💻", "👍", "🏽", "🇩", "🇪"]
JOINED = ["क्षि", "", "", "", " ", "👩\u200d💻", "", "", "👍🏽", "", "🇩🇪", ""]


def scripts(root: Path, pieces: Sequence[str] = PIECES) -> Report:
    """Two documents of 12 tokens, 2 × 8: at layer n token t goes to experts t + n and t + n + 1."""
    t, both = np.arange(24), np.arange(2)
    ids = [((t[:, None] + layer + both) % 8).astype(np.uint16) for layer in both]
    given: Any = {"document": t // 12, "token_id": t % 12, "domain_of_document": ("a", "b")}
    given["weights"] = [np.tile(np.float32([0.75, 0.25]), (24, 1))] * 2
    return report(write_trace(root, ids, 8, words=pieces, **given))


def test_a_token_is_pinned_and_the_keyboard_reads_the_text(open_page: OpenPage) -> None:
    made = report(ROOT / "sample_traces" / "collapsed")
    page = open_page(report_page(made))
    number = page.locator("#text-document option").first.text_content()
    rows = made.trace.document(int(re.search(r"document (\d+)", number)[1]))
    page.locator(".routed .body span").nth(9).click()
    pinned = page.route()
    instant = "(e) => e.scrollIntoView({ behavior: 'instant', block: 'end' })"
    page.locator("#text .stage").evaluate(instant)
    page.locator(".routed .body span").nth(2).hover()
    assert page.route() == pinned
    text, tip = (page.locator(f"#text {of}").bounding_box() for of in (".routed", ".tip"))
    assert tip["y"] >= text["y"] + text["height"], "it covers text"
    page.locator(".routed").focus()
    page.press("Escape")
    page.press("Home", "ArrowRight")
    assert page.route() != pinned
    row = rows[(rows["router"] == 2) & (rows["position"] == 1)].iloc[0]
    page.locator("#text-layer").fill("2")
    page.locator(".routed").focus()
    page.press("PageUp", "PageDown")
    said = page.locator("[data-widget=text] > .unseen").text_content()
    assert said.startswith(f"layer 2: experts {row['expert_0']} (")


SHOWN = ["caf", "é", " e\u0301", "↵\n", "שלום", " مر", "حبا", r"\u202eevil", r"\x1b[31m", HOSTILE]
WHOLE = {"é part 2 of 2": (PIECES, SHOWN), "क्षि part 3 of 4": (CUT, [*filter(None, JOINED)])}


@pytest.mark.parametrize("part", WHOLE)
def test_characters_are_whole_in_every_script_and_what_is_hostile_is_text(
    open_page: OpenPage, tmp_path: Path, part: str
) -> None:
    pieces, whole = WHOLE[part]
    page = open_page(report_page(scripts(tmp_path / "t", pieces)))
    assert page.tokens() == whole
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    # a byte within a character, by the keyboard
    page.locator(".routed").focus()
    page.press("Home", "ArrowRight", "ArrowRight", "Enter")
    assert page.locator(".route .token").text_content() == f"{part} token 3, pinned"
    assert page.route() == [["2 0.75", "3 0.25"], ["3 0.75", "4 0.25"]]
    page.evaluate("location.hash = '#L0E2'")
    page.until("document.querySelectorAll('#card .context').length > 0")
    marked = page.locator("#card .context mark").all_text_contents()
    assert pieces is PIECES or set(marked) <= {*whole, "␣"}
    page.press("Escape")
    page.resize(390)


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
    one: Any = text_section(report(trace), 1)
    assert sorted(d["domain"] for d in one.data["documents"]) == ["a", "b"]
    assert 4 in [d["number"] for d in one.data["documents"]]
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


def test_two_traces_are_compared_in_the_text(open_page: OpenPage, tmp_path: Path) -> None:
    T, rng = 600, np.random.default_rng(0)
    a = uniform_ids(rng, T, 8, 2)
    b = a.copy()
    b[100:120] = (b[100:120] + 1) % 8  # of document 1
    given: Any = {"document": np.arange(T) // 100, "token_id": np.arange(T) % 50, "words": 50}
    traces = [write_trace(tmp_path / f"{n}", [a, ids], 8, **given) for n, ids in enumerate((a, b))]
    page = open_page(moe_inspect.compare(*traces).page())
    listed = page.locator("#text-document option").all_text_contents()
    assert listed == ["text · document 1 · 100 tokens"]
    assert page.locator("#text-layer").input_value() == "1"  # which differs most
    differ = [set(x) != set(y) for x, y in zip(a[100:200], b[100:200], strict=True)]
    assert [colour != "rgba(0, 0, 0, 0)" for colour in page.colours()] == differ
    assert sum(differ) > 10
    page.locator(".routed .body span").first.click()
    at_1 = page.locator(".route tbody tr").nth(1).locator("div")
    for n, ids in enumerate((a, b)):
        assert at_1.nth(n).locator(".chip").all_text_contents() == [str(e) for e in ids[100]]
