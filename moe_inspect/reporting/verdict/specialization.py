"""What the experts do: specialisation by domain and by token id, and ties of the router's logits.

Each check takes the report's data and returns one Finding or none.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from moe_inspect.analysis.metrics.chance import ALPHA, FEWEST_TO_JUDGE
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.verdict.chance import name_of
from moe_inspect.reporting.verdict.findings import Finding, good, note, warning
from moe_inspect.text import plural

DETERMINES = 0.02  # share of first choices beyond shuffled ids from which the id tells anything


def domain_specialization(data: ReportData) -> Finding | None:
    """Whether the domain carries information about the expert beyond what documents give by chance,
    in how many routers, and what that comes to in the router where it is most."""
    table: Any = data.tables["specialization"]
    counts = data.counts
    if len(counts.domains) < 2 or table["domain_mi_bits"].isna().all():
        return None
    if (untold := _cannot_tell(data, table)) is not None:
        return note(untold)
    real = _beyond_chance(table)
    if real.empty:
        return note(
            "No expert specialises by domain: routing carries no more information about it than "
            "documents give by chance.",
            specialised_routers=0,
            routers=len(table),
        )
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row = real.loc[effect.idxmax()]
    most = (
        f"most in {name_of(data, row)} ({row['domain_mi_bits']:.3f} bits; documents by chance give "
        f"{row['domain_mi_null_bits']:.3f})"
    )
    values = {
        "domain_mi_bits": row["domain_mi_bits"],
        "domain_mi_null_bits": row["domain_mi_null_bits"],
        "routers": len(table),
    }
    seed = untrained_seed(data)
    if seed is not None:
        return note(
            f"This model was never trained (random weights, seed {seed}), so nothing here is "
            f"specialisation: the information that the domain carries about the expert, {most}, "
            "comes from the text alone. It is the baseline that a trained model must exceed.",
            row,
            **values,
            seed=seed,
        )
    if data.baseline is not None:
        return _beyond_baseline(data, real, len(table), values)
    # bits that would name the expert
    named = np.log2([max(counts.routers[int(r)].experts, 2) for r in real["router"]])
    specialised = int((effect / named >= data.thresholds.specialised).sum())
    values |= {"specialised_routers": specialised, "differing_routers": len(real)}
    most += _specialist(data, int(row["router"]))
    if not specialised:
        return note(
            f"Routing differs by domain in {len(real)} of {len(table)} routers, {most}. An "
            "untrained router can show as much: a trace with --random-init is the baseline.",
            row,
            **values,
        )
    less = (
        f", and routing differs by domain in {len(real) - specialised} more"
        if len(real) > specialised
        else ""
    )
    return good(
        f"Experts specialise by domain in {specialised} of {len(table)} routers{less}; {most}.",
        row,
        **values,
    )


def _beyond_baseline(data: ReportData, real: Any, routers: int, values: dict[str, Any]) -> Finding:
    """In how many of the routers that differ by domain that is beyond the baseline, too."""
    beyond = real[real["domain_mi_beyond_baseline_p"] < ALPHA]
    among = real if beyond.empty else beyond
    row = among.loc[among["domain_mi_beyond_baseline_bits"].idxmax()]
    bits, its = row["domain_mi_bits"] - row["domain_mi_null_bits"], row["domain_mi_baseline_bits"]
    most = f"{name_of(data, row)} ({bits:.3f} bits beyond chance, {max(its, 0):.3f} in the baseline"
    values |= {"domain_mi_bits": row["domain_mi_bits"], "domain_mi_baseline_bits": its}
    values |= {"domain_mi_null_bits": row["domain_mi_null_bits"]}
    values |= {"specialised_routers": len(beyond), "differing_routers": len(real)}
    if beyond.empty:
        return note(
            f"Routing differs by domain in {len(real)} of {routers} routers, but no more than the "
            f"baseline's as far as these documents tell: most in {most}).",
            row,
            **values,
        )
    return good(
        f"Experts specialise by domain beyond the baseline in {len(beyond)} of {routers} routers; "
        f"most in {most} too){_specialist(data, int(row['router']))}.",
        row,
        **values,
    )


def _in_baseline(row: Any, name: str, unit: str, form: str) -> str:
    """ "; in the baseline 0.012 beyond chance": of a row of `specialization`."""
    its = row.get(f"{name}_baseline{unit}", np.nan)
    return "" if np.isnan(its) else f"; in the baseline {its:{form}} beyond chance"


def _cannot_tell(data: ReportData, table: Any) -> str | None:
    """Why nothing can be said of domains, if so."""
    counts, enough = data.counts, data.thresholds.no_domain
    known = table.dropna(subset=["domain_mi_bits", "domain_mi_null_p99_bits"])
    if counts.counts_only:
        return (
            "Counts alone cannot tell whether experts specialise by domain: they do not tell "
            "documents apart."
        )
    few = (
        "Too few documents to tell whether experts specialise by domain: "
        f"{plural(counts.documents, 'document')} in {plural(len(counts.domains), 'domain')}"
    )
    if known.empty or len(counts.units) < FEWEST_TO_JUDGE:
        return f"{few}, of {FEWEST_TO_JUDGE} that it takes at least."
    reach = known["domain_mi_null_p99_bits"].max()
    if _beyond_chance(table).empty and reach >= enough:
        return (
            f"{few} reach {reach:.2f} bits by chance (a negative result needs less than "
            f"{enough:g})."
        )
    return None


def _beyond_chance(table: Any) -> Any:
    """The rows of `specialization` whose domain information is more than chance gives."""
    return table[table["domain_mi_p"] < ALPHA]


def domain_beyond_token(data: ReportData) -> Finding | None:
    """How much of the domain's information is vocabulary, in the router where it is most."""
    table: Any = data.tables["specialization"]
    if len(data.counts.domains) < 2 or table["domain_mi_bits"].isna().all():
        return None
    if _cannot_tell(data, table) is not None or untrained_seed(data) is not None:
        return None
    real = _beyond_chance(table)
    if real.empty:
        return None
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row = real.loc[effect.idxmax()]
    given, null = row["domain_mi_given_token_bits"], row["domain_mi_given_token_null_bits"]
    beyond, p = max(given - null, 0), row["domain_mi_given_token_p"]
    if math.isnan(p):
        return None
    share = "most of it is vocabulary" if beyond < effect.max() / 3 else "not vocabulary alone"
    if not p < ALPHA:
        share = "that may be chance, so vocabulary may be all of it"
    return note(
        f"Given the token id, the domain still carries {given:.3f} bits about the expert in "
        f"{name_of(data, row)} (documents by chance give {null:.3f}"
        f"{_in_baseline(row, 'domain_mi_given_token', '_bits', '.3f')}): {share}.",
        row,
        domain_mi_given_token_bits=given,
        domain_mi_given_token_null_bits=null,
        domain_mi_given_token_p=p,
    )


def _specialist(data: ReportData, router: int) -> str:
    """The expert whose activation rises most above its mean over domains, in which domain."""
    rows: Any = data.tables["domains"]
    rows = rows[(rows["router"] == router) & (rows["lift"] > 1)]
    if rows.empty:
        return ""
    best = rows.loc[(rows["activation"] - rows["activation"] / rows["lift"]).idxmax()]
    return (
        f": expert {best['expert']} takes {best['activation']:.0%} of the tokens of "
        f'"{best["domain"]}", {best["lift"]:.1f}x its mean over domains'
    )


def token_specialization(data: ReportData) -> Finding | None:
    """Whether the token id determines the expert, and the token id that does most."""
    table: Any = data.tables["specialization"]
    table = table.dropna(subset=["vocabulary_specialization", "vocabulary_specialization_null"])
    # with a single token id there is nothing to tell
    if table.empty or not table["token_mi_null_bits"].max() > 0:
        return None
    effect = table["vocabulary_specialization"] - table["vocabulary_specialization_null"]
    row = table.loc[effect.idxmax()]
    share, null = row["vocabulary_specialization"], row["vocabulary_specialization_null"]
    values = {"vocabulary_specialization": share, "vocabulary_specialization_null": null}
    said = None
    if effect.max() < DETERMINES:
        said = (
            "The token id does not determine the expert: tokens of one id spread over the experts "
            "as shuffled ids would."
        )
    elif not row["vocabulary_specialization_p"] * len(table) < ALPHA:
        said = (
            "Too little data to tell whether the token id determines the expert: in "
            f"{name_of(data, row)}, {share:.0%} of first choices are the favourite expert of their "
            f"token id, which may be chance ({null:.0%} with the ids shuffled)."
        )
    if said is not None:
        return note(said, row, **values)
    return note(
        f"The token id determines the expert most in {name_of(data, row)}: {share:.0%} of first "
        f"choices are the favourite expert of their token id ({null:.0%} with the ids shuffled"
        f"{_in_baseline(row, 'vocabulary_specialization', '', '.0%')})"
        f"{_most_exclusive_token(data, row)}.",
        row,
        **values,
    )


def hard_tokens(data: ReportData) -> Finding | None:
    """The expert whose tokens are most harder, or easier, to continue than others of the same
    domain, phase and token id; none where that is not beyond chance in any."""
    if not data.trace.has_loss:
        return None
    table: Any = data.tables["loss"]
    table = table[table["domain"].isna() & table["phase"].isna()]
    beyond = table[table["difference_p"] < ALPHA]
    if beyond.empty:
        return None
    row = beyond.loc[beyond["difference_nats"].abs().idxmax()]
    nats, low, high = (row[f"difference_{name}"] for name in ("nats", "low", "high"))
    return note(
        f"Expert {row['expert']} of {name_of(data, row)} serves tokens that are {abs(nats):.2f} "
        f"nats {'harder' if nats > 0 else 'easier'} to continue than others of the same domain, "
        f"phase and token id (95% interval over documents {low:.2f} to {high:.2f}; "
        f"±{row['difference_null_p99']:.2f} by chance of such documents). In all, "
        f"{len(beyond)} of {plural(len(table), 'expert')} "
        f"{'differs' if len(beyond) == 1 else 'differ'} in this way, harder or easier.",
        row,
        expert=row["expert"],
        difference_nats=nats,
        experts=len(beyond),
    )


def _most_exclusive_token(data: ReportData, row: Any) -> str:
    """The token id that goes to one expert most exclusively, of those that are frequent."""
    if not data.top:
        return ""
    words: Any = data.tables["vocabulary"]
    words = words[(words["router"] == row["router"]) & words["token"].notna()]
    if words.empty:
        return ""
    best = words.loc[(words["first_choice_fraction"] * np.log1p(words["count"])).idxmax()]
    share = best["first_choice_fraction"]
    of = "all" if share == 1 else f"{share:.0%} of the"
    verb = "goes" if best["occurrences"] == 1 else "go"
    return (
        f"; {of} {plural(best['occurrences'], 'occurrence')} of {best['token']!r} {verb} to "
        f"expert {best['expert']} first"
    )


def untrained_seed(data: ReportData) -> int | None:
    """The seed of a model whose weights were drawn at random, as far as the trace says so."""
    corpus = data.trace.manifest.get("corpus")
    plan = cast("dict[str, Any]", corpus).get("plan") if isinstance(corpus, dict) else None
    return cast("dict[str, Any]", plan).get("random_init") if isinstance(plan, dict) else None


def router_ties(data: ReportData) -> Finding | None:
    """Decisions in which logits tie at the boundary of the chosen, where logits are recorded."""
    if "logits" not in data.trace.tables:
        return None
    table: Any = data.tables["router"]
    table = table.dropna(subset=["tie_rate"])
    tied = table[table["tie_rate"] >= data.thresholds.tie]
    if tied.empty:
        return None
    row = tied.loc[tied["tie_rate"].idxmax()]
    return warning(
        f"In {row['tie_rate']:.1%} of the decisions of {name_of(data, row)} the last expert "
        f"chosen and the first not chosen have equal logits ({plural(len(tied), 'router')} with "
        f"{data.thresholds.tie:.1%} or more): the order of the experts decides these, not the "
        "router.",
        row,
        tie_rate=row["tie_rate"],
        routers=len(tied),
    )
