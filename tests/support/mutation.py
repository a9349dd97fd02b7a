"""Puts a mistake into a module on purpose, and says whether a check fails for it.

A mutation is a fragment of the source and the wrong one. The fragment must be in the source exactly
once, so that no mutation goes stale unseen.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

# a check takes far less; a mutation that makes it hang is none that a test would report
SECONDS = 300

Place = tuple[str, str, int]  # file, qualified name, line


def changed_source(module: ModuleType, old: str, new: str) -> str:
    """The module's source with `new` for `old`. Line breaks and the commas before closing brackets
    do not count: a formatter moves them."""
    source = Path(module.__file__ or "").read_text()
    pieces = [re.escape(piece) for piece in re.findall(r"\w+|[^\w\s]", old)]
    loose = "".join(
        (r"\s*,?\s*" if piece in (r"\)", r"\]", r"\}") else r"\s*") * (n > 0) + piece
        for n, piece in enumerate(pieces)
    )
    found = [m.span() for m in re.finditer(loose, source)]
    assert len(found) == 1, f"{len(found)} times in {module.__name__}: {old}"
    ((start, end),) = found
    return source[:start] + new.strip() + source[end:]


def load_file(name: str, file: Path) -> Any:
    """The module `name`, run from a file."""
    spec: Any = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutation(module: ModuleType, old: str, new: str) -> Callable[[], None]:
    """What puts the mistake into the functions of `module`, wherever they are imported."""
    file = module.__file__ or ""
    sources = Path(file).read_text(), changed_source(module, old, new)
    right, wrong = (_codes(compile(source, file, "exec", dont_inherit=True)) for source in sources)
    changed = {_place(code): w for code, w in zip(right, wrong, strict=True) if code != w}
    functions, caches = _living()
    mutated = [(f, code) for place, code in changed.items() for f in functions.get(place, ())]
    assert mutated, f"changes no function of {module.__name__}: {old}"

    def put() -> None:
        for function, code in mutated:
            function.__code__ = code
        for cache in caches:  # what they hold was computed before
            cache.cache_clear()

    return put


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of every function, in the order of the source."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _place(code: CodeType) -> Place:
    return code.co_filename, code.co_qualname, code.co_firstlineno


@functools.cache
def _living() -> tuple[dict[Place, list[FunctionType]], list[Any]]:
    """The package's functions in this process, and its caches."""
    functions: dict[Place, list[FunctionType]] = {}
    caches: list[Any] = []
    for thing in gc.get_objects():
        if type(thing) is FunctionType and (thing.__module__ or "").startswith("moe_inspect."):
            functions.setdefault(_place(thing.__code__), []).append(thing)
        elif type(thing) is functools._lru_cache_wrapper and (thing.__module__ or "").startswith(
            "moe_inspect."
        ):
            caches.append(thing)
    return functions, caches


def fails(check: Callable[[], object]) -> bool:
    """Whether `check` does, in a process of its own, which may be brought down. One that was
    forked while a thread held a lock waits for it forever: then another is."""
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=check)
        child.start()
        child.join(SECONDS)
        if not child.is_alive():
            return child.exitcode != 0
        child.kill()
        child.join()
    pytest.fail(f"does not end within {SECONDS} s, twice")
