"""The verdict on what the experts do: specialisation by domain, by token id, and the router's
confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_inspect.analysis.metrics.specialization import relabellings
from moe_inspect.reporting.verdict.balance import frames, where_of
from moe_inspect.text import counted

if TYPE_CHECKING:
    from moe_inspect.reporting.report import Report

FEWEST_RELABELLINGS = 100  # below this nothing can lie beyond the 99th percentile of the null
# share of what shuffled documents give by token id, under which there is nothing to part into
# vocabulary and topic
BIAS = 0.05


def domains(report: Report) -> list[str]:
    table = frames(report)["specialization"]
    counts, known = (
        report.counts,
        table.dropna(subset=["domain_mi_bits", "domain_mi_null_p99_bits"]),
    )
    if len(counts.domains) < 2 or table["domain_mi_bits"].isna().all():
        return []
    if counts.counts_only:
        return [
            (
                "Whether experts specialise by domain cannot be told from counts alone: they "
                "hold no "
                "documents to shuffle."
            )
        ]
    documents = (
        f"{counted(counts.documents, 'document')} in {counted(len(counts.domains), 'domain')}"
    )
    if known.empty or relabellings(counts.domain_of_unit_U) < FEWEST_RELABELLINGS:
        return [
            (
                f"Too few documents to tell whether experts specialise by domain: {documents} can "
                "hardly be shuffled."
            )
        ]
    # of many routers some exceed their 99th percentile by luck: half as much again is asked
    margin = known["domain_mi_null_p99_bits"] - known["domain_mi_null_bits"]
    real = known[known["domain_mi_bits"] - known["domain_mi_null_bits"] > 1.5 * margin]
    if (
        real.empty
        and (reach := known["domain_mi_null_p99_bits"].max()) >= report.thresholds.no_domain
    ):
        return [
            f"Too few documents to tell whether experts specialise by domain: {documents} give "
            f"up to {reach:.2f} bits when shuffled "
            f'(a "no" takes less than {report.thresholds.no_domain:g}).'
        ]
    if real.empty:
        return [
            (
                "No expert specialises by domain: routing tells no more of it than documents with "
                "their labels shuffled would."
            )
        ]
    effect = real["domain_mi_bits"] - real["domain_mi_null_bits"]
    row = real.loc[effect.idxmax()]
    found = _specialist(report, int(row["router"]))
    where = where_of(report, row)
    told = (
        f"{row['domain_mi_bits']:.3f} bits; shuffled documents give "
        f"{row['domain_mi_null_bits']:.3f}"
    )
    seed = untrained(report)
    if seed is not None:
        return [
            f"This model was never trained (random weights, seed {seed}), so nothing here is "
            "specialisation: that the domain tells of the "
            f"expert, most in {where.lower()} ({told}), is the text's doing, and the baseline "
            "that a trained model has to exceed."
        ]
    named = np.log2(
        [max(counts.routers[int(r)].experts, 2) for r in real["router"]]
    )  # bits that would name the expert
    specialised = int((effect / named >= report.thresholds.specialised).sum())
    most = f"most in {where.lower()} ({told}){found}."
    if specialised:
        less = (
            f", and routing differs by domain in {len(real) - specialised} more"
            if len(real) > specialised
            else ""
        )
        said = (
            f"Experts specialise by domain in {specialised} of {len(table)} routers{less}; {most}"
        )
    else:
        said = (
            f"Routing differs by domain in {len(real)} of {len(table)} routers, {most} A router "
            "that was never trained can show as much: "
            "a trace with --random-init is the baseline."
        )
    sentences = [said]
    given, null = row["domain_mi_given_token_bits"], row["domain_mi_given_token_null_bits"]
    beyond = max(given - null, 0)
    if max(beyond, effect.max()) > BIAS * null:  # not of NaN
        share = (
            "most of it is vocabulary"
            if beyond < effect.max() / 3
            else "it is not vocabulary alone"
        )
        sentences.append(
            f"Once the token id is known, the domain tells {given:.3f} bits of the expert there "
            f"({null:.3f} with the documents shuffled): "
            f"{share}."
        )
    return sentences


def _specialist(report: Report, router: int) -> str:
    """The expert whose activation rises most above its mean over domains, in which domain."""
    rows = frames(report)["domains"]
    rows = rows[(rows["router"] == router) & (rows["lift"] > 1)]
    if rows.empty:
        return ""
    best = rows.loc[(rows["activation"] - rows["activation"] / rows["lift"]).idxmax()]
    return (
        f": expert {best['expert']} takes {best['activation']:.0%} of the tokens of "
        f'"{best["domain"]}", {best["lift"]:.1f}x its mean over domains'
    )


def token_ids(report: Report) -> str | None:
    table = frames(report)["specialization"].dropna(
        subset=["vocabulary_specialization", "vocabulary_specialization_null"]
    )
    if (
        table.empty or not table["token_mi_null_bits"].max() > 0
    ):  # with a single token id there is nothing to tell
        return None
    effect = table["vocabulary_specialization"] - table["vocabulary_specialization_null"]
    row = table.loc[effect.idxmax()]
    if effect.max() < 0.02 or not row["token_mi_bits"] > row["token_mi_null_bits"]:
        return (
            "The token id does not decide the expert: tokens of one id spread as shuffled ids "
            "would."
        )
    where = where_of(report, row)
    said = (
        f"The token id decides most in {where.lower()}: {row['vocabulary_specialization']:.0%} "
        "of first choices are the favourite "
        f"of their token id ({row['vocabulary_specialization_null']:.0%} with the ids shuffled)"
    )
    if not report.top:
        return said + "."
    words = frames(report)["vocabulary"]
    words = words[(words["router"] == row["router"]) & words["token"].notna()]
    if words.empty:
        return said + "."
    best = words.loc[(words["first_choice_fraction"] * np.log1p(words["count"])).idxmax()]
    return (
        f"{said}; expert {best['expert']} is the first choice of "
        f"{best['first_choice_fraction']:.0%} of its {best['occurrences']:,} {best['token']!r}."
    )


def untrained(report: Report) -> int | None:
    """The seed of a model whose weights were drawn at random, as far as the trace says so."""
    corpus = report.trace.manifest.get("corpus")
    plan = corpus.get("plan") if isinstance(corpus, dict) else None
    return plan.get("random_init") if isinstance(plan, dict) else None


def confidence(report: Report) -> str | None:
    """Ties and losses, where logits are recorded and there is something to say of them."""
    if "logits" not in report.trace.tables:
        return None
    table = frames(report)["router"].dropna(subset=["tie_rate"])
    tied = table[table["tie_rate"] >= report.thresholds.tie]
    if tied.empty:
        return None
    row = tied.loc[tied["tie_rate"].idxmax()]
    return (
        f"Logits tie at the boundary of the chosen in {row['tie_rate']:.1%} of the decisions of "
        f"{where_of(report, row).lower()} "
        f"({counted(len(tied), 'router')} above {report.thresholds.tie:.0%}): there the order of "
        "the experts decides, not the router."
    )
