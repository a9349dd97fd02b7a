"""Two different models: they are named, and the summaries of their reports stand side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support.synthetic import uniform_ids, write_trace


def shaped(root: Path, E: int, k: int, blocks: int | None = None, **more: Any) -> Trace:
    config = {"model": {"config": {"num_hidden_layers": blocks}}} if blocks else {}
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 200, E, k) for _ in range(2)]
    return write_trace(root, ids, E, manifest=config, **more)


def test_the_summaries_of_both_reports_are_a_table(tmp_path: Path) -> None:
    a = shaped(tmp_path / "a", 8, 2, domain_of_document=["law", "code"], document=np.arange(200))
    b = shaped(tmp_path / "b", 16, 4)
    made: Any = moe_inspect.compare(a, b)
    table = made.tables["summary"].set_index("key")
    for side, trace in (("a", a), ("b", b)):
        alone: Any = moe_inspect.report(trace).tables["summary"].set_index("key")["value"]
        kept = [key for key in alone.index if not key.startswith(("threshold_", "note"))]
        assert table.loc[kept, side].tolist() == alone[kept].tolist()
    assert table.loc["tokens_in_law"].tolist() == ["100", ""]
    assert table.loc["tokens_in_text"].tolist() == ["", "200"]
    assert set(made.tables) == {"summary", "verdict"}
    assert made.tables["verdict"]["kind"].tolist() == ["different_models"]


def test_the_command_says_what_applies_and_refuses_the_rest(cli_here: Cli, tmp_path: Path) -> None:
    shaped(tmp_path / "a", 8, 2)
    shaped(tmp_path / "b", 16, 4)
    shown = cli_here("compare", "a", "b", "--html", "p.html", "--plots", "plots")
    said = " ".join(shown.stdout.split())
    assert "Different models: A has 8 experts per layer, B 16; A has 2 experts per token" in said
    assert "it is no comparison of tokens" in said
    assert "assignments 800 1600" in said
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    for heading in ("Two models, side by side", "The summaries of both"):
        assert heading in page
    assert not (tmp_path / "plots").exists()
    assert "assignments,800,1600\n" in cli_here("compare", "a", "b", "--format", "csv").stdout
    for asked, says in (
        (["--table", "agreement"], "there is no table 'agreement'"),
        (["--fail-above", "set_mismatch=0"], "there is no metric 'set_mismatch'"),
        (["--layers", "0"], "which layers needs: leave it out"),
        (["--shift-layers", "1"], "of different models"),
    ):
        done = cli_here("compare", "a", "b", *asked, check=1)
        assert "A has 8 experts per layer, B 16" in done.stderr or "--shift-layers" in asked
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not done.stdout
    done = cli_here("compare", "a", "a", "--table", "balance", check=1)
    assert "no table 'balance'" in done.stderr


def test_what_makes_models_different_is_named(tmp_path: Path) -> None:
    a = shaped(tmp_path / "a", 8, 2, 4)
    for name, sizes, says in (
        ("b", (16, 2, 4), "A has 8 experts per layer, B 16"),
        ("c", (8, 3, 4), "A has 2 experts per token, B 3"),
        ("d", (8, 2, 6), "A has 4 layers, B 6"),
    ):
        b = shaped(tmp_path / name, *sizes)
        made: Any = moe_inspect.compare(a, b)
        assert list(made.reasons) == [says]
        with pytest.raises(MoeInspectError, match=says) as error:
            moe_inspect.compare(a, b, noise=a)
        assert ("Physical ids" in str(error.value)) == (name == "b")
    made = moe_inspect.compare(a, shaped(tmp_path / "e", 8, 2, 6), layers="0-1")
    assert made.mismatched == 0
    made = moe_inspect.compare(a, shaped(tmp_path / "f", 8, 2))
    assert made.mismatched == 0
