"""Tables: counts and decisions under other names (`--map`), in every form, and presets."""

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

from moe_inspect.checking.check import check
from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import CODECS
from moe_inspect.importers.tables import decisions as placing
from moe_inspect.importers.tables import read
from moe_inspect.making import import_trace
from moe_inspect.public import Trace
from moe_inspect.public import report as trace_report
from moe_inspect.trace.verify import verify
from tests.support.foreign import MAKERS, write_fingerprint, write_route_trace
from tests.support.importing import decisions, refused, taken
from tests.test_hostile import JSON, fresh, quick

LOAD = {3: [5, 0, 2, 1], 7: [1, 1, 4, 2]}
NESTED = {f"layer_{n}": {str(e): {"n": c} for e, c in enumerate(of)} for n, of in LOAD.items()}
RECORDS = [
    {"block": n, "id": str(e), "hits": c, "text": "law", "unsaid": None}
    for n, of in LOAD.items()
    for e, c in enumerate(of)
]


def mapped(value: Any, map: str, root: Path) -> Trace:
    (root / "c.json").write_text(json.dumps(value))
    return taken(root, "counts", root / "c.json", map=map, top_k=2)[0]


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
                {"n": n, "of": [{"e": e, "c": c} for e, c in enumerate(of)]}
                for n, of in LOAD.items()
            ],
            "layer=n,expert=e,count=of.c",
        ),
        # a key with a dot in it is not split where * stands for it
        ({"a.b": {"x": NESTED}}, "count=*.x.layer_{layer}.{expert}.n"),
    ],
)
def test_a_map_leads_to_the_counts(value: Any, map: str, tmp_path: Path):
    assert load_of(mapped(value, map, tmp_path)) == LOAD
    assert verify(tmp_path / "t").ok


def test_a_map_gives_domains_and_names_of_columns(tmp_path: Path):
    of_domain = {"law": NESTED, "code": NESTED}
    trace = mapped(of_domain, "count={domain}.layer_{layer}.{expert}.n", tmp_path)
    assert set(trace.counts()["domain"]) == {"law", "code"}
    table = pd.DataFrame(RECORDS).astype({"id": int})
    table.to_csv(tmp_path / "c.csv", index=False)
    table.to_parquet(tmp_path / "c.parquet")
    how = {"map": "layer=block,expert=id,count=hits,domain=text", "top_k": 2}
    for name in ("c.csv", "c.parquet"):
        trace, _ = taken(tmp_path / name[-3:], "counts", tmp_path / name, **how)
        assert load_of(trace) == LOAD
        assert set(trace.counts()["domain"]) == {"law"}


def test_a_column_that_is_not_everywhere_is_left_out_and_told(tmp_path: Path):
    (tmp_path / "a.csv").write_text("layer,expert,count,weight_sum\n0,0,2,1\n0,1,3,1.5\n")
    (tmp_path / "b.csv").write_text("layer,expert,count\n0,0,2\n0,1,3\n")
    trace, said = taken(tmp_path, "counts", tmp_path / "a.csv", tmp_path / "b.csv", top_k=1)
    assert not trace.has_weights
    assert said == [f"{tmp_path / 'a.csv'}: weight_sum left out: not all of the rows have it"]


def test_rows_that_do_not_fit_are_not_lost_behind_others(tmp_path: Path):
    rows = ['{"layer": 0, "expert": 0, "count": 1}'] * read.ROWS + ['{"foo": 1}'] * 2
    (tmp_path / "c.jsonl").write_text("\n".join(rows))
    refused(tmp_path, "no decisions or counts: it has foo", "counts", tmp_path, top_k=1)


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


def test_thinking_and_answering_are_domains_of_a_category(tmp_path: Path):
    load = {"think": [np.array([5, 3, 0, 8])] * 2, "answer": [np.array([1, 0, 2, 1])] * 2}
    whole, folder = {"think": 4.0, "answer": 1.0}, tmp_path / "law"
    write_fingerprint(folder / "False_True.json", 1, {"think": 8.0}, {"think": load["think"]})
    write_fingerprint(folder / "True_True.json", 2, whole | {"think": 2.5}, load)
    form = "gpt-oss-fingerprints"
    refused(tmp_path, r"count_frequency is 1\.6, not of 0 to 1", form, folder, experts=4)
    write_fingerprint(folder / "True_True.json", 2, whole, load)
    refused(tmp_path, "no layer lists every expert", form, folder)
    trace, _ = taken(tmp_path, form, folder, experts=4)
    table = trace.counts().groupby(["domain", "expert"], observed=True)["assignments"].first()
    assert table["law/think"].tolist() == [10, 6, 0, 16]
    assert table["law/answer"].tolist() == [1, 0, 2, 1]
    assert {r.top_k for r in trace.routers} == {4}


def test_no_file_of_pythons_is_left_to_arrows_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads ahead through Python aborts the process where an error ends it."""
    path = tmp_path / os.fsdecode(b"caf\xe9.csv")  # a name that Arrow does not take as text
    path.write_text("layer,expert,count\n0,99999999999,1\n")
    read, files = pyarrow.csv.open_csv, list[Any]()
    monkeypatch.setattr(
        pyarrow.csv, "open_csv", lambda file, *how: files.append(file) or read(file, *how)
    )
    refused(tmp_path, "expert is 99999999999, not of 0 to", "counts", path, top_k=1)
    assert {type(file) for file in files} == {pa.OSFile}


COUNTED = [([1], 1), ([2, 1, 1, 1], 3), ([100, *[2] * 7], 100), ([4] * 8, 16)]


@pytest.mark.parametrize(("counts", "tokens"), COUNTED)
def test_tokens_are_as_many_as_explain_the_counts(
    counts: list[int], tokens: int, tmp_path: Path
) -> None:
    """Of the fullest router: no token chooses an expert twice. They are too few to judge."""
    table = {"layer": [0] * len(counts), "expert": [*range(len(counts))], "count": [*counts]}
    for column, value in (("layer", 1), ("expert", 0), ("count", 1)):
        table[column].append(value)
    (tmp_path / "c.json").write_text(json.dumps(table))
    trace, _ = taken(tmp_path, "counts", tmp_path / "c.json", top_k=2, experts=8)
    assert trace.n_tokens == tokens
    said = str(trace_report(trace))
    assert "nan" not in said
    assert "Too little data" in said


Row = list[int | float]


def row(step: int, layer: int, slot: int, expert: int, phase: int = 0, **more: float) -> Row:
    return [
        *(int(more.get("turn", 0)), phase, step, layer, slot, expert),
        *(more.get("weight", 0.5), 0, 0, int(more.get("dropped", 0))),
    ]


def imported(rows: list[Row], root: Path, dropped: bool = True) -> Trace:
    write_route_trace(root / "route.csv", rows, dropped)
    trace = import_trace("bigmoeonedge", [root / "route.csv"], root / "t")
    assert verify(root / "t").ok
    return trace


def experts(trace: Trace, router: int) -> list[list[int]]:
    """−1 where there is none."""
    return np.nan_to_num(decisions(trace, router).astype(float), nan=-1).astype(int).tolist()


def test_what_a_turn_lacks_is_nowhere_and_noted(tmp_path: Path):
    """Of a prompt the last token alone reaches the last layer; a decoded one's experts dropped."""
    rows = [row(t, 1, j, 2 * t + j, weight=0.6 - 0.2 * j) for t in range(2) for j in range(2)]
    rows += [row(1, 2, j, 4 + j, weight=0.6 - 0.2 * j) for j in range(2)]
    late = [(n, j) for n in (1, 2) for j in range(2)]
    rows += [row(2, n, j, 6 + j, 1, weight=0.6 - 0.2 * j, dropped=n == 2) for n, j in late]
    trace = imported(rows, tmp_path)
    assert experts(trace, 0) == [[0, 1], [2, 3], [6, 7]]
    assert experts(trace, 1) == [[-1, -1], [4, 5], [-1, -1]]
    tokens = trace.tokens()
    assert tokens["phase"].tolist() == ["prefill", "prefill", "decode"]
    assert tokens["position"].tolist() == [0, 1, 2]
    assert tokens["sequence"].nunique() == 1
    assert trace.manifest["corpus"]["notes"] == [
        "route.csv: 2 choices dropped",
        "route.csv: 1 decision without rows: of a prompt some engines route the last token alone "
        "in the last layer",
    ]


def test_turns_are_documents_and_gaps_begin_sequences(tmp_path: Path):
    steps = [(0, 0), (0, 1), (0, 5), (1, 7), (1, 8)]
    rows = [row(step, 1, j, j, turn=turn) for turn, step in steps for j in range(2)]
    tokens = imported(rows, tmp_path, dropped=False).tokens()
    assert tokens["document"].tolist() == [0, 0, 0, 1, 1]
    assert tokens["sequence"].tolist() == [0, 0, 1, 2, 2]
    assert tokens["position"].tolist() == [0, 1, 5, 7, 8]


def test_unknown_weights_are_no_weights(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"route.csv row 1: weight is unknown; 1 of 2 rows lack"):
        trace = imported([row(0, 1, j, j, weight=(0.5, np.nan)[j]) for j in range(2)], tmp_path)
    assert not trace.has_weights
    assert trace.routers[0].slot_order == "unknown"


def test_scores_are_no_weights_and_a_label_is_the_domain(tmp_path: Path):
    source = MAKERS["moe-policylang"](tmp_path).source
    trace, _ = taken(tmp_path, "moe-policylang", f"mine={source}")
    assert set(trace.tokens()["domain"]) == {"mine"}
    assert not trace.has_weights
    assert {r.slot_order for r in trace.routers} == {"weight"}


DECISIONS = [
    {"block": layer, "at": t, "ids": [t, (t + layer) % 8], "w": [0.5, 0.25], "who": f"doc {t // 3}"}
    for layer in (1, 4)
    for t in range(6)
]


@pytest.mark.parametrize("form", ["csv", "tsv.gz", "json", "jsonl.zst", "parquet", "parquet.zst"])
def test_decisions_are_read_in_every_form(form: str, tmp_path: Path):
    path, table = tmp_path / f"d.{form}", pd.DataFrame(DECISIONS)
    plain = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if plain.suffix == ".parquet":
        table.to_parquet(plain)
    elif plain.suffix in (".json", ".jsonl"):
        plain.write_text(table.to_json(orient="records", lines=plain.suffix == ".jsonl"))
    else:
        table.to_csv(plain, index=False, sep="\t" if plain.suffix == ".tsv" else ",")
    if plain != path:
        with pa.CompressedOutputStream(str(path), CODECS[path.suffix]) as to:
            to.write(plain.read_bytes())
    columns = "layer=block,position=at,experts=ids,weights=w,document=who,domain='law'"
    trace, _ = taken(tmp_path, "table", path, map=columns, experts=8)
    assert verify(tmp_path / "t").ok
    assert [r.layer for r in trace.routers] == [1, 4]
    assert trace.routing(layers=4)["expert_1"].tolist() == [(t + 4) % 8 for t in range(6)]
    assert trace.routing(layers=1)["weight_1"].tolist() == [0.25] * 6
    assert trace.tokens()["document"].tolist() == [0, 0, 0, 1, 1, 1]
    assert set(trace.tokens()["domain"]) == {"law"}


def test_experts_in_columns_and_a_trace_of_ours_read_as_a_table(tmp_path: Path):
    rows = "".join(
        f"{n},{t},{t},{f'{(t + n) % 8},.5,.25' if t else '-1,.5,'}\n"
        for n in (1, 4)
        for t in range(6)
    )
    path = tmp_path / "e.csv"
    path.write_text("layer,position,expert_0,expert_1,weight_0,weight_1\n" + rows)
    trace, said = taken(tmp_path, "auto", path, experts=8)
    assert said[0].startswith("recognised as table")
    assert [second for _, second in experts(trace, 1)] == [-1, *((t + 4) % 8 for t in range(1, 6))]
    assert trace.has_weights


def test_rows_without_a_slot_take_those_of_their_decision_in_order(tmp_path: Path):
    """Also where the second slot is in another piece of the rows: here of the last tokens."""
    T = placing.PIECE // 4 + 10
    layer, at = (axis.ravel() for axis in np.meshgrid([0, 1], np.arange(T)[::-1]))
    slots = [
        {"layer": layer, "at": at, "place": j, "id": (at + 3 * j + layer) % 8, "w": 0.5 - j / 4}
        for j in range(2)
    ]
    pd.concat([*map(pd.DataFrame, slots)]).to_csv(tmp_path / "d.csv", index=False)
    for slot in ("", ",slot=place"):
        columns = "layer=layer,position=at,expert=id,weight=w" + slot
        how = {"experts": 8, "top_k": 2, "map": columns}
        trace, _ = taken(tmp_path / f"of{slot}", "table", tmp_path / "d.csv", **how)
        for n in range(2):
            expected = (np.arange(T)[:, None] + [0, 3] + n) % 8
            assert np.array_equal(decisions(trace, n), expected)
        assert (trace.routing()[["weight_0", "weight_1"]] == [0.5, 0.25]).all(axis=None)


def test_slots_without_a_row_are_empty_and_told_and_ids_keep_their_text(tmp_path: Path):
    lines = ["layer,position,expert,token_id,token_text", "0,0,3,1,the", "0,0,5,1,the", "0,1,2,0,a"]
    (tmp_path / "e.csv").write_text("\n".join(lines))
    trace, said = taken(tmp_path, "table", tmp_path / "e.csv", experts=8, top_k=2)
    assert said == [f"{tmp_path / 'e.csv'}: 1 slot of 4 without a row: imported as empty"]
    assert experts(trace, 0) == [[3, 5], [2, -1]]
    assert trace.tokens()["token_id"].tolist() == [1, 0]
    assert trace.vocabulary()["token"].tolist() == ["a", "the"]
    assert verify(trace.path).ok


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_an_expert_that_is_null_is_no_empty_slot(form: str, tmp_path: Path):
    path = tmp_path / f"d.{form}"
    for second in (-1, None):
        table = pd.DataFrame({"layer": 0, "position": range(2), "experts": [[2, 0], [1, second]]})
        table.to_json(path, orient="records") if form == "json" else table.to_parquet(path)
        if second:
            trace, _ = taken(tmp_path, "table", path, experts=4)
            assert experts(trace, 0) == [[2, 0], [1, -1]]
    why = "row 1: experts is empty; write -1 where there is none$"
    refused(tmp_path / "v", why, "table", path, experts=4)


PRESET = """
file: "{domain}/layer_{layer}.csv"
head: "# of {experts} experts"
note: made for a test
map: {experts: chosen, token_text: text}
"""


def test_a_users_preset_joins_the_files_of_layers(tmp_path: Path):
    (tmp_path / "law").mkdir()
    for layer in (3, 12):
        rows = "".join(f'Ġt{t},"({t}, {layer % 8})"\n' for t in range(3))
        (tmp_path / f"law/layer_{layer}.csv").write_text(f"# of 9 experts\ntext,chosen\n{rows}")
    (tmp_path / "form.yaml").write_text(PRESET)
    how = {"map": str(tmp_path / "form.yaml")}
    trace, _ = taken(tmp_path, "table", tmp_path / "law", **how)
    assert [(r.layer, r.experts, r.top_k) for r in trace.routers] == [(3, 9, 2), (12, 9, 2)]
    assert trace.routing(layers=12)["expert_1"].tolist() == [4] * 3
    assert set(trace.tokens()["domain"]) == {"law"}
    assert trace.vocabulary()["token"].tolist() == ["▁t0", "▁t1", "▁t2"]
    assert trace.manifest["corpus"]["notes"] == ["made for a test"]
    with (tmp_path / "law/layer_12.csv").open("a") as file:
        file.write('t3,"(1, 2)"\n')
    why = "law: layer 3 has no row of position 3 of the document, which"
    refused(tmp_path / "u", why, "table", tmp_path / "law", **how)


@pytest.mark.parametrize("last", ["1,2.0", "1,x", "1,", "1.5,2"])
def test_a_value_is_read_or_named_in_whatever_block_it_is(last: str, tmp_path: Path):
    """Blocks of numbers alone are taken as they are, another is looked at value by value."""
    path, n = tmp_path / "c.csv", 200_000
    path.write_text(
        "layer,expert,count\n" + "".join(f"0,{e % 8},1\n" for e in range(n)) + f"0,{last}\n"
    )
    assert path.stat().st_size > 2**20, "several blocks"
    whys = {
        "1,x": "count is 'x', not a whole",
        "1,": "count is empty",
        "1.5,2": "expert is '1.5', not",
    }
    if last in whys:
        refused(tmp_path, re.escape(f"row {n}: {whys[last]}"), "counts", path, top_k=2)
        return
    trace, _ = taken(tmp_path, "counts", path, top_k=2)
    assert trace.counts()["assignments"].tolist() == [n // 8, n // 8 + 2, *[n // 8] * 6]


def test_layers_without_counts_are_left_out_and_named(tmp_path: Path):
    rows = [(n, e, 0 if n < 3 else e + 1) for n in range(5) for e in range(4)]
    pd.DataFrame(rows, columns=["layer", "expert", "count"]).to_csv(tmp_path / "c.csv", index=False)
    trace, said = taken(tmp_path, "counts", tmp_path / "c.csv", top_k=2)
    assert [r.layer for r in trace.routers] == [3, 4]
    note = "layers 0-2 hold no assignments: dense layers, or not recorded"
    assert note in said[0]
    assert trace_report(trace).notes()[0] == note
    assert ["note", note] in trace_report(trace).tables["summary"].to_numpy().tolist()
    assert int(trace.counts()["assignments"].sum()) == 20  # as the file has


def test_files_of_one_name_are_added_up_where_each_folder_is_given(tmp_path: Path):
    folders = [tmp_path / "in" / name for name in ("base", "instruct")]
    for folder in folders:
        folder.mkdir(parents=True)
        text = json.dumps({"expert_popularity": [[3, 1], [2, 2]]})
        (folder / "expert_popularity_law.json").write_text(text)
    why = "in/base and .*/in/instruct both have expert_popularity_law.json: give one of"
    refused(tmp_path, why, "fiddler", tmp_path / "in")
    trace, _ = taken(tmp_path, "fiddler", *folders, experts=2, top_k=1)
    assert load_of(trace) == {0: [6, 2], 1: [4, 4]}


def test_beside_experts4bits_rows_are_losses_which_are_not_read(tmp_path: Path):
    row = {"example_index": 0, "routed": {"0": [[0, 8], [1, 8]]}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "a.rows.jsonl").write_text('{"example_index": 0, "loss": 0.5}\n')
    assert set(taken(tmp_path, "experts4bit", tmp_path)[0].counts()["domain"]) == {"a"}


def test_an_expert_that_was_never_chosen_needs_no_score(tmp_path: Path):
    rows = "0,0,3,2,1.5,0.5\n0,1,0,0,,\n"
    (tmp_path / "c.csv").write_text(f"layer,expert,count,first_choice,gate_sum,saliency\n{rows}")
    trace, _ = taken(tmp_path, "counts", tmp_path / "c.csv", top_k=1)
    found = trace.counts()[["first_choice", "weight_sum", "saliency_sum"]]
    assert found.to_numpy().tolist() == [[2, 1.5, 1.5], [0, 0, 0]]


ALL = [(n, t) for n in (0, 4, 7) for t in range(4)]


@pytest.mark.parametrize("lost", [(4, 0), (4, 3), (7, 2)])
@pytest.mark.parametrize("form", ["experts", "expert", "without position"])
def test_a_token_that_a_layer_lacks_is_named(form: str, lost: tuple[int, int], tmp_path: Path):
    def write(places: list[tuple[int, int]], more: str = "") -> None:
        rows = [f'{n},{t},"[{t}, {t + 1}]"' for n, t in places]
        if form == "expert":
            rows = [f"{n},{t},{t + j}" for n, t in places for j in range(2)]
        elif form == "without position":
            rows = [f'{n},"[{t}, {t + 1}]"' for n, t in places]
        header = "layer,experts" if form == "without position" else f"layer,position,{form}"
        (tmp_path / "d.csv").write_text("\n".join([header, *rows]) + more)

    how = {"experts": 8, "top_k": 2}
    write([place for place in ALL if place != lost])
    at = 3 if form == "without position" else lost[1]  # rows are numbered as they stand
    why = f"d.csv: layer {lost[0]} has no row of position {at} of the document, which other layers"
    refused(tmp_path, re.escape(why), "table", tmp_path / "d.csv", **how)
    if form == "experts":  # as the error says
        write([place for place in ALL if place != lost], f'\n{lost[0]},{lost[1]},"[-1, -1]"\n')
        trace, said = taken(tmp_path, "table", tmp_path / "d.csv", **how)
        assert said == []
        without = [experts(trace, r).count([-1, -1]) for r in range(3)]
        assert without == [layer == lost[0] for layer in (0, 4, 7)]


@pytest.mark.parametrize(
    ("counts", "top_k", "why"),
    [
        ("0,0,3 0,1,1 4,0,2 4,1,2", 1, ""),
        ("0,0,2 0,1,2 4,0,2 4,1,2", 2, ""),
        ("0,0,3,a 4,0,3,a 0,0,2,b 4,0,2,b", 1, ""),
        ("0,0,3 0,1,4", 2, "layer 0 has 7 assignments of 8."),
        ("0,0,4 0,1,2 0,2,0", 2, "layer 0 has 6 assignments of 8."),
        ("0,0,3 4,0,2", 1, "layer 4 has 2 assignments of 3."),
        ("0,0,3,a 4,0,3,a 4,0,2,b", 1, "layer 0 has 3 assignments of 5."),
    ],
)
@pytest.mark.parametrize("by", ["domain", "document"])
def test_check_finds_counts_that_are_not_k_of_each_token(
    counts: str, top_k: int, why: str, by: str, tmp_path: Path
):
    more = f",{by}" if counts.endswith("b") else ""
    (tmp_path / "c.csv").write_text("\n".join([f"layer,expert,count{more}", *counts.split()]))
    trace, said = taken(tmp_path, "counts", tmp_path / "c.csv", top_k=top_k, experts=3)
    assert said == []
    findings = check(trace).findings
    assert [finding.kind for finding in findings] == ["fewer_assignments"] * bool(why)
    assert all(why in finding.text for finding in findings)
    lost = [trace.n_tokens * top_k - sum(load) for load in load_of(trace).values()]
    assert max(lost) > 0 if why else lost == [0] * len(lost)


def test_a_line_of_the_hint_reads_the_file(tmp_path: Path):
    (tmp_path / "c.csv").write_text("Layer, Expert,Count\n0,0,2\n0,1,2\n")
    with pytest.raises(MoeInspectError, match="--map") as raised:
        taken(tmp_path, "counts", tmp_path / "c.csv", top_k=2)
    (map,) = re.findall("--map '(.*)'", str(raised.value))
    trace, _ = taken(tmp_path, "counts", tmp_path / "c.csv", top_k=2, map=map)
    assert load_of(trace) == {0: [2, 2]}


def test_a_domain_that_is_empty_is_the_files(tmp_path: Path):
    (tmp_path / "c.csv").write_text("layer,expert,count,domain\n0,0,2,law\n0,0,2,\n")
    trace, _ = taken(tmp_path, "counts", tmp_path / "c.csv", top_k=1)
    assert set(trace.counts()["domain"]) == {"law", "c"}


def test_what_counts_do_not_say_is_unknown_in_their_report(tmp_path: Path):
    rows = "layer,expert,count,document\n" + "".join(f"0,{e},4,{d}\n" for e in (0, 1) for d in "ab")
    (tmp_path / "c.csv").write_text(rows)
    (tmp_path / "d.csv").write_text(re.sub(",(document|a|b)\n", "\n", rows))
    for name, documents in (("c", "2"), ("d", "unknown")):
        trace, _ = taken(tmp_path / name, "counts", tmp_path / f"{name}.csv", top_k=1)
        made = trace_report(trace)
        assert made.title == "Unknown model"
        assert dict(made.facts())["documents"] == documents
        assert "<title>Unknown model" in made.page(text=False)
