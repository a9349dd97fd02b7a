"""Tables of what the router and the experts compute: confidence and losses of the router, what
each expert is worth by the size of what it returns (`trace --output-norms`), and which
experts serve tokens whose successor is hard to predict (`trace --token-loss`).

L routers, E experts, U units (clusters of documents), D domains, R resamples.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from moe_inspect.analysis.counting.counts import Counts, values_of
from moe_inspect.analysis.counting.samples import SampledLosses, sampled_losses
from moe_inspect.analysis.losses import CellLosses, ExpertLosses, add_p, by_expert
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import worth as metrics
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.weights.measure import aimer_of
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row
from moe_inspect.reporting.tables.load import Columns, row_per_router, rows_per_router
from moe_inspect.reporting.tables.registry import table

ROUTER = (
    *("weight_mass", "weight_entropy_nats", "weight_margin"),
    *("logit_decisions", "aux_loss", "z_loss", "gate_entropy_nats", "top_k_mass"),
    *("top1_margin", "boundary_margin", "tie_rate"),
)


@table("weights", "logits", by_router=ROUTER)
def router(data: ReportData) -> pd.DataFrame:
    """One row per router: its confidence, from the k gate weights and, where they are recorded,
    from all logits (NaN otherwise); the balancing losses computed from the logits."""
    counts = data.counts_for("weights", "logits")

    def values(r: int) -> Row:
        row = values_of(counts, r, "router") | {"logit_decisions": counts.of[r].logit_decisions}
        return row | {"weight_margin": np.nan} if counts.routers[r].top_k == 1 else row

    frame = row_per_router(counts, data.selection.routers, ROUTER, values)
    return frame.astype({name: "float64" for name in ROUTER if name != "logit_decisions"})


def _or_nan(values: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, np.nan) if values is None else values


@table("worth")
def worth(data: ReportData) -> pd.DataFrame:
    """One row per expert: its assignments and gate weights, and by the norms of its outputs REAP,
    EAN, mean norm and share, with 95 % intervals over documents; the mean of what the source of
    imported counts scores its assignments by (saliency); whether it is a super expert, by the
    peaks; on how many domains it was judged; and AIMER, by the model's weights. NaN where the trace
    lacks what it takes, or no weights are given."""
    counts = data.decisions("worth")
    weights_RU = counts.weights_RU
    found = pd.DataFrame(rows_per_router(data, lambda r: _worth_of(counts, r, weights_RU)))
    peaks = [peak_E for r in counts.indices if (peak_E := counts.of[r].peak_E) is not None]
    super_expert = pd.array([pd.NA] * len(found), dtype="boolean")
    if peaks and len(peaks) == len(counts.indices):
        layers = np.array([counts.routers[r].layer for r in counts.indices])
        is_super = metrics.super_experts(peaks, layers, data.trace.blocks)
        super_expert = pd.array(np.concatenate(is_super), dtype="boolean")
    aimer = np.full(len(found), np.nan)
    if data.weights is not None:
        of_router = aimer_of(data.weights, counts.routers, counts.indices)
        aimer = np.concatenate([of_router[r] for r in counts.indices])
    return found.assign(super_expert=super_expert, aimer=aimer)


def _worth_of(counts: Counts, r: int, weights_RU: np.ndarray | None) -> Columns:
    of, E, assignments_DE = counts.of[r], counts.routers[r].experts, counts.assignments_DE(r)
    load_UE = of.assignments_UE
    gated_UE = _or_nan(of.gated_norm_UE, load_UE.shape)
    norm_UE = _or_nan(of.norm_UE, load_UE.shape)
    saliency_UE = _or_nan(of.saliency_sum_UE, load_UE.shape)
    # a share is of the router's sum in the same resample
    total_UE = np.broadcast_to(gated_UE.sum(1, keepdims=True), gated_UE.shape)
    return {
        "expert": np.arange(E),
        "assignments": load_UE.sum(0),
        "gate_sum": counts.weight_sum_E(r),
        **_with_interval("reap", gated_UE, load_UE, weights_RU),
        "ean_sum": norm_UE.sum(0),
        **_with_interval("mean_norm", norm_UE, load_UE, weights_RU),
        **_with_interval("share", gated_UE, total_UE, weights_RU),
        **_with_interval("saliency", saliency_UE, load_UE, weights_RU, -np.inf),
        "peak": _or_nan(of.peak_E, (E,)),
        "domains_judged": (assignments_DE >= metrics.JUDGED).sum(0),
        "domains": len(assignments_DE),
    }


def _with_interval(
    name: str,
    sums_UE: np.ndarray,
    of_UE: np.ndarray,
    weights_RU: np.ndarray | None,
    least: float = 0.0,
) -> dict[str, np.ndarray]:
    """Σ sums ÷ Σ of, of each expert, and its 95 % interval over documents, from `least` on."""
    value_E = sums_UE.sum(0) / nan_for_zero(of_UE.sum(0))
    ends_2E, known_E = np.full((2, len(value_E)), np.nan), np.isfinite(value_E)
    if weights_RU is not None and known_E.any():
        of_RN = nan_for_zero(weights_RU @ of_UE[:, known_E])
        documents = unc.effective_documents(of_UE.sum(1))
        values_RN = weights_RU @ sums_UE[:, known_E] / of_RN
        ends_2E[:, known_E] = unc.interval(values_RN, documents, (least, np.inf))
    return {name: value_E, f"{name}_low": ends_2E[0], f"{name}_high": ends_2E[1]}


@table()
def loss(data: ReportData) -> pd.DataFrame:
    """One row per expert of all tokens (domain and phase are empty), of each domain and of each
    phase: the mean loss of its tokens, and by how much they are harder to continue than other
    tokens of the same domain, phase and token id, with a 95 % interval over documents, beside what
    documents give by chance. Empty for a trace without losses."""
    data.decisions("loss")
    keys = ("layer", "router", "expert", "domain", "phase")
    parts = list[tuple[dict[str, object], ExpertLosses]]()
    by_group = dict[tuple[str | None, str | None], list[ExpertLosses]]()
    for of in sampled_losses(data.trace, data.selection) if data.trace.has_loss else ():
        explained = CellLosses.of(of)
        groups = {(domain, phase): explained.group(in_S) for domain, phase, in_S in _groups(of)}
        for r in of.routers:
            layer, E = data.trace.routers[r].layer, data.trace.routers[r].experts
            of_groups = by_expert(explained, of.slots[r], E, groups.values())
            for (domain, phase), values in zip(groups, of_groups, strict=True):
                of_rows = (layer, r, np.arange(E), domain, phase)
                parts.append((dict(zip(keys, of_rows, strict=True)), values))
                by_group.setdefault((domain, phase), []).append(values)
    if not parts:
        names = [field.name for field in fields(ExpertLosses) if field.name != "largest_B"]
        whole = ("layer", "router", "expert", "assignments", "compared")
        kinds = dict.fromkeys(names, "float64") | GROUP | dict.fromkeys(whole, "int64")
        return pd.DataFrame(columns=[*keys, *names]).astype(kinds)
    for of_routers in by_group.values():
        add_p(of_routers)
    frames = [pd.DataFrame(of_rows | of.columns).astype(GROUP) for of_rows, of in parts]
    found = pd.concat(frames, ignore_index=True)
    return found.sort_values("router", kind="stable", ignore_index=True)


GROUP = {"domain": "object", "phase": "object"}


def _groups(of: SampledLosses) -> list[tuple[str | None, str | None, np.ndarray | None]]:
    """(domain, phase, its tokens, bool [S]) of all, of each domain, of each phase, if several."""
    domains = enumerate(of.domains if len(of.domains) > 1 else ())
    phases = enumerate(of.phases if len(of.phases) > 1 else ())
    parts = [(name, None, of.domain_S == d) for d, name in domains]
    parts += [(None, name, of.phase_S == p) for p, name in phases]
    return [(None, None, None), *(part for part in parts if part[2].any())]
