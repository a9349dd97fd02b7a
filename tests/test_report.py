"""The report: its tables of traces that lack something or lie at an edge, and what it says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.public import Trace, open_trace, report
from moe_inspect.reporting.report import TABLES, Report
from moe_inspect.reporting.tables.registry import LazyTables, Table
from moe_inspect.reporting.verdict.findings import SEVERITIES, every_check
from moe_inspect.trace.writer import CountedBatches
from tests.conftest import ROOT, Cli
from tests.support.damage import edit_manifest
from tests.support.planted import sentences, text_of
from tests.support.synthetic import (
    encoder_decoder,
    routers,
    uniform_ids,
    write_counts,
    write_passes,
    write_trace,
)
from tests.test_oracles_report import ORACLES, World, agrees

NOWHERE = np.iinfo(np.uint16).max
NEED_DECISIONS = {"vocabulary", "coactivation", "transitions", "repetition"}
RNG = np.random.default_rng(9)


def imported_counts(root: Path) -> Trace:
    """Counts of which the source does not say what came first."""
    load = RNG.integers(5, 50, (2, 8)) * 2
    counted = CountedBatches(0, int(load.sum()) // 2, ["a", "b"], [load, load], None)
    manifest: Any = {"capture": {"weights": False, "mode": "import"}}
    return write_passes(root, routers(2, 8, 2), [counted], manifest=manifest, counts_only=True)


def of(
    ids: list[np.ndarray], experts: int | list[int], documents: int = 10, **settings: Any
) -> Callable[[Path], Trace]:
    T = len(ids[0])
    usual = {"document": np.arange(T) * documents // T, "domain_of_document": ["a", "b"]}
    return lambda root: write_trace(root, ids, experts, **usual | settings)


def drawn(*shapes: tuple[int, int], T: int = 300) -> list[np.ndarray]:
    return [uniform_ids(RNG, T, E, k) for E, k in shapes]


SILENT = [*drawn((8, 2)), np.full((300, 2), NOWHERE, np.uint16)]
# trace → a part of what its report says; and whether its tables are computed once more
ODD: dict[str, tuple[Callable[[Path], Trace], str, bool]] = {
    "counts": (
        lambda root: write_counts(root, [np.full((1, 8), 200)], 2),
        "trace without --counts-only for those",
        False,
    ),
    "imported counts": (imported_counts, "import a recording of every token for those", False),
    "an encoder and a decoder": (encoder_decoder, "Judged on 10 tokens", False),
    "a large model": (
        of(drawn(*[(256, 8)] * 61, T=40), 256, words=3),
        "40 tokens are few for 256 experts",
        False,
    ),
    "two routers in a layer": (
        of(drawn((16, 4), (4, 1)), [16, 4], layers=[3, 3]),
        "layer 3/",
        True,
    ),
    "one expert": (of([np.zeros((300, 1), np.uint16)] * 2, 1), "Balanced", True),
    "every expert every time": (of(drawn((4, 4)), 4), "Balanced", True),
    "a router without load": (of(SILENT, 8), "1 of 2 routers made no assignments", True),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("error")
def test_every_table_is_right_or_says_what_it_lacks(tmp_path: Path, case: str):
    write, says, computed = ODD[case]
    trace = write(tmp_path / "t")
    w = World(trace.path, {"window": trace.n_tokens // 3 + 1, "top": 0})
    made, lacking = w.report, {}
    made.prepare([] if trace.counts_only else TABLES)
    for name in TABLES:
        try:
            table: Any = made.tables[name]
        except MoeInspectError as error:
            lacking[name] = str(error)
            continue
        assert not np.isinf(table.select_dtypes("number").to_numpy(float, na_value=np.nan)).any()
        if computed and name in ORACLES:
            agrees(name, w)
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


def test_tables_are_made_when_asked_for(planted_report: Report):
    asked, table = list[str](), pd.DataFrame({"x": [1]})
    made = Table(lambda data: asked.append(data) or table, frozenset(), ())
    tables = LazyTables("data", {"one": made, "other": made})
    assert asked == []
    assert tables["one"] is tables["one"] is table
    assert asked == ["data"]
    assert list(planted_report.tables) == list(TABLES)
    assert "balance" in planted_report.tables
    with pytest.raises(MoeInspectError, match="no table 'gini': there are summary, balance"):
        planted_report.tables["gini"]


def test_what_is_planted_is_said(planted_report: Report):
    said, row = "\n".join(sentences(planted_report)), planted_report.tables["balance"].iloc[3]
    bits = planted_report.tables["specialization"].iloc[2]
    for part in (
        f"Layer 3 is the worst balanced: expert 5 gets {row['max_over_mean']:.2f}x the mean load",
        f"expected by chance: {row['expected_by_chance']:.2f}x",
        "1 dead expert in 1 of 4 routers (layer 3: 6): none of 6,000 tokens was routed there.",
        '"code" overloads expert 3 of layer 2',
        f"still carries {bits['domain_mi_given_token_bits']:.3f} bits about the expert in layer 2",
        f"by chance give {bits['domain_mi_given_token_null_bits']:.3f})",
        "The token id determines the expert most in layer 1: 100% of first choices",
        "Judged on 6,000 tokens of 60 documents in 4 domains, 4 routers.",
    ):
        assert part in said
    assert "veraged" not in said  # 1.3x is not fine either


@pytest.mark.parametrize("status", ["recording", "interrupted"])
def test_an_unfinished_trace_warns(copied: Path, status: str):
    edit_manifest(copied, status=status)
    made = report(open_trace(copied))
    (warning,) = [f for f in made.verdict() if f.kind == "trace_warning"]
    assert warning.severity == "warning"
    assert dict(made.facts())["warning"] in warning.text.lower()
    assert status in warning.text.replace("still being recorded", "recording")


# name of the quantisation → a checkpoint's quantization_config
QUANTIZED: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4"},
    "gptq 4 bit": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes 4 bit": {"load_in_4bit": True},
    "bitsandbytes 8 bit": {"quant_method": "bitsandbytes", "_load_in_8bit": True},
    "torchao int4": {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}},
    },
    "compressed-tensors float8": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
    },
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("inner", [False, True])
def test_the_quantisation_of_the_weights_is_named(copied: Path, name: str, inner: bool):
    """Also where the config of a language model is within that of a multimodal model."""
    config = {"quantization_config": QUANTIZED[name]}
    edit_manifest(copied, model={"config": {"text_config": config} if inner else config})
    made = report(open_trace(copied))
    assert dict(made.facts())["quantization"] == name
    assert f"weights: {name}" in " ".join(text_of(made).split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"window": 0}, "window is 0: give the tokens per window, 1 or more"),
        ({"top": -1}, "top is -1: give the number of token ids per expert, 0 for all"),
        ({"thresholds": {"uneven": -1.0}}, "threshold uneven is -1: give a number from 0 up"),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    planted_trace: Trace, arguments: dict[str, Any], said: str
):
    with pytest.raises(MoeInspectError, match=f"^{said}$"):
        report(planted_trace, **arguments)


SAMPLES = {
    "balanced": ("Experts specialise by domain in 2 of 4 routers, and", "never trained"),
    "collapsed": ("Layer 3 is the worst balanced: expert 6 gets 2.87x", "never trained"),
    "untrained": ("never trained (random weights, seed 0), so", "Experts specialise"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_traces_are_judged_right(name: str):
    said = "\n".join(sentences(report(ROOT / "sample_traces" / name)))
    says, never = SAMPLES[name]
    assert says in said
    assert never not in said


def test_findings_carry_their_numbers_come_most_important_first_and_are_made_once():
    made = report(ROOT / "sample_traces" / "collapsed")
    found, again = made.verdict(), made.verdict()
    order = [min(SEVERITIES.index(f.severity), 2) for f in found]
    assert order == sorted(order)
    first = found[0]
    assert (first.kind, first.severity, first.layer, first.router) == ("balance", "critical", 3, 3)
    assert f"{first.values['max_over_mean']:.2f}x the mean load" in first.text
    assert {f.kind for f in found} <= {check.__name__ for _, check in every_check()}
    assert len({f.kind for f in found}) == len(found)
    assert found is not again
    assert all(one is other for one, other in zip(found, again, strict=True))
    assert len(made.tables["verdict"]) == len(found)


def test_the_verdict_is_a_table_and_json_has_its_numbers(cli_here: Cli):
    trace = ROOT / "sample_traces" / "collapsed"
    lines = cli_here("report", trace, "--table", "verdict", "--format", "json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    columns = ["severity", "kind", "layer", "router", "text"]
    assert all(list(row) == [*columns, "values"] for row in rows)
    found = report(trace).verdict()
    assert [row["text"] for row in rows] == [f.text for f in found]
    assert [row["values"] for row in rows] == [f.values for f in found]
    assert rows[-1]["layer"] is None
    text = cli_here("report", trace, "--table", "verdict", "--format", "csv").stdout
    assert list(pd.read_csv(io.StringIO(text)).columns) == columns
