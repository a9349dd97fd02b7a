"""Counts under other names (`--map`), rows of assignments, and GPT-OSS fingerprints."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.run import import_trace
from moe_inspect.reporting.report import report as trace_report
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.conftest import Cli
from tests.foreign import write_fingerprint
from tests.test_hostile import JSON, fresh, quick

LOAD = {3: [5, 0, 2, 1], 7: [1, 1, 4, 2]}
NESTED = {f"layer_{n}": {str(e): {"n": c} for e, c in enumerate(of)} for n, of in LOAD.items()}
RECORDS = [
    {"block": n, "id": str(e), "hits": c, "text": "law"}
    for n, of in LOAD.items()
    for e, c in enumerate(of)
]


def mapped(value: Any, map: str, root: Path, name: str = "c.json") -> Trace:
    (root / name).write_text(json.dumps(value))
    return import_trace("counts", [root / name], root / "t", map=map, top_k=2)


def load_of(trace: Trace) -> dict[int, list[int]]:
    table = trace.counts()
    return {int(n): of["assignments"].tolist() for n, of in table.groupby("layer")}


@pytest.mark.parametrize(
    ("value", "map"),
    [
        (RECORDS, "layer=block,expert=id,count=hits"),
        ({"rows": RECORDS}, "layer=block, expert=id, count=rows.hits"),
        ({"analytics": NESTED, "n": 8}, "count=analytics.layer_{layer}.{expert}.n"),
        ([{"analytics": NESTED}], "count=analytics.layer_{layer}.{expert}.n"),
        ({str(n): of for n, of in LOAD.items()}, "count={layer}.{expert}"),
        (
            [
                {"n": n, "experts": [{"e": e, "c": c} for e, c in enumerate(of)]}
                for n, of in LOAD.items()
            ],
            "layer=n,expert=e,count=experts.c",
        ),
        ({"a.b": {"x": NESTED}}, "count=*.x.layer_{layer}.{expert}.n"),
    ],
)
def test_a_map_leads_to_the_counts(value: Any, map: str, tmp_path: Path):
    # a key with a dot in it is not split where * stands for it
    trace = mapped(value, map, tmp_path)
    assert load_of(trace) == LOAD
    assert verify(tmp_path / "t").ok


def test_a_map_gives_domains_and_names_of_columns(tmp_path: Path):
    of_domain = {"law": NESTED, "code": NESTED}
    trace = mapped(of_domain, "count={domain}.layer_{layer}.{expert}.n", tmp_path)
    assert set(trace.counts()["domain"]) == {"law", "code"}
    for name in ("c.csv", "c.parquet"):
        table = pd.DataFrame(RECORDS).astype({"id": int})
        if name == "c.csv":
            table.to_csv(tmp_path / name, index=False)
        else:
            table.to_parquet(tmp_path / name)
        trace = import_trace(
            "counts",
            [tmp_path / name],
            tmp_path / name[-3:],
            map="layer=block,expert=id,count=hits,domain=text",
            top_k=2,
        )
        assert load_of(trace) == LOAD
        assert set(trace.counts()["domain"]) == {"law"}


def test_a_column_that_is_not_everywhere_is_left_out_and_told(tmp_path: Path):
    (tmp_path / "a.csv").write_text("layer,expert,count,weight_sum\n0,0,2,1\n0,1,3,1.5\n")
    (tmp_path / "b.csv").write_text("layer,expert,count\n0,0,2\n0,1,3\n")
    sources, said = [tmp_path / "a.csv", tmp_path / "b.csv"], list[str]()
    trace = import_trace("counts", sources, tmp_path / "t", top_k=1, warn=said.append)
    assert not trace.has_weights
    assert said == [f"{sources[0]}: weight_sum left out: not all of the rows have it"]


@pytest.mark.parametrize(
    ("map", "said"),
    [
        ("layer=block,expert=id", "--map does not say where the count is"),
        ("count=hits,expert=id", "--map does not say where the layer is"),
        ("layer", "write it like layer=block,expert=id,count=hits"),
        ("slot=block,count=hits", "no column 'slot'"),
        (
            "count={slot}.{layer}.{expert}",
            "{slot} is none of {layer}, {router}",
        ),
        ("layer=block,expert=id,count=misses", "has nothing at misses"),
        ("layer=floor,expert=id,count=hits", "has no field floor beside a count"),
        ("layer=block,expert=text,count=hits", "expert is not of int64"),
        ("layer=block,expert=id,count=hits.n", "where n should be"),
        ("count={layer}_{layer}.{expert}", "{layer} stands twice in {layer}_{layer}"),
    ],
)
def test_a_map_that_leads_nowhere_is_one_line(map: str, said: str, tmp_path: Path):
    with pytest.raises(MoeInspectError) as raised:
        mapped(RECORDS, map, tmp_path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_map_is_of_counts_alone(cli_here: Cli, tmp_path: Path):
    (tmp_path / "c.json").write_text(json.dumps(RECORDS))
    options = ["c.json", "--top-k", "2", "--map", "layer=block,expert=id,count=hits", "-o"]
    cli_here("import", "counts", *options, "t")
    result = cli_here("import", "esft", *options, "u", check=1)
    assert "--map is an option of the format counts, not of esft" in result.stderr


MAPS = ["count={layer}.{expert}", "layer=a,expert=b,count=c", "count=*.{layer}.{expert}.n"]


@quick
@given(value=JSON, map=st.sampled_from(MAPS))
def test_any_json_under_a_map_is_a_trace_or_one_line(
    value: Any, map: str, tmp_path_factory: pytest.TempPathFactory
):
    root = fresh(tmp_path_factory.getbasetemp() / "mapped")
    try:
        mapped(value, map, root)
    except MoeInspectError as error:
        said = str(error)
    else:
        said = "" if verify(root / "t").ok else "not\nfine"
    assert "\n" not in said
    assert (root / "t").exists() == (not said)


def test_a_row_per_assignment_is_counted(tmp_path: Path):
    """The form of llama.cpp's moe-trace (pull request 28544)."""
    rng = np.random.default_rng(0)
    expert = rng.integers(0, 8, 4000)
    table = pd.DataFrame({"layer": np.arange(4000) % 2, "expert": expert})
    table.to_csv(tmp_path / "moe_trace.csv", index=False)
    said: list[str] = []
    trace = import_trace(
        "auto", [tmp_path / "moe_trace.csv"], tmp_path / "t", top_k=2, warn=said.append
    )
    assert load_of(trace) == {n: np.bincount(expert[n::2], minlength=8).tolist() for n in (0, 1)}
    assert said[0].startswith("recognised as counts")


def test_thinking_and_answering_are_domains_of_a_category(tmp_path: Path):
    load = {"think": [np.array([5, 3, 0, 8])] * 2, "answer": [np.array([1, 0, 2, 1])] * 2}
    whole, folder = {"think": 4.0, "answer": 1.0}, tmp_path / "law"
    write_fingerprint(folder / "False_True.json", 1, {"think": 8.0}, {"think": load["think"]})
    write_fingerprint(folder / "True_True.json", 2, whole | {"think": 2.5}, load)
    with pytest.raises(MoeInspectError, match=r"count_frequency is '1\.6', not of 0 to 1"):
        import_trace("gpt-oss-fingerprints", [folder], tmp_path / "t", experts=4)
    write_fingerprint(folder / "True_True.json", 2, whole, load)
    with pytest.raises(MoeInspectError, match="no layer lists every expert"):
        import_trace("gpt-oss-fingerprints", [folder], tmp_path / "t")
    trace = import_trace("gpt-oss-fingerprints", [folder], tmp_path / "t", experts=4)
    table = trace.counts().groupby(["domain", "expert"], observed=True)["assignments"].first()
    assert table["law/think"].tolist() == [10, 6, 0, 16]
    assert table["law/answer"].tolist() == [1, 0, 2, 1]
    assert {r.top_k for r in trace.routers} == {4}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ("5,2\n0,1,3,4", "row 1: first_choice is 4 of 3 assignments"),
        (f"{2**53},0", "row 0: count is 9007199254740992, not of 0 to 1,099,511,627,776"),
        (
            "\n0,0,".join([f"{2**40},0"] * 3),
            "the rows of expert 0 of layer 0 sum to a count of 3,298,534,883,328: at most 1,099,",
        ),
        (
            "\n".join(f"{'0,' * bool(e)}{f'{e},' if e else ''}{2**40},0" for e in range(3)),
            "over 1,099,511,627,776 tokens, more than a trace can number",
        ),
    ],
)
def test_counts_that_no_router_makes_are_refused(rows: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"layer,expert,count,first_choice\n0,0,{rows}\n")
    with pytest.raises(MoeInspectError, match=re.escape(why)):
        import_trace("counts", [tmp_path / "c.csv"], tmp_path / "t", top_k=1, experts=4)
    assert not (tmp_path / "t").exists()


def test_no_file_of_pythons_is_left_to_arrows_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads ahead through Python aborts the process where an error ends it."""
    path = tmp_path / os.fsdecode(b"caf\xe9.csv")  # a name that Arrow does not take as text
    path.write_text("layer,expert,count\n0,99999999999,1\n")
    read, files = pyarrow.csv.open_csv, list[Any]()
    monkeypatch.setattr(pyarrow.csv, "open_csv", lambda file: files.append(file) or read(file))
    with pytest.raises(MoeInspectError, match="expert is 99999999999, not of 0 to"):
        import_trace("counts", [path], tmp_path / "t", top_k=1)
    assert [type(file) for file in files] == [pa.OSFile]


@pytest.mark.parametrize(("counts", "tokens"), [([1], 1), ([100, *[2] * 7], 100), ([4] * 8, 16)])
def test_tokens_are_as_many_as_explain_the_counts(
    counts: list[int], tokens: int, tmp_path: Path
) -> None:
    """No token chooses an expert twice. Of so few, all is too little to judge."""
    rows = [{"layer": 0, "expert": e, "count": n} for e, n in enumerate(counts)]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    trace = import_trace("counts", [tmp_path / "c.json"], tmp_path / "t", top_k=2, experts=8)
    assert trace.n_tokens == tokens
    said = str(trace_report(trace))
    assert "nan" not in said
    assert "Too little data" in said
