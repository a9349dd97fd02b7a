"""Of two traces, one of counts by document at least: do they use the same experts for a document?

S documents, U clusters of documents, E experts, L pairs of routers. An axis of 2 is the two traces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import CLUSTERS, Counts
from moe_inspect.analysis.counting.samples import document_loads
from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.comparison import result
from moe_inspect.comparison.result import LOAD_TABLES, OF_DECISIONS, SIDES, Row
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import Report, report
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict.findings import Finding, capital, finding
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace


class OfLoads(result.Paired):
    """Traces A and B, at least one of which holds counts only, each with its report."""

    refused = OF_DECISIONS

    def __init__(
        self, a: Trace, b: Trace, options: result.PairSettings, progress: result.Progress = None
    ):
        super().__init__(a, b, options)
        self.reports: dict[str, Report] = {}
        for side, trace, routers in zip(SIDES, (a, b), zip(*self.pairs, strict=True), strict=True):
            self.reports[side] = report(
                trace,
                layers=sorted({trace.routers[r].layer for r in routers}),
                domains=options.domains,
                phase=options.phase,
                progress=progress,
            )

    @property
    def why(self) -> str:
        of = dict.fromkeys(str(trace.path) for trace in self.traces if trace.counts_only)
        return f"{' and '.join(of)} {'hold' if len(of) > 1 else 'holds'} counts only, no decisions"

    @cached_property
    def sets(self) -> DocumentSets:
        """The experts of the documents that both traces have, by number, DOCUMENTS of them at most.
        MoeInspectError where documents are unknown, or are not the same."""
        if any(trace.counts_only and not trace.by_document for trace in self.traces):
            raise MoeInspectError(self.why)
        reports = self.reports.values()
        tokens_a, tokens_b = (_tokens(of) for of in reports)
        tokens = pd.concat([tokens_a, tokens_b], axis=1, join="inner", keys=SIDES).sort_index()
        a, b = (document_loads(of.trace, of.selection) for of in reports)
        document_S, of_a, of_b = np.intersect1d(a.document_S, b.document_S, return_indices=True)
        if not len(document_S):
            raise MoeInspectError("A and B have no document of the same number")
        if len(differ := tokens[tokens["a"] != tokens["b"]]):
            said = f"{differ['a'].iloc[0]:,} tokens in A, {differ['b'].iloc[0]:,} in B"
            raise MoeInspectError(f"document {differ.index[0]} has {said}: not the same text")
        load_SE = [(a.load_SE[r][of_a], b.load_SE[other][of_b]) for r, other in self.pairs]
        used = [(a_SE > 0, b_SE > 0) for a_SE, b_SE in load_SE]
        apart_SL = np.stack([_apart(*both) for both in used], axis=1)
        other_SL = np.stack([_apart(of_a, np.roll(of_b, 1, 0)) for of_a, of_b in used], axis=1)
        if len(document_S) < 2:
            other_SL = np.full(other_SL.shape, np.nan)
        only = len(tokens_a) - len(tokens), len(tokens_b) - len(tokens)
        return DocumentSets(apart_SL, other_SL, a.domain_S[of_a], load_SE, len(tokens), only)

    @cached_property
    def paired(self) -> list[np.ndarray]:
        """The load of the documents that both traces have, by pair of routers, if any. Int [2, U,
        E], by cluster of documents if the traces have the same ones, else by document."""
        if self.why_not("agreement"):
            return []
        if any(self.sets.only):
            return [np.stack(of) for of in self.sets.load_SE]
        a, b = (self.reports[side].counts for side in SIDES)
        tokens_U, tokens_b_U = (_by_cluster(of, of.tokens_U) for of in (a, b))
        paired = list[np.ndarray]()
        for r, other in self.pairs if np.array_equal(tokens_U, tokens_b_U) else ():
            of_both = (a, a.of[r]), (b, b.of[other])
            both = [_by_cluster(of, counts.assignments_UE) for of, counts in of_both]
            paired.append(np.stack(both)[:, tokens_U > 0])
        return paired

    @cached_property
    def moved(self) -> list[np.ndarray]:
        """How much more load each of these has in B. By chance A and B could as well be exchanged
        in a document. float64 [U, E], where a trace has no load NaN"""
        moved = list[np.ndarray]()
        for a_UE, b_UE in self.paired:
            total_a, total_b = nan_for_zero(np.array([a_UE.sum(), b_UE.sum()]))
            moved.append(b_UE - a_UE * (total_b / total_a))
        return moved


@dataclass(frozen=True)
class DocumentSets:
    """apart_SL, other_SL: 1 − |A ∩ B| ÷ |A ∪ B| of the sets of experts that a document's tokens
    went to, and with another document in B; NaN where neither trace used an expert. domain_S: of
    A. load_SE: of A and of B, by pair of routers. shared: how many documents both traces have, of
    which S are compared; only: how many A alone has, and B."""

    apart_SL: np.ndarray
    other_SL: np.ndarray
    domain_S: np.ndarray
    load_SE: list[tuple[np.ndarray, np.ndarray]]
    shared: int
    only: tuple[int, int]

    @property
    def compared(self) -> str:
        """Of which documents something is said, where a trace has others; else nothing."""
        S = len(self.domain_S)
        part = f"{S:,} of " if self.shared > S else ""
        where = f"In {part}the {plural(self.shared, 'document')} that both have, "
        return where if any(self.only) else ""

    def mean(self, apart_SX: np.ndarray) -> tuple[float, float, float]:
        """Of some routers, and its 95 % interval over documents."""
        apart_S, known_S = np.nansum(apart_SX, axis=1), (~np.isnan(apart_SX)).sum(1)
        ends = unc.ratio_interval(apart_S, known_S, unc.resample_weights(self.domain_S))
        return tt.set_distance(float(apart_S.sum()), float(known_S.sum())), *ends


def _tokens(made: Report) -> pd.Series:
    """Of each document, by its number."""
    documents = made.trace.documents()
    if made.selection.domains:
        documents = documents[documents["domain"].isin(made.selection.domains)]
    return documents.set_index("document")["tokens"]


def _by_cluster(counts: Counts, values_UX: np.ndarray) -> np.ndarray:
    """Sums over the domains, which may be named otherwise in the other trace. [CLUSTERS, …]"""
    of_cluster = np.zeros((CLUSTERS, *values_UX.shape[1:]), values_UX.dtype)
    np.add.at(of_cluster, [cluster for _, cluster in counts.units], values_UX)
    return of_cluster


def _apart(a_SE: np.ndarray, b_SE: np.ndarray) -> np.ndarray:
    return 1 - (a_SE & b_SE).sum(1) / nan_for_zero((a_SE | b_SE).sum(1))


@table(by_router=("set_distance",), tables=LOAD_TABLES)
def agreement(data: OfLoads) -> pd.DataFrame:
    """One row per router: how far the sets of experts that A and B use for a document are apart,
    mean over documents with its 95 % interval, and those of different documents."""
    sets, rows = data.sets, list[Row]()
    for n, (r, _) in enumerate(data.pairs):
        value, low, high = sets.mean(sets.apart_SL[:, [n]])
        row = {"documents": len(sets.apart_SL), "set_distance": value}
        row |= {"set_distance_low": low, "set_distance_high": high}
        row["set_distance_of_others"] = sets.mean(sets.other_SL[:, [n]])[0]
        rows.append({**data.place(r), **row})
    return pd.DataFrame(rows)


def same_experts(data: OfLoads) -> Iterator[Finding]:
    """How far the sets of experts of a document are apart, where documents are known."""
    if data.why_not("agreement"):
        return
    sets, (S, L) = data.sets, data.sets.apart_SL.shape
    (value, low, high), (others, _, _) = map(sets.mean, (sets.apart_SL, sets.other_SL))
    if np.isnan(value):
        return
    where = f"{plural(S, 'document')} and {plural(L, 'router')}"
    interval = f"95% interval {low:.2%} to {high:.2%}"
    interval = "too few documents for an interval" if np.isnan(low) else interval
    beside = "" if np.isnan(others) else f"; {others:.0%} between different documents"
    text = (
        f"Of the experts that A or B uses for a document, {value:.2%} are used by one of them "
        f"alone (mean over {where}; {interval}{beside})."
    )
    if not value:
        text = f"A and B use the same experts for a document ({where})."
    yield finding(
        "same_experts", "note" if value else "good", text, set_distance=value, documents=S
    )


def counts_only(data: OfLoads) -> Iterator[Finding]:
    """That only the load is compared, and what that leaves open."""
    of = [name for name, x in (("A", data.a), ("B", data.b)) if x.counts_only]
    holds = f"{' and '.join(of)} {'hold' if len(of) > 1 else 'holds'} counts only"
    compared = "loads and the experts of each document are compared"
    same = "The documents that both have are equally long."
    if why := data.why_not("agreement"):
        compared = "only loads are compared"
        why = "it is unknown whether both saw the same text" if why == data.why else why
        same = f"{capital(why)}; different text changes the load too."
    text = f"{holds}: {compared}, not decisions. {same}"
    yield finding("counts_only", "note", text)


def missing_documents(data: OfLoads) -> Iterator[Finding]:
    """Documents that only one of the traces has."""
    if data.why_not("agreement"):
        return
    sets = data.sets
    said = [
        f"only {name} has {n:,} of its {plural(n + sets.shared, 'document')}"
        for name, n in zip("AB", sets.only, strict=True)
        if n
    ]
    if said:
        text = f"{capital(' and '.join(said))}: load_shift and agreement leave them out, load and "
        text += "balance do not."
        only_a, only_b = sets.only
        values: Row = {"shared": sets.shared, "only_a": only_a, "only_b": only_b}
        yield finding("missing_documents", "note", text, **values)
