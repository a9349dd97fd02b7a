"""The same routing, recorded wrongly: faults that are planted into a recording, and what a
comparison must say of each. Recordings of known structure, or read from a trace.

T tokens, L layers, K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import moe_inspect
from moe_inspect.public import Trace
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, RoutedBatch
from tests.support.synthetic import a_pass, write_passes

SHARD_TOKENS = 4_096
FACTS = ("document", "position", "token_id")  # of a token
Rng = np.random.Generator


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

    def take(self, kept: np.ndarray | slice) -> Recording:
        of = {name: getattr(self, name)[kept] for name in FACTS}
        weights = None if self.weights_LTK is None else self.weights_LTK[:, kept]
        return replace(self, ids_LTK=self.ids_LTK[:, kept], weights_LTK=weights, **of)

    def routed(self, ids_LTK: np.ndarray, layers: Sequence[int] | None = None) -> Recording:
        """With other experts, and the weights that the slots had."""
        weights, layers = self.weights_LTK, layers or range(len(ids_LTK))
        if weights is not None and len(weights) != len(ids_LTK):
            weights = np.resize(weights, ids_LTK.shape)
        return replace(self, ids_LTK=ids_LTK, weights_LTK=weights, layers=layers)

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
                of = self.take(slice(begin, begin + 1_024))
                new = np.unique(of.document[of.position == 0]).tolist()
                sizes = [(d, int((self.document == d).sum())) for d in new]
                yield a_pass(
                    b,
                    [*of.ids_LTK.astype(dtype)],
                    weights=None if of.weights_LTK is None else [*of.weights_LTK.astype("f2")],
                    documents=[Document(d, "text", "planted", tokens) for d, tokens in sizes],
                    **{name: getattr(of, name).astype(np.int32) for name in FACTS},
                )

        options = {"weights": weights is not None, "shard_tokens": shard_tokens}
        options |= {"vocabulary": pa.table(words) if self.words else None}
        return write_passes(
            root, routers, passes(), manifest={"model": {"id": "planted"}}, **options
        )


def routed_text(seed: int, T: int, L: int, E: int, k: int, weights: bool = True) -> Recording:
    """Routers that follow token ids and the text before; documents of 20 to 200 tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 200, T)
    sizes = sizes[: int(np.searchsorted(np.cumsum(sizes), T)) + 1]
    document = np.repeat(np.arange(len(sizes)), sizes)[:T]
    position = np.arange(T) - np.searchsorted(document, document)
    token_id = np.minimum(rng.zipf(1.3, T), 999)
    state = rng.normal(size=(1_000, 24)).astype(np.float32)[token_id]
    for t in np.flatnonzero(position):
        state[t] += 0.6 * state[t - 1]
    ids, gates = np.empty((L, T, k), np.int64), np.empty((L, T, k), np.float32)
    for layer in range(L):
        logits = state @ rng.normal(size=(24, E)).astype(np.float32)
        logits += rng.normal(size=(T, E)).astype(np.float32)
        best = np.argsort(-logits, axis=1)[:, :k]
        ids[layer] = best
        top = np.take_along_axis(logits, best, 1) / 4
        gates[layer] = np.exp(top) / np.exp(top).sum(1, keepdims=True)
    if not weights:
        ids = rng.permuted(ids, axis=2)
    words, kept = [f"▁w{i}" for i in range(1_000)], gates if weights else None
    return Recording(E, document, position, token_id, ids, kept, range(L), words)


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
    """Another run: some decisions, those with the smallest margins, have another last expert."""
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


# of a second run, a copy of its ids [L, T, K] and random numbers: what is recorded, or its ids
Change = Callable[[Recording, np.ndarray, Rng], Recording | np.ndarray]


@dataclass(frozen=True)
class Fault:
    """kinds: the findings that must be there, and no misalignment beside them. mend: options with
    which the comparison is clean again. exactly: decisions with other experts, where B is not a
    second run but A."""

    kinds: Set[str]
    change: Change
    mend: dict[str, Any] = field(default_factory=dict)
    exactly: int | None = None

    def b(self, a: Recording, rng: Rng) -> Recording:
        """How B is recorded."""
        made = self.change(a, a.ids_LTK.copy(), rng)
        return made if isinstance(made, Recording) else replace(a, ids_LTK=made)


def foreign(a: Recording, rng: Rng) -> np.ndarray:
    """The routes [T, K] of a router of its own, on these tokens."""
    return routed_text(int(rng.integers(2**31)), a.T, 1, a.E, a.ids_LTK.shape[2]).ids_LTK[0]


def second_stage(a: Recording, ids: np.ndarray, rng: Rng) -> Recording:
    half = len(a.layers) // 2
    return a.routed(ids[half:], [layer - a.layers[half] for layer in a.layers[half:]])


def both_stages(a: Recording, ids: np.ndarray, rng: Rng) -> Recording:
    first = a.layers[len(a.layers) // 2]
    return replace(a, layers=[layer - (layer >= first) * first for layer in a.layers])


def physical_ids(a: Recording, ids: np.ndarray, rng: Rng) -> Recording:
    """The busiest experts have a replica, of every other token; ids are places on the GPUs."""
    more = max(a.E // 8, 1)
    for of_layer in ids:
        busiest = np.argsort(-np.bincount(of_layer.ravel(), minlength=a.E))[:more]
        replica = np.arange(a.E)
        replica[busiest] = a.E + np.arange(more)
        of_layer[::2] = replica[of_layer[::2]]
        of_layer[:] = rng.permutation(a.E + more)[of_layer]
    return replace(a, E=a.E + more, ids_LTK=ids)


def tokenizer(a: Recording, ids: np.ndarray, rng: Rng) -> Recording:
    """Other ids for the same text, and another size."""
    order = rng.permutation(len(a.words))
    words = [a.words[i] for i in np.argsort(order)]
    return replace(a, token_id=order[a.token_id], words=[*words, "<pad>"])


def special_token(a: Recording, ids: np.ndarray, rng: Rng) -> Recording:
    begins = np.flatnonzero(a.position == 0)
    b = a.take(np.sort(np.r_[np.arange(a.T), begins]))  # the first token of each twice
    position = np.arange(b.T) - np.searchsorted(b.document, b.document)
    return replace(b, position=position, token_id=np.where(position == 0, 0, b.token_id))


def flipped(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
    layer, t = int(rng.integers(len(ids))), int(rng.integers(a.T))
    ids[layer, t, -1] = np.setdiff1d(np.arange(a.E), ids[layer, t])[0]
    return ids


FAULTS: dict[str, Fault] = {
    "routes shifted by one": Fault(
        {"routes_shifted"}, lambda a, ids, rng: np.roll(ids, 1, 1), {"shift_routes": 1}
    ),
    "last token dropped": Fault(
        {"missing_tokens"}, lambda a, ids, rng: a.take(~a.last_T), exactly=0
    ),
    "last token never fed": Fault(  # its slots hold what was there before
        {"never_fed"},
        lambda a, ids, rng: np.where(a.last_T[:, None], rng.permutation(ids, axis=1), ids),
        {"drop_last": True},
    ),
    "padding is expert 0": Fault(
        {"never_fed"},
        lambda a, ids, rng: np.where(rng.random(a.T)[:, None] < 0.01, 0, ids),
        {"drop_zero_filled": True},
    ),
    "last token is expert 0": Fault(
        {"never_fed"},
        lambda a, ids, rng: np.where(a.last_T[:, None], 0, ids),
        {"drop_zero_filled": True},
    ),
    "a dense layer is counted": Fault(
        {"layers_moved"},
        lambda a, ids, rng: replace(a, layers=[layer + 1 for layer in a.layers]),
        {"shift_layers": -1},
    ),
    "the dense layer is not counted": Fault(
        {"layers_moved"},
        lambda a, ids, rng: a.routed(ids[1:], [layer - 1 for layer in a.layers[1:]]),
        {"shift_layers": 1},
    ),
    "the second pipeline stage counts from 0": Fault({"layers_moved"}, second_stage),
    "both pipeline stages count from 0": Fault({"layers_moved"}, both_stages),
    "two layers swapped": Fault(
        {"layers_moved"}, lambda a, ids, rng: ids[[-1, *range(1, len(ids) - 1), 0]]
    ),
    # the decoder's routers are fed the routes of the one before; the first those of MTP
    "an MTP router comes first": Fault(
        {"layers_moved"}, lambda a, ids, rng: np.stack([foreign(a, rng), *ids[:-1]])
    ),
    "MTP routes fed to a decoder router": Fault(
        {"routes_of_another_router"}, lambda a, ids, rng: np.stack([foreign(a, rng), *ids[1:]])
    ),
    "a layer never recorded": Fault(
        {"routes_of_another_router"},
        lambda a, ids, rng: np.stack([of * (n != len(ids) // 2) for n, of in enumerate(ids)]),
    ),
    "experts permuted": Fault(
        {"experts_renumbered"},
        lambda a, ids, rng: np.stack([rng.permutation(a.E)[of] for of in ids]),
    ),
    "experts of one layer permuted": Fault(
        {"experts_renumbered"},
        lambda a, ids, rng: np.stack([ids[0], rng.permutation(a.E)[ids[1]], *ids[2:]]),
    ),
    "physical ids of replicas": Fault({"experts_renumbered"}, physical_ids),
    "another tokenizer": Fault({"different_models"}, tokenizer),
    "one trace is longer": Fault(
        {"missing_tokens"},
        lambda a, ids, rng: a.take(a.document < a.document[-1] * 3 // 4),
        exactly=0,
    ),
    "a special token in front": Fault(
        {"refused: --shift-positions 1"}, special_token, {"shift_positions": 1}
    ),
    "one decision flipped": Fault(set(), flipped, exactly=1),
}
MISALIGNED = {"different_models", "routes_shifted", "never_fed", "layers_moved"}
MISALIGNED |= {"routes_of_another_router", "experts_renumbered"}


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


# --- what routes alone tell, without a second recording


@dataclass(frozen=True)
class Bug:
    """A published bug, or one like it: what `check` must find, and nothing beside. change: of a
    recording and a copy of its ids, what is returned. said: words of the finding. told: of
    which recordings; others may have such rows by chance."""

    kinds: Set[str]
    change: Change
    said: str = ""
    told: Callable[[Recording], bool] = lambda a: True

    def b(self, a: Recording, rng: Rng) -> Recording:
        made = self.change(a, a.ids_LTK.copy(), rng)
        return made if isinstance(made, Recording) else replace(a, ids_LTK=made)


def linted(b: Recording) -> list[Any]:
    """What `moe_inspect.check` finds of the array, with the lengths of its documents."""
    lengths = np.diff(np.r_[0, np.flatnonzero(b.last_T) + 1])
    ids_TLK = np.swapaxes(b.ids_LTK, 0, 1)
    made = moe_inspect.check(ids_TLK, token_ids=b.token_id, experts=b.E, lengths=lengths)
    return made.findings


def longest(a: Recording) -> slice:
    """The longest document of a recording."""
    begin = np.flatnonzero(a.position == 0)
    size = np.diff(np.r_[begin, a.T])
    n = int(size.argmax())
    return slice(int(begin[n]), int(begin[n] + size[n]))


def retracted(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
    """The rows before the retraction are there twice, and the last ones pushed out."""
    of, kept = longest(a), ids.copy()
    n = (of.stop - of.start) // 2
    kept[:, of.start + n : of.stop] = ids[:, of.start : of.stop - n]
    return kept


def another_sequence(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
    of, n = longest(a), 30
    other = of.stop if of.stop + n <= a.T else of.start - n
    ids[:, other : other + n] = ids[:, of.start : of.start + n]
    return ids


def stale(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
    of = longest(a)
    ids[:, of.start + 5 : of.stop] = ids[:, [of.start + 4]]
    return ids


def a_layer(a: Recording, ids: np.ndarray, value: Any) -> np.ndarray:
    ids[len(ids) // 2] = value
    return ids


def forced(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
    """Experts in turn."""
    (L, T, K), E = ids.shape, a.E
    turn_TK = (np.arange(T)[:, None] * K + np.arange(K)) % E
    return np.stack([rng.permutation(E)[rng.permutation(turn_TK)] for _ in range(L)])


def some(change: Callable[[np.ndarray], Any], share: float = 0.02) -> Change:
    """Some tokens with other ids."""

    def planted(a: Recording, ids: np.ndarray, rng: Rng) -> np.ndarray:
        at = rng.random(a.T) < share
        at[int(rng.integers(a.T))] = True
        ids[:, at] = change(ids[:, at])
        return ids

    return planted


BUGS: dict[str, Bug] = {
    # certain
    "all zero (tpu-inference #3583)": Bug({"zero_filled"}, lambda a, ids, rng: ids * 0, "all"),
    "zero-filled prompts (vLLM #49184)": Bug(
        {"zero_filled"},
        lambda a, ids, rng: np.where((a.position < 8)[:, None], 0, ids),
        "at the beginning of",
    ),
    "padding is expert 0 (SkyRL #1908, verl #7075)": Bug(
        {"zero_filled"}, lambda a, ids, rng: np.where(a.last_T[:, None], 0, ids), "at the end of"
    ),
    "padding is experts 0 to k - 1": Bug(
        {"constant_filled"},
        lambda a, ids, rng: np.where(a.last_T[:, None], np.arange(ids.shape[2]), ids),
        "at the end of",
    ),
    "a lost token at each boundary (NeMo-RL #3208)": Bug(
        {"lengths"}, lambda a, ids, rng: ids[:, ~a.last_T], "one for each sequence"
    ),
    "a lost token at the boundaries of sequences (prime-rl #1807)": Bug(
        {"lengths"},
        lambda a, ids, rng: ids[:, ~a.last_T | (np.arange(a.T) == a.T - 1)],
        "one for each boundary",
    ),
    "rows of a retracted request kept (miles #3277)": Bug(
        {"lengths"}, lambda a, ids, rng: np.concatenate([ids[:, :40], ids], 1), "40 too many"
    ),
    "a tail of −1": Bug(
        {"not_recorded"},
        lambda a, ids, rng: np.where((np.arange(a.T) > a.T - 30)[:, None], -1, ids),
        "at the end of",
    ),
    "physical ids of replicas": Bug(
        {"physical_ids"}, lambda a, ids, rng: replace(physical_ids(a, ids, rng), E=a.E)
    ),
    "memory that was never written": Bug({"out_of_range"}, some(lambda ids: ids + 40_000)),
    "an expert twice": Bug({"twice"}, some(lambda ids: ids[..., [0, *range(ids.shape[2] - 1)]])),
    "a dense layer": Bug({"layers_filled"}, lambda a, ids, rng: a_layer(a, ids, 0)),
    # beyond any chance
    "a layer never written, filled 0 to k - 1": Bug(
        {"constant_filled"},
        lambda a, ids, rng: a_layer(a, ids, np.arange(ids.shape[2])),
        told=lambda a: a.E > 8,
    ),
    "a layer over another (vLLM #48622)": Bug(
        {"layer_copied"}, lambda a, ids, rng: a_layer(a, ids, ids[0])
    ),
    "a retracted request (miles #3277)": Bug({"repeated_block"}, retracted),
    "a sequence twice": Bug({"repeated_block"}, another_sequence),
    "a stale buffer": Bug({"repeated_rows"}, stale),
    "the order of slots lost": Bug({"sorted_ids"}, lambda a, ids, rng: np.sort(ids, 2)),
    "one of two ranks": Bug({"missing_ranks"}, lambda a, ids, rng: replace(a, E=2 * a.E)),
    "forced to balance": Bug({"even_load"}, forced),
    # by the text
    "shifted by a token": Bug({"routes_shifted"}, lambda a, ids, rng: np.roll(ids, 1, 1), "n+1"),
    "shifted back by two": Bug({"routes_shifted"}, lambda a, ids, rng: np.roll(ids, -2, 1), "n-2"),
    "another span (vLLM #37094)": Bug(
        {"routes_shifted"}, lambda a, ids, rng: np.roll(ids, 13, 1), "n+13"
    ),
    "a draft's layer over the target's (vLLM #48622)": Bug(
        {"layer_shifted"}, lambda a, ids, rng: a_layer(a, ids, np.roll(ids[0], -1, 0))
    ),
}
