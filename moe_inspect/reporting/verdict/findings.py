"""What a check of the report finds: one sentence, how serious it is, which router it is about, and
the numbers it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

Severity = Literal["critical", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
# group of a page → the kinds that stand in it; the others are about the data
KINDS = {
    "Balance": (
        "balance",
        "routers_without_load",
        "dead_experts",
        "overloaded_experts",
        "starved_experts",
        "least_used_expert",
        "averaging_hides",
        "drift",
        "overloading_domain",
        "unused_in_domain",
    ),
    "Specialization": (
        "domain_specialization",
        "domain_beyond_token",
        "token_specialization",
        "hard_tokens",
        "committee",
        "signature",
        "paths",
    ),
    "Serving": ("idle_gpus", "uneven_batches"),
    "Router": ("router_ties",),
}
GROUP_OF = {kind: group for group, kinds in KINDS.items() for kind in kinds}


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    kind: the check that found it, a stable name in snake case. severity: "critical" (the model or
    the trace is broken: a collapsed layer, a missing rank), "warning" (something to act on: uneven
    load, dead experts), "note" (to know when reading the rest; also: too little data to tell),
    "good" (checked, nothing wrong). layer, router: what it is about, None where that is the whole
    trace. text: a sentence or two in plain English. values: the numbers of the text, by name; None
    where one has no value."""

    kind: str
    severity: Severity
    layer: int | None
    router: int | None
    text: str
    values: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    @property
    def group(self) -> str:
        """The group of the page that it stands in; "" where it is about the data."""
        return GROUP_OF.get(self.kind, "")


def finding(
    kind: str, severity: Severity, text: str, about: Mapping[str, Any] | None = None, **values: Any
) -> Finding:
    """A Finding on the router of the table row `about`, or on the whole trace. `values` may be
    NumPy's; NaN becomes None."""
    layer, router = (None, None) if about is None else (int(about["layer"]), int(about["router"]))
    return Finding(kind, severity, layer, router, text, {k: _plain(v) for k, v in values.items()})


def most_important_first(found: list[Finding]) -> list[Finding]:
    """Critical findings, then warnings, then the others; within these in the order given."""
    return sorted(found, key=lambda f: min(SEVERITIES.index(f.severity), SEVERITIES.index("note")))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[Any]", value)]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
