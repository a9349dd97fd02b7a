"""The pages of comparisons in a browser: two traces, checkpoints, two models."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.comparison.compare import compare_checkpoints
from tests.support.synthetic import write_counts, write_trace
from tests.test_compare import ALIKE, DOCUMENT, E, K, L, T, decided, flipped
from tests.test_compare_models import by_chance, pieces, whole_words
from tests.test_page import HOSTILE, Opened, browser, pytestmark  # noqa: F401 (a fixture, a mark)


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
    browser: Any,  # noqa: F811
    made: moe_inspect.Comparison,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Opened]:
    page = Opened(browser, tmp_path_factory.mktemp("page") / "p.html", made.page())
    yield page
    page.view.close()


def read_with_the_keyboard(page: Opened) -> int:
    """Every chart says a number when an arrow is pressed; how many charts there are."""
    plots = page.view.locator("[data-panel]")
    for i in range(plots.count()):
        plots.nth(i).focus()
        page.view.keyboard.press("ArrowRight")
        said = plots.nth(i).locator(".unseen").text_content()
        assert re.search(r"\d", said), said
        page.view.keyboard.press("Escape")
    return plots.count()


def test_the_page_of_two_traces_renders_and_asks_for_nothing(opened: Opened) -> None:
    assert opened.complaints == []
    assert opened.foreign() == []
    assert read_with_the_keyboard(opened) == 5
    assert opened.view.locator(".plot .canvas svg").count() == 5
    assert opened.view.locator("h1").inner_text() == "Same routing?"
    assert opened.view.evaluate("window.pwned") is None
    assert HOSTILE in opened.view.locator("main").inner_text()
    opened.view.set_viewport_size({"width": 390, "height": 800})
    opened.until("document.documentElement.scrollWidth <= 390")
    opened.view.set_viewport_size({"width": 1280, "height": 900})


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
    text = opened.view.locator("main").inner_text()
    for finding in made.verdict():
        assert finding.text in text
    worst: Any = made.tables["documents"]
    section = opened.view.locator("main section", has_text="Documents that differ most")
    cells = section.locator("tbody tr").first.locator("td").all_inner_texts()
    assert cells[0].replace(",", "") == str(worst["document"].iloc[0])
    assert int(worst["document"].iloc[0]) <= DOCUMENT.max()


def test_the_page_of_a_trace_and_itself_has_nothing_to_show_and_says_so(
    browser: Any,  # noqa: F811
    made: moe_inspect.Comparison,
    tmp_path: Path,
) -> None:
    same: Any = moe_inspect.compare(made.a, made.a)
    page = Opened(browser, tmp_path / "same.html", same.page())
    assert page.complaints == []
    assert "The same to the bit" in page.view.locator("main").inner_text()
    assert read_with_the_keyboard(page) == 1
    page.view.close()


def test_the_page_of_checkpoints(browser: Any, made: Any, tmp_path: Path) -> None:  # noqa: F811
    several = compare_checkpoints([made.noise.b, made.b, made.a])
    page = Opened(browser, tmp_path / "c.html", several.page())
    assert page.complaints == []
    assert page.foreign() == []
    assert read_with_the_keyboard(page) == 1
    rows: Any = several.tables["saturation"]
    (lines,) = page.drawn("Router saturation")
    assert len(lines) == L
    for r, line in enumerate(lines):
        assert line["y"] == pytest.approx(rows[rows["router"] == r]["overlap"], rel=1e-4)
    page.view.close()


def test_the_page_of_two_models(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    a, b = whole_words(tmp_path / "a"), pieces(tmp_path / "b", by_chance, L=3)
    models = moe_inspect.compare(a, b, side_by_side=True)
    page = Opened(browser, tmp_path / "m.html", models.page())
    assert page.complaints == []
    assert page.foreign() == []
    assert read_with_the_keyboard(page) == 3
    rows: Any = models.tables["spans"]
    (lines,) = page.drawn("Do experts follow the text?")
    for line, side, at in zip(lines, "ab", ([0, 100], [0, 50, 100]), strict=True):
        assert line["x"] == at
        share = rows[rows["trace"] == side]["explained_by_text"]
        assert line["y"] == pytest.approx(share, rel=1e-3, abs=1e-5)
    text = page.view.locator("main").inner_text()
    assert "A has 8 experts per layer, B 16" in text
    assert "flips" in text
    page.view.close()


def check_python(page: str, made: Any, groups: list[str]) -> None:
    """Every table of the page has lines that give it, and its section stands in one of the
    groups."""
    assert re.findall(r'<h2 id="group-[^"]*">([^<]*)<', page) == groups
    sheets = re.findall(r'<div class="sheet" data-name="[^"]*"(?: data-python="([^"]*)")?', page)
    assert len(sheets) >= 4
    for code in sheets:
        *lines, last = html.unescape(code).splitlines()
        again: dict[str, Any] = {}
        exec("\n".join([*lines, f"table = {last}"]), again)
        name = re.search(r"tables\['(\w+)'\]", last)
        assert name
        whole: Any = made.tables[name[1]]
        if name[1] == "vocabulary":  # one text of each expert
            whole = whole.groupby(["trace", "router", "expert"], sort=False).head(1)
        assert again["table"].equals(whole)


def test_pages_give_the_python_of_every_table(made: Any, tmp_path: Path) -> None:
    check_python(made.page(), made, ["Decisions", "Load"])
    several = moe_inspect.compare(made.noise.b, made.b, made.a, layers="1-3")
    check_python(several.page(), several, ["Decisions", "Load and specialization"])
    a, b = whole_words(tmp_path / "a"), pieces(tmp_path / "b", by_chance, L=3)
    models = moe_inspect.compare(a, b, top=3, side_by_side=True)
    check_python(models.page(), models, ["Balance", "Specialization"])
    even, uneven = np.full((2, 1, 8), 500), np.array([[range(100, 900, 100)]] * 2)
    counts = [write_counts(tmp_path / n, list(x), 2) for n, x in (("c", even), ("d", uneven))]
    loads: Any = moe_inspect.compare(*counts, layers=[0])
    groups = ["Change of the load", "Load of each trace"]
    check_python(loads.page(), loads, groups)
