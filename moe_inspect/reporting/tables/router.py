"""Tables of the router: its confidence and losses, and ESFT scores. E experts, D domains."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics import router as rt
from moe_inspect.analysis.metrics import worth as scores
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
        of = counts.of[r]
        n, weighted = of.logit_decisions, of.weight_decisions
        row: dict[str, float] = {
            "layer": counts.routers[r].layer,
            "router": r,
            "logit_decisions": n,
        }
        if of.probability_sum_E is not None and n:
            row["aux_loss"] = rt.aux_loss(counts.load_E(r), of.probability_sum_E)
        row |= {
            "weight_mass": rt.weight_mass(of.weight_mass_sum, weighted),
            "weight_entropy_nats": rt.weight_entropy_nats(of.weight_entropy_sum, weighted),
            "weight_margin": rt.weight_margin(of.weight_margin_sum, weighted)
            if counts.routers[r].top_k > 1
            else np.nan,
            "z_loss": rt.z_loss(of.z_sum, n),
            "gate_entropy_nats": rt.gate_entropy_nats(of.entropy_sum, n),
            "top_k_mass": rt.top_k_mass(of.topk_mass_sum, n),
            "top1_margin": rt.top1_margin(of.top1_margin_sum, n),
            "boundary_margin": rt.boundary_margin(of.boundary_margin_sum, n),
            "tie_rate": rt.tie_rate(of.ties, n),
        }
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
            "token_score": scores.token_score(assignments_DE).reshape(-1),
            "gate_score": scores.gate_score(weight_sum_DE, counts.tokens_D_of(r)).reshape(-1),
            "token_score_by_sample": scores.token_score_by_sample(token_DE, samples_D).reshape(-1),
            "gate_score_by_sample": scores.gate_score_by_sample(gate_DE, samples_D).reshape(-1),
            "samples": np.repeat(samples_D.astype(np.int64), E),
        }
        parts.append(of_router(data, r, columns))
    return stacked(parts)
