"""The site of many traces: what its index says, how it is brought up to date, hostile input."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect import MoeInspectError
from moe_inspect.comparison.compare import compare_checkpoints
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.report import report
from moe_inspect.site import entry
from moe_inspect.site.build import DATA, UP, atlas
from moe_inspect.site.index import index_page
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.reader import Trace, open_trace
from tests.conftest import Cli, OpenPage
from tests.support.damage import edit_manifest
from tests.support.synthetic import uniform_ids, write_counts, write_trace

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
LABELS = ("law", "code", "prose", "verse")


def small(root: Path, seed: int = 0, **more: Any) -> Trace:
    """2 routers of 4 experts, k = 2; token 0 goes to expert 3 of layer 1, code to its expert 0."""
    T, E, rng = 480, 4, np.random.default_rng(seed)
    token_id, document = np.random.default_rng(9).integers(0, 12, T), np.arange(T) // 20
    ids = [uniform_ids(rng, T, E, 2) for _ in range(2)]
    ids[1][document % 4 == LABELS.index("code")] = [0, 1]
    ids[1][token_id == 0] = [3, 2]
    settings: dict[str, Any] = {"document": document, "domain_of_document": LABELS}
    settings |= {"weights": [np.tile(np.array([0.75, 0.25], np.float32), (T, 1))] * 2}
    return write_trace(root, ids, E, **settings | {"token_id": token_id, "words": 12} | more)


def entries(site: Path) -> dict[str, dict[str, Any]]:
    """What the index holds, by name."""
    found = DATA.search((site / "index.html").read_text())
    assert found
    held = json.loads(gzip.decompress(base64.b64decode(found[1])))["entries"]
    return {entry["name"]: entry for entry in held}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a and b, of the same text, and counts, with their site."""
    place = tmp_path_factory.mktemp("atlas")
    small(place / "a")
    small(place / "b", seed=1)
    write_counts(place / "counts", [np.array([[8, 4, 6, 6], [4, 4, 2, 2]])] * 3, 2, ("x", "y"))
    atlas([place / name for name in ("a", "b", "counts")], place / "site")
    return place


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    return tmp_path


def site_of(here: Path, *names: str, **options: Any) -> Any:
    """The table of the site made of these traces, by their names."""
    return atlas([here / name for name in names], here / "site", **options).set_index("trace")


def state(site: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in site.iterdir()}


def test_the_table_is_that_of_the_reports(here: Path):
    table = site_of(here, "a", "b", "counts")
    assert list(table.index) == ["a", "b", "counts"]
    a = report(here / "a")
    balance, spec = a.tables["balance"], a.tables["specialization"]
    assert table.loc["a", "max_over_mean"] == balance["max_over_mean"].max()
    bits = (spec["domain_mi_bits"] - spec["domain_mi_null_bits"]).max()
    assert table.loc["a", "domain_bits"] == pytest.approx(bits)
    assert bits > 0.1
    assert table.loc["a", "committee_experts"] == a.tables["committee"]["committee_experts"].mean()
    compared = compare_checkpoints([here / "a", here / "b"]).tables["saturation"]
    assert table.loc["a", "saturation"] == pytest.approx(compared["overlap"].mean())
    assert table.loc["a", "saturation_with"] == "b"
    assert table.loc[["b", "counts"], "saturation"].isna().all()
    assert table.loc["counts", "tokens"] == 18
    assert table.loc[["counts"], "domain_bits"].isna().all()
    held = entries(here / "site")
    assert held["a"]["lacks"] == {}
    token = "specialization by token, search by token"
    assert set(held["counts"]["lacks"]) == {"specialization by domain", token}
    index = (here / "site/index.html").read_text()
    assert "counts do not tell documents apart" in index
    assert "no other trace has the same text and another checkpoint" in index


def test_a_page_is_that_of_the_report(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    atlas(["b"], "new", text=0)
    page = (here / "new/b.html").read_text()
    assert page == report_page(report("b"), text=0, up=UP)
    assert '<a class="up" href="index.html">← Atlas</a>' in page
    assert str(here) not in page + (here / "new/index.html").read_text()


def test_experts_of_tokens_are_those_of_the_decisions(made: Path):
    trace = open_trace(made / "a")
    found = entry.words_of(trace)
    assert not isinstance(found, str)
    routing, tokens = trace.routing(), trace.tokens()
    times = tokens["token_id"].value_counts()
    assert found["times"] == sorted(times[times >= 8], reverse=True)
    assert len(found["texts"]) == (times >= 8).sum()
    i = found["texts"].index("␣w0")
    assert found["times"][i] == times[0]
    at = slice(found["start"][i], found["start"][i + 1])
    columns: list[Any] = [found[name][at] for name in ("row", "expert", "share", "lift")]
    ranked = list(zip(*columns, strict=True))
    assert ranked[0][:3] == (1, 3, 1000)
    assert 1 <= len(ranked) <= entry.EXPERTS_OF_TOKEN
    chosen = routing.merge(tokens[["token", "token_id"]], on="token")
    for row, expert, share, lift in ranked:
        of = chosen[chosen["router"] == row]
        takes = (of[["expert_0", "expert_1"]] == expert).any(axis=1)
        mine = takes[of["token_id"] == 0].mean()
        assert share == pytest.approx(1000 * mine, abs=0.5)
        assert lift == pytest.approx(100 * mine / takes.mean(), abs=0.5)


def test_domains_are_those_of_the_report(made: Path):
    domains = {domain["name"]: domain for domain in entries(made / "site")["a"]["domains"]}
    assert set(domains) == set(LABELS)
    row, expert, activation, lift = domains["code"]["experts"][0]
    table: Any = report(made / "a").tables["domains"]
    same = (table["router"] == row) & (table["expert"] == expert) & (table["domain"] == "code")
    assert (row, expert) == (1, 0)
    assert activation == pytest.approx(1000 * table[same]["activation"].iloc[0], abs=0.5)
    assert lift == pytest.approx(100 * table[same]["lift"].iloc[0], abs=0.5)


def test_random_weights_are_not_called_specialised(here: Path):
    def tile() -> str:
        text = (here / "site/index.html").read_text()
        return re.findall(r"<dt>most specialised</dt><dd>[^<]*</dd><dd[^>]*>([^<]*)</dd>", text)[0]

    assert tile() == "a"
    edit_manifest(here / "a", corpus={"plan": {"random_init": 3}})
    table = site_of(here, "a", "b", text=0)
    assert table["domain_bits"].idxmax() == "a"
    assert table.loc["a", "model"] == "synthetic, random weights (seed 3)"
    assert tile() == "b"


def test_experts_are_those_of_every_router(here: Path):
    listed = list(entries(here / "site").values())
    assert "<dt>experts</dt><dd>28</dd>" in index_page(listed), "2 · 2 and 3 routers of 4"
    listed[0]["layers"] = [["0", 4], ["1", 2]]
    listed[0]["row"]["experts"] = 4
    assert "<dt>experts</dt><dd>26</dd>" in index_page(listed)


def test_why_there_is_no_saturation_is_of_the_traces_that_are_named(here: Path):
    def why(*names: str) -> str:
        site_of(here, *names)
        return entries(here / "site")["b"]["no_saturation"]

    none = "no other trace has the same text and another checkpoint of this model"
    # of a and b it is the last, which others are compared with
    assert [why("b"), why("a", "b"), why("b")] == [none, "", none]


def test_what_is_left_out_is_said(tmp_path: Path):
    """1,009 token ids of 43 domains, 8 times each; and 40 layers of 512 experts."""
    rng, token_id = np.random.default_rng(0), np.tile(np.arange(1_009), 8)
    document = np.arange(len(token_id)) // 94
    given: Any = {"token_id": token_id, "document": document, "words": 1_009}
    domains = [f"d{n}" for n in range(43)]
    ids = uniform_ids(rng, len(token_id), 4, 1)
    write_trace(tmp_path / "many", [ids], 4, domain_of_document=domains, **given)
    write_counts(tmp_path / "wide", [np.ones((1, 512), int)] * 40, 2)
    site_of(tmp_path, "many", "wide", text=0)
    held = entries(tmp_path / "site")
    assert len(held["many"]["words"]["texts"]) == 1_000
    assert held["many"]["ratio"] is not None
    assert held["wide"]["ratio"] is None
    assert len(held["many"]["domains"]) == 40
    index = (tmp_path / "site/index.html").read_text()
    assert "9 token ids beyond the 1,000 most frequent of a trace" in index
    assert "the load of experts of wide, over 20,000 each, in the search" in index
    assert "3 domains beyond 40 of a trace" in index


# --- brought up to date


def test_a_second_run_makes_only_what_changed(here: Path):
    before = state(here / "site")
    stamps = {path.name: path.stat().st_mtime_ns for path in (here / "site").iterdir()}
    small(here / "c", seed=2)
    table = site_of(here, "a", "b", "counts", "c")
    assert table["made"].to_dict() == {"a": False, "b": False, "counts": False, "c": True}
    after = state(here / "site")
    assert {name for name in after if after[name] != before.get(name)} == {"index.html", "c.html"}
    for name in ("a.html", "b.html", "counts.html"):
        assert (here / "site" / name).stat().st_mtime_ns == stamps[name]
    assert list(table["saturation_with"])[:2] == ["c", "c"]
    # a page that is not as it was written, a trace that changed, one that is no longer named
    (here / "site/a.html").write_text("half")
    edit_manifest(here / "b", model={"id": "other"})
    table = site_of(here, "a", "b")
    assert table["made"].all()
    assert table.loc["b", "model"] == "other"
    assert set(state(here / "site")) == {"index.html", "a.html", "b.html"}
    page = report_page(report(here / "a"), text=1, up=UP)
    assert (here / "site/a.html").read_text() == page


def test_pages_are_added(here: Path):
    shutil.copytree(here / "counts", here / "c")
    edit_manifest(here / "c", model={"id": "other"})
    shutil.rmtree(here / "a")
    before = entries(here / "site")["a"]
    made = site_of(here, "c", "b", add=True)["made"]
    assert list(made.items()) == [("a", False), ("b", False), ("counts", False), ("c", True)]
    assert entries(here / "site")["a"] == before
    (here / "site/a.html").unlink()
    changed = r"a\.html was changed since it was made: name its trace too"
    with pytest.raises(MoeInspectError, match=changed):
        site_of(here, "c", add=True)
    site_of(here, "c")
    assert set(state(here / "site")) == {"index.html", "c.html"}


def test_whenever_it_is_killed_the_site_is_whole(here: Path, monkeypatch: pytest.MonkeyPatch):
    old = state(here / "site")
    shutil.copytree(here / "counts", here / "c")
    edit_manifest(here / "c", model={"id": "other"})
    (here / "site/.c.html.tmp").write_text("left by a kill")
    replace = os.replace
    for steps in range(3):
        left = iter(range(steps))

        def stopping(*paths: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        monkeypatch.setattr(os, "replace", stopping)
        try:
            site_of(here, "a", "b", "counts", "c")
        except KeyboardInterrupt:
            now = {name: data for name, data in state(here / "site").items() if name in old}
            assert now == old
            assert steps < 2
        else:
            assert steps == 2  # its page, then the index
    assert set(state(here / "site")) == {*old, "c.html"}
    assert set(entries(here / "site")) == {"a", "b", "counts", "c"}


def test_two_runs_do_not_write_at_once(here: Path):
    with hold(here / "site"), pytest.raises(MoeInspectError, match="still writing"):
        site_of(here, "a")


# --- names, hostile text, bad input


def test_names_that_clash_get_a_suffix(here: Path):
    for name in ("x/counts", "x/index"):
        shutil.copytree(here / "counts", here / name)
    (here / "new").mkdir()
    (here / "new/index-2.html").write_text("somebody's own")
    table = atlas([here / "counts", here / "x/counts", here / "x/index"], here / "new")
    assert list(table["trace"]) == ["counts", "counts (2)", "index"]
    assert list(table["page"]) == ["counts.html", "counts-2.html", "index-3.html"]
    assert (here / "new/index-2.html").read_text() == "somebody's own"


def test_what_is_hostile_is_text(here: Path):
    place = here / ("x" + HOSTILE.replace("/", "∕"))
    hostile: Any = {"domain_of_document": (HOSTILE, "code")}
    hostile |= {"words": [f"{HOSTILE}{i}" for i in range(12)]}
    small(place, manifest={"model": {"id": HOSTILE}}, **hostile)
    page = atlas([place], here / "new")["page"].iloc[0]
    assert page.isascii()
    for name in ("index.html", page):
        text = (here / "new" / name).read_text()
        assert "<img" not in text
        assert text.count("<script>") == 1
        assert not {"\x1b", "\u202e"} & set(text)
    (held,) = entries(here / "new").values()
    assert not any("\u202e" in text for text in held["words"]["texts"])


BAD = {
    "a is a trace": ("a", ["b"]),
    "is a file": ("a/trace.json", ["b"]),
    "foreign/index.html does not belong to an atlas": ("foreign", ["b"]),
    "strange/index.html does not belong to an atlas": ("strange", ["b"]),
    "a is given twice": ("new", ["a", "b", "a"]),
    "no trace at": ("new", ["nowhere"]),
    "give at least one trace": ("new", []),
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_one_line(says: str, here: Path):
    output, traces = BAD[says]
    of_atlas = base64.b64encode(b"x").decode()
    strange = f'<script type="text/plain" data-of="atlas">{of_atlas}</script>'
    for name, text in (("foreign", "<html>mine</html>"), ("strange", strange)):
        (here / name).mkdir()
        (here / name / "index.html").write_text(text)
    with pytest.raises(MoeInspectError, match=says) as raised:
        atlas([here / name for name in traces], here / output)
    assert "\n" not in str(raised.value)
    assert not (here / "new").exists()


def test_the_command_says_what_it_made(here: Path, cli_here: Cli, tmp_path: Path):
    said = cli_here("atlas", "b", "-o", "site", "--add").stderr
    assert said == "wrote site/index.html: 3 traces, 0 pages made, 3 kept\n"
    said = cli_here("atlas", "b", "-o", "s", "--text", "x", check=2).stderr
    assert "give a number of documents, or all" in said


# --- in a browser


def test_it_is_searched_by_expert_domain_and_token(here: Path, open_page: OpenPage):
    # beside the pages of its traces, which it leads to
    page = open_page((here / "site/index.html").read_text(), here / "site/index.html")
    view = page.view
    assert page.axe() == []
    assert any("expert in 3 traces" in line for line in page.ask("L1E3"))
    page.press("Enter")
    assert page.title() == "Layer 1 · expert 3"
    card = page.locator("#card").inner_text()
    assert "Frequent tokens that it takes most above its share: ␣w0" in card
    assert page.locator("#card h3 a").first.get_attribute("href") == "a.html#L1E3"
    page.press("Escape")
    assert any("token" in line for line in page.ask(" w0"))
    page.press("Enter")
    assert page.title() == "Token ␣w0"
    first = page.locator("#card tbody tr").first.inner_text()
    assert first.startswith("layer 1 · expert 3\t100%")
    page.press("Escape")
    view.get_by_role("button", name="code", exact=True).click()
    assert page.title() == "Domain code"
    assert "layer 1 · expert 0" in page.locator("#card").inner_text()
    page.press("Escape")
    # sorted rows keep their links
    view.get_by_role("button", name="tokens").click()
    first = page.locator("#traces tbody tr").first.locator("a")
    assert first.get_attribute("href") == f"{first.inner_text()}.html"
    for width in (390, 800, 1280, 1600):
        page.resize(width)
        hidden = "(place) => place.scrollWidth - place.clientWidth"
        cut = page.locator("#traces .scroll").evaluate(hidden)
        assert cut == 0 or width < 1280, "columns of the table are cut"
    assert page.foreign() == []
    view.goto(f"{page.address.rpartition('/')[0]}/a.html#L1E3")
    page.until("document.documentElement.dataset.ready === 'yes'")
    assert page.title() == "Layer 1 · expert 3"
    view.get_by_role("link", name="← Atlas").click()
    page.until("location.pathname.endsWith('index.html')")
    page.requests.clear()
