"""Synthetic traces on disk, written through TraceWriter: what a test states about routing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_inspect.public import Trace, open_trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, Document, ResumePoint, RoutedBatch, TraceWriter
from moe_inspect.trace.writer.batches import SHARD_TOKENS, ShardLimits


def routers(L: int, E: int, k: int) -> list[Router]:
    return [Router(layer, "mlp.gate", f"model.layers.{layer}.mlp.gate", E, k) for layer in range(L)]


def uniform_ids(rng: np.random.Generator, T: int, E: int, k: int) -> np.ndarray:
    """k distinct experts of E, uniformly at random and in random order. uint16 [T, k]"""
    return np.argsort(rng.random((T, E)), axis=1)[:, :k].astype(np.uint16)


def write_trace(
    root: Path,
    ids: Sequence[np.ndarray],
    experts: int | Sequence[int],
    *,
    document: np.ndarray | None = None,
    domain_of_document: Sequence[str] = ("text",),
    token_id: np.ndarray | None = None,
    weights: Sequence[np.ndarray] | None = None,
    logits: Sequence[np.ndarray] | None = None,
    batch_tokens: int = 500,
    shard_tokens: int = 2_000,
    words: int | Sequence[str] = 0,
    phases: Sequence[str] = ("prefill",),
    batch_order: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    manifest: dict | None = None,
    status: str = "complete",
    slot_order: str = "weight",
) -> Trace:
    """ids[r]: [T, K] of router r, the dtype's maximum where a slot routed nowhere. `document`: of
    each token, default all in 0. Batch b is of phase `phases[b % len(phases)]`. `batch_order`: in
    which order the batches are written. `slot_order`: what is known of slots without weights: with
    "weight" slot 0 is the first choice; with weights they are ordered by those."""
    T, rows = len(ids[0]), np.arange(len(ids[0]), dtype=np.int32)
    sizes = [experts] * len(ids) if isinstance(experts, int) else list(experts)
    document = np.asarray(rows * 0 if document is None else document, np.int32)
    token_id = np.asarray(rows * 0 if token_id is None else token_id, np.int32)
    labels = sorted(set(domain_of_document))
    domains = np.array([*map(labels.index, domain_of_document)], np.int32)
    domains = np.resize(domains, 1 + document.max())
    listed = [
        Router(layer, "gate", f"layers.{layer}.{r}", E, of.shape[1], slot_order=slot_order)
        for r, (layer, E, of) in enumerate(zip(layers or range(len(ids)), sizes, ids, strict=True))
    ]
    tokens = [f" w{i}" for i in range(words)] if isinstance(words, int) else list(words)
    vocabulary = {"token_id": range(len(tokens)), "token": tokens}
    capture = {"weights": weights is not None, "mode": "tap", "dtype": "float32"}
    writer = TraceWriter(
        root,
        {"model": {"id": "synthetic"}, "capture": capture, **(manifest or {})},
        listed,
        weights=weights is not None,
        logits=logits is not None,
        vocabulary=pa.table(vocabulary) if tokens else None,
        limits=ShardLimits(shard_tokens),
    )
    seen: set[int] = set()
    for b in batch_order if batch_order is not None else range(-(-T // batch_tokens)):
        part = slice(b * batch_tokens, (b + 1) * batch_tokens)
        fed = document[part]
        new = [d for d in np.unique(fed).tolist() if d not in seen]
        seen.update(new)
        given: dict[str, Any] = {"token_id": token_id[part], "document": fed}
        given |= {"domain": domains[fed], "domains": labels}
        given["documents"] = [
            Document(d, labels[domains[d]], "synthetic", int((document == d).sum())) for d in new
        ]
        given["weights"] = weights and [of[part] for of in weights]
        given["extras"] = {"logits": [of[part] for of in logits]} if logits else {}
        phase = phases[b % len(phases)]
        writer.write(a_pass(b, [of[part] for of in ids], len(fed), phase=phase, **given))
    writer.close(status)
    return open_trace(root)


def thirty_documents(root: Path, L: int = 3, weights: bool = True, **more: Any) -> Trace:
    """30 documents of 10 tokens, a pass each, in three shards: L routers of 8 experts, k = 2, a
    vocabulary of 50; one slot of router 1 routed nowhere."""
    rng = np.random.default_rng(0)
    ids = [uniform_ids(rng, 300, 8, 2) for _ in range(L)]
    ids[1][5, 1] = np.iinfo(np.uint16).max
    usual = {"document": np.repeat(np.arange(30), 10), "domain_of_document": ("a", "b")}
    usual |= {"token_id": rng.integers(0, 50, 300), "words": 50}
    if weights:
        usual["weights"] = [rng.random((300, 2)).astype(np.float32) for _ in range(L)]
    return write_trace(root, ids, 8, batch_tokens=10, shard_tokens=100, **usual | more)


def assigned(trace: Trace) -> pd.DataFrame:
    """A row an assignment, through pandas alone, of a trace with k = 2."""
    rows = trace.routing().merge(trace.tokens(), on="token")
    slots = [
        rows.assign(slot=j, expert=rows[f"expert_{j}"], weight=rows[f"weight_{j}"]) for j in (0, 1)
    ]
    found = pd.concat(slots).dropna(subset="expert")
    return found.sort_values(["router", "token", "slot"], ignore_index=True)


def a_pass(n: int, ids: Sequence[np.ndarray], T: int | None = None, **given: Any) -> RoutedBatch:
    """A forward pass of T tokens, of token id 0, document 0 and domain "text", at positions from 0
    on, without weights; but for the fields that are given. A sequence is a document."""
    T = len(ids[0]) if T is None else T
    zeros, document = np.zeros(T, np.int32), given.get("document", np.zeros(T, np.int32))
    usual = {"token_id": zeros, "document": document, "sequence": document, "domain": zeros}
    usual |= {"position": np.arange(T, dtype=np.int32), "domains": ["text"], "weights": None}
    return RoutedBatch(n, ids=list(ids), **usual | given)


def write_passes(
    root: Path,
    listed: Sequence[Router],
    passes: Iterable[RoutedBatch | CountedBatches],
    shard_tokens: int = SHARD_TOKENS,
    rank: int = 0,
    **options: Any,
) -> Trace:
    """A trace of these passes, without weights."""
    manifest = {"model": {"id": "synthetic"}, "capture": {}, **options.pop("manifest", {})}
    options = {"weights": False, "limits": ShardLimits(shard_tokens), **options}
    options.setdefault("resume", ResumePoint(rank))
    with TraceWriter(root, manifest, listed, **options) as writer:
        for one in passes:
            writer.write(one)
    return open_trace(root)


def write_counts(
    root: Path, loads: Sequence[np.ndarray], k: int, domains: Sequence[str] = ("text",)
) -> Trace:
    """A counts-only trace; loads[r]: [D, E] assignments of router r."""
    listed = [replace(r, slot_order="weight") for r in routers(len(loads), loads[0].shape[1], k)]
    tokens, first = int(loads[0].sum()) // k, [load // k for load in loads]
    whole = [load.astype(np.int64) for load in loads]
    counted = CountedBatches(0, tokens, list(domains), whole, first)
    return write_passes(root, listed, [counted], counts_only=True)


def counts_by_document(root: Path) -> Trace:
    """A document of code and one of prose, of 25 tokens each, which 2 routers send to 2 of 8
    experts."""
    listed, domains = routers(2, 8, 2), ["code", "prose"]
    documents = [Document(d, domain, "synthetic", 25) for d, domain in enumerate(domains)]
    load = np.array([[10, 10, 10, 10, 10, 0, 0, 0], [0, 0, 5, 9, 9, 9, 9, 9]])
    counted = CountedBatches(0, 50, domains, [load] * 2, None, {}, documents)
    return write_passes(root, listed, [counted], counts_only=True, by_document=True)


def encoder_decoder(root: Path) -> Trace:
    """Two routers of 2 experts, with logits: 6 encoded tokens go to 0, 4 decoded to 0 and 1."""
    listed = [
        Router(0, "gate", "encoder.0", 2, 1, "softmax", stack="encoder"),
        Router(0, "gate", "decoder.0", 2, 1, "softmax", stack="decoder"),
    ]
    ids = [np.zeros((6, 1), np.uint8), np.arange(4, dtype=np.uint8)[:, None] % 2]
    logits = [np.where(np.arange(2) == i, 2, 0).astype(np.float16) for i in ids]
    place, documents = np.r_[:6, :4].astype(np.int32), [Document(0, "text", "synthetic", 10)]
    given: dict[str, Any] = {"extras": {"logits": logits}, "documents": documents, "encoded": 6}
    one = a_pass(0, ids, 10, position=place, **given)
    return write_passes(root, listed, [one], logits=True)
