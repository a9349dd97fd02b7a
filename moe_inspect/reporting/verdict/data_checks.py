"""Is the trace fit to be judged? Too few tokens, domains of few documents, repeated rows, counts of
only some ranks.

Each check takes the report's data and returns one Finding or none. T tokens, K slots, E experts.
"""

from __future__ import annotations

import math

import numpy as np

from moe_inspect.analysis.counting.select import selected_tokens
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.reporting.tables.data import ReportData, Row, worst_of
from moe_inspect.reporting.tables.load import chosen, floor_of
from moe_inspect.reporting.tables.summary import adapter, quantization
from moe_inspect.reporting.verdict import findings as fnd
from moe_inspect.reporting.verdict.findings import Finding, check, name_of, note, warning
from moe_inspect.text import join_first, plural, printable, ranges
from moe_inspect.trace.shard import run_edges

DROPPED, MANY_DROPPED = 0.01, 0.2  # share of a router's assignments: a warning, and a grave one
CHANCE = 1e-3  # probability that dead experts fill whole ranks
RUN = 16  # identical rows in sequence that text does not make


@check("fit")
def trace_warning(data: ReportData) -> Finding | None:
    """The trace is not complete, decisions were dropped, or its model has a quirk."""
    if not data.warning:
        return None
    return warning(f"{fnd.capital(data.warning)}.", dropped=data.dropped)


@check("fit")
def missing_ranks(data: ReportData) -> Finding | None:
    """Whether experts without load fill whole ranks of an expert-parallel run, the same at every
    router, which chance hardly does: what the counts of some ranks look like when they are taken
    for all."""
    load_of = {r: load_E for r in data.selection.routers if (load_E := data.counts.load_E(r)).any()}
    if len({len(load_E) for load_E in load_of.values()}) != 1:
        return None
    dead_LE = np.array(list(load_of.values())) == 0
    silent_R = silent_ranks(dead_LE)[0]
    # a router that has collapsed, or all of whose logits are equal, sends all tokens to k experts
    one_choice = all(
        (load_E > 0).sum() == data.counts.routers[r].top_k and len(set(load_E[load_E > 0])) == 1
        for r, load_E in load_of.items()
    )
    if not silent_R.any() or one_choice:
        return None
    E, ranks = dead_LE.shape[1], len(silent_R)
    size = E // ranks
    seen, gone = (
        [ranges(range(i * size, (i + 1) * size)) for i in np.flatnonzero(of_R).tolist()]
        for of_R in (~silent_R, silent_R)
    )
    which = (
        f"Only experts {join_first(seen, 4, ', ')} of {E} have any load"
        if len(seen) < len(gone)
        else f"Experts {join_first(gone, 4, ', ')} of {E} have no load"
    )
    routers = ", in every router" if len(load_of) > 1 else ""
    said = (
        f"{which}{routers}: these look like the counts of {len(seen)} of {ranks} ranks under "
        "expert parallelism, not like dead experts. Add up the ranks, or record global expert ids."
    )
    return fnd.critical(said, ranks_seen=len(seen), ranks=ranks, experts=E)


def silent_ranks(dead_LE: np.ndarray) -> tuple[np.ndarray, float]:
    """Which ranks have no expert with load, for the number of ranks that makes that least likely by
    chance, and how likely that is; none where chance can make it. bool [ranks]"""
    E, dead_L = dead_LE.shape[1], dead_LE.sum(1).tolist()
    likeliest, silent = CHANCE, np.zeros(0, bool)
    for ranks in (n for n in range(2, E + 1) if E % n == 0):
        silent_R = np.asarray(np.all(np.all(dead_LE, axis=0).reshape(ranks, -1), axis=1))
        gone = int(silent_R.sum()) * E // ranks
        in_a_row = [(np.diff(np.flatnonzero(of_R)) == 1).all() for of_R in (silent_R, ~silent_R)]
        if not gone or not any(in_a_row):
            continue
        by_router = (math.comb(E - gone, dead - gone) / math.comb(E, dead) for dead in dead_L)
        likely = 2 * ranks * math.prod(by_router)
        if likely < likeliest:
            likeliest, silent = likely, silent_R
    return silent, likeliest


def ranks_are_missing(data: ReportData) -> bool:
    """Whether the trace lacks the counts of some ranks. What `trace` itself wrote of a token is
    complete."""
    may_lack_ranks = data.trace.imported or data.counts.counts_only
    return may_lack_ranks and missing_ranks(data) is not None


@check("fit")
def dropped(data: ReportData) -> Finding | None:
    """How many assignments the capacity of experts dropped, and where most; where the trace does
    not state that, how many slots are empty. Imported counts may lack a few assignments per domain,
    or document: their number of tokens is the smallest that fits."""
    counts = data.counts
    parts = len(counts.domains) if counts.documents_unknown else counts.documents
    parts *= counts.counts_only
    rows = [row for row in data.loaded if row["empty_slots"] >= max(1, row["top_k"] * parts)]
    if not rows:
        return None
    known = [row for row in rows if data.trace.drops or row["dropped"] > 0]
    slots = sum(row["tokens"] * row["top_k"] for row in data.loaded)
    all_empty, rows = sum(row["empty_slots"] for row in rows), known or rows
    empty = sum(_lost(row) for row in rows)
    worst = max(rows, key=_share_lost)
    most, share = _share_lost(worst), empty / slots
    at = f", most in {name_of(data, worst)}: {_percent(most)}" if len(data.loaded) > 1 else ""
    values = {"assignments": empty, "slots": slots, "share": share, "share_at_worst": most}
    if not known:
        said = (
            f"{empty:,} of {slots:,} slots are empty ({_percent(share)}{at}): dropped tokens, "
            "skipped experts or null experts, which the trace does not tell apart."
        )
        said += _unequal_sums(data) if counts.counts_only else ""
        return fnd.finding("empty_slots", "note", said, worst, **values)
    more = f" Another {all_empty - empty:,} slots are empty." if all_empty > empty else ""
    said = (
        f"{empty:,} of {slots:,} assignments were dropped by capacity ({_percent(share)}{at}): "
        f"{_before(data)}.{more}"
    )
    return fnd.found(
        "critical" if most >= MANY_DROPPED else "warning" if most >= DROPPED else "note",
        said,
        worst,
        **values,
    )


def _unequal_sums(data: ReportData) -> str:
    """Of counts: in which domains layers have unequal sums, and which layers in the worst of
    them."""
    counts, rows = data.counts, data.loaded
    sum_LD = np.stack([counts.assignments_DE(int(row["router"])).sum(1) for row in rows])
    k_L1 = np.array([[row["top_k"]] for row in rows])
    # of the tokens of the selected router that has the most
    lack_LD = k_L1 * np.ceil(sum_LD / k_L1).max(0).astype(int) - sum_LD
    unequal = np.flatnonzero((lack_LD >= k_L1).any(0)).tolist()
    if not unequal:
        return ""
    d = max(unequal, key=lambda d: lack_LD[:, d].max())
    fewest, most = int(lack_LD[:, d].argmax()), int(lack_LD[:, d].argmin())
    names = join_first([f'"{counts.domains[each]}"' for each in unequal])
    worst = f'; most in "{counts.domains[d]}", where' if len(unequal) > 1 else ":"
    less: list[int] = np.flatnonzero(lack_LD[:, d] > lack_LD[most, d]).tolist()
    lacking = sorted({int(rows[n]["layer"]) for n in less})
    ends = [f"{sum_LD[n, d]:,} ({name_of(data, rows[n])})" for n in (fewest, most)]
    return (
        f" Layers have unequal sums in {names}{worst} {' to '.join(ends)} assignments, fewer than "
        f"the most in layer{'s' if len(lacking) > 1 else ''} {ranges(lacking)}."
    )


def _lost(row: Row) -> int:
    """Assignments that a router is known to have dropped, else its empty slots."""
    return int(row["dropped"] if row["dropped"] > 0 else row["empty_slots"])


def _share_lost(row: Row) -> float:
    return _lost(row) / (row["tokens"] * row["top_k"])


def _before(data: ReportData) -> str:
    """What routers chose that dropped some of it."""
    known = [row for row in chosen(data) if row["dropped"] > 0]
    if not known:
        return (
            "every load here is what was left, which capacity evens out, and not what routers chose"
        )
    row = worst_of(row for row in known if fnd.uneven(data, row))
    if row is None:
        return "only the balance is judged before drops, other loads here are what was left"
    return (
        f"before drops expert {int(row['busiest_expert'])} of {name_of(data, row)} got "
        f"{row['max_over_mean']:.2f}x the mean load, {fnd.load_after(data, row)}"
    )


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "under 0.1%"


@check("sample")
def few_tokens(data: ReportData) -> Finding | None:
    """Whether chance alone reaches the threshold `uneven` with so few tokens."""
    counts, uneven = data.counts, data.thresholds.uneven
    floors = [(floor_of(counts, r), r) for r in counts.indices]
    floor, r = max((row for row in floors if not math.isnan(row[0])), default=(0.0, 0))
    if floor <= uneven or uneven <= 0:
        return None
    T, E = counts.tokens_of(r), counts.routers[r].experts
    said, enough = fnd.few_tokens(T, E, floor, uneven)
    values = {"tokens": T, "experts": E, "expected_by_chance": 1 + floor, "tokens_needed": enough}
    return note(said, {"layer": counts.routers[r].layer, "router": r}, **values)


@check("sample")
def few_documents_per_domain(data: ReportData) -> Finding | None:
    """Domains of too few documents to tell the domain from its texts."""
    counts = data.counts
    if counts.documents_unknown or len(counts.domains) < 2:
        return None
    documents_D = np.bincount(counts.domain_of_unit_U, minlength=len(counts.domains)).tolist()
    each = zip(counts.domains, documents_D, strict=True)
    few = {domain: n for domain, n in each if n < FEWEST_DOCUMENTS}
    if not few:
        return None
    names = join_first([f'"{domain}" ({n})' for domain, n in few.items()])
    said = (
        f"Domains of fewer than {FEWEST_DOCUMENTS} documents reflect single texts as much as the "
        f"domain: {names}."
    )
    return note(said, documents_needed=FEWEST_DOCUMENTS, domains=list(few))


@check("sample")
def repeated_rows(data: ReportData) -> Finding | None:
    """Runs of the same token id with the same experts, in the first shard of each rank (warm-up
    comes first) and at the last router (which depends most on the context). Of unknown token ids,
    rows that are the same may be a router that sends all tokens to the same experts."""
    if data.counts.counts_only:
        return None
    trace, router = data.trace, data.selection.routers[-1]
    rows = repeated = 0
    for shard in (shard for shard in trace.shards if not shard.files.index):
        seen = selected_tokens(shard, data.selection, trace.routers[router].stack)
        slots, known_T = seen.of(shard.slots(router), router), seen.token_id_T >= 0
        rows += len(seen.token_id_T)
        repeated += in_runs(np.column_stack([*slots, seen.token_id_T])[known_T])
    if not rows or repeated / rows < data.thresholds.repeated:
        return None
    said = (
        f"{repeated:,} of the first {rows:,} tokens are in runs of {RUN} or more identical rows "
        "(same token id, same experts): warm-up or padding rows count as load."
    )
    return warning(said, repeated=repeated, tokens=rows)


def in_runs(rows_TX: np.ndarray) -> int:
    """How many rows lie in runs of at least RUN identical ones."""
    lengths = np.diff(run_edges(rows_TX))
    return int(lengths[lengths >= RUN].sum())


@check("sample")
def sample(data: ReportData) -> Finding:
    """How much text all of it was judged on."""
    counts, manifest = data.counts, data.trace.manifest
    documents = f" of {plural(counts.documents, 'document')}" if counts.documents else ""
    domains = f" in {plural(len(counts.domains), 'domain')}" if len(counts.domains) > 1 else ""
    routers = len(data.selection.routers)
    weights = [printable(said) for said in (quantization(manifest), adapter(manifest)) if said]
    said = (
        f"Judged on {plural(counts.tokens, 'token')}{documents}{domains}, "
        f"{plural(routers, 'router')}{'; weights: ' if weights else ''}{', '.join(weights)}."
    )
    values = {"tokens": counts.tokens, "documents": counts.documents}
    values |= {"domains": len(counts.domains), "routers": routers}
    return note(said, None, **values)
