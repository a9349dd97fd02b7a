"""The layout of the package: which room may import which, no circles, files and folders that a
reader can take in."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

import moe_inspect

ROOT = Path(moe_inspect.__file__).parent
FILES_PER_FOLDER = 20
LINES_PER_FILE = 600
LONG = {"capture/hook/kernels.py"}  # each kernel beside its torch reference
HEAVY = {"torch", "transformers", "triton", "tokenizers", "accelerate"}
# imports of the files next to the rooms; a room states its own in the docstring of its __init__
FILES_MAY_IMPORT: dict[str, set[str]] = {
    "text": set(),
    "progress": set(),
    "later": set(),
    "errors": {"text"},
    "workers": {"errors"},
    "files": set(),
    "doctor": {"capture", "errors", "progress", "text"},
}
# these stand above all rooms, and no room imports them
ENTRIES = {"", "__main__", "cli", "public", "making", "recording"}
# an analysis on a laptop needs these and has no torch; what reads or writes files of torch imports
# it in the function that does
LIGHT = {
    "trace",
    "exporters",
    "importers",
    "analysis",
    "alarms",
    "reporting",
    "comparison",
    "checking",
    "simulate",
    "watch",
}
ROOMS = {path.parent.name: path.parent for path in ROOT.glob("*/__init__.py")}


def stated_imports(folder: Path) -> set[str]:
    """What the last paragraph of a room's docstring says that it may import."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    line = re.fullmatch(r"May import: (.+)\.", " ".join(docstring.split("\n\n")[-1].split()))
    assert line, f"{folder.name}/__init__.py: the last paragraph does not say what it may import"
    return set() if line[1] == "nothing of the package" else set(line[1].split(", "))


@cache
def modules() -> dict[str, Path]:
    """Dotted name inside the package ("trace.reader", "trace") → file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


# left to right, as the tokens flow; a room imports only rooms that it lists
MAY_IMPORT = FILES_MAY_IMPORT | {
    name: stated_imports(folder) for name, folder in ROOMS.items() if name not in ENTRIES
}


@cache
def imports(name: str) -> tuple[tuple[str, bool], ...]:
    """The absolute names that a module imports, anywhere in it, and whether once it is loaded: in
    no function, and not for type checkers alone."""
    tree, found = ast.parse(modules()[name].read_text()), list[tuple[str, bool]]()
    inside = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        names = list[str]()
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [(name, id(node) not in inside) for name in names]
    return tuple(found)


def graph(names: Iterable[str]) -> dict[str, set[str]]:
    """Module → modules of the package that it imports."""
    arrows: dict[str, set[str]] = {}
    for name in names:
        arrows[name] = set()
        for target, _ in imports(name):
            inner = target.removeprefix("moe_inspect.")
            if target != inner and inner in modules() and inner != name:
                arrows[name].add(inner)
        # `from package import module` names the package too: the arrow is to the module
        arrows[name] -= {
            t for t in arrows[name] if any(o.startswith(f"{t}.") for o in arrows[name])
        }
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def room(name: str) -> str:
    return name.split(".")[0]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(graph(modules())) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "c", "b", "a"]  # control


def test_no_folder_imports_itself_by_way_of_others() -> None:
    """A folder and the folders inside it are one whole; their files may use each other."""
    folder_of = {name: path.relative_to(ROOT).parent for name, path in modules().items()}
    arrows: dict[str, set[str]] = {}
    for name, targets in graph(modules()).items():
        here = folder_of[name]
        folders = {folder_of[target] for target in targets}
        apart = {f for f in folders if not f.is_relative_to(here) and not here.is_relative_to(f)}
        arrows.setdefault(str(here), set()).update(map(str, apart))
    assert arrows["reporting/tables"], "control: some are found"
    assert circle(arrows) == []


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_lies_before_it(name: str) -> None:
    for module, targets in graph(n for n in modules() if room(n) == name).items():
        beyond = {t for t in targets if room(t) != name and room(t) not in MAY_IMPORT[name]}
        assert not beyond, f"{module} imports {', '.join(sorted(beyond))}"


@pytest.mark.parametrize("name", sorted(ROOMS.keys() - ENTRIES))
def test_a_room_imports_all_that_it_says(name: str) -> None:
    arrows = graph(n for n in modules() if room(n) == name)
    assert {room(t) for targets in arrows.values() for t in targets} - {name} == MAY_IMPORT[name]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in modules()} - ENTRIES <= set(MAY_IMPORT)
    assert circle(MAY_IMPORT) == []


def loaded_by(names: Iterable[str]) -> set[str]:
    """The modules of the package that are loaded once these are imported."""
    seen, rest = set(), set(names)
    while rest:
        name = rest.pop()
        seen.add(name)
        at_once = {
            target.removeprefix("moe_inspect.")
            for target, at_module_level in imports(name)
            if at_module_level
        }
        rest |= (at_once & modules().keys()) - seen
    return seen


def test_what_is_right_of_the_trace_loads_no_torch() -> None:
    def heavy(names: Iterable[str]) -> list[str]:
        return sorted(
            f"{name} imports {target}"
            for name in loaded_by(names)
            for target, at_module_level in imports(name)
            if at_module_level and target.split(".")[0] in HEAVY
        )

    assert heavy(name for name in modules() if room(name) in LIGHT) == []
    assert heavy(name for name in modules() if room(name) == "capture")  # control


def test_only_the_command_line_imports_typer() -> None:
    users = {
        room(name)
        for name, path in modules().items()
        for target, _ in imports(name)
        if target.split(".")[0] in ("typer", "click")
    }
    assert users <= {"cli", "__main__"}
    assert "cli" in users  # control


def test_nothing_inside_imports_the_public_names() -> None:
    for name in modules():
        if room(name) not in ("", "__main__", "cli"):
            public = [t for t, _ in imports(name) if t == "moe_inspect"]
            assert not public, f"{name} imports moe_inspect itself"


def test_a_folder_can_be_taken_in_at_a_glance() -> None:
    for folder in sorted({path.parent for path in modules().values()}):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        others = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "_."]
        assert len(list(folder.glob("*.py"))) <= FILES_PER_FOLDER, folder
        assert len(files) + len(others) > 1, f"{folder}: a folder with one file in it is no folder"


def test_a_file_can_be_read_in_one_sitting() -> None:
    lines = {
        str(path.relative_to(ROOT)): path.read_text().count("\n") for path in modules().values()
    }
    assert {file: n for file, n in lines.items() if n > LINES_PER_FILE and file not in LONG} == {}
