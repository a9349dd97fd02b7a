"""Routing algorithms. Each is a function from the logits of one batch to the experts of each token:
bool [T, E].

The decorator `algorithm` registers one in ALGORITHMS, from which `simulate routing` and the tests
take them. T tokens of a batch, in order, E experts, k choices of the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_inspect.simulate.kernels_numba import serve_in_turn
from moe_inspect.simulate.shards import expert_capacity

BIAS_RATE = 0.001  # step size of the bias updates (Wang et al. 2024)
BIAS_TOKENS = 4096  # tokens per bias update, at least
WARM_UP = 300  # bias updates before the simulation, on tokens sampled from the first shard
FIRST_RATE = 0.05  # step size at the start of the warm-up; decays to BIAS_RATE
SEED = 20_240_815


@dataclass(frozen=True)
class RouterScores:
    """A batch of tokens, with what the model's router computed for them.

    model_TE: bool, the experts that the model chose. k: experts per token. scoring: the router's
    activation. number: of the batch in the trace."""

    logits_TE: np.ndarray
    model_TE: np.ndarray
    token_id_T: np.ndarray
    k: int
    scoring: str
    number: int

    @cached_property
    def scores_TE(self) -> np.ndarray:
        """Sigmoid of the logits as in the model, or softmax, also where the trace does not say."""
        logits_TE = self.logits_TE.astype(np.float32)
        if self.scoring == "sigmoid":
            return 1 / (1 + np.exp(-logits_TE))
        scores_TE = np.exp(logits_TE - logits_TE.max(1, keepdims=True))
        return scores_TE / scores_TE.sum(1, keepdims=True)

    @cached_property
    def share_TE(self) -> np.ndarray:
        """The scores, normalised so that each token's sum is 1."""
        return self.scores_TE / self.scores_TE.sum(1, keepdims=True)

    @cached_property
    def order_TE(self) -> np.ndarray:
        """The experts of each token, the highest score first."""
        return ranked(self.scores_TE)[0]

    @cached_property
    def recorded(self) -> int:
        """Assignments that the model made."""
        return int(np.count_nonzero(self.model_TE))


State = dict[str, np.ndarray]  # what an algorithm that learns has learnt
Choose = Callable[[RouterScores, float, State], np.ndarray]


@dataclass(frozen=True)
class Algorithm:
    """A registered routing algorithm.

    leaks: how the experts of a token depend on later tokens; "" where they do not.
    setting: the parameter that it is run with several values of, if any.
    prepare: computes the initial state of an algorithm that learns, from tokens sampled from the
    first shard."""

    name: str
    choose: Choose
    leaks: str
    use_when: str
    setting: str = ""
    prepare: Callable[[RouterScores], State] | None = None


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(
    name: str,
    use_when: str,
    leaks: str = "",
    setting: str = "",
    prepare: Callable[[RouterScores], State] | None = None,
) -> Callable[[Choose], Choose]:
    """Registers a function of (batch, value of its setting, state)."""

    def register(function: Choose) -> Choose:
        ALGORITHMS[name] = Algorithm(name, function, leaks, use_when, setting, prepare)
        return function

    return register


def largest(values_TE: np.ndarray, k: int) -> np.ndarray:
    """The k largest of each row; ties go to the lowest id. bool [T, E]"""
    E = values_TE.shape[1]
    kth_T1 = np.partition(values_TE, E - k, axis=1)[:, E - k : E - k + 1]
    chosen_TE = values_TE >= kth_T1
    tied = np.flatnonzero(chosen_TE.sum(1) > k)  # few tokens: a cumsum of all costs more
    above_NE = values_TE[tied] > kth_T1[tied]
    tie_NE = chosen_TE[tied] & ~above_NE
    room_N1 = k - above_NE.sum(1, keepdims=True)
    chosen_TE[tied] = above_NE | (tie_NE & (tie_NE.cumsum(1) <= room_N1))
    return chosen_TE


def ranked(values_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of each row from the largest value down, of equals the lowest id first, and the
    values in that order. values_TE: float32 from 0 up, whose bits have the order of the values: one
    sort of (bits, id) is quicker than a stable argsort."""
    key_TE = (~values_TE.view(np.uint32)).astype(np.uint64) << np.uint64(32)
    key_TE |= np.arange(values_TE.shape[1], dtype=np.uint64)
    key_TE.sort(axis=1)
    sorted_TE = (~(key_TE >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return (key_TE & np.uint64(2**32 - 1)).view(np.int64), sorted_TE


@algorithm("as recorded", "the model's own routing: the baseline")
def as_recorded(batch: RouterScores, value: float, state: State) -> np.ndarray:
    return batch.model_TE


@algorithm(
    "top-k", "the usual choice; balancing is left to an auxiliary loss in training", setting="top_k"
)
def top_k(batch: RouterScores, value: float, state: State) -> np.ndarray:
    return largest(batch.scores_TE, int(value))


@algorithm(
    "top-p",
    "easy tokens should use fewer experts, and the inference engine supports a varying number",
    setting="top_p",
)
def top_p(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """The fewest experts whose shares sum to at least p (Huang et al. 2024, arXiv:2403.07652)."""
    order_TE, sorted_TE = ranked(batch.share_TE)
    sorted_TE = sorted_TE.astype(np.float64)
    chosen_TE = np.zeros(order_TE.shape, bool)
    np.put_along_axis(chosen_TE, order_TE, sorted_TE.cumsum(1) - sorted_TE < value - 1e-6, 1)
    return chosen_TE


@algorithm(
    "expert choice",
    "encoders, which see the whole text; load is even, but some tokens may get no expert",
    leaks="each expert chooses among the tokens of the whole batch",
)
def expert_choice(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Each expert takes the T·k/E tokens with its highest scores (Zhou et al. 2022,
    arXiv:2202.09368)."""
    T, E = batch.scores_TE.shape
    even = -(-T * batch.k // E)  # the assignments of an expert if load were even, rounded up
    return largest(np.ascontiguousarray(batch.scores_TE.T), min(even, T)).T


@algorithm(
    "next best",
    "a hard limit per expert: overflow goes to the token's next best expert, so later tokens have "
    "less choice",
    setting="capacity_factor",
)
def next_best(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """In order, each token takes its k best experts that are not yet full; nothing depends on later
    tokens."""
    T, E = batch.scores_TE.shape
    return serve_in_turn(batch.order_TE, batch.k, expert_capacity(value, T, batch.k, E))


def _fitted_bias(sample: RouterScores) -> State:
    """A bias as after training: updated after each of WARM_UP random batches, with a decaying step
    size."""
    T, E = sample.scores_TE.shape
    rng, bias_E = np.random.default_rng(SEED), np.zeros(E, np.float32)
    biased_NE = np.empty((min(T, BIAS_TOKENS), E), np.float32)
    for rate in np.geomspace(FIRST_RATE, BIAS_RATE, WARM_UP):
        drawn = rng.integers(T, size=BIAS_TOKENS) if T > BIAS_TOKENS else np.arange(T)
        np.take(sample.scores_TE, drawn, 0, out=biased_NE, mode="clip")  # no copy in between
        biased_NE += bias_E
        _step(bias_E, largest(biased_NE, sample.k).sum(0), float(rate))
    return {"bias_E": bias_E, "load_E": np.zeros(E, np.int64)}


def _step(bias_E: np.ndarray, load_E: np.ndarray, rate: float) -> None:
    bias_E += np.float32(rate) * np.sign(load_E.mean() - load_E).astype(np.float32)


@algorithm(
    "loss-free bias",
    "training: even load without the gradient of an auxiliary loss",
    prepare=_fitted_bias,
)
def loss_free(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Top-k of scores + bias. The bias affects the selection only, not the gate weights. It is
    updated after every BIAS_TOKENS tokens, as after a training batch: b += u · sign(mean − load)
    (Wang et al. 2024, arXiv:2408.15664)."""
    chosen_TE = largest(batch.scores_TE + state["bias_E"], batch.k)
    state["load_E"] += chosen_TE.sum(0)
    if state["load_E"].sum() >= BIAS_TOKENS * batch.k:
        _step(state["bias_E"], state["load_E"], BIAS_RATE)
        state["load_E"][:] = 0
    return chosen_TE


@algorithm(
    "sinkhorn",
    "training with large batches, and plain top-k in generation",
    leaks="the whole batch is balanced together",
)
def sinkhorn(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Top-k of the entropic transport plan between tokens and experts (S-BASE: Clark et al. 2022,
    arXiv:2202.01169; after BASE's exact assignment, Lewis et al. 2021, arXiv:2103.16716)."""
    logits_TE = batch.logits_TE.astype(np.float64)
    price_E, work_TE = np.zeros(logits_TE.shape[1]), np.empty_like(logits_TE)
    for _ in range(100):
        token_T1 = _logsumexp(np.subtract(logits_TE, price_E, out=work_TE), 1)
        before, even = price_E, np.log(len(logits_TE) / logits_TE.shape[1])
        price_E = _logsumexp(np.subtract(logits_TE, token_T1, out=work_TE), 0)[0] - even
        if np.abs(price_E - before).max() < 1e-4:
            break
    return largest(logits_TE - price_E, batch.k)


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    """Overwrites `values`: new memory for each step would take longer than the step."""
    top = values.max(axis, keepdims=True)
    np.exp(np.subtract(values, top, out=values), out=values)
    return top + np.log(values.sum(axis, keepdims=True))


@algorithm("hash", "a baseline without a router: experts by token id alone, whatever the context")
def hash_layer(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Experts are a fixed function of the token id (Roller et al. 2021, arXiv:2106.04426): those
    with the k highest hashes of (id, expert). A token without an id in the trace gets none."""
    E = batch.scores_TE.shape[1]
    id_U, id_of_T = np.unique(batch.token_id_T, return_inverse=True)
    mixed = (
        id_U.astype(np.uint64)[:, None] * np.uint64(E)
        + np.arange(E, dtype=np.uint64)
        + np.uint64(SEED)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    chosen_UE = largest(mixed ^ (mixed >> np.uint64(31)), batch.k) & (id_U >= 0)[:, None]
    return chosen_UE[id_of_T]


@algorithm("random", "never: experts uniformly at random, a lower bound for the others")
def random(batch: RouterScores, value: float, state: State) -> np.ndarray:
    drawn_TE = np.random.default_rng([SEED, batch.number]).random(batch.scores_TE.shape)
    return largest(drawn_TE, batch.k)
