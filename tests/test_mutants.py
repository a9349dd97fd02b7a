"""The tool behind `make mutants`."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from coverage import CoverageData

from tests.conftest import ROOT
from tests.support import mutants

PLANTED = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["planted"]
MODULE = "def larger(a: int, b: int) -> int:\n    if a > b:\n        return a\n    return b\n"


def test_every_planted_mistake_still_has_its_place_and_changes_the_code() -> None:
    for made, of in zip(mutants.planted(PLANTED), PLANTED, strict=True):
        before = mutants.meaning((ROOT / of["file"]).read_text())
        assert mutants.meaning(made.source) not in ("", before), of["name"]


def test_a_planted_mistake_without_a_place_is_refused() -> None:
    for old in ("no such line", "return"):
        with pytest.raises(AssertionError, match="times in"):
            mutants.planted([{"file": PLANTED[0]["file"], "old": old, "new": "pass"}])


def test_the_sample_is_the_same_each_time_and_changes_the_code() -> None:
    first, again = (mutants.sample(5, ["watch"]) for _ in "12")
    assert first == again
    assert len({made.key for made in first}) == 5
    for made in first:
        assert mutants.meaning(made.source) != mutants.meaning((ROOT / made.file).read_text())


def test_annotations_are_no_part_of_what_code_does() -> None:
    assert mutants.meaning(MODULE) == mutants.meaning(MODULE.replace("b: int", "b: int | None"))
    assert mutants.meaning(MODULE) != mutants.meaning(MODULE.replace("a > b", "a < b"))


LESS = MODULE.replace("a > b", "a < b")


@pytest.mark.parametrize(
    ("check", "changed", "survived"),
    [
        ("larger(2, 1) == 2", LESS, False),
        ("larger(1, 1) == 1", LESS, True),
        ("larger(1, 1) == 1", MODULE.replace("larger", "smaller"), False),
        ("time.sleep(60)", LESS, False),
    ],
    ids=["noticed", "not noticed", "nothing can be imported", "a test that does not end"],
)
def test_a_mistake_survives_where_all_tests_pass(
    check: str, changed: str, survived: bool, tmp_path: Path
) -> None:
    (tmp_path / "code_of_it.py").write_text(MODULE)
    (tmp_path / "test_code.py").write_text(
        f"import time\nfrom code_of_it import larger\ndef test_it():\n    assert {check}\n"
    )
    mistake = mutants.mutant("code_of_it.py", MODULE, changed)
    assert mistake.key.startswith("code_of_it.py larger: ")
    seconds = 2 if "sleep" in check else 100
    assert mutants.survives(tmp_path, mistake, ["test_code.py::test_it"], seconds) is survived
    assert (tmp_path / "code_of_it.py").read_text() == MODULE


SOURCES = {
    "rooms.py": (
        "FEW = 3\n\n@njit(cache=True)\ndef _loop(n):\n    return n + 1\n\n"
        "def ask(n):\n    if n > FEW:\n        return _loop(n)\n    return n\n"
    ),
    "other.py": "def _loop(n):\n    return n\n\ndef elsewhere(n):\n    return _loop(n)\n",
}
REACHED = {
    "tests/test_first.py::test_imports|setup": {"rooms.py": [1, 3, 4, 7], "other.py": [1, 4]},
    "tests/test_whole.py::test_all|run": {"rooms.py": [3, 4, 7, 8, 9], "other.py": [2, 5]},
    "tests/test_rooms.py::test_asks|run": {"rooms.py": [5, 8, 9]},
    "tests/test_rooms.py::test_is_small|run": {"rooms.py": [8, 10]},
}


@pytest.mark.parametrize(
    ("line", "tests"),
    [
        (10, ["test_is_small"]),
        (9, ["test_asks", "test_all"]),  # first of the file that reaches little else
        (1, ["test_asks", "test_is_small", "test_all"]),  # a constant: those that reach its use
        (5, ["test_asks", "test_all"]),  # compiled: of its callers, in its own file alone
    ],
)
def test_the_tests_that_reach_a_line_are_chosen(
    line: int, tests: list[str], tmp_path: Path
) -> None:
    cases, coverage = "", CoverageData(str(tmp_path / ".coverage"))
    for name, source in SOURCES.items():
        (tmp_path / "moe_inspect").mkdir(exist_ok=True)
        (tmp_path / "moe_inspect" / name).write_text(source)
    for n, (context, lines) in enumerate(REACHED.items()):
        coverage.set_context(context)
        coverage.add_lines({str(tmp_path / "moe_inspect" / k): of for k, of in lines.items()})
        # as of a test that copies the package
        coverage.add_lines({f"/elsewhere/moe_inspect/{k}": range(1, 11) for k in lines})
        file, _, test = context.partition("|")[0].partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        cases += f'<testcase classname="{module}" name="{test}" time="{n}"/>'
    coverage.write()
    skipped = '<testcase classname="" name="tests.test_skipped"/>'
    (tmp_path / "junit.xml").write_text(f"<suite>{cases}{skipped}</suite>")
    reached = mutants.Reached(tmp_path, tmp_path)
    assert {*reached.tests} == {"tests/test_first.py", "tests/test_whole.py", "tests/test_rooms.py"}
    mistake = mutants.Mutant("moe_inspect/rooms.py", line, "", "", "")
    assert [test.partition("::")[2] for test in reached.choose(mistake)] == tests


def test_a_test_that_is_not_there_is_told_before_it_counts_as_failed(tmp_path: Path) -> None:
    (tmp_path / "test_code.py").write_text("def test_it():\n    pass\n")
    assert mutants.are_there(tmp_path, ["test_code.py::test_it"])
    assert not mutants.are_there(tmp_path, ["test_code.py::test_it", "test_code.py::test_other"])
