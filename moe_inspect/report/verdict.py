"""The report in words: what is wrong, how sure that is, and what the usual single figure would have hidden.

Each function takes the report's tables and returns one sentence or none. What chance can explain is never called a fault.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_inspect.analysis.specialization import relabellings
from moe_inspect.analysis.uncertainty import FEWEST_DOCUMENTS, noise_floor

if TYPE_CHECKING:
    from moe_inspect.report.report import Report

UNEVEN = 0.2  # max_vio from which imbalance is worth acting on: the busiest expert 20 % above the mean
OVERLOADED = 2.0  # load ratio
STARVED = 0.1  # load ratio
SLIGHT_BITS = 0.1  # of domain information: a router that was never trained can reach as much
MODERATE_BITS = 0.2  # of domain information: where shuffled documents can reach as much, finding none means nothing
FEWEST_RELABELLINGS = 100  # below this nothing can lie beyond the 99th percentile of the null
BY_UNEVEN = f"at least {1 + UNEVEN:g}x and beyond chance"
THRESHOLDS: dict[str, object] = {
    "threshold_uneven": f"max_vio >= {UNEVEN} and above chance",
    "threshold_overloaded": f"load_ratio >= {OVERLOADED}",
    "threshold_starved": f"load_ratio < {STARVED}",
    "threshold_no_domain": f"domain_mi_null_p99_bits < {MODERATE_BITS}",
}


def verdict(report: Report) -> list[str]:
    """Plain sentences, most important first."""
    said = [
        report.warning and f"Careful: {report.warning}.",
        _balance(report),
        _silent(report),
        _dead(report),
        _crowded(report),
        _pooled(report),
        _overloading_domain(report),
        *_domains(report),
        _token_ids(report),
        _judged_on(report),
    ]
    return [sentence for sentence in said if sentence]


def _frames(report: Report) -> Any:
    """The tables, untyped: pandas' own annotations make a union of every result."""
    return report.tables


def routers(report: Report) -> list[dict[str, Any]]:
    """The rows of `balance` that have load."""
    return _frames(report)["balance"].dropna(subset=["max_vio"]).to_dict("records")


def worst_router(report: Report) -> dict[str, Any] | None:
    return max(routers(report), key=lambda row: row["max_vio"], default=None)


def above_chance(report: Report, row: Any) -> bool:
    """Whether a router's max_vio is more than chance gives: the low end of its interval beyond the noise floor, which
    tokens that come in documents raise by √ design effect. Too few documents have no interval, and nothing is beyond chance
    then; counts alone know no documents, and are held against twice the floor."""
    if report.counts.counts_only:
        return row["max_vio"] > 2 * row["noise_floor"]
    return row["max_vio"] > row["noise_floor"] and row["max_vio_low"] > chance(row)


def chance(row: Any) -> float:
    """The max_vio that chance gives documents like these."""
    effect = row["design_effect"]
    return row["noise_floor"] * math.sqrt(max(1.0, 1.0 if math.isnan(effect) else effect))


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
    where = _where(report, row)
    if few_documents(report):
        return (
            f"Too little to judge balance by: at the most, {where.lower()}, {busiest} ({_chance(row)}), but fewer than "
            f"{FEWEST_DOCUMENTS} documents cannot tell the model from the text."
        )
    uneven = sum(above_chance(report, r) and r["max_vio"] >= UNEVEN for r in balance)
    of = f"{uneven} of {len(balance)} routers {'is' if uneven == 1 else 'are'} uneven ({BY_UNEVEN})"
    low, high = 1 + row["max_vio_low"], 1 + row["max_vio_high"]
    sure = "counts alone have no interval" if math.isnan(low) else f"95% interval {low:.2f}-{high:.2f}x"
    beside = f"({sure}; {_chance(row)})"
    if above_chance(report, row) and row["max_vio"] >= UNEVEN:
        if len(balance) == 1:
            return f"{where} is uneven ({BY_UNEVEN}): {busiest} {beside}."
        return f"{where} is the worst balanced: {busiest} {beside}; {of}."
    if above_chance(report, row):
        return f"Balance is good: at the worst, {where.lower()}, {busiest} {beside}."
    if chance(row) >= UNEVEN or row["max_vio"] >= UNEVEN:
        others = f"; {of}" if uneven else ""
        return f"Too little to judge balance by: at the worst, {where.lower()}, {busiest}, which may be chance {beside}{others}."
    return f"Nothing is wrong with the balance: at the worst, {where.lower()}, {busiest}, no more than chance may give {beside}."


def _silent(report: Report) -> str | None:
    table = _frames(report)["balance"]
    silent = table[table["assignments"] == 0].to_dict("records")
    if not silent or len(silent) == len(table):
        return None
    places = _some([_where(report, row).lower() for row in silent], 6, ", ")
    return f"{len(silent)} of {len(table)} routers made no assignment at all: {places}."


def _dead(report: Report) -> str | None:
    balance = routers(report)
    dead = [row for row in balance if row["dead_experts"]]
    if not dead:
        return None
    load = _frames(report)["load"]
    places, likely = [], 0.0
    for row in dead:
        ids = load.loc[(load["router"] == row["router"]) & (load["assignments"] == 0), "expert"].tolist()
        places.append(f"{_where(report, row).lower()}: {_listed(ids)}")
        picked = min(1.0, row["assignments"] / (row["tokens"] * row["experts"]))
        likely = max(likely, row["experts"] * (1 - picked) ** row["tokens"])
    n = sum(int(row["dead_experts"]) for row in dead)
    said = f"{n} dead {'expert' if n == 1 else 'experts'} in {len(dead)} of {len(balance)} routers ({_some(places, 4, '; ')})"
    tokens = counted(report.counts.tokens, "token")
    if likely > 0.01:
        return f"{said}: but {tokens} {'are' if report.counts.tokens > 1 else 'is'} too few to call an expert dead, chance alone leaves some without any."
    if few_documents(report):
        return f"{said}: not one of {tokens} went there, but fewer than {FEWEST_DOCUMENTS} documents cannot tell the model from the text."
    return f"{said}: not one of {tokens} went there."


def _crowded(report: Report) -> str | None:
    load = _frames(report)["load"]
    over, starved = load[load["load_ratio"] >= OVERLOADED], load[(load["load_ratio"] < STARVED) & (load["assignments"] > 0)]
    real, parts = {row["router"] for row in routers(report) if above_chance(report, row)}, []
    over, starved = over[over["router"].isin(real)], starved[starved["router"].isin(real)]
    if len(over):
        parts.append(
            f"{counted(len(over), 'expert')} in {counted(over['router'].nunique(), 'router')} {_verb(over, 'get')} at least {OVERLOADED:g}x the mean load"
        )
    if len(starved):
        parts.append(
            f"{counted(len(starved), 'expert')} in {counted(starved['router'].nunique(), 'router')} {_verb(starved, 'get')} under a tenth of it"
        )
        if not len(over):
            parts[-1] = parts[-1].replace("of it", "of the mean load")
    return f"{' and '.join(parts)}." if parts else None


def _pooled(report: Report) -> str | None:
    pooled, row = report.pooled_max_over_mean(), worst_router(report)
    if pooled is None or row is None:
        return None
    if not above_chance(report, row) or row["max_vio"] < UNEVEN or pooled - 1 > min(UNEVEN, row["max_vio"] / 2):
        return None
    chosen, where = report.selection.routers, _where(report, row)
    layers = len({report.trace.routers[r].layer for r in chosen})
    of = "layers" if layers == len(chosen) else "routers"
    over = f"all {of}" if len(chosen) == len(report.trace.routers) else f"the {len(chosen)} {of} selected"
    return f"Pooled over {over} the same routing reads {pooled:.2f}x: a pooled figure would have hidden {where.lower()}."


def _overloading_domain(report: Report) -> str | None:
    domains = _frames(report)["domains"]
    if domains["domain"].nunique() < 2:
        return None
    mean = domains.groupby(["router", "domain"])["assignments"].transform("mean")
    rated = domains.assign(ratio=domains["assignments"] / mean)[mean > 0]
    rows = rated.loc[rated.groupby(["router", "domain"])["ratio"].idxmax()]
    balance = {row["router"]: row for row in routers(report)}
    counts, unsure = report.counts, None
    documents = dict(zip(counts.domains, np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains)).tolist(), strict=True))
    for _, row in rows.sort_values("ratio", ascending=False).iterrows():
        overall = balance[row["router"]]
        T = round(row["tokens"] * overall["assignments"] / (overall["tokens"] * overall["top_k"]))
        floor = noise_floor(T, int(overall["experts"]), int(overall["top_k"])) * chance(overall) / max(overall["noise_floor"], 1e-9)
        if row["ratio"] - 1 >= UNEVEN and row["ratio"] - 1 > 2 * floor and row["ratio"] - 1 > 1.5 * overall["max_vio"]:
            where, together = _where(report, row).lower(), "the" if report.selection.domains else "all"
            if counts.counts_only or documents[row["domain"]] >= FEWEST_DOCUMENTS:
                return (
                    f'"{row["domain"]}" overloads expert {row["expert"]} of {where}: {row["ratio"]:.2f}x the mean load on '
                    f"its {row['tokens']:,} tokens, where {together} domains together come to at most {overall['max_over_mean']:.2f}x."
                )
            unsure = unsure or (
                f"Expert {row['expert']} of {where} gets {row['ratio']:.2f}x the mean load on the {row['tokens']:,} tokens of "
                f'"{row["domain"]}", but fewer than {FEWEST_DOCUMENTS} documents of it cannot tell the domain from its text.'
            )
    return unsure


def _domains(report: Report) -> list[str]:
    table = _frames(report)["specialization"]
    counts, known = report.counts, table.dropna(subset=["domain_mi_bits", "domain_mi_null_p99_bits"])
    if len(counts.domains) < 2 or table["domain_mi_bits"].isna().all():
        return []
    if counts.counts_only:
        return ["Whether experts specialise by domain cannot be told from counts alone: they hold no documents to shuffle."]
    documents = f"{counted(counts.documents, 'document')} in {counted(len(counts.domains), 'domain')}"
    if known.empty or relabellings(counts.domain_of_unit_U) < FEWEST_RELABELLINGS:
        return [f"Too few documents to tell whether experts specialise by domain: {documents} can hardly be shuffled."]
    # of many routers some exceed their 99th percentile by luck: half as much again is asked
    margin = known["domain_mi_null_p99_bits"] - known["domain_mi_null_bits"]
    real = known[known["domain_mi_bits"] - known["domain_mi_null_bits"] > 1.5 * margin]
    if real.empty and (reach := known["domain_mi_null_p99_bits"].max()) >= MODERATE_BITS:
        return [
            f"Too few documents to tell whether experts specialise by domain: {documents} give up to {reach:.2f} bits when shuffled "
            f'(a "no" takes less than {MODERATE_BITS:g}).'
        ]
    if real.empty:
        return ["No expert specialises by domain: routing tells no more of it than documents with their labels shuffled would."]
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row = real.loc[effect.idxmax()]
    found = _specialist(report, int(row["router"]))
    where = _where(report, row)
    said = (
        f"Experts specialise by domain in {len(real)} of {len(table)} routers, most in {where.lower()}"
        f" ({row['domain_mi_bits']:.3f} bits; shuffled documents give {row['domain_mi_null_bits']:.3f}){found}."
    )
    if effect.max() < SLIGHT_BITS:
        said += " That is slight: a router that was never trained can show as much."
    sentences = [said]
    given, null = row["domain_mi_given_token_bits"], row["domain_mi_given_token_null_bits"]
    if effect.max() >= SLIGHT_BITS / 5 and not math.isnan(given) and not math.isnan(null):
        beyond = max(given - null, 0)
        share = "most of it is vocabulary" if beyond < effect.max() / 3 else "it is not vocabulary alone"
        sentences.append(
            f"Once the token id is known, the domain tells {given:.3f} bits of the expert there ({null:.3f} with the documents shuffled): "
            f"{share}."
        )
    return sentences


def _specialist(report: Report, router: int) -> str:
    """The expert whose activation rises most above its mean over domains, in which domain."""
    rows = _frames(report)["domains"]
    rows = rows[(rows["router"] == router) & (rows["lift"] > 1)]
    if rows.empty:
        return ""
    best = rows.loc[(rows["activation"] - rows["activation"] / rows["lift"]).idxmax()]
    return f': expert {best["expert"]} takes {best["activation"]:.0%} of the tokens of "{best["domain"]}", {best["lift"]:.1f}x its mean over domains'


def _token_ids(report: Report) -> str | None:
    table = _frames(report)["specialization"].dropna(subset=["vocabulary_specialization", "vocabulary_specialization_null"])
    if table.empty or not table["token_mi_null_bits"].max() > 0:  # with a single token id there is nothing to tell
        return None
    effect = table["vocabulary_specialization"] - table["vocabulary_specialization_null"]
    row = table.loc[effect.idxmax()]
    if effect.max() < 0.02 or not row["token_mi_bits"] > row["token_mi_null_bits"]:
        return "The token id does not decide the expert: tokens of one id spread as shuffled ids would."
    where = _where(report, row)
    said = (
        f"The token id decides most in {where.lower()}: {row['vocabulary_specialization']:.0%} of first choices are the favourite "
        f"of their token id ({row['vocabulary_specialization_null']:.0%} with the ids shuffled)"
    )
    if not report.top:
        return said + "."
    words = _frames(report)["vocabulary"]
    words = words[(words["router"] == row["router"]) & words["token"].notna()]
    if words.empty:
        return said + "."
    best = words.loc[(words["first_choice_fraction"] * np.log1p(words["count"])).idxmax()]
    return f"{said}; expert {best['expert']} is the first choice of {best['first_choice_fraction']:.0%} of its {best['occurrences']:,} {best['token']!r}."


def _judged_on(report: Report) -> str:
    counts = report.counts
    documents = f" of {counted(counts.documents, 'document')}" if counts.documents else ""
    domains = f" in {counted(len(counts.domains), 'domain')}" if len(counts.domains) > 1 else ""
    return f"Judged on {counted(counts.tokens, 'token')}{documents}{domains}, {counted(len(report.selection.routers), 'router')}."


def _where(report: Report, row: Any) -> str:
    """ "Layer 3", or with the router where its layer has several."""
    layer, router = int(row["layer"]), int(row["router"])
    several = sum(r.layer == layer for r in report.trace.routers) > 1
    return f"Layer {layer} (router {router})" if several else f"Layer {layer}"


def _listed(ids: list[int]) -> str:
    return _some([str(i) for i in ids], 6, ", ")


def _some(items: list[str], most: int, between: str) -> str:
    return between.join(items[:most]) + (f"{between}{len(items) - most} more" if len(items) > most else "")


def _verb(subjects: Any, verb: str) -> str:
    return f"{verb}s" if len(subjects) == 1 else verb


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
