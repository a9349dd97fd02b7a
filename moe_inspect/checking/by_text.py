"""What the text tells: two tokens with the same id choose more alike than others, and most alike at
the right place. So a shift, and a layer that is another's, show without a reference.

T tokens, N pairs of tokens with the same id, L layers, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moe_inspect.analysis.metrics.uncertainty import SEED
from moe_inspect.checking.rows import LEVEL, Recorded, found
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import join_first, plural

Pairs = tuple[np.ndarray, np.ndarray]  # int64 [N], twice
Known = tuple[Recorded, np.ndarray]  # and what is `usual` in it
NEAR = 8  # a shift by so many tokens is looked for in all pairs …
FAR = 512  # … and by so many in FEW_PAIRS of FEW_LAYERS, whose best shift is then judged by all
FEW_PAIRS, FEW_LAYERS = 256, 2
CONTEXT = 8  # tokens that make a repetition
BEFORE = 2  # so many earlier tokens with its id a token is paired with
MOST_PAIRS, MOST_LAYERS = 1024, 12
CELLS = 2**17  # pairs · shifts · layers that are compared at once
WINDOW, MOST_WINDOWS = 400, 256  # tokens of a sequence that are judged alone
DRAFT = (-2, -1, 1, 2)  # shifts of one layer


def same_id(id_T: np.ndarray, most: int) -> Pairs:
    """Tokens with the same id, each with up to BEFORE earlier ones; spread over them if many."""
    order = np.argsort(id_T, kind="stable")
    order = order[np.searchsorted(id_T[order], 0) :]
    of = id_T[order]
    at = [np.flatnonzero(of[back:] == of[:-back]) for back in range(1, BEFORE + 1)]
    a = np.concatenate([order[i] for i in at])
    b = np.concatenate([order[i + back] for back, i in enumerate(at, 1)])
    part = slice(None, None, -(-len(a) // most) or 1)
    return a[part], b[part]


def common(a_KX: np.ndarray, b_KX: np.ndarray) -> np.ndarray:
    """How many experts decisions have in common. int16 [X]"""
    both_X = np.zeros(a_KX.shape[1:], np.int16)
    for a_X in a_KX:
        for b_X in b_KX:
            both_X += a_X == b_X
    return both_X


def tail(gain_NX: np.ndarray, tried: int) -> np.ndarray:
    """P-values of sums over N above 0, the best of so many: where there is no gain, each is as
    likely as its opposite; Hoeffding's inequality bounds the sum of random signs. float64 [X]"""
    total_X = np.maximum(gain_NX.sum(0, dtype=float), 0)
    size_X = np.maximum((gain_NX.astype(float) ** 2).sum(0), 1e-9)
    return np.minimum(1.0, tried * np.exp(-(total_X**2) / size_X / 2))


def gains(r: Recorded, pairs: Pairs, shifts: Sequence[int], layers: list[int]) -> np.ndarray:
    """By how many experts more the pairs have in common so many tokens on, 0 where that is another
    sequence, of unknown ids, or of the same id twice: tokens that choose alike for their text.
    int16 [N, shifts, L]"""
    slots, s_T, (a, b) = r.slots_KTL[:, :, layers], r.sequence_T, pairs
    own_NL = common(slots[:, a], slots[:, b])
    gain_NSL = np.zeros((len(a), len(shifts), len(layers)), np.int16)
    at_once = max(1, CELLS // max(own_NL.size, 1))
    for first in range(0, len(shifts), at_once):
        part = slice(first, first + at_once)
        a_NS, b_NS = (x[:, None] + np.array(shifts[part]) for x in pairs)
        inside_NS = (np.minimum(a_NS, b_NS) >= 0) & (np.maximum(a_NS, b_NS) < r.T)
        a_NS, b_NS = np.where(inside_NS, a_NS, 0), np.where(inside_NS, b_NS, 0)
        inside_NS &= (s_T[a_NS] == s_T[a][:, None]) & (s_T[b_NS] == s_T[b][:, None])
        of_a_NS, of_b_NS = r.token_id_T[a_NS], r.token_id_T[b_NS]
        told_NS = inside_NS & (of_a_NS != of_b_NS) & (np.minimum(of_a_NS, of_b_NS) >= 0)
        moved = common(slots[:, a_NS], slots[:, b_NS]) - own_NL[:, None]
        gain_NSL[:, part] = moved * told_NS[..., None]
    return gain_NSL


def best_shift(r: Recorded, pairs: Pairs, far: int) -> tuple[float, int, int]:
    """Its p-value, the shift, and how many pairs tell."""
    layers = np.unique(np.linspace(0, r.L - 1, min(r.L, MOST_LAYERS)).astype(int)).tolist()
    tried = [s for s in range(-NEAR, NEAR + 1) if s]
    longest = int((r.end_S - r.begin_S).max())
    beyond = [s for s in range(-far, far + 1) if NEAR < abs(s) < longest - 1]
    number = len(tried) + len(beyond)
    if beyond:
        step = -(-len(pairs[0]) // FEW_PAIRS)
        few = pairs[0][::step], pairs[1][::step]
        scanned = gains(r, few, beyond, layers[:FEW_LAYERS]).sum(2)
        tried.append(beyond[int(tail(scanned, 1).argmin())])
    gain_NSL = gains(r, pairs, tried, layers)
    # early layers follow the text more, and are not always enough
    upto = sorted({1, (len(layers) + 1) // 2, len(layers)})
    gain_NSX = np.stack([gain_NSL[..., :n].sum(2) for n in upto], axis=2)
    p_SX = tail(gain_NSX, number * len(upto))
    i, x = np.unravel_index(p_SX.argmin(), p_SX.shape)
    return float(p_SX[i, x]), tried[i], int((gain_NSX[:, i, x] != 0).sum())


def shifts(r: Recorded) -> Iterator[Finding]:
    """Routes that belong to other tokens: of all, else of parts of sequences, else of a layer."""
    r = replace(r, token_id_T=_told_once(r))
    pairs = same_id(r.token_id_T, MOST_PAIRS)
    if not len(pairs[0]):
        return
    p, shift, n = best_shift(r, pairs, FAR)
    if p < LEVEL:
        yield _shifted(shift, "", p, n)
        return
    windows = [
        (begin, min(begin + WINDOW, end))
        for first, end in zip(r.begin_S.tolist(), r.end_S.tolist(), strict=True)
        for begin in range(first, max(end - WINDOW // 2, first + 1), WINDOW)
    ]
    windows = windows[:: -(-len(windows) // MOST_WINDOWS) or 1]
    found_at, at_T = list[tuple[int, int, float, int, int]](), np.arange(r.T)
    for begin, end in windows if len(windows) > 1 else ():
        part = r.select((at_T >= begin) & (at_T < end))
        of = same_id(part.token_id_T, MOST_PAIRS)
        if len(of[0]) >= 2 * NEAR:
            p, shift, n = best_shift(part, of, 0)
            if p * len(windows) < LEVEL:
                found_at.append((begin, end, p * len(windows), shift, n))
    if found_at:
        begin, end, p, shift, n = found_at[0]
        s, first, _ = r.place(begin)
        where = f" in tokens {first}-{first + end - begin - 1} of sequence {s}"
        if len(found_at) > 1:
            where += f", and in {plural(len(found_at) - 1, 'other part')}"
        yield _shifted(shift, where, max(one[2] for one in found_at), n)
        return
    yield from _layers_shifted(r, pairs)


def _told_once(r: Recorded) -> np.ndarray:
    """The token ids, −1 where the same CONTEXT tokens up to there, or all since the beginning of a
    sequence, were there before: in a loop, a quotation or a template the routes are the same again,
    and tell nothing more. [T]"""
    position_T = np.arange(r.T) - r.begin_S[r.sequence_T]
    context_TC = np.stack(
        [np.where(position_T >= n, np.roll(r.token_id_T, n), -2) for n in range(CONTEXT)], 1
    )
    first = np.unique(context_TC, axis=0, return_index=True)[1]
    once_T = np.full(r.T, -1)
    once_T[first] = r.token_id_T[first]
    return once_T


def _shifted(shift: int, where: str, p: float, n: int) -> Finding:
    what = (
        f"Tokens with the same id choose most alike {_rows_on(shift)}{where}: row n{shift:+d} has "
        f"the routes of token n ({plural(n, 'pair')})."
    )
    return found("routes_shifted", what, p, where.removeprefix(" in "), shift=shift, pairs=n)


def _rows_on(shift: int) -> str:
    return f"{plural(abs(shift), 'row')} {'later' if shift > 0 else 'earlier'}"


def _layers_shifted(r: Recorded, pairs: Pairs) -> Iterator[Finding]:
    if r.L < 3:
        return
    p_SL = tail(gains(r, pairs, DRAFT, [*range(r.L)]), r.L * len(DRAFT))
    p_L, shift_L = p_SL.min(0), np.array(DRAFT)[p_SL.argmin(0)]
    at = np.flatnonzero(p_L < LEVEL)
    # of many, the model may look further back than these shifts
    if len(at) and 4 * len(at) <= r.L:
        shift = int(shift_L[at[0]])
        what = (
            f"In {r.named(at)} tokens with the same id choose most alike {_rows_on(shift)}, in the "
            "other layers in their own row."
        )
        yield found("layer_shifted", what, float(p_L[at].max()), r.named(at), layers=r.numbers(at))


def _excess(
    rng: np.random.Generator, slots_KTL: np.ndarray, known: Recorded, pairs: Pairs, by: int = 0
) -> np.ndarray:
    """What tokens have in common with those of their id in the known layer so many further (the
    first comes after the last), beyond what they have with others. [N, L]"""
    a, b = pairs
    here, there = slots_KTL[:, a], np.roll(known.slots_KTL, -by, 2)
    return common(here, there[:, b]) - common(here, there[:, rng.permutation(b)])


def usual(r: Recorded, known: Recorded) -> np.ndarray:
    """The same within the known recording, [N, L]: without rows where that or `r` has too few
    tokens with an id in common."""
    pairs = same_id(known.token_id_T, MOST_PAIRS)
    if min(len(_across(r.token_id_T, known.token_id_T)[0]), len(pairs[0])) < 2 * NEAR:
        return np.zeros((0, r.L))
    return _excess(np.random.default_rng([SEED, r.T]), known.slots_KTL, known, pairs)


def habits(r: Recorded, known: Recorded, usual_NL: np.ndarray) -> Iterator[Finding]:
    """Layers beside those of a right recording of the model: what each token has in common with one
    of its id there, beyond what it has with another. known: with the same layers."""
    a, b = _across(r.token_id_T, known.token_id_T)
    if not len(usual_NL) or len(a) < 2 * NEAR:
        return
    L, usual_L, rng = r.L, usual_NL.mean(0), np.random.default_rng([SEED, len(a)])
    excess_MNL = np.stack([_excess(rng, r.slots_KTL, known, (a, b), by) for by in range(L)])
    own_NL = excess_MNL[0]
    p_ML = tail((excess_MNL - own_NL).swapaxes(0, 1), L * L)
    moved = dict[int, int]()
    for n, by in enumerate(excess_MNL.mean(1).argmax(0).tolist()):
        if p_ML[by, n] < LEVEL:
            moved[n] = (n + by) % L
    if moved:
        names = [f"layer {r.layers[n]} is the known {known.layers[m]}" for n, m in moved.items()]
        what = f"By what their tokens choose, {join_first(names, 4)}."
        p = max(float(p_ML[(m - n) % L, n]) for n, m in moved.items())
        of = np.array([*moved])
        yield found("layers_moved", what, p, r.named(of), layers=r.numbers(of))
    p_L = tail(usual_L / 2 - own_NL, L)
    at = np.setdiff1d(np.flatnonzero(p_L < LEVEL), [*moved])
    if len(at):
        what = (
            f"In {r.named(at)} tokens do not choose what tokens with the same id choose in the "
            "known trace."
        )
        p = float(p_L[at].max())
        yield found("routes_of_another_router", what, p, r.named(at), layers=r.numbers(at))


def _across(id_T: np.ndarray, known_T: np.ndarray) -> Pairs:
    """Tokens, each with one of its id in the known recording."""
    order = np.argsort(known_T, kind="stable")
    sorted_T = known_T[order]
    begin, end = (np.searchsorted(sorted_T, id_T, side) for side in ("left", "right"))
    at = np.flatnonzero((end > begin) & (id_T >= 0))
    at = at[:: -(-len(at) // (MOST_PAIRS // 4)) or 1]
    # one after the other, where the id is there more than once
    return at, order[begin[at] + np.arange(len(at)) % (end - begin)[at]]
