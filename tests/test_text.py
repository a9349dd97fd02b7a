"""The text of a trace: documents, and the tokens of an expert in their context."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_inspect
from moe_inspect.cli.text import _fitted
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.routed_text import routed_text
from moe_inspect.text import readable
from moe_inspect.trace.texts import CHARACTER, as_text
from tests.conftest import ROOT, Cli
from tests.support.synthetic import uniform_ids, write_trace
from tests.test_page_text import CUT, JOINED, scripts

SAMPLE = ROOT / "sample_traces" / "collapsed"


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


def test_a_document_has_all_its_routes() -> None:
    trace = moe_inspect.open_trace(SAMPLE)
    found = trace.document(3)
    tokens = trace.tokens().query("document == 3")
    assert len(found) == len(tokens) * len(trace.routers)
    for router in range(len(trace.routers)):
        rows = found[found["router"] == router]
        assert rows["position"].is_monotonic_increasing
        assert "".join(rows["text"]) == trace.text(3)
        expected = trace.routing(router=router).set_index("token").loc[rows["token"]]
        assert (expected["expert_0"].to_numpy() == rows["expert_0"].to_numpy()).all()
        assert (expected["weight_1"].to_numpy() == rows["weight_1"].to_numpy()).all()


def test_an_experts_tokens_in_context() -> None:
    trace = moe_inspect.open_trace(SAMPLE)
    found = trace.tokens_of(2, 5, context=4)
    routing = trace.routing(layer=2)
    mine = routing[["expert_0", "expert_1"]] == 5
    assert len(found) == mine.to_numpy().sum()
    assert set(found["token"]) == set(routing["token"][mine.any(axis=1)])
    assert found["weight"].is_monotonic_decreasing
    texts = {n: trace.text(n) for n in found["document"].unique()}
    for row in found.sample(200, random_state=0).itertuples():
        assert row.left + row.text + row.right in texts[row.document]
        chosen = routing.loc[routing["token"] == row.token].iloc[0]
        assert chosen[f"expert_{row.slot}"] == 5
        assert chosen[f"weight_{row.slot}"] == row.weight
    assert trace.tokens_of(2, 5, top=7)["token"].tolist() == found["token"].iloc[:7].tolist()
    drawn = [trace.tokens_of(2, 5, top=30, sort="random", seed=n)["token"] for n in (0, 0, 1)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    assert set(drawn[2]) <= set(found["token"])


def test_the_first_of_many_shards_are_the_first_of_all(tmp_path: Path) -> None:
    T, rng = 900, np.random.default_rng(0)
    weight = np.float32(rng.integers(1, 5, (T, 2))) / 8  # with many ties
    written: dict[str, Any] = {"document": np.arange(T) // 100, "words": 5, "batch_tokens": 300}
    written |= {"weights": [-np.sort(-weight, axis=1)], "shard_tokens": 300}
    ids, token_id = [uniform_ids(rng, T, 4, 2)], rng.integers(0, 5, T)
    trace = write_trace(tmp_path / "t", ids, 4, token_id=token_id, **written)
    assert sum(1 for _ in trace.shards) == 3
    found = trace.tokens_of(0, 2)
    assert len(found) == (trace.routing(0)[["expert_0", "expert_1"]] == 2).to_numpy().sum()
    pd.testing.assert_frame_equal(trace.tokens_of(0, 2, top=40), found[:40])
    drawn = trace.tokens_of(0, 2, top=40, sort="random")
    assert drawn["document"].nunique() == 9
    mixed = trace.tokens_of(0, 2, sort="random")
    assert drawn["token"].tolist() == mixed["token"].tolist()[:40]
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
    asked = ["--layer", "0", "--expert", "2", "--context", "20"]
    shown = cli_here("text", trace.path, *asked).stdout
    assert "[क्षि] ␣👩\u200d💻👍🏽🇩🇪" in re.sub(" +", " ", shown)
    document = cli_here("text", str(trace.path), "--document", "0").stdout
    assert "क्षि[1][2]" in document
    assert "👩\u200d💻" in document
    lines = [_fitted(whole * 3, room, end) for room in (2, 5, 9) for end in (False, True)]
    assert all(set(CHARACTER.findall(line)) <= {*JOINED} for line in lines)


def test_joiners_are_kept_where_they_join() -> None:
    assert readable("می\u200cخواهم") == "می\u200cخواهم"
    assert readable("👩\u200d💻") == "👩\u200d💻"
    assert readable("a\u200db \u200d") == r"a\u200db \u200d"
    assert readable("\u200d") == r"\u200d"


def test_requests_count_what_was_generated(tmp_path: Path) -> None:
    trace = moe_inspect.trace_model("demo", tmp_path / "t", max_tokens=300, generate=3)
    found, tokens = trace.requests(), trace.tokens()
    for row in found.itertuples():
        mine = tokens[tokens["document"] == row.document]["phase"]
        assert row.prompt_tokens == (mine == "prefill").sum()
        assert row.generated_tokens == (mine == "decode").sum()
    assert found["generated_tokens"].sum() > 0


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

    concordance = printed("--layer 2 --expert 5 --top 3")
    assert concordance.startswith("layer 2, expert 5: 3 of 1,738 tokens\n")
    assert len(concordance.splitlines()) == 4
    rows = printed("--layer 2 --expert 5 --top 3 --format json").splitlines()
    assert [json.loads(line)["weight"] for line in rows]
    assert len(printed("--layer 2 --expert 5 --top 0 --format json").splitlines()) == 1738
    document = printed("--document 5 --layer 2")
    assert document.startswith("layer 2, 8 experts\nfirst expert: ")
    printed(f"--document 5 -o {tmp_path / 'routes.csv'}")
    assert set(pd.read_csv(tmp_path / "routes.csv")["layer"]) == {0, 1, 2, 3}


REFUSED = {
    "": "give --document N, or --layer L with --expert E",
    "--expert 3": "--expert needs --layer",
    "--document 999": "no document 999",
    "--layer 2 --expert 8": "no expert 8 in layer 2",
    "--layer 9 --expert 1": "no layer 9",
}


@pytest.mark.parametrize(("options", "error"), REFUSED.items())
def test_the_command_says_what_there_is_not(cli_here: Cli, options: str, error: str) -> None:
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
    assert moe_inspect.verify(trace.path).ok
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
    from tests.support.own import gpt, tokens

    model = gpt()
    with moe_inspect.record(model, tmp_path / "plain", overwrite=True):
        model(tokens())
    with moe_inspect.record(model, tmp_path / "counts", counts_only=True):
        model(tokens())
    plain = moe_inspect.open_trace(tmp_path / "plain")
    with pytest.raises(MoeInspectError, match="without a vocabulary"):
        plain.text(0)
    assert (plain.document(0)["text"] == "").all()
    with pytest.raises(MoeInspectError, match="holds counts only"):
        moe_inspect.open_trace(tmp_path / "counts").tokens_of(0, 0)
    with pytest.raises(MoeInspectError, match="holds counts only"):
        moe_inspect.open_trace(tmp_path / "counts").requests()
