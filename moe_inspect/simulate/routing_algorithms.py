"""Routing algorithms. Each is a function from the logits of one batch to the experts of each token:
bool [T, E].

The decorator `algorithm` registers one in ALGORITHMS, from which `simulate routing` and the tests
take them. T tokens of a batch, in order, E experts, k choices of the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from moe_inspect.simulate import routing_kernels as kernels
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
    activation. number: of the batch in the trace. blind: what algorithms without a router chose, by
    their name, experts and choices: the same for all routers."""

    logits_TE: np.ndarray
    model_TE: np.ndarray
    token_id_T: np.ndarray
    k: int
    scoring: str
    number: int
    blind: dict[tuple[str, int, int], np.ndarray] = field(default_factory=dict)

    @cached_property
    def below_TE(self) -> np.ndarray:
        """How far the logits are below each token's highest. float32"""
        below_TE = self.logits_TE.astype(np.float32)
        kernels.subtract_highest(below_TE)
        return below_TE

    @cached_property
    def scores_TE(self) -> np.ndarray:
        """Sigmoid of the logits as in the model, or softmax, also where the trace does not say."""
        if self.scoring == "sigmoid":
            return 1 / (1 + np.exp(-self.logits_TE.astype(np.float32)))
        scores_TE = np.exp(self.below_TE)
        return np.divide(scores_TE, scores_TE.sum(1, keepdims=True), out=scores_TE)

    @cached_property
    def total_T1(self) -> np.ndarray:
        """The sum of each token's scores."""
        return self.scores_TE.sum(1, keepdims=True)

    @cached_property
    def share_TE(self) -> np.ndarray:
        """The scores, normalised so that each token's sum is 1."""
        return self.scores_TE / self.total_T1

    @cached_property
    def sorted_TE(self) -> np.ndarray:
        """The scores of each token, ascending."""
        return np.sort(self.scores_TE, axis=1)

    def top(self, k: int) -> np.ndarray:
        """The k highest scores of each token."""
        return reaching(self.scores_TE, np.full(len(self.scores_TE), k), self.sorted_TE[:, -k])

    @cached_property
    def own_TE(self) -> np.ndarray:
        return self.top(self.k)

    @cached_property
    def own(self) -> tuple[np.ndarray, float, int, int]:
        """The tally of the top k."""
        return self._tally(self.own_TE)

    @cached_property
    def recorded(self) -> int:
        """Assignments that the model made."""
        return int(np.count_nonzero(self.model_TE))

    def tally(self, chosen_TE: np.ndarray) -> tuple[np.ndarray, float, int, int]:
        """Of what an algorithm chose: the load of each expert, int32 [E]; the probability mass; how
        many choices are the model's; tokens without any."""
        return self.own if chosen_TE is self.own_TE else self._tally(chosen_TE)

    def _tally(self, chosen_TE: np.ndarray) -> tuple[np.ndarray, float, int, int]:
        load_E, mass_E = np.zeros(chosen_TE.shape[1], np.int32), np.zeros(chosen_TE.shape[1])
        of = np.ascontiguousarray(chosen_TE), self.share_TE, self.model_TE
        agreed, unrouted = kernels.tally(*of, load_E, mass_E)
        return load_E, float(mass_E.sum()), int(agreed), int(unrouted)

    def part(self, at: slice | np.ndarray, **changed: Any) -> RouterScores:
        """Some of the tokens, with what is computed for them already."""
        part, of = replace(self, **changed), vars(self).items()
        vars(part).update({name: of_T[at] for name, of_T in of if isinstance(of_T, np.ndarray)})
        return part


State = dict[str, np.ndarray]  # what an algorithm that learns has learnt
Choose = Callable[[RouterScores, float, State], np.ndarray]


@dataclass(frozen=True)
class Algorithm:
    """A registered routing algorithm.

    leaks: how the experts of a token depend on later tokens; "" where they do not.
    setting: the parameter that it is run with several values of, if any.
    blind: it looks at token ids at most.
    prepare: computes the initial state of an algorithm that learns, from tokens sampled from the
    first shard."""

    name: str
    choose: Choose
    use_when: str
    leaks: str = ""
    setting: str = ""
    prepare: Callable[[RouterScores], State] | None = None
    blind: bool = False


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(name: str, use_when: str, **how: Any) -> Callable[[Choose], Choose]:
    """Registers a function of (batch, value of its setting, state); `how`: fields of Algorithm."""

    def register(function: Choose) -> Choose:
        ALGORITHMS[name] = Algorithm(name, function, use_when, **how)
        return function

    return register


def largest(
    values_TE: np.ndarray,
    k: int,
    add_E: float | np.ndarray = 0.0,
    room: int = 2**31 - 1,
    guess: float | np.ndarray = 0.0,
) -> np.ndarray:
    """The k largest of values + add_E of each row; ties go to the lowest id. `room`: rows, in
    order, that take a column; then it is full. `guess`: about the k-th largest. bool [T, E]"""
    (T, E), kind = values_TE.shape, values_TE.dtype
    add_E, room_E = np.full(E, add_E, kind), np.full(E, room, np.int32)
    guess_T, chosen_TE = np.full(T, guess, kind), np.empty((T, E), bool)
    once = np.arange(T), np.ones(T, np.int32)
    kernels.choose_largest(values_TE, *once, k, add_E, room_E, guess_T, chosen_TE)
    return chosen_TE


def reaching(values_TE: np.ndarray, k_T: np.ndarray, kth_T: np.ndarray) -> np.ndarray:
    """The k largest of each row, where the k-th largest is known. Ties as above. bool [T, E]"""
    made = np.empty(values_TE.shape, bool)
    kernels.choose_reaching(values_TE, k_T, np.ascontiguousarray(kth_T), made)
    return made


@algorithm("as recorded", "the model's own routing: the baseline")
def as_recorded(batch: RouterScores, value: float, state: State) -> np.ndarray:
    return batch.model_TE


@algorithm(
    "top-k", "the usual choice; balancing is left to an auxiliary loss in training", setting="top_k"
)
def top_k(batch: RouterScores, value: float, state: State) -> np.ndarray:
    return batch.own_TE if value == batch.k else batch.top(int(value))


@algorithm(
    "top-p",
    "easy tokens should use fewer experts, and the inference engine supports a varying number",
    setting="top_p",
)
def top_p(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """The fewest experts whose shares sum to at least p (Huang et al. 2024, arXiv:2403.07652)."""
    fewest = kernels.fewest(batch.sorted_TE, batch.total_T1[:, 0], value - 1e-6)
    return reaching(batch.share_TE, *fewest)


@algorithm(
    "expert choice",
    "encoders, which see the whole text; load is even, but some tokens may get no expert",
    leaks="each expert chooses among the tokens of the whole batch",
)
def expert_choice(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Each expert takes the T·k/E tokens with its highest scores (Zhou et al. 2022,
    arXiv:2202.09368)."""
    T, E = batch.scores_TE.shape
    even = min(-(-T * batch.k // E), T)  # its assignments if load were even, rounded up
    scores_ET, chosen_TE = np.empty((E, T), batch.scores_TE.dtype), np.empty((T, E), bool)
    kernels.transpose(batch.scores_TE, scores_ET)
    scores_ET.partition(T - even, axis=1)
    kth_E = scores_ET[:, -even]
    room_E = even - np.count_nonzero(scores_ET[:, -even:] > kth_E[:, None], axis=1)
    kernels.choose_of_columns(batch.scores_TE, kth_E.copy(), room_E, chosen_TE)
    return chosen_TE


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
    room = expert_capacity(value, T, batch.k, E)
    return largest(batch.scores_TE, batch.k, room=room, guess=batch.sorted_TE[:, -batch.k])


@lru_cache(maxsize=2)
def _rounds(T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each update of a bias that is fitted, BIAS_TOKENS of the T tokens at random, by number:
    where they start, which tokens, how often each."""
    rng, every = np.random.default_rng(SEED), np.ones(T, np.int32)
    times_RT = [
        np.bincount(rng.integers(T, size=BIAS_TOKENS), minlength=T) if T > BIAS_TOKENS else every
        for _ in range(WARM_UP)
    ]
    drawn = [np.flatnonzero(times_T) for times_T in times_RT]
    start_R = np.cumsum([0, *map(len, drawn)])
    times_N = [times_T[of] for times_T, of in zip(times_RT, drawn, strict=True)]
    return start_R, np.concatenate(drawn), np.concatenate(times_N, dtype=np.int32)


def _fitted_bias(sample: RouterScores) -> State:
    """A bias as after training: updated after each of WARM_UP random batches, with a decaying step
    size."""
    rounds = *_rounds(len(sample.scores_TE)), np.geomspace(FIRST_RATE, BIAS_RATE, WARM_UP)
    bias_E = kernels.fit_bias(sample.scores_TE, sample.k, *rounds)
    return {"bias_E": bias_E, "load_E": np.zeros(len(bias_E), np.int64)}


@algorithm(
    "loss-free bias",
    "training: even load without the gradient of an auxiliary loss",
    prepare=_fitted_bias,
)
def loss_free(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Top-k of scores + bias. The bias affects the selection only, not the gate weights. It is
    updated after every BIAS_TOKENS tokens, as after a training batch: b += u · sign(mean − load)
    (Wang et al. 2024, arXiv:2408.15664)."""
    chosen_TE = largest(batch.scores_TE, batch.k, state["bias_E"])
    state["load_E"] += chosen_TE.sum(0)
    if state["load_E"].sum() >= BIAS_TOKENS * batch.k:
        kernels.step_bias(state["bias_E"], state["load_E"], BIAS_RATE)
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
    if len(batch.logits_TE) == 1:  # its plan is even, whatever the logits
        return batch.own_TE
    # what no token is near would round to 0; an expert without any finite logit stays out
    price_E = np.maximum(batch.below_TE.max(0), -1e6)
    plan_TE = batch.below_TE - price_E
    np.exp(plan_TE, out=plan_TE)
    moved_E, even = -price_E.astype(np.float64), len(plan_TE) / plan_TE.shape[1]
    for _ in range(100):
        sum_E = kernels.plan_sums(plan_TE, np.exp(-moved_E))
        before_E, moved_E = moved_E, np.log(np.maximum(sum_E / even, 1e-300))
        if np.abs(moved_E - before_E).max() < 1e-4:
            break
    return largest(batch.logits_TE.astype(np.float64), batch.k, -(price_E + moved_E))


@algorithm(
    "hash",
    "a baseline without a router: experts by token id alone, whatever the context",
    blind=True,
)
def hash_layer(batch: RouterScores, value: float, state: State) -> np.ndarray:
    """Experts are a fixed function of the token id (Roller et al. 2021, arXiv:2106.04426): those
    with the k highest hashes of (id, expert). A token without an id in the trace gets none."""
    E = batch.model_TE.shape[1]
    id_U, id_of_T = np.unique(batch.token_id_T, return_inverse=True)
    mixed = (
        id_U.astype(np.uint64)[:, None] * np.uint64(E)
        + np.arange(E, dtype=np.uint64)
        + np.uint64(SEED)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    # as many bits as a float64 holds, below 1
    chosen_UE = largest((mixed >> np.uint64(11)) * 2.0**-53, batch.k) & (id_U >= 0)[:, None]
    return chosen_UE[id_of_T]


@algorithm("random", "never: experts uniformly at random, a lower bound for the others", blind=True)
def random(batch: RouterScores, value: float, state: State) -> np.ndarray:
    drawn_TE = np.random.default_rng([SEED, batch.number]).random(batch.model_TE.shape)
    return largest(drawn_TE, batch.k)
