"""Worlds for the sentences of test_kinds.py: traces, or comparisons of them, in which it is known
what is true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import moe_inspect
from tests import test_dropped
from tests.support.chance import REGIMES, drawn_pair
from tests.support.damage import edit_manifest
from tests.support.misrecorded import FAULTS, Recording, rounded, routed_text
from tests.support.planted import DOMAINS, planted, uniform
from tests.support.synthetic import uniform_ids, write_counts, write_trace
from tests.test_compare_findings import (
    DOCUMENTS,
    avoiding,
    changed,
    collapsing,
    of_documents,
    random,
    routes,
    said,
)
from tests.test_compare_loads import history, loads

T, E, K = 6_000, 8, 2
LEK = 4, 16, 4  # of texts that are misrecorded


def woven(root: Path, documents: int = 60, rise: float = 3) -> Any:
    """Router 0: experts 4 and 5 lead in every domain, expert 6 is starved. Router 1: every pass has
    an expert of its own. Router 2: expert 3 rises through the trace. Router 3 chooses as 2 did."""
    rng, at_T = np.random.default_rng(0), np.arange(T)
    logits = rng.gumbel(size=(4, T, E))
    logits[0] += [0, 0, 0, 0, 1, 1.1, -4, 0]
    logits[1, at_T, at_T // 250 % E] += 2
    logits[2, :, 3] += rise * (at_T / T - 0.5)
    logits[3] = logits[2] + rng.gumbel(size=(T, E)) / 4
    ids = [np.argsort(-of_TE, 1)[:, :K].astype(np.uint16) for of_TE in logits]
    of = {"document": at_T * documents // T, "domain_of_document": DOMAINS}
    return write_trace(root, ids, E, batch_tokens=250, **of)


def opposed(root: Path, tokens: int = T) -> Any:
    """The busiest expert of router 0 is the least used one of the others: the average is even."""
    logits = np.random.default_rng(0).gumbel(size=(4, tokens, E))
    logits[0, :, 0] += 1
    logits[1:, :, 0] -= 0.3
    ids = [np.argsort(-of_TE, 1)[:, :K].astype(np.uint16) for of_TE in logits]
    return write_trace(root, ids, E, document=np.arange(tokens) // 100)


def counts(root: Path, *loads: list[list[int]], times: int = 1) -> Any:
    return write_counts(root, [times * np.array(of) for of in loads], K, [*"abc"][: len(loads[0])])


def zeros(root: Path, k: int, L: int, filled: bool = True, tokens: int = 3_000) -> Any:
    """k of 8 experts at L routers; a hundredth of the tokens of B have expert 0 everywhere, or B is
    routed anew."""
    rng = np.random.default_rng(4)
    a, b = ([uniform_ids(rng, tokens, E, k) for _ in range(L)] for _ in range(2))
    if filled:
        b, at_T = [x.copy() for x in a], rng.random(tokens) < 0.01
        for of_TK in b:
            of_TK[at_T] = 0
    alike: dict[str, Any] = {"document": np.arange(tokens) // 50, "token_id": np.arange(tokens)}
    return [write_trace(root / x, ids, E, **alike) for x, ids in (("a", a), ("b", b))]


def pair(root: Path, a: Recording, b: Recording) -> Any:
    return moe_inspect.compare(a.written(root / "a"), b.written(root / "b"))


def misrecorded(
    root: Path, fault: str, tokens: int = 600, shape: tuple[int, int, int] = LEK
) -> Any:
    """The first tokens of a text, and a second run of it with that fault; L, E, k."""
    a = routed_text(0, 600, *shape).take(np.arange(600) < tokens)
    return pair(root, a, FAULTS[fault].b(rounded(a, 0.005), np.random.default_rng(0)))


def of_documents_alone(root: Path) -> Any:
    """In each of three documents every router has an expert of its own, A's and B's by chance."""
    T, document = 300, np.arange(300) // 100
    ids = np.random.default_rng(0).random((4, 3, E)).argsort(2)[:, document, :1]
    position, token_id = np.arange(T) % 100, np.arange(T)
    a = Recording(E, document, position, token_id, ids[:2], None, range(2), ())
    return pair(root, a, a.routed(ids[2:]))


def first(tokens: int) -> np.ndarray:
    return np.arange(len(routes()[0])) < tokens


def collapsed_alike(root: Path) -> Any:
    """Router 1 sends every token to the same experts, in both."""
    a = routed_text(0, 600, *LEK)
    a.ids_LTK[1] = np.arange(4)
    return pair(root, a, rounded(a, 0.005).take(a.document < a.document[-1]))


def nothing_in_common(root: Path, E: int) -> Any:
    """Another model, of so many experts."""
    a, other = routed_text(0, 600, *LEK), routed_text(9, 600, 4, E, 4)
    return pair(root, a, replace(a, ids_LTK=other.ids_LTK, E=E))


def histories(root: Path, steps: int, moved: Sequence[int] = ()) -> Any:
    """Two runs, committed every 5 steps; in these, experts of the second are not by chance."""
    a, b = loads(0, steps), loads(1, steps, moved)
    return [history(root / name, of, 5) for name, of in (("a", a), ("b", b))]


def lacking(root: Path) -> Any:
    """Router 1 has no load, and the trace is not complete. Token ids are unknown, and router 0
    sends all of them to expert 0."""
    ids = [np.full((500, 1), of, np.uint16) for of in (0, NOWHERE)]
    return write_trace(root, ids, E, token_id=np.full(500, -1), status="interrupted")


def padded(root: Path, rows: int) -> Any:
    """So many rows of one token come first."""
    ids = uniform_ids(np.random.default_rng(0), 600, E, K)
    ids[:rows] = ids[0]
    return write_trace(root, [ids], E, token_id=np.maximum(np.arange(600) - rows + 1, 0))


def tied(root: Path, levels: float) -> Any:
    """Logits in steps of 1 / levels."""
    logits = np.random.default_rng(0).gumbel(size=(T, E))
    logits = (np.round(logits * levels) / levels).astype(np.float16)
    ids = np.argsort(-logits, 1, kind="stable")[:, :K].astype(np.uint16)
    return write_trace(root, [ids], E, logits=[logits])


def recorded_otherwise(root: Path) -> Any:
    """Without token ids, in another dtype, and without the last layer."""
    unknown, other = np.full(len(routes()[0]), -1), changed(routes(), random(0.01, 1))
    bfloat16 = {"capture": {"weights": False, "mode": "tap", "dtype": "bfloat16"}}
    return [
        write_trace(root / "a", routes(), E, token_id=unknown),
        write_trace(root / "b", other[:2], E, token_id=unknown, manifest=bfloat16),
    ]


def interrupted(root: Path) -> Any:
    """Two traces of counts, the second not complete."""
    traces = two_counts(root, EVEN_LOAD, 100)
    edit_manifest(root / "b", status="interrupted")
    return traces[0], moe_inspect.open_trace(root / "b")


def trained(root: Path, dead_steps: int) -> moe_inspect.Trace:
    """The history of 60 steps; in the last of them expert 5 of the last layer gets no token."""
    load = loads(1, 60) * 10
    load[60 - dead_steps :, -1, 5] = 0
    return history(root, load, 1)


NOWHERE = np.iinfo(np.uint16).max
EVEN_LOAD, STARVED = [100] * 8, [1, *[114] * 7]
STEEP, DEAD = [450, *[78] * 7], [100] * 4 + [0] * 4
IN_ONE_DOMAIN = random(0.02, 3) | of_documents(*range(1, DOCUMENTS, 3)) & random(0.3, 4)
# a world: a trace, or two that are compared, or the findings on them
WORLDS: dict[str, Callable[[Path], Any]] = {
    "planted": planted,
    "planted, 5 documents": lambda root: planted(root, document=np.arange(T) * 5 // T),
    "planted, 20 tokens": lambda root: planted_short(root, 20),
    "even": uniform,
    "woven": woven,
    "woven, 5 documents": lambda root: woven(root, 5),
    "woven, hardly rising": lambda root: woven(root, rise=0.2),
    "opposed": opposed,
    "opposed, few tokens": lambda root: opposed(root, 300),
    "deserted": lambda root: counts(root, [STARVED, EVEN_LOAD], times=100),
    "deserted, few tokens": lambda root: counts(root, [STARVED, EVEN_LOAD]),
    "even counts": lambda root: counts(root, *[[EVEN_LOAD, EVEN_LOAD]] * 4, times=100),
    "half the ranks": lambda root: counts(root, *[[DEAD]] * 4),
    "half the ranks, one router": lambda root: counts(root, [DEAD]),
    # two traces
    "5% changed": lambda root: said(root, routes(), changed(routes(), random(0.05, 1))),
    "1% changed": lambda root: said(root, routes(), changed(routes(), random(0.01, 1))),
    "in two documents": lambda root: said(root, routes(), changed(routes(), of_documents(7, 8))),
    "noise": lambda root: noisy(root, 0.06),
    "as noise": lambda root: noisy(root, 0.02),
    "noise, 5 documents": lambda root: noisy(root, 0.06, 5),
    "collapsed": lambda root: said(root, routes(), collapsing()),
    "collapsed, 5 documents": lambda root: said(root, routes(), collapsing(), documents=5),
    "avoiding": lambda root: said(root, routes(), avoiding(routes())),
    "avoiding, 5 documents": lambda root: said(root, routes(), avoiding(routes()), documents=5),
    "redrawn": lambda root: said(root, routes(), routes(9)),
    "one domain": lambda root: said(root, routes(), changed(routes(), IN_ONE_DOMAIN)),
    "one document of it": lambda root: said(root, routes(), changed(routes(), of_documents(1))),
    "rounded": lambda root: drawn_pair(root, REGIMES["iid 64/8"], 0, "rounding")[:2],
    "anywhere": lambda root: drawn_pair(root, REGIMES["iid 64/8"], 0, "anywhere")[:2],
    "rounded, few": lambda root: drawn_pair(root, REGIMES["200 tokens"], 0, "rounding")[:2],
    "last tokens": lambda root: last_tokens(root, 60),
    "last tokens, 4 documents": lambda root: last_tokens(root, 4),
    "same": lambda root: said(root, routes(), routes()),
    "10 tokens changed": lambda root: said(root, routes(), changed(routes(), first(10), router=0)),
    "recorded otherwise": recorded_otherwise,
    # misrecorded
    **{
        world: partial(misrecorded, fault=fault, tokens=tokens, shape=shape)
        for name, fault, few, few_shape in (
            ("routes shifted", "routes shifted by one", 5, LEK),
            ("layers shifted", "a dense layer is counted", 4, LEK),
            ("layers swapped", "two layers swapped", 4, LEK),
            ("layers renumbered", "both pipeline stages count from 0", 4, LEK),
            ("experts permuted", "experts permuted", 8, LEK),
            ("foreign routes", "MTP routes fed to a decoder router", 2, LEK),
            ("physical ids", "physical ids of replicas", 8, (4, 2, 1)),
        )
        for world, tokens, shape in ((name, 600, LEK), (f"{name}, {few} tokens", few, few_shape))
    },
    "shorter": lambda root: misrecorded(root, "one trace is longer"),
    "by document": of_documents_alone,
    "collapsed alike": collapsed_alike,
    "another model": lambda root: nothing_in_common(root, 16),
    "a model of more experts": lambda root: nothing_in_common(root, 18),
    "zeros, k = 2": lambda root: zeros(root, 2, 2),
    "zeros, k = 1": lambda root: zeros(root, 1, 12),
    "zeros, 4 routers": lambda root: zeros(root, 1, 4),
    "no zeros, 2 routers": lambda root: zeros(root, 1, 2, False, 6_000),
    # what a trace lacks
    "lacking": lacking,
    "padded": lambda root: padded(root, 30),
    "padded, 15 rows": lambda root: padded(root, 15),
    "ties": lambda root: tied(root, 8),
    "no ties": lambda root: tied(root, 1_000),
    "dropped": lambda root: test_dropped.trace_of(root, [0, 0.03]),
    "empty slots": lambda root: test_dropped.trace_of(root, [0, 0.03], drops=False),
    # two traces of counts
    "training": lambda root: trained(root, dead_steps=0),
    "training, an expert dies": lambda root: trained(root, dead_steps=40),
    "training, an expert dies at the end": lambda root: trained(root, dead_steps=2),
    "moved": lambda root: histories(root, 40, range(21, 41)),
    "moved once": lambda root: histories(root, 10, range(6, 11)),
    "not moved": lambda root: histories(root, 40),
    "one interrupted": interrupted,
    "a steep one": lambda root: two_counts(root, STEEP, 100),
    "a steep one, few tokens": lambda root: two_counts(root, STEEP, 1),
    "two even ones": lambda root: two_counts(root, EVEN_LOAD, 100),
}


def planted_short(root: Path, tokens: int) -> Any:
    """What `planted` has, so short."""
    shard = next(planted(root / "whole").shards)
    ids = [np.stack(list(shard.slots(r)), 1)[:tokens] for r in range(4)]
    token_id = np.minimum(np.random.default_rng(0).zipf(1.3, T), 499)[:tokens]
    return write_trace(root / "short", ids, E, document=np.arange(tokens) // 2, token_id=token_id)


def noisy(root: Path, share: float, documents: int = DOCUMENTS) -> Any:
    ids = routes()
    runs = (changed(ids, random(of, seed)) for seed, of in enumerate((share, 0.02)))
    return said(root, ids, *runs, documents=documents)


def last_tokens(root: Path, documents: int) -> Any:
    ids = routes()
    last_T = np.arange(len(ids[0])) % (len(ids[0]) // documents) == len(ids[0]) // documents - 1
    other = changed(changed(changed(ids, last_T, router=0), last_T), last_T, router=2)
    return said(root, ids, other, documents=documents)


def two_counts(root: Path, load: list[int], times: int) -> Any:
    return [counts(root / name, [of], times=times) for name, of in (("a", EVEN_LOAD), ("b", load))]
