"""The same routing, recorded wrongly: faults that are planted into a recording, and what a
comparison must say of each. Recordings of known structure, or read from a trace.

T tokens, L layers, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import moe_inspect
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, RoutedBatch
from tests.support.synthetic import a_pass, write_passes

SHARD_TOKENS = 4_096


@dataclass(frozen=True)
class Recording:
    """Tokens in execution order, a document a sequence. ids_LTK, weights_LTK: int64 and float32, or
    None without weights: then slots are in any order. layers: their numbers. words: texts of the
    token ids."""

    E: int
    document: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    ids_LTK: np.ndarray
    weights_LTK: np.ndarray | None
    layers: Sequence[int]
    words: Sequence[str]

    @property
    def T(self) -> int:
        return len(self.token_id)

    @property
    def last_T(self) -> np.ndarray:
        """bool [T]: the last tokens of documents."""
        return np.r_[self.document[1:] != self.document[:-1], True]

    def take(self, kept: np.ndarray) -> Recording:
        of = {name: getattr(self, name)[kept] for name in ("document", "position", "token_id")}
        weights = None if self.weights_LTK is None else self.weights_LTK[:, kept]
        return replace(self, ids_LTK=self.ids_LTK[:, kept], weights_LTK=weights, **of)

    def routed(self, ids_LTK: np.ndarray, layers: Sequence[int] | None = None) -> Recording:
        """With other experts, and the weights that the slots had."""
        weights = self.weights_LTK
        if weights is not None and len(weights) != len(ids_LTK):
            weights = np.resize(weights, ids_LTK.shape)
        return replace(
            self, ids_LTK=ids_LTK, weights_LTK=weights, layers=layers or range(len(ids_LTK))
        )

    def written(self, root: Path, shard_tokens: int = SHARD_TOKENS) -> Trace:
        dtype = np.uint8 if self.E <= 256 else np.uint16
        weights, k = self.weights_LTK, self.ids_LTK.shape[2]
        order = "unknown" if weights is None else "weight"
        routers = [
            Router(layer, "gate", f"{r}", self.E, k, slot_order=order)
            for r, layer in enumerate(self.layers)
        ]
        words = {"token_id": range(len(self.words)), "token": list(self.words)}

        def passes() -> Iterator[RoutedBatch]:
            for b, begin in enumerate(range(0, self.T, 1_024)):
                part = slice(begin, begin + 1_024)
                document = self.document[part].astype(np.int32)
                new = np.unique(document[self.position[part] == 0]).tolist()
                yield a_pass(
                    b,
                    [ids[part].astype(dtype) for ids in self.ids_LTK],
                    token_id=self.token_id[part].astype(np.int32),
                    document=document,
                    position=self.position[part].astype(np.int32),
                    weights=None if weights is None else [w[part] for w in weights.astype("f2")],
                    documents=[
                        Document(d, "text", "planted", int((self.document == d).sum())) for d in new
                    ],
                )

        options: dict[str, Any] = {"weights": weights is not None, "shard_tokens": shard_tokens}
        options["vocabulary"] = pa.table(words) if self.words else None
        manifest = {"model": {"id": "planted"}}
        return write_passes(root, routers, passes(), manifest=manifest, **options)


def routed_text(seed: int, T: int, L: int, E: int, k: int, weights: bool = True) -> Recording:
    """Routers that follow token ids and the text before, differently at each layer, as trained ones
    do; documents of 20 to 200 tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 200, T)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), T)) + 1]
    document = np.repeat(np.arange(len(sizes)), sizes)[:T]
    position = np.arange(T) - np.searchsorted(document, document)
    token_id = np.minimum(rng.zipf(1.3, T), 999)
    embedded = rng.normal(size=(1_000, 24)).astype(np.float32)[token_id]
    state = np.zeros((T, 24), np.float32)
    for t in range(T):
        state[t] = embedded[t] + (0.6 * state[t - 1] if position[t] else 0)
    ids = np.empty((L, T, k), np.int64)
    gates = np.empty((L, T, k), np.float32)
    for layer in range(L):
        logits = state @ rng.normal(size=(24, E)).astype(np.float32)
        logits += rng.normal(size=(T, E)).astype(np.float32)
        best = np.argsort(-logits, axis=1)[:, :k]
        ids[layer] = best
        top = np.take_along_axis(logits, best, 1) / 4
        gates[layer] = np.exp(top) / np.exp(top).sum(1, keepdims=True)
    if not weights:
        ids = rng.permuted(ids, axis=2)
    words = [f"▁w{i}" for i in range(1_000)]
    return Recording(
        E, document, position, token_id, ids, gates if weights else None, range(L), words
    )


def read(trace: Trace) -> Recording:
    """A recording of a trace whose sequences are its documents."""
    tokens = trace.tokens().sort_values(["document", "sequence", "position"], kind="stable")
    order = tokens.index.to_numpy()
    routing = [trace.routing(router=r) for r in range(len(trace.routers))]
    sequence = np.unique(tokens["sequence"], return_inverse=True)[1]
    return Recording(
        trace.routers[0].experts,
        sequence,
        np.arange(len(sequence)) - np.searchsorted(sequence, sequence),
        tokens["token_id"].to_numpy(),
        np.stack([x.filter(like="expert_").to_numpy(np.int64)[order] for x in routing]),
        np.stack([x.filter(like="weight_").to_numpy(np.float32)[order] for x in routing]),
        [router.layer for router in trace.routers],
        trace.vocabulary()["token"].fillna("").tolist(),
    )


def rounded(a: Recording, share: float, seed: int = 1) -> Recording:
    """Another run: some decisions have another last expert, those with the smallest margins where
    weights tell them."""
    rng, ids = np.random.default_rng(seed), a.ids_LTK.copy()
    L, T, k = ids.shape
    for layer in range(L):
        n = int(share * T)
        if a.weights_LTK is None or k < 2:
            at = rng.choice(T, n, replace=False)
        else:
            w = a.weights_LTK[layer]
            at = np.argsort(np.log(w[:, k - 2] / w[:, k - 1]) + rng.random(T) * 0.01)[:n]
        for t in at:
            others = np.setdiff1d(np.arange(a.E), ids[layer, t])
            ids[layer, t, -1] = rng.choice(others)
    return replace(a, ids_LTK=ids)


@dataclass(frozen=True)
class Fault:
    """kinds: the findings that must be there, and no misalignment beside them. b: how B is
    recorded, of a second run of A and random numbers. mend: options with which the comparison is
    clean again. exactly: decisions with other experts, where B is not a second run but A."""

    kinds: frozenset[str]
    b: Callable[[Recording, np.random.Generator], Recording]
    mend: dict[str, Any] = field(default_factory=dict)
    exactly: int | None = None


FAULTS: dict[str, Fault] = {}


def fault(
    *kinds: str, exactly: int | None = None, **mend: Any
) -> Callable[[Callable[..., Recording]], Callable[..., Recording]]:
    def register(function: Callable[..., Recording]) -> Callable[..., Recording]:
        name = function.__name__.replace("_", " ")
        FAULTS[name] = Fault(frozenset(kinds), function, mend, exactly)
        return function

    return register


@fault("routes_shifted", shift_routes=1)
def routes_shifted_by_one(a: Recording, rng: np.random.Generator) -> Recording:
    return a.routed(np.roll(a.ids_LTK, 1, 1), a.layers)


@fault("missing_tokens", exactly=0)
def last_token_dropped(a: Recording, rng: np.random.Generator) -> Recording:
    return a.take(~a.last_T)


@fault("last_token", drop_last=True)
def last_token_never_fed(a: Recording, rng: np.random.Generator) -> Recording:
    """Its slots hold what was there before."""
    ids = a.ids_LTK.copy()
    ids[:, a.last_T] = rng.permutation(a.ids_LTK, axis=1)[:, a.last_T]
    return replace(a, ids_LTK=ids)


@fault("zero_filled", drop_zero_filled=True)
def padding_is_expert_0(a: Recording, rng: np.random.Generator) -> Recording:
    ids = a.ids_LTK.copy()
    ids[:, rng.random(a.T) < 0.01] = 0
    return replace(a, ids_LTK=ids)


@fault("zero_filled", "last_token", drop_zero_filled=True)
def last_token_is_expert_0(a: Recording, rng: np.random.Generator) -> Recording:
    ids = a.ids_LTK.copy()
    ids[:, a.last_T] = 0
    return replace(a, ids_LTK=ids)


@fault("layers_shifted", shift_layers=-1)
def a_dense_layer_is_counted(a: Recording, rng: np.random.Generator) -> Recording:
    return replace(a, layers=[layer + 1 for layer in a.layers])


@fault("layers_shifted", shift_layers=1)
def the_dense_layer_is_not_counted(a: Recording, rng: np.random.Generator) -> Recording:
    return a.routed(a.ids_LTK[1:], [layer - 1 for layer in a.layers][1:])


@fault("layers_shifted")
def the_second_pipeline_stage_counts_from_0(a: Recording, rng: np.random.Generator) -> Recording:
    half = len(a.layers) // 2
    return a.routed(a.ids_LTK[half:], [layer - a.layers[half] for layer in a.layers[half:]])


@fault("layers_renumbered")
def both_pipeline_stages_count_from_0(a: Recording, rng: np.random.Generator) -> Recording:
    half = len(a.layers) // 2
    return replace(
        a, layers=[layer - (layer >= a.layers[half]) * a.layers[half] for layer in a.layers]
    )


@fault("layers_swapped")
def two_layers_swapped(a: Recording, rng: np.random.Generator) -> Recording:
    order = np.arange(len(a.layers))
    order[[0, -1]] = order[[-1, 0]]
    return replace(a, ids_LTK=a.ids_LTK[order])


@fault("layers_shifted")
def an_MTP_router_comes_first(a: Recording, rng: np.random.Generator) -> Recording:
    """The decoder's routers are fed the routes of the one before; the first those of MTP."""
    return replace(a, ids_LTK=np.concatenate([_foreign(a, rng)[None], a.ids_LTK[:-1]]))


@fault("routes_of_another_router")
def MTP_routes_fed_to_a_decoder_router(a: Recording, rng: np.random.Generator) -> Recording:
    return replace(a, ids_LTK=np.concatenate([_foreign(a, rng)[None], a.ids_LTK[1:]]))


def _foreign(a: Recording, rng: np.random.Generator) -> np.ndarray:
    """The routes of a router of its own, on these tokens."""
    seed = int(rng.integers(2**31))
    k = a.ids_LTK.shape[2]
    return routed_text(seed, a.T, 1, a.E, k).ids_LTK[0]


@fault("routes_of_another_router")
def a_layer_never_recorded(a: Recording, rng: np.random.Generator) -> Recording:
    ids = a.ids_LTK.copy()
    ids[len(ids) // 2] = 0
    return replace(a, ids_LTK=ids)


@fault("experts_renumbered")
def experts_permuted(a: Recording, rng: np.random.Generator) -> Recording:
    ids = [rng.permutation(a.E)[of_layer] for of_layer in a.ids_LTK]
    return replace(a, ids_LTK=np.stack(ids))


@fault("experts_renumbered")
def experts_of_one_layer_permuted(a: Recording, rng: np.random.Generator) -> Recording:
    ids = a.ids_LTK.copy()
    ids[1] = rng.permutation(a.E)[ids[1]]
    return replace(a, ids_LTK=ids)


@fault("physical_ids")
def physical_ids_of_replicas(a: Recording, rng: np.random.Generator) -> Recording:
    """An eighth more ids: the busiest experts have a replica, which takes every other token; ids
    are numbered by the place on the GPUs."""
    more, ids = max(a.E // 8, 1), a.ids_LTK.copy()
    for of_layer in ids:
        busiest = np.argsort(-np.bincount(of_layer.ravel(), minlength=a.E))[:more]
        replica = np.arange(a.E)
        replica[busiest] = a.E + np.arange(more)
        of_layer[::2] = replica[of_layer[::2]]
        of_layer[:] = rng.permutation(a.E + more)[of_layer]
    return replace(a, E=a.E + more, ids_LTK=ids)


@fault("different_models")
def another_tokenizer(a: Recording, rng: np.random.Generator) -> Recording:
    """Other ids for the same text, and another size."""
    V = len(a.words)
    order = rng.permutation(V)
    words = [""] * V
    for i, j in enumerate(order):
        words[j] = a.words[i]
    return replace(a, token_id=order[a.token_id], words=[*words, "<pad>"])


@fault("missing_tokens", exactly=0)
def one_trace_is_longer(a: Recording, rng: np.random.Generator) -> Recording:
    return a.take(a.document < a.document[-1] * 3 // 4)


@fault("refused: --shift-positions 1", shift_positions=1)
def a_special_token_in_front(a: Recording, rng: np.random.Generator) -> Recording:
    begins = np.flatnonzero(a.position == 0)
    rows = np.sort(np.r_[np.arange(a.T), begins])  # the first token of each twice
    b = a.take(rows)
    position = np.arange(b.T) - np.searchsorted(b.document, b.document)
    return replace(b, position=position, token_id=np.where(position == 0, 0, b.token_id))


@fault(exactly=1)
def one_decision_flipped(a: Recording, rng: np.random.Generator) -> Recording:
    ids = a.ids_LTK.copy()
    layer, t = int(rng.integers(len(ids))), int(rng.integers(a.T))
    ids[layer, t, -1] = np.setdiff1d(np.arange(a.E), ids[layer, t])[0]
    return replace(a, ids_LTK=ids)


MISALIGNED = {"misaligned", "different_models", "routes_shifted", "last_token", "zero_filled"}
MISALIGNED |= {"layers_shifted", "layers_renumbered", "layers_swapped", "routes_of_another_router"}
MISALIGNED |= {"experts_renumbered", "physical_ids"}


def said_of(a: Trace, b: Trace, **options: Any) -> tuple[set[str], int | None]:
    """The kinds of the findings, and the decisions with other experts; of different models these
    are not known. What is refused is named by the option that mends it."""
    try:
        made: Any = moe_inspect.compare(a, b, **options)
    except moe_inspect.MoeInspectError as error:
        return {f"refused: --{str(error).rpartition('--')[2]}"}, None
    kinds = {finding.kind for finding in made.verdict()}
    if made.kind.of == "decisions":
        return kinds, made.mismatched
    return kinds & MISALIGNED, None
