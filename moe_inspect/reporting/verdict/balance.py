"""The report in words: what is wrong, how sure that is, and what the usual single figure would have
hidden.

Each function takes the report's tables and returns one sentence or none. What chance can explain is
never called a fault.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS, noise_floor
from moe_inspect.reporting.tables.load import whole_batches
from moe_inspect.reporting.verdict.data_checks import doubts, missing_ranks
from moe_inspect.text import counted, layer_label, listed, small, some, verb

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

LITTLE_USED = 0.5  # load ratio under which the least used expert is named
ENOUGH_LOAD = (
    100  # mean load of a domain's experts from which one with few assignments is not just unlucky
)


def verdict(report: Report) -> list[str]:
    """Plain sentences, most important first."""
    from moe_inspect.reporting.verdict.specialization import confidence, domains, token_ids

    ranks = missing_ranks(report)
    partial = ranks and (
        report.trace.imported or report.counts.counts_only
    )  # what `trace` wrote of a token is whole
    said = [
        report.warning and f"Careful: {report.warning}.",
        ranks,
        _balance(report),
        _silent(report),
        None if partial else _dead(report),
        _crowded(report),
        _least_used(report),
        None if partial else _waiting(report),
        _by_pass(report),
        _pooled(report),
        _overloading_domain(report),
        _deserting_domain(report),
        *domains(report),
        token_ids(report),
        confidence(report),
        *doubts(report),
        _judged_on(report),
    ]
    return [sentence for sentence in said if sentence]


def frames(report: Report) -> Any:
    """The tables, untyped: pandas' own annotations make a union of every result."""
    return report.tables


def routers(report: Report) -> list[dict[str, Any]]:
    """The rows of `balance` that have load."""
    return report.loaded


def worst_router(report: Report) -> dict[str, Any] | None:
    return max(routers(report), key=lambda row: row["max_vio"], default=None)


def above_chance(report: Report, row: Any) -> bool:
    """Whether a router's max_vio is more than chance gives: the low end of its interval beyond the
    noise floor, which tokens that come in documents raise by √ design effect. Too few documents
    have no interval, and nothing is beyond chance then; counts alone know no documents, and are
    held against twice the floor."""
    if report.counts.counts_only:
        return row["max_vio"] > 2 * row["noise_floor"]
    return row["max_vio"] > row["noise_floor"] and row["max_vio_low"] > chance(row)


def chance(row: Any) -> float:
    """The max_vio that chance gives documents like these."""
    effect = row["design_effect"]
    return row["noise_floor"] * math.sqrt(max(1.0, 1.0 if math.isnan(effect) else effect))


def by_uneven(report: Report) -> str:
    return f"at least {1 + report.thresholds.uneven:g}x and beyond chance"


def uneven(report: Report, row: Any) -> bool:
    return row["max_vio"] >= report.thresholds.uneven and above_chance(report, row)


def few_documents(report: Report) -> bool:
    """Whether there are too few documents to tell the model from the text."""
    return not report.counts.counts_only and len(report.counts.units) < FEWEST_DOCUMENTS


def _chance(row: Any) -> str:
    independent, documents = f"{1 + row['noise_floor']:.2f}x", f"{1 + chance(row):.2f}x"
    return f"chance would give {independent} to independent tokens" + (
        f", {documents} to documents like these" if documents != independent else ""
    )


def _balance(report: Report) -> str:
    row, balance = worst_router(report), routers(report)
    if row is None:
        return "No router made a single assignment: there is no load to judge."
    busiest = f"expert {int(row['busiest_expert'])} gets {row['max_over_mean']:.2f}x the mean load"
    where = where_of(report, row)
    if few_documents(report):
        return (
            f"Too little to judge balance by: at the most, {where.lower()}, {busiest} "
            f"({_chance(row)}), but fewer than "
            f"{FEWEST_DOCUMENTS} documents cannot tell the model from the text."
        )
    n = sum(uneven(report, r) for r in balance)
    of = f"{n} of {len(balance)} routers {'is' if n == 1 else 'are'} uneven ({by_uneven(report)})"
    low, high = 1 + row["max_vio_low"], 1 + row["max_vio_high"]
    sure = (
        "counts alone have no interval"
        if math.isnan(low)
        else f"95% interval {low:.2f}-{high:.2f}x"
    )
    if _takes_every_token(report, row):
        sure = "every token goes there"
    beside = f"({sure}; {_chance(row)})"
    if uneven(report, row):
        if len(balance) == 1:
            return f"{where} is uneven ({by_uneven(report)}): {busiest} {beside}."
        return f"{where} is the worst balanced: {busiest} {beside}; {of}."
    dead = any(row["dead_experts"] for row in balance)
    if above_chance(report, row):
        return (
            f"{'No expert is overloaded' if dead else 'Balance is good'}: at the worst, "
            f"{where.lower()}, {busiest} {beside}."
        )
    if chance(row) >= report.thresholds.uneven or row["max_vio"] >= report.thresholds.uneven:
        others = f"; {of}" if n else ""
        return (
            f"Too little to judge balance by: at the worst, {where.lower()}, {busiest}, which "
            f"may be chance {beside}{others}."
        )
    return (
        f"{'No expert is overloaded' if dead else 'Nothing is wrong with the balance'}: at the "
        f"worst, {where.lower()}, {busiest}, no more than chance may give {beside}."
    )


def _takes_every_token(report: Report, row: Any) -> bool:
    """Whether the busiest expert is at the ceiling of max_over_mean, E/k: resampling documents
    moves nothing there."""
    return (
        row["experts"] > row["top_k"]
        and int(report.counts.load_E(int(row["router"])).max()) == row["tokens"]
    )


def _silent(report: Report) -> str | None:
    table = frames(report)["balance"]
    silent = table[table["assignments"] == 0].to_dict("records")
    if not silent or len(silent) == len(table):
        return None
    places = some([where_of(report, row).lower() for row in silent], 6, ", ")
    return f"{len(silent)} of {len(table)} routers made no assignment at all: {places}."


def _dead(report: Report) -> str | None:
    balance = routers(report)
    dead = [row for row in balance if row["dead_experts"]]
    if not dead:
        return None
    load = frames(report)["load"]
    places, likely = [], 0.0
    for row in dead:
        ids = load.loc[
            (load["router"] == row["router"]) & (load["assignments"] == 0), "expert"
        ].tolist()
        places.append(f"{where_of(report, row).lower()}: {listed(ids)}")
        picked = min(1.0, row["assignments"] / (row["tokens"] * row["experts"]))
        likely = max(likely, row["experts"] * (1 - picked) ** row["tokens"])
    n = sum(int(row["dead_experts"]) for row in dead)
    said = (
        f"{n} dead {'expert' if n == 1 else 'experts'} in {len(dead)} of {len(balance)} routers "
        f"({some(places, 4, '; ')})"
    )
    tokens = counted(report.counts.tokens, "token")
    if likely > 0.01:
        return (
            f"{said}: but {tokens} {'are' if report.counts.tokens > 1 else 'is'} too few to call "
            "an expert dead, chance alone leaves some without any."
        )
    if few_documents(report):
        return (
            f"{said}: not one of {tokens} went there, but fewer than {FEWEST_DOCUMENTS} "
            "documents cannot tell the model from the text."
        )
    return f"{said}: not one of {tokens} went there."


def _crowded(report: Report) -> str | None:
    load = frames(report)["load"]
    over, starved = (
        load[load["load_ratio"] >= report.thresholds.overloaded],
        load[(load["load_ratio"] < report.thresholds.starved) & (load["assignments"] > 0)],
    )
    real, parts = {row["router"] for row in routers(report) if above_chance(report, row)}, []
    over, starved = over[over["router"].isin(real)], starved[starved["router"].isin(real)]
    if len(over):
        parts.append(
            f"{counted(len(over), 'expert')} in {counted(over['router'].nunique(), 'router')} "
            f"{verb(over, 'get')} at least {report.thresholds.overloaded:g}x the mean load"
        )
    if len(starved):
        parts.append(
            f"{counted(len(starved), 'expert')} in "
            f"{counted(starved['router'].nunique(), 'router')} {verb(starved, 'get')} under "
            f"{report.thresholds.starved:.0%} of it"
        )
        if not len(over):
            parts[-1] = parts[-1].replace("of it", "of the mean load")
    return f"{' and '.join(parts)}." if parts else None


def _least_used(report: Report) -> str | None:
    """The expert with the smallest load ratio of all routers, if that is less than half the mean
    load and beyond chance. Dead experts have a sentence of their own and do not count here."""
    load, balance = (
        frames(report)["load"],
        {row["router"]: row for row in routers(report) if above_chance(report, row)},
    )
    alive = load[(load["assignments"] > 0) & load["router"].isin(balance.keys())]
    chance_of = alive["router"].map({router: chance(row) for router, row in balance.items()})
    few = alive[(alive["load_ratio"] < LITTLE_USED) & (1 - alive["load_ratio"] >= 2 * chance_of)]
    if few.empty:
        return None
    least = few.loc[few["load_ratio"].idxmin()]
    router, expert, ratio = int(least["router"]), int(least["expert"]), least["load_ratio"]
    row = balance[router]
    times = row["max_over_mean"] / ratio
    alone = " of those with any load" if any(row["dead_experts"] for row in routers(report)) else ""
    said = (
        f"Expert {expert} of {where_of(report, row).lower()} is the least used{alone}: "
        f"{small(ratio)}x the mean load, "
        f"the busiest there gets {times:,.1f}x as much"
    )
    return said + _least_used_in(report, router, expert, times) + "."


def _least_used_in(report: Report, router: int, expert: int, times: float) -> str:
    """The domain in which that is worst, of those with text enough to tell."""
    counts = report.counts
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains))
    found = []
    for domain, documents, load_E in zip(
        counts.domains, documents_D, counts.assignments_DE(router), strict=True
    ):
        if load_E.mean() >= ENOUGH_LOAD and (counts.counts_only or documents >= FEWEST_DOCUMENTS):
            found.append(
                (float("inf") if not load_E[expert] else load_E.max() / load_E[expert], domain)
            )
    worst, domain = max(found, default=(0.0, ""))
    if len(counts.domains) < 2 or worst < 1.5 * times:
        return ""
    return (
        f' and {worst:.1f}x on "{domain}"'
        if math.isfinite(worst)
        else f', and on "{domain}" it is never chosen'
    )


def _waiting(report: Report) -> str | None:
    """What unevenness costs: a layer is done when its busiest GPU is, so with a GPU to each expert
    the others wait."""
    balance, worst = routers(report), worst_router(report)
    if worst is None or not uneven(report, worst):
        return None
    # the time of a layer is that of its busiest expert, its work that of the mean
    share = 1 - sum(row["assignments"] / row["experts"] for row in balance) / sum(
        row["max_over_mean"] * row["assignments"] / row["experts"] for row in balance
    )
    alone = (
        f" ({1 - worst['balancedness']:.0%} at {where_of(report, worst).lower()})"
        if len(balance) > 1
        else ""
    )
    return (
        f"With a GPU to each expert, {share:.0%} of their compute would be spent waiting for the "
        f"busiest{alone}."
    )


def _by_pass(report: Report) -> str | None:
    """What the sum over forward passes hides: each pass waits for its own busiest expert."""
    hidden = [
        row
        for row in routers(report)
        if _passes(report, row) > 1
        and row["max_vio_batch"] - row["max_vio"] > row["noise_floor_batch"]
    ]
    row = max(hidden, key=lambda row: row["max_vio_batch"] - row["max_vio"], default=None)
    if row is None or row["max_vio_batch"] < report.thresholds.uneven:
        return None
    batch = 1 + row["max_vio_batch"]
    return (
        f"Forward passes are less even than their sum, most in {where_of(report, row).lower()}: "
        f"the busiest expert of a pass gets {batch:.2f}x "
        f"the mean load on average, that of all passes {row['max_over_mean']:.2f}x (chance would "
        f"give {1 + row['noise_floor_batch']:.2f}x to the "
        f"independent tokens of a pass): with a GPU to each expert {1 - 1 / batch:.0%} of that "
        "layer's compute would be spent waiting."
    )


def _passes(report: Report, row: Any) -> int:
    return sum(n for n, _ in whole_batches(report.counts.of[int(row["router"])].batches).values())


def _pooled(report: Report) -> str | None:
    pooled, row = report.pooled_max_over_mean(), worst_router(report)
    if pooled is None or row is None:
        return None
    if not uneven(report, row) or pooled - 1 > min(report.thresholds.uneven, row["max_vio"] / 2):
        return None
    chosen, where = report.selection.routers, where_of(report, row)
    layers = len({report.trace.routers[r].layer for r in chosen})
    of = "layers" if layers == len(chosen) else "routers"
    over = (
        f"all {of}"
        if len(chosen) == len(report.trace.routers)
        else f"the {len(chosen)} {of} selected"
    )
    return (
        f"Pooled over {over} the same routing reads {pooled:.2f}x: a pooled figure would have "
        f"hidden {where.lower()}."
    )


def _overloading_domain(report: Report) -> str | None:
    domains = frames(report)["domains"]
    if domains["domain"].nunique() < 2:
        return None
    mean = domains.groupby(["router", "domain"])["assignments"].transform("mean")
    rated = domains.assign(ratio=domains["assignments"] / mean)[mean > 0]
    rows = rated.loc[rated.groupby(["router", "domain"])["ratio"].idxmax()]
    balance = {row["router"]: row for row in routers(report)}
    counts, unsure = report.counts, None
    documents = dict(
        zip(
            counts.domains,
            np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains)).tolist(),
            strict=True,
        )
    )
    for _, row in rows.sort_values("ratio", ascending=False).iterrows():
        overall = balance[row["router"]]
        T = round(row["tokens"] * overall["assignments"] / (overall["tokens"] * overall["top_k"]))
        floor = (
            noise_floor(T, int(overall["experts"]), int(overall["top_k"]))
            * chance(overall)
            / max(overall["noise_floor"], 1e-9)
        )
        if (
            row["ratio"] - 1 >= report.thresholds.uneven
            and row["ratio"] - 1 > 2 * floor
            and row["ratio"] - 1 > 1.5 * overall["max_vio"]
        ):
            where, together = (
                where_of(report, row).lower(),
                "the" if report.selection.domains else "all",
            )
            if counts.counts_only or documents[row["domain"]] >= FEWEST_DOCUMENTS:
                return (
                    f'"{row["domain"]}" overloads expert {row["expert"]} of {where}: '
                    f"{row['ratio']:.2f}x the mean load on "
                    f"its {row['tokens']:,} tokens, where {together} domains together come to at "
                    f"most {overall['max_over_mean']:.2f}x."
                )
            unsure = unsure or (
                f"Expert {row['expert']} of {where} gets {row['ratio']:.2f}x the mean load on "
                f"the {row['tokens']:,} tokens of "
                f'"{row["domain"]}", but fewer than {FEWEST_DOCUMENTS} documents of it cannot '
                "tell the domain from its text."
            )
    return unsure


def _deserting_domain(report: Report) -> str | None:
    """An expert that one domain hardly uses and the others do. Of counts alone: where documents
    tell, `domains` says more."""
    domains = frames(report)["domains"]
    if not report.counts.counts_only or domains["domain"].nunique() < 2:
        return None
    of_router = domains.groupby(["router", "domain"])["assignments"]
    mean, most = of_router.transform("mean"), of_router.transform("max")
    load = frames(report)["load"].set_index(["router", "expert"])["load_ratio"]
    overall = domains.set_index(["router", "expert"]).index.map(load).to_numpy()
    # beyond chance: four standard deviations of a count below its mean
    few = domains["assignments"] < np.minimum(
        report.thresholds.starved * mean, mean - 4 * np.sqrt(mean)
    )
    rows = domains.assign(ratio=domains["assignments"] / mean, most=most)[
        few & (overall >= report.thresholds.starved)
    ]
    if not len(rows):
        return None
    row = rows.loc[rows["ratio"].idxmin()]
    times = (
        f", {row['most'] / row['assignments']:.1f} times less than the busiest expert there"
        if row["assignments"]
        else ""
    )
    others = (
        f"; so it is with {counted(len(rows) - 1, 'other expert')} in some domain"
        if len(rows) > 1
        else ""
    )
    return (
        f'"{row["domain"]}" leaves expert {row["expert"]} of {where_of(report, row).lower()} '
        f"nearly unused: {row['ratio']:.2f}x the mean "
        f"load on its {row['tokens']:,} tokens{times}{others}."
    )


def _judged_on(report: Report) -> str:
    counts = report.counts
    documents = f" of {counted(counts.documents, 'document')}" if counts.documents else ""
    domains = f" in {counted(len(counts.domains), 'domain')}" if len(counts.domains) > 1 else ""
    return (
        f"Judged on {counted(counts.tokens, 'token')}{documents}{domains}, "
        f"{counted(len(report.selection.routers), 'router')}."
    )


def where_of(report: Report, row: Any) -> str:
    """ "Layer 3": the router of a table's row at the start of a sentence."""
    return f"Layer {layer_label(report.trace.routers, int(row['router']))}"
