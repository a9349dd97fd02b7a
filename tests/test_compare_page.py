"""The pages of comparisons in a browser."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from tests.conftest import OpenPage
from tests.support.browser import HOSTILE, Opened
from tests.support.synthetic import write_counts, write_trace
from tests.test_compare import ALIKE, DOCUMENT, E, K, L, T, decided, flipped


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> moe_inspect.Comparison:
    """Flips in a hundredth of the decisions, in layer 3 in a tenth; a hostile domain."""
    root, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(4)
    weights = [np.sort(rng.random((T, K)))[:, ::-1].astype(np.float32) for _ in range(L)]
    logits, ids = decided()
    other = flipped(ids, 0.01)
    other[3] = flipped(ids, 0.1)[3]
    settings = ALIKE | {"domain_of_document": [HOSTILE, "law"], "weights": weights}
    runs = {"a": ids, "b": other, "n": flipped(ids, 0.002, seed=5)}
    a, b, n = (
        write_trace(root / name, of, E, **settings, logits=logits) for name, of in runs.items()
    )
    return moe_inspect.compare(a, b, noise=n)


@pytest.fixture(scope="module")
def opened(
    browser: Any, made: moe_inspect.Comparison, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    with Opened(browser, tmp_path_factory.mktemp("page") / "p.html", made.page()) as page:
        yield page


def test_the_page_of_two_traces_renders(opened: Opened) -> None:
    assert opened.read_charts() == 5
    assert opened.locator(".plot .canvas svg").count() == 5
    assert opened.locator("h1").inner_text() == "Same routing?"
    assert opened.evaluate("window.pwned") is None
    assert HOSTILE in opened.locator("main").inner_text()
    opened.resize(390)
    opened.resize()


def test_what_is_drawn_is_in_the_tables(opened: Opened, made: moe_inspect.Comparison) -> None:
    table: Any = made.tables["agreement"]
    ((line, noise),) = opened.drawn("Decisions with different experts")
    assert line["y"] == pytest.approx(table["set_mismatch"], rel=1e-4)
    assert line["low"] == pytest.approx(table["set_mismatch_low"], rel=1e-4)
    assert np.argmax(line["y"]) == 3
    assert noise["y"] == pytest.approx(table["noise_set_mismatch"], rel=1e-4)
    maps = {"Where the router was undecided": "margins", "Where in the sequence": "positions"}
    for title, name in maps.items():
        ((cells,),) = opened.drawn(title)
        assert (cells["rows"], cells["columns"]) == (L, 10)
        rows: Any = made.tables[name].pivot(index="router", columns="decile", values="set_mismatch")
        drawn = np.reshape(cells["values"], (L, 10)).astype(float)
        # of 16 bits over the range
        np.testing.assert_allclose(drawn, rows, atol=1e-3)
    moved: Any = made.tables["load_shift"]["load_shift"]
    assert opened.drawn("Load that moves")[0][0]["y"] == pytest.approx(moved, rel=1e-4)


def test_the_verdict_and_the_worst_documents_are_on_the_page(
    opened: Opened, made: moe_inspect.Comparison
) -> None:
    text = opened.locator("main").inner_text()
    assert all(finding.text in text for finding in made.verdict())
    worst: Any = made.tables["documents"]
    section = opened.locator("main section", has_text="Documents that differ most")
    cells = section.locator("tbody tr").first.locator("td").all_inner_texts()
    assert cells[0].replace(",", "") == str(worst["document"].iloc[0])
    assert int(worst["document"].iloc[0]) <= DOCUMENT.max()


def test_the_page_of_a_trace_and_itself_has_nothing_to_show_and_says_so(
    open_page: OpenPage, made: moe_inspect.Comparison
) -> None:
    same: Any = moe_inspect.compare(made.a, made.a)
    page = open_page(same.page())
    assert "The same to the bit" in page.locator("main").inner_text()
    assert page.read_charts() == 1


def check_python(made: Any, *groups: str) -> None:
    """Every table of the page has lines that give it, and its section stands in one of the
    groups."""
    page = made.page()
    assert re.findall(r'<h2 id="group-[^"]*">([^<]*)<', page) == [*groups]
    sheets = re.findall(r'<div class="sheet" data-name="[^"]*"(?: data-python="([^"]*)")?', page)
    assert len(sheets) >= 4
    for code in sheets:
        *lines, last = html.unescape(code).splitlines()
        again: dict[str, Any] = {}
        exec("\n".join([*lines, f"table = {last}"]), again)
        (name,) = re.findall(r"tables\['(\w+)'\]", last)
        whole: Any = made.tables[name]
        assert again["table"].equals(whole)


def test_pages_give_the_python_of_every_table(made: Any, tmp_path: Path) -> None:
    check_python(made, "Decisions", "Load")
    even, uneven = np.full((2, 1, 8), 500), np.array([[range(100, 900, 100)]] * 2)
    counts = [write_counts(tmp_path / n, list(x), 2) for n, x in (("c", even), ("d", uneven))]
    check_python(
        moe_inspect.compare(*counts, layers=[0]), "Change of the load", "Load of each trace"
    )
