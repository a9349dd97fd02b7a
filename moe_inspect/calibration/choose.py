"""Which texts give every expert its minimum of tokens: greedy set multicover, beside what no choice
can do (the dual of a linear program, which holds for all documents also where only candidates were
kept) and beside random texts of the same size.

S documents, P pairs of a router and an expert, D domains, R random choices.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.samples import every_document
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.reader import Trace

KEPT = 2**24  # counts of candidates that are kept in memory, 8 bytes each
MOST_AT_ONCE = 2**14  # documents whose worth is computed again together
SLACK = 0.02  # how much less than the best a document may add that is picked
RANDOM = 20  # random choices
PROGRAM, SECONDS = 1_024, 30.0  # documents and experts of the linear program, and its time
Matrix = Any  # of scipy.sparse, which has no types


@dataclass
class Pool:
    """Documents to choose from. document_S: their numbers; tokens_S, domain_S (into `domains`);
    load_SP: tokens of each expert, a sparse matrix of rows."""

    document_S: np.ndarray
    tokens_S: np.ndarray
    domain_S: np.ndarray
    load_SP: Matrix
    domains: list[str]

    @property
    def load_P(self) -> np.ndarray:
        """int64 [P]: tokens of each expert."""
        return np.asarray(self.load_SP.sum(0, dtype=np.int64)).ravel()

    def rows(self, of: np.ndarray) -> Pool:
        document_S, tokens_S, domain_S = self.document_S[of], self.tokens_S[of], self.domain_S[of]
        return Pool(document_S, tokens_S, domain_S, self.load_SP[of], self.domains)

    def row(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        at = slice(*self.load_SP.indptr[s : s + 2])
        return self.load_SP.indices[at], self.load_SP.data[at]


def parts_of(trace: Trace, selection: Selection, domains: list[str]) -> Iterator[Pool]:
    """The documents of a trace, shard by shard. A domain that is new is appended to `domains`."""
    from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

    code = {label: d for d, label in enumerate(domains)}
    for part in every_document(trace, selection):
        for label in part.domain_S:
            if label not in code:
                code[label] = len(domains)
                domains.append(label)
        domain_S = np.array([code[label] for label in part.domain_S], np.int64)
        load_SP = sparse.hstack([*map(sparse.csr_matrix, part.load_SE.values())], "csr")
        yield Pool(part.document_S, part.tokens_S, domain_S, load_SP, domains)


def joined(pools: list[Pool]) -> Pool:
    """The documents of all, each once."""
    from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

    number, row = np.unique(np.concatenate([p.document_S for p in pools]), return_inverse=True)
    together = sparse.csr_matrix((np.ones(len(row), np.int32), (row, np.arange(len(row)))))
    load_SP = together @ sparse.vstack([p.load_SP for p in pools], "csr")
    tokens_S = np.bincount(row, np.concatenate([p.tokens_S for p in pools])).astype(np.int64)
    domain_S = np.zeros(len(number), np.int64)
    domain_S[row] = np.concatenate([p.domain_S for p in pools])
    return Pool(number, tokens_S, domain_S, load_SP, pools[0].domains)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """minimum: tokens of each expert. budget: tokens of the texts together; None: the fewest
    documents that reach the minimum. keep_mixture: each domain keeps this part of its share of the
    tokens, at least."""

    minimum: int
    budget: int | None = None
    keep_mixture: float = 0.0


class Greedy:
    """Picks documents of a pool, one after the other: each adds most towards the minimum of all
    that are left, per document, or per token where the texts have a budget. What is left of a
    budget once all reach the minimum goes to twice the minimum, and so on. While a domain lacks
    tokens of its share (share_D), the next document is one of it. `order`: the rows picked."""

    def __init__(self, pool: Pool, wanted: Wanted, share_D: np.ndarray):
        self.pool, self.wanted, self.share_D = pool, wanted, share_D
        self.order, self.tokens, self.minimum = list[int](), 0, wanted.minimum
        self.load_P = pool.load_P
        self.had_P, self.has_D = np.zeros_like(self.load_P), np.zeros(len(share_D))
        self.left_S = np.ones(len(pool.tokens_S), bool)
        whole = np.ones(len(pool.tokens_S))
        self.cost_S = whole if wanted.budget is None else np.maximum(pool.tokens_S, 1)
        self._aim()

    def _aim(self) -> None:
        """Looks for documents that add towards the minimum. Of each domain a queue of (−worth when
        it was computed, row, how many were picked then)."""
        self.left_P = np.maximum(np.minimum(self.load_P, self.minimum) - self.had_P, 0)
        self.queues: list[list[tuple[float, int, int]]] = []
        for d in range(len(self.share_D)):
            rows = np.flatnonzero(self.left_S & (self.pool.domain_S == d))
            self.queues.append(self._valued(rows[self._fits(rows)]))
            heapq.heapify(self.queues[-1])

    def _fits(self, rows: np.ndarray) -> np.ndarray:
        """Whether the budget has room for each: what does not fit now will not later."""
        room = np.inf if self.wanted.budget is None else self.wanted.budget - self.tokens
        return self.pool.tokens_S[rows] <= room

    def _valued(self, rows: np.ndarray) -> list[tuple[float, int, int]]:
        """Entries of a queue, of what these rows are worth now."""
        load_XP = self.pool.load_SP[rows]
        adds = np.minimum(load_XP.data, self.left_P[load_XP.indices])
        sums = np.append(0, np.cumsum(adds))[load_XP.indptr]
        worth_X = np.diff(sums) / self.cost_S[rows]
        then = [len(self.order)] * len(rows)
        return list(zip((-worth_X).tolist(), rows.tolist(), then, strict=True))

    def _best(self, queues: list[list[tuple[float, int, int]]]) -> tuple[int, float] | None:
        """The row of these queues that is worth most, to within SLACK, and how much; None where
        none fits. What was computed before others were picked is an upper bound."""
        at_once = 1
        while queues := [queue for queue in queues if queue]:
            queue = min(queues, key=lambda queue: queue[0])
            value, s, then = queue[0]
            if then == len(self.order):
                heapq.heappop(queue)
                return s, -value
            old = list[int]()
            while queue and len(old) < at_once and queue[0][2] < len(self.order):
                old.append(heapq.heappop(queue)[1])
            rows = np.array(old, np.int64)
            entries = self._valued(rows[self._fits(rows)])
            best = min(entries, default=(1.0, -1, 0))
            near = best[0] <= (1 - SLACK) * value
            for entry in entries:
                if not near or entry is not best:
                    heapq.heappush(queue, entry)
            if near:
                return best[1], -best[0]
            at_once = min(2 * at_once, MOST_AT_ONCE)
        return None

    def _pick(self, s: int) -> None:
        experts, tokens = self.pool.row(s)
        self.had_P[experts] += tokens
        self.left_P[experts] = np.maximum(self.left_P[experts] - tokens, 0)
        self.has_D[self.pool.domain_S[s]] += self.pool.tokens_S[s]
        self.tokens += int(self.pool.tokens_S[s])
        self.left_S[s] = False
        self.order.append(s)

    def run(self) -> list[int]:
        """The rows, in the order in which they are picked."""
        while True:
            lacking_D = self.wanted.keep_mixture * self.share_D * self.tokens - self.has_D
            d = int(np.where([*map(bool, self.queues)], lacking_D, 0).argmax())
            lacks = lacking_D[d] > 0 and bool(self.queues[d])
            found = self._best([self.queues[d]] if lacks else self.queues)
            if found is not None and (found[1] > 0 or lacks):
                self._pick(found[0])
            elif found is not None and self.wanted.budget and self.minimum < self.load_P.max():
                self.minimum *= 2
                self._aim()
            elif not lacks:
                return self.order


def without_needless(pool: Pool, order: list[int], minimum: int) -> list[int]:
    """Without documents that the others make needless, those that were picked last first."""
    spare_P = pool.rows(np.array(order, np.int64)).load_P - np.minimum(pool.load_P, minimum)
    kept = list[int]()
    for s in reversed(order):
        experts, tokens = pool.row(s)
        if (spare_P[experts] >= tokens).all():
            spare_P[experts] -= tokens
        else:
            kept.append(s)
    return kept[::-1]


# --- what no choice can do


@dataclass(frozen=True)
class Prices:
    """A solution of the dual: what a token of each expert is worth, and what a document, a token
    and a token of each domain cost. Whatever the prices, they bound what any choice can do."""

    expert_P: np.ndarray
    document: float
    token: float
    domain_D: np.ndarray

    def profit(self, pool: Pool, wanted: Wanted, share_D: np.ndarray, part_S: np.ndarray) -> float:
        """What documents are worth beyond what they cost, summed over those that are worth more.
        part_S: the part of each document that this is."""
        worth_S = np.asarray(pool.load_SP @ self.expert_P).ravel()
        mixed = float(wanted.keep_mixture * share_D @ self.domain_D)
        cost_S = self.document * part_S + (self.token + mixed) * pool.tokens_S
        cost_S -= self.domain_D[pool.domain_S] * pool.tokens_S
        return float(np.maximum(worth_S - cost_S, 0).sum())

    def bound(self, wanted: Wanted, need_P: np.ndarray, profit: float) -> float:
        """At least so many documents; or, of a budget, at most so many tokens of those needed."""
        if wanted.budget is None:
            return float(need_P @ self.expert_P) - profit
        return float(need_P @ (1 - self.expert_P)) + self.token * wanted.budget + profit


def prices(
    pool: Pool, wanted: Wanted, share_D: np.ndarray, need_P: np.ndarray, picked: list[int]
) -> Prices | None:
    """Those of the linear program of at most PROGRAM documents, those picked among them, and the
    PROGRAM scarcest experts; None where HiGHS finds none in time."""
    from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]
    from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs]

    rows = np.array(picked, np.int64)
    rest = np.setdiff1d(np.arange(len(pool.tokens_S)), rows)
    more = np.random.default_rng(SEED).permutation(rest)[: max(PROGRAM - len(rows), 0)]
    some, scarce = pool.rows(np.r_[rows, more]), np.argsort(pool.load_P - need_P, kind="stable")
    scarce = np.sort(scarce[need_P[scarce] > 0][:PROGRAM])
    S, Q, D = len(some.tokens_S), len(scarce), len(share_D)
    of_QS = some.load_SP[:, scarce].T.astype(float)
    own_DS = sparse.csr_matrix((some.tokens_S.astype(float), (some.domain_S, np.arange(S))), (D, S))
    mixture_DS = wanted.keep_mixture * share_D[:, None] * some.tokens_S - own_DS.toarray()
    if wanted.budget is None:
        cost = np.ones(S)
        upper = sparse.vstack([-of_QS, sparse.csr_matrix(mixture_DS)], "csr")
        limit, ends = np.r_[-need_P[scarce].astype(float), np.zeros(D)], (0, 1)
    else:  # and how many of the tokens needed each expert gets
        cost = np.r_[np.zeros(S), -np.ones(Q)]
        spent_1S = sparse.csr_matrix(some.tokens_S[None].astype(float))
        upper = sparse.bmat(
            [[-of_QS, sparse.eye(Q)], [sparse.csr_matrix(mixture_DS), None], [spent_1S, None]],
            "csr",
        )
        limit = np.r_[np.zeros(Q + D), float(wanted.budget)]
        ends = [(0, 1)] * S + [(0, float(of)) for of in need_P[scarce]]
    options = {"time_limit": SECONDS}
    found: Any = linprog(cost, upper, limit, bounds=ends, method="highs", options=options)
    if found.status != 0:
        return None
    dual = np.maximum(-found.ineqlin.marginals, 0)
    expert_P = np.zeros(len(need_P))
    expert_P[scarce] = dual[:Q] if wanted.budget is None else np.minimum(dual[:Q], 1)
    domain_D = dual[Q : Q + D] if wanted.keep_mixture else np.zeros(D)
    token = 0.0 if wanted.budget is None else float(dual[-1])
    return Prices(expert_P, float(wanted.budget is None), token, domain_D)


# --- all of it


@dataclass(frozen=True)
class Choice:
    """wanted: what was asked for. documents: those chosen, in the order in which they were picked,
    with their tokens, domains and counts. load_P, tokens, documents_in_all: of all documents.
    random_RP: the counts of random choices of the same tokens, and their documents. bound: as
    `Prices.bound`; None where it is unknown."""

    wanted: Wanted
    chosen: Pool
    load_P: np.ndarray
    tokens: int
    documents_in_all: int
    random_RP: np.ndarray
    random_documents: float
    bound: float | None

    @property
    def need_P(self) -> np.ndarray:
        return np.minimum(self.load_P, self.wanted.minimum)

    def met(self, load_XP: np.ndarray) -> np.ndarray:
        """The share of the tokens needed that such counts have."""
        return np.minimum(load_XP, self.need_P).sum(-1) / max(self.need_P.sum(), 1)

    def coverage(self, load_XP: np.ndarray) -> np.ndarray:
        """The share of the experts that have the minimum."""
        return (load_XP >= self.wanted.minimum).mean(-1)


def choose(trace: Trace, selection: Selection, wanted: Wanted) -> Choice:
    """Two passes over the documents: one keeps candidates, as many as there is room for; one bounds
    what any choice among all can do, and counts random choices."""
    domains, held, load_P = list[str](), list[Pool](), np.zeros(0, np.int64)
    listed, whole = list[Pool](), True  # all, without their counts
    for part in parts_of(trace, selection, domains):
        load_P = part.load_P if not listed else load_P + part.load_P
        listed.append(replace(part, load_SP=part.load_SP[:, :0]))
        held.append(part)
        if sum(p.load_SP.nnz for p in held) > KEPT:
            held, whole = [_candidates(joined(held), wanted)], False
    if not listed:
        raise MoeInspectError(f"{trace.path} has no documents to choose from")
    every, pool = joined(listed), joined(held)
    tokens_D = np.bincount(every.domain_S, every.tokens_S, len(domains))
    share_D, need_P = tokens_D / tokens_D.sum(), np.minimum(load_P, wanted.minimum)
    if wanted.budget is not None and wanted.budget < every.tokens_S.min():
        raise MoeInspectError(
            f"no document of {trace.path} has as few as {wanted.budget:,} tokens: choose more"
        )
    order = Greedy(pool, wanted, share_D).run()
    if wanted.budget is None and not wanted.keep_mixture:
        order = without_needless(pool, order, wanted.minimum)
    chosen = pool.rows(np.array(order, np.int64))
    priced = prices(pool, wanted, share_D, need_P, order)
    drawn_RS = _drawn(every.tokens_S, int(chosen.tokens_S.sum()))
    random_RP, profit = np.zeros((RANDOM, len(load_P)), np.int64), 0.0
    again = [pool] if whole else parts_of(trace, selection, domains)
    for part in again:
        at_S = np.searchsorted(every.document_S, part.document_S)
        random_RP += np.asarray((drawn_RS[:, at_S] @ part.load_SP).todense(), np.int64)
        if priced is not None:
            part_S = part.tokens_S / np.maximum(every.tokens_S[at_S], 1)
            profit += priced.profit(part, wanted, share_D, part_S)
    return Choice(
        wanted,
        chosen,
        load_P,
        int(every.tokens_S.sum()),
        len(every.tokens_S),
        random_RP,
        float(drawn_RS.sum() / RANDOM),
        None if priced is None else priced.bound(wanted, need_P, profit),
    )


def _candidates(pool: Pool, wanted: Wanted) -> Pool:
    """Enough of them for twice the minimum, and twice the budget."""
    even_D, minimum = np.zeros(len(pool.domains)), 2 * wanted.minimum
    while True:
        order = Greedy(pool, Wanted(minimum=minimum), even_D).run()
        tokens = int(pool.tokens_S[order].sum())
        if tokens >= 2 * (wanted.budget or 0) or minimum > pool.load_P.max():
            return pool.rows(np.array(order, np.int64))
        minimum *= 2


def _drawn(tokens_S: np.ndarray, tokens: int) -> Matrix:
    """RANDOM random choices of documents, each of about so many tokens: a sparse matrix [R, S]."""
    from scipy import sparse  # pyright: ignore[reportMissingTypeStubs]

    rng, rows = np.random.default_rng([SEED, len(tokens_S)]), list[np.ndarray]()
    for _ in range(RANDOM):
        order = rng.permutation(len(tokens_S))
        sums = np.cumsum(tokens_S[order])
        n = int(np.searchsorted(sums, tokens))
        nearer = n < len(sums) and sums[n] - tokens <= tokens - (sums[n - 1] if n else 0)
        rows.append(order[: n + nearer])
    at = np.repeat(np.arange(RANDOM), [len(of) for of in rows])
    ones = np.ones(len(at), np.int64)
    return sparse.csr_matrix((ones, (at, np.concatenate(rows))), (RANDOM, len(tokens_S)))
