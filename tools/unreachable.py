"""`python -m tools.unreachable`: finds dead code by reachability, and exits with 1 if there is any.

Starts at the public names, the commands and the entry points, and follows names: a function, class,
method, field or constant is alive if living code outside of it names it, and a parameter with a
default if a call passes it. Names are matched by their text, not by their type, so some dead code
is missed. What is found is dead, or is named only where this script cannot see it: then it belongs
into EXCUSED, with the reason.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# decorators that put a function into a registry, or hand it to a framework
REGISTERING = {
    *("metric", "table", "chart", "media", "importer", "algorithm", "repeated", "of_router"),
    *(
        "check",
        "of_domains",
        "policy",
        "probability",
        "letters",
        "callback",
        "page",
        "register_fake",
    ),
}
# files whose strings name functions and modules, to be imported when they are needed
LAZY = {
    *("cli/__init__.py", "importers/__init__.py", "exporters/__init__.py"),
    "capture/engine/sender.py",  # the program of the process that writes
}
# modules that are passed as values: `by.load(…)` is one of their functions
AS_VALUES = {"kernels_numba.py"}
# bases whose members others read by position, by name or as a whole
WHOLE = {
    "NamedTuple": "its fields are unpacked by position",
    "TypedDict": "its fields are the keywords of a function",
    "Enum": "its members are found by value",
    "StrEnum": "its members are found by value",
    "Protocol": "it describes objects of other packages",
    "Options": "its fields are the options of a command",
}
# "Class", whose members are all alive, "Class.member" or "name" → who names it
EXCUSED = {
    "_repr_html_": "notebooks call it",
    "GroupedCommand": "typer calls its methods",
    "GroupOfCommands": "typer calls its methods",
    "_Console": "rich calls its methods",
    "Sent": "the standard library reads from it",
    "RouterCounts": "metrics take its fields as arguments of the same name",
    "CorpusStats": "the manifest has its fields, by name",
    "Settings": "the process that writes gets its fields, by name",
    "TransferTime": "its fields are those of a file of measured times",
    "lfu": "a policy of simulate cache, found by its name",
    "belady": "a policy of simulate cache, found by its name",
    "Metric.axes": "the property tests of all metrics read it",
    "Recorder": "moe_inspect.record returns it",
    "_command.value": "the engine's server calls it",
    "tokens_of.context": "a method of Trace",
    "Follower.clock": "tests set the time",
    "Watched.clock": "tests set the time",
    "Traces.describe": "tests describe models of their own",
    "count_trace.threads": "tests set their number",
}
ANY = 1_000


@dataclass
class Definition:
    """A name, and what its code names: plain names, and members (`.name`)."""

    name: str
    place: str
    owner: Definition | None = None
    is_member: bool = False
    is_root: bool = False
    bases: set[str] = field(default_factory=set[str])
    names: set[str] = field(default_factory=set[str])
    members: set[str] = field(default_factory=set[str])
    # those with a default, and their positions
    parameters: dict[str, int] = field(default_factory=dict[str, int])
    # what is called, with how many arguments by position (ANY: unknown), and the keywords
    calls: list[tuple[str, int, set[str]]] = field(default_factory=list[tuple[str, int, set[str]]])

    @property
    def title(self) -> str:
        return f"{self.owner.name}.{self.name}" if self.owner else self.name


class Reader(ast.NodeVisitor):
    """Reads the definitions of a module, and what each of them names."""

    def __init__(self, path: Path, package: Path):
        self.path, self.found = path, list[Definition]()
        self.is_lazy = path.relative_to(package).as_posix() in LAZY
        self.module = Definition(path.stem, f"{path}:1", is_root=True)
        self.current, self.owner = self.module, None
        self.local, self.callees = [set[str]()], set[int]()
        tree = ast.parse(path.read_text())
        # `module.name` names something of the module
        self.modules = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        self.visit(tree)

    def define(self, node: ast.AST, name: str, *bodies: ast.AST | None) -> Definition:
        at = getattr(node, "lineno", 1)
        made = Definition(name, f"{self.path}:{at}", self.owner, self.owner is not None)
        self.found.append(made)
        self.within(made, bodies)
        return made

    def within(self, made: Definition, bodies: Iterable[ast.AST | None]) -> None:
        before, self.current = self.current, made
        for body in bodies:
            if body is not None:
                self.visit(body)
        self.current = before

    @property
    def is_outside(self) -> bool:
        """Whether this is the body of a module or of a class, not of a function."""
        return len(self.local) == 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if not self.is_outside:
            self.generic_visit(node)
            return
        made = self.define(node, node.name, *node.decorator_list, *node.bases, *node.keywords)
        made.bases = {ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases}
        owner, self.owner = self.owner, made
        self.within(made, node.body)
        self.owner = owner

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not self.is_outside:
            self.function(node)
            return
        made = self.define(node, node.name)
        owner, self.owner = self.owner, None
        self.within(made, node.decorator_list)
        decorators = [ast.unparse(each).partition("(")[0] for each in node.decorator_list]
        registered = {each.rpartition(".")[2] for each in decorators}
        of_position = node.args.posonlyargs + node.args.args
        of_position = of_position[made.is_member and "staticmethod" not in registered :]
        made.parameters = {
            arg.arg: n
            for n, arg in enumerate(of_position)
            if n >= len(of_position) - len(node.args.defaults)
        }
        optional = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        made.parameters |= {arg.arg: ANY for arg, default in optional if default is not None}
        made.is_root = bool(registered & REGISTERING) or (
            made.is_member and node.name.startswith("__") and node.name.endswith("__")
        )
        self.within(made, [node.args, *([node.returns] if node.returns else [])])
        before, self.current = self.current, made
        self.function(node)
        self.current, self.owner = before, owner

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if not self.is_outside:
            for each in (*node.decorator_list, node.args):
                self.visit(each)
        self.local.append(bound(node))
        for statement in node.body:
            self.visit(statement)
        self.local.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self.local.append({a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)})
        self.visit(node.body)
        self.local.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [one for target in node.targets for one in named(target)]
        if self.is_outside and len(names) == 1 and not names[0].startswith("__"):
            self.define(node, names[0], node.value)
        else:
            self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self.is_outside and isinstance(node.target, ast.Name):
            self.define(node, node.target.id, node.annotation, node.value)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self.local):
            self.current.names.add(node.id)
            self.take_value(node, node.id)

    def take_value(self, node: ast.AST, name: str) -> None:
        """Notes a function that is handed on: whoever gets it may call it with any argument."""
        if id(node) not in self.callees:
            self.current.calls.append((name, ANY, set()))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.current.members.add(node.attr)
            self.take_value(node, node.attr)
            if isinstance(node.value, ast.Name) and node.value.id in self.modules:
                self.current.names.add(node.attr)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        of = getattr(function, "id", getattr(function, "attr", ""))
        if of in ("getattr", "hasattr", "attrgetter", "methodcaller", "setattr", "TraceMethod"):
            for each in ast.walk(node):
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    self.current.members.add(each.value)
                    self.current.names.add(each.value)
        unknown = any(isinstance(each, ast.Starred) for each in node.args)
        keywords = {each.arg or "**" for each in node.keywords}
        self.current.calls.append((of, ANY if unknown else len(node.args), keywords))
        self.callees.add(id(function))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and self.is_lazy:
            words = set(re.findall(r"\w+", node.value))
            self.current.names |= words
            self.current.members |= words


def named(target: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def bound(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The local names of a function, but for those that it imports."""
    names = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            names.add(each.id)
        elif isinstance(each, ast.FunctionDef | ast.ClassDef) and each is not node:
            names.add(each.name)
    return names


def public_names(root: Path) -> set[str]:
    """Names that others import: in stubs, in entry points, and listed in docs/commands.md."""
    names = {"main"}
    for stub in (root / "moe_inspect").rglob("__init__.pyi"):
        names |= set(re.findall(r"import \w+ as (\w+)", stub.read_text()))
    listed = (root / "docs/commands.md").read_text() if (root / "docs/commands.md").exists() else ""
    names |= set(re.findall(r"^\.\. auto\w+:: (?:\w+\.)*(\w+)$", listed, re.M))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for points in (project.get("scripts", {}), *project.get("entry-points", {}).values()):
        names |= {target.split(":")[-1] for target in points.values()}
    return names


def words_of_templates(package: Path) -> set[str]:
    """What the templates of pages name."""
    texts = [path.read_text() for path in package.rglob("templates/*.html")]
    parts = [part for text in texts for part in re.findall(r"{[{%](.*?)[%}]}", text, re.S)]
    return {word for part in parts for word in re.findall(r"\w+", part)}


def inherited(one: Definition, classes: dict[str, Definition]) -> Iterator[str]:
    for base in one.bases:
        yield base
        if base in classes and base != one.name:
            yield from inherited(classes[base], classes)


class Search:
    """What is alive in the package of a repository."""

    def __init__(self, root: Path):
        package = root / "moe_inspect"
        readers = [Reader(path, package) for path in sorted(package.rglob("*.py"))]
        self.modules = [reader.module for reader in readers]
        self.found = [one for reader in readers for one in reader.found]
        self.commands = str(package / "cli")
        self.public, words = public_names(root), words_of_templates(package)
        self.names, self.members = self.public | words, set(words)
        self.alive = set[int]()
        classes = {one.name: one for one in self.found if one.owner is None}
        self.open = set(self.public)  # classes whose public members are alive
        for one in classes.values():
            one.bases = {*inherited(one, classes)}
            self.open |= one.bases if one.name in self.public else set()
        self.take(self.modules)
        while more := [one for one in self.dead() if self.reached(one)]:
            self.take(more)

    def take(self, living: Iterable[Definition]) -> None:
        for one in living:
            self.alive.add(id(one))
            self.names |= one.names
            self.members |= one.members

    def reached(self, one: Definition) -> bool:
        owner = one.owner
        if one.is_root or one.title in EXCUSED or one.name in EXCUSED:
            return owner is None or id(owner) in self.alive
        if owner is None:
            as_values = Path(one.place.rpartition(":")[0]).name in AS_VALUES
            return one.name in self.names or (as_values and one.name in self.members)
        if id(owner) not in self.alive:
            return False
        if owner.bases & WHOLE.keys() or self.is_open(one):
            return True
        return one.name in self.members | self.names

    def is_open(self, one: Definition) -> bool:
        """Whether users may name it."""
        if one.owner is None:
            return one.name in self.public
        return one.owner.name in EXCUSED or (
            one.owner.name in self.open and not one.name.startswith("_")
        )

    def dead(self) -> Iterator[Definition]:
        return (one for one in self.found if id(one) not in self.alive)

    def dead_parameters(self) -> Iterator[Definition]:
        """Parameters with a default that no call passes."""
        calls = dict[str, list[tuple[int, set[str]]]]()
        for one in (*self.modules, *self.found):
            for name, number, keywords in one.calls:
                calls.setdefault(name, []).append((number, keywords))
        for one in self.found:
            is_made = one.owner is not None and one.name == "__init__"
            called = one.owner.name if one.owner and is_made else one.name
            is_open = self.is_open(one) or (one.is_root and not is_made) or called in self.open
            if is_open or id(one) not in self.alive or one.place.startswith(self.commands):
                continue
            for parameter, position in one.parameters.items():
                passed = (
                    number > position or number == ANY or {parameter, "**"} & keywords
                    for number, keywords in calls.get(called, [(ANY, set[str]())])
                )
                if not any(passed) and f"{called}.{parameter}" not in EXCUSED:
                    yield Definition(f"{called}({parameter}=)", one.place)


def main() -> int:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    search = Search(root)
    dead = [*search.dead(), *search.dead_parameters()]
    for one in dead:
        print(f"{one.place.removeprefix(f'{root}/')} {one.title}")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
