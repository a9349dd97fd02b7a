"""The workloads that a plan is fitted on and judged on: traces of one model, or domains or phases
of a trace. All weigh the same, however long, but for the weights of those fitted on.

W workloads, U units (clusters of documents), E experts, G GPUs, B random signs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import PurePath

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, joint_p, signed_sums
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.verdict.findings import FEW_DOCUMENTS
from moe_inspect.simulate.placement.policies import shares
from moe_inspect.simulate.placement.windows import FitWindows, PlacementPlans, fit_windows_of
from moe_inspect.simulate.shards import phases_of
from moe_inspect.trace.reader import Trace, address


@dataclass(frozen=True)
class Workload:
    """`selection`: the counted tokens; `units_U`: bool, the workload's own part of the counts."""

    name: str
    trace: Trace
    selection: Selection
    counts: Counts
    units_U: np.ndarray

    @property
    def documents_tell(self) -> bool:
        """True if the documents are known, and enough to judge chance."""
        return not self.counts.documents_unknown and self.units_U.sum() >= FEWEST_TO_JUDGE

    def load_UE(self, router: int) -> np.ndarray:
        return self.counts.of[router].assignments_UE[self.units_U]


@dataclass(frozen=True)
class Workloads:
    """Workloads that plans are fitted on, with their weights, and workloads that plans are judged
    on. If there are none of these, plans are judged on what they are fitted on."""

    fitted: list[Workload]
    judged: list[Workload]
    weight_W: np.ndarray

    @property
    def too_few(self) -> str:
        """Why one of them is too short to judge, like `result.too_few`."""
        known = (one for one in (*self.fitted, *self.judged) if not one.counts.documents_unknown)
        return "" if all(one.documents_tell for one in known) else FEW_DOCUMENTS

    def windows(self, judged: bool) -> tuple[FitWindows, dict[int, np.ndarray]]:
        """Each workload as a window, and the load of each router's experts, float64 [W, E], scaled
        to the mean of all and by its weight. `judged`: also those judged on."""
        every = [*self.fitted, *(self.judged if judged else [])]
        weight_W = np.ones(len(every))
        weight_W[: len(self.fitted)] = self.weight_W / self.weight_W.mean()
        tokens_W = [int(one.counts.tokens_U[one.units_U].sum()) for one in every]
        loads = dict[int, np.ndarray]()
        for r in every[0].selection.routers:
            load_WE = np.stack([one.load_UE(r).sum(0) for one in every])
            total_W = load_WE.sum(1)
            loads[r] = load_WE * (weight_W * total_W.mean() / np.maximum(total_W, 1))[:, None]
        edge_W = np.cumsum([0, *tokens_W]) / max(sum(tokens_W), 1)
        names = tuple(one.name for one in every)
        return FitWindows(edge_W, len(self.fitted), sum(tokens_W), names=names), loads

    def judging(self, plans: PlacementPlans) -> Iterable[PlacementPlans]:
        """The plans on the tokens of each trace that judges them. None if one of the traces holds
        counts only, which do not state the GPUs that a token reaches."""
        parts = {(address(one.trace), one.selection): one for one in self.judged or self.fitted}
        for one in [] if any(of.trace.counts_only for of in parts.values()) else parts.values():
            windows = fit_windows_of(one.trace, one.selection, 1.0)
            yield replace(plans, trace=one.trace, selection=one.selection, windows=windows)

    def table(self, plans: PlacementPlans, by_window: pd.DataFrame) -> pd.DataFrame:
        """A row per policy and workload: the mean over layers of the load of the busiest GPU ÷
        mean, and the worst; for those judged on also the most that chance gives documents like
        these which route as those fitted on, and a p-value corrected for their number."""
        keys = ["policy", "window", "workload", "part", "tokens"]
        ratio = by_window.groupby(keys, sort=False)["max_over_mean"]
        table = ratio.agg(max_over_mean="mean", worst_max_over_mean="max").reset_index()
        table[["most_by_chance", "p"]] = np.nan
        known = [j for j, one in enumerate(self.judged) if one.documents_tell]
        if not all(one.documents_tell for one in self.fitted):
            known = []
        for policy in table["policy"].unique() if known else ():
            found = [self.null(plans, policy, self.judged[j]) for j in known]
            p = joint_p([observed for observed, _ in found], [null_B for _, null_B in found])
            for j, (_, null_B), p_value in zip(known, found, p, strict=True):
                of = (table["policy"] == policy) & (table["window"] == len(self.fitted) + j)
                table.loc[of, ["most_by_chance", "p"]] = np.quantile(null_B, 1 - ALPHA), p_value
        return table

    def slower_p(self, plans: PlacementPlans, ratio: pd.Series) -> np.ndarray:
        """P-value of how much slower each policy is than the fastest on what plans are judged on,
        where documents vary around the shares of their workload and all policies are as fast,
        corrected for their number. NaN where documents are unknown or too few."""
        judged, noise = self.judged or self.fitted, list[np.ndarray]()
        if not all(one.documents_tell for one in judged):
            return np.full(len(ratio), np.nan)
        weight_R = {r: plans.loads[r][plans.windows.judged].sum() for r in plans.selection.routers}
        for policy in ratio.index:
            null_NB, weight_N = list[np.ndarray](), list[float]()
            for r, one in product(weight_R, judged):
                G = plans.layouts[r].gpus
                expert_P, E = plans.of[r, policy], plans.trace.routers[r].experts
                load_UG = one.load_UE(r) @ shares(expert_P, E, G)
                if load_UG.any():
                    share_G = load_UG.sum(0) / load_UG.sum()
                    null_NB.append((share_G + _noise(load_UG, share_G)).max(1) * G)
                    weight_N.append(weight_R[r])
            null_B = np.average(null_NB, axis=0, weights=weight_N)
            noise.append(null_B - null_B.mean())
        return joint_p(list(ratio - ratio.min()), list(noise - np.min(noise, axis=0)))

    def null(
        self, plans: PlacementPlans, policy: str, judged: Workload
    ) -> tuple[float, np.ndarray]:
        """The mean over layers of busiest ÷ mean GPU, and the same where its documents, and those
        fitted on, vary around the shares of those fitted on. float64 [B]"""
        observed_R, null_RB = list[float](), list[np.ndarray]()
        for r in plans.selection.routers:
            G = plans.layouts[r].gpus
            share_EG = shares(plans.of[r, policy], plans.trace.routers[r].experts, G)
            load_UG = judged.load_UE(r) @ share_EG
            fitted = [one.load_UE(r) @ share_EG for one in self.fitted]
            if load_UG.any() and all(of.any() for of in fitted):
                of_WG = [of.sum(0) / of.sum() for of in fitted]
                noise = [_noise(*pair) for pair in zip(fitted, of_WG, strict=True)]
                share_G = np.average(of_WG, axis=0, weights=self.weight_W)
                # minus: documents that both have get the same signs, as prompts and their answers
                null_BG = share_G + _noise(load_UG, share_G)
                null_BG = null_BG - np.average(noise, axis=0, weights=self.weight_W)
                observed_R.append(float(load_UG.sum(0).max() / load_UG.sum() * G))
                null_RB.append(null_BG.max(1) * G)
        return float(np.mean(observed_R)), np.mean(null_RB, axis=0)


def _noise(load_UG: np.ndarray, share_G: np.ndarray) -> np.ndarray:
    """How far chance takes the share of each GPU. [B, G]"""
    load_U1 = load_UG.sum(1, keepdims=True)
    return signed_sums(load_UG - load_U1 * share_G) / load_U1.sum()


def workloads_of(
    traces: Sequence[Trace],
    selections: Sequence[Selection],
    fit: int,
    fit_domains: str | Iterable[str] | None,
    fit_phase: str | None,
    weights: Sequence[float] | None,
) -> Workloads:
    """Fitted on: the first `fit` traces, or these domains or this phase of the first.
    MoeInspectError where two traces are the same or of different routers, or weights do not fit."""
    paths = [address(trace) for trace in traces]
    shapes = [[(of.layer, of.stack, of.experts) for of in trace.routers] for trace in traces]
    for n, path in enumerate(paths):
        if path in paths[:n]:
            raise MoeInspectError(f"{path} is given twice: give each trace once")
        if shapes[n] != shapes[0]:
            raise MoeInspectError(
                f"{path} and {paths[0]} have different routers: a plan is of one model"
            )
    names = [PurePath(path).name for path in paths]
    names = names if len({*names}) == len(names) else paths
    whole = [*zip(traces, selections, names, strict=True)]
    trace, selection = traces[0], selections[0]
    if fit_domains:
        fitted, judged = _domains(trace, selection, fit_domains)
    elif fit_phase:
        first = select(trace, phase=fit_phase).phase  # refuses counts
        phases = fit_phase, *(p for p in phases_of(trace) if p != first)
        fitted, *judged = [workload(trace, replace(selection, phase=p), p) for p in phases]
        fitted = [fitted]
    else:
        fitted, judged = [workload(*of) for of in whole[:fit]], []
    judged += [workload(*of) for of in whole[fit:]]
    weight_W = np.ones(len(fitted)) if weights is None else np.array(weights, float)
    if len(weight_W) != len(fitted) or not (np.isfinite(weight_W) & (weight_W > 0)).all():
        raise MoeInspectError(
            f"fit_weights {', '.join(map(str, weights or []))}: give a number above 0 for each of "
            f"{', '.join(one.name for one in fitted)}"
        )
    return Workloads(fitted, judged, weight_W)


def workload(trace: Trace, selection: Selection, name: str = "") -> Workload:
    counts = count_trace(trace, selection)
    return Workload(name, trace, selection, counts, np.ones(len(counts.units), bool))


def _domains(
    trace: Trace, selection: Selection, chosen: str | Iterable[str]
) -> tuple[list[Workload], list[Workload]]:
    """The workloads of the chosen domains, and of the other domains, counted at once."""
    counts = count_trace(trace, selection)
    fitted = select(trace, None, chosen).domains or set[str]()
    if missing := fitted - {*counts.domains}:
        raise MoeInspectError(f"no token of {', '.join(sorted(missing))} is selected")
    domain_U = np.array([domain for domain, _ in counts.units])

    def of(domains: list[str]) -> list[Workload]:
        part = replace(selection, domains=frozenset(domains))
        return [Workload(d, trace, part, counts, domain_U == d) for d in domains]

    return of(sorted(fitted)), of([d for d in counts.domains if d not in fitted])
