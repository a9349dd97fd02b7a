"""Tables of specialisation: the load of each expert by domain, the information that domain and
token id carry about the expert, and the token ids of each expert.

V token ids, E experts, D domains, U units (clusters of documents), L routers.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.counting.counts import Counts, values_of
from moe_inspect.analysis.metrics import chance
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.errors import MoeInspectError
from moe_inspect.later import pd
from moe_inspect.reporting.tables import load
from moe_inspect.reporting.tables.data import ReportData, Row
from moe_inspect.reporting.tables.registry import AsColumns, table

SPECIALIZATION = (
    *("domain_mi_bits", "domain_mi_null_bits", "domain_mi_p"),
    *(f"domain_mi_given_token_{of}" for of in ("bits", "null_bits", "p")),
    "token_mi_bits",
    *(f"vocabulary_specialization{of}" for of in ("", "_null", "_p")),
)
UNLISTED = ("domain_mi_null_p99_bits", "token_mi_null_bits")
# of what a baseline is subtracted → its unit, the end of its name
BEYOND = {
    "domain_mi": "_bits",
    "domain_mi_given_token": "_bits",
    "token_mi": "_bits",
    "vocabulary_specialization": "",
}


@table()
def domains(data: ReportData) -> AsColumns:
    """One row per expert and domain: activation = assignments ÷ tokens of the domain (sums to k
    over the experts), lift = activation ÷ its mean over the domains, of all where only one is
    selected. expected_by_chance: the load ratio (assignments ÷ their mean over the experts) that
    chance gives the busiest expert of such a domain. overload_p: probability that documents by
    chance give a domain so much more of an expert than the others have, corrected for the number of
    experts, domains and routers."""
    counts = data.counts
    every = data.counts_of_all_domains() if len(counts.domains) == 1 else counts
    D, among = len(counts.domains), [every.domains.index(domain) for domain in counts.domains]

    def columns(r: int) -> load.Columns:
        assignments_DE, tokens_D = counts.assignments_DE(r), counts.tokens_D_of(r)
        every_DE, E, k = every.assignments_DE(r), counts.routers[r].experts, counts.routers[r].top_k
        floor_D, _ = unc.noise_of(every_DE.sum(1) / k, E, k, every.filled(r))
        expected_D = 1 + floor_D * load.widened(load.design_effect(every, r))
        return {
            "domain": np.repeat(np.array(counts.domains, object), E),
            "expert": np.tile(np.arange(E), D),
            "tokens": np.repeat(tokens_D, E),
            "assignments": assignments_DE.reshape(-1),
            "activation": sp.activation(assignments_DE, tokens_D).reshape(-1),
            "lift": sp.lift(every_DE, every.tokens_D_of(r))[among].reshape(-1),
            "expected_by_chance": np.repeat(expected_D[among], E),
            "overload_p": _overload_p(every, r)[among].reshape(-1),
        }

    return load.rows_per_router(data, columns)


def _overload_p(counts: Counts, router: int) -> np.ndarray:
    if not counts.documents_tell:
        return np.full(counts.assignments_DE(router).shape, np.nan)
    p_DE = chance.overload_p(counts.of[router].assignments_UE, counts.domain_of_unit_U)
    return np.minimum(p_DE * p_DE.size * len(counts.of), 1)


@table("token_ids", by_router=SPECIALIZATION, unlisted=UNLISTED)
def specialization(data: ReportData) -> pd.DataFrame:
    """One row per router: the information about the expert that the domain carries, that the token
    id carries, and that the domain carries given the token id; each with its null: documents of
    domains that share one mean, or shuffled token ids. domain_mi_p, domain_mi_given_token_p:
    probability that such documents carry as much at any router. With a baseline: what each is
    beyond chance in it, and here beyond that (`beyond_baseline`)."""
    by_token_id, counts = data.counts_for("token_ids").by_token_id, data.counts
    judged = not counts.documents_unknown and len(counts.units) >= unc.FEWEST_DOCUMENTS
    null_LB, given_LB = list[np.ndarray](), list[np.ndarray]()

    def values(r: int) -> Row:
        units, of = (counts.of[r].assignments_UE, counts.domain_of_unit_U), by_token_id.get(r)
        expected = None if of is None else of.expected
        null_LB.append(sp.domain_mi_null(*units) if judged else np.full(1, np.nan))
        given_LB.append(expected.null() if judged and expected else np.full(1, np.nan))
        row = {
            **values_of(counts, r, "specialization"),
            **(of.columns if of else {}),
            "domain_mi_null_bits": float(null_LB[-1].mean()),
            "domain_mi_null_p99_bits": float(np.quantile(null_LB[-1], 0.99)),
            "domain_mi_given_token_null_bits": float(given_LB[-1].mean()),
        }
        if expected:
            given = sp.domain_mi_given_token_bits(*expected.by_domain())
            row["domain_mi_given_token_bits"] = given
        return row

    names = (*SPECIALIZATION, *UNLISTED)
    frame = load.row_per_router(counts, data.selection.routers, names, values)
    for name, nulls in (("domain_mi", null_LB), ("domain_mi_given_token", given_LB)):
        without = np.array([bool(np.isnan(null).any()) for null in nulls])
        known = frame[f"{name}_bits"].astype("float64").mask(without)
        frame[f"{name}_p"] = chance.joint_p(known.tolist(), nulls)
    frame = frame.astype(dict.fromkeys(names, "float64"))
    return frame if data.baseline is None else beyond_baseline(data, frame, data.baseline)


def beyond_baseline(data: ReportData, frame: pd.DataFrame, other: ReportData) -> pd.DataFrame:
    """The table with columns for the baseline: value − null in it (`…_baseline`), value − null here
    minus that (`…_beyond_baseline`), and of the domain's information the probability that documents
    by chance give so much beyond it at any router."""

    def shapes(of: ReportData) -> list[tuple[object, ...]]:
        routers = (of.trace.routers[r] for r in of.selection.routers)
        return [(r.layer, r.stack, r.experts, r.top_k) for r in routers]

    def errors(of: ReportData) -> np.ndarray:
        loads, domain_U, routers = of.counts.of, of.counts.domain_of_unit_U, of.selection.routers
        return np.array([sp.domain_mi_error(loads[r].assignments_UE, domain_U) for r in routers])

    differ = ["routers"] if shapes(data) != shapes(other) else []
    differ += ["domains"] if set(data.counts.domains) != set(other.counts.domains) else []
    if differ:
        raise MoeInspectError(
            f"the baseline {other.trace.path} has other {' and other '.join(differ)} than "
            f"{data.trace.path}: trace the same texts with a model of the same shape"
        )
    its_frame, added = other.tables.complete("specialization"), dict[str, pd.Series]()
    for name, unit in BEYOND.items():
        here, there = (of[f"{name}{unit}"] - of[f"{name}_null{unit}"] for of in (frame, its_frame))
        added[f"{name}_baseline{unit}"] = there
        added[f"{name}_beyond_baseline{unit}"] = here - there
    freedom = min(len(x.counts.units) for x in (data, other)) - len(data.counts.domains)
    beyond = added["domain_mi_beyond_baseline_bits"].to_numpy(float)
    p_L = unc.student_p(beyond / np.hypot(errors(data), errors(other)), max(freedom, 1))
    added["domain_mi_beyond_baseline_p"] = pd.Series(np.minimum(p_L * len(frame), 1))
    return frame.assign(**added)


@table("token_ids")
def vocabulary(data: ReportData) -> AsColumns:
    """One row per expert and token id: the token ids most exclusively routed to it. fraction and
    first_choice_fraction are of the token id's occurrences."""
    return token_ids(data)


def token_ids(data: ReportData, most: int | None = None) -> AsColumns:
    """The rows of `vocabulary`, at most so many of each expert."""
    if data.counts.counts_only:
        raise MoeInspectError(
            f"{data.trace.path} holds counts only, no token ids: no vocabulary table; "
            f"{data.trace.more_than_counts}"
        )
    by_token_id = data.counts_for("token_ids").by_token_id
    text = data.trace.vocabulary().drop_duplicates("token_id")
    text_of = pd.Series(text["token"].to_numpy(object), index=text["token_id"].to_numpy())

    def columns(r: int) -> load.Columns:
        of = by_token_id[r]
        listed = of.expert_N, of.token_id_N, of.count_N, of.occurrences_N
        expert_N, token_id_N, count_N, occurrences_N = (N.astype(np.int64) for N in listed)
        often_N = np.maximum(occurrences_N, 1)
        rank_N = np.arange(len(expert_N)) - np.searchsorted(expert_N, expert_N)
        found = {
            "expert": expert_N,
            "token_id": token_id_N,
            "token": text_of.reindex(token_id_N).to_numpy(object),
            "count": count_N,
            "fraction": count_N / often_N,
            "first_choice_fraction": np.nan if of.first_N is None else of.first_N / often_N,
            "occurrences": occurrences_N,
        }
        kept = slice(None) if most is None else rank_N < most
        return {name: np.broadcast_to(N, rank_N.shape)[kept] for name, N in found.items()}

    return load.rows_per_router(data, columns)
