"""Tables with a row per choice or decision: BigMoeOnEdge's and moe-policylang's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.run import import_trace
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import verify
from tests.foreign import MAKERS, write_route_trace

Row = list[int | float]


def row(step: int, layer: int, slot: int, expert: int, phase: int = 0, **more: float) -> Row:
    return [
        *(int(more.get("turn", 0)), phase, step, layer, slot, expert),
        *(more.get("weight", 0.5), 0, 0, int(more.get("dropped", 0))),
    ]


def imported(rows: list[Row], root: Path, dropped: bool = True) -> Trace:
    write_route_trace(root / "route.csv", rows, dropped)
    trace = import_trace("bigmoeonedge", [root / "route.csv"], root / "t", overwrite=True)
    assert verify(root / "t").ok
    return trace


def experts(trace: Trace, router: int) -> list[list[int | None]]:
    table = trace.routing(router=router)[["expert_0", "expert_1"]]
    return [[None if np.isnan(e) else int(e) for e in row] for row in table.to_numpy(float)]


def test_what_a_turn_lacks_is_nowhere_and_noted(tmp_path: Path):
    """A prompt of two tokens, whose last alone reaches the last layer; a decoded token, whose
    experts of one layer were dropped while they were cold."""
    rows = [row(t, 1, j, 2 * t + j, weight=0.6 - 0.2 * j) for t in range(2) for j in range(2)]
    rows += [row(1, 2, j, 4 + j, weight=0.6 - 0.2 * j) for j in range(2)]
    rows += [
        row(2, n, j, 6 + j, 1, weight=0.6 - 0.2 * j, dropped=n == 2)
        for n in (1, 2)
        for j in range(2)
    ]
    trace = imported(rows, tmp_path)
    assert experts(trace, 0) == [[0, 1], [2, 3], [6, 7]]
    assert experts(trace, 1) == [[None, None], [4, 5], [None, None]]
    assert trace.tokens()["phase"].tolist() == ["prefill", "prefill", "decode"]
    assert trace.tokens()["position"].tolist() == [0, 1, 2]
    assert trace.tokens()["sequence"].nunique() == 1
    assert trace.manifest["corpus"]["notes"] == [
        "route.csv: 2 choices dropped while cold",
        "route.csv: 1 decision without rows: of a prompt only the last token reaches the last "
        "layer",
    ]


def test_turns_are_documents_and_gaps_begin_sequences(tmp_path: Path):
    steps = [(0, 0), (0, 1), (0, 5), (1, 7), (1, 8)]
    rows = [row(step, 1, j, j, turn=turn) for turn, step in steps for j in range(2)]
    tokens = imported(rows, tmp_path, dropped=False).tokens()
    assert tokens["document"].tolist() == [0, 0, 0, 1, 1]
    assert tokens["sequence"].tolist() == [0, 0, 1, 2, 2]
    assert tokens["position"].tolist() == [0, 1, 5, 7, 8]


def test_unknown_weights_are_no_weights(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"route.csv: weights are unknown in some rows"):
        trace = imported([row(0, 1, j, j, weight=np.nan) for j in range(2)], tmp_path)
    assert not trace.has_weights
    assert trace.routers[0].slot_order == "unknown"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(0, 1, 0, 3), row(0, 1, 0, 4)], "position 0 of 0 has two rows of one layer and slot"),
        ([row(-1, 1, 0, 3)], "step holds -1, not of 0 to"),
        ([row(0, 1, 2, 3)], "slot holds 2, not of 0 to 1"),
        ([row(0, 1, 0, 8)], "expert holds 8, not of 0 to 7"),
        ([row(0, 1, 0, 1), row(0, 1, 1, 1)], "token 0 goes to one expert twice"),
        ([row(0, 1, 0, 1), row(0, 1, 1, 2, 1)], "rows of one token with different decoded"),
        ([row(0, 1, 0, 1, weight=np.inf)], "weight is inf"),
        ([], "holds no decisions"),
    ],
)
def test_rows_that_cannot_be(rows: list[Row], said: str, tmp_path: Path):
    with pytest.raises(MoeInspectError, match=said):
        imported(rows, tmp_path)
    assert not (tmp_path / "t").exists()


def test_a_prompts_tag_is_its_domain_and_scores_are_no_weights(tmp_path: Path):
    source = MAKERS["moe-policylang"](tmp_path).source
    trace = import_trace("moe-policylang", [source], tmp_path / "t")
    tokens = trace.tokens()
    assert tokens["domain"].tolist() == ["code"] * 5 + ["chat"] * 4
    assert tokens["position"].tolist() == [*range(5), *range(4)]
    assert tokens["token_id"].tolist() == [*range(9)]
    phases = ["prefill"] * 3 + ["decode"] * 2 + ["prefill"] * 3 + ["decode"]
    assert tokens["phase"].tolist() == phases
    assert not trace.has_weights
    assert {r.slot_order for r in trace.routers} == {"weight"}
    given = import_trace("moe-policylang", [f"mine={source}"], tmp_path / "u")
    assert set(given.tokens()["domain"]) == {"mine"}


def test_a_trace_without_softmax_does_not_say_how_many_experts_there_are(tmp_path: Path):
    source = MAKERS["moe-policylang"](tmp_path).source
    table = pq.read_table(source).drop_columns(["router_softmax", "router_scores"])
    pq.write_table(table, source)
    with pytest.raises(MoeInspectError, match="does not say how many experts there are"):
        import_trace("moe-policylang", [source], tmp_path / "t")
    trace = import_trace("moe-policylang", [source], tmp_path / "t", experts=8)
    assert {r.slot_order for r in trace.routers} == {"unknown"}
    ragged = table.set_column(
        3, "selected_experts", pa.array([[0], *[[0, 1]] * (len(table) - 1)], pa.list_(pa.int32()))
    )
    pq.write_table(ragged, source)
    with pytest.raises(MoeInspectError, match="selected_experts has lists of different lengths"):
        import_trace("moe-policylang", [source], tmp_path / "v", experts=8)


def test_a_header_that_is_no_text_is_one_line(tmp_path: Path):
    write_route_trace(tmp_path / "route.csv", [row(0, 1, j, j) for j in range(2)])
    data = (tmp_path / "route.csv").read_bytes()
    (tmp_path / "route.csv").write_bytes(data.replace(b"residency", b"resid\xffncy"))
    with pytest.raises(MoeInspectError, match="can't decode byte 0xff"):
        import_trace("bigmoeonedge", [tmp_path / "route.csv"], tmp_path / "t")
