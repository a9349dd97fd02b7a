"""The data of the page's map, its chart of domains and its cards of experts (templates/map.js).

L routers, E experts of a router, D domains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_inspect.reporting.charts.domains import UNIFORM, lift_scale
from moe_inspect.reporting.charts.spec import load_scale
from moe_inspect.reporting.render.payload import numbers, scale_json
from moe_inspect.text import layer_label, readable

if TYPE_CHECKING:
    from moe_inspect.reporting.tables.data import ReportData

# most numbers of the load by domain, router and expert: the domains with the fewest tokens are left
# out
CELLS = 800_000
ENTRIES = 160_000  # most entries of each list that cards show, over all experts


def map_data(data: ReportData) -> tuple[dict[str, Any] | None, list[str]]:
    """The data, None for a trace without load; and a text for each thing left out of it.

    load: [domain][router][expert] assignments; tokens: [domain][router]. The lists of the experts
    (words, partners, nexts) are columns, one after another: the entries of expert e of row l of
    `layers` are those from start[first[l] + e] to before start[first[l] + e + 1]."""
    tables: Any = data.tables
    if not data.loaded:
        return None, []
    chosen, short, table = data.selection.routers, list[str](), tables["domains"]
    sizes = np.array([data.trace.routers[r].experts for r in chosen])
    first = np.r_[0, np.cumsum(sizes)]
    labels = sorted(
        data.counts.domains, key=lambda d: -int(table.loc[table["domain"] == d, "tokens"].max())
    )
    most = max(1, CELLS // int(first[-1]))
    if len(labels) > most:
        short.append(
            f"{len(labels) - most} of {len(labels)} domains, those with the fewest tokens, on "
            "the map"
        )
    kept = [d for d in data.counts.domains if d in set(labels[:most])]
    load, tokens = list[list[list[int]]](), list[list[int]]()
    for name in kept:
        rows = dict(iter(table[table["domain"] == name].groupby("router")))
        load.append([rows[r]["assignments"].tolist() for r in chosen])
        tokens.append([int(rows[r]["tokens"].iloc[0]) for r in chosen])
    of_router = dict(iter(tables["load"].groupby("router")))
    entries = int(np.clip(ENTRIES // int(first[-1]), 3, 20))
    position = {r: i for i, r in enumerate(chosen)}
    bits = tables["specialization"]["domain_mi_bits"]
    routers = (data.trace.routers[r] for r in chosen)
    drawn: dict[str, Any] = {
        "scale": scale_json(load_scale(routers, "× the mean load")),
        "lift_scale": scale_json(lift_scale(len(kept), "× the mean over domains")),
        "layers": [
            {
                "label": layer_label(data.trace.routers, r),
                "experts": int(E),
                "k": data.trace.routers[r].top_k,
            }
            for r, E in zip(chosen, sizes, strict=True)
        ],
        "first": first.tolist(),
        "domains": [readable(d) for d in kept],
        "uniform": UNIFORM,
        "all": [of_router[r]["assignments"].tolist() for r in chosen],
        "load": load if len(data.counts.domains) > 1 else [],
        "tokens": tokens,
        "choices": [
            numbers(of_router[r]["first_choice"].to_numpy(float, na_value=np.nan)) for r in chosen
        ],
        "weights": [
            numbers((of_router[r]["weight_sum"] / of_router[r]["assignments"]).to_numpy(float))
            for r in chosen
        ]
        if data.trace.has_weights
        else None,
        "telling": int(bits.argmax()) if bits.notna().any() else 0,
        "words": _words(data, first, position, entries),
        "partners": None,
        "nexts": None,
    }
    if not (data.counts.counts_only or data.without_pairs):
        pairs: Any = tables["coactivation"]
        drawn["partners"] = _pairs(pairs, "other", first, position, entries)
        links: Any = tables["transitions"]
        drawn["nexts"] = _pairs(links, "next_expert", first, position, entries)
        next_of = links.drop_duplicates("router").set_index("router")["next_router"]
        drawn["next"] = [position.get(next_of.get(r)) for r in chosen]
    return drawn, short


def _words(
    data: ReportData, first: np.ndarray, position: dict[int, int], entries: int
) -> dict[str, Any] | None:
    if data.counts.counts_only or not data.top:
        return None
    table: Any = data.tables["vocabulary"]
    table, start = _by_expert(table, first, position, entries)
    id_of_row: np.ndarray = table["token_id"].to_numpy()
    codes, ids = pd.factorize(id_of_row)
    text_of = table.drop_duplicates("token_id").set_index("token_id")["token"]
    return {
        "start": start,
        "texts": [
            f"id {i}" if text_of[i] is None or text_of[i] != text_of[i] else readable(text_of[i])
            for i in ids
        ],
        "text": codes.tolist(),
        "count": table["count"].tolist(),
        "share": _thousandths(table["fraction"]),
        "choice": _thousandths(table["first_choice_fraction"]),
    }


def _pairs(
    table: Any, other: str, first: np.ndarray, position: dict[int, int], entries: int
) -> dict[str, Any]:
    """The supported partners above chance, in the order of the table, which is that of the
    evidence."""
    table, start = _by_expert(
        table[table["supported"] & (table["lift"] > 1)], first, position, entries
    )
    return {
        "start": start,
        "other": table[other].tolist(),
        "share": _thousandths(table["probability"]),
        "lift": numbers(table["lift"].round(2)),
    }


def _by_expert(
    table: Any, first: np.ndarray, position: dict[int, int], entries: int
) -> tuple[Any, list[int]]:
    """The first `entries` rows of each expert, in the order of experts, and where each begins."""
    table = table[table.groupby(["router", "expert"], sort=False).cumcount() < entries]
    flat = first[table["router"].map(position).to_numpy(int)] + table["expert"].to_numpy(int)
    order = np.argsort(flat, kind="stable")
    experts = np.arange(int(first[-1]) + 1)
    return table.iloc[order], np.searchsorted(flat[order], experts).tolist()


def _thousandths(values: Any) -> list[int | None]:
    share = values.to_numpy(float)
    known, whole = ~np.isnan(share), np.empty(len(share), object)
    whole[known] = np.rint(share[known] * 1000).astype(int).tolist()
    return whole.tolist()
