"""Routing algorithms, on the logits of one batch. One is a function from a Batch to which experts
each token gets: bool [T, E].

Registered by being decorated: `simulate routing`, its table of advice and the tests take them from
ALGORITHMS. T tokens of a batch, in order, E experts, k choices of the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_inspect.simulate import kernels_numpy
from moe_inspect.simulate.shards import expert_capacity

BIAS_RATE = 0.001  # a step of the bias (Wang et al. 2024)
BIAS_TOKENS = 4096  # a step of the bias takes the load of at least so many
WARM_UP = 300  # steps before a bias is judged, on tokens drawn from the first shard
FIRST_RATE = 0.05  # of the warm-up, whose steps shrink to BIAS_RATE
SEED = 20_240_815


@dataclass(frozen=True)
class Batch:
    """`share_TE`: the router's scores, each token's adding up to 1. `scores_TE`: softmax or sigmoid
    of the logits, as the model's router has it. `model_TE`: what the model chose."""

    logits_TE: np.ndarray
    scores_TE: np.ndarray
    share_TE: np.ndarray
    model_TE: np.ndarray
    token_id_T: np.ndarray
    k: int
    number: int

    @property
    def capacity(self) -> int:
        """An even share of the assignments, rounded up."""
        T, E = self.scores_TE.shape
        return -(-T * self.k // E)


def batch_of(
    logits_TE: np.ndarray,
    model_TE: np.ndarray,
    token_id_T: np.ndarray,
    k: int,
    scoring: str,
    number: int,
) -> Batch:
    """Scores by the router's own activation; softmax where the trace does not know it."""
    logits_TE = logits_TE.astype(np.float32)
    if scoring == "sigmoid":
        scores_TE = 1 / (1 + np.exp(-logits_TE))
    else:
        scores_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
        scores_TE /= scores_TE.sum(1, keepdims=True)
    return Batch(
        logits_TE,
        scores_TE,
        scores_TE / scores_TE.sum(1, keepdims=True),
        model_TE,
        token_id_T,
        k,
        number,
    )


@dataclass(frozen=True)
class Algorithm:
    """`leaks`: how a token's experts depend on tokens after it, "" where they do not. `setting`:
    the setting whose values it runs through. `prepare`: sets up the memory of one that learns, from
    tokens drawn from the first shard."""

    name: str
    choose: Callable[..., np.ndarray]
    leaks: str
    use_when: str
    setting: str = ""
    prepare: Callable[[Batch], dict[str, Any]] | None = None


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(
    name: str, use_when: str, leaks: str = "", **more: Any
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Registers a function of (batch, value of its setting, memory)."""

    def register(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        ALGORITHMS[name] = Algorithm(name, function, leaks, use_when, **more)
        return function

    return register


def largest(values_TE: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row, of equals the lowest id. bool [T, E]"""
    E = values_TE.shape[1]
    kth_T1 = np.partition(values_TE, E - k, axis=1)[:, E - k : E - k + 1]
    above_TE, tie_TE = values_TE > kth_T1, values_TE == kth_T1
    return above_TE | (tie_TE & (tie_TE.cumsum(1) <= k - above_TE.sum(1, keepdims=True)))


@algorithm("as recorded", "the model as it is: the line to compare with")
def as_recorded(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    return batch.model_TE


@algorithm("top-k", "the default; balance is left to a training loss", setting="top_k")
def top_k(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    return largest(batch.scores_TE, int(value))


@algorithm(
    "top-p",
    "easy tokens shall cost less, and the runtime takes any number of experts",
    setting="top_p",
)
def top_p(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """The fewest experts whose shares come to p (Huang et al. 2024, arXiv:2403.07652)."""
    order_TE = np.argsort(-batch.share_TE, axis=1, kind="stable")
    sorted_TE = np.take_along_axis(batch.share_TE, order_TE, 1).astype(np.float64)
    chosen_TE = np.zeros(order_TE.shape, bool)
    np.put_along_axis(chosen_TE, order_TE, sorted_TE.cumsum(1) - sorted_TE < value - 1e-6, 1)
    return chosen_TE


@algorithm(
    "expert choice",
    "models that see the whole text anyway; even load, but tokens may get no expert",
    leaks="each expert picks its tokens from the whole batch",
)
def expert_choice(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """Every expert takes the T·k/E tokens that score highest with it (Zhou et al. 2022,
    arXiv:2202.09368)."""
    return largest(
        np.ascontiguousarray(batch.scores_TE.T), min(batch.capacity, len(batch.scores_TE))
    ).T


@algorithm(
    "next best",
    "a hard limit an expert: what finds no room goes to the next best, so late tokens get what "
    "is left",
    setting="capacity_factor",
)
def next_best(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """Token by token, each takes its k best experts that still have room: nothing depends on later
    tokens."""
    T, E = batch.scores_TE.shape
    order_TE = np.argsort(-batch.scores_TE, axis=1, kind="stable")
    if order_TE.size < 200_000:
        serve = kernels_numpy.serve_in_turn
    else:
        from moe_inspect.simulate import kernels_numba

        serve = kernels_numba.serve_in_turn
    return serve(order_TE, batch.k, expert_capacity(value, T, batch.k, E))


def _fitted_bias(sample: Batch) -> dict[str, Any]:
    """A bias that has seen training: a step after each batch of tokens in random order, in steps
    that shrink."""
    T, E = sample.scores_TE.shape
    rng, bias_E = np.random.default_rng(SEED), np.zeros(E, np.float32)
    for rate in np.geomspace(FIRST_RATE, BIAS_RATE, WARM_UP):
        drawn = rng.integers(T, size=BIAS_TOKENS) if T > BIAS_TOKENS else slice(None)
        _step(bias_E, largest(sample.scores_TE[drawn] + bias_E, sample.k).sum(0), float(rate))
    return {"bias_E": bias_E, "load_E": np.zeros(E, np.int64)}


def _step(bias_E: np.ndarray, load_E: np.ndarray, rate: float) -> None:
    bias_E += np.float32(rate) * np.sign(load_E.mean() - load_E).astype(np.float32)


@algorithm(
    "loss-free bias",
    "training: even load without a loss that pulls at the weights",
    prepare=_fitted_bias,
)
def loss_free(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """Top-k of scores + bias, which only selects; after every BIAS_TOKENS tokens, as after a batch
    of training, the bias of an expert moves a step towards even load: b += u · sign(mean − load)
    (Wang et al. 2024, arXiv:2408.15664)."""
    chosen_TE = largest(batch.scores_TE + memory["bias_E"], batch.k)
    memory["load_E"] += chosen_TE.sum(0)
    if memory["load_E"].sum() >= BIAS_TOKENS * batch.k:
        _step(memory["bias_E"], memory["load_E"], BIAS_RATE)
        memory["load_E"][:] = 0
    return chosen_TE


@algorithm(
    "sinkhorn",
    "training with large batches, then plain top-k to generate",
    leaks="the whole batch is balanced at once",
)
def sinkhorn(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """Top-k of the entropic transport plan between tokens and experts (S-BASE: Clark et al. 2022,
    arXiv:2202.01169; after BASE's exact assignment, Lewis et al. 2021, arXiv:2103.16716)."""
    logits_TE = batch.logits_TE.astype(np.float64)
    price_E = np.zeros(logits_TE.shape[1])
    for _ in range(100):
        token_T1 = _logsumexp(logits_TE - price_E, 1)
        before, price_E = (
            price_E,
            _logsumexp(logits_TE - token_T1, 0)[0] - np.log(len(logits_TE) / logits_TE.shape[1]),
        )
        if np.abs(price_E - before).max() < 1e-4:
            break
    return largest(logits_TE - price_E, batch.k)


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis, keepdims=True))


@algorithm("hash", "a baseline without a router: experts know token ids, not contexts")
def hash_layer(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    """Experts are a fixed function of the token id (Roller et al. 2021, arXiv:2106.04426): the k
    highest of a hash of (id, expert). A token whose id the trace does not know gets none."""
    E = batch.scores_TE.shape[1]
    mixed = (
        batch.token_id_T.astype(np.uint64)[:, None] * np.uint64(E)
        + np.arange(E, dtype=np.uint64)
        + np.uint64(SEED)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return largest(mixed ^ (mixed >> np.uint64(31)), batch.k) & (batch.token_id_T >= 0)[:, None]


@algorithm("random", "never: what chance gives, the floor for the other lines")
def random(batch: Batch, value: float, memory: dict[str, Any]) -> np.ndarray:
    return largest(
        np.random.default_rng([SEED, batch.number]).random(batch.scores_TE.shape), batch.k
    )
