"""Modules that are imported late: pandas, when something of it is first used (it takes 0.3 s, and
most commands that print one table do without), and the files of a folder that register what they
hold."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


class Later(ModuleType):
    """Stands for a module. It is not in `sys.modules`, where pyarrow would find and use it."""

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = getattr(import_module(self.__name__), name)
        return found


if not TYPE_CHECKING:
    pd = Later("pandas")


@cache
def import_folder(package: str) -> None:
    """Import every module of a folder, so that its decorators have run."""
    for file in iter_modules(import_module(package).__path__, f"{package}."):
        import_module(file.name)
