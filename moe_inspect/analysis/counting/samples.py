"""What is too large to count of a whole trace, of a random sample of it: the load of single
documents, the routes of single tokens, and their losses. One pass over the tokens says what is in
the sample, one over the decisions what it did; the sample is the same however the trace is cut into
shards.

L routers, E experts, K slots, T tokens of a shard, N of them in the sample, S documents or tokens
of the sample.
"""

# pyarrow has no types
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from moe_inspect.analysis.counting.count_shard import kernels
from moe_inspect.analysis.counting.engine import is_long
from moe_inspect.analysis.counting.kernels_numpy import Slots, distinct
from moe_inspect.analysis.counting.select import SelectedTokens, Selection, selected_tokens
from moe_inspect.analysis.metrics.paths import mixed
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

DOCUMENTS = 2_048
LOADS = 2**26  # of documents × experts of all routers, 4 bytes each
TOKENS = 2**17
CHOICES = 2**23  # of tokens × routers, 12 bytes each


Columns = dict[str, np.ndarray]
Labels = dict[str, list[str]]

# --- documents


@dataclass(frozen=True)
class DocumentLoads:
    """The documents of the sample, by number, with their domains. load_SE: assignments of each of
    them, by router, int32 [S, E]."""

    document_S: np.ndarray
    domain_S: np.ndarray
    domains: list[str]
    load_SE: dict[int, np.ndarray]


def document_loads(trace: Trace, selection: Selection) -> DocumentLoads:
    """Of at most DOCUMENTS documents, fewer where the model has very many experts."""
    cells = sum(trace.routers[r].experts for r in selection.routers)
    document_S, domain_S, domains = _documents(trace, selection, min(DOCUMENTS, LOADS // cells))
    asked = selection, document_S, is_long(trace, selection)
    parts = by_shard(trace, "counting documents", _loads_of, *asked)
    load_SE = _added(trace, selection, len(document_S), chain.from_iterable(parts))
    return DocumentLoads(document_S, domain_S, domains, load_SE)


Part = tuple[np.ndarray, dict[int, np.ndarray]]  # rows of documents, and their loads by router


def _added(
    trace: Trace, selection: Selection, S: int, parts: Iterable[Part]
) -> dict[int, np.ndarray]:
    """load_SE of S documents, by router."""
    load_SE = {r: np.zeros((S, trace.routers[r].experts), np.int32) for r in selection.routers}
    for rows, load_by_router in parts:
        for r, load_RE in load_by_router.items():
            load_SE[r][rows] += load_RE
    return load_SE


def _loads_of(shard: Shard, selection: Selection, document_S: np.ndarray, fast: bool) -> list[Part]:
    """By stack: which documents of the sample the shard has tokens of, and the load of each of
    them, by router, int32 [R, E]."""
    found = list[Part]()
    if shard.trace.counts_only:
        return [_loads_counted(shard, selection, document_S)]
    for seen, routers in _by_stack(shard, selection):
        at_N, rows, row_N = _sampled_rows(document_S, seen.document_T)
        load_by_router = dict[int, np.ndarray]()
        for r in routers:
            slots = _of(at_N, seen.of(shard.slots(r), r))
            E = shard.trace.routers[r].experts
            load_by_router[r] = kernels(fast).load(row_N, slots, len(rows), E).astype(np.int32)
        found.append((rows, load_by_router))
    return found


def _loads_counted(shard: Shard, selection: Selection, document_S: np.ndarray) -> Part:
    table = shard.counts()
    at_N, rows, row_N = _sampled_rows(document_S, table["document"].to_numpy())
    names = "router", "expert", "assignments"
    router_N, expert_N, assignments_N = (table[name].to_numpy()[at_N] for name in names)
    load_by_router = dict[int, np.ndarray]()
    for r in selection.routers:
        of, load_RE = router_N == r, np.zeros((len(rows), shard.trace.routers[r].experts), np.int32)
        load_RE[row_N[of], expert_N[of]] = assignments_N[of]
        load_by_router[r] = load_RE
    return rows, load_by_router


def _sampled_rows(
    document_S: np.ndarray, document_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of these are of the sample, which documents of the sample they are of, and of each
    which of these."""
    row_T = np.searchsorted(document_S, document_T)
    at_N = np.flatnonzero(row_T < len(document_S))
    at_N = at_N[document_S[row_T[at_N]] == document_T[at_N]]
    return at_N, *distinct(row_T[at_N])


def _documents(
    trace: Trace, selection: Selection, most: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The documents with the smallest hashes, no more than `most`, by number; of each which domain
    it is of; and the domains."""
    found, domain_of = np.zeros(0, np.int64), dict[int, str]()
    for new in by_shard(trace, "reading documents", _documents_of, selection):
        domain_of |= new
        found = np.array(list(domain_of), np.int64)
        found = np.sort(found[np.argsort(mixed(found), kind="stable")[:most]])
        domain_of = {int(d): domain_of[int(d)] for d in found}
    domains = sorted(set(domain_of.values()))
    code = {domain: d for d, domain in enumerate(domains)}
    return found, np.array([code[domain] for domain in domain_of.values()], np.int64), domains


def _documents_of(shard: Shard, selection: Selection) -> dict[int, str]:
    """The documents of a shard, and the domain of each."""
    if shard.trace.counts_only:
        listed = shard.table("documents", ["document", "domain"]).to_pylist()
        domain_of = {row["document"]: row["domain"] for row in listed}
        return {d: x for d, x in domain_of.items() if x in (selection.domains or {x})}
    seen = selected_tokens(shard, selection)
    new, at = np.unique(seen.document_T, return_index=True)
    labels = [seen.domains[code] for code in seen.domain_T[at]]
    return dict(zip(new.tolist(), labels, strict=True))


# --- tokens


@dataclass(frozen=True)
class SampledRoutes:
    """The choices of the sample's tokens at the routers of one stack, in their order. first_LS: the
    first choice, uint16, E where it routed nowhere; None: unknown at a router. set_LS: a hash of
    the set of experts, uint64. document_S, domain_S: of each token."""

    routers: tuple[int, ...]
    first_LS: list[np.ndarray | None]
    set_LS: list[np.ndarray]
    document_S: np.ndarray
    domain_S: np.ndarray


def sampled_routes(trace: Trace, selection: Selection) -> list[SampledRoutes]:
    """Of each stack: about TOKENS tokens, fewer where the model has very many routers."""
    most = min(TOKENS, CHOICES // len(selection.routers))
    routes = list[SampledRoutes]()
    for found in _sampled(trace, selection, most):
        read = found.of_router
        known = {r for r in read if trace.routers[r].first_choice_known}
        first_LS = [first_S if r in known else None for r, (first_S, _) in read.items()]
        set_LS = [set_S for _, set_S in read.values()]
        routes.append(SampledRoutes(tuple(read), first_LS, set_LS, **found.columns))
    return routes


@dataclass(frozen=True)
class Sample:
    """Tokens of the sample that the routers of a stack see. `columns`: arrays [S] by name; those in
    `labels` are indices into these. of_router: the experts of each slot, or the first choice and a
    hash of the set."""

    stack: str
    columns: Columns
    labels: Labels
    of_router: dict[int, Slots]


def _sampled(trace: Trace, selection: Selection, most: int) -> list[Sample]:
    """About `most` tokens of each stack."""
    tokens = dict.fromkeys([trace.routers[r].stack for r in selection.routers], 0)
    if trace.n_tokens > most:
        for sizes in by_shard(trace, "reading tokens", _sizes, selection, list(tokens)):
            for stack, size in sizes.items():
                tokens[stack] += size
    share_of = {stack: most / max(n, most) for stack, n in tokens.items()}
    found: dict[str, list[Sample]] = {stack: [] for stack in share_of}
    labels = dict[str, dict[str, int]]()
    asked = selection, share_of
    for part in chain.from_iterable(by_shard(trace, "reading routes", _samples_of, *asked)):
        for column, mine in part.labels.items():
            known = labels.setdefault(column, {})
            code = np.array([known.setdefault(label, len(known)) for label in mine])
            part.columns[column] = code[part.columns[column]]
        found[part.stack].append(part)
    listed = {column: list(known) for column, known in labels.items()}
    return [_joined(stack, parts, listed) for stack, parts in found.items() if parts]


def _joined(stack: str, parts: list[Sample], labels: Labels) -> Sample:
    """The sample of the whole. Gives back the parts of each router in turn."""
    columns = {name: np.concatenate([p.columns[name] for p in parts]) for name in parts[0].columns}
    of_router = {
        r: tuple(map(np.concatenate, zip(*(p.of_router.pop(r) for p in parts), strict=True)))
        for r in [*parts[0].of_router]
    }
    return Sample(stack, columns, labels, of_router)


def _samples_of(shard: Shard, selection: Selection, share_of: dict[str, float]) -> list[Sample]:
    """Of a shard, by stack."""
    found = list[Sample]()
    for seen, routers in _by_stack(shard, selection):
        hash_T = mixed(shard.files.first_token + seen.number_T)
        drawn_T = (hash_T >> np.uint64(11)) < np.uint64(share_of[seen.stack] * 2**53)
        columns = {"document_S": seen.document_T, "domain_S": seen.domain_T}
        labels = {"domain_S": seen.domains}
        at_N, of_router = np.flatnonzero(drawn_T), dict[int, Slots]()
        for r in routers:
            slots = _of(at_N, seen.of(shard.slots(r), r))
            hash_E = mixed(np.arange(shard.trace.routers[r].experts + 1))  # the last is nowhere
            set_S = np.sum([hash_E.take(ids) for ids in slots], axis=0)
            of_router[r] = slots[0].astype(np.uint16), set_S
        columns = {name: values_T[at_N] for name, values_T in columns.items()}
        found.append(Sample(seen.stack, columns, labels, of_router))
    return found


def _sizes(shard: Shard, selection: Selection, stacks: list[str]) -> dict[str, int]:
    return {stack: len(selected_tokens(shard, selection, stack).number_T) for stack in stacks}


# --- both


def _by_stack(shard: Shard, selection: Selection) -> Iterator[tuple[SelectedTokens, list[int]]]:
    """The tokens selected of a shard and the routers that see them; once per stack that has any."""
    stacks = dict[str, list[int]]()
    for r in selection.routers:
        stacks.setdefault(shard.trace.routers[r].stack, []).append(r)
    for stack, routers in stacks.items():
        seen = selected_tokens(shard, selection, stack)
        if len(seen.number_T):
            yield seen, routers


def _of(at_N: np.ndarray, slots: Slots) -> Slots:
    whole = len(at_N) == len(slots[0])
    return slots if whole else tuple(slot_T.take(at_N) for slot_T in slots)
