"""What a comparison is made of: two traces, how they are aligned, and the counts of the pair."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from moe_inspect.analysis.counting.engine import too_many_pairs
from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.comparison.aligning.align import Alignment, align, all_alike, check_tokens
from moe_inspect.comparison.aligning.misaligned import misalignments
from moe_inspect.comparison.counting.count import (
    ComparisonCounts,
    Job,
    PairRouterCounts,
    Sums,
    count_pair,
    output_sums,
)
from moe_inspect.comparison.counting.kernels import Margins, margins
from moe_inspect.comparison.result import Paired, PairSettings
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import plural
from moe_inspect.trace.manifest import refuse_while_written
from moe_inspect.trace.reader import Trace


class Decisions(Paired):
    """Traces A and B, compared. Nothing is counted before it is asked for. `noise`: another run of
    A's model, compared with A: what is no difference."""

    def __init__(
        self,
        a: Trace,
        b: Trace,
        options: PairSettings,
        *,
        noise: Decisions | None = None,
        progress: Callable[[int], None] | None = None,
    ):
        if options.top < 0:
            raise MoeInspectError(f"top is {options.top}: give a number of rows, 0 for all")
        for trace in (a, b):
            refuse_while_written(trace.path, trace.manifest)  # pyright: ignore[reportArgumentType]
        super().__init__(a, b, options)
        self.noise, self._progress = noise, progress
        if noise is not None:
            self.given = {**options.given, "noise": str(noise.b.path)}
        if too_many_pairs(a, self.selection.routers):
            raise MoeInspectError(
                f"{a.path} has too many experts to count pairs of them: select fewer layers"
            )
        self.alignment: Alignment = align(
            a,
            b,
            shift_positions=options.shift_positions,
            shift_routes=options.shift_routes,
            drop_last=options.drop_last,
        )
        check_tokens(self.alignment)

    @property
    def subtitle(self) -> str:
        size = plural(self.counts.tokens, "token"), plural(len(self.pairs), "router")
        return " · ".join([self.title, *size])

    @property
    def shown_tables(self) -> list[str]:
        of = ["agreement", *(self.kind.excerpts if self.mismatched else ())]
        return [name for name in dict.fromkeys(of) if len(self.tables[name])]

    @cached_property
    def alike(self) -> bool:
        """Whether the traces are the same files, which need not be read."""
        return all_alike(self.alignment) and all(r == m for r, m in self.pairs)

    @cached_property
    def margins(self) -> Margins | None:
        return None if self.alike else margins(self.a, [r for r, _ in self.pairs])

    @property
    def why_no_margins(self) -> str:
        if self.alike:
            return f"{self.a.path} and {self.b.path} are the same files"
        if "logits" not in self.a.tables:
            return f"{self.a.path} has no logits (trace --logits)"
        return f"the routers of {self.a.path} do not choose by their logits alone"

    @cached_property
    def misaligned(self) -> list[Finding]:
        return misalignments(self.alignment, self.pairs, self.selection.routers)

    @cached_property
    def job(self) -> Job:
        return Job(
            self.a,
            self.b,
            self.pairs,
            self.selection,
            self.alignment.a.domains,
            self.alignment.segments.tokens,
            self.margins,
            load=not self.alike,
            drop_zero_filled=self.options.drop_zero_filled,
        )

    @cached_property
    def outputs(self) -> dict[int, Sums]:
        """As `output_sums`, of two traces with the norms of outputs."""
        return output_sums(self.job, self.alignment.segments)

    def why_not(self, name: str) -> str | None:
        """Why these two traces cannot have a table; None where they can."""
        sides = zip("AB", self.traces, strict=True)
        without = [f"{side} ({trace.path})" for side, trace in sides if not trace.has_norms]
        if name != "worth" or not without:
            return None
        return (
            f"there is no table 'worth': {' and '.join(without)} "
            f"{'has' if len(without) == 1 else 'have'} no norms of outputs (trace --output-norms)"
        )

    @cached_property
    def counts(self) -> ComparisonCounts:
        segments, threads = self.alignment.segments, self.options.threads
        counts = count_pair(self.job, segments, threads, self._progress)
        if not counts.tokens:
            raise MoeInspectError(
                f"{self.a.path} and {self.b.path} have no token in common that is selected: "
                "nothing to compare"
            )
        return counts

    def decisions_UX(self, r: int) -> np.ndarray:
        """int64 [U, X]: decisions of a router that are compared, by unit and cell."""
        return self.counts.decisions_UX[self.a.routers[r].stack]

    def of(self, r: int) -> PairRouterCounts:
        return self.counts.of[r]

    @property
    def every(self) -> list[PairRouterCounts]:
        """The counts of all routers, in the order of `pairs`."""
        return [self.of(r) for r, _ in self.pairs]

    def slots_U(self, r: int) -> np.ndarray:
        """int64 [U]: slots of a router that route somewhere in either trace."""
        k, short_UX = self.a.routers[r].top_k, self.of(r).short_UX
        return k * self.decisions_UX(r).sum(1) - short_UX.sum(1)

    def hits(self) -> np.ndarray:
        """int64 [2, R, U]: decisions with another set of experts, and all that are compared."""
        of_R = [(self.of(r).mismatch_UX.sum(1), self.decisions_UX(r).sum(1)) for r, _ in self.pairs]
        return np.stack(of_R, axis=1)

    @cached_property
    def units(self) -> np.ndarray:
        """The units (clusters of documents) that have any token, over which intervals go."""
        return self.counts.units

    @property
    def in_domains(self) -> list[tuple[str, np.ndarray]]:
        """All domains together, named "", and each of several, with which units are theirs."""
        domain_U, names = self.counts.domain_U[self.units], self.counts.domains
        each = [(name, domain_U == d) for d, name in enumerate(names)]
        return [("", np.ones(len(domain_U), bool)), *(each if len(names) > 1 else [])]

    @cached_property
    def weights_RU(self) -> np.ndarray | None:
        """Resamples of the documents; None where there are too few."""
        return resample_weights(self.counts.domain_U[self.units])

    @cached_property
    def first_choice_known(self) -> dict[int, bool]:
        """Router → whether slot 0 is the first choice in both traces."""
        a, b = self.a.routers, self.b.routers
        return {r: a[r].first_choice_known and b[m].first_choice_known for r, m in self.pairs}

    @property
    def weights_known(self) -> bool:
        return self.a.has_weights and self.b.has_weights

    @cached_property
    def tokens_mismatch(self) -> float:
        """Share of the tokens with another set of experts at any router."""
        layers_N = self.counts.layers_N
        return tt.tokens_mismatch(layers_N[1:].sum(), layers_N.sum())

    @cached_property
    def decisions(self) -> int:
        return int(self.hits()[1].sum())

    @cached_property
    def mismatched(self) -> int:
        return int(self.hits()[0].sum())
