"""What the experts do: specialisation by domain and by token id; drift of the load, where it is
beyond chance; and ties of the logits of the router.

Each check takes the data of the report and returns one Finding or none.
"""

from __future__ import annotations

import math

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE
from moe_inspect.later import pd
from moe_inspect.reporting.tables.data import ReportData, Row
from moe_inspect.reporting.tables.summary import mapping
from moe_inspect.reporting.verdict import findings as fnd
from moe_inspect.reporting.verdict.findings import Finding, check, good, name_of, note, top_row
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace

DETERMINES = 0.02  # share of first choices beyond shuffled ids from which the id tells anything


@check("specialization")
def domain_specialization(data: ReportData) -> Finding | None:
    """Whether the domain carries information about the expert beyond what documents give by chance,
    in how many routers, and what that comes to in the router where it is most."""
    table, counts = data.tables.complete("specialization"), data.counts
    if len(counts.domains) < 2 or table["domain_mi_bits"].isna().all():
        return None
    if (untold := _cannot_tell(data, table)) is not None:
        return note(untold)
    real, routers = _beyond_chance(table), len(table)
    if real.empty:
        said = (
            "No expert specialises by domain: routing carries no more information about it than "
            "documents give by chance."
        )
        return note(said, specialised_routers=0, routers=routers)
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row = top_row(real, effect)
    most = (
        f"most in {name_of(data, row)} ({row['domain_mi_bits']:.3f} bits; documents by chance give "
        f"{row['domain_mi_null_bits']:.3f})"
    )
    values = {name: row[name] for name in ("domain_mi_bits", "domain_mi_null_bits")}
    values["routers"] = routers
    if (seed := untrained_seed(data.trace)) is not None:
        said = (
            f"This model was never trained (random weights, seed {seed}), so nothing here is "
            f"specialisation: the information that the domain carries about the expert, {most}, "
            "comes from the text alone. It is the baseline that a trained model must exceed."
        )
        return note(said, row, **values, seed=seed)
    if data.baseline is not None:
        return _beyond_baseline(data, real, values)
    # bits that would name the expert
    named = np.log2([max(counts.routers[int(r)].experts, 2) for r in real["router"]])
    n = int((effect / named >= data.thresholds.specialised).sum())
    values |= {"specialised_routers": n, "differing_routers": len(real)}
    most += _specialist(data, int(row["router"]))
    more = f", and routing differs by domain in {len(real) - n} more" if len(real) > n else ""
    said = f"Experts specialise by domain in {n} of {routers} routers{more}; {most}."
    if not n:
        said = (
            f"Routing differs by domain in {len(real)} of {routers} routers, {most}. An untrained "
            "router can show as much: a trace with --random-init is the baseline."
        )
    return (good if n else note)(said, row, **values)


def _beyond_baseline(data: ReportData, real: pd.DataFrame, values: Row) -> Finding:
    """In how many of the routers that differ by domain that is beyond the baseline, too."""
    beyond = real[real["domain_mi_beyond_baseline_p"] < ALPHA]
    among, n, routers = real if beyond.empty else beyond, len(beyond), values["routers"]
    row = top_row(among, among["domain_mi_beyond_baseline_bits"])
    here, null, its = (row[f"domain_mi_{of}bits"] for of in ("", "null_", "baseline_"))
    most = (
        f"{name_of(data, row)} ({here - null:.3f} bits beyond chance, {max(its, 0):.3f} in the "
        "baseline"
    )
    values = dict(values) | {"domain_mi_bits": here, "domain_mi_baseline_bits": its}
    values |= {"domain_mi_null_bits": null}
    values |= {"specialised_routers": n, "differing_routers": len(real)}
    said = (
        f"Routing differs by domain beyond the baseline in {n} of {routers} routers; most in "
        f"{most} too){_specialist(data, int(row['router']))}."
    )
    if not n:
        said = (
            f"Routing differs by domain in {len(real)} of {routers} routers, but no more than the "
            f"baseline's as far as these documents tell: most in {most})."
        )
    return (good if n else note)(said, row, **values)


def _in_baseline(row: Row, name: str, unit: str, form: str) -> str:
    """ "; 0.034 beyond chance, in the baseline 0.012": of a row of `specialization`."""
    its, beyond = row.get(f"{name}_baseline{unit}", np.nan), row[f"{name}{unit}"]
    beyond -= row[f"{name}_null{unit}"]
    return "" if np.isnan(its) else f"; {beyond:{form}} beyond chance, in the baseline {its:{form}}"


def _cannot_tell(data: ReportData, table: pd.DataFrame) -> str | None:
    """Why nothing can be said of domains, if so."""
    counts, enough = data.counts, data.thresholds.no_domain
    if counts.documents_unknown:
        return (
            "Counts alone cannot tell whether experts specialise by domain: they do not tell "
            "documents apart."
        )
    few = (
        "Too few documents to tell whether experts specialise by domain: "
        f"{plural(counts.documents, 'document')} in {plural(len(counts.domains), 'domain')}"
    )
    known = table.dropna(subset=["domain_mi_bits", "domain_mi_null_p99_bits"])
    if known.empty or len(counts.units) < FEWEST_TO_JUDGE:
        return f"{few}, of {FEWEST_TO_JUDGE} that it takes at least."
    reach = known["domain_mi_null_p99_bits"].max()
    if reach < enough or not _beyond_chance(table).empty:
        return None
    return f"{few} reach {reach:.2f} bits by chance (a negative result needs less than {enough:g})."


def _beyond_chance(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `specialization` whose domain information is more than chance gives."""
    return table[table["domain_mi_p"] < ALPHA]


@check("specialization")
def domain_beyond_token(data: ReportData) -> Finding | None:
    """How much of the domain's information is vocabulary, in the router where it is most."""
    table = data.tables.complete("specialization")
    if len(data.counts.domains) < 2 or _cannot_tell(data, table):
        return None
    real = _beyond_chance(table)
    if real.empty or untrained_seed(data.trace) is not None:
        return None
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row, name = top_row(real, effect), "domain_mi_given_token"
    given, null, p = (row[f"{name}_{of}"] for of in ("bits", "null_bits", "p"))
    if math.isnan(p):
        return None
    if not p < ALPHA:
        share = "that may be chance, so vocabulary may be all of it"
    elif max(given - null, 0) < effect.max() / 3:
        share = "most of it is vocabulary"
    else:
        share = "not vocabulary alone"
    said = (
        f"Given the token id, the domain still carries {given:.3f} bits about the expert in "
        f"{name_of(data, row)} (documents by chance give {null:.3f}"
        f"{_in_baseline(row, name, '_bits', '.3f')}): {share}."
    )
    return note(said, row, **{f"{name}_bits": given, f"{name}_null_bits": null, f"{name}_p": p})


def _specialist(data: ReportData, router: int) -> str:
    """The expert whose activation rises most above its mean over domains, in which domain."""
    rows = data.rows_of("domains", router)
    rows = rows[rows["lift"] > 1]
    if rows.empty:
        return ""
    best = top_row(rows, rows["activation"] - rows["activation"] / rows["lift"])
    return (
        f": expert {best['expert']} takes {best['activation']:.0%} of the tokens of "
        f'"{best["domain"]}", {best["lift"]:.1f}x its mean over domains'
    )


@check("specialization")
def token_specialization(data: ReportData) -> Finding | None:
    """Whether the token id determines the expert, and the token id that does most."""
    name, table = "vocabulary_specialization", data.tables.complete("specialization")
    table = table.dropna(subset=[name, f"{name}_null"])
    # with a single token id there is nothing to tell
    if table.empty or not table["token_mi_null_bits"].max() > 0:
        return None
    effect = table[name] - table[f"{name}_null"]
    row = top_row(table, effect)
    where, share, null = name_of(data, row), row[name], row[f"{name}_null"]
    favourite = "of first choices are the favourite expert of their token id"
    if effect.max() < DETERMINES:
        said = (
            "The token id does not determine the expert: tokens of one id spread over the experts "
            "as shuffled ids would."
        )
    elif not row[f"{name}_p"] * len(table) < ALPHA:
        said = (
            f"Too little data to tell whether the token id determines the expert: in {where}, "
            f"{share:.0%} {favourite}, which may be chance ({null:.0%} with the ids shuffled)."
        )
    else:
        said = (
            f"The token id determines the expert most in {where}: {share:.0%} {favourite} "
            f"({null:.0%} with the ids shuffled{_in_baseline(row, name, '', '.0%')})"
            f"{_most_exclusive_token(data, row)}."
        )
    return note(said, row, **{name: share, f"{name}_null": null})


def _most_exclusive_token(data: ReportData, row: Row) -> str:
    """The token id that goes to one expert most exclusively, of those that are frequent."""
    if not data.top:
        return ""
    words = data.rows_of("vocabulary", int(row["router"])).dropna(subset=["token"])
    if words.empty:
        return ""
    best = top_row(words, words["first_choice_fraction"] * np.log1p(words["count"]))
    share = best["first_choice_fraction"]
    of = "all" if share == 1 else f"{share:.0%} of the"
    verb = "goes" if best["occurrences"] == 1 else "go"
    return (
        f"; {of} {plural(best['occurrences'], 'occurrence')} of {best['token']!r} {verb} to "
        f"expert {best['expert']} first"
    )


def untrained_seed(trace: Trace) -> int | None:
    """The seed of a model whose weights were drawn at random, as far as the trace says so."""
    plan = mapping(mapping(trace.manifest.get("corpus")).get("plan"))
    return plan.get("random_init")


@check("router")
def router_ties(data: ReportData) -> Finding | None:
    """Decisions in which logits tie at the boundary of the chosen, where logits are recorded."""
    if "logits" not in data.trace.tables:
        return None
    table, least = data.tables["router"], data.thresholds.tie
    tied = table[table["tie_rate"] >= least]
    if tied.empty:
        return None
    row = top_row(tied, tied["tie_rate"])
    said = (
        f"In {row['tie_rate']:.1%} of the decisions of {name_of(data, row)} the last expert "
        f"chosen and the first not chosen have equal logits ({plural(len(tied), 'router')} with "
        f"{least:.1%} or more): the order of the experts decides these, not the router."
    )
    severity = "note" if fnd.few_documents(data) else "warning"
    return fnd.found(severity, said, row, tie_rate=row["tie_rate"], routers=len(tied))


# of a trace for which a pass of its own costs little beside the report
MOST_DECISIONS = 2**20


@check("drift")
def drift(data: ReportData) -> Finding | None:
    """An expert whose share rises or falls through the whole trace."""
    if not is_small(data.trace):
        return None
    table = data.tables["drift"]
    change = (table["trend_last"] - table["trend_first"]).abs()
    told = table[(table["trend_p"] < ALPHA) & (change >= data.thresholds.uneven)]
    if told.empty:
        return None
    row = top_row(told, change[told.index])
    expert, first, last = int(row["trend_expert"]), row["trend_first"], row["trend_last"]
    said = (
        f"Load drifts through the trace in {len(told)} of {plural(len(table), 'router')}, most in "
        f"{name_of(data, row)}: expert {expert} gets {first:.2f}x the mean load in the first "
        f"quarter and {last:.2f}x in the last. "
        + (data.trace.fed_by_length or "Text that changes along the trace moves load too.")
    )
    return note(said, row, expert=expert, first_quarter=first, last_quarter=last, routers=len(told))


def is_small(trace: Trace) -> bool:
    """Whether the trace is small, its documents are known, and its model is trained."""
    has_documents = trace.by_document or not trace.counts_only
    is_trained = untrained_seed(trace) is None
    return has_documents and is_trained and trace.n_decisions <= MOST_DECISIONS
