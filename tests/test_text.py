"""The text of a trace: documents, and the tokens of an expert in their context; on the page, in a
browser: what is drawn is what the trace holds, in every script, and nothing of it runs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.cli.text import _fitted
from moe_inspect.errors import MoeInspectError
from moe_inspect.public import report
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.routed_text import routed_text
from moe_inspect.reporting.render.texts import choose, find_documents, text_section
from moe_inspect.reporting.report import Report
from moe_inspect.trace.texts import CHARACTER, as_text
from tests.conftest import ROOT, Cli, OpenPage
from tests.support.browser import HOSTILE
from tests.support.generated import Kind, decisions, written
from tests.support.synthetic import uniform_ids, write_counts, write_trace

SAMPLE = ROOT / "sample_traces" / "collapsed"
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


def test_tokens_become_text() -> None:
    found = as_text(["▁caf", "<0xC3>", "<0xA9>", "▁", None, "au"])
    assert found == [" caf", "é", "", " ", "", "au"]
    assert as_text(["a<0xE2><0x82>", "<0xAC>b"]) == ["a€", "b"]
    assert as_text(["<0xFF>", "x", "<0xC3>"]) == ["�", "x", "�"]
    assert as_text([]) == []
    assert as_text(CUT) == JOINED
    assert as_text(["e", "\u0301x", "\u0301"]) == ["e\u0301", "x\u0301", ""]


def test_a_document_is_the_text_that_was_fed() -> None:
    trace = moe_inspect.open_trace(SAMPLE)
    documents = trace.documents()
    for row in documents.iloc[:: len(documents) // 6].itertuples():
        source = (ROOT / "moe_inspect" / "demo" / "corpus").rglob(Path(row.source).name)
        texts = [file.read_text() for file in source]
        found = trace.text(row.document).removeprefix("<s>").removesuffix("</s>")
        assert any(text.startswith(found) or found == text for text in texts), row.source
        assert len(found) > 20


def test_documents_and_experts_have_all_their_routes() -> None:
    trace, rows = moe_inspect.open_trace(SAMPLE), decisions(SAMPLE)
    found = trace.document(3)
    mine = rows[rows["document"] == 3].set_index(["router", "token", "slot"])
    assert len(found) * 2 == len(mine)
    for router, of in found.groupby("router"):
        assert of["position"].is_monotonic_increasing
        assert "".join(of["text"]) == trace.text(3)
        for slot in (0, 1):
            expected = mine.loc[router].xs(slot, level="slot").loc[of["token"]]
            assert expected["expert"].tolist() == of[f"expert_{slot}"].tolist()
            assert expected["weight"].to_numpy() == pytest.approx(of[f"weight_{slot}"])
    listed = trace.tokens_of(2, 5, context=4)
    expected = rows[(rows["layer"] == 2) & (rows["expert"] == 5)].set_index("token")
    assert sorted(listed["token"]) == sorted(expected.index)
    assert listed["weight"].is_monotonic_decreasing
    assert listed["weight"].to_numpy() == pytest.approx(expected["weight"].loc[listed["token"]])
    assert listed["slot"].tolist() == expected["slot"].loc[listed["token"]].tolist()
    for number, of in listed.groupby("document"):
        text = trace.document(int(number)).query("router == 0")["text"].tolist()
        for row in of.itertuples():
            at = row.position
            first = max(n for n in range(at + 1) if text[n])  # of a character of several tokens
            around = text[max(0, at - 4) : first], text[first], text[at + 1 : at + 5]
            assert [row.left, row.text, row.right] == ["".join(part) for part in around]
    assert taken(trace.tokens_of(2, 5, top=7)) == shared_by_domains(listed, 7)
    assert set(trace.tokens_of(2, 5, top=12)["domain"].value_counts()) == {2}  # of six domains


def taken(rows: pd.DataFrame) -> list[int]:
    return rows["token"].tolist()


def shared_by_domains(rows: pd.DataFrame, top: int) -> list[int]:
    """The tokens of `top` rows, in the order of the rows: the domains take turns."""
    waiting = {domain: list(of.index) for domain, of in rows.groupby("domain", sort=False)}
    chosen = list[int]()
    while len(chosen) < min(top, len(rows)):
        turn = sorted(index.pop(0) for index in waiting.values() if index)
        chosen += turn[: top - len(chosen)]
    return taken(rows.loc[sorted(chosen)])


def test_the_first_of_many_shards_are_the_first_of_all(tmp_path: Path) -> None:
    T, rng = 900, np.random.default_rng(0)
    weight = np.float32(rng.integers(1, 5, (T, 2))) / 8  # with many ties
    written: dict[str, Any] = {"document": np.arange(T) // 100, "words": 5, "batch_tokens": 300}
    written["domain_of_document"] = ("a", "b", "b")
    written |= {"weights": [-np.sort(-weight, axis=1)], "shard_tokens": 300}
    ids, token_id = [uniform_ids(rng, T, 4, 2)], rng.integers(0, 5, T)
    trace = write_trace(tmp_path / "t", ids, 4, token_id=token_id, **written)
    assert sum(1 for _ in trace.shards) == 3
    found = trace.tokens_of(0, 2)
    assert len(found) == (trace.routing(0)[["expert_0", "expert_1"]] == 2).to_numpy().sum()
    top = trace.tokens_of(0, 2, top=40)
    assert taken(top) == shared_by_domains(found, 40)
    rows = found[found["token"].isin(top["token"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(top, rows)
    del written["weights"]  # then the order is random, and the same at every call
    bare = write_trace(tmp_path / "b", ids, 4, token_id=token_id, **written)
    drawn, mixed = bare.tokens_of(0, 2, top=40), bare.tokens_of(0, 2)
    assert drawn["document"].nunique() == 9
    assert taken(drawn) == shared_by_domains(mixed, 40)
    nothing = [np.zeros((0, 2), np.uint16)]
    empty = write_trace(tmp_path / "e", nothing, 4, document=np.zeros(1), words=5)
    for ask in (lambda: empty.tokens_of(0, 2), lambda: empty.document(0)):
        with pytest.raises(MoeInspectError, match="nothing is committed"):
            ask()


def test_characters_cut_by_tokens_are_whole_in_the_concordance(
    tmp_path: Path, cli_here: Cli
) -> None:
    trace = scripts(tmp_path / "t", CUT).trace
    whole = "".join(JOINED)
    for expert in range(8):
        for row in trace.tokens_of(0, expert, context=20).itertuples():
            at = row.position % len(JOINED)
            first = max(n for n in range(at + 1) if JOINED[n])
            assert (row.left, row.text) == ("".join(JOINED[:first]), JOINED[first])
            assert row.left + row.text + row.right == whole
    asked = ["--layers", "0", "--experts", "2", "--context", "20"]
    shown = cli_here("text", trace.path, *asked).stdout
    assert "[क्षि] ␣👩\u200d💻👍🏽🇩🇪" in re.sub(" +", " ", shown)
    document = cli_here("text", str(trace.path), "--documents", "0").stdout
    assert "क्षि[1][2]" in document
    assert "👩\u200d💻" in document
    lines = [_fitted(whole * 3, room, end) for room in (2, 5, 9) for end in (False, True)]
    assert all(set(CHARACTER.findall(line)) <= {*JOINED} for line in lines)


def test_requests_count_what_was_generated() -> None:
    root = written(Kind(answers=0.3))
    tokens = decisions(root).drop_duplicates("token").groupby(["document", "phase"]).size()
    expected = tokens.unstack(fill_value=0)
    found = moe_inspect.open_trace(root).requests().set_index("document")
    assert found["prompt_tokens"].to_dict() == expected["prefill"].to_dict()
    assert found["generated_tokens"].to_dict() == expected["decode"].to_dict()
    assert expected["decode"].sum() > 20


def test_colours_or_brackets_show_the_expert() -> None:
    rows = pd.DataFrame(
        {"text": ["a", "b", " c", "\x1b[0m", "d"], "expert_0": [3, 3, 1, 1, np.nan]}
    )
    assert routed_text(rows, colours=False).plain == "[3]ab[1] c\\x1b[0m[–]d"
    coloured = routed_text(rows, colours=True)
    assert coloured.plain == "ab c\\x1b[0md"
    styles = [str(span.style) for span in coloured.spans]
    assert styles[0] == styles[1] != styles[2] == styles[3]


def test_the_command(tmp_path: Path, cli_here: Cli) -> None:
    def printed(options: str) -> str:
        return cli_here("text", SAMPLE, *options.split()).stdout

    concordance = printed("--layers 2 --experts 5 --top 3")
    assert concordance.startswith("layer 2, expert 5: 3 of 1,738 tokens\n")
    assert len(concordance.splitlines()) == 4
    rows = printed("--layers 2 --experts 5 --top 3 --format json").splitlines()
    assert [json.loads(line)["weight"] for line in rows]
    assert len(printed("--layers 2 --experts 5 --top 0 --format json").splitlines()) == 1738
    document = printed("--documents 5 --layers 2")
    assert document.startswith("document 5, layer 2, 8 experts\nfirst expert: ")
    printed(f"--documents 5 -o {tmp_path / 'routes.csv'}")
    assert set(pd.read_csv(tmp_path / "routes.csv")["layer"]) == {0, 1, 2, 3}


REFUSED = {
    "": "give either --documents N or --experts E, not both",
    "--documents 999": "no document 999",
    "--layers 2 --experts 8": "no expert 8 in layer 2",
    "--layers 9 --experts 1": "no layer 9",
}


NOT_WHOLE: list[tuple[str, dict[str, Any], str]] = [
    ("tokens_of", {"layers": 0, "experts": "a"}, "cannot read experts 'a': write them like 0-3,7"),
    ("tokens_of", {"layers": 0, "experts": -1}, "cannot read experts '-1': write them like 0-3,7"),
    ("routing", {"layers": True}, "cannot read layers 'True': write them like 0-3,7"),
    ("routing", {"layers": 1.5}, "cannot read layers '1.5': write them like 0-3,7"),
    ("routing", {"router": 1.5}, "router is 1.5: give a whole number, 0 or more"),
]


def test_numbers_of_layers_routers_and_experts_are_whole() -> None:
    trace = moe_inspect.open_trace(SAMPLE)
    for method, asked, error in NOT_WHOLE:
        with pytest.raises(MoeInspectError, match=f"^{error}$"):
            getattr(trace, method)(**asked)
    several: list[Any] = [np.int64(1), "1", [1], np.array([1])]
    assert {len(trace.routing(layers=layers)) for layers in several} == {trace.n_tokens}


def test_several_experts_and_layers(cli_here: Cli) -> None:
    trace = moe_inspect.open_trace(SAMPLE)
    several = trace.tokens_of("1-2", [5, 7], top=3)
    single = [trace.tokens_of(layer, expert, top=3) for layer in (1, 2) for expert in (5, 7)]
    pd.testing.assert_frame_equal(several, pd.concat(single, ignore_index=True))
    keys = several[["layer", "expert"]].drop_duplicates().to_numpy().tolist()
    assert keys == [[1, 5], [1, 7], [2, 5], [2, 7]]
    assert several.attrs["tokens"][1, 7] == len(trace.tokens_of(1, 7))
    shown = cli_here("text", SAMPLE, *["--layers", "1,2", "--experts", "5,7", "--top", "3"]).stdout
    assert [line for line in shown.splitlines() if line.startswith("layer")] == [
        f"layer {a}, expert {b}: 3 of {len(trace.tokens_of(a, b)):,} tokens" for a, b in keys
    ]
    two = cli_here("text", SAMPLE, "--documents", "3,5", "--layers", "1-2").stdout
    assert two.count(", layer 1, 8 experts") == two.count(", layer 2, 8 experts") == 2
    rows = cli_here("text", SAMPLE, "--documents", "3,5", "--format", "csv").stdout
    assert pd.read_csv(io.StringIO(rows))["document"].unique().tolist() == [3, 5]


def test_the_command_says_what_there_is_not(cli_here: Cli) -> None:
    for options, error in REFUSED.items():
        found = cli_here("text", SAMPLE, *options.split(), check=None)
        assert error in found.stderr
        assert found.returncode != 0


def test_a_trace_may_say_nothing_of_its_text(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("The lighthouse keeper counts xylophones. " * 9)
    options = {"data": [str(secret)], "generate": 2}
    with_text, trace = (
        moe_inspect.trace_model("demo", tmp_path / f"{text}", text=text, **options)
        for text in (True, False)
    )
    assert moe_inspect.check(trace.path, quick=True).ok
    assert (trace.tokens()["token_id"] == -1).all()
    assert not len(trace.vocabulary())
    assert trace.routing().equals(with_text.routing())  # nothing else is missing
    written = b"".join(f.read_bytes() for f in trace.path.rglob("*") if f.is_file())
    assert b"xylophone" not in written
    assert b"lighthouse" not in written
    assert trace.without_text
    assert not with_text.without_text
    assert moe_inspect.report(trace).verdict()
    with pytest.raises(MoeInspectError, match="text"):  # another plan
        moe_inspect.trace_model("demo", trace.path, resume=True, **options)


def test_a_trace_of_counts_or_without_vocabulary_has_no_text(tmp_path: Path) -> None:
    plain = write_trace(tmp_path / "plain", [np.zeros((9, 2), np.uint16)], 4)
    with pytest.raises(MoeInspectError, match="without a vocabulary"):
        plain.text(0)
    assert (plain.document(0)["text"] == "").all()
    counts = write_counts(tmp_path / "counts", [np.full((1, 8), 200)], 2)
    for ask in (lambda: counts.tokens_of(0, 0), counts.requests):
        with pytest.raises(MoeInspectError, match="holds counts only"):
            ask()


def test_a_token_is_pinned_and_the_keyboard_reads_the_text(open_page: OpenPage) -> None:
    made = report(SAMPLE)
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
    documents = find_documents(report(trace), list(trace.shards))
    two = choose(documents, tokens=200, longest=100)
    assert sorted(two["domain"]) == ["a", "b"]
    assert 4 in two["document"].tolist()
    everything: Any = text_section(report(trace))
    assert len(everything.data["documents"]) == 20
    assert "Shown in full: 20 documents." in everything.text
    only: Any = text_section(report(trace, domains="b"))
    assert {d["number"] for d in only.data["documents"]} == set(range(1, 20, 2))


def test_a_page_without_text_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 300, 8, 2)]
    silent = write_trace(tmp_path / "a", ids, 8, manifest={"capture": {"text": False}})
    said = "This trace was recorded without its text"
    page, short = report_page(report(silent)), report_page(report(silent), text=False)
    assert page.count(said) == 1
    assert said not in short
    told = "91% of the tokens were recovered from expert selections (arXiv:2602.04105)"
    assert page.count(told) == 2, "in the place of the text, and under the facts"
    assert told in short
    counts = write_counts(tmp_path / "b", [rng.integers(1, 50, (2, 8))], 2, domains=("a", "b"))
    assert text_section(report(counts)) == "text: counts alone hold no tokens"
    words = write_trace(tmp_path / "c", ids, 8, words=5)
    assert told not in report_page(report(words))


def test_two_traces_are_compared_in_the_text(open_page: OpenPage, tmp_path: Path) -> None:
    T, rng = 600, np.random.default_rng(0)
    a = uniform_ids(rng, T, 8, 2)
    b = a.copy()
    b[100:120] = (b[100:120] + 1) % 8  # of document 1
    weights = [-np.sort(-rng.random((T, 2)).astype(np.float16)) for _ in range(2)]
    given: Any = {"document": np.arange(T) // 100, "token_id": np.arange(T) % 50, "words": 50}
    traces = [
        write_trace(tmp_path / f"{n}", [a, ids], 8, weights=[weights[n]] * 2, **given)
        for n, ids in enumerate((a, b))
    ]
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
        chips = at_1.nth(n).locator(".chip").all_text_contents()
        shown_2K = np.array([chip.split() for chip in chips], float).T
        assert shown_2K[0].tolist() == ids[100].tolist()
        assert shown_2K[1] == pytest.approx(weights[n][100].astype(float), abs=0.02)
