"""A comparison of two traces decision by decision: how their tokens are aligned, the counts of the
pair, and the tables: agreement by router, domain, phase, position, margin and document; which
expert replaces which; and whose load changes.

U units (clusters of documents), P parts of a router's decisions, E experts, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.engine import too_many_pairs
from moe_inspect.analysis.metrics import two_traces as tt
from moe_inspect.analysis.metrics.balance import nan_for_zero, ratio
from moe_inspect.analysis.metrics.uncertainty import (
    FEWEST_DOCUMENTS,
    SEED,
    ratio_interval,
    resample_weights,
    special,
)
from moe_inspect.comparison import kernels
from moe_inspect.comparison.align import DECILES, Alignment, align, all_alike, check_tokens
from moe_inspect.comparison.count import (
    UNIT,
    ComparisonCounts,
    Job,
    PairRouterCounts,
    Sums,
    count_pair,
    output_sums,
)
from moe_inspect.comparison.misaligned import matched_overlaps, renumberings
from moe_inspect.comparison.result import (
    TABLES,
    Facts,
    Paired,
    PairSettings,
    Progress,
    Row,
    facts_table,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import plural, ranges
from moe_inspect.trace.manifest import refuse_while_written
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import PHASES


class Decisions(Paired):
    """Traces A and B, compared. Nothing is counted before it is needed. `noise`: A compared with a
    second run of its model."""

    def __init__(self, a: Trace, b: Trace, options: PairSettings, progress: Progress = None):
        if options.top < 0:
            raise MoeInspectError(f"top is {options.top}: give a number of rows, 0 for all")
        for trace in (a, b):
            refuse_while_written(trace.path, trace.manifest)  # pyright: ignore[reportArgumentType]
        super().__init__(a, b, options)
        self.noise, self._progress = None, progress
        if options.noise is not None:
            self.noise = Decisions(a, options.noise, replace(options, noise=None), progress)
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
        """Whether the traces are the same files, so that they need not be read."""
        return all_alike(self.alignment) and all(r == m for r, m in self.pairs)

    @cached_property
    def margins(self) -> kernels.Margins | None:
        return None if self.alike else kernels.margins(self.a, [r for r, _ in self.pairs])

    @property
    def why_no_margins(self) -> str:
        if self.alike:
            return f"{self.a.path} and {self.b.path} are the same files"
        if "logits" not in self.a.tables:
            return f"{self.a.path} has no logits (trace --logits)"
        return f"the routers of {self.a.path} do not choose by their logits alone"

    @cached_property
    def renumbered(self) -> list[Finding]:
        """How tokens, layers or experts are numbered differently in B."""
        return renumberings(self.alignment, self.pairs, self.selection.routers)

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

    def why_not(self, name: str) -> str | None:
        """Why these two traces cannot have a table; None if they can."""
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
        """Compared decisions of a router, by unit and cell. int64 [U, X]"""
        return self.counts.decisions_UX[self.a.routers[r].stack]

    def of(self, r: int) -> PairRouterCounts:
        return self.counts.of[r]

    @property
    def every(self) -> list[PairRouterCounts]:
        """Counts of all routers, in the order of `pairs`."""
        return [self.of(r) for r, _ in self.pairs]

    def slots_U(self, r: int) -> np.ndarray:
        """Slots of a router that route somewhere in either trace. int64 [U]"""
        k, short_UX = self.a.routers[r].top_k, self.of(r).short_UX
        return k * self.decisions_UX(r).sum(1) - short_UX.sum(1)

    def hits(self) -> np.ndarray:
        """Decisions with different sets of experts, and all compared decisions. int64 [2, R, U]"""
        of_R = [(self.of(r).mismatch_UX.sum(1), self.decisions_UX(r).sum(1)) for r, _ in self.pairs]
        return np.stack(of_R, axis=1)

    @cached_property
    def differed_before(self) -> dict[int, int]:
        """Router → the number of its tokens that differ at an earlier router of its stack."""
        before, total = dict[int, int](), Counter[str]()
        for r, _ in self.pairs:
            before[r] = total[self.a.routers[r].stack]
            total[self.a.routers[r].stack] += self.of(r).new
        return before

    @cached_property
    def units(self) -> np.ndarray:
        """Units (clusters of documents) that have any token, which intervals resample."""
        return self.counts.units

    @property
    def in_domains(self) -> list[tuple[str, np.ndarray]]:
        """All domains together, named "", and each of several domains, with a mask of its units."""
        domain_U, names = self.counts.domain_U[self.units], self.counts.domains
        each = [(name, domain_U == d) for d, name in enumerate(names)]
        return [("", np.ones(len(domain_U), bool)), *(each if len(names) > 1 else [])]

    @cached_property
    def weights_RU(self) -> np.ndarray | None:
        """Resamples of the documents; None if there are too few."""
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
        """Share of the tokens with different sets of experts at any router."""
        layers_N = self.counts.layers_N
        return tt.tokens_mismatch(layers_N[1:].sum(), layers_N.sum())

    @cached_property
    def decisions(self) -> int:
        return int(self.hits()[1].sum())

    @cached_property
    def mismatched(self) -> int:
        return int(self.hits()[0].sum())


AGREEMENT = ("set_mismatch", "overlap", "first_choice", "order", "weight_l1", "kl_nats")
HALVES = 40  # ways of parting A's documents in two
CONFIDENCE = 0.05


@table(by_router=AGREEMENT, tables=TABLES)
def agreement(data: Decisions) -> pd.DataFrame:
    """One row per router: the share of decisions with another set of experts, the share of their
    experts that both chose, and what is known of order and weights."""
    noise = dict[int, float]()
    if data.noise is not None:
        hits_R, of_R = data.noise.hits().sum(2)
        shares = (hits_R / np.maximum(of_R, 1)).tolist()
        noise = dict(zip((r for r, _ in data.noise.pairs), shares, strict=True))
    rows = list[Row]()
    for r, _ in data.pairs:
        router, counts, ordered = data.a.routers[r], data.of(r), data.first_choice_known[r]
        n_U, slots_U = data.decisions_UX(r).sum(1), data.slots_U(r)
        sums = {
            "set_mismatch": (tt.set_mismatch, counts.mismatch_UX.sum(1), n_U),
            "overlap": (tt.overlap, slots_U - counts.missing_UX.sum(1), slots_U),
            "first_choice": (tt.same_first_choice, n_U - counts.first_differs_U, n_U, ordered),
            "order": (tt.same_order, n_U - counts.reordered_U, n_U, ordered),
            "weight_l1": (tt.weight_l1, counts.l1_U / UNIT, n_U, data.weights_known),
        }
        row: Row = {**data.place(r), "decisions": int(n_U.sum())}
        for name, of in sums.items():
            row |= _share(data, name, *of)
            if name == "overlap":
                row["overlap_by_chance"] = router.top_k / router.experts
        row["kl_nats"] = tt.kl_nats(counts.kl / UNIT, int(n_U.sum()) * data.job.logits)
        if data.noise is not None:
            row["noise_set_mismatch"] = noise.get(r, np.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def _share(
    data: Decisions,
    name: str,
    measure: Callable[[float, float], float],
    hits_U: np.ndarray,
    of_U: np.ndarray,
    known: bool = True,
) -> Row:
    """A metric of two sums, and its interval."""
    names, total = (name, f"{name}_low", f"{name}_high"), of_U.sum()
    if not known or not total:
        return dict.fromkeys(names, np.nan)
    ends = ratio_interval(hits_U[data.units], of_U[data.units], data.weights_RU)
    return dict(zip(names, (measure(float(hits_U.sum()), float(total)), *ends), strict=True))


def _by(
    data: Decisions,
    column: str,
    names: Sequence[object],
    parts: Callable[[int], Sequence[np.ndarray]],
) -> pd.DataFrame:
    """One row per router and part with any decision. parts: of a router, int64 [U, P] each:
    decisions, decisions with different sets of experts and, if known, assignments that the other
    trace did not make and slots that route nowhere in both."""
    rows = list[Row]()
    for r, _ in data.pairs:
        n_UP, mismatch_UP, *more = parts(r)
        for p in np.flatnonzero(n_UP.sum(0)).tolist():
            n = int(n_UP[:, p].sum())
            row: Row = {**data.place(r), column: names[p], "decisions": n}
            row |= _share(data, "set_mismatch", tt.set_mismatch, mismatch_UP[:, p], n_UP[:, p])
            if more:
                missing, short = (int(of_UP[:, p].sum()) for of_UP in more)
                size = n * data.a.routers[r].top_k - short
                row["overlap"] = tt.overlap(size - missing, size)
            rows.append(row)
    return pd.DataFrame(rows)


def _cells(data: Decisions, r: int) -> list[np.ndarray]:
    """Counts for `_by`, by phase and position: [U, phases, deciles]."""
    counts = data.of(r)
    sums = data.decisions_UX(r), counts.mismatch_UX, counts.missing_UX, counts.short_UX
    return [of_UX.reshape(len(of_UX), len(PHASES), DECILES) for of_UX in sums]


@table(tables=TABLES)
def domains(data: Decisions) -> pd.DataFrame:
    """One row per router and domain."""
    names = data.counts.domains
    of_UD = data.counts.domain_U[:, None] == np.arange(len(names))

    def parts(r: int) -> list[np.ndarray]:
        return [x.sum((1, 2))[:, None] * of_UD for x in _cells(data, r)]

    return _by(data, "domain", names, parts)


@table(tables=TABLES)
def phases(data: Decisions) -> pd.DataFrame:
    """One row per router and phase: prompt tokens, generated ones, those of an encoder."""
    return _by(data, "phase", PHASES, lambda r: [x.sum(2) for x in _cells(data, r)])


@table(tables=TABLES)
def positions(data: Decisions) -> pd.DataFrame:
    """One row per router and tenth of the sequence: 0 is its beginning."""
    return _by(data, "decile", range(DECILES), lambda r: [x.sum(1) for x in _cells(data, r)])


@table(tables=TABLES)
def margins(data: Decisions) -> pd.DataFrame:
    """One row per router and tenth of A's decisions by their margin, from the least decided on."""
    if (known := data.margins) is None:
        raise MoeInspectError(f"{data.why_no_margins}: no margins table")

    def parts(r: int) -> tuple[np.ndarray, np.ndarray]:
        return data.of(r).margin_UM, data.of(r).margin_mismatch_UM

    frame = _by(data, "decile", range(DECILES), parts)
    limits = {r: np.r_[-np.inf, edges, np.inf] for r, edges in known.edges.items()}
    at = list(zip(frame["router"], frame["decile"], strict=True))
    frame.insert(3, "margin_from", [float(limits[r][m]) for r, m in at])
    frame.insert(4, "margin_to", [float(limits[r][m + 1]) for r, m in at])
    return frame


@table(by_router=("tokens_mismatch",), tables=TABLES)
def overall(data: Decisions) -> pd.DataFrame:
    """One row: all routers together."""
    counts = data.counts
    with_logits = counts.tokens * data.job.logits
    row: Row = {
        "tokens": counts.tokens,
        "tokens_mismatch": data.tokens_mismatch,
        "decisions": data.decisions,
        "decisions_mismatch": data.mismatched / data.decisions,
        "router_shift": tt.router_shift(counts.gamma / UNIT, with_logits),
        "router_shift_below_floor": ratio(counts.gamma_below, with_logits),
    }
    if data.noise is not None:
        row["noise_tokens_mismatch"] = data.noise.tokens_mismatch
    return pd.DataFrame([row])


@table(tables=TABLES)
def tokens(data: Decisions) -> pd.DataFrame:
    """One row per number of routers: tokens whose sets differ at exactly so many, and the share
    of those with more."""
    tokens_N = np.trim_zeros(data.counts.layers_N, "b")
    share_N = tokens_N / tokens_N.sum()
    columns = {"routers": np.arange(len(tokens_N)), "tokens": tokens_N, "share": share_N}
    return pd.DataFrame({**columns, "share_more": np.maximum(1 - np.cumsum(share_N), 0)})


@table(tables=TABLES)
def depth(data: Decisions) -> pd.DataFrame:
    """One row per router: does a difference grow? The share of tokens that differ here or before,
    that differ here first, and the share that differs here of those that did and did not before."""
    rows = list[Row]()
    for r, _ in data.pairs:
        n, before, new = int(data.decisions_UX(r).sum()), data.differed_before[r], data.of(r).new
        mismatched = int(data.of(r).mismatch_UX.sum())
        row = {
            "set_mismatch": ratio(mismatched, n),
            "differ_so_far": ratio(before + new, n),
            "new": ratio(new, n),
            "again_after_difference": ratio(mismatched - new, before),
            "new_without_difference": ratio(new, n - before),
        }
        rows.append({**data.place(r), **row})
    return pd.DataFrame(rows)


@table(tables=TABLES)
def documents(data: Decisions) -> pd.DataFrame:
    """One row per document with any difference, those with the largest share first."""
    rows = data.counts.document_rows()
    document, domain, n_tokens, decisions, mismatch = rows[rows[:, 4] > 0].T
    columns = {
        "document": document,
        "domain": pd.Series([data.counts.domains[d] for d in domain], dtype="str"),
        "tokens": n_tokens,
        "decisions": decisions,
        "mismatches": mismatch,
        "set_mismatch": mismatch / np.maximum(decisions, 1),
    }
    by = ["set_mismatch", "document"]
    frame = pd.DataFrame(columns).sort_values(by, ascending=[False, True], ignore_index=True)
    return frame.head(data.options.top or len(frame))


SHIFTS = ("shift_layers", "shift_positions", "shift_routes", "drop_last")


@table(tables=TABLES)
def summary(data: Decisions) -> pd.DataFrame:
    """One row per fact: key, value (text)."""
    alignment, alike = data.alignment, data.counts.shards_alike
    facts: Row = {"a": data.a.path, "b": data.b.path}
    if data.noise is not None:
        facts["noise"] = data.noise.b.path
    facts |= {
        "tokens_a": alignment.a.tokens,
        "tokens_b": alignment.b.tokens,
        "tokens_compared": data.counts.tokens,
        "decisions_compared": data.decisions,
        "layers": ranges({data.a.routers[r].layer for r, _ in data.pairs}),
        "aligned_by": alignment.by,
        "token_ids": "checked" if alignment.ids_known else "unknown, not checked",
        "sequences_diverged": alignment.diverged,
        "tokens_after_divergence": alignment.other_ids,
    }
    if alike:
        facts["shards_alike"] = f"{alike}: the same files, not compared row by row"
    facts |= {name: value for name in SHIFTS if (value := getattr(data.options, name))}
    for key, (of_a, of_b) in recorded_otherwise(data).items():
        facts[f"differs_{key}"] = f"{of_a} | {of_b}"
    return facts_table({key: [value] for key, value in facts.items()}, ["value"])


# facts in the manifest that can make two runs of one model differ
RECORDED = {
    "model": ("id", "revision", "class"),
    "capture": ("mode", "device", "dtype", "experts_implementation", "engine", "versions"),
    "plan": ("max_length", "batch_tokens", "special_tokens", "generate", "random_init"),
}


def recorded_otherwise(data: Decisions) -> Facts:
    """Differences between the recordings: dtype → ("float32", "bfloat16")."""
    found = Facts()
    for part, names in RECORDED.items():
        manifests = [trace.manifest for trace in data.traces]
        if part == "plan":
            manifests = [manifest.get("corpus") or {} for manifest in manifests]
        of_a, of_b = (manifest.get(part) or {} for manifest in manifests)
        pairs = {name: (of_a.get(name), of_b.get(name)) for name in names}
        found |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return found


@table(tables=TABLES)
def flips(data: Decisions) -> pd.DataFrame:
    """One row per pair of experts: how often `other` is chosen in B where A chose `expert`, and
    how often it would be if which expert is dropped said nothing of which is taken."""
    parts = list[pd.DataFrame]()
    for r, _ in data.pairs:
        flips_EE = data.of(r).flips_EE
        expert, other = np.nonzero(flips_EE)
        order = np.lexsort([other, expert, -flips_EE[expert, other]])[: data.options.top or None]
        expert, other = expert[order], other[order]
        count = flips_EE[expert, other]
        expected_EE = np.outer(flips_EE.sum(1), flips_EE.sum(0)) / max(flips_EE.sum(), 1)
        expected = expected_EE[expert, other]
        columns = {"expert": expert, "other": other, "flips": count, "expected": expected}
        parts.append(pd.DataFrame({**data.place(r), **columns, "lift": count / expected}))
    return pd.concat(parts, ignore_index=True)


@table(by_router=("load_shift",), tables=TABLES)
def load_shift(data: Decisions) -> pd.DataFrame:
    """One row per router: how far apart the load of the two traces is (total variation and
    Jensen–Shannon divergence of the shares), and two halves of A's documents on average."""
    rows, U = list[Row](), len(data.units)
    rng = np.random.default_rng([SEED, U])
    # random halves of the units, bool [U]; none with too few of them
    sides = [rng.permutation(U) < U // 2 for _ in range(HALVES if U >= FEWEST_DOCUMENTS else 0)]
    for r, _ in data.pairs:
        load_UE, moved_UE = data.of(r).load_UE[data.units], data.of(r).moved_UE[data.units]
        both = np.stack([load_UE.sum(0), (load_UE + moved_UE).sum(0)])
        halves = [np.stack([load_UE[side].sum(0), load_UE[~side].sum(0)]) for side in sides]
        row: Row = {**data.place(r)}
        for name, of in (("load_shift", tt.load_shift), ("jsd_bits", tt.load_shift_jsd_bits)):
            of_halves = [x for half in halves if not np.isnan(x := of(half))]
            # of the same files the load is not counted
            row[name] = 0.0 if data.alike else of(both)
            row[f"{name}_halves"] = float(np.mean(of_halves)) if of_halves else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


MOVERS = ("layer", "router", "domain", "expert", "load_a", "load_b", "change", "low", "high")


@table(tables=TABLES)
def movers(data: Decisions) -> pd.DataFrame:
    """One row per expert whose load changed by more than chance among documents explains, in all
    domains together (`domain` is empty) or in one; the largest changes first."""
    rows = list[tuple[object, ...]]()
    for r, _ in data.pairs:
        counts, place = data.of(r), data.place(r).values()
        tests = len(data.in_domains) * counts.E * len(data.pairs)
        for domain, in_U in data.in_domains:
            of_U = data.units[in_U]
            n, moved_UE, load_E = len(of_U), counts.moved_UE[of_U], counts.load_UE[of_U].sum(0)
            if n < FEWEST_DOCUMENTS:
                continue
            # the change of a sum over n documents: √n times the deviation between documents
            error_E = np.sqrt(n) * moved_UE.std(0, ddof=1)
            reach_E = error_E * float(special("stdtrit")(n - 1, 1 - CONFIDENCE / 2 / tests))
            moved_E = moved_UE.sum(0)
            for e in np.flatnonzero((np.abs(moved_E) > reach_E) & (load_E > 0)).tolist():
                moved, load, reach = moved_E[e], load_E[e], reach_E[e]
                change = moved / load, (moved - reach) / load, (moved + reach) / load
                rows.append((*place, domain, e, load, load + moved, *change))
    frame = pd.DataFrame(rows, columns=list(MOVERS)).astype({"domain": "str"})
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True).head(data.options.top or len(frame))


@table(tables=TABLES)
def matched(data: Decisions) -> pd.DataFrame:
    """One row per router: the overlap on a sample as numbered, after B's experts were matched with
    A's by the tokens they share, and what matching finds when B's tokens are shuffled."""
    columns = ["router", "tokens", "overlap", "overlap_matched", "overlap_matched_by_chance"]
    rows = matched_overlaps(data.alignment, data.pairs)
    frame = pd.DataFrame(list(rows), columns=columns)
    frame.insert(0, "layer", [data.a.routers[r].layer for r in frame["router"]])
    return frame


OF_PAIR = ("assignments", "reap", "mean_norm", "share")
COLUMNS = (
    *("layer", "router", "expert"),
    *(f"{name}_{side}" for name in OF_PAIR for side in "ab"),
    *(f"{name}{end}" for name in ("reap_change", "norm_change") for end in ("", "_low", "_high")),
    *("both", "norm_difference"),
)


@table(tables=TABLES)
def worth(data: Decisions) -> pd.DataFrame:
    """One row per expert, if both traces have output norms: REAP, mean norm and share of the
    layer's gate weight × norm in each; how REAP and mean norm change from A to B; and for
    assignments that both made, the mean |difference| of their norms, relative to A's."""
    if data.why_not("worth"):
        return pd.DataFrame(columns=list(COLUMNS))
    sums_of = output_sums(data.job, data.alignment.segments)
    parts = [_worth_of(data, r, sums) for r, sums in sums_of.items()]
    return pd.concat(parts, ignore_index=True)[list(COLUMNS)]


def _worth_of(data: Decisions, r: int, sums: Sums) -> pd.DataFrame:
    load, norm, gated = (sums[name][:, data.units] for name in ("load", "norm", "gated"))
    made: Row = {**data.place(r), "expert": np.arange(load.shape[2])}
    for side, name in enumerate("ab"):
        gated_E, load_E = gated[side].sum(0), nan_for_zero(load[side].sum(0))
        made[f"assignments_{name}"] = load[side].sum(0).astype(np.int64)
        made[f"reap_{name}"] = gated_E / load_E
        made[f"mean_norm_{name}"] = norm[side].sum(0) / load_E
        made[f"share_{name}"] = gated_E / nan_for_zero(gated[side].sum())
    made |= _change("reap_change", gated, load, data.weights_RU)
    made |= _change("norm_change", norm, load, data.weights_RU)
    made["both"] = sums["both"].astype(np.int64)
    made["norm_difference"] = sums["both_change"] / nan_for_zero(sums["both_norm"])
    return pd.DataFrame(made)


def _change(
    name: str, values: np.ndarray, load: np.ndarray, weights_RU: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Mean of B ÷ mean of A − 1 of each expert, and its 95 % interval. values, load: [2, U, E]."""

    def relative(sums: np.ndarray, of: np.ndarray) -> np.ndarray:
        mean = sums / nan_for_zero(of)
        return mean[1] / nan_for_zero(mean[0]) - 1

    change_E = relative(values.sum(1), load.sum(1))
    low_E, high_E = np.full((2, len(change_E)), np.nan)
    known_E = np.isfinite(change_E)
    if weights_RU is not None and known_E.any():
        values, load = (weights_RU @ x[:, :, known_E] for x in (values, load))
        ends = np.nanquantile(relative(values, load), [0.025, 0.975], 0)
        low_E[known_E], high_E[known_E] = ends
    return {name: change_E, f"{name}_low": low_E, f"{name}_high": high_E}
