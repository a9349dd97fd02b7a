"""What a comparison of two models is made of: the report of each, and the spans of text that they
have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.comparison.aligning.misaligned import replicas
from moe_inspect.comparison.aligning.pairing import (
    layers_difference,
    same_places,
    shape_differences,
    tokenizer_difference,
)
from moe_inspect.comparison.models.spans import (
    Explained,
    Spans,
    common_spans,
    explained_by_text,
    judged_texts,
)
from moe_inspect.comparison.result import SIDES, Comparison, Tables
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.report import Report, report
from moe_inspect.trace.reader import Trace

WHOLE = ["balance", "specialization"]


class Models(Comparison):
    """Traces A and B. Nothing is read before it is asked for. `reasons`: why they are different,
    beside what their shapes and tokenizers tell. `asked`: by the option `side_by_side`."""

    def __init__(
        self,
        a: Trace,
        b: Trace,
        *,
        domains: str | Iterable[str] | None = None,
        phase: str | None = None,
        top: int = 20,
        reasons: Iterable[str] = (),
        asked: bool = False,
        progress: Callable[[int], None] | None = None,
    ):
        self.a, self.b, self.top = a, b, top
        settings: dict[str, Any] = {"domains": domains, "phase": phase, "progress": progress}
        self.reports: dict[str, Report] = {
            side: report(trace, **settings) for side, trace in zip(SIDES, (a, b), strict=True)
        }
        self._reasons = list(reasons)
        top_given = None if top == 20 else top
        given = {"domains": domains, "phase": phase, "top": top_given, "side_by_side": asked}
        self.given = {name: value for name, value in given.items() if value}
        self.tables = Tables(self)

    @property
    def of_side(self) -> dict[str, Trace]:
        return dict(zip(SIDES, self.traces, strict=True))

    @property
    def why(self) -> str:
        return "; ".join(self.reasons) or "the models have one shape: compare has it"

    @property
    def why_in_full(self) -> str:
        return f"{self.a.path} (A) and {self.b.path} (B) are of different models ({self.why})"

    @cached_property
    def reasons(self) -> list[str]:
        """Why they are different models, a phrase each; none where nothing tells them apart."""
        pairs = same_places(self.a, self.b, range(len(self.a.routers)))
        found = (
            *shape_differences(self.a, self.b, pairs),
            layers_difference(self.a, self.b),
            tokenizer_difference(self.a, self.b),
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

    def depth(self, side: str, router: int) -> float:
        """Where a router is in its model: 0 the first layer, 1 the last."""
        trace = self.of_side[side]
        return trace.routers[router].layer / max(trace.blocks - 1, 1)

    def of(self, side: str, table: str) -> pd.DataFrame:
        """A table of one trace's report."""
        made = self.reports[side]
        made.prepare(WHOLE)
        return made.tables[table]

    @cached_property
    def spans(self) -> Spans:
        """MoeInspectError where there is no text that both cut."""
        for trace in (self.a, self.b):
            if trace.counts_only:
                raise MoeInspectError(f"{trace.path} holds counts only, no tokens")
        return common_spans(self.a, self.b, self.reports["a"].selection)

    @cached_property
    def texts(self) -> np.ndarray:
        """int64 [V]: the texts of spans that occur often enough to be judged."""
        texts = judged_texts(self.spans.text)
        if not len(texts):
            raise MoeInspectError("no span of text occurs eight times in the sample")
        return texts

    @cached_property
    def explained(self) -> dict[tuple[str, int], Explained]:
        """(side, router) → what the text explains; routers whose first choice is known."""
        spans, V = self.spans, len(self.texts)
        index_of = np.full(len(spans.texts), -1)
        index_of[self.texts] = np.arange(V)
        of_S = np.flatnonzero(index_of[spans.text] >= 0)
        text_S, document_S = index_of[spans.text[of_S]], spans.document[of_S]
        found = dict[tuple[str, int], Explained]()
        for side, tokens, at_S in (("a", spans.a, spans.at_a), ("b", spans.b, spans.at_b)):
            for r, chosen_S in tokens.first_choices(at_S[of_S]).items():
                E = tokens.trace.routers[r].experts
                found[side, r] = explained_by_text(text_S, chosen_S, document_S, V, E)
        for side in SIDES:
            if not any(one == side for one, _ in found):
                raise MoeInspectError(f"{self.of_side[side].path} does not record first choices")
        return found

    def why_not(self, name: str) -> str | None:
        if name in self.kind.sometimes:
            try:
                self.tables[name]
            except MoeInspectError as error:
                return str(error)
        return super().why_not(name)
