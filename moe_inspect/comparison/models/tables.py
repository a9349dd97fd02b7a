"""Two models that cannot be compared decision by decision, side by side: the report of each, the
spans of text that they have in common, and the tables.

E experts, k experts per token, D domains, S spans, V texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.comparison import result
from moe_inspect.comparison.aligning import pairing
from moe_inspect.comparison.aligning.misaligned import replicas
from moe_inspect.comparison.models import spans as of_spans
from moe_inspect.comparison.result import MODEL_TABLES, SIDES, Row
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.registry import table
from moe_inspect.text import ranges, readable
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
        self.a, self.b, self.top = a, b, options.top
        self.of_side = dict(zip(SIDES, self.traces, strict=True))
        domains, phase = options.domains, options.phase
        self.reports = {
            side: report(trace, domains=domains, phase=phase, progress=progress)
            for side, trace in self.of_side.items()
        }
        self._reasons = list(reasons)
        given = {"domains": domains, "phase": phase, "top": options.given.get("top")}
        self.given = {k: v for k, v in (given | {"side_by_side": asked}).items() if v}
        self.tables = result.Tables(self)

    def of_sides(self, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """The rows of each trace of a table."""
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

    def why_not(self, name: str) -> str | None:
        if name in self.kind.sometimes:
            try:
                self.tables[name]
            except MoeInspectError as error:
                return str(error)
        return super().why_not(name)


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
    documents like these (expected_by_chance) and the most that E and k allow
    (max_over_mean_most)."""
    of_side = {side: data.of(side, "balance")[["layer", "router", *BALANCE]] for side in SIDES}
    frame = _of_both(data, of_side)
    most = frame["experts"] / frame["top_k"]
    frame.insert(frame.columns.get_loc("max_over_mean") + 1, "max_over_mean_most", most)  # type: ignore[operator]
    return frame


OF_DOMAINS = ("domain_mi_bits", "domain_mi_null_bits", "domain_mi_null_p99_bits", "jsd_bits")


@table(tables=MODEL_TABLES)
def specialization(data: Models) -> pd.DataFrame:
    """One row per trace and router: the information that the domain carries about the expert, that
    by chance, and beyond it as a share of the most that D, E and k allow: 0 is chance, 1 all
    (explained_by_domain)."""
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
    """One row per trace and router, on the same spans of text, however the tokenizers cut them:
    the information that a span's text carries about the first choice at its last token, with the
    spans shuffled, and beyond that as a share of the entropy of the first choice: 0 is chance, 1
    all (explained_by_text, with a 95 % interval over documents)."""
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
    """One row per trace, expert and text: the spans that choose the expert first most exclusively,
    of those that occur eight times or more in the sample; `fraction` of the span's occurrences."""
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
    """The rows of both, with `trace` and the relative depth, 0 the first layer and 1 the last,
    beside the names of the routers."""
    parts = list[pd.DataFrame]()
    for side, part in of_side.items():
        part = part.copy()
        part.insert(2, "trace", side)
        part.insert(3, "depth", part["layer"] / max(data.of_side[side].blocks - 1, 1))
        parts.append(part.astype({"trace": "str"}))
    return pd.concat(parts, ignore_index=True)
