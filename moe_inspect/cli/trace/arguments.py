"""What arguments of `moe-inspect trace` stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_inspect.model.custom.spec import RouterSpec


def routers_of(reference: str | None) -> list[RouterSpec] | None:
    """Of "FILE.py:NAME", a RouterSpec or several."""
    from moe_inspect.errors import MoeInspectError
    from moe_inspect.model.custom.spec import RouterSpec
    from moe_inspect.model.own import load_object

    if reference is None:
        return None
    found = load_object(reference)
    if isinstance(found, RouterSpec):
        return [found]
    if not hasattr(found, "__iter__"):
        kind = type(found).__name__
        raise MoeInspectError(f"{reference} is a {kind}, not a RouterSpec or a list of them")
    return list(found)


def ranges_of(given: list[str] | None, what: str = "layers") -> list[int] | None:
    """["0-3", "7"] → [0, 1, 2, 3, 7]."""
    from moe_inspect.trace.schema import parse_ranges

    return None if given is None else parse_ranges(",".join(given), what)
