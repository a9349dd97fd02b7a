"""Findings: what a check of the report states, how serious it is, which router it is about, and the
numbers in it. The checks are functions of the other files of this folder, each with the decorator
`check`. Also words that several of them use. A row is one of the table `balance`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, cast, get_args

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, LONG_DOCUMENT
from moe_inspect.later import import_folder, pd
from moe_inspect.reporting.tables.data import ReportData, Row, once, records
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import layer_label, plural

Severity = Literal["critical", "warning", "note", "good"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
# Sections of the verdict, in the order in which findings as serious are read, each with the group
# of the page that its findings are part of. Findings about the data are part of no group.
SECTIONS = {
    "fit": "",  # whether the trace is fit to be judged
    "load": "Balance",
    "cost": "Serving",
    "averages": "Balance",  # what averages hide
    "specialization": "Specialization",
    "drift": "Balance",
    "router": "Router",
    "sample": "",  # how much text was judged
}
BEYOND_LONG_DOCUMENTS = f"beyond chance even if {LONG_DOCUMENT:,} tokens choose as one"
FEW_DOCUMENTS = f"with fewer than {FEWEST_TO_JUDGE} documents this may be the text, not the model."
# of misrecorded routes, compared with a right trace or not, and options of `compare` that mend them
NEVER_FED = "tokens that were never fed, or padding"
OF_ANOTHER_ROUTER = "such as an MTP layer's, or were never recorded"
DROP_ZERO_FILLED, DROP_LAST = "--drop-zero-filled", "--drop-last"
SHIFT_ROUTES, SHIFT_LAYERS, LAYERS = "--shift-routes", "--shift-layers", "--layers"


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
    values: Row = field(default_factory=dict[str, object], hash=False)
    group: str = field(default="", repr=False)

    @property
    def is_grave(self) -> bool:
        return self.severity in ("critical", "warning")


Check = TypeVar("Check", bound=Callable[[ReportData], Finding | None])
CHECKS: list[tuple[str, Callable[[ReportData], Finding | None]]] = []


def check(section: str) -> Callable[[Check], Check]:
    """Register a check of the report, in one of SECTIONS. Its name is the kind of its finding."""

    def register(function: Check) -> Check:
        CHECKS.append((section, function))
        return function

    return register


def every_check() -> list[tuple[str, Callable[[ReportData], Finding | None]]]:
    """Section and function of each check in the files of this folder, in the order of SECTIONS,
    within a section of the names of the files, and within a file as written."""
    import_folder(__package__ or "")
    order = list(SECTIONS)
    return sorted(CHECKS, key=lambda entry: (order.index(entry[0]), entry[1].__module__))


def finding(
    kind: str, severity: Severity, text: str, about: Row | None = None, **values: object
) -> Finding:
    """A Finding on the router of a table's row, or on the whole trace. NaN becomes None."""
    layer, router = (None, None) if about is None else (int(about["layer"]), int(about["router"]))
    return Finding(kind, severity, layer, router, text, {k: _plain(v) for k, v in values.items()})


# what the checks of a report return; `findings` adds the kind, which is the name of the check
found = partial(finding, "")
critical, warning, note, good = (partial(found, severity) for severity in SEVERITIES)


def most_important_first(found: list[Finding]) -> list[Finding]:
    """Critical findings, then warnings, then the others; within these in the order given."""
    return sorted(found, key=lambda f: min(SEVERITIES.index(f.severity), SEVERITIES.index("note")))


MOST_OTHERS = 5  # findings below the headline, unless more of them are grave


@dataclass(frozen=True)
class Verdict:
    """Findings in the order in which a report shows them. `warnings`: why the trace may not be fit
    to be judged. `headline`: the gravest finding, and what imbalance costs. `others`: the findings
    below it. `sample`: how much text was judged."""

    warnings: list[Finding]
    headline: Finding
    others: list[Finding]
    sample: Finding

    @property
    def most_others(self) -> int:
        """Number of the other findings to show: five, or all grave ones."""
        return max(MOST_OTHERS, sum(one.is_grave for one in self.others))


@once
def findings(data: ReportData) -> list[Finding]:
    """Findings of every check, most important first."""
    return most_important_first(
        [
            replace(result, kind=result.kind or check.__name__, group=SECTIONS[section])
            for section, check in every_check()
            if (result := check(data)) is not None
        ]
    )


def verdict_of(data: ReportData) -> Verdict:
    """The findings of a report, arranged as they are shown."""
    by_kind = {one.kind: one for one in findings(data)}
    sample, cost = by_kind.pop("sample"), by_kind.get("busiest_gpu")
    warnings = [one for one in by_kind.values() if not one.group and one.is_grave]
    judged = [one for one in by_kind.values() if one not in warnings and one is not cost]
    headline = judged[0]
    if cost:
        headline = replace(headline, text=f"{headline.text} {cost.text}")
    return Verdict(warnings, headline, judged[1:], sample)


@table()
def verdict(data: ReportData) -> pd.DataFrame:
    """One row per finding, most important first."""
    return verdict_table(findings(data))


def verdict_table(found: Sequence[Finding], values: bool = False) -> pd.DataFrame:
    """One row per finding: severity, kind, layer, router, text; `values`: and the numbers."""
    columns = ["severity", "kind", "layer", "router", "text", *(["values"] if values else [])]
    rows = [[getattr(one, name) for name in columns] for one in found]
    kinds = dict.fromkeys(("severity", "kind", "text"), "str")
    kinds |= dict.fromkeys(("layer", "router"), "Int64")
    return pd.DataFrame(rows, columns=columns).astype(kinds)


def _plain(value: Any) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in cast("list[object]", value)]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def top_row(rows: pd.DataFrame, by: pd.Series) -> Row:
    """The row of a table in which `by` is highest."""
    return records(rows.loc[[by.idxmax()]])[0]


def above_chance(data: ReportData, row: Row) -> bool:
    """Whether chance hardly makes the busiest expert of any router as busy: with so few documents
    that their p-value is unknown, nothing is above chance."""
    if data.counts.documents_unknown:
        return beyond_documents(row["max_vio"], row["expected_by_chance"] - 1)
    return row["busiest_p"] < ALPHA


def beyond_documents(excess: float, floor: float) -> bool:
    """Of counts, whose documents are unknown: whether no documents explain a load so far above the
    mean, where independent tokens give `floor` by chance."""
    return _design_effect_needed(excess, floor) >= LONG_DOCUMENT


def _design_effect_needed(excess: float, floor: float) -> float:
    """With which chance alone would explain a load so far above the mean."""
    return (excess / floor) ** 2 if floor > 0 else math.inf if excess > 0 else 0.0


def beyond(data: ReportData) -> str:
    """The words for what is beyond chance: of counts, with the documents that are assumed."""
    return BEYOND_LONG_DOCUMENTS if data.counts.documents_unknown else "beyond chance"


def expected_by_chance(data: ReportData, row: Row) -> str:
    """ "expected by chance: 1.02x", and of what where that is not documents like these."""
    of = " of independent tokens" if data.counts.documents_unknown else ""
    return f"expected by chance{of}: {row['expected_by_chance']:.2f}x"


def explained(data: ReportData, row: Row, sure: bool) -> str:
    """The words for a load that is not beyond chance, and may be chance where that is not `sure`:
    of counts, with what would explain it."""
    needed = _design_effect_needed(row["max_vio"], row["expected_by_chance"] - 1)
    if not data.counts.documents_unknown or needed <= 1:
        return "chance explains" if sure else "may be chance"
    return f"chance explains if {math.ceil(needed):,} tokens choose as one"


def uneven(data: ReportData, row: Row) -> bool:
    """Whether max_vio reaches the threshold `uneven` and is above chance."""
    return row["max_vio"] >= data.thresholds.uneven and above_chance(data, row)


def load_after(data: ReportData, row: Row) -> str:
    """ "1.15x after": the load of the busiest expert of a row of `chosen`, after drops."""
    load_E = data.counts.load_E(int(row["router"]))
    return f"{load_E[int(row['busiest_expert'])] / max(load_E.mean(), 1e-9):.2f}x after"


def few_documents(data: ReportData) -> bool:
    """Whether there are too few documents to tell the model from the text."""
    return not (data.counts.documents_unknown or data.counts.documents_tell)


def few_tokens(T: int, E: int, floor: float, uneven: float) -> tuple[str, int]:
    """The words for tokens so few that chance alone gives a max_vio of `floor`, above `uneven`; and
    how many would be enough."""
    enough = int(float(f"{T * (floor / uneven) ** 2:.1e}"))  # it falls with the root of the tokens
    said = (
        f"{plural(T, 'token')} {'is' if T == 1 else 'are'} few for {E} experts: by chance alone "
        f"the busiest gets {1 + floor:.2f}x the mean load. About {enough:,} tokens would bring "
        f"that under {1 + uneven:g}x."
    )
    return said, enough


def name_of(data: ReportData, row: Row) -> str:
    """ "layer 3": the router of a table's row."""
    return f"layer {layer_label(data.trace.routers, int(row['router']))}"


def capital(text: str) -> str:
    """The text at the beginning of a sentence."""
    return text[:1].upper() + text[1:]
