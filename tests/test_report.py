"""The report: its tables' columns, what it says in words, and the command line end to end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import moe_inspect
from moe_inspect.errors import MoeInspectError
from moe_inspect.report import terminal
from moe_inspect.report.report import Report, report
from moe_inspect.report.tables import TABLES
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.synthetic import uniform_ids, write_counts, write_trace

T, E, K = 6_000, 8, 2
COLUMNS = {
    "summary": "key value",
    "balance": "layer router experts top_k tokens assignments max_over_mean max_vio min_over_max cv gini entropy dead_experts busiest_expert "
    "noise_floor max_vio_low max_vio_high max_vio_batch noise_floor_batch",
    "load": "layer router expert assignments share load_ratio first_choice weight_sum",
    "domains": "layer router domain expert tokens assignments activation lift",
    "specialization": "layer router domain_mi_bits domain_mi_null_bits domain_mi_null_p99_bits domain_mi_given_token_bits "
    "domain_mi_given_token_null_bits token_mi_bits token_mi_null_bits jsd_bits vocabulary_specialization",
    "vocabulary": "layer router expert token_id token count fraction",
    "coactivation": "layer router expert other probability lift",
    "transitions": "layer router next_layer expert next_expert probability lift",
    "repetition": "layer router domain first_choice first_choice_random any_choice any_choice_random",
    "windows": "layer router window first_token tokens max_over_mean busiest_expert",
}
DOCUMENT = np.arange(T) // 100
DOMAINS = [("code", "law", "math", "prose")[d % 4] for d in range(60)]


def planted(root: Path, **changes: object) -> Trace:
    """Layer 0: chance. Layer 1: by token id. Layer 2: code goes to expert 3. Layer 3: half of everything to expert 5, none
    to expert 6."""
    rng = np.random.default_rng(0)
    token_id = np.minimum(rng.zipf(1.3, T), 499)
    ids = [uniform_ids(rng, T, E, K) for _ in range(4)]
    ids[1] = np.stack([token_id % E, (token_id % E + rng.integers(1, E, T)) % E], axis=1).astype(np.uint16)
    code = np.array([DOMAINS[d] == "code" for d in DOCUMENT]) & (rng.random(T) < 0.8)
    ids[2][code] = np.stack([np.full(T, 3), (3 + rng.integers(1, E, T)) % E], axis=1)[code]
    five = rng.random(T) < 0.5
    ids[3][five] = [5, 2]
    ids[3][ids[3] == 6] = 7
    weights = [np.sort(rng.dirichlet([1, 1], T))[:, ::-1].astype(np.float32) for _ in range(4)]
    settings = {"document": DOCUMENT, "domain_of_document": DOMAINS, "token_id": token_id, "weights": weights, "words": 500}
    return write_trace(root, ids, E, **settings | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return planted(tmp_path_factory.mktemp("planted") / "t")


@pytest.fixture(scope="module")
def made(trace: Trace) -> Report:
    return report(trace)


def uniform(root: Path, T: int = T, E: int = E, K: int = K, L: int = 3, seed: int = 1) -> Report:
    rng = np.random.default_rng(seed)
    ids = [uniform_ids(rng, T, E, K) for _ in range(L)]
    token_id = rng.integers(0, 100, T)
    return report(write_trace(root, ids, E, document=np.arange(T) // 100, domain_of_document=DOMAINS, token_id=token_id))


# --- tables


def test_every_table_has_its_columns(made: Report):
    assert set(COLUMNS) <= set(TABLES)
    for name in TABLES:
        columns = list(made.tables[name].columns)
        assert set(COLUMNS.get(name, "").split()) <= set(columns)
        assert name == "summary" or columns[:2] == ["layer", "router"]


def test_tables_are_made_when_asked_for(trace: Trace, monkeypatch: pytest.MonkeyPatch):
    fresh = report(trace)
    monkeypatch.setitem(TABLES, "specialization", lambda _: pytest.fail("not asked for"))
    assert len(fresh.tables["balance"]) == 4
    assert fresh.tables["balance"] is fresh.tables["balance"]
    assert list(fresh.tables) == list(TABLES)
    assert "balance" in fresh.tables
    assert "gini" not in fresh.tables
    with pytest.raises(MoeInspectError, match="no table 'gini': there are summary, balance"):
        fresh.tables["gini"]


def test_the_package_is_the_function(trace: Trace):
    assert moe_inspect.report(trace, layers="2").tables["load"]["layer"].unique().tolist() == [2]  # type: ignore[operator]
    assert moe_inspect.report(str(trace.path)).trace.n_tokens == T  # type: ignore[operator]


def test_tables_agree_with_each_other(made: Report):
    balance, load, domains = (made.tables[n] for n in ("balance", "load", "domains"))
    assert load.groupby("router")["assignments"].sum().tolist() == balance["assignments"].tolist() == [T * K] * 4
    assert load.groupby("router")["share"].sum().tolist() == pytest.approx([1] * 4)
    assert load.groupby("router")["load_ratio"].max().tolist() == pytest.approx(balance["max_over_mean"].tolist())
    assert load["weight_sum"].sum() == pytest.approx(T * 4, rel=1e-3)  # the weights of a token sum to 1
    assert (domains.groupby(["router", "expert"])["assignments"].sum().to_numpy() == load["assignments"].to_numpy()).all()
    assert domains.groupby(["router", "domain"])["activation"].sum().tolist() == pytest.approx([K] * 16)
    facts = dict(made.facts())
    assert facts["assignments"] == str(T * K * 4)
    assert facts["decisions"] == str(T * 4)
    assert facts["documents"] == "60"
    assert facts["tokens_in_law"] == "1500"
    assert facts["worst_layer"] == "3"
    assert facts["dead_experts"] == "1"


# --- the verdict


def test_what_is_planted_is_said(made: Report):
    said = made.verdict()
    worst = made.tables["balance"].iloc[3]["max_over_mean"]
    assert said[0].startswith(f"Layer 3 is the worst balanced: expert 5 gets {worst:.2f}x the mean load (95% interval")
    assert re.search(r"; [1-4] of 4 routers (is|are) uneven \(at least 1.2x and beyond chance\)\.$", said[0])
    row = made.tables["balance"].iloc[3]
    assert f"chance would give {1 + row['noise_floor']:.2f}x to independent tokens" in said[0]
    assert "1 dead expert in 1 of 4 routers (layer 3: 6): not one of 6,000 tokens went there." in said
    together = "\n".join(said)
    assert "ooled" not in together  # 1.3x is not fine either
    assert '"code" overloads expert 3 of layer 2' in together
    assert "most in layer 2 (" in together
    bits = made.tables["specialization"].iloc[2]
    given, null = bits["domain_mi_given_token_bits"], bits["domain_mi_given_token_null_bits"]
    assert f"the domain tells {given:.3f} bits of the expert there ({null:.3f} with the documents shuffled)" in together
    assert "expert 3 takes 8" in together
    assert "The token id decides most in layer 1: 100% of first choices" in together
    assert "Judged on 6,000 tokens of 60 documents in 4 domains, 4 routers." in together


def test_nothing_wrong_is_said_plainly(tmp_path: Path):
    said = uniform(tmp_path / "t").verdict()
    assert said[0].startswith("Nothing is wrong with the balance")
    assert any(s.startswith("No expert specialises by domain") for s in said)
    assert any(s.startswith("The token id does not decide the expert") for s in said)
    assert not any(word in " ".join(said) for word in ("dead", "overloads", "uneven", "hidden"))


@pytest.mark.parametrize("seed", range(5))
def test_chance_is_never_called_a_fault(tmp_path: Path, seed: int):
    said = uniform(tmp_path / "t", T=600, E=16, K=2, L=12, seed=seed).verdict()
    assert not any(word in " ".join(said) for word in ("worst balanced", "overloads", "uneven", "specialises by domain in"))


def test_too_few_tokens_are_too_few(tmp_path: Path):
    said = uniform(tmp_path / "t", T=40, E=64, K=2).verdict()
    assert said[0].startswith("Too little to judge balance by")
    assert "too few to call an expert dead" in said[1]


@pytest.mark.parametrize(("status", "word"), [("recording", "still being recorded"), ("interrupted", "interrupted")])
def test_an_unfinished_trace_warns(tmp_path: Path, status: str, word: str):
    made = report(planted(tmp_path / "t", status=status))
    assert word in made.verdict()[0]
    assert word in dict(made.facts())["warning"]
    assert len(made.tables["load"]) == 32


def test_counts_only_has_a_verdict(tmp_path: Path):
    load = np.full((1, 8), 100)
    load[0, 3] = 900
    said = report(write_counts(tmp_path / "t", [load, np.full((1, 8), 200)], 2)).verdict()
    assert said[0].startswith("Layer 0 is the worst balanced: expert 3 gets 4.50x")
    assert "counts alone have no interval" in said[0]
    two = report(write_counts(tmp_path / "two", [np.vstack([load, load[:, ::-1]])], 2, domains=("law", "math"))).verdict()
    assert any(s.startswith("Whether experts specialise by domain cannot be told from counts alone") for s in two)


def styled(root: Path, documents: int, domains: list[str]) -> Report:
    """Every document has one favourite expert of its own, whatever its domain."""
    rng = np.random.default_rng(4)
    document = np.arange(documents * 100) // 100
    ids = uniform_ids(rng, len(document), E, K)
    first = (document * 3 + 1) % E
    ids = np.where(rng.random(len(document))[:, None] < 0.7, np.stack([first, (first + 1) % E], axis=1), ids).astype(np.uint16)
    return report(write_trace(root, [ids], E, document=document, domain_of_document=domains))


@pytest.mark.parametrize(("documents", "domains"), [(4, "abcd"), (5, "abcda"), (8, "abcdefab"), (4, "aabb")])
def test_too_few_documents_say_neither_yes_nor_no(tmp_path: Path, documents: int, domains: str):
    said = styled(tmp_path / "t", documents, list(domains)).verdict()
    assert any(s.startswith(f"Too few documents to tell whether experts specialise by domain: {documents} documents") for s in said)
    assert not any(word in " ".join(said) for word in ("No expert", "Experts specialise", "overloads", "uneven", "is the worst", "Nothing"))


def test_fewer_than_five_documents_are_not_blamed_on_the_model(tmp_path: Path):
    said = styled(tmp_path / "few", 3, ["a"]).verdict()
    assert said[0].startswith("Too little to judge balance by")
    assert "fewer than 5 documents cannot tell the model from the text" in said[0]
    ids = np.tile([[1, 2]], (4_000, 1)).astype(np.uint16)
    one, many = (report(write_trace(tmp_path / str(n), [ids], E, document=np.arange(4_000) * n // 4_000)).verdict() for n in (1, 40))
    assert one[0].startswith("Too little to judge balance by")
    assert "cannot tell the model from the text" in one[1]
    assert many[0].startswith("Layer 0 is uneven (at least 1.2x and beyond chance): expert 1 gets 4.00x")
    assert many[1].endswith("not one of 4,000 tokens went there.")


def test_a_domain_of_few_documents_overloads_nothing(tmp_path: Path):
    rng = np.random.default_rng(5)
    ids, document = uniform_ids(rng, T, E, K), DOCUMENT
    for few, says in (([7], "cannot tell the domain from its text"), ([1, 7, 20, 33, 41, 50], '"law" overloads expert 3 of layer 0')):
        labels = ["law" if d in few else "prose" for d in range(60)]
        routed = np.where(np.isin(document, few)[:, None], [[3, 5]], ids).astype(np.uint16)
        said = "\n".join(report(write_trace(tmp_path / str(len(few)), [routed], E, document=document, domain_of_document=labels)).verdict())
        assert says in said
        assert ("overloads" in said) == (len(few) >= 5)


def test_what_pooling_hides_is_said_of_the_layers_looked_at(tmp_path: Path):
    rng = np.random.default_rng(6)
    ids = [uniform_ids(rng, T, E, K) for _ in range(3)]
    for r in (0, 1):  # each the other's complement
        ids[r] = np.where(rng.random(T)[:, None] < 0.4, np.argsort(rng.random((T, 4)), axis=1)[:, :2] + 4 * r, ids[r]).astype(np.uint16)
    trace = write_trace(tmp_path / "t", ids, E, document=DOCUMENT)
    assert any(s.startswith("Pooled over all layers") for s in report(trace).verdict())
    assert any(s.startswith("Pooled over the 2 layers selected") for s in report(trace, layers="0-1").verdict())
    assert not any(s.startswith("Pooled") for s in report(trace, layers="0,2").verdict())  # there it shows


RNG = np.random.default_rng(9)
ODD = {
    "a router without load": ([uniform_ids(RNG, 500, 8, 2), np.full((500, 2), 65535, np.uint16)], 8, "1 of 2 routers made no assignment"),
    "one token": ([np.array([[0, 1]], np.uint16)], 8, "1 token is too few"),
    "one expert": ([np.zeros((200, 1), np.uint16)], 1, "Nothing is wrong"),
    "every expert every time": ([uniform_ids(RNG, 200, 4, 4)], 4, "Nothing is wrong"),
    "two routers in a layer": ([uniform_ids(RNG, 900, 16, 4), uniform_ids(RNG, 900, 4, 1)], [16, 4], "layer 3 (router "),
    "more experts than a byte": ([uniform_ids(RNG, 500, 512, 10)], 512, "Too little to judge"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("error")
def test_odd_traces_have_a_whole_report(tmp_path: Path, case: str):
    ids, experts, says = ODD[case]
    layers = [3] * len(ids) if isinstance(experts, list) else None
    made = report(
        write_trace(tmp_path / "t", ids, experts, document=np.arange(len(ids[0])) // 20, domain_of_document=["a", "b"], layers=layers)
    )
    assert says in text_of(made)
    assert all(len(made.tables[name].columns) for name in TABLES)


# --- text


def text_of(made: Report) -> str:
    file = io.StringIO()
    terminal.print_report(made, file)
    return file.getvalue()


def test_text_in_a_file_keeps_every_column_and_number(made: Report):
    text = text_of(made)
    for name in ("balance", "load", "domains", "specialization", "vocabulary"):
        head = next(
            line
            for line in text.splitlines()
            if line.split()[:2] == ["layer", "router"] and line.split() == list(made.tables[name].columns)
        )
        assert head
    assert "…" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "more columns" not in text
    sentences = text[text.index("•") : text.index("\n\nload of")].splitlines()
    assert 90 < max(map(len, sentences)) <= 100
    assert " ".join("\n".join(sentences).split()) == " ".join(("• " + " • ".join(made.verdict())).split())
    assert "\x1b" not in text
    ratio = made.tables["load"]["load_ratio"].to_numpy()
    assert f"layer 3  {''.join(f'{v:5.2f}' for v in ratio[24:])}" in text


def test_wide_models_fit_their_line(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = uniform_ids(rng, 2_000, 300, 8)
    ids[:, 0] = 299
    made = report(write_trace(tmp_path / "t", [ids], 300, document=np.arange(2_000) // 100))
    text = text_of(made)
    row = next(line for line in text.splitlines() if line.startswith("layer 0 "))
    assert len(row) == len("layer 0  ") + 100
    assert row.endswith("█")  # the busiest expert shows through its neighbours
    assert "each character the most extreme of 3" in text


def test_a_terminal_gets_lines_it_can_hold(made: Report):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Screen()
    os.environ["COLUMNS"], before = "80", os.environ.get("COLUMNS")
    try:
        terminal.print_report(made, file)
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    for name, left_out in (("balance", 14), ("domains", 2)):
        assert f"+ {left_out} more columns: moe-inspect report" in text
        assert f"--table {name}" in text


def test_one_domain_has_nothing_to_compare(tmp_path: Path, made: Report):
    one = text_of(report(planted(tmp_path / "t"), domains="law"))
    assert "domains: only one, 'law', so none to compare it with" in one
    assert " lift" not in one
    assert " lift" in text_of(made)


def test_the_domains_shown_are_in_the_order_said(made: Report):
    shown = terminal._cut("domains", made.tables["domains"])
    above = shown["activation"] - shown["activation"] / shown["lift"]
    assert "by activation minus that mean" in terminal.CUTS["domains"][1]
    assert above.is_monotonic_decreasing
    assert len(shown) == terminal.ROWS


def test_progress_counts_each_decision_as_often_as_it_is_read(trace: Trace):
    told: list[int] = []
    made = report(trace, progress=told.append)
    assert made.tables["balance"].size
    assert sum(told) == T * 4
    assert made.tables["specialization"].size
    assert sum(told) == 2 * T * 4


def test_an_encoding_that_lacks_a_character_loses_that_character_only(cli: Cli, trace: Trace):
    done = cli("report", trace.path, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout.isascii()
    assert "? Layer 3 is the worst balanced" in done.stdout


def test_tokens_that_look_like_markup_are_text():
    frame = pd.DataFrame({"layer": [0, 0], "router": [0, 0], "token": ["[/bold]\n", ":smile:"]})
    file = io.StringIO()
    terminal.print_table(frame, file)
    assert "[/bold]\\n" in file.getvalue()
    assert ":smile:" in file.getvalue()


# --- the command


def test_csv_and_json_carry_every_digit(cli: Cli, trace: Trace, made: Report):
    expected = made.tables["balance"]
    text = cli("report", trace.path, "--table", "balance", "--format", "csv").stdout
    csv = pd.read_csv(io.StringIO(text), float_precision="round_trip")
    assert list(csv.columns) == list(expected.columns)
    assert csv["cv"].tolist() == expected["cv"].tolist()
    lines = [json.loads(line) for line in cli("report", trace.path, "--table", "balance", "--format", "json").stdout.splitlines()]
    assert [line["max_vio_low"] for line in lines] == expected["max_vio_low"].tolist()
    assert [type(line["dead_experts"]) for line in lines] == [int] * 4


def test_nan_is_null_in_json(cli: Cli, tmp_path: Path):
    write_trace(tmp_path / "t", [np.array([[0, 1]] * 20, np.uint16)], 4)
    line = json.loads(cli("report", "t", "--table", "specialization", "--format", "json").stdout)
    assert line["domain_mi_bits"] is None
    assert line["layer"] == 0
    summary = [json.loads(s) for s in cli("report", "t", "--table", "summary", "--format", "json").stdout.splitlines()]
    assert any(s["key"] == "note" and "one domain" in s["value"] for s in summary)


def test_parquet_into_a_pipe_and_a_file(trace: Trace, tmp_path: Path, made: Report):
    command = [sys.executable, "-m", "moe_inspect", "report", str(trace.path), "--table", "load", "--format", "parquet"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    subprocess.run([*command, "-o", str(tmp_path / "load.parquet")], check=True)
    for source in (io.BytesIO(piped), tmp_path / "load.parquet"):
        pd.testing.assert_frame_equal(pq.read_table(source).to_pandas(), made.tables["load"])


@pytest.mark.parametrize("ending", ["csv", "CSV", "json", "jsonl", "parquet", "txt", "md", ""])
def test_the_ending_of_the_file_says_the_format(cli: Cli, trace: Trace, tmp_path: Path, made: Report, ending: str):
    name = f"load.{ending}" if ending else "load"
    cli("report", trace.path, "--table", "load", "-o", name)
    data, expected = (tmp_path / name).read_bytes(), made.tables["load"]
    read = {"csv": pd.read_csv, "json": lambda f: pd.read_json(f, lines=True), "parquet": pd.read_parquet}
    form = {"jsonl": "json"}.get(ending.lower(), ending.lower())
    if form in read:
        assert read[form](io.BytesIO(data))["assignments"].tolist() == expected["assignments"].tolist()
        cli("report", trace.path, "--table", "load", "-o", name, "--format", "table")  # what is said outright goes first
        data = (tmp_path / name).read_bytes()
    lines = data.decode().splitlines()
    assert lines[0].split() == list(expected.columns)
    assert not any(line != line.rstrip() for line in lines)


def test_the_report_in_words_on_stdout_and_in_a_file(cli: Cli, trace: Trace, tmp_path: Path):
    done = cli("report", trace.path)
    assert "• Layer 3 is the worst balanced" in done.stdout
    assert done.stderr == ""
    assert cli("report", trace.path, "-o", "report.txt").stdout == ""
    assert (tmp_path / "report.txt").read_text() == done.stdout


def test_selecting_on_the_command_line(cli: Cli, trace: Trace):
    out = cli(
        "report", trace.path, "--table", "domains", "--format", "csv", "--layers", "1,3", "--domain", "law,code", "--domain", "math"
    ).stdout
    frame = pd.read_csv(io.StringIO(out))
    assert frame["layer"].unique().tolist() == [1, 3]
    assert sorted(frame["domain"].unique()) == ["code", "law", "math"]
    words = pd.read_csv(io.StringIO(cli("report", trace.path, "--table", "vocabulary", "--format", "csv", "--top", 2).stdout))
    assert words.groupby(["router", "expert"]).size().max() == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--format", "csv"], 2, "summary, balance, load, domains, specialization, vocabulary"),
        (["--format", "yaml", "--table", "load"], 2, "yaml"),
        (["-o", "load.csv"], 2, "-o load.csv is of one table: add --table summary"),
        (["--table", "load", "-o", "load.xlsx"], 2, "no format goes by this ending, add --format table, csv, json, parquet"),
        (["--layers", "3-1"], 1, "error: cannot read layers '3-1': write them like 0-3,7"),
        (["--table", "gini"], 1, "error: no table 'gini': there are summary, balance"),
        (["--layers", "9"], 1, "it has layers 0-3"),
        (["--domain", "opera"], 1, "it has code, law, math, prose"),
        (["--table", "load", "-o", "no/such/place.csv"], 1, "error: cannot write no/such/place.csv: No such file or directory"),
        (["-o", "no/such/place.txt"], 1, "error: cannot write no/such/place.txt"),
        (["--plots", "/dev/null/x"], 1, "error: cannot write /dev/null/x"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli: Cli, trace: Trace, arguments: list[str], code: int, says: str):
    done = cli("report", trace.path, *arguments, check=code)
    assert says in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1


def test_no_trace_there(cli: Cli):
    assert "no trace at nowhere" in cli("report", "nowhere", check=1).stderr


def test_head_ends_quietly(trace: Trace):
    for form in ("csv", "json", "table"):
        command = f"{sys.executable} -m moe_inspect report {trace.path} --table vocabulary --top 0 --format {form} | head -n 1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # a text table may fit the pipe before head closes it
        assert done.stderr == "" or (form == "table" and "more rows: --format" in done.stderr)
        assert len(done.stdout.splitlines()) == 1


def test_a_warning_goes_to_stderr(cli: Cli, tmp_path: Path):
    planted(tmp_path / "t", status="interrupted")
    done = cli("report", "t", "--table", "load", "--format", "csv")
    assert done.stderr.startswith("warning: this trace was interrupted")
    assert len(done.stdout.splitlines()) == 33


def test_plots_are_pictures(cli: Cli, trace: Trace, tmp_path: Path):
    from moe_inspect.report.plots import PLOTS

    done = cli("report", trace.path, "--table", "balance", "--plots", "pictures")
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert {"balance.png", "domains.svg", "load.png", "specialization.svg"} <= set(names)
    assert {Path(name).stem for name in names} <= set(PLOTS)
    for name in names:
        data = (tmp_path / "pictures" / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" if name.endswith("png") else data[:5] == b"<?xml"
        assert len(data) > 10_000
        assert name in done.stderr


def test_pictures_say_what_they_show(made: Report):
    from moe_inspect.report.plots import PLOTS

    figure = PLOTS["balance"](made)
    assert figure is not None
    figure.canvas.draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert axes is not None
    assert not legend.overlaps(axes)
    assert figure.axes[0].get_legend() is None
    figure = PLOTS["domains"](made)
    assert figure is not None
    assert "against its mean over the domains" in figure.get_suptitle()


def test_plots_without_domains_or_documents(tmp_path: Path):
    from moe_inspect.report.plots import write_plots

    made = report(write_counts(tmp_path / "t", [np.full((1, 8), 200)], 2))
    assert sorted(p.name for p in write_plots(made, tmp_path / "p")) == ["balance.png", "balance.svg", "load.png", "load.svg"]


def test_pictures_leave_the_notebooks_backend_alone(trace: Trace):
    code = (
        "import sys, moe_inspect; from moe_inspect.report.plots import PLOTS\n"
        f"PLOTS['load'](moe_inspect.report(r'{trace.path}')); print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "True False"


def test_a_page_from_the_command_line(cli: Cli, trace: Trace, tmp_path: Path):
    done = cli("report", trace.path, "--html", "page.html", "--table", "load", "--format", "csv")
    assert "wrote page.html" in done.stderr
    assert done.stdout.startswith("layer,router,expert")
    assert "Layer 3 is the worst balanced" in (tmp_path / "page.html").read_text()
    assert "cannot write no/such/page.html" in cli("report", trace.path, "--html", "no/such/page.html", check=1).stderr


def test_a_page_of_counts_says_what_it_lacks(tmp_path: Path):
    from moe_inspect.report.sections import report_page

    page = report_page(report(write_counts(tmp_path / "t", [np.full((1, 8), 200)], 2)))
    said = page.partition('class="left-out">')[2].partition("</p>")[0]
    assert "domains: there is only one" in said
    assert said.count("\n") == 0


def test_a_report_shows_itself_in_a_notebook(made: Report):
    html = made._repr_html_()
    assert "Layer 3 is the worst balanced" in html
    assert 'src="data:image/png;base64,' in html
    assert "<script" not in html
    assert len(html) < 300_000


def test_help_names_every_table_and_imports_nothing_heavy(cli: Cli):
    said = cli("report", "--help").stdout
    assert all(name in said for name in TABLES)
    code = (
        "import sys; from moe_inspect.cli import app; print([m for m in ('torch', 'pandas', 'pyarrow', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_torch_and_no_matplotlib_in_a_report(trace: Trace):
    code = (
        "import sys, io, moe_inspect.analysis, moe_inspect.report\n"
        "from moe_inspect.report.terminal import print_report\n"
        f"print_report(moe_inspect.report(r'{trace.path}'), io.StringIO())\n"
        "print([m for m in ('torch', 'transformers', 'triton', 'matplotlib', 'typer') if m in sys.modules], 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"
