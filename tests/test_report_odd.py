"""Every table, and the report in words, of traces that lack something or lie at an edge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import TABLES, Report, report
from moe_inspect.trace.reader import Trace, open_trace
from moe_inspect.trace.writer import CountedBatches, TraceWriter
from tests.support.planted import text_of
from tests.support.synthetic import (
    encoder_decoder,
    routers,
    uniform_ids,
    write_counts,
    write_passes,
    write_trace,
)

NOWHERE = np.iinfo(np.uint16).max
NEED_DECISIONS = {"vocabulary", "coactivation", "transitions", "repetition"}
RNG = np.random.default_rng(9)


def imported_counts(root: Path) -> Trace:
    """Counts of which the source does not say what came first."""
    load = RNG.integers(5, 50, (2, 8)) * 2
    manifest: Any = {"capture": {"weights": False, "mode": "import"}}
    given: Any = {"weights": False, "counts_only": True}
    with TraceWriter(root, manifest, routers(2, 8, 2), **given) as writer:
        writer.write(CountedBatches(0, int(load.sum()) // 2, ["a", "b"], [load, load], None))
    return open_trace(root)


def of(
    ids: list[np.ndarray], experts: int | list[int], documents: int = 10, **settings: Any
) -> Callable[[Path], Trace]:
    T = len(ids[0])
    usual = {"document": np.arange(T) * documents // T, "domain_of_document": ["a", "b"]}
    return lambda root: write_trace(root, ids, experts, **usual | settings)


def some_null(T: int, E: int, k: int) -> np.ndarray:
    ids = uniform_ids(RNG, T, E, k)
    ids[RNG.random((T, k)) < 0.3] = NOWHERE
    return ids


# trace → a part of what its report says
ODD: dict[str, tuple[Callable[[Path], Trace], str]] = {
    "counts": (lambda root: write_counts(root, [np.full((1, 8), 200)], 2), "trace without --counts-only for those"),
    "imported counts": (imported_counts, "import a recording of every token for those"),
    "neither weights nor vocabulary": (of([uniform_ids(RNG, 300, 8, 2)] * 2, 8), "no weights recorded"),
    "one token": (of([np.array([[0, 1]], np.uint16)], 8, 1, weights=[np.full((1, 2), 0.5, np.float32)]), "1 token is too few"),
    "one document": (of([uniform_ids(RNG, 300, 8, 2)] * 2, 8, 1, words=5), "Too little data to judge"),
    "one domain": (of([uniform_ids(RNG, 300, 8, 2)] * 2, 8, domain_of_document=["a"]), "Judged on 300 tokens"),
    "an encoder and a decoder": (encoder_decoder, "Judged on 10 tokens"),
    "two routers in a layer": (of([uniform_ids(RNG, 300, 16, 4), uniform_ids(RNG, 300, 4, 1)], [16, 4], layers=[3, 3]), "layer 3/"),
    "one choice": (of([uniform_ids(RNG, 300, 8, 1)] * 2, 8, weights=[np.ones((300, 1), np.float32)] * 2), "Judged on 300 tokens"),
    "one expert": (of([np.zeros((300, 1), np.uint16)] * 2, 1), "Balance is good"),
    "every expert every time": (of([uniform_ids(RNG, 200, 4, 4)], 4), "Balance is good"),
    "null slots": (of([some_null(400, 8, 3)] * 2, 8), "Judged on 400 tokens"),
    "a router without load": (of([uniform_ids(RNG, 500, 8, 2), np.full((500, 2), NOWHERE, np.uint16)], 8), "1 of 2 routers made no assignments"),
    "more experts than a byte": (of([uniform_ids(RNG, 500, 512, 10)], 512), "Too little data to judge"),
    "a large model": (of([uniform_ids(RNG, 40, 256, 8) for _ in range(61)], 256, words=3), "40 tokens are few for 256 experts"),
}  # fmt: skip


def check(name: str, made: Report, r: int, rows: Any) -> None:
    """The rows of a router in a table add up."""
    counts, k, T = made.counts, made.counts.routers[r].top_k, made.counts.tokens_of(r)
    load, null_slots = counts.load_E(r).sum(), counts.of[r].null_slots
    match name:
        case "load":
            assert len(rows) == counts.routers[r].experts
            assert rows["assignments"].sum() == T * k - null_slots
            assert rows["share"].sum() == pytest.approx(1 if load else 0)
            assert rows["first_choice"].isna().all() or rows["first_choice"].sum() <= T
        case "domains":
            assert (rows["activation"] * rows["tokens"]).sum() == pytest.approx(load)
            assert rows["assignments"].sum() == load
        case "coactivation" if not null_slots:
            assert rows["together"].sum() == T * k * (k - 1)
        case "transitions":
            after = counts.next_router(r)
            if after is None:
                assert rows.empty
            elif not null_slots + counts.of[after].null_slots:
                assert rows["together"].sum() == T * k * counts.routers[after].top_k
        case "repetition":
            assert rows["pairs"].sum() == T - counts.documents
        case "windows":
            assert rows["tokens"].sum() == T
        case "balance" | "specialization" | "router" | "drift":
            assert len(rows) == 1


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("error")
def test_every_table_is_right_or_says_what_it_lacks(tmp_path: Path, case: str):
    trace, says = ODD[case][0](tmp_path / "t"), ODD[case][1]
    made, lacking = report(trace, top=0, window=trace.n_tokens // 3 + 1), {}
    made.prepare([] if trace.counts_only else TABLES)
    for name in TABLES:
        try:
            table: Any = made.tables[name]
        except MoeInspectError as error:
            lacking[name] = str(error)
            continue
        assert not np.isinf(table.select_dtypes("number").to_numpy(float, na_value=np.nan)).any()
        for r in made.selection.routers if "router" in table else ():
            check(name, made, r, table[table["router"] == r])
    assert set(lacking) == (NEED_DECISIONS if trace.counts_only else set())
    for said in lacking.values():
        assert said.startswith(f"{trace.path} holds counts only, no ")
        assert "\n" not in said
    assert says in " ".join(text_of(made).split())


@pytest.mark.parametrize(("uneven", "said"), [(False, "Too little data"), (True, "is uneven")])
def test_of_a_router_that_may_choose_every_expert_chance_is_that_of_its_empty_slots(
    tmp_path: Path, uneven: bool, said: str
) -> None:
    """Of 60 tokens each expert gets 30 % of their slots; or the first gets all, of 60,000."""
    rng, T = np.random.default_rng(0), 60_000 if uneven else 60
    load_E = (rng.random((T, 8)) < (0.3 + 0.7 * uneven * (np.arange(8) == 0))).sum(0)
    counted = CountedBatches(0, T, ["text"], [load_E[None]], None)
    made = report(write_passes(tmp_path / "t", routers(1, 8, 8), [counted], counts_only=True))
    assert made.tables["balance"]["max_vio"][0] > 0.2
    assert (made.tables["balance"]["expected_by_chance"][0] > 1.2) == (not uneven)
    assert said in next(found.text for found in made.verdict() if found.kind == "balance")
