"""Traces of pure chance, by regime: routing in which no claim of a report is true. And traces in
which one thing is planted.

The routers choose by logits + Gumbel noise: independent draws of k of E experts. What may differ is
how the text is cut into documents, domains and passes, and whether a document has a taste of its
own, which is chance as well: another sample of documents would have other tastes.

L routers, E experts, K slots, D domains, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_inspect.public import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.watch.alarms import Alarms, Window
from tests.support.synthetic import routers, write_counts, write_trace

TASTE = 0.5  # standard deviation of a document's own logits, in the clustered regimes


@dataclass(frozen=True)
class Regime:
    """How a trace of chance is drawn. `taste`: standard deviation of the logits that a document has
    of its own, at each router. `spread`: of the logarithm of the documents' lengths. `shorter`: how
    many times shorter the documents of the first domain are. `words`: size of the vocabulary;
    `own_words`: each document has its own. `groups`: experts come in so many groups, of which half
    are open to a token. `passes`: tokens per forward pass."""

    L: int = 4
    E: int = 8
    K: int = 2
    documents: int = 30
    domains: int = 3
    tokens: int = 6_000
    taste: float = 0.0
    spread: float = 0.2
    shorter: int = 1
    words: int = 100
    own_words: bool = False
    groups: int = 1
    passes: int = 500
    by_expert: bool = False
    counts: bool = False


_CLUSTERED = Regime(taste=TASTE)
REGIMES: dict[str, Regime] = {
    "iid 8/2": Regime(),
    "iid 64/8": Regime(E=64, K=8),
    "iid 256/8, 48 layers": Regime(L=48, E=256, K=8, tokens=3_000),
    "heavy-tailed lengths": Regime(spread=1.5, taste=0.1),
    "lengths by domain": Regime(documents=50, domains=2, tokens=51_000, shorter=50),
    "200 tokens": Regime(tokens=200, documents=10, domains=2),
    "500 tokens": Regime(tokens=500, documents=10, domains=2),
    "passes of 3": Regime(passes=3, tokens=3_000),
    "passes of 6": Regime(passes=6, tokens=3_000),
    "passes of 24": Regime(passes=24),
    "clustered 8/2": _CLUSTERED,
    "clustered 64/8": replace(_CLUSTERED, E=64, K=8),
    "clustered 256/8": replace(_CLUSTERED, E=256, K=8),
    "clustered 64/1": replace(_CLUSTERED, E=64, K=1),
    "6 documents": replace(_CLUSTERED, documents=6, domains=2, L=48, tokens=3_000),
    "two domains of five": replace(_CLUSTERED, documents=10, domains=2),
    "ids by document": replace(_CLUSTERED, own_words=True),
    "grouped top-k": Regime(E=64, K=8, groups=8),
    "expert choice": Regime(by_expert=True),
    "counts, iid 8/2": Regime(counts=True),
    "counts, clustered 8/2": replace(_CLUSTERED, counts=True),
    "counts, clustered 64/8": replace(_CLUSTERED, E=64, K=8, counts=True),
}


@dataclass(frozen=True)
class Planted:
    """What is not chance: expert 5 of router 1 has `times` the load, in all text or in domain 1
    alone."""

    times: float
    one_domain: bool = False


# pairs of traces that nothing tells apart: the same text, decided again with logits that are a
# little off, or with some decisions changed that are close no more than others, or drawn anew by
# the same preferences; and other documents, of which the loads are compared
CLEAN_PAIRS = ("rounding", "anywhere", "redrawn", "other documents")
ROUNDED, CHANGED = 0.003, 0.002  # deviation of logits; share of decisions
PAIRED = (
    *("iid 8/2", "iid 64/8", "clustered 8/2", "clustered 64/8", "clustered 64/1"),
    *("heavy-tailed lengths", "lengths by domain", "200 tokens", "500 tokens"),
    *("6 documents", "two domains of five"),
)


def drawn(root: Path, regime: Regime, seed: int, planted: Planted | None = None) -> Trace:
    """A trace of a regime, written to `root`."""
    rng = np.random.default_rng([seed, regime.E, regime.documents])
    length_U, domain_U = _texts(regime, rng)
    effect_DE = np.zeros((regime.domains, regime.E))
    if planted is not None:
        at = slice(1, 2) if planted.one_domain else slice(None)
        effect_DE[at, 5] = np.log(planted.times) * regime.E / (regime.E - regime.K)
    document_T = np.repeat(np.arange(len(length_U)), length_U)
    logits = [
        _preferred(regime, rng, (r == 1) * effect_DE[domain_U])[document_T]
        + rng.gumbel(size=(len(document_T), regime.E))
        for r in range(regime.L)
    ]
    ids = [_chosen(regime, of_TE) for of_TE in logits]
    return _written(root, regime, rng, length_U, domain_U, ids)


def drawn_pair(
    root: Path, regime: Regime, seed: int, how: str, with_logits: bool = True
) -> tuple[Trace, ...]:
    """A, B and another run of A (for --noise), as CLEAN_PAIRS says. Of other documents A and B:
    counts, of A decisions where it has no logits."""
    if how == "other documents":
        a, b = (replace(regime, counts=counts) for counts in (with_logits, True))
        return drawn(root / "a", a, seed), drawn(root / "b", b, seed + 10_000)
    rng = np.random.default_rng([seed, regime.E, regime.documents])
    length_U, domain_U = _texts(regime, rng)
    document_T = np.repeat(np.arange(len(length_U)), length_U)
    shape, nothing_UE = (len(document_T), regime.E), np.zeros((len(length_U), regime.E))
    preferred = [_preferred(regime, rng, nothing_UE)[document_T] for _ in range(regime.L)]
    logits = [of_TE + rng.gumbel(size=shape) for of_TE in preferred]
    ids = [_chosen(regime, of_TE) for of_TE in logits]

    def again(r: int) -> np.ndarray:
        if how == "redrawn":
            return _chosen(regime, preferred[r] + rng.gumbel(size=shape))
        if how == "rounding":
            return _chosen(regime, logits[r] + rng.normal(0, ROUNDED, shape))
        changed_TE = np.where(rng.random(shape[0])[:, None] < CHANGED, rng.gumbel(size=shape), 0)
        return np.where(changed_TE[:, :1], _chosen(regime, changed_TE), ids[r])

    runs = [ids, *([again(r) for r in range(regime.L)] for _ in range(2))]
    names, of_a = ("a", "b", "noise"), logits if with_logits else None
    return tuple(
        _written(root / name, regime, np.random.default_rng(seed), length_U, domain_U, of_run, of)
        for name, of_run, of in zip(names, runs, (of_a, None, None), strict=True)
    )


def _written(
    root: Path,
    regime: Regime,
    rng: np.random.Generator,
    length_U: np.ndarray,
    domain_U: np.ndarray,
    ids: list[np.ndarray],
    logits: list[np.ndarray] | None = None,
) -> Trace:
    document_T = np.repeat(np.arange(len(length_U)), length_U)
    names = [f"domain-{d}" for d in domain_U]
    if regime.counts:
        D, E = regime.domains, regime.E
        first_T1 = domain_U[document_T][:, None] * E
        loads = [np.bincount((first_T1 + of).ravel(), minlength=D * E).reshape(D, E) for of in ids]
        return write_counts(root, loads, regime.K, sorted(set(names)))
    word_T = np.minimum(rng.zipf(1.3, len(document_T)), regime.words) - 1
    if regime.own_words:
        word_T = word_T % 5 + 5 * document_T
    drawn = [] if regime.by_expert else [rng.dirichlet(np.ones(of.shape[1]), len(of)) for of in ids]
    return write_trace(
        root,
        ids,
        regime.E,
        document=document_T,
        domain_of_document=names,
        token_id=word_T,
        weights=[-np.sort(-of_TK, 1).astype(np.float32) for of_TK in drawn] or None,
        logits=None if logits is None else [of_TE.astype(np.float16) for of_TE in logits],
        words=int(word_T.max()) + 1,
        batch_tokens=regime.passes,
    )


def monitored(
    regime: Regime, seed: int, windows: int = 24, dead: int | None = None
) -> tuple[list[Router], list[Window]]:
    """A run of chance as the monitor of a training sees it: windows of 8 steps of 4 documents of 60
    tokens each. `dead`: the expert that router 1 never chooses."""
    rng = np.random.default_rng([seed, regime.E, windows])
    L, E, S = regime.L, regime.E, 8
    document_T = np.repeat(np.arange(windows * S * 4), 60)
    step_T, loads = document_T // 4, []
    for r in range(L):
        effect_UE = np.zeros((document_T[-1] + 1, E))
        if r == 1 and dead is not None:
            effect_UE[:, dead] = -np.inf
        preferred_TE = _preferred(regime, rng, effect_UE)[document_T]
        ids = _chosen(regime, preferred_TE + rng.gumbel(size=preferred_TE.shape))
        cell = np.repeat(step_T, regime.K) * E + ids.ravel()
        loads.append(np.bincount(cell, minlength=windows * S * E).reshape(windows, S, E))
    tokens_R, recent = np.full(L, S * 4 * 60), list(np.stack(loads, axis=1))
    return routers(L, E, regime.K), [
        Window(S * w + 1, S * w + S, list(of_RSE.sum(1)), tokens_R, {}, list(of_RSE))
        for w, of_RSE in enumerate(recent)
    ]


def _texts(regime: Regime, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The length and the domain of each document."""
    domain_U = np.arange(regime.documents) % regime.domains
    weight_U = np.exp(rng.normal(0, regime.spread, regime.documents))
    weight_U[domain_U == 0] /= regime.shorter
    return np.maximum(3, weight_U / weight_U.sum() * regime.tokens).astype(int), domain_U


def _preferred(regime: Regime, rng: np.random.Generator, effect_UE: np.ndarray) -> np.ndarray:
    """The logits of documents at a router, [U, E], without the noise of tokens."""
    return effect_UE + (rng.normal(0, regime.taste, effect_UE.shape) if regime.taste else 0)


def _chosen(regime: Regime, logits_TE: np.ndarray) -> np.ndarray:
    """The choices of a router, [T, K]."""
    (T, E), K = logits_TE.shape, regime.K
    if regime.by_expert:
        # each expert chooses its K · T / E tokens: every load is even, and a token has as many
        # experts as chose it; slots that nothing fills are null
        chosen_TE = np.zeros((T, E), bool)
        np.put_along_axis(chosen_TE, np.argsort(-logits_TE, 0)[: K * T // E], True, 0)
        ids = np.argsort(~chosen_TE, 1, kind="stable").astype(np.uint16)
        ids[np.arange(E) >= chosen_TE.sum(1)[:, None]] = np.iinfo(np.uint16).max
        return ids
    if regime.groups > 1:
        of_group_TGE = logits_TE.reshape(T, regime.groups, -1)
        best_TG = np.argsort(-of_group_TGE.max(2), 1)[:, : regime.groups // 2]
        open_TG = np.zeros((T, regime.groups), bool)
        np.put_along_axis(open_TG, best_TG, True, 1)
        logits_TE = np.where(open_TG[:, :, None], of_group_TGE, -np.inf).reshape(T, E)
    top_TK = np.argpartition(-logits_TE, K - 1, 1)[:, :K]
    order_TK = np.argsort(-np.take_along_axis(logits_TE, top_TK, 1), 1)
    return np.take_along_axis(top_TK, order_TK, 1).astype(np.uint16)


def with_effects(alarms: Alarms, effect_R: Mapping[int, float]) -> Alarms:
    """With known design effects of the documents on the load of each router."""
    alarms.effect = effect_R.__getitem__
    return alarms
