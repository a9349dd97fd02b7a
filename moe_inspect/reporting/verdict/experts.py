"""Experts that get too much, too little or nothing, over all text and in single domains.

Each check takes the report's data and returns one Finding or none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, LONG_DOCUMENT
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.verdict.findings import (
    Finding,
    Row,
    above_chance,
    beyond,
    beyond_documents,
    few_documents,
    found,
    name_of,
    note,
    warning,
)
from moe_inspect.text import comma_list, format_ratio, join_first, plural, verb_for

LITTLE_USED = 0.5  # load ratio under which the least used expert is named
# mean load of a domain's experts from which an expert with few assignments is not just unlucky
ENOUGH_LOAD = 100


def dead_experts(data: ReportData) -> Finding | None:
    """Experts without load, and whether there were tokens enough to call them dead."""
    dead = [row for row in data.loaded if row["dead_experts"]]
    if not dead:
        return None
    load = data.frame("load")
    names, likely = list[str](), 0.0
    for row in dead:
        of_router = (load["router"] == row["router"]) & (load["assignments"] == 0)
        names.append(f"{name_of(data, row)}: {comma_list(load.loc[of_router, 'expert'].tolist())}")
        picked = min(1.0, row["assignments"] / (row["tokens"] * row["experts"]))
        effect = LONG_DOCUMENT if data.counts.counts_only else row["design_effect"]
        independent = row["tokens"] / (max(effect, 1) if effect == effect else 1)
        likely = max(likely, row["experts"] * (1 - picked) ** independent)
    n = sum(int(row["dead_experts"]) for row in dead)
    where = f"in {len(dead)} of {len(data.loaded)} routers ({join_first(names, 4, '; ')})"
    tokens = plural(data.counts.tokens, "token")
    about = dead[0] if len(dead) == 1 else None
    values = {"experts": n, "routers": len(dead), "tokens": data.counts.tokens}
    if likely > 0.01:
        return note(
            f"{plural(n, 'expert')} without load {where}, but {tokens} "
            f"{'is' if data.counts.tokens == 1 else 'are'} too few to call an expert dead: chance "
            "alone leaves some without load.",
            about,
            **values,
        )
    said = f"{plural(n, 'dead expert')} {where}: none of {tokens} was routed there"
    if few_documents(data):
        return note(
            f"{said}, but with fewer than {FEWEST_TO_JUDGE} documents this may be the text, not "
            "the model.",
            about,
            **values,
        )
    return warning(f"{said}.", about, **values)


def overloaded_experts(data: ReportData) -> Finding | None:
    """Experts from the threshold `overloaded` up, in routers beyond chance."""
    ratio, load = data.thresholds.overloaded, _beyond_chance(data)
    return _crowd(
        load[load["load_ratio"] >= ratio],
        f"at least {ratio:g}x the mean load",
    )


def starved_experts(data: ReportData) -> Finding | None:
    """Experts with some load, but under the threshold `starved`, in routers beyond chance."""
    ratio, load = data.thresholds.starved, _beyond_chance(data, least_used=True)
    return _crowd(
        load[(load["load_ratio"] < ratio) & (load["assignments"] > 0)],
        f"under {ratio:.0%} of the mean load",
    )


def _beyond_chance(data: ReportData, least_used: bool = False) -> Any:
    """The rows of `load` of the routers whose busiest expert, or least used one, chance does not
    explain."""
    load = data.frame("load")
    beyond = _little_used if least_used else above_chance
    return load[load["router"].isin([r["router"] for r in data.loaded if beyond(data, r)])]


def _little_used(data: ReportData, row: Row) -> bool:
    """Whether chance hardly makes the least used expert of any router as little used."""
    if data.counts.counts_only:
        below = 1 - row["min_over_max"] * row["max_over_mean"]
        return beyond_documents(below, row["expected_by_chance"] - 1)
    return row["least_used_p"] < ALPHA


def _crowd(rows: Any, load: str) -> Finding | None:
    n, routers = len(rows), rows["router"].nunique()
    if not n:
        return None
    return found(
        "warning",
        f"{plural(n, 'expert')} in {plural(routers, 'router')} {verb_for(rows, 'get')} {load}.",
        rows.iloc[0] if routers == 1 else None,
        experts=n,
        routers=routers,
    )


def least_used_expert(data: ReportData) -> Finding | None:
    """The expert with the smallest load ratio of all routers, if that is less than half the mean
    load and beyond chance. Dead experts are another check's."""
    load = data.frame("load")
    balance = {row["router"]: row for row in data.loaded if _little_used(data, row)}
    alive = load[(load["assignments"] > 0) & load["router"].isin(balance.keys())]
    few = alive[alive["load_ratio"] < LITTLE_USED]
    if few.empty:
        return None
    least = few.loc[few["load_ratio"].idxmin()]
    expert, ratio, row = int(least["expert"]), least["load_ratio"], balance[least["router"]]
    times = row["max_over_mean"] / ratio
    alone = " of those with any load" if any(r["dead_experts"] for r in data.loaded) else ""
    found = _worst_domain(data, row, expert, times)
    in_domain = ""
    if found is not None:
        in_domain = (
            f' ({found[0]:.1f} times on "{found[1]}")'
            if math.isfinite(found[0])
            else f' (on "{found[1]}", expert {expert} is never chosen)'
        )
    return note(
        f"Expert {expert} of {name_of(data, row)} is the least used{alone}: "
        f"{format_ratio(ratio)}x the mean load. That layer's busiest expert gets {times:,.1f} "
        f"times as much{in_domain}.",
        row,
        expert=expert,
        load_ratio=ratio,
        busiest_over_it=times,
        domain=found and found[1],
        busiest_over_it_in_domain=found and found[0],
    )


def _worst_domain(
    data: ReportData, row: Row, expert: int, times: float
) -> tuple[float, str] | None:
    """Load of the busiest expert ÷ load of `expert` in the domain where that is highest, among
    domains with enough text, and the domain; None where it is below 1.5 × `times`."""
    counts, found = data.counts, list[tuple[float, str]]()
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains))
    for domain, documents, load_E in zip(
        counts.domains, documents_D, counts.assignments_DE(int(row["router"])), strict=True
    ):
        if load_E.mean() >= ENOUGH_LOAD and (counts.counts_only or documents >= FEWEST_DOCUMENTS):
            most = float(load_E.max())
            found.append((most / load_E[expert] if load_E[expert] else math.inf, domain))
    worst = max(found, default=None)
    if len(counts.domains) < 2 or worst is None or worst[0] < 1.5 * times:
        return None
    return worst


def overloading_domain(data: ReportData) -> Finding | None:
    """The domain that overloads an expert most: beyond the threshold `uneven`, twice chance, and
    half as much again as all domains together; of few documents only where no other does."""
    domains = data.frame("domains")
    if domains["domain"].nunique() < 2:
        return None
    mean = domains.groupby(["router", "domain"])["assignments"].transform("mean")
    rated = domains.assign(ratio=domains["assignments"] / mean)[mean > 0]
    rows = rated.loc[rated.groupby(["router", "domain"])["ratio"].idxmax()]
    balance = {row["router"]: row for row in data.loaded}
    counts, unsure = data.counts, None
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains)).tolist()
    documents = dict(zip(counts.domains, documents_D, strict=True))
    for _, row in rows.sort_values("ratio", ascending=False).iterrows():
        overall = balance[row["router"]]
        sure = counts.counts_only or documents[row["domain"]] >= FEWEST_DOCUMENTS
        if not _overloads(data, row, overall, sure):
            continue
        where = name_of(data, row)
        values = {"domain": row["domain"], "expert": row["expert"], "load_ratio": row["ratio"]}
        values |= {"tokens": row["tokens"], "max_over_mean": overall["max_over_mean"]}
        if sure:
            together = "the selected" if data.selection.domains else "all"
            at = f" ({beyond(data)})" if counts.counts_only else ""
            return warning(
                f'"{row["domain"]}" overloads expert {row["expert"]} of {where}: '
                f"{row['ratio']:.2f}x the mean load on its {plural(row['tokens'], 'token')}{at}; "
                f"{together} domains together reach at most {overall['max_over_mean']:.2f}x.",
                row,
                **values,
            )
        unsure = unsure or note(
            f"Expert {row['expert']} of {where} gets {row['ratio']:.2f}x the mean load on the "
            f'{row["tokens"]:,} tokens of "{row["domain"]}", but with fewer than '
            f"{FEWEST_DOCUMENTS} documents this may be their text, not the domain.",
            row,
            **values,
        )
    return unsure


def _overloads(data: ReportData, row: Row, overall: Row, sure: bool) -> bool:
    """Whether the busiest expert of a domain is beyond what the threshold, all domains together and
    chance explain; chance is not asked where there are too few documents to be `sure`."""
    excess = row["ratio"] - 1
    if excess < data.thresholds.uneven or excess <= 1.5 * overall["max_vio"]:
        return False
    if not data.counts.counts_only:
        return row["overload_p"] < ALPHA or not sure
    return beyond_documents(excess, row["expected_by_chance"] - 1)


def unused_in_domain(data: ReportData) -> Finding | None:
    """An expert that one domain hardly uses and the others do. Of counts alone: where documents
    tell, `domain_specialization` says more."""
    domains = data.frame("domains")
    if not data.counts.counts_only or domains["domain"].nunique() < 2:
        return None
    starved = data.thresholds.starved
    of_router = domains.groupby(["router", "domain"])["assignments"]
    mean, most = of_router.transform("mean"), of_router.transform("max")
    load = data.frame("load")
    ratio_of = load.set_index(["router", "expert"])["load_ratio"]
    overall = domains.set_index(["router", "expert"]).index.map(ratio_of).to_numpy()
    rows = domains.assign(ratio=domains["assignments"] / mean, most=most)
    rows = rows[(rows["ratio"] < starved) & (overall >= starved)]
    by_chance = [
        not beyond_documents(1 - ratio, expected - 1)
        for ratio, expected in zip(rows["ratio"], rows["expected_by_chance"], strict=True)
    ]
    rows = rows[~np.array(by_chance, bool)]
    if not len(rows):
        return None
    row = rows.loc[rows["ratio"].idxmin()]
    times = row["most"] / row["assignments"] if row["assignments"] else math.inf
    less = f"; the busiest expert gets {times:.1f} times as much" if times < math.inf else ""
    others = (
        f"; so {'is' if len(rows) == 2 else 'are'} {plural(len(rows) - 1, 'other expert')} in some "
        "domain"
        if len(rows) > 1
        else ""
    )
    return note(
        f'"{row["domain"]}" leaves expert {row["expert"]} of {name_of(data, row)} nearly unused: '
        f"{row['ratio']:.2f}x the mean load on its {plural(row['tokens'], 'token')} "
        f"({beyond(data)}){less}{others}.",
        row,
        domain=row["domain"],
        expert=row["expert"],
        load_ratio=row["ratio"],
        tokens=row["tokens"],
        busiest_over_it=times,
        others=len(rows) - 1,
    )
