"""What the routing of whole texts shows: experts that lead in every domain, documents that are told
by their routing, and paths through the layers. A note each, where it is beyond chance; none where
the sample is too small to tell.

Each check takes the report's data and returns one Finding or none.
"""

from __future__ import annotations

import math
from typing import Any

from moe_inspect.analysis.metrics.chance import ALPHA, z_of
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.verdict.chance import few_documents, name_of
from moe_inspect.reporting.verdict.findings import Finding, note
from moe_inspect.reporting.verdict.specialization import untrained_seed
from moe_inspect.text import plural

# of a trace for which a pass of its own costs little beside the report
MOST_DECISIONS = 2**20
CONNECTED = 0.02  # share of the shuffled entropy that is missing, under which it is no news
UNSATURATED = 1.0  # bits below log₂ of the tokens, above which almost each has a path of its own


def committee(data: ReportData) -> Finding | None:
    """Experts that are among the k with the most load in every domain, where so many domains would
    hardly agree by chance, and that carry more than their even share."""
    if data.counts.counts_only or untrained_seed(data) is not None:
        return None
    table: Any = data.tables["committee"]
    standing = table[table["committee_mass_low"] > table["committee_mass_even"]]
    expected = float(table["committee_by_chance"].sum())
    if standing.empty or _at_least(len(standing), expected) > ALPHA:
        return None
    row = standing.loc[(standing["committee_mass"] - standing["committee_mass_even"]).idxmax()]
    experts, size = row["experts"].split(), int(row["committee_experts"])
    low, high = row["committee_mass_low"], row["committee_mass_high"]
    verb = "carries" if size == 1 else "carry"
    return note(
        f"In {len(standing)} of {plural(len(table), 'router')} the same experts lead in all "
        f"{int(row['domains'])} domains, most in {name_of(data, row)}: {plural(size, 'expert')} "
        f"({', '.join(experts)}) {verb} {row['committee_mass']:.0%} of a domain's assignments "
        f"(95% interval {low:.0%} to {high:.0%}; even share {row['committee_mass_even']:.0%}). "
        "Changing them for one domain affects all.",
        row,
        committee_mass=row["committee_mass"],
        committee_mass_even=row["committee_mass_even"],
        committee_experts=size,
        routers=len(standing),
    )


def _at_least(n: int, expected: float) -> float:
    """Probability of n or more, of a Poisson distribution."""
    below = sum(expected**i / math.factorial(i) for i in range(n))
    return 1 - math.exp(-expected) * below


def signature(data: ReportData) -> Finding | None:
    """Whether the nearest other document by routing is of the same domain more often than
    with the domains of documents of like length shuffled."""
    if not _is_small(data) or len(data.counts.domains) < 2:
        return None
    # of all routers together
    row: Any = data.tables["signature"].drop(columns=["layer", "router"]).iloc[0]
    documents = int(row["documents"])
    share, low, high = (row[f"signature_accuracy{name}"] for name in ("", "_low", "_high"))
    if not low > row["signature_null_p99"]:
        return None
    return note(
        f"Routing identifies the domain: for {'all' if share == 1 else f'{share:.0%} of'} "
        f"{documents:,} documents the nearest other one shares it (95% interval {low:.0%} to "
        f"{high:.0%}; {row['signature_null']:.0%} by chance). Untrained routers show part of this "
        "from the text alone: trace with --random-init to see how much.",
        signature_accuracy=share,
        signature_null=row["signature_null"],
        documents=documents,
    )


def paths(data: ReportData) -> Finding | None:
    """Whether tokens take fewer paths through the layers than layers that choose independently
    within a document give them, as far as paths are not as many as tokens."""
    if not _is_small(data) or few_documents(data):
        return None
    table: Any = data.tables["paths"]
    shuffled, value = table["path_entropy_shuffled_bits"], table["path_entropy_bits"]
    # of many routers, some are outside of their 95 % interval by chance
    reach = (table["path_entropy_high"] - value) * z_of(ALPHA / len(table)) / z_of(0.025)
    beyond = (value + reach < shuffled) & (value <= (1 - CONNECTED) * shuffled)
    told = table[(shuffled <= table["most_bits"] - UNSATURATED) & beyond]
    if told.empty:
        return None
    row = told.loc[(told["path_entropy_shuffled_bits"] - told["path_entropy_bits"]).idxmax()]
    bits, independent = row["path_entropy_bits"], row["path_entropy_shuffled_bits"]
    low, high = row["path_entropy_low"], row["path_entropy_high"]
    tokens, distinct = int(row["tokens"]), int(row["paths"])
    return note(
        f"Layers do not choose independently: up to {name_of(data, row)}, the first choices of "
        f"{tokens:,} tokens take {distinct:,} distinct routes (entropy {bits:.2f} bits, 95% "
        f"interval {low:.2f} to {high:.2f}; {independent:.2f} with each layer's choices shuffled "
        "within documents). A token's earlier choices help predict its later ones.",
        row,
        path_entropy_bits=bits,
        path_entropy_shuffled_bits=independent,
        paths=distinct,
    )


def drift(data: ReportData) -> Finding | None:
    """An expert whose share rises or falls through the whole trace."""
    if not _is_small(data):
        return None
    table: Any = data.tables["drift"]
    change = (table["trend_last"] - table["trend_first"]).abs()
    told = table[(table["trend_p"] < ALPHA) & (change >= data.thresholds.uneven)]
    if told.empty:
        return None
    row = told.loc[change[told.index].idxmax()]
    expert, first, last = int(row["trend_expert"]), row["trend_first"], row["trend_last"]
    return note(
        f"Load drifts through the trace in {len(told)} of {plural(len(table), 'router')}, most in "
        f"{name_of(data, row)}: expert {expert} gets {first:.2f}x the mean load in the first "
        f"quarter and {last:.2f}x in the last. Text that changes along the trace moves load too.",
        row,
        expert=expert,
        first_quarter=first,
        last_quarter=last,
        routers=len(told),
    )


def _is_small(data: ReportData) -> bool:
    """Whether a pass of its own over the trace costs little; and the model is trained, as far as
    the trace says."""
    small = not data.counts.counts_only and data.trace.n_decisions <= MOST_DECISIONS
    return small and untrained_seed(data) is None
