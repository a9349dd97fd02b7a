"""Tables of specialisation: the load of each expert by domain, the information that domain and
token id carry about the expert, and the token ids of each expert. V token ids, E experts, D
domains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting import token_ids as tokenids
from moe_inspect.analysis.metrics import specialization as sp
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.data import ReportData, has_run, once
from moe_inspect.reporting.tables.load import of_router, stacked
from moe_inspect.reporting.tables.registry import table

SPECIALIZATION = (
    "domain_mi_bits",
    "domain_mi_null_bits",
    "domain_mi_null_p99_bits",
    "domain_mi_given_token_bits",
    "domain_mi_given_token_null_bits",
    "token_mi_bits",
    "token_mi_null_bits",
    "jsd_bits",
    "vocabulary_specialization",
    "vocabulary_specialization_null",
    "vocabulary_specialization_any",
    "vocabulary_specialization_any_null",
)


@table()
def domains(data: ReportData) -> pd.DataFrame:
    """One row per expert and domain: activation = assignments ÷ tokens of the domain (sums to k
    over the experts), lift = activation ÷ its mean over the domains."""
    counts, parts = data.counts, list[pd.DataFrame]()
    D = len(counts.domains)
    for r in data.selection.routers:
        assignments_DE, tokens_D = counts.assignments_DE(r), counts.tokens_D_of(r)
        E = counts.routers[r].experts
        columns = {
            "domain": np.repeat(np.array(counts.domains, object), E),
            "expert": np.tile(np.arange(E), D),
            "tokens": np.repeat(tokens_D, E),
            "assignments": assignments_DE.reshape(-1),
            "activation": sp.activation(assignments_DE, tokens_D).reshape(-1),
            "lift": sp.lift(assignments_DE, tokens_D).reshape(-1),
        }
        parts.append(of_router(data, r, columns))
    return stacked(parts)


@table(by_router=SPECIALIZATION)
def specialization(data: ReportData) -> pd.DataFrame:
    """One row per router: the information about the expert that the domain carries, that the token
    id carries, and that the domain carries given the token id; each with its null, the same with
    shuffled labels."""
    if data.counts.counts_only:
        rows = [_domain_specialization(data, r) for r in data.selection.routers]
    else:
        rows = [
            {**_domain_specialization(data, r), **by_id}
            for r, by_id in zip(data.selection.routers, _token_id_pass(data).columns, strict=True)
        ]
    return pd.DataFrame(rows, columns=["layer", "router", *SPECIALIZATION]).astype(
        dict.fromkeys(SPECIALIZATION, float)
    )


def _domain_specialization(data: ReportData, router: int) -> dict[str, float]:
    counts = data.counts
    assignments_DE = counts.assignments_DE(router)
    null, p99 = float("nan"), float("nan")
    if not counts.counts_only and len(counts.units) >= unc.FEWEST_DOCUMENTS:
        null, p99 = sp.domain_mi_null_bits(
            counts.of[router].assignments_UE, counts.domain_of_unit_U
        )
    return {
        "layer": counts.routers[router].layer,
        "router": router,
        "domain_mi_bits": sp.domain_mi_bits(assignments_DE),
        "domain_mi_null_bits": null,
        "domain_mi_null_p99_bits": p99,
        "jsd_bits": sp.jsd_bits(assignments_DE),
    }


@dataclass(frozen=True)
class TokenIdPass:
    """The results of the pass by token id. columns: for the table `specialization`, one dict per
    router. vocabulary: the table of that name, None where all token ids are asked for."""

    columns: list[dict[str, float]]
    vocabulary: pd.DataFrame | None


@once
def _token_id_pass(data: ReportData) -> TokenIdPass:
    columns, words = list[dict[str, float]](), list[pd.DataFrame]()
    for tables in tokenids.by_token_id(
        data.trace, data.selection, data.counts, nulls=True, progress=data.progress
    ):
        columns.append(_by_token_id(tables, len(data.counts.domains)))
        if data.top:
            words.append(_vocabulary_rows(tables, data))
    return TokenIdPass(columns, stacked(words) if words else None)


def _by_token_id(tables: tokenids.TokenTables, D: int) -> dict[str, float]:
    """The columns of `specialization` that need token ids."""
    token_mi, token_mi_null = tokenids.token_mi(tables)
    occurrences_V = tables.token_ids.occurrences_V
    any_null = [sp.vocabulary_specialization_any(a, occurrences_V) for a in tables.shuffled_any]
    row = {
        "token_mi_bits": token_mi,
        "token_mi_null_bits": token_mi_null,
        "vocabulary_specialization_any": sp.vocabulary_specialization_any(
            tables.any_VE, occurrences_V
        ),
        "vocabulary_specialization_any_null": float(np.mean(any_null)),
    }
    if tables.first_VE is not None:
        row["vocabulary_specialization"] = sp.vocabulary_specialization(tables.first_VE)
        row["vocabulary_specialization_null"] = float(
            np.mean([sp.vocabulary_specialization(f) for f in tables.shuffled_first])
        )
    if tables.by_unit is not None:
        counts_PE, token_P, domain_P = tables.pairs(D)
        row["domain_mi_given_token_bits"] = sp.conditional_mi_bits(
            *sp.by_group(counts_PE, token_P, domain_P)
        )
        null = (
            sp.conditional_mi_null_bits(counts_PE, token_P, domain_P, len(tables.shuffled_any))
            if len(counts_PE)
            else float("nan")
        )
        row["domain_mi_given_token_null_bits"] = null
    return row


@table()
def vocabulary(data: ReportData) -> pd.DataFrame:
    """One row per expert and token id: the token ids most exclusively routed to it. fraction and
    first_choice_fraction are of the token id's occurrences."""
    if data.counts.counts_only:
        raise MoeInspectError(
            f"{data.trace.path} holds counts only, no token ids: no vocabulary table; "
            f"{data.trace.more_than_counts}"
        )
    if has_run(data, _token_id_pass) and (found := _token_id_pass(data).vocabulary) is not None:
        return found
    asked = {} if data.top else {"min_count": 1, "most": len(data.counts.token_ids_V)}
    passes = tokenids.by_token_id(
        data.trace, data.selection, data.counts, nulls=False, progress=data.progress, **asked
    )
    return stacked([_vocabulary_rows(tables, data) for tables in passes])


@once
def _text_of_token_id(data: ReportData) -> pd.Series:
    """Token id → its text."""
    frame = data.trace.vocabulary().drop_duplicates("token_id")
    return pd.Series(frame["token"].to_numpy(object), index=frame["token_id"].to_numpy())


def _vocabulary_rows(tables: tokenids.TokenTables, data: ReportData) -> pd.DataFrame:
    """The rows of `vocabulary` of one router."""
    expert, row = tokenids.top_token_ids(tables, data.top)
    ids, occurrences = tables.token_ids.ids_V[row], tables.token_ids.occurrences_V[row]
    columns = {
        "expert": expert,
        "token_id": ids,
        "token": _text_of_token_id(data).reindex(ids).to_numpy(object),
        "count": tables.any_VE[row, expert].astype(np.int64),
        "fraction": tables.any_VE[row, expert] / np.maximum(occurrences, 1),
        "first_choice_fraction": np.nan
        if tables.first_VE is None
        else tables.first_VE[row, expert] / np.maximum(occurrences, 1),
        "occurrences": occurrences,
    }
    return of_router(data, tables.router, columns)
