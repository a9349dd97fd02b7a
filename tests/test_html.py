"""The page: what a hostile corpus cannot do to it, what its tables and texts read like."""

from __future__ import annotations

import base64
import gzip
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel
from moe_inspect.reporting.render import html, payload
from moe_inspect.reporting.render.html import Page, Section, Tile, page_html
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.report import report
from moe_inspect.text import number
from tests.conftest import ROOT

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def test_a_page_shows_what_is_hostile_and_runs_none_of_it():
    table = pd.DataFrame({"token": [HOSTILE, "\x1b[31m\u202eevil\n"], HOSTILE: [1, 2]})
    sections = [Section(HOSTILE, HOSTILE, table=table, definitions={HOSTILE: HOSTILE})]
    lists: Any = {name: [HOSTILE] for name in ("warnings", "verdict", "left_out")}
    tiles = [Tile(HOSTILE, HOSTILE, HOSTILE)]
    page = Page(HOSTILE, HOSTILE, tiles=tiles, sections=sections, footer=HOSTILE, **lists)
    made = page_html(page)
    assert "<img" not in made
    assert made.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;alert(&#34;x&#34;)" in made
    assert "\x1b" not in made
    assert "\u202e" not in made
    assert r"\x1b[31m\u202eevil\n" in made


def test_the_policy_names_every_script_and_allows_nothing_else():
    line = Line(np.arange(2.0), np.arange(2.0), HOSTILE, "c1")
    panel = Panel((line,), Axis(HOSTILE, (HOSTILE, "b")), Axis(HOSTILE), HOSTILE)
    chart = Chart(HOSTILE, HOSTILE, (panel,), HOSTILE, subset=HOSTILE, name="s")
    made = page_html(Page("t", sections=[html.chart_section(chart)]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', made)
    assert policy
    policy = policy[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split(";")[1]
    for script in re.findall(r"<script>(.*?)</script>", made, re.S):
        assert html.script_hash(script) in policy
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/[\w/]*", "", made)
    assert "<img" not in made
    assert 'id="payload"' in made


def test_two_sections_of_one_title_have_ids_of_their_own():
    made = page_html(Page("t", sections=[Section("Load"), Section("Load")]))
    ids = re.findall(r'\bid="([^"]*)"', made)
    assert len(ids) == len(set(ids))


CELLS: list[tuple[object, str]] = [
    *((missing, "–") for missing in (float("nan"), None, pd.NA)),
    *((0.12345, "0.123"), (0.0, "0.000"), (1e-5, "1.0e-05"), (12345, "12,345"), (True, "True")),
    *((np.int64(7), "7"), ("▁the", "▁the"), (" a b ", "␣a b␣"), ("\n", r"\n")),
    *(("\u200b", r"\u200b"), ("<0xE2>", "<0xE2>")),
]


@pytest.mark.parametrize(("value", "said"), CELLS)
def test_cells_are_readable(value: object, said: str):
    assert number(value) == said


def test_a_long_table_is_cut_and_says_so():
    made = page_html(Page("t", sections=[Section("s", table=pd.DataFrame({"a": range(1_234)}))]))
    assert made.count("<tr>") == payload.MOST_ROWS + 1
    assert "1,134 more rows" in made


def test_a_page_does_not_say_in_which_folder_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = report_page(report("sample_traces/collapsed"))
    packed = [base64.b64decode(text) for text in re.findall(r"H4sI[\w+/=]{100,}", page)]
    inside = "".join(gzip.decompress(data).decode() for data in packed)
    assert "moe_inspect.report(&#39;sample_traces/collapsed&#39;)" in page
    assert '"domains"' in inside
    assert str(ROOT) not in page + inside
