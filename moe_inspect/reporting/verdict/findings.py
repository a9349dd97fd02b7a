"""What a check of the report finds: one sentence, how serious it is, which router it is about, and
the numbers it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast, get_args

Severity = Literal["critical", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    kind: the check that found it, a stable name in snake case. severity: "critical" (the model or
    the trace is broken: a collapsed layer, a missing rank), "warning" (something to act on: uneven
    load, dead experts), "note" (to know when reading the rest; also: too little data to tell),
    "good" (checked, nothing wrong). layer, router: what it is about, None where that is the whole
    trace. text: a sentence or two in plain English. values: the numbers of the text, by name; None
    where one has no value. group: the part of a report's page that it stands in; "" where it is
    about the data."""

    kind: str
    severity: Severity
    layer: int | None
    router: int | None
    text: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    group: str = field(default="", repr=False)


def finding(
    kind: str, severity: Severity, text: str, about: Mapping[str, Any] | None = None, **values: Any
) -> Finding:
    """A Finding on the router of the table row `about`, or on the whole trace. `values` may be
    NumPy's; NaN becomes None."""
    layer, router = (None, None) if about is None else (int(about["layer"]), int(about["router"]))
    return Finding(kind, severity, layer, router, text, {k: _plain(v) for k, v in values.items()})


# what the checks of a report return; `findings` adds the kind, which is the name of the check
found = partial(finding, "")
critical, warning, note, good = (partial(found, severity) for severity in SEVERITIES)


def most_important_first(found: list[Finding]) -> list[Finding]:
    """Critical findings, then warnings, then the others; within these in the order given."""
    return sorted(found, key=lambda f: min(SEVERITIES.index(f.severity), SEVERITIES.index("note")))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
