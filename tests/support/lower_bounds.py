"""Prints pyproject.toml's lower bounds as constraints for pip, for `make test-oldest`."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement

from tests.conftest import ROOT

TOOLS = ("dev", "docs", "fuzz")  # what tests and builds the project, not what it runs on


def constraints() -> list[str]:
    """One `name==version` per dependency of the package and of its extras, with its marker."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    for extra in extras.keys() - set(TOOLS):
        lines += extras[extra]
    return sorted({_lowest(Requirement(line)) for line in lines})


def _lowest(requirement: Requirement) -> str:
    bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
    assert len(bounds) == 1, f"{requirement}: no lower bound"
    marker = f"; {requirement.marker}" if requirement.marker else ""
    return f"{requirement.name}=={bounds[0]}{marker}"


if __name__ == "__main__":
    print("\n".join(constraints()))
