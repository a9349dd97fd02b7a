"""All checks of a report, and their findings as a list and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from moe_inspect.reporting.tables.data import ReportData, once
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict import balance, data_checks, experts, routes, specialization
from moe_inspect.reporting.verdict.findings import Finding, most_important_first

Check = Callable[[Any], Finding | None]
# whether the trace is fit to be judged: the page puts these above the verdict
DATA_CHECKS: tuple[Check, ...] = (
    data_checks.trace_warning,
    data_checks.missing_ranks,
    data_checks.dropped,
    data_checks.few_tokens,
    data_checks.few_documents_per_domain,
    data_checks.repeated_rows,
)
# in the order in which they are read; the first are the most important
CHECKS: tuple[Check, ...] = (
    data_checks.trace_warning,
    data_checks.missing_ranks,
    data_checks.dropped,
    balance.balance,
    balance.routers_without_load,
    experts.dead_experts,
    experts.overloaded_experts,
    experts.starved_experts,
    experts.least_used_expert,
    balance.idle_gpus,
    balance.uneven_batches,
    balance.averaging_hides,
    experts.overloading_domain,
    experts.unused_in_domain,
    specialization.domain_specialization,
    specialization.domain_beyond_token,
    specialization.token_specialization,
    specialization.hard_tokens,
    routes.committee,
    routes.signature,
    routes.paths,
    routes.drift,
    specialization.router_ties,
    data_checks.few_tokens,
    data_checks.few_documents_per_domain,
    data_checks.repeated_rows,
    data_checks.sample,
)
# what a missing rank would be blamed for
OF_ALL_RANKS: tuple[Check, ...] = (experts.dead_experts, balance.idle_gpus)
DATA_KINDS = frozenset(check.__name__ for check in DATA_CHECKS) | {"empty_slots"}


@once
def findings(data: ReportData) -> list[Finding]:
    """What every check finds, most important first."""
    found, partial = list[Finding](), False
    for check in CHECKS:
        if partial and check in OF_ALL_RANKS:
            continue
        if (one := check(data)) is None:
            continue
        found.append(one)
        if check is data_checks.missing_ranks:
            # what `trace` itself wrote of a token is whole
            partial = data.trace.imported or data.counts.counts_only
    return most_important_first(found)


@table()
def verdict(data: ReportData) -> pd.DataFrame:
    """One row per finding, most important first."""
    return verdict_table(findings(data))


def verdict_table(found: Sequence[Finding], values: bool = False) -> pd.DataFrame:
    """One row per finding: severity, kind, layer, router, text; `values`: and the numbers."""
    columns = ["severity", "kind", "layer", "router", "text", *(["values"] if values else [])]
    rows = [[getattr(one, name) for name in columns] for one in found]
    frame = pd.DataFrame(rows, columns=columns)
    kinds = dict.fromkeys(("severity", "kind", "text"), "str")
    return frame.astype({**kinds, "layer": "Int64", "router": "Int64"})
