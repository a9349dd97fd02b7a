"""`make mutants`: plants mistakes in the package, one at a time, and prints those that no test
notices.

The mistakes are a fixed random sample of what cosmic-ray can do to the code that records and
analyses, and the list of tests/mutants.toml. Each is planted in a copy of the project, and the
tests that reach its line run: a first run of the whole suite under coverage tells which they are.
tests/mutants.toml also lists survivors that change nothing a user can see, with the reasons.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

from tests.support.mutation import changed_source

ROOT = Path(__file__).parents[2]
ROOMS = "analysis", "simulate", "comparison", "capture", "trace"
# operators that make a mistake a person might make; the others mostly make code that cannot run
OPERATORS = re.compile(
    "core/(ReplaceBinaryOperator_((Add|Sub|Mul|Div|FloorDiv|Mod)_(Add|Sub|Mul|Div)|Bit(Or|And)_Bit(Or|And))"
    "|ReplaceComparisonOperator|ReplaceUnaryOperator_(Delete_|USub_UAdd)|AddNot|Replace(True|False)With"
    "|Replace(And|Or)With|Replace(Break|Continue)With|NumberReplacer|ZeroIterationForLoop)"
)
SCOPES = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
# of the tests that reach a line, up to so many seconds: first those of the files that reach little
# beside its module
MOST_SECONDS = 120


@dataclass(frozen=True)
class Mutant:
    """A mistake: `source` is the whole file with it, `change` its line before and after."""

    file: str
    line: int
    function: str
    change: str
    source: str

    @property
    def key(self) -> str:
        return f"{self.file} {self.function}: {self.change}"


@cache
def statements(source: str) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]


def around(source: str, line: int) -> list[ast.stmt]:
    """The statements around a line, the innermost last."""

    def begin(statement: ast.stmt) -> int:
        return min(of.lineno for of in (statement, *getattr(statement, "decorator_list", ())))

    found = [n for n in statements(source) if begin(n) <= line <= (n.end_lineno or 0)]
    return sorted(found, key=lambda n: (n.lineno, -(n.end_lineno or 0)))


def is_compiled(scope: list[ast.stmt]) -> bool:
    decorators = [of for statement in scope for of in getattr(statement, "decorator_list", ())]
    return any("jit" in ast.unparse(of) for of in decorators)


def named(statement: ast.stmt) -> list[str]:
    """What a statement gives a name to."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return [n.id for of in targets if of for n in ast.walk(of) if isinstance(n, ast.Name)]


def mutant(file: str, source: str, changed: str) -> Mutant:
    """The mistake that `changed` makes in `source`."""
    before, after = source.splitlines(), changed.splitlines()
    line = next(n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    end = len(before) - len(after) + line + 1 if len(before) > len(after) else line + 1
    change = f"{' '.join(' '.join(before[line:end]).split())} → {' '.join(after[line].split())}"
    scopes = [of for of in around(source, line + 1) if isinstance(of, SCOPES)]
    function = ".".join(scope.name for scope in scopes)
    return Mutant(file, line + 1, function, change, changed)


def positions(source: str) -> Iterator[tuple[tuple[int, int], str, int]]:
    """Every place where an operator applies: its line and column, the operator, and as which of
    the places of that operator it comes."""
    operators = {name: get_operator(name)() for name in operator_names() if OPERATORS.match(name)}
    seen = Counter[str]()
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators.items():
            for start, _ in operator.mutation_positions(node):
                yield start, name, seen[name]
                seen[name] += 1


def meaning(source: str) -> str:
    """What a file does: its code without the annotations of types. "" where it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def sample(size: int, rooms: list[str]) -> list[Mutant]:
    """A random sample that stays the same where the code does: the places whose hashes are the
    lowest, one mistake a place."""
    ranked = list[tuple[str, str, str, int]]()
    for path in sorted(p for room in rooms for p in (ROOT / "moe_inspect" / room).rglob("*.py")):
        source, file = path.read_text(), str(path.relative_to(ROOT))
        lines, places = source.splitlines(), defaultdict[tuple[int, int], list](list)
        for start, name, occurrence in positions(source):
            places[start].append((name, occurrence))
        for (line, column), ways in places.items():
            text = f"{file} {lines[line - 1]} {column}"
            order = [hashlib.sha256(f"{text} {way}".encode()).hexdigest() for way, _ in ways]
            name, occurrence = ways[order.index(min(order))]
            ranked.append((hashlib.sha256(text.encode()).hexdigest(), file, name, occurrence))
    made = list[Mutant]()
    for _, file, name, occurrence in sorted(ranked):
        if len(made) == size:
            break
        source = (ROOT / file).read_text()
        changed = mutate_code(source, get_operator(name)(), occurrence)
        if meaning(changed) not in ("", meaning(source)):
            made.append(mutant(file, source, changed))
    return made


def planted(listed: list[dict[str, str]]) -> list[Mutant]:
    """The mistakes of tests/mutants.toml."""
    made = list[Mutant]()
    for of in listed:
        source = (ROOT / of["file"]).read_text()
        made.append(mutant(of["file"], source, changed_source(source, of["old"], of["new"])))
    return made


class Reached:
    """Which tests reach a line, and how long they take, from a run of the suite under coverage."""

    def __init__(self, project: Path, folder: Path) -> None:
        self.project = project  # as it was measured; a test may copy the package elsewhere
        self.coverage = CoverageData(str(folder / ".coverage"))
        self.coverage.read()
        self.seconds = Counter[str]()
        self.tests = defaultdict[str, list[str]](list)  # of each file, in order
        for case in ET.parse(folder / "junit.xml").iter("testcase"):
            if not (module := case.get("classname")):
                continue  # a file that is skipped as a whole
            file = module.replace(".", "/") + ".py"
            name = f"{file}::{case.get('name')}"
            if case.find("failure") is not None or case.find("error") is not None:
                print(f"left out, as it fails without a mistake: {name}")
                continue
            self.seconds[name] = float(case.get("time", 0))
            self.tests[file].append(name)

    @cached_property
    def _sources(self) -> dict[str, str]:
        paths = sorted((self.project / "moe_inspect").rglob("*.py"))
        return {str(path.relative_to(self.project)): path.read_text() for path in paths}

    def contexts(self, file: str, line: int) -> set[str]:
        """The tests that reach the statement of a line. Coverage sees nothing of what a compiler
        runs or an import does: there, those that reach a line that names the function, the class
        or the constant, or a line that names what that line defines, and so on."""
        places, seen = {(file, line)}, set[tuple[str, str]]()
        while places:
            if found := {test for place in places for test in self._reaching(*place)}:
                return found
            names = {(name, at[0]) for at in places for name in self._named_by(*at)} - seen
            places = {
                place
                for name, home in names
                for place in self._words[name]
                if not name.startswith("_") or place[0] == home  # private to its file
            }
            seen |= names
        return set()

    def _reaching(self, file: str, line: int) -> list[str]:
        scope = around(self._sources[file], line)
        # what an import does shows only the first test that imports it; what is compiled, only a
        # test without the compiler
        if not any(isinstance(of, SCOPES[:2]) for of in scope) or is_compiled(scope):
            return []
        last = scope[-1]
        end = last.end_lineno or 0
        if hasattr(last, "body") and not isinstance(last, SCOPES[:2]):
            end = last.body[0].lineno - 1  # an if or a loop: its head alone
        lines = {line, *range(last.lineno, end + 1)}
        return [test for of in lines for test in self._by_line(file).get(of, ()) if test]

    def _named_by(self, file: str, line: int) -> list[str]:
        scope = around(self._sources[file], line)
        functions = [of for of in scope if isinstance(of, SCOPES[:2])]
        return named((functions or scope)[0 if functions else -1]) if scope else []

    @cached_property
    def _words(self) -> dict[str, list[tuple[str, int]]]:
        """The lines that hold each word."""
        words = defaultdict[str, list[tuple[str, int]]](list)
        for file, text in self._sources.items():
            for n, line in enumerate(text.splitlines(), 1):
                for word in re.findall(r"\w+", line):
                    words[word].append((file, n))
        return words

    @cache  # noqa: B019
    def _by_line(self, file: str) -> dict[int, list[str]]:
        return self.coverage.contexts_by_lineno(str(self.project / file))

    def _lines_reached(self, file: str) -> Counter[str]:
        """How many lines of a file each file of tests reaches."""
        return Counter(
            test_file
            for contexts in self._by_line(file).values()
            for test_file in {context.partition("::")[0] for context in contexts}
        )

    @cached_property
    def _reached(self) -> Counter[str]:
        """How many lines of all files each file of tests reaches."""
        return sum(map(self._lines_reached, self._sources), Counter[str]())

    def choose(self, mutant: Mutant) -> list[str]:
        """The tests to run. What a fixture reached counts for all tests of its file."""
        tests = set[str]()
        for context in self.contexts(mutant.file, mutant.line):
            # "test|phase" in the test's process, "test (phase)" in those that it starts
            test, phase = re.fullmatch(r"(.*)(?:\|| \()(\w+)\)?", context, re.DOTALL).groups()
            is_fixture = phase in ("setup", "teardown")
            tests.update(self.tests[test.partition("::")[0]] if is_fixture else [test])
        tests &= set(self.seconds)
        by_file = defaultdict[str, list[str]](list)
        for test in sorted(tests, key=self.seconds.__getitem__):
            by_file[test.partition("::")[0]].append(test)
        here = self._lines_reached(mutant.file)
        chosen, total = list[str](), 0.0
        for test_file in sorted(by_file, key=lambda file: -here[file] / self._reached[file]):
            for test in by_file[test_file]:
                if not chosen or total + self.seconds[test] < MOST_SECONDS:
                    chosen.append(test)
                    total += self.seconds[test]
        return chosen


def pytest_runtest_setup() -> None:
    """As a plugin of pytest: what a test starts is measured under the name of the test."""
    if os.environ.pop("COVERAGE_PROCESS_CONFIG", ""):
        os.environ["COVERAGE_PROCESS_START"] = os.environ["COVERAGE_SETTINGS"]


def run_suite(project: Path, folder: Path) -> None:
    """The whole suite of a copy of the project under coverage, with the name of the test beside
    each line. Tests of a full disk fail: what coverage writes fills it too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = folder / "coverage.ini"
    settings.write_text(
        f"[run]\nbranch = true\nsource = moe_inspect\nparallel = true\npatch = subprocess\n"
        f"data_file = {folder}/.coverage\ncontext = ${{PYTEST_CURRENT_TEST-}}\n"
    )
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile"),
            *("-p", "tests.support.mutants"),
            *("--no-loadscope-reorder", "--cov", f"--cov-config={settings}", "--cov-context=test"),
            *("--cov-report=", f"--junitxml={folder}/junit.xml"),
        ],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "COVERAGE_SETTINGS": str(settings)},
    )


def copy_of_project(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def are_there(project: Path, tests: Iterable[str]) -> bool:
    """Whether pytest finds all these tests: one that is missing would fail without a mistake."""
    listed = project / "build" / "tests.txt"
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"@{listed}"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, stdout=subprocess.DEVNULL)
    return done.returncode == 0


def survives(project: Path, mutant: Mutant, tests: list[str], most_seconds: float) -> bool:
    """Whether all tests pass with the mistake, within so many seconds."""
    listed, file = project / "build" / "tests.txt", project / mutant.file
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("\n".join(tests))
    before = file.read_text()
    file.write_text(mutant.source)
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"@{listed}"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=(project / "build" / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return run.wait(most_seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        os.killpg(run.pid, signal.SIGKILL) if run.poll() is None else None
        file.write_text(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many random mistakes")
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS), help="where they are planted")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many run at once")
    parser.add_argument("--again", action="store_true", help="use the last run of the suite")
    options = parser.parse_args()
    folder = ROOT / "build" / "mutants"
    known = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
    mutants = [*sample(options.sample, options.rooms), *planted(known.get("planted", []))]
    reasons = {of["mutant"]: of["reason"] for of in known.get("survivor", [])}
    projects = SimpleQueue[Path]()
    for n in range(options.workers):
        projects.put(copy_of_project(folder / f"project{n}"))
    if not options.again:
        run_suite(folder / "project0", folder / "suite")
    reached = Reached(folder / "project0", folder / "suite")
    if not are_there(folder / "project0", reached.seconds):
        sys.exit("tests have changed since the last run of the suite: leave out --again")

    def judge(mutant: Mutant, tests: list[str]) -> dict[str, object]:
        project, begun = projects.get(), perf_counter()
        try:
            seconds = sum(map(reached.seconds.__getitem__, tests))
            survived = not tests or survives(project, mutant, tests, 60 + 5 * seconds)
        finally:
            projects.put(project)
        took = round(perf_counter() - begun)
        outcome = "survived" if survived else "killed"
        print(f"{outcome} {took:4} s {len(tests):5} tests  {mutant.key}", flush=True)
        return {"mutant": mutant.key, "survived": survived, "tests": len(tests), "seconds": took}

    with ThreadPoolExecutor(options.workers) as pool:
        judged = list(pool.map(judge, mutants, map(reached.choose, mutants)))
    (folder / "result.json").write_text(json.dumps(judged, indent=1, ensure_ascii=False))
    survivors = [str(of["mutant"]) for of in judged if of["survived"]]
    print(f"\n{len(judged) - len(survivors)} of {len(judged)} killed. Survivors:")
    for key in survivors:
        print(f"  {key}\n    {reasons.get(key, 'no reason known: a test is missing')}")
    sys.exit(any(key not in reasons for key in survivors))


if __name__ == "__main__":
    main()
