"""What the index holds of a trace: a row of its table, and what is searched.

R routers, E experts of a router.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.render.payload import without_numpy
from moe_inspect.reporting.report import Report
from moe_inspect.reporting.tables.data import worst_router
from moe_inspect.reporting.verdict.chance import uneven
from moe_inspect.reporting.verdict.specialization import untrained_seed
from moe_inspect.site.words import words_of
from moe_inspect.text import cut, layer_label, readable

CELLS = 20_000  # experts of a trace whose load is in the index
DOMAINS = 40  # of a trace, those with the most tokens
EXPERTS = 5  # of a domain, over all layers
LONGEST = 120  # characters of a name, a domain or a token

Entry = dict[str, Any]


def entry_of(made: Report) -> Entry:
    """row: the columns of the index's table. untrained: whether its weights are random. lacks: what
    is missing → why. layers: label and number of experts of each router. ratio: hundredths of the
    mean load of each expert, router after router. balance, bits: by router, for the chart. domains,
    words: what is searched. JSON can hold it."""
    trace, balance = made.trace, made.tables["balance"]
    spec: Any = made.tables["specialization"]
    domain_bits = spec["domain_mi_bits"] - spec["domain_mi_null_bits"]
    token_bits = spec["token_mi_bits"] - spec["token_mi_null_bits"]
    committee, words = made.tables["committee"], words_of(trace)
    worst, routers = worst_router(made), trace.routers
    row = {
        "model": _model(made),
        "architecture": _architecture(trace.manifest),
        "routers": len(routers),
        "experts": max(router.experts for router in routers),
        "top_k": max(router.top_k for router in routers),
        "tokens": made.counts.tokens,
        "domains": len(made.counts.domains),
        "max_over_mean": None if worst is None else worst["max_over_mean"],
        "uneven_routers": sum(uneven(made, one) for one in made.loaded),
        "dead_experts": sum(int(one["dead_experts"]) for one in made.loaded),
        "domain_bits": domain_bits.max(),
        "token_bits": token_bits.max(),
        "committee_experts": committee["committee_experts"].mean(),
        "committee_mass": committee["committee_mass"].mean(),
    }
    layers = [[layer_label(routers, r), one.experts] for r, one in enumerate(routers)]
    return {
        "row": {name: _plain(value) for name, value in row.items()},
        "untrained": untrained_seed(made) is not None,
        "lacks": _lacks(made, row, words),
        "layers": layers,
        "ratio": _ratios(made) if sum(E for _, E in layers) <= CELLS else None,
        "balance": _rounded(balance["max_over_mean"]),
        "bits": _rounded(domain_bits),
        "domains": _domains(made),
        "all_domains": len(made.counts.domains),
        "words": None if isinstance(words, str) else words,
    }


def _model(made: Report) -> str:
    model = made.trace.manifest.get("model", {})
    name = readable(cut(str(model.get("id") or model.get("class") or "unknown"), LONGEST))
    seed = untrained_seed(made)
    return name if seed is None else f"{name}, random weights (seed {seed})"


def _architecture(manifest: dict[str, Any]) -> str | None:
    model = manifest.get("model", {})
    config = model.get("config") or {}
    stated = config.get("architectures") or [model.get("class") or config.get("model_type")]
    return readable(cut(str(stated[0]), LONGEST)) if stated[0] else None


def _lacks(made: Report, row: dict[str, Any], words: Any) -> dict[str, str]:
    counts, lacks = made.counts, dict[str, str]()
    if row["max_over_mean"] is None:
        lacks["balance"] = "no router has load"
    if len(counts.domains) < 2:
        lacks["specialization by domain, committee"] = "the text has one domain"
    elif counts.counts_only:
        lacks["specialization by domain"] = "counts do not tell documents apart"
    elif row["domain_bits"] != row["domain_bits"]:
        lacks["specialization by domain"] = f"too few documents ({counts.documents})"
    if isinstance(words, str):
        lacks["specialization by token, search by token"] = words
    return lacks


def _ratios(made: Report) -> list[int | None]:
    table: Any = made.tables["load"]
    ratio = table["load_ratio"].to_numpy(float, na_value=np.nan)
    return [None if value != value else round(100 * value) for value in ratio.tolist()]


def _domains(made: Report) -> list[dict[str, Any]]:
    """name, tokens, and the experts that take more of its tokens than of other domains', the most
    telling first, by activation · log₂ lift: row, expert, activation in thousandths, lift in
    hundredths."""
    if len(made.counts.domains) < 2:
        return []
    table: Any = made.tables["domains"]
    score = table["activation"] * np.log2(table["lift"].clip(lower=1))
    table = table.assign(score=score).sort_values("score", ascending=False, kind="stable")
    # of a domain at the router that saw most of it: encoders and decoders differ
    tokens = table.groupby("domain")["tokens"].max().sort_values(ascending=False, kind="stable")
    found = list[dict[str, Any]]()
    for name in tokens.index[:DOMAINS]:
        most = table[(table["domain"] == name) & (table["score"] > 0)].head(EXPERTS)
        columns = (
            most["router"],
            most["expert"],
            (1000 * most["activation"]).round().astype(int),
            (100 * most["lift"]).round().astype(int),
        )
        shown = readable(cut(str(name), LONGEST))
        experts = [list(map(int, one)) for one in zip(*columns, strict=True)]
        found.append({"name": shown, "tokens": int(tokens[name]), "experts": experts})
    return found


def _rounded(values: pd.Series) -> list[float | None]:
    return [None if value != value else round(float(value), 3) for value in values]


def _plain(value: Any) -> Any:
    plain = without_numpy(value) if hasattr(value, "tolist") else value
    return None if plain != plain else plain


def saturation(a: Any, b: Any) -> float | str:
    """The mean over routers of the share of experts that trace `a` has as `b` does, for the same
    tokens (0 to 1), or why it cannot be told."""
    from moe_inspect.comparison.compare import compare_checkpoints

    try:
        made = compare_checkpoints([a, b])
        if made.comparisons[0].misaligned:
            return made.comparisons[0].misaligned[0].text
        table: Any = made.tables["saturation"]
    except MoeInspectError as error:
        return str(error)
    return float(table["overlap"].mean())
