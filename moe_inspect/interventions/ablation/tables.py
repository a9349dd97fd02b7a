"""The tables of an ablation.

U documents, A (router, expert) pairs, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moe_inspect.analysis.metrics.uncertainty import resample_weights
from moe_inspect.capture.corpus.plan import TokenSequence
from moe_inspect.interventions.ablation.store import WHOLE, Store
from moe_inspect.interventions.among import how_dropped
from moe_inspect.model.routers import Site


def tables(
    batches: Mapping[int, Sequence[TokenSequence]],
    sites: Sequence[Site],
    asked: Sequence[tuple[int, int]],
    store: Store,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row per expert, and a row per expert and domain: `tokens` predicted, `loss` of the whole
    model and `loss_without` the expert (nats per token), their `difference`, and the 95 % interval
    of it over documents (NaN where they are too few)."""
    rows = [(b, i, row) for b, of in batches.items() for i, row in enumerate(of)]
    names = sorted({row.domain for _, _, row in rows})
    number = {d: u for u, d in enumerate(sorted({row.document for _, _, row in rows}))}
    tokens_U, domain_U = np.zeros(len(number)), np.zeros(len(number), np.int64)
    nats_UA = np.zeros((len(number), len(asked) + 1))
    for b, i, row in rows:
        u = number[row.document]
        tokens_U[u] += len(row.ids) - 1
        domain_U[u] = names.index(row.domain)
        nats_UA[u] += [store.get(b, r, e)[i] for r, e in (WHOLE, *asked)]
    routers = pd.DataFrame(
        [
            {"layer": sites[r].layer, "router": r, "expert": e, "how": how_dropped(sites[r])}
            for r, e in asked
        ]
    )

    def judged(of: np.ndarray) -> pd.DataFrame:
        found = _judged(tokens_U[of], nats_UA[of], domain_U[of])
        return pd.concat([routers, found], axis=1)

    everything = np.ones(len(number), bool)
    by_domain = [
        judged(domain_U == d).assign(domain=name)
        for d, name in enumerate(names)
        if (tokens_U[domain_U == d] > 0).any()
    ]
    domains = pd.concat(by_domain, ignore_index=True)
    first = ["layer", "router", "expert", "domain"]
    domains = domains[[*first, *(c for c in domains if c not in first)]]
    domains = domains.sort_values(first[1:], ignore_index=True)
    return judged(everything), domains


def _judged(tokens_U: np.ndarray, nats_UA: np.ndarray, strata_U: np.ndarray) -> pd.DataFrame:
    T = tokens_U.sum()
    loss_A = nats_UA.sum(0) / T
    change_UA = nats_UA[:, 1:] - nats_UA[:, :1]
    low_A = high_A = np.full(change_UA.shape[1], np.nan)
    strata_U = np.unique(strata_U, return_inverse=True)[1]
    if (weights_RU := resample_weights(strata_U)) is not None:
        change_RA = weights_RU @ change_UA / (weights_RU @ tokens_U)[:, None]
        low_A, high_A = np.quantile(change_RA, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "documents": len(tokens_U),
            "tokens": int(T),
            "loss": loss_A[0],
            "loss_without": loss_A[1:],
            "difference": loss_A[1:] - loss_A[0],
            "difference_low": low_A,
            "difference_high": high_A,
        }
    )
