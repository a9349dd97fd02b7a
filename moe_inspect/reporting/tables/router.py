"""Tables of what the router and the experts compute: confidence and losses of the router, ESFT
scores, what each expert is worth by the size of what it returns (`trace --output-norms`), and which
experts serve tokens whose successor is hard to predict (`trace --token-loss`).

L routers, E experts, U units (clusters of documents), D domains, R resamples.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts, values_of
from moe_inspect.analysis.counting.samples import SampledLosses, sampled_losses
from moe_inspect.analysis.losses import CellLosses, ExpertLosses, add_p, by_expert
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics import worth as metrics
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.analysis.weights.measure import aimer_of
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.load import of_router, stacked
from moe_inspect.reporting.tables.registry import table

ROUTER = (
    "weight_mass",
    "weight_entropy_nats",
    "weight_margin",
    "logit_decisions",
    "aux_loss",
    "z_loss",
    "gate_entropy_nats",
    "top_k_mass",
    "top1_margin",
    "boundary_margin",
    "tie_rate",
)


@table("weights", "logits", by_router=ROUTER)
def router(data: ReportData) -> pd.DataFrame:
    """One row per router: its confidence, from the k gate weights and, where they are recorded,
    from all logits (NaN otherwise); the balancing losses computed from the logits."""
    counts, rows = data.counts_for("weights", "logits"), list[dict[str, float]]()
    for r in data.selection.routers:
        row = {"layer": counts.routers[r].layer, "router": r, **values_of(counts, r, "router")}
        row["logit_decisions"] = counts.of[r].logit_decisions
        if counts.routers[r].top_k == 1:
            row["weight_margin"] = np.nan
        rows.append(row)
    frame = pd.DataFrame(rows, columns=["layer", "router", *ROUTER])
    return frame.astype({name: float for name in ROUTER if name != "logit_decisions"})


@table("esft")
def esft(data: ReportData) -> pd.DataFrame:
    """One row per expert and domain: the expert's share of the domain by tokens and by gate weight,
    weighting all tokens alike, or all samples (sequences): the scores by which expert-specialised
    fine-tuning (ESFT) selects experts."""
    counts, parts = data.counts_for("esft"), list[dict[str, np.ndarray]]()
    D = len(counts.domains)
    for r in data.selection.routers:
        of, assignments_DE = counts.of[r], counts.assignments_DE(r)
        E = counts.routers[r].experts
        nothing_DE = np.full(assignments_DE.shape, np.nan)
        samples_D = of.samples_D if of.samples_D is not None else np.zeros(D)
        weight_sum_DE = nothing_DE if of.weight_sum_DE is None else of.weight_sum_DE
        token_DE = nothing_DE if of.esft_token_DE is None else of.esft_token_DE
        gate_DE = (
            nothing_DE if of.esft_gate_DE is None or of.weight_sum_DE is None else of.esft_gate_DE
        )
        columns = {
            "domain": np.repeat(np.array(counts.domains, object), E),
            "expert": np.tile(np.arange(E), D),
            "token_score": metrics.token_score(assignments_DE).reshape(-1),
            "gate_score": metrics.gate_score(weight_sum_DE, counts.tokens_D_of(r)).reshape(-1),
            "token_score_by_sample": metrics.token_score_by_sample(token_DE, samples_D).reshape(-1),
            "gate_score_by_sample": metrics.gate_score_by_sample(gate_DE, samples_D).reshape(-1),
            "samples": np.repeat(samples_D.astype(np.int64), E),
        }
        parts.append(of_router(data, r, columns))
    return stacked(parts)


@table("worth")
def worth(data: ReportData) -> pd.DataFrame:
    """One row per expert: its assignments and gate weights, and by the norms of its outputs REAP,
    EAN, mean norm and share, with 95 % intervals over documents; whether it is a super expert, by
    the peaks; on how many domains it was judged; and AIMER, by the model's weights. NaN where the
    trace lacks what it takes, or no weights are given."""
    counts = data.decisions("worth")
    weights_RU = unc.resample_weights(counts.domain_of_unit_U)
    parts = [_of_router(counts, r, weights_RU) for r in counts.indices]
    found = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
    peak_LE = [counts.of[r].peak_E for r in counts.indices]
    known = [peak_E for peak_E in peak_LE if peak_E is not None]
    found["super_expert"] = pd.array([pd.NA] * len(found), dtype="boolean")
    if known and len(known) == len(peak_LE):
        layers = np.array([counts.routers[r].layer for r in counts.indices])
        is_super = metrics.super_experts(known, layers, data.trace.blocks)
        found["super_expert"] = pd.array(np.concatenate(is_super), dtype="boolean")
    found["aimer"] = np.nan
    if data.weights is not None:
        aimer = aimer_of(data.weights, counts.routers, counts.indices)
        found["aimer"] = np.concatenate([aimer[r] for r in counts.indices])
    return found


def _of_router(counts: Counts, r: int, weights_RU: np.ndarray | None) -> dict[str, Any]:
    router, of = counts.routers[r], counts.of[r]
    E, load_UE = router.experts, of.assignments_UE
    nothing_UE = np.full(load_UE.shape, np.nan)
    gated_UE = nothing_UE if of.gated_norm_UE is None else of.gated_norm_UE
    norm_UE = nothing_UE if of.norm_UE is None else of.norm_UE
    # a share is of the router's sum in the same resample
    total_UE = np.broadcast_to(gated_UE.sum(1, keepdims=True), gated_UE.shape)
    assignments_DE = counts.assignments_DE(r)
    made: dict[str, Any] = {
        "layer": router.layer,
        "router": r,
        "expert": np.arange(E),
        "assignments": load_UE.sum(0),
        "gate_sum": counts.weight_sum_E(r),
        **_with_interval("reap", gated_UE, load_UE, weights_RU),
        "ean_sum": norm_UE.sum(0),
        **_with_interval("mean_norm", norm_UE, load_UE, weights_RU),
        **_with_interval("share", gated_UE, total_UE, weights_RU),
        "peak": np.full(E, np.nan) if of.peak_E is None else of.peak_E,
        "domains_judged": (assignments_DE >= metrics.JUDGED).sum(0),
        "domains": len(assignments_DE),
    }
    return made


def _with_interval(
    name: str, sums_UE: np.ndarray, of_UE: np.ndarray, weights_RU: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Σ sums ÷ Σ of, of each expert, and its 95 % interval over documents."""
    value_E = sums_UE.sum(0) / nan_for_zero(of_UE.sum(0))
    ends_2E, known_E = np.full((2, len(value_E)), np.nan), np.isfinite(value_E)
    if weights_RU is not None and known_E.any():
        of_UN = of_UE[:, known_E]
        values_RN = weights_RU @ sums_UE[:, known_E] / nan_for_zero(weights_RU @ of_UN)
        documents = unc.effective_documents(of_UE.sum(1))
        ends_2E[:, known_E] = unc.interval(values_RN, documents, (0.0, np.inf))
    low_E, high_E = ends_2E
    return {name: value_E, f"{name}_low": low_E, f"{name}_high": high_E}


@table()
def loss(data: ReportData) -> pd.DataFrame:
    """One row per expert of all tokens (domain and phase are empty), of each domain and of each
    phase: the mean loss of its tokens, and by how much they are harder to continue than other
    tokens of the same domain, phase and token id, with a 95 % interval over documents, beside what
    documents give by chance. Empty for a trace without losses."""
    data.decisions("loss")
    names = [field.name for field in fields(ExpertLosses) if field.name != "largest_B"]
    parts: list[tuple[dict[str, Any], ExpertLosses]] = []
    by_group = dict[tuple[str | None, str | None], list[ExpertLosses]]()
    for of in sampled_losses(data.trace, data.selection) if data.trace.has_loss else ():
        explained = CellLosses.of(of)
        for r in of.routers:
            router = data.trace.routers[r]
            for domain, phase, in_S in _groups(of):
                values = by_expert(explained, of.slots[r], router.experts, in_S)
                E = router.experts
                keys: dict[str, Any] = {"layer": router.layer, "router": r, "expert": np.arange(E)}
                keys["domain"] = pd.Series([domain] * E, dtype=object)
                keys["phase"] = pd.Series([phase] * E, dtype=object)
                parts.append((keys, values))
                by_group.setdefault((domain, phase), []).append(values)
    if not parts:
        whole = ("layer", "router", "expert", "assignments", "compared")
        columns = ["layer", "router", "expert", "domain", "phase", *names]
        kinds = {"domain": object, "phase": object, **dict.fromkeys(whole, "int64")}
        return pd.DataFrame(columns=columns).astype({**dict.fromkeys(names, "float64"), **kinds})
    for of_routers in by_group.values():
        add_p(of_routers)
    found = pd.concat([pd.DataFrame(keys | of.columns) for keys, of in parts], ignore_index=True)
    return found.sort_values("router", kind="stable", ignore_index=True)


def _groups(of: SampledLosses) -> list[tuple[str | None, str | None, np.ndarray | None]]:
    """(domain, phase, bool [S]: its tokens) of all, of each domain and of each phase, where there
    are several."""
    found: list[tuple[str | None, str | None, np.ndarray | None]] = [(None, None, None)]
    for d, name in enumerate(of.domains if len(of.domains) > 1 else ()):
        found.append((name, None, of.domain_S == d))
    for p, name in enumerate(of.phases if len(of.phases) > 1 else ()):
        found.append((None, name, of.phase_S == p))
    return [group for group in found if group[2] is None or group[2].any()]
