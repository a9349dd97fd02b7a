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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from moe_inspect.analysis.counting import kernels_numpy
from moe_inspect.analysis.counting.count_shard import SelectedTokens, kernels, selected_tokens
from moe_inspect.analysis.counting.engine import is_long
from moe_inspect.analysis.counting.select import Selection
from moe_inspect.analysis.metrics.paths import mixed
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard, codes

DOCUMENTS = 2_048
LOADS = 2**26  # of documents × experts of all routers, 4 bytes each
TOKENS = 2**17
CHOICES = 2**23  # of tokens × routers, 12 bytes each
SLOTS = 2**26  # of tokens × slots of all routers, 2 bytes each


# --- documents


@dataclass(frozen=True)
class DocumentLoads:
    """The documents of the sample, by number, with their domains. load_SE: assignments of each of
    them, by router, int32 [S, E]."""

    document_S: np.ndarray
    domain_S: np.ndarray
    domains: list[str]
    load_SE: dict[int, np.ndarray]


def document_loads(trace: Trace, selection: Selection, most: int = DOCUMENTS) -> DocumentLoads:
    """`most`: documents of the sample; fewer where the model has very many experts."""
    cells = sum(trace.routers[r].experts for r in selection.routers)
    document_S, domain_S, domains = _documents(trace, selection, min(most, LOADS // cells))
    load_SE = {
        r: np.zeros((len(document_S), trace.routers[r].experts), np.int32)
        for r in selection.routers
    }
    asked = selection, document_S, is_long(trace, selection)
    for parts in by_shard(trace, "counting documents", _loads_of, *asked):
        for rows, load_by_router in parts:
            for r, load_RE in load_by_router.items():
                load_SE[r][rows] += load_RE
    return DocumentLoads(document_S, domain_S, domains, load_SE)


def _loads_of(
    shard: Shard, selection: Selection, document_S: np.ndarray, fast: bool
) -> list[tuple[np.ndarray, dict[int, np.ndarray]]]:
    """By stack: which documents of the sample the shard has tokens of, and the load of each of
    them, by router, int32 [R, E]."""
    found = list[tuple[np.ndarray, dict[int, np.ndarray]]]()
    for seen, routers in _by_stack(shard, selection):
        row_T = np.searchsorted(document_S, seen.document_T)
        at_N = np.flatnonzero(row_T < len(document_S))
        at_N = at_N[document_S[row_T[at_N]] == seen.document_T[at_N]]
        rows, row_N = kernels_numpy.distinct(row_T[at_N])
        load_by_router = dict[int, np.ndarray]()
        for r in routers:
            slots = _of(at_N, seen.of(shard.slots(r), r))
            E = shard.trace.routers[r].experts
            load_by_router[r] = kernels(fast).load(row_N, slots, len(rows), E).astype(np.int32)
        found.append((rows, load_by_router))
    return found


def _documents(
    trace: Trace, selection: Selection, most: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The documents with the smallest hashes, no more than `most`, by number; of each which domain
    it is of; and the domains."""
    found, domain_of = np.zeros(0, np.int64), dict[int, str]()
    for new, labels in by_shard(trace, "reading documents", _documents_of, selection):
        domain_of |= dict(zip(new.tolist(), labels, strict=True))
        found = np.union1d(found, new)
        if len(found) > most:
            found = np.sort(found[np.argsort(mixed(found), kind="stable")[:most]])
        domain_of = {int(d): domain_of[int(d)] for d in found}
    domains = sorted(set(domain_of.values()))
    code = {domain: d for d, domain in enumerate(domains)}
    return found, np.array([code[domain_of[int(d)]] for d in found], np.int64), domains


def _documents_of(shard: Shard, selection: Selection) -> tuple[np.ndarray, list[str]]:
    """The documents of a shard, and the domain of each."""
    seen = selected_tokens(shard, selection)
    new, at = np.unique(seen.document_T, return_index=True)
    return new, [seen.domains[code] for code in seen.domain_T[at]]


# --- tokens


@dataclass(frozen=True)
class Routes:
    """The choices of the sample's tokens at the routers of one stack, in their order. first_LS: the
    first choice, uint16, E where it routed nowhere; None: unknown at a router. set_LS: a hash of
    the set of experts, uint64. document_S, domain_S: of each token."""

    routers: tuple[int, ...]
    first_LS: list[np.ndarray | None]
    set_LS: list[np.ndarray]
    document_S: np.ndarray
    domain_S: np.ndarray


def sampled_routes(trace: Trace, selection: Selection, most: int = TOKENS) -> list[Routes]:
    """Of each stack. `most`: tokens of the sample, about; fewer where the model has very many
    routers."""
    stack_of = {r: trace.routers[r].stack for r in selection.routers}
    share_of = _shares(trace, selection, min(most, CHOICES // len(stack_of)))
    first = {r: list[np.ndarray]() for r in stack_of}
    sets = {r: list[np.ndarray]() for r in stack_of}
    places = {stack: list[tuple[np.ndarray, np.ndarray]]() for stack in share_of}
    labels = dict[str, int]()
    for parts in by_shard(trace, "reading routes", _routes_of, selection, share_of):
        for stack, document_S, domain_S, domains, slots_of in parts:
            code = np.array([labels.setdefault(domain, len(labels)) for domain in domains])
            places[stack].append((document_S, code[domain_S]))
            for r, (first_S, set_S) in slots_of.items():
                first[r].append(first_S)
                sets[r].append(set_S)
    return [
        Routes(
            routers := tuple(r for r in stack_of if stack_of[r] == stack),
            [
                # gives back the parts of each router in turn
                np.concatenate(first.pop(r)) if trace.routers[r].first_choice_known else None
                for r in routers
            ],
            [np.concatenate(sets.pop(r)) for r in routers],
            *(np.concatenate(values) for values in zip(*found, strict=True)),
        )
        for stack, found in places.items()
        if found
    ]


def _routes_of(
    shard: Shard, selection: Selection, share_of: dict[str, float]
) -> list[tuple[str, np.ndarray, np.ndarray, list[str], dict[int, tuple[np.ndarray, np.ndarray]]]]:
    """By stack: document and domain of the sample's tokens in a shard, the domains, and by router
    the first choice and the hash of the set of each."""
    found = list[Any]()
    for seen, routers in _by_stack(shard, selection):
        stack = shard.trace.routers[routers[0]].stack
        at_N = np.flatnonzero(_drawn(shard.files.first_token + seen.number_T, share_of[stack]))
        slots_of = dict[int, tuple[np.ndarray, np.ndarray]]()
        for r in routers:
            slots = _of(at_N, seen.of(shard.slots(r), r))
            # of an expert; the last where a slot routed nowhere
            hash_E = mixed(np.arange(shard.trace.routers[r].experts + 1))
            set_N = np.sum([hash_E.take(slot_N) for slot_N in slots], axis=0)
            slots_of[r] = slots[0].astype(np.uint16), set_N
        found.append((stack, seen.document_T[at_N], seen.domain_T[at_N], seen.domains, slots_of))
    return found


@dataclass(frozen=True)
class TokenLosses:
    """The sample's tokens whose loss is known, of those that the routers of one stack see.
    loss_S, entropy_S: nats, float64. phase_S, domain_S: indices into `phases` and `domains`. slots:
    the experts of each token, by router: uint16 [S] each slot, E where it routed nowhere."""

    routers: tuple[int, ...]
    loss_S: np.ndarray
    entropy_S: np.ndarray
    token_id_S: np.ndarray
    document_S: np.ndarray
    domain_S: np.ndarray
    phase_S: np.ndarray
    domains: list[str]
    phases: list[str]
    slots: dict[int, tuple[np.ndarray, ...]]


def sampled_losses(trace: Trace, selection: Selection) -> list[TokenLosses]:
    """Of each stack, for a trace that has losses (`TraceHeader.has_loss`): about TOKENS tokens,
    fewer where the model has very many slots."""
    stack_of = {r: trace.routers[r].stack for r in selection.routers}
    slots_of_all = sum(trace.routers[r].top_k for r in selection.routers)
    share_of = _shares(trace, selection, min(TOKENS, SLOTS // slots_of_all))
    domains, phases = dict[str, int](), dict[str, int]()
    columns = {stack: [list[np.ndarray]() for _ in range(6)] for stack in share_of}
    slots = {r: list[kernels_numpy.Slots]() for r in stack_of}
    for parts in by_shard(trace, "reading losses", _losses_of, selection, share_of):
        for stack, of_tokens, labels, names, slots_of in parts:
            *others, domain_S, phase_S = of_tokens
            domain = np.array([domains.setdefault(label, len(domains)) for label in labels])
            phase = np.array([phases.setdefault(name, len(phases)) for name in names])
            of_tokens = *others, domain[domain_S], phase[phase_S]
            for column, values_S in zip(columns[stack], of_tokens, strict=True):
                column.append(values_S)
            for r, of in slots_of.items():
                slots[r].append(of)
    made: list[TokenLosses] = []
    for stack, parts in columns.items():
        routers = tuple(r for r in stack_of if stack_of[r] == stack)
        if not parts[0]:
            continue
        loss_S, entropy_S, *others = (np.concatenate(column) for column in parts)
        token_id_S, document_S, domain_S, phase_S = others
        of = {
            r: tuple(np.concatenate(column) for column in zip(*slots[r], strict=True))
            for r in routers
        }
        made.append(
            TokenLosses(
                routers,
                loss_S,
                entropy_S,
                token_id_S,
                document_S,
                domain_S,
                phase_S,
                list(domains),
                list(phases),
                of,
            )
        )
    return made


def _losses_of(
    shard: Shard, selection: Selection, share_of: dict[str, float]
) -> list[tuple[str, tuple[np.ndarray, ...], list[str], list[str], dict[int, kernels_numpy.Slots]]]:
    """By stack: loss, entropy, token id, document, domain and phase of the sample's tokens in a
    shard, the domains, the phases, and by router the experts of each."""
    found = list[Any]()
    for seen, routers in _by_stack(shard, selection):
        stack = shard.trace.routers[routers[0]].stack
        table = shard.tokens(["phase", "loss_nats", "entropy_nats"])
        loss_T, entropy_T = (
            cast("np.ndarray", table[name].to_numpy())[seen.number_T].astype(np.float64)
            for name in ("loss_nats", "entropy_nats")
        )
        phase_T, names = codes(table["phase"])
        drawn_T = _drawn(shard.files.first_token + seen.number_T, share_of[stack])
        at_N = np.flatnonzero(drawn_T & np.isfinite(loss_T))
        of_tokens = (
            loss_T,
            entropy_T,
            seen.token_id_T,
            seen.document_T,
            seen.domain_T,
            phase_T[seen.number_T],
        )
        slots_of = {
            r: tuple(slot_S.astype(np.uint16) for slot_S in _of(at_N, seen.of(shard.slots(r), r)))
            for r in routers
        }
        of_sample = tuple(values_T[at_N] for values_T in of_tokens)
        found.append((stack, of_sample, seen.domains, names, slots_of))
    return found


def _shares(trace: Trace, selection: Selection, most: int) -> dict[str, float]:
    """The share of its tokens that is drawn, by stack."""
    tokens = dict.fromkeys([trace.routers[r].stack for r in selection.routers], 0)
    if trace.n_tokens > most:
        for sizes in by_shard(trace, "reading tokens", _sizes, selection, list(tokens)):
            for stack, size in sizes.items():
                tokens[stack] += size
    return {stack: most / max(n, most) for stack, n in tokens.items()}


def _sizes(shard: Shard, selection: Selection, stacks: list[str]) -> dict[str, int]:
    return {stack: len(selected_tokens(shard, selection, stack).number_T) for stack in stacks}


def _drawn(token_T: np.ndarray, share: float) -> np.ndarray:
    return (mixed(token_T) >> np.uint64(11)) < np.uint64(share * 2**53)


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


def _of(at_N: np.ndarray, slots: kernels_numpy.Slots) -> kernels_numpy.Slots:
    whole = len(at_N) == len(slots[0])
    return slots if whole else tuple(slot_T.take(at_N) for slot_T in slots)
