"""All checks of a report, and their findings as a list and as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, once
from moe_inspect.reporting.tables.registry import table
from moe_inspect.reporting.verdict import balance, data_checks, experts, specialization
from moe_inspect.reporting.verdict.findings import Finding, most_important_first, note

Check = Callable[[ReportData], Finding | None]
# in the order in which they are read, the most important first, each with the group of the page
# that its finding stands in; those without are about the data: whether it is fit to be judged
CHECKS: tuple[tuple[str, tuple[Check, ...]], ...] = (
    ("", (data_checks.trace_warning, data_checks.missing_ranks, data_checks.dropped)),
    ("Balance", (balance.balance, balance.routers_without_load)),
    ("Balance", (experts.dead_experts, experts.overloaded_experts, experts.starved_experts)),
    ("Balance", (experts.least_used_expert,)),
    ("Serving", (balance.busiest_gpu, balance.uneven_batches)),
    ("Balance", (balance.averaging_hides, experts.overloading_domain, experts.unused_in_domain)),
    ("Specialization", (specialization.domain_specialization, specialization.domain_beyond_token)),
    ("Specialization", (specialization.token_specialization,)),
    ("Balance", (specialization.drift,)),
    ("Router", (specialization.router_ties,)),
    ("", (data_checks.few_tokens, data_checks.few_documents_per_domain)),
    ("", (data_checks.repeated_rows, data_checks.sample)),
)
# these would say of experts and GPUs what is true of a rank that is missing
OF_ALL_RANKS: tuple[Check, ...] = (experts.dead_experts, balance.busiest_gpu)


@once
def findings(data: ReportData) -> list[Finding]:
    """What every check finds, most important first; before warnings a cost that was asked for."""
    found, partial = list[Finding](), False
    for group, check in ((group, check) for group, checks in CHECKS for check in checks):
        if not (partial and check in OF_ALL_RANKS):
            one = check(data)
        elif check is balance.busiest_gpu and data.costs is not None:
            one = note("What imbalance costs is unknown: ranks are missing.")
        else:
            one = None
        if one is None:
            continue
        found.append(replace(one, kind=one.kind or check.__name__, group=group))
        if check is data_checks.missing_ranks:
            # what `trace` itself wrote of a token is whole
            partial = data.trace.imported or data.counts.counts_only
    asked = "busiest_gpu" if data.costs is not None else ""
    in_order = most_important_first(found)
    return sorted(in_order, key=lambda one: one.severity != "critical" and one.kind != asked)


@table()
def verdict(data: ReportData) -> pd.DataFrame:
    """One row per finding, most important first."""
    return verdict_table(findings(data))


def verdict_table(found: Sequence[Finding], values: bool = False) -> pd.DataFrame:
    """One row per finding: severity, kind, layer, router, text; `values`: and the numbers."""
    columns = ["severity", "kind", "layer", "router", "text", *(["values"] if values else [])]
    rows = [[getattr(one, name) for name in columns] for one in found]
    kinds = dict.fromkeys(("severity", "kind", "text"), "str")
    kinds |= dict.fromkeys(("layer", "router"), "Int64")
    return pd.DataFrame(rows, columns=columns).astype(kinds)
