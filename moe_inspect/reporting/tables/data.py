"""What a report is made of: the trace, what of it is selected, its counts, thresholds and tables.
Tables, checks and charts are functions of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property, wraps
from typing import Any, TypeVar

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace, too_many_pairs
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.balance import STARVED, UNEVEN, whole_passes
from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.reporting.tables.registry import TABLES, LazyTables
from moe_inspect.text import no_such
from moe_inspect.trace.reader import Trace

Row = Mapping[str, Any]  # column → value


def records(table: pd.DataFrame) -> list[Row]:
    """The rows of a table, in plain numbers and texts."""
    rows: Any = table.to_dict("records")
    return rows


@dataclass(frozen=True)
class Thresholds:
    """uneven: max_vio of a router. overloaded, starved: load ratio of an expert. specialised:
    information that the domain carries about the expert, beyond chance, as a share of
    the log₂ E bits that identify it. Untrained routers reach 0.08 from the text alone (maximum over
    six architectures of 8 to 128 experts, five random initialisations each, on the bundled corpus:
    benchmarks/untrained.py), the trained sample traces 0.15 and 0.19; another text or model has its
    own baseline, which a trace with --random-init gives. no_domain: bits that chance gives up
    to which a negative result means anything. tie: tie rate of the logits. repeated: share of
    tokens in runs of identical rows."""

    uneven: float = UNEVEN
    overloaded: float = 2.0
    starved: float = STARVED
    specialised: float = 0.1
    no_domain: float = 0.2
    tie: float = 0.01
    repeated: float = 0.01

    def facts(self) -> list[tuple[str, object]]:
        """The rows of `summary` on them: (key, condition)."""
        meaning = {
            "uneven": f"max_vio >= {self.uneven:g} and above chance",
            "overloaded": f"load_ratio >= {self.overloaded:g}",
            "starved": f"load_ratio < {self.starved:g}",
            "specialised": (
                f"(domain_mi_bits - domain_mi_null_bits) / log2(experts) >= {self.specialised:g}"
            ),
            "no_domain": f"99th percentile of domain_mi_null_bits < {self.no_domain:g}",
            "tie": f"tie_rate >= {self.tie:g}",
            "repeated": f"share of tokens in runs of identical rows >= {self.repeated:g}",
        }
        return [(f"threshold_{name}", text) for name, text in meaning.items()]


def thresholds_with(changes: Mapping[str, float] | None = None) -> Thresholds:
    """The defaults with these changes. Raises MoeInspectError for an unknown name or a value that
    is negative or not finite."""
    changes, names = changes or {}, [f.name for f in fields(Thresholds)]
    for name, value in changes.items():
        if name not in names:
            raise MoeInspectError(no_such("threshold", name, names))
        if not 0 <= value < float("inf"):
            raise MoeInspectError(f"threshold {name} is {value:g}: give a number from 0 up")
    return replace(Thresholds(), **changes)


Result = TypeVar("Result")
TOKEN_IDS = frozenset({"token_ids"})
# what counts alone tell besides sums: their shards have an order; some say what experts are worth
OF_COUNTS = frozenset({"windows", "worth"})
PAIRED = frozenset({"pairs", "transitions"})  # experts × experts, of each router
STATUS = {
    "recording": (
        "this trace is still being recorded, or was cut off: the report covers what is committed "
        "so far"
    ),
    "interrupted": "this trace was interrupted: the report covers what was committed",
}


class ReportData:
    """The arguments are those of `report`. Nothing is counted before it is asked for. `costs`: the
    Simulation of a step, where its times are known. `history`: the windows and the alarms of a
    training history. `made`: function → its result, see `once`."""

    costs: Any = None
    history: Any = None

    def __init__(
        self,
        trace: Trace,
        selection: Selection,
        *,
        top: int = 20,
        window: int | None = None,
        thresholds: Mapping[str, float] | None = None,
        progress: Callable[[int], None] | None = None,
        baseline: ReportData | None = None,
    ):
        if top < 0:
            raise MoeInspectError(
                f"top is {top}: give the number of token ids per expert, 0 for all"
            )
        if window is not None and window < 1:
            raise MoeInspectError(f"window is {window}: give the tokens per window, 1 or more")
        self.trace, self.selection, self.top, self.progress = trace, selection, top, progress
        self.window, self.baseline = window, baseline
        self.thresholds: Thresholds = thresholds_with(thresholds)
        self.tables = LazyTables(self)
        self.made: dict[object, Any] = {}
        self._counts: Counts | None = None

    @property
    def counts(self) -> Counts:
        return self.counts_for()

    def counts_for(self, *wants: str) -> Counts:
        """The counts with at least these among them. What is not counted yet takes another pass:
        `prepare` saves that."""
        asked = (
            BASE.union(OF_COUNTS & set(wants))
            if self.trace.counts_only
            else BASE.union(wants) - (set() if "logits" in self.trace.tables else {"logits"})
        )
        had = self._counts
        if had is None:
            had = self._counted(asked)
        elif asked - had.wants == TOKEN_IDS:
            had.by_token_id = self._counted(TOKEN_IDS).by_token_id
            had.wants |= TOKEN_IDS
        elif not asked <= had.wants:
            before, kept = had, had.wants & TOKEN_IDS
            had = self._counted((asked | before.wants) - kept)
            had.by_token_id |= before.by_token_id
            had.wants |= kept
        self._counts = had
        return had

    def counts_of_all_domains(self) -> Counts:
        """What a domain that was selected is compared with."""
        if self.selection.domains is None:
            return self.counts
        return self._counted(BASE, replace(self.selection, domains=None))

    def _counted(self, wants: frozenset[str], selection: Selection | None = None) -> Counts:
        return count_trace(
            self.trace,
            selection or self.selection,
            wants,
            window=self.window,
            top=self.top,
            progress=self.progress,
        )

    def prepare(self, tables: Iterable[str]) -> None:
        """Counts in one pass what these tables need."""
        wants = {want for name in tables if name in TABLES for want in TABLES[name].wants}
        self.counts_for(*(wants - PAIRED if self.without_pairs else wants))

    @property
    def without_pairs(self) -> bool:
        """Whether there are too many experts to count pairs of them."""
        return too_many_pairs(self.trace, self.selection.routers)

    def decisions(self, table: str) -> Counts:
        """The counts for a table that needs decisions; an error where the trace has counts only,
        which tables of OF_COUNTS take too."""
        wants = TABLES[table].wants
        if self.trace.counts_only and (not wants or wants - OF_COUNTS):
            raise MoeInspectError(
                f"{self.trace.path} holds counts only, no decisions: no {table} table; "
                f"{self.trace.more_than_counts}"
            )
        if self.without_pairs and wants & PAIRED:
            raise MoeInspectError(
                f"{self.trace.path} has too many experts to count pairs of them: no {table} table; "
                "select fewer layers"
            )
        return self.counts_for(*wants)

    def rows_of(self, table: str, router: int) -> pd.DataFrame:
        """The rows of a router: of many domains, a table of all routers takes much memory."""
        of_one = copy(self)
        of_one.selection, of_one.made = replace(self.selection, routers=(router,)), {}
        return pd.DataFrame(TABLES[table].make(of_one), copy=False)

    @property
    def dropped(self) -> int:
        """Decisions that were lost while recording."""
        return int(self.trace.manifest.get("counts", {}).get("dropped", 0))

    @property
    def warning(self) -> str | None:
        """What to know before believing any of it: the trace is not complete, something was
        dropped, or its model has a quirk."""
        lost = f"{self.dropped:,} decisions were dropped while recording" if self.dropped else None
        quirk = self.trace.manifest.get("model", {}).get("note")
        return "; ".join(s for s in (STATUS.get(self.trace.status), lost, quirk) if s) or None

    @cached_property
    def loaded(self) -> list[Row]:
        """The rows of `balance`, complete, of the routers that have any load."""
        return records(self.tables.complete("balance").dropna(subset=["max_vio"]))

    def pooled_max_over_mean(self) -> float | None:
        """max_over_mean of the load of all routers together; None where their experts differ."""
        loads = [self.counts.load_E(r) for r in self.selection.routers]
        if len(loads) < 2 or len({len(load_E) for load_E in loads}) > 1:
            return None
        load_E = np.sum(loads, axis=0)
        return float(load_E.max() / load_E.mean()) if load_E.any() else None


def once(function: Callable[[ReportData], Result]) -> Callable[[ReportData], Result]:
    """A function of ReportData that runs once per report: `made` holds its result."""

    @wraps(function)
    def run_once(data: ReportData) -> Result:
        if function not in data.made:
            data.made[function] = function(data)
        return data.made[function]

    return run_once


def worst_of(rows: Iterable[Row]) -> Row | None:
    """The row of `balance` with the highest max_vio; None where there is none."""
    return max(rows, key=lambda row: row["max_vio"], default=None)


def whole_batches(batches: dict[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    """Those of `RouterCounts.batches` that max_vio_batch is of."""
    whole_S = whole_passes(np.array(list(batches), np.int64))
    return {size: batches[size] for size, whole in zip(batches, whole_S, strict=True) if whole}
