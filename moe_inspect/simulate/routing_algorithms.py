"""Routing algorithms. Each is a function from the logits of one batch to the experts of each token:
bool [T, E].

The decorator `algorithm` registers one in ALGORITHMS, from which `simulate routing` and the tests
take them. T tokens of a batch, in order, E experts, k choices of the model's own router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.simulate import kernels_numba as kernels
from moe_inspect.simulate.shards import expert_capacity


@dataclass(frozen=True)
class RouterScores:
    """A batch of tokens, with what the model's router computed for them.

    model_TE: bool, the experts that the model chose. k: experts per token. scoring: the router's
    activation."""

    logits_TE: np.ndarray
    model_TE: np.ndarray
    k: int
    scoring: str

    @cached_property
    def below_TE(self) -> np.ndarray:
        """How far the logits are below each token's highest. float32"""
        logits_TE = self.logits_TE.astype(np.float32)
        return logits_TE - logits_TE.max(1, keepdims=True)

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

    def part(self, at: slice) -> RouterScores:
        """Some of the tokens, with what is computed for them already."""
        part, of = replace(self), vars(self).items()
        vars(part).update({name: of_T[at] for name, of_T in of if isinstance(of_T, np.ndarray)})
        return part


Choose = Callable[[RouterScores, float], np.ndarray]


@dataclass(frozen=True)
class Algorithm:
    """A registered routing algorithm.

    leaks: how the experts of a token depend on later tokens; "" where they do not.
    setting: the parameter that it is run with several values of, if any.
    source: the paper that describes it."""

    name: str
    choose: Choose
    use_when: str
    leaks: str = ""
    setting: str = ""
    source: str = ""


ALGORITHMS: dict[str, Algorithm] = {}


def algorithm(name: str, use_when: str, **how: Any) -> Callable[[Choose], Choose]:
    """Registers a function of (batch, value of its setting); `how`: fields of Algorithm."""

    def register(function: Choose) -> Choose:
        ALGORITHMS[name] = Algorithm(name, function, use_when, **how)
        return function

    return register


def largest(
    values_TE: np.ndarray, k: int, room: int = 2**31 - 1, guess: float | np.ndarray = 0.0
) -> np.ndarray:
    """The k largest values of each row; ties go to the lowest id. `room`: rows, in order, that take
    a column; then it is full. `guess`: about the k-th largest. bool [T, E]"""
    guess_T = np.full(len(values_TE), guess, values_TE.dtype)
    chosen_TE = np.empty(values_TE.shape, bool)
    kernels.choose_largest(values_TE, k, room, guess_T, chosen_TE)
    return chosen_TE


def reaching(values_TE: np.ndarray, k_T: np.ndarray, kth_T: np.ndarray) -> np.ndarray:
    """The k largest of each row, where the k-th largest is known. Ties as above. bool [T, E]"""
    made = np.empty(values_TE.shape, bool)
    kernels.choose_reaching(values_TE, k_T, np.ascontiguousarray(kth_T), made)
    return made


@algorithm("as recorded", "the model's own routing: the baseline")
def as_recorded(batch: RouterScores, value: float) -> np.ndarray:
    return batch.model_TE


@algorithm(
    "top-k",
    "the usual choice; balancing is left to an auxiliary loss in training",
    setting="top_k",
    source="arXiv:1701.06538",
)
def top_k(batch: RouterScores, value: float) -> np.ndarray:
    return batch.own_TE if value == batch.k else batch.top(int(value))


@algorithm(
    "top-p",
    "easy tokens should use fewer experts, and the inference engine supports a varying number",
    setting="top_p",
    source="arXiv:2403.07652",
)
def top_p(batch: RouterScores, value: float) -> np.ndarray:
    """The fewest experts whose shares sum to at least p (Huang et al. 2024)."""
    fewest = kernels.fewest(batch.sorted_TE, batch.total_T1[:, 0], value - 1e-6)
    return reaching(batch.share_TE, *fewest)


@algorithm(
    "expert choice",
    "encoders, which see the whole text; load is even, but some tokens may get no expert",
    leaks="each expert chooses among the tokens of the whole batch",
    source="arXiv:2202.09368",
)
def expert_choice(batch: RouterScores, value: float) -> np.ndarray:
    """Each expert takes the T·k/E tokens with its highest scores (Zhou et al. 2022)."""
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
    setting="capacity_factors",
    source="arXiv:2101.03961",
)
def next_best(batch: RouterScores, value: float) -> np.ndarray:
    """In order, each token takes its k best experts that are not yet full; nothing depends on later
    tokens (Fedus et al. 2021, appendix B: no token left behind)."""
    T, E = batch.scores_TE.shape
    room = expert_capacity(value, T, batch.k, E)
    return largest(batch.scores_TE, batch.k, room=room, guess=batch.sorted_TE[:, -batch.k])
