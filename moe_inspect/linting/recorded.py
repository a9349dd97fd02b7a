"""Routes as someone returned them, not checked yet, and what is found in them.

T tokens, L layers, K slots, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from moe_inspect.linting.kinds import KINDS
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import plural, ranges
from moe_inspect.trace.runs import run_edges

# Of all findings that are not certain, in one recording: 1 of 10,000 right ones may get any. Each
# kind has an equal part, and divides it among the tests that it makes.
LEVEL = 1e-4 / 12
LEAST = 1e-99  # p-values below are said to be below


@dataclass(frozen=True)
class Recorded:
    """slots_KTL: integers, an array [T, L] per slot, −1 where it routed nowhere. layers: the number
    of each. token_id_T: −1 where unknown. begin_S: where each run of consecutive tokens begins.
    weights_KTL: gate weights. by_weight: whether slot 0 is said to be the first choice; None where
    nothing is said. config: the model's."""

    slots_KTL: np.ndarray
    experts: int
    layers: Sequence[int]
    token_id_T: np.ndarray
    begin_S: np.ndarray
    weights_KTL: np.ndarray | None = None
    by_weight: bool | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def K(self) -> int:
        return self.slots_KTL.shape[0]

    @property
    def T(self) -> int:
        return self.slots_KTL.shape[1]

    @property
    def L(self) -> int:
        return self.slots_KTL.shape[2]

    @property
    def end_S(self) -> np.ndarray:
        """Where each sequence ends."""
        return np.append(self.begin_S[1:], self.T)

    @cached_property
    def sequence_T(self) -> np.ndarray:
        """The sequence of each token, from 0."""
        return np.repeat(np.arange(len(self.begin_S)), self.end_S - self.begin_S)

    def kept(self, which_T: np.ndarray) -> Recorded:
        """Only these tokens. bool [T]"""
        if which_T.all():
            return self
        at = np.flatnonzero(which_T)
        # what is left out parts a sequence
        begin_S = run_edges(self.sequence_T[at], at - np.arange(len(at)))[:-1]
        weights = None if self.weights_KTL is None else self.weights_KTL[:, which_T]
        return replace(
            self,
            slots_KTL=self.slots_KTL[:, which_T],
            token_id_T=self.token_id_T[which_T],
            begin_S=begin_S,
            weights_KTL=weights,
        )

    def without_layers(self, left_L: np.ndarray) -> Recorded:
        if not left_L.any():
            return self
        weights = None if self.weights_KTL is None else self.weights_KTL[..., ~left_L]
        layers = [n for n, left in zip(self.layers, left_L, strict=True) if not left]
        slots_KTL = np.ascontiguousarray(self.slots_KTL[..., ~left_L])
        return replace(self, slots_KTL=slots_KTL, weights_KTL=weights, layers=layers)

    def where(self, found_T: np.ndarray) -> str:
        """ "37 of 400 tokens, the first in sequence 2 at token 5": bool [T]."""
        n, first = int(found_T.sum()), int(found_T.argmax())
        if n == self.T:
            return f"all {plural(n, 'token')}"
        s = int(self.sequence_T[first])
        of = f" of sequence {s}" if len(self.begin_S) > 1 else ""
        at = f"token {first - int(self.begin_S[s])}{of}"
        many = f"{n:,} of {plural(self.T, 'token')}"
        return f"{many}, {at}" if n == 1 else f"{many}, from {at} on"

    def numbers(self, at: np.ndarray) -> list[int]:
        """Of these layers. at: int [N], or bool [L]."""
        of_L = np.array(self.layers)
        return of_L[at].tolist()

    def named(self, at: np.ndarray) -> str:
        """ "layers 1-3" """
        numbers = self.numbers(at)
        return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def found(kind: str, what: str, p: float | None = None, **values: object) -> Finding:
    """A finding: what was seen and where; how sure (without a p-value: no router does that); which
    published bugs look like it; what mends it."""
    of = KINDS[kind]
    sure = "Certain."
    if p is not None:
        sure = f"By chance: p = {p:.0e}." if p > LEAST else f"By chance: p < {LEAST:.0e}."
    known = f"Known: {', '.join(of.bugs)}." if of.bugs else ""
    text = " ".join(part for part in (what, sure, of.means, known, of.mend) if part)
    values |= {"p": 0.0 if p is None else max(p, LEAST), "certain": p is None}
    values |= {"known": list(of.bugs), "option": of.option or None}
    return finding(kind, of.severity, text, None, **values)
