"""Experts that get too much, too little or nothing, over all text and in single domains.

Each check takes the report's data and returns one Finding or none.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from moe_inspect.analysis.metrics import balance as bal
from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE, LONG_DOCUMENT
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row, records
from moe_inspect.reporting.tables.load import at_least_1
from moe_inspect.reporting.verdict import findings as fnd
from moe_inspect.reporting.verdict.data_checks import ranks_are_missing
from moe_inspect.reporting.verdict.findings import (
    Finding,
    beyond_documents,
    check,
    name_of,
    note,
    warning,
)
from moe_inspect.text import format_ratio, join_first, plural

LITTLE_USED = 0.5  # load ratio under which the least used expert is named
# mean load of a domain's experts from which an expert with few assignments is not just unlucky
ENOUGH_LOAD = 100


@check("load")
def dead_experts(data: ReportData) -> Finding | None:
    """Experts without load, and whether there were tokens enough to call them dead."""
    dead = [row for row in data.loaded if row["dead_experts"]]
    if not dead or ranks_are_missing(data):
        return None
    load = data.tables["load"]
    names, likely = list[str](), 0.0
    for row in dead:
        of_router = (load["router"] == row["router"]) & (load["assignments"] == 0)
        names.append(f"{name_of(data, row)}: {join_first(load.loc[of_router, 'expert'].tolist())}")
        picked = min(1.0, row["assignments"] / (row["tokens"] * row["experts"]))
        effect = LONG_DOCUMENT if data.counts.documents_unknown else row["design_effect"]
        independent = row["tokens"] / at_least_1(effect)
        likely = max(likely, row["experts"] * (1 - picked) ** independent)
    n, tokens = sum(int(row["dead_experts"]) for row in dead), data.counts.tokens
    told = plural(tokens, "token")
    where = f"in {len(dead)} of {len(data.loaded)} routers ({join_first(names, 4, '; ')})"
    make, said = warning, f"{plural(n, 'dead expert')} {where}: none of {told} was routed there"
    if likely > 0.01:
        are = "is" if tokens == 1 else "are"
        few = f"{told} {are} too few to call an expert dead: chance alone leaves some without load"
        make, said = note, f"{plural(n, 'expert')} without load {where}, but {few}"
    elif fnd.few_documents(data):
        fewer = f"with fewer than {FEWEST_TO_JUDGE} documents"
        make, said = note, f"{said}, but {fewer} this may be the text, not the model"
    about = dead[0] if len(dead) == 1 else None
    return make(f"{said}.", about, experts=n, routers=len(dead), tokens=tokens)


@check("load")
def overloaded_experts(data: ReportData) -> Finding | None:
    """Experts from the threshold `overloaded` up, in routers beyond chance."""
    ratio = data.thresholds.overloaded
    load = _beyond_chance(data, [row for row in data.loaded if fnd.above_chance(data, row)])
    return _crowd(load[load["load_ratio"] >= ratio], f"at least {ratio:g}x the mean load")


@check("load")
def starved_experts(data: ReportData) -> Finding | None:
    """Experts with some load, but under the threshold `starved`, in routers beyond chance."""
    ratio, load = data.thresholds.starved, _beyond_chance(data, _little_used(data))
    load = load[(load["load_ratio"] < ratio) & (load["assignments"] > 0)]
    return _crowd(load, f"under {ratio:.0%} of the mean load")


def _beyond_chance(data: ReportData, rows: list[Row]) -> pd.DataFrame:
    """The rows of `load` of the routers of these rows of `balance`."""
    load = data.tables["load"]
    return load[load["router"].isin([row["router"] for row in rows])]


def _little_used(data: ReportData) -> list[Row]:
    """The rows of `balance` in which chance hardly makes the least used expert as little used."""
    if not data.counts.documents_unknown:
        return [row for row in data.loaded if row["least_used_p"] < ALPHA]
    below = [1 - row["min_over_max"] * row["max_over_mean"] for row in data.loaded]
    rows = zip(data.loaded, below, strict=True)
    return [row for row, of in rows if beyond_documents(of, row["expected_by_chance"] - 1)]


def _crowd(rows: pd.DataFrame, load: str) -> Finding | None:
    n, routers = len(rows), rows["router"].nunique()
    if not n:
        return None
    get = "gets" if n == 1 else "get"
    said = f"{plural(n, 'expert')} in {plural(routers, 'router')} {get} {load}."
    return warning(
        said, records(rows.head(1))[0] if routers == 1 else None, experts=n, routers=routers
    )


@check("load")
def least_used_expert(data: ReportData) -> Finding | None:
    """The expert with the smallest load ratio of all routers, if that is less than half the mean
    load and beyond chance. Dead experts are another check's."""
    balance = {row["router"]: row for row in _little_used(data)}
    load = _beyond_chance(data, list(balance.values()))
    few = load[(load["assignments"] > 0) & (load["load_ratio"] < LITTLE_USED)]
    if few.empty:
        return None
    least = fnd.top_row(few, -few["load_ratio"])
    expert, ratio, row = int(least["expert"]), least["load_ratio"], balance[least["router"]]
    times = row["max_over_mean"] / ratio
    alone = " of those with any load" if any(r["dead_experts"] for r in data.loaded) else ""
    in_domain, domain = _worst_domain(data, row, expert, times)
    there = ""
    if in_domain is not None:
        never, more = f"expert {expert} is never chosen", f"{in_domain:.1f} times on "
        finite = math.isfinite(in_domain)
        there = f' ({more}"{domain}")' if finite else f' (on "{domain}", {never})'
    said = (
        f"Expert {expert} of {name_of(data, row)} is the least used{alone}: "
        f"{format_ratio(ratio)}x the mean load. That layer's busiest expert gets {times:,.1f} "
        f"times as much{there}."
    )
    values = {"expert": expert, "load_ratio": ratio, "busiest_over_it": times}
    return note(said, row, **values, domain=domain, busiest_over_it_in_domain=in_domain)


def _worst_domain(
    data: ReportData, row: Row, expert: int, times: float
) -> tuple[float, str] | tuple[None, None]:
    """Load of the busiest expert ÷ load of `expert` in the domain where that is highest, among
    domains with enough text, and the domain; None where it is below 1.5 × `times`."""
    loads_DE, found = data.counts.assignments_DE(int(row["router"])), [(0.0, "")]
    for (domain, documents), load_E in zip(_documents(data).items(), loads_DE, strict=True):
        if load_E.mean() >= ENOUGH_LOAD and documents >= FEWEST_DOCUMENTS:
            most = float(load_E.max())
            found.append((most / load_E[expert] if load_E[expert] else math.inf, domain))
    worst = max(found)
    return worst if len(loads_DE) > 1 and worst[0] >= 1.5 * times else (None, None)


def _documents(data: ReportData) -> dict[str, float]:
    """How many each domain has; of counts, which do not tell them apart, more than any bound."""
    counts = data.counts
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains))
    known_D = np.where(counts.documents_unknown, math.inf, documents_D)
    return dict(zip(counts.domains, known_D.tolist(), strict=True))


@check("averages")
def overloading_domain(data: ReportData) -> Finding | None:
    """The domain that overloads an expert most: beyond the threshold `uneven`, twice chance, and
    half as much again as all domains together; of few documents only where no other does."""
    counts, documents_D = data.counts, [*_documents(data).values()]
    if len(documents_D) < 2:
        return None
    balance, unsure = {int(row["router"]): row for row in data.loaded}, None
    far = list[tuple[float, int, int]]()
    for r, overall in balance.items():
        ratio_D = bal.max_over_mean(counts.assignments_DE(r))
        excess_D, most = ratio_D - 1, 1.5 * overall["max_vio"]
        far_D = (excess_D >= data.thresholds.uneven) & (excess_D > most)
        far += [(float(ratio_D[d]), r, d) for d in np.flatnonzero(far_D).tolist()]

    @cache
    def of_router(r: int) -> list[Row]:
        """The rows of the busiest expert of each domain."""
        load_DE = counts.assignments_DE(r)
        at_D = np.arange(len(load_DE)) * load_DE.shape[1] + bal.busiest_expert(load_DE)
        return records(data.rows_of("domains", r).take(at_D.tolist()))

    for ratio, r, d in sorted(far, key=lambda one: -one[0]):
        sure, overall = documents_D[d] >= FEWEST_DOCUMENTS, balance[r]
        if (unsure and not sure) or not _overloads(data, row := of_router(r)[d], ratio, sure):
            continue
        where = name_of(data, row)
        values = {"domain": row["domain"], "expert": row["expert"], "load_ratio": ratio}
        values |= {"tokens": row["tokens"], "max_over_mean": overall["max_over_mean"]}
        if sure:
            together = "the selected" if data.selection.domains else "all"
            at = f" ({fnd.beyond(data)})" if data.counts.documents_unknown else ""
            said = (
                f'"{row["domain"]}" overloads expert {row["expert"]} of {where}: '
                f"{ratio:.2f}x the mean load on its {plural(row['tokens'], 'token')}{at}; "
                f"{together} domains together reach at most {overall['max_over_mean']:.2f}x there."
            )
            return warning(said, row, **values)
        unsure = unsure or note(
            f"Expert {row['expert']} of {where} gets {ratio:.2f}x the mean load on the "
            f'{row["tokens"]:,} tokens of "{row["domain"]}", but with fewer than '
            f"{FEWEST_DOCUMENTS} documents this may be their text, not the domain.",
            row,
            **values,
        )
    return unsure


def _overloads(data: ReportData, row: Row, ratio: float, sure: bool) -> bool:
    """Whether the load of the busiest expert of a domain is beyond what chance explains, which is
    not asked where there are too few documents to be `sure`."""
    if not data.counts.documents_unknown:
        return row["overload_p"] < ALPHA or not sure
    return beyond_documents(ratio - 1, row["expected_by_chance"] - 1)


@check("averages")
def unused_in_domain(data: ReportData) -> Finding | None:
    """An expert that one domain hardly uses and the others do. Of counts alone: where documents
    tell, `domain_specialization` says more."""
    if not data.counts.documents_unknown or len(data.counts.domains) < 2:
        return None
    domains, starved = data.tables["domains"], data.thresholds.starved
    of_router = domains.groupby(["router", "domain"])["assignments"]
    keys = ["router", "expert"]
    ratio_of = data.tables["load"].set_index(keys)["load_ratio"]
    overall: np.ndarray = ratio_of.reindex(pd.MultiIndex.from_frame(domains[keys])).to_numpy()
    ratio = domains["assignments"] / of_router.transform("mean")
    rows = domains.assign(ratio=ratio, most=of_router.transform("max"))
    rows = rows[(ratio < starved) & (overall >= starved)]
    both = zip(1 - rows["ratio"], rows["expected_by_chance"] - 1, strict=True)
    rows = rows[np.array([beyond_documents(below, floor) for below, floor in both], bool)]
    if not len(rows):
        return None
    # several domains may leave one expert unused
    row, others = fnd.top_row(rows, -rows["ratio"]), len(rows[keys].drop_duplicates()) - 1
    times = row["most"] / row["assignments"] if row["assignments"] else math.inf
    less = f"; the busiest expert gets {times:.1f} times as much" if times < math.inf else ""
    verb = "is" if others == 1 else "are"
    so = f"; so {verb} {plural(others, 'other expert')} in some domain" if others else ""
    said = (
        f'"{row["domain"]}" leaves expert {row["expert"]} of {name_of(data, row)} nearly unused: '
        f"{row['ratio']:.2f}x the mean load on its {plural(row['tokens'], 'token')} "
        f"({fnd.beyond(data)}){less}{so}."
    )
    values = {"domain": row["domain"], "expert": row["expert"], "load_ratio": row["ratio"]}
    values |= {"tokens": row["tokens"], "busiest_over_it": times, "others": others}
    return note(said, row, **values)
