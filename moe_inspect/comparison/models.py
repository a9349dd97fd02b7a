"""Two models that cannot be compared decision by decision, side by side.

E experts, k experts per token, D domains, S spans, V texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.comparison import result
from moe_inspect.comparison import spans as of_spans
from moe_inspect.comparison.aligning import pairing
from moe_inspect.comparison.aligning.misaligned import replicas
from moe_inspect.comparison.result import COLOURS, MODEL_TABLES, SIDES, Row
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.charts.spec import Axis, Chart, Line, Panel, known_interval
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.registry import Excerpt, table
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import layer_label, plural, ranges, readable
from moe_inspect.trace.reader import Trace

WHOLE = ["balance", "specialization"]


class Models(result.Comparison):
    """Traces A and B. Nothing is read before it is asked for. `reasons`: why they are different,
    beside what their shapes and tokenizers tell. `asked`: by the option `side_by_side`."""

    def __init__(
        self,
        a: Trace,
        b: Trace,
        options: result.PairSettings,
        *,
        reasons: Iterable[str] = (),
        asked: bool = False,
        progress: Callable[[int], None] | None = None,
    ):
        domains, phase, self.top = options.domains, options.phase, options.top
        given = {"domains": domains, "phase": phase, "top": options.given.get("top")}
        given["side_by_side"] = asked
        super().__init__([a, b], {name: value for name, value in given.items() if value})
        self.of_side, self._reasons = dict(zip(SIDES, self.traces, strict=True)), reasons
        self.reports = {
            side: report(trace, domains=domains, phase=phase, progress=progress)
            for side, trace in self.of_side.items()
        }

    def of_sides(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {side: rows[rows["trace"] == side] for side in SIDES}

    @property
    def why(self) -> str:
        return "; ".join(self.reasons) or "the models have one shape: compare has it"

    @property
    def why_in_full(self) -> str:
        return f"{self.a.path} (A) and {self.b.path} (B) are of different models ({self.why})"

    @cached_property
    def reasons(self) -> list[str]:
        """Why they are different models, a phrase each; none where nothing tells them apart."""
        pairs = pairing.same_places(self.a, self.b, range(len(self.a.routers)))
        found = (
            *pairing.shape_differences(self.a, self.b, pairs),
            pairing.layers_difference(self.a, self.b),
            pairing.tokenizer_difference(self.a, self.b),
            *self._reasons,
        )
        return [reason for reason in dict.fromkeys(found) if reason]

    @cached_property
    def replicas(self) -> dict[str, Any] | None:
        """Whether it is one model, and one trace has physical ids of replicas."""
        return replicas(self.a, self.b) if self.reasons else None

    @property
    def shown_tables(self) -> list[str]:
        return [name for name in self.kind.excerpts if not self.why_not(name)]

    def of(self, side: str, table: str) -> pd.DataFrame:
        """A table of one trace's report."""
        made = self.reports[side]
        made.prepare(WHOLE)
        return made.tables[table]

    @cached_property
    def spans(self) -> of_spans.Spans:
        """MoeInspectError where there is no text that both cut."""
        for trace in self.traces:
            if trace.counts_only:
                raise MoeInspectError(f"{trace.path} holds counts only, no tokens")
        return of_spans.common_spans(self.a, self.b, self.reports["a"].selection)

    @cached_property
    def texts(self) -> np.ndarray:
        """int64 [V]: the texts of spans that occur often enough to be judged."""
        texts = of_spans.judged_texts(self.spans.text)
        if not len(texts):
            raise MoeInspectError("no span of text occurs eight times in the sample")
        return texts

    @cached_property
    def explained(self) -> dict[tuple[str, int], of_spans.ExplainedByText]:
        """(side, router) → what the text explains; routers whose first choice is known."""
        spans, V = self.spans, len(self.texts)
        index_of = np.full(len(spans.texts), -1)
        index_of[self.texts] = np.arange(V)
        of_S = np.flatnonzero(index_of[spans.text] >= 0)
        text_S, document_S = index_of[spans.text[of_S]], spans.document[of_S]
        found = dict[tuple[str, int], of_spans.ExplainedByText]()
        for side, tokens, at_S in (("a", spans.a, spans.at_a), ("b", spans.b, spans.at_b)):
            for r, chosen_S in tokens.first_choices(at_S[of_S]).items():
                E = tokens.trace.routers[r].experts
                found[side, r] = of_spans.explained_by_text(text_S, chosen_S, document_S, V, E)
        for side, trace in self.of_side.items():
            if not any(one == side for one, _ in found):
                raise MoeInspectError(f"{trace.path} does not record first choices")
        return found


BALANCE = ("experts", "top_k", "tokens", "max_over_mean", "max_over_mean_low", "max_over_mean_high")
BALANCE += ("expected_by_chance", "max_vio", "gini", "entropy", "dead_experts")


@table(tables=MODEL_TABLES)
def summary(data: Models) -> pd.DataFrame:
    """One row per fact: key, and its value in A and in B (text)."""

    def listed(key: str) -> list[str]:
        sizes = [sorted({getattr(router, key) for router in x.routers}) for x in data.traces]
        return [", ".join(map(str, of)) for of in sizes]

    facts = {
        "layers": [trace.stated_blocks or "unknown" for trace in data.traces],
        "moe_layers": [ranges({r.layer for r in trace.routers}) for trace in data.traces],
        "experts": listed("experts"),
        "top_k": listed("top_k"),
        "vocabulary": [len(trace.vocabulary_table) or "unknown" for trace in data.traces],
        "tokens": [trace.n_tokens for trace in data.traces],
        "domains": [", ".join(made.counts.domains) for made in data.reports.values()],
    }
    return result.facts_table(result.of_models(data.a, data.b) | facts)


@table(tables=MODEL_TABLES)
def balance(data: Models) -> pd.DataFrame:
    """One row per trace and router: its balance, as its report has it, beside what chance gives
    documents like these and the most that E and k allow."""
    of_side = {side: data.of(side, "balance")[["layer", "router", *BALANCE]] for side in SIDES}
    frame = _of_both(data, of_side)
    most = frame["experts"] / frame["top_k"]
    frame.insert(frame.columns.get_loc("max_over_mean") + 1, "max_over_mean_most", most)  # type: ignore[operator]
    return frame


OF_DOMAINS = ("domain_mi_bits", "domain_mi_null_bits", "domain_mi_null_p99_bits", "jsd_bits")


@table(tables=MODEL_TABLES)
def specialization(data: Models) -> pd.DataFrame:
    """One row per trace and router: the information that the domain carries about the expert, that
    by chance, and beyond it as a share of the most that D, E and k allow."""
    names = [frozenset(data.reports[side].counts.domains) for side in SIDES]
    if names[0] != names[1] or len(names[0]) < 2:
        said = (", ".join(map(readable, sorted(of_side))) for of_side in names)
        what = "not the same" if names[0] != names[1] else "fewer than two"
        raise MoeInspectError("the domains are {}: {} in A, {} in B".format(what, *said))
    of_side = dict[str, pd.DataFrame]()
    for side, trace in data.of_side.items():
        part = data.of(side, "specialization")[["layer", "router", *OF_DOMAINS]]
        # the k experts of a token are distinct: no domain can narrow them down to fewer
        of_R = [trace.routers[r] for r in part["router"].tolist()]
        most_bits = np.log2(np.minimum([of.experts / of.top_k for of in of_R], len(names[0])))
        bits = zip(part["domain_mi_bits"], most_bits, part["domain_mi_null_bits"], strict=True)
        shares = [of_spans.adjusted(*row) for row in bits]
        of_side[side] = part.assign(explained_by_domain=shares)
    return _of_both(data, of_side)


@table(tables=MODEL_TABLES)
def spans(data: Models) -> pd.DataFrame:
    """One row per trace and router, on the same spans of text: the information that a span's text
    carries about the first choice at its last token, with the spans shuffled, and beyond that as a
    share of the entropy of the first choice."""
    rows: dict[str, list[Row]] = {side: [] for side in SIDES}
    for (side, r), explained in data.explained.items():
        low, high = of_spans.jackknife_interval(explained.share, explained.share_without_G)
        row = {
            "layer": data.of_side[side].routers[r].layer,
            "router": r,
            "spans": int(explained.counts_VE.sum()),
            "texts": len(explained.counts_VE),
            "text_mi_bits": explained.mi_bits,
            "text_mi_null_bits": explained.null_bits,
            "entropy_bits": explained.entropy_bits,
            "explained_by_text": explained.share,
            "explained_by_text_low": low,
            "explained_by_text_high": high,
        }
        rows[side].append(row)
    return _of_both(data, {side: pd.DataFrame(of) for side, of in rows.items()})


@table(tables=MODEL_TABLES)
def vocabulary(data: Models) -> pd.DataFrame:
    """One row per trace, expert and text: the spans that choose the expert most exclusively."""
    texts = np.array([data.spans.texts[i] for i in data.texts], object)
    parts: dict[str, list[pd.DataFrame]] = {side: [] for side in SIDES}
    for (side, r), explained in data.explained.items():
        counts_VE = explained.counts_VE
        occurrences_V = np.maximum(counts_VE.sum(1), 1)
        fraction_VE = counts_VE / occurrences_V[:, None]
        order_VE = np.lexsort((-counts_VE, -fraction_VE), axis=0)[: data.top or None]
        v, e = order_VE.T.reshape(-1), np.repeat(np.arange(counts_VE.shape[1]), len(order_VE))
        v, e = v[counts_VE[v, e] > 0], e[counts_VE[v, e] > 0]
        columns = {
            "layer": data.of_side[side].routers[r].layer,
            "router": r,
            "expert": e,
            "text": texts[v],
            "count": counts_VE[v, e],
            "fraction": fraction_VE[v, e],
            "occurrences": occurrences_V[v],
        }
        parts[side].append(pd.DataFrame(columns))
    return _of_both(data, {side: pd.concat(of, ignore_index=True) for side, of in parts.items()})


def _of_both(data: Models, of_side: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of both, with `trace` and the depth, 0 the first layer and 1 the last."""
    parts = list[pd.DataFrame]()
    for side, part in of_side.items():
        part = part.copy()
        part.insert(2, "trace", side)
        part.insert(3, "depth", part["layer"] / max(data.of_side[side].blocks - 1, 1))
        parts.append(part.astype({"trace": "str"}))
    return pd.concat(parts, ignore_index=True)


SHARED = ("balance", "specialization", "spans", "vocabulary")


def different(data: Models) -> Iterator[Finding]:
    """Why decisions cannot be compared one by one; the headline."""
    if (found := data.replicas) is not None:
        text = (
            f"The {found['physical']} ids of {found['trace']} are physical ids of "
            f"{found['logical']} experts: mapped by shared tokens, the traces agree (beyond "
            f"chance {found['agreement']:.1%}). Map them to logical ids before comparing."
        )
        yield finding("physical_ids", "critical", text, **found)
        return
    text = "Two models of the same shape, side by side."
    if data.reasons:
        text = (
            f"Different models: {'; '.join(data.reasons)}. Their decisions cannot be compared one "
            "by one; what means the same in both is in the tables "
            f"{', '.join(name for name in SHARED if not data.why_not(name))}."
        )
    yield finding("different_models", "note", text, reasons=list(data.reasons))


def text_in_common(data: Models) -> Iterator[Finding]:
    """Whether both read the same text, without which no figure compares the models."""
    if data.why_not("spans"):
        text = "It is unknown whether both read the same text: figures may differ because of "
        yield finding("text", "note", f"{text}the text.")
        return
    spans, n = data.spans, len(data.spans.at_a)
    text = (
        f"The text is the same in {spans.common:.1%} of the bytes of "
        f"{plural(spans.documents, 'document')} (of {spans.of:,} in A), cut into "
        f"{n:,} spans between cuts of both tokenizers."
    )
    severity = "good" if spans.common >= 0.99 else "warning"
    values: Row = {"common": spans.common, "documents": spans.documents, "spans": n}
    yield finding("text", severity, text, **values)


def said_of_balance(data: Models) -> Iterator[Finding]:
    yield from result.balance_of_both(
        data.of_sides(data.tables["balance"]),
        lambda side, r: layer_label(data.of_side[side].routers, r),
        " At most E/k is possible.",
    )


def domains(data: Models) -> Iterator[Finding]:
    """How much of the choice of experts the domain explains in each."""
    if data.why_not("specialization"):
        return
    rows = data.tables["specialization"].dropna(subset=["explained_by_domain"])
    said = [
        f"{side.upper()} {_spread(part['explained_by_domain'])}"
        for side, part in data.of_sides(rows).items()
        if len(part)
    ]
    if said:
        text = (
            "Share of the choice of experts that domains explain (of the possible maximum, beyond "
            f"chance): {', '.join(said)}."
        )
        yield finding("domain_specialization", "note", text)


def texts(data: Models) -> Iterator[Finding]:
    """How much of the first choice the text of a span explains in each, and whether they differ."""
    if data.why_not("spans"):
        return
    every = sorted(data.explained.items())
    of_side = {side: [one for (of, _), one in every if of == side] for side in SIDES}
    shares = {side: pd.Series([one.share for one in of]) for side, of in of_side.items()}
    said = [f"{side.upper()} {_spread(share)}" for side, share in shares.items()]
    a, b = (float(np.mean(share.to_numpy())) for share in shares.values())
    left = (np.mean([one.share_without_G for one in of], axis=0) for of in of_side.values())
    low, high = of_spans.jackknife_interval(a - b, np.subtract(*left))
    apart = " There are too few documents for an interval."
    if not np.isnan(low):
        more = "no more than documents alone would."
        if low > 0 or high < 0:
            more = f"A's experts follow the text {'more' if a > b else 'less'} than B's."
        apart = (
            f" The mean over layers differs by {100 * (a - b):+.1f} points (95 % over documents "
            f"{100 * low:+.1f} to {100 * high:+.1f}): {more}"
        )
    text = (
        "Share of the entropy of the first choice that a span's text explains (beyond shuffled "
        f"spans): {', '.join(said)}.{apart}"
    )
    values: Row = {"explained_a": a, "explained_b": b}
    values |= {"difference_low": low, "difference_high": high}
    yield finding("vocabulary", "note", text, **values)


def _spread(values: pd.Series) -> str:
    """ "31% in the median layer (14% to 45% over the layers)" """
    middle, low, high = (
        f"{round(float(x), 2) + 0.0:.0%}" for x in (values.median(), values.min(), values.max())
    )
    return f"{middle} in the median layer ({low} to {high} over the layers)"


TEXT = "explained_by_text"
STEPS = 100  # of the axis of relative depth
DEPTH = Axis(
    "relative depth: 0% is the first layer, 100% the last", tuple(f"{i}%" for i in range(STEPS + 1))
)
BEYOND = Axis("share, beyond chance", low=0)
# name → group and table of the chart, column, axis, title, caption and text
CHARTS = {
    "load_by_depth": (
        *("Balance", "balance", "max_over_mean", Axis("max ÷ mean load", low=1)),
        "How even the load is",
        "Load of the busiest expert ÷ mean load",
        "1 is even; at most E/k is possible. Bars are 95% intervals over documents.",
    ),
    "domains_by_depth": (
        *("Specialization", "specialization", "explained_by_domain", BEYOND),
        "Specialization by domain",
        "Share of what a domain could tell about the expert",
        "Beyond chance. 0: all domains are alike; 1: as different as their number, E and k allow.",
    ),
    "texts_by_depth": (
        *("Specialization", "spans", TEXT, BEYOND),
        "Do experts follow the text?",
        "Share of the entropy of the first choice that a span's text explains",
        "The same spans of text for both, however their tokenizers cut them; beyond shuffled "
        "spans. 1: the text alone decides the first expert. Bars are 95% intervals over documents.",
    ),
}


def by_depth(data: Models, name: str) -> Chart:
    """A column by relative depth, with its interval and chance where the table has them."""
    _, of, column, axis, title, caption, text = CHARTS[name]
    table, marks = data.tables[of], list[Line]()
    for side, rows in data.of_sides(table).items():
        rows = rows.sort_values("depth", kind="stable")
        x, label = (STEPS * rows["depth"].to_numpy(float)).round(), side.upper()
        ends, y = (None, None), rows[column].to_numpy(float)
        if f"{column}_low" in rows:
            ends = known_interval(rows[f"{column}_low"], rows[f"{column}_high"])
        marks.append(Line(x, y, label, COLOURS[side], "", True, *ends))
        if "expected_by_chance" in rows:
            y = rows["expected_by_chance"].to_numpy(float)
            marks.append(Line(x, y, f"{label}: chance", COLOURS[side], dash="dot"))
    panel = Panel(tuple(marks), DEPTH, axis)
    return Chart(title, f"{caption}, by relative depth", (panel,), text=text, table=table)


def _apart(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most `most` routers of both traces, spread over their depth."""
    kept = list[int]()
    for side in SIDES:
        rows = np.flatnonzero(frame["trace"] == side)
        n = min(max(most // 2, 1), len(rows))
        kept += rows[np.linspace(0, max(len(rows) - 1, 0), n).round().astype(int)].tolist()
    return frame.iloc[kept]


SPREAD = partial(Excerpt, "routers of both traces, spread over their depth", _apart)
PLACE = ("layer", "router", "trace", "depth")
Models.kind = result.ComparisonKind(
    of="different models",
    tables=MODEL_TABLES,
    main="verdict",
    checks=(different, text_in_common, said_of_balance, domains, texts, result.not_compared),
    title="Two models, side by side",
    footer="Figures of two models are comparable if they are shares of what is possible or are "
    "shown beside chance.",
    charts={
        name: (partial(by_depth, name=name), group, table)
        for name, (group, table, *_) in CHARTS.items()
    },
    sections={
        "vocabulary": (
            "Specialization",
            "Texts of experts",
            "Spans of text that choose an expert first most exclusively, one per expert.",
        ),
        "summary": ("", "About these models", ""),
        "refused": ("", "Tables left out", ""),
    },
    sometimes=("specialization", "spans", "vocabulary"),
    firsts={"vocabulary": ["trace", "router", "expert"]},
    excerpts={
        "balance": SPREAD((*PLACE, "max_over_mean", "expected_by_chance", "dead_experts")),
        "specialization": SPREAD((*PLACE, "explained_by_domain", "jsd_bits")),
        "spans": SPREAD((*PLACE, TEXT, f"{TEXT}_low", f"{TEXT}_high")),
    },
)
