"""The requests: what engines have returned wrong experts for, each kind as a case of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

SEED = 0
SPECIAL = 5  # ids below this may end a text


@dataclass(frozen=True)
class Ask:
    """A request: a prompt, how many tokens at most, how many answers. salt: requests with the same
    one share a prefix cache. own_stop: it is asked again, to stop at the fifth token of its first
    answer. leaves: its client goes away before it is answered."""

    prompt: tuple[int, ...]
    most: int
    answers: int = 1
    temperature: float = 0.0
    salt: str = ""
    own_stop: bool = False
    leaves: bool = False


class Draw:
    """Random prompts of a vocabulary of V ids, of at most `longest` tokens with what follows."""

    def __init__(self, V: int, longest: int):
        self.random, self.V, self.longest = random.Random(SEED), V, longest

    def ask(self, length: int, most: int) -> Ask:
        first = min(SPECIAL, self.V - 1)
        return self.cut([self.random.randrange(first, self.V) for _ in range(length)], most)

    def cut(self, prompt: Sequence[int], most: int) -> Ask:
        most = min(most, self.longest - 1)
        return Ask(tuple(prompt[: self.longest - most]), most)


Rounds = list[list[Ask]]  # the requests of a round are sent at once, after those before it


def prefix(draw: Draw) -> Rounds:
    whole, more = draw.ask(200, 8), draw.ask(60, 8).prompt
    half = whole.prompt[: len(whole.prompt) // 2]
    prompts = (whole.prompt, whole.prompt, whole.prompt + more, half + more)
    return [[replace(draw.cut(prompt, 8), salt="shared")] for prompt in prompts]


def abort(draw: Draw) -> Rounds:
    left = [replace(draw.ask(100, 200), leaves=True) for _ in range(6)]
    return [[*left, draw.ask(40, 16)], [draw.ask(length, 16) for length in (9, 40, 130, 200)]]


# name → what it is, and its requests
CASES: Mapping[str, tuple[str, Callable[[Draw], Rounds]]] = {
    "prefill": (
        "prompts of 1 to 270 tokens, one after the other",
        lambda draw: [[draw.ask(length, 1)] for length in (1, 2, 7, 40, 130, 270)],
    ),
    "decode": (
        "32 tokens generated, one request after the other",
        lambda draw: [[draw.ask(length, 32)] for length in (1, 9, 33, 64)],
    ),
    "batch": (
        "16 requests at once",
        lambda draw: [[draw.ask(length, 16) for _ in range(4) for length in (1, 7, 40, 130)]],
    ),
    "chunks": (
        "4 prompts as long as the model takes, at once: prefilled in chunks",
        lambda draw: [[draw.ask(draw.longest, 8) for _ in range(4)]],
    ),
    "prefix": ("a prompt again, longer, and half of it: from a prefix cache", prefix),
    "answers": (
        "three sampled answers to each prompt (n = 3)",
        lambda draw: [[replace(draw.ask(n, 16), answers=3, temperature=1.0) for n in (9, 70)]],
    ),
    "many": (
        "32 requests of 200 tokens: some are preempted where the cache is small",
        lambda draw: [[draw.ask(100, 100) for _ in range(32)]],
    ),
    "repetition": (
        "a phrase again and again: drafts are accepted where it speculates",
        lambda draw: [[draw.cut(draw.ask(8, 48).prompt * 8, 48) for _ in range(4)]],
    ),
    "stop": (
        "answers that end early, at a stop token",
        lambda draw: [[replace(draw.ask(length, 16), own_stop=True)] for length in (9, 40, 130)],
    ),
    "abort": ("clients go away in the middle of an answer, others ask on", abort),
}
