"""Routes as someone returned them, and the checks of their rows alone: what no router does, or
hardly ever by chance, or not by the model's config. In the order in which the checks are made: what
one has found is left out by those that follow.

T tokens, N of them that are looked at, L layers, K slots, E experts, D distinct rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import comb, lgamma
from typing import Any

import numpy as np

from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.checking.kinds import KINDS
from moe_inspect.importers.routed import repeated
from moe_inspect.model.config import groups_of
from moe_inspect.model.families import language_config
from moe_inspect.reporting.verdict.data_checks import silent_ranks
from moe_inspect.reporting.verdict.findings import Finding, finding
from moe_inspect.text import plural, ranges
from moe_inspect.trace.shard import run_edges

# Of all findings that are not certain, in one recording: 1 of 10,000 right ones may get any. Each
# kind has an equal part, and divides it among the tests that it makes.
LEVEL = 1e-4 / 12
LEAST = 1e-99  # p-values below are said to be below
FEW = 2048  # tokens on which loads are counted
SEEN = 4  # times that a row was there before, and distances, that are looked at
WARM_UP = 1000  # identical rows in a row, more than any real text has
MOST_RUN = 2**14  # tokens on which is judged how long routers go on to choose alike
SHORT = 8  # tokens in a row from which rows that were there before are looked at
EVEN_FROM = 16  # assignments per expert from which a load may be called too even
SHARE = 0.01  # of a layer's decisions: fewer are left to rounding, and to ties
APART = 1e-2  # of a weight, or of a sum, which half precision does not make
Left = np.ndarray  # bool [T] or [L]: what a check has found, for the next to leave out
NOTHING = np.zeros(0, bool)


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
    # of the whole recording, where these are some tokens of it: which they are, and its begin_S
    whole: tuple[np.ndarray, np.ndarray] | None = None

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

    def select(self, which_T: np.ndarray) -> Recorded:
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
            whole=(at, self.begin_S) if self.whole is None else (self.whole[0][at], self.whole[1]),
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
        s, position, sequences = self.place(first)
        of = f" of sequence {s}" if sequences > 1 else ""
        at = f"token {position}{of}"
        many = f"{n:,} of {plural(self.T, 'token')}"
        return f"{many}, {at}" if n == 1 else f"{many}, from {at} on"

    def place(self, t: int) -> tuple[int, int, int]:
        """The sequence of a token, where in it the token is, and how many sequences there are: in
        the whole recording, as tokens that are left out are still there for its user."""
        token_T, begin_S = self.whole or (np.arange(self.T), self.begin_S)
        s = int(np.searchsorted(begin_S, token_T[t], "right")) - 1
        return s, int(token_T[t] - begin_S[s]), len(begin_S)

    def numbers(self, at: np.ndarray) -> list[int]:
        """Of these layers. at: int [N], or bool [L]."""
        of_L = np.array(self.layers)
        return of_L[at].tolist()

    def named(self, at: np.ndarray) -> str:
        """ "layers 1-3" """
        numbers = self.numbers(at)
        return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def found(
    kind: str, what: str, p: float | None = None, where: str = "", **values: object
) -> Finding:
    """A finding: what was seen; how sure (without a p-value: no router does that); where, "" for
    everywhere; which published bugs look like it; what mends it."""
    of = KINDS[kind]
    sure = "Certain."
    if p is not None:
        sure = f"By chance: p = {p:.0e}." if p > LEAST else f"By chance: p < {LEAST:.0e}."
    known = f"Known: {', '.join(of.bugs)}." if of.bugs else ""
    text = " ".join(part for part in (what, sure, of.means, known, of.mend) if part)
    values |= {"where": where, "p": 0.0 if p is None else max(p, LEAST), "certain": p is None}
    values |= {"known": list(of.bugs), "option": of.option or None}
    return finding(kind, of.severity, text, None, **values)


def of_pattern(r: Recorded, at_N: np.ndarray, row_NK: np.ndarray) -> Iterator[tuple[Finding, Left]]:
    """Tokens whose slots are the same in every layer. at_N: which tokens; row_NK: their slots."""
    in_all_T = np.zeros(r.T, bool)
    in_all_T[at_N] = True
    patterns, which_N, n_of = np.unique(row_NK, axis=0, return_inverse=True, return_counts=True)
    which_N = which_N.reshape(-1)
    for i in np.argsort(-n_of).tolist():
        row_K, n = patterns[i], int(n_of[i])
        constant, value = bool((row_K == row_K[0]).all()), int(row_K[0])
        found_T = np.zeros(r.T, bool)
        found_T[at_N[which_N == i]] = True
        if constant and value == -1:
            # where slots are empty elsewhere too, the model drops or skips
            if not (r.slots_KTL[:, ~in_all_T] == -1).any():
                where = f"{r.where(found_T)}{_where_in_sequences(r, found_T)}"
                what = f"No expert in any slot of any layer: {where}."
                yield found("not_recorded", what, where=where, tokens=n), found_T
            continue
        p, kind = None, "zero_filled" if constant and value == 0 else "constant_filled"
        if r.experts <= r.K and (not constant or r.K == 1):
            continue  # there is nothing else to choose
        if not constant or r.K == 1:
            # as often as layers that choose without each other have it
            other_L = (r.slots_KTL[:, ~in_all_T] == row_K[:, None, None]).all(0).sum(0)
            share_L = (other_L + 1) / (r.T + r.experts)
            p = float(r.T * np.exp(np.log(share_L).sum())) * len(patterns)
            if (row_K == np.arange(r.K)).all():
                by_number = _places(r, found_T) * float(np.exp(r.L * _log_first_experts(r)))
                p = 4 * min(p, by_number)  # corrected for trying four p-values
            # layers that often have the same slots do not choose independently
            if p >= LEVEL or 2 * n < len(at_N):
                continue
        slots = f"expert {value} in every slot" if constant else f"experts {row_K.tolist()}"
        ends = _where_in_sequences(r, found_T)
        what = f"{slots.capitalize()} of every layer: {r.where(found_T)}{ends}."
        yield found(kind, what, p, r.where(found_T), tokens=n, row=row_K.tolist()), found_T


def _log_first_experts(r: Recorded) -> float:
    """Experts are numbered by chance: ln of how likely K of them are 0 to K−1, in this order."""
    return lgamma(r.experts - r.K + 1) - lgamma(r.experts + 1)


def _ends(r: Recorded, found_T: np.ndarray) -> tuple[int, int]:
    """In how many sequences the first token is found, and the last."""
    return int(found_T[r.begin_S].sum()), int(found_T[r.end_S - 1].sum())


def _places(r: Recorded, found_T: np.ndarray) -> int:
    """How many places the pattern could have been found in: 2 where it is at every beginning or at
    every end of the sequences, 2 S where it is at one of them, else T."""
    S, ends = len(r.begin_S), _ends(r, found_T)
    return 2 if S in ends else min(2 * S, r.T) if any(ends) else r.T


def _where_in_sequences(r: Recorded, found_T: np.ndarray) -> str:
    if found_T.all():
        return ""
    said = [
        f"at the {end} of {plural(n, 'sequence')}"
        for end, n in zip(("beginning", "end"), _ends(r, found_T), strict=True)
        if n
    ]
    return f", {' and '.join(said)}" if said else ""


def filled(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Memory that was set to a number, or padding."""
    slots, K, L = r.slots_KTL, r.K, r.L
    if L > 1:
        at = np.flatnonzero((slots[:, :, 0] == slots[:, :, -1]).all(0))
        at = at[(slots[:, at] == slots[:, at, :1]).all((0, 2))]
    else:
        at = np.flatnonzero((slots[:, :, 0] == slots[:1, :, 0]).all(0) & (K > 1))
    if len(at):
        yield from of_pattern(r, at, slots[:, at, 0].T)


def out_of_range(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    slots, E = r.slots_KTL, r.experts
    low, high = int(slots.min()), int(slots.max())
    if low >= -1 and high < E:
        return
    bad_TL: np.ndarray = np.any((slots < -1) | (slots >= E), axis=0)
    ids, times = np.unique(slots[(slots < -1) | (slots >= E)], return_counts=True)
    replicas = low >= -1 and high < 2 * E and high - E + 1 <= 2 * len(ids) and np.median(times) > 1
    bad_T: np.ndarray = np.any(bad_TL, axis=1)
    where = f"{r.where(bad_T)}, in {r.named(np.any(bad_TL, axis=0))}"
    values = {"assignments": int(times.sum()), "lowest": low, "highest": high}
    what = f"Ids from {min(low, 0)} to {high} of {E} experts: {where}."
    yield found("physical_ids" if replicas else "out_of_range", what, where=where, **values), bad_T


def layers_filled(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Layers whose slots all hold one number, or all the experts 0 … K−1."""
    slots, K, E = r.slots_KTL, r.K, r.experts
    constant_L = (slots == slots[:1, :1]).all((0, 1)) if K > 1 else np.zeros(r.L, bool)
    counted_L = (slots == np.arange(K)[:, None, None]).all((0, 1)) & ~constant_L
    if constant_L.any():
        named = r.named(constant_L)
        values = sorted({int(slots[0, 0, n]) for n in np.flatnonzero(constant_L).tolist()})
        of = "no expert" if values == [-1] else f"expert {', '.join(map(str, values))}"
        what = f"All tokens have {of} in every slot of {named}."
        yield found("layers_filled", what, where=named, layers=r.numbers(constant_L)), constant_L
    # how often a layer that uses only K of them has these
    p = r.L * float(np.exp(_log_first_experts(r))) if K <= E else 1.0
    if counted_L.any() and r.T >= SHORT and p < LEVEL:
        named = r.named(counted_L)
        what = f"All tokens have experts 0 to {K - 1}, in this order, in {named}."
        yield found("constant_filled", what, p, named, layers=r.numbers(counted_L)), counted_L


def twice(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    if r.K < 2 or not (twice_TL := repeated([*r.slots_KTL])).any():
        return
    twice_T: np.ndarray = np.any(twice_TL, axis=1)
    n = int(twice_TL.sum())
    where = f"{r.where(twice_T)}, in {r.named(np.any(twice_TL, axis=0))}"
    what = f"An expert twice in {plural(n, 'decision')}: {where}."
    yield found("twice", what, where=where, decisions=n), twice_T


def repeated_rows(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Runs of the same row in every layer over tokens with other ids; of unknown ids, runs that no
    text makes."""
    slots, ids_T, same_T = r.slots_KTL, r.token_id_T, np.zeros(r.T, bool)
    at = 1 + np.flatnonzero((slots[:, 1:, -1] == slots[:, :-1, -1]).all(0))
    same_T[at] = _same(slots[:, at], slots[:, at - 1])
    known = bool((ids_T >= 0).any())
    other_T = np.zeros(r.T, bool)
    other_T[1:] = (ids_T[1:] != ids_T[:-1]) & (ids_T[1:] >= 0) if known else True
    found_T, longest, p = _runs(r, same_T, other_T, 1)
    if p >= LEVEL or longest < (0 if known else WARM_UP):
        return
    what = (
        f"The same experts in every layer from token to token, up to {longest + 1:,} in a row: "
        f"{r.where(found_T)}."
    )
    values = {"tokens": int(found_T.sum()), "longest": longest + 1}
    yield found("repeated_rows", what, p, r.where(found_T), **values), found_T


def repeated_block(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """A stretch of rows that was there before, where the text is another. Without token ids it
    cannot be told from the same text again."""
    slots, ids_T, T = r.slots_KTL, r.token_id_T, r.T
    if T < 2 * SHORT or not (ids_T >= 0).any():
        return
    key_T = np.zeros(T, np.uint64)
    for n in np.unique(np.linspace(0, r.L - 1, 4).astype(int)).tolist():
        for k in range(r.K):
            key_T = key_T * np.uint64(0x9E3779B97F4A7C15) + slots[k, :, n].astype(np.uint64)
    order = np.argsort(key_T, kind="stable")
    of, backs_N = key_T[order], [np.zeros(0, int)]
    for n in range(1, SEEN + 1):  # how far back the same row is, at another id
        again = np.flatnonzero(of[n:] == of[:-n])
        later, before = order[again + n], order[again]
        backs_N.append((later - before)[(ids_T[later] != ids_T[before]) & (ids_T[later] >= 0)])
    times = np.bincount(np.concatenate(backs_N), minlength=2)
    times[1] = 0
    best = 1.0, 0, 0, NOTHING
    for back in np.argsort(-times, kind="stable")[:SEEN].tolist():
        if times[back] < SHORT:
            break
        same_T, other_T = np.zeros(T, bool), ids_T >= 0
        at = back + np.flatnonzero(key_T[back:] == key_T[:-back])
        same_T[at] = _same(slots[:, at], slots[:, at - back])
        other_T[back:] &= ids_T[back:] != ids_T[:-back]
        found_T, longest, p = _runs(r, same_T, other_T, back)
        best = min(best, (p * T, longest, back, found_T), key=lambda one: one[0])
    p, longest, back, found_T = best
    if p < LEVEL:
        what = (
            f"Up to {longest:,} tokens in a row have the experts that other tokens had before, in "
            f"every layer: {r.where(found_T)}, as {back:,} tokens before."
        )
        values = {"tokens": int(found_T.sum()), "longest": longest}
        yield found("repeated_block", what, p, r.where(found_T), **values), found_T


def _same(a_KNL: np.ndarray, b_KNL: np.ndarray) -> np.ndarray:
    """Which decisions are the same in every layer, empty slots apart: tokens that a capacity drops
    are alike. bool [N]"""
    return ((a_KNL == b_KNL) & (a_KNL >= 0)).all((0, 2))


def _runs(
    r: Recorded, same_T: np.ndarray, other_T: np.ndarray, back: int
) -> tuple[np.ndarray, int, float]:
    """The tokens of the longest runs that have the `same` row as so many tokens back; the most
    of a run with another id, and how likely that is by chance. A router that chooses alike for
    a while goes on to do so: as often as it does outside of these runs, or where that is hardly
    seen, as the layer that does least."""
    run_T = np.cumsum(~same_T)
    size_R = np.bincount(run_T, same_T & other_T).astype(int)
    longest = int(size_R.max(initial=0))
    # a few layers that send nearly all tokens to the same experts may have collapsed
    if longest < SHORT or (r.L < 4 and same_T.sum() > 0.9 * r.T):
        return same_T, longest, 1.0
    many_T = (size_R >= longest / 2)[run_T]
    judged_T = other_T & ~many_T
    often = ((same_T & judged_T).sum() + 1) / (judged_T.sum() + 2)
    after_T = judged_T[1:] & (same_T & ~many_T)[:-1]
    goes_on, n = int((after_T & same_T[1:]).sum()), int(after_T.sum())
    part = slice(back, back + MOST_RUN)
    alike_TL = (r.slots_KTL[:, part] == r.slots_KTL[:, : -back or None][:, :MOST_RUN]).all(0)
    judged_T = judged_T[part][1:]
    both_L = (alike_TL[1:] & alike_TL[:-1])[judged_T].sum(0)
    least = ((both_L + 1) / (alike_TL[:-1][judged_T].sum(0) + 2)).min()
    share = max(often, (goes_on + 2 * least) / (n + 2))
    return same_T & many_T, longest, float(r.T * np.exp(longest * np.log(share)))


def layer_copied(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Layers with the same row at every token. By chance: as often as two tokens of the layer have
    the same row, for as many tokens as there are different rows."""
    seen, copies, worst = dict[bytes, int](), list[tuple[int, int]](), 0.0
    slots = r.slots_KTL
    for n in range(r.L):
        of = seen.setdefault(slots[:, :64, n].tobytes(), n)
        if of == n or not np.array_equal(slots[:, :, of], slots[:, :, n]):
            continue
        n_D = np.unique(slots[:, :, n], axis=1, return_counts=True)[1]
        share = float(((n_D / r.T) ** 2).sum())
        p = comb(r.L, 2) * float(np.exp(len(n_D) * np.log(share)))
        if p < LEVEL:
            copies, worst = [*copies, (of, n)], max(worst, p)
    if not copies:
        return
    said = [f"layer {r.layers[n]} equals layer {r.layers[of]}" for of, n in copies]
    left_L = np.isin(np.arange(r.L), [n for _, n in copies])
    what = f"At every token {', '.join(said)}."
    yield found("layer_copied", what, worst, r.named(left_L), layers=r.numbers(left_L)), left_L


def sorted_ids(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Decisions that all ascend. Experts are numbered by chance: decisions that share no expert
    ascend by 1 ÷ K! each; and n experts in a row, of which each is together with the next
    somewhere, have one order of n!."""
    slots, K = r.slots_KTL, r.K
    if K < 2 or r.by_weight is False or not (slots[1:] > slots[:-1]).all():
        return
    log_p = 0.0
    for n in range(r.L):
        of = slots[:, :FEW, n]
        apart, row_DK = 0, np.unique(of.T, axis=0)
        while len(row_DK):
            apart += 1
            row_DK = row_DK[~np.isin(row_DK, row_DK[0]).any(1)]
        next_E = np.isin(np.arange(-1, r.experts), of[:-1][of[1:] - of[:-1] == 1])
        chains = np.diff(np.flatnonzero(~np.append(next_E, False)))
        log_p -= max(apart * lgamma(K + 1), sum(lgamma(c + 1) for c in chains.tolist()))
    p = float(np.exp(log_p))
    if p < LEVEL:
        what = f"The {K} ids ascend in all {r.T * r.L:,} decisions."
        yield found("sorted_ids", what, p), NOTHING


def loads(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Experts without load that fill ranks, and loads more even than by chance: tokens that choose
    alike make a load less even, never more."""
    E, K = r.experts, r.K
    every = r.slots_KTL[:, :: -(-r.T // FEW) or 1]
    load_LE = np.zeros((r.L, E), int)
    for n in range(r.L):
        of = every[:, :, n]
        load_LE[n] = np.bincount(of[of >= 0].ravel(), minlength=E)
    load_LE = load_LE[load_LE.any(1)]
    if not len(load_LE):
        return
    for missing in missing_ranks(load_LE, K):
        yield missing, NOTHING
    mean_L1 = load_LE.mean(1, keepdims=True)
    if K < E and (mean_L1 >= EVEN_FROM).all():
        spread_L = ((load_LE - mean_L1) ** 2).sum(1) / (mean_L1[:, 0] * (1 - K / E)) * (E - 1) / E
        p_L = unc.special("gammainc")((E - 1) / 2, spread_L / 2) * r.L
        if (p_L < LEVEL).any():
            even = np.flatnonzero(p_L < LEVEL)
            n = int(p_L.argmin())
            what = (
                f"In {r.named(even)} the load is more even than independent choices: from "
                f"{load_LE[n].min():,} to {load_LE[n].max():,} assignments per expert, of "
                f"{mean_L1[n, 0]:,.0f} on average (layer {r.layers[n]})."
            )
            yield found("even_load", what, float(p_L.min()), r.named(even)), NOTHING


def missing_ranks(load_LE: np.ndarray, K: int) -> Iterator[Finding]:
    """Experts without load in any layer that fill ranks."""
    few = all((load_E > 0).sum() <= K for load_E in load_LE)
    silent_R, p = silent_ranks(load_LE == 0)
    if silent_R.any() and p < LEVEL and not few:
        n, ranks, E = int((~silent_R).sum()), len(silent_R), load_LE.shape[1]
        seen = np.flatnonzero(load_LE.any(0))
        what = (
            f"No layer uses other experts than {seen[0]}-{seen[-1]} of {E}: {n} of {ranks} ranks."
        )
        yield found("missing_ranks", what, p, ranks_seen=n, ranks=ranks)


# --- what the config says: groups, and gate weights


def groups(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    """Decisions with experts of more groups than a token goes to."""
    parts, most, _ = groups_of(r.config)
    if parts < 2 or most >= min(parts, r.K) or r.experts % parts:
        return
    group_KTL = np.sort(np.where(r.slots_KTL < 0, r.slots_KTL[:1], r.slots_KTL), axis=0)
    group_KTL //= r.experts // parts
    number_TL = 1 + (group_KTL[1:] != group_KTL[:-1]).sum(0)
    wrong_L = (number_TL > most).mean(0)
    if (at := np.flatnonzero(wrong_L > SHARE)).size:
        what = (
            f"In {r.named(at)} up to {wrong_L.max():.0%} of the decisions have experts of more "
            f"than {most} of {parts} groups, in one of {number_TL.max()}."
        )
        values = {"share": float(wrong_L.max()), "groups": parts, "allowed": most}
        yield found("groups", what, where=r.named(at), **values), NOTHING


def weights(r: Recorded) -> Iterator[tuple[Finding, Left]]:
    w = r.weights_KTL
    if w is None or not r.T:
        return
    w = np.where(r.slots_KTL < 0, 0, w)
    config = language_config(dict(r.config))
    stated, scale = config.get("norm_topk_prob"), config.get("routed_scaling_factor")
    # where it says no, the k best may still be all that the softmax is of
    if stated is not True or r.K < 2:
        return
    full_TL = (r.slots_KTL >= 0).all(0)
    sum_TL = w.sum(0)
    sums = {1.0, float(scale)} if isinstance(scale, int | float) else {1.0}
    is_one_TL = np.logical_or.reduce([np.abs(sum_TL - s) <= APART * s for s in sums])
    share_L = (is_one_TL & full_TL).sum(0) / np.maximum(full_TL.sum(0), 1)
    mean = float(sum_TL[full_TL].mean()) if full_TL.any() else 1.0
    if (at := np.flatnonzero((share_L < 1 - SHARE) & full_TL.any(0))).size:
        what = (
            f"The config says that weights are normalised (norm_topk_prob), and in {r.named(at)} "
            f"they sum to {mean:.3g} on average, to {' or '.join(f'{s:g}' for s in sorted(sums))} "
            f"in {share_L[at].min():.0%} of the decisions."
        )
        yield found("weight_sums", what, where=r.named(at), sum=mean), NOTHING
