"""`simulate decode`: the number of distinct experts in a decode step of B sequences.

A step takes the tokens at one position of B different sequences, in the order of the trace; the
sequences stand in for requests. If the trace has generated tokens, only those are used, with
positions counted from the end of the prompt; otherwise the prompt tokens are used instead.

With speculative decoding, a step verifies drafts: of each sequence it takes the token at that
position and the d before it, d + 1 tokens in a row. The tokens of the trace stand in for drafts.

T tokens, K slots, E experts, N the draft lengths d, from 0 (no draft) on, B the batch sizes, P
positions, W words of 64 experts, G groups of steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import cycle, product
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import expert_bytes, weight_bytes
from moe_inspect.reporting.charts.spec import SERIES, Axis, Chart, Line, Panel
from moe_inspect.simulate import result
from moe_inspect.simulate.kernels_numba import fill_steps
from moe_inspect.simulate.result import Frame, Labels, Settings, Tables
from moe_inspect.simulate.shards import Seen, count_taken, routed, taken
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace, shards_of
from moe_inspect.trace.shard import Shard

# FLOPs per byte of an H100 SXM: 989.4 TFLOP/s dense bf16 ÷ 3.35 TB/s (NVIDIA's data sheet)
RIDGE = 295.0
LARGEST = 2**24
LONGEST_DRAFT = 1024
ACCEPTANCES = 0.5, 0.7, 0.9  # of a draft token
GROUPS = 64  # of steps, by which intervals are made
SATURATED = 0.95  # this share of the experts counts as almost all of them


class DecodeSteps:
    """The unfinished steps of one router, and sums over the finished ones. The n-th steps of all
    positions, which are of about the same sequences, are in one group. Memory grows with the number
    of positions, experts, draft lengths and batch sizes, not with the number of tokens."""

    def __init__(self, E: int, batches: Sequence[int], drafts: Sequence[int] = ()):
        self.batch_B, self.draft_N = np.array(batches, np.int64), np.array([0, *drafts], np.int64)
        N, B = len(self.draft_N), len(batches)
        self.there_NBPW = np.zeros((N, B, 0, -(-E // 64)), np.uint64)
        self.filled_NBP, self.full_NBP = np.zeros((2, N, B, 0), np.int64)
        # without the draft (at positions that have d tokens before them; for d > 0), and with
        self.steps_2NBG, self.distinct_2NBG = np.zeros((2, 2, N, B, GROUPS), np.int64)
        self.load_E, self.tokens = np.zeros(E, np.int64), 0

    def add(self, ids_KT: np.ndarray, position_T: np.ndarray, before_T: np.ndarray) -> None:
        """before_T: int64, which of these tokens comes before it in its sequence, −1 for none."""
        if not len(position_T):
            return
        more = int(position_T.max()) + 1 - self.filled_NBP.shape[2]
        if more > 0:
            self.there_NBPW = np.pad(self.there_NBPW, ((0, 0), (0, 0), (0, more), (0, 0)))
            self.filled_NBP = np.pad(self.filled_NBP, ((0, 0), (0, 0), (0, more)))
            self.full_NBP = np.pad(self.full_NBP, ((0, 0), (0, 0), (0, more)))
        self.tokens += len(position_T)
        unfinished = self.there_NBPW, self.filled_NBP, self.full_NBP
        sums = self.steps_2NBG, self.distinct_2NBG, self.load_E
        of = tuple(ids_KT), position_T, before_T, self.draft_N, self.batch_B
        fill_steps(*of, *unfinished, *sums)


def before(sequence_T: np.ndarray, position_T: np.ndarray) -> np.ndarray:
    """int64 [T]: which token is the one before it in its sequence, −1 for none."""
    order_T = np.argsort(sequence_T, kind="stable")
    sorted_T, at_T = sequence_T[order_T], position_T[order_T]
    follows = (sorted_T[1:] == sorted_T[:-1]) & (at_T[1:] == at_T[:-1] + 1)
    before_T = np.full(len(sequence_T), -1)
    before_T[order_T[1:][follows]] = order_T[:-1][follows]
    return before_T


def independent(E: int, k: int, B: int) -> float:
    """Expected distinct experts if each of B tokens chooses k of E uniformly at random:
    E (1 − (1 − k/E)^B)."""
    return E * (1 - (1 - k / E) ** B)


def from_marginals(activation_E: np.ndarray, B: float) -> float:
    """Expected distinct experts if B tokens choose independently, each expert with its measured
    activation (the share of tokens that use it): Σ 1 − (1 − activation)^B."""
    return float((1 - (1 - activation_E) ** B).sum())


@result.repeatable
def simulate_decode(
    trace: Trace | str | Path,
    *,
    batches: Sequence[int] = (1, 8, 32, 128),
    drafts: Sequence[int] = (),
    expert_mb: float | None = None,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> result.Simulation:
    """Counts the distinct experts that a decode step reads, by batch size. `drafts`: lengths of
    drafts in speculative decoding, whose verification is then counted too (table `speculation`),
    and judged where each draft token is accepted with a share of ACCEPTANCES. `expert_mb`: size of
    one expert in 10⁶ bytes; default from the model's config."""
    trace = result.with_decisions(trace, "simulate decode")
    sizes = sorted(set(batches))
    if not sizes or sizes[0] < 1 or sizes[-1] > LARGEST:
        raise MoeInspectError(
            f"batch size {', '.join(map(str, sizes))}: give numbers from 1 to {LARGEST:,}"
        )
    drafts = sorted(set(drafts))
    if drafts and not 1 <= drafts[0] <= drafts[-1] <= LONGEST_DRAFT:
        raise MoeInspectError(
            f"drafts of {', '.join(map(str, drafts))} tokens: give numbers from 1 to "
            f"{LONGEST_DRAFT:,}"
        )
    if expert_mb is not None and not 0 < expert_mb < inf:
        raise MoeInspectError(f"expert size {expert_mb} MB: give a finite number above 0")
    selection = select(trace, layers, domains, phase)
    chosen, decoded = selection, selection.phase == "decode"
    if selection.phase is None:  # the generated tokens, where there are any
        routers = tuple(r for r in selection.routers if trace.routers[r].sees("decode"))
        generated = Selection(selection.routers, phase="decode")
        if routers and any(by_shard(trace, None, count_taken, generated)):
            chosen, decoded = Selection(routers, selection.domains, "decode"), True
    steps = _steps(trace, chosen.routers, chosen, decoded, sizes, drafts)
    if not any(of.tokens for of in steps.values()):
        raise MoeInspectError(f"{trace.path} has no tokens in this selection")
    rows = _rows(trace, steps, expert_mb)
    tables = {
        "decode": rows[rows["at"] == 0].drop(columns=["at", "draft"]).reset_index(drop=True),
        "batch_needed": _needed(trace, steps),
    }
    if drafts:
        reached = [r for r, of in steps.items() if of.tokens]
        tables["speculation"] = speculated(rows[rows["router"].isin(reached)])
    settings: Settings = {
        "batches": sizes,
        "drafts": drafts,
        "acceptances": ACCEPTANCES if drafts else (),
        "phase": chosen.phase,
        "decoded": decoded,
        "expert_mb": expert_mb,
        "weight_bits": 8 * weight_bytes(trace),
    }
    few, shown = result.too_few(trace, chosen), "speculation" if drafts else "decode"
    return result.simulation(trace, few, tables, settings, verdict, chart, (shown,))


def _steps(
    trace: Trace,
    routers: Sequence[int],
    selection: Selection,
    decoded: bool,
    sizes: Sequence[int],
    drafts: Sequence[int],
) -> dict[int, DecodeSteps]:
    """The steps of these routers after the whole trace. Positions of generated tokens count from
    the end of their prompt. Tokens in a row are those of one shard."""
    steps = {r: DecodeSteps(trace.routers[r].experts, sizes, drafts) for r in routers}
    first_of = dict[tuple[str, int, int], int]()  # (stack, rank, sequence) → its position

    def selected(shard: Shard, r: int, seen: Seen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which of the N tokens that the router sees in the shard are selected, bool [N], and the
        positions of those and the tokens before them, int64 [T]."""
        table, taken_N = shard.tokens(["sequence", "position"]), taken(shard, selection)[seen]
        sequence_T, position_T = (
            table[name].to_numpy()[seen][taken_N] for name in ("sequence", "position")
        )
        position_T = position_T.astype(np.int64)
        before_T = before(sequence_T, position_T) if drafts else np.full(len(position_T), -1)
        if not decoded:
            return taken_N, position_T, before_T
        sequence_S, at_S, of_T = np.unique(sequence_T, return_index=True, return_inverse=True)
        place = trace.routers[r].stack, shard.files.rank
        first_S = [
            first_of.setdefault((*place, int(s)), int(first))
            for s, first in zip(sequence_S, position_T[at_S], strict=True)
        ]
        return taken_N, position_T - np.array(first_S, np.int64)[of_T], before_T

    for shard in shards_of(trace, "simulating decode"):
        for r, (taken_N, *of_T), ids_KN in routed(shard, routers, partial(selected, shard)):
            steps[r].add(np.ascontiguousarray(ids_KN[:, taken_N]), *of_T)
    return steps


def _rows(trace: Trace, steps: dict[int, DecodeSteps], expert_mb: float | None) -> pd.DataFrame:
    """A row per router, batch size and draft length d of what a step of B (d + 1) tokens reads,
    after one of what a step without drafts reads at the same positions (`at` is d in both)."""
    rows, resampled = [], cache(lambda n: unc.resample_weights(np.zeros(n, np.int64)))
    for r, of in steps.items():
        router = trace.routers[r]
        size = expert_mb * 1e6 if expert_mb is not None else expert_bytes(trace, r)
        activation_E = of.load_E / max(1, of.tokens)
        kinds = product(enumerate(of.batch_B.tolist()), enumerate(of.draft_N.tolist()))
        for b, B, n, at, draft in ((*i, *j, d) for i, j in kinds for d in sorted({0, j[1]})):
            with_draft, T = int(draft == at), B * (draft + 1)
            full_G, distinct_G = of.steps_2NBG[with_draft, n, b], of.distinct_2NBG[with_draft, n, b]
            count, some_G = full_G.sum(), full_G > 0
            distinct = distinct_G.sum() / count if count else np.nan
            share_G = distinct_G[some_G] / router.experts
            low, high = unc.ratio_interval(share_G, full_G[some_G], resampled(some_G.sum()))
            rows.append(
                {
                    "layer": router.layer,
                    "router": r,
                    "batch": B,
                    "at": at,
                    "draft": draft,
                    "steps": count,
                    "distinct_experts": distinct,
                    "distinct_experts_low": low * router.experts,
                    "distinct_experts_high": high * router.experts,
                    "independent": independent(router.experts, router.top_k, T),
                    "from_marginals": from_marginals(activation_E, T),
                    "share_of_experts": distinct / router.experts,
                    "tokens_per_expert": activation_E.sum() * T / (distinct or np.nan),
                    "experts_per_token": distinct / T,
                    "bytes_per_token": distinct * size / T if size else np.nan,
                }
            )
    return pd.DataFrame(rows)


def _needed(trace: Trace, steps: dict[int, DecodeSteps]) -> pd.DataFrame:
    """The batch size from which a step reads almost all experts, and the one from which it is
    compute-bound; both from the measured activations. Each weight costs 2 FLOPs per token, so an
    expert is compute-bound from RIDGE × (bytes per weight) / 2 tokens on."""
    intensity = RIDGE * weight_bytes(trace) / 2

    def needed(r: int, of: DecodeSteps) -> tuple[int | None, ...]:
        E, activation_E = int((of.load_E > 0).sum()), of.load_E / max(1, of.tokens)
        reads, k = partial(from_marginals, activation_E), of.load_E.sum() / max(1, of.tokens)
        all_from = _least(lambda B: reads(B) >= SATURATED * E) if E else None
        bound_from = _least(lambda B: B * k >= intensity * reads(B)) if E else None
        return trace.routers[r].layer, r, E, all_from, bound_from

    rows = [needed(r, of) for r, of in steps.items()]
    columns = ["layer", "router", "reached_experts", "reads_all_from", "compute_bound_from"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[3:], "Int64"))


def _least(holds: Callable[[int], bool]) -> int | None:
    """The smallest batch size for which `holds` is true; None if it is not at LARGEST."""
    return bisect_left(range(LARGEST), True, lo=1, key=holds) if holds(LARGEST) else None


def verdict(tables: Tables, settings: Settings, label_of: Labels) -> list[str]:
    table, needed = tables["decode"], tables["batch_needed"]
    of = "prompt tokens instead of generated ones (trace with --generate for those)"
    of = "generated tokens" if settings["decoded"] else of
    sentences = []
    for batch, mine in table.dropna(subset=["distinct_experts"]).groupby("batch"):
        distinct, chance = mine["distinct_experts"].mean(), mine["independent"].mean()
        said = (
            f"{batch:,} {'sequence reads' if batch == 1 else 'sequences together read'} "
            f"{distinct:.1f} experts per layer and step "
            f"({mine['share_of_experts'].mean():.0%} of them; expected by chance: {chance:.1f})"
        )
        if mine["bytes_per_token"].notna().all():
            said += f", {mine['bytes_per_token'].sum() / 1e6:,.3g} MB of expert weights per token"
        sentences.append(f"{said}.")
    if short := sorted(set(table.loc[table["steps"] == 0, "batch"])):
        sentences.append(
            f"No step of {', '.join(map(str, short))} sequences: the trace has too few at any "
            "position."
        )
    if settings["too_few"]:
        needed = needed[:0]
    if needed["reads_all_from"].notna().any():
        sentences.append(
            f"From {plural(int(needed['reads_all_from'].max()), 'sequence')} on, a step would read "
            f"{SATURATED:.0%} of the experts in use in every layer, if sequences chose "
            "independently of each other: a larger batch then reads hardly more experts."
        )
    if needed["compute_bound_from"].notna().any():
        sentences.append(
            f"Beyond about {plural(round(needed['compute_bound_from'].median()), 'sequence')} a "
            "larger batch stops helping: the step is then compute-bound, not memory-bound "
            f"({settings['weight_bits']}-bit weights, {RIDGE:g} FLOPs per byte)."
        )
    if "speculation" in tables:
        sentences += _of_drafts(tables["speculation"], settings["too_few"])
    return [*sentences, f"Simulated: steps of the same position of different sequences, from {of}."]


def chart(tables: Tables, settings: Settings, label_of: Labels) -> Chart | None:
    """Distinct experts by batch size, over the layers, and the two baselines."""
    table = tables["decode"].dropna(subset=["distinct_experts"])
    if table.empty:
        return None
    by_batch = table.groupby("batch")
    mean = by_batch[["distinct_experts", "independent", "from_marginals"]].mean()
    distinct = by_batch["distinct_experts"]
    low, high = distinct.min().to_numpy(), distinct.max().to_numpy()
    x = np.arange(len(mean), dtype=float)
    experts, chance, popular = (mean[name].to_numpy() for name in mean)
    marks = (
        Line(x, chance, "chance", "baseline", "dot"),
        Line(x, popular, "independent tokens, same expert loads", "c3", "dash"),
        Line(x, experts, "mean over layers", "c1", "", True, low, high),
    )
    batches = Axis("sequences decoded together", tuple(f"{batch:g}" for batch in mean.index))
    panels = [Panel(marks, batches, Axis("distinct experts per step", low=0))]
    if "speculation" in tables and (drafts := _when_drafts_pay(tables["speculation"])).marks:
        panels.append(drafts)
    return Chart(
        "Experts of a decode step",
        "Distinct experts that a step reads, by sequences decoded together",
        tuple(panels),
        text=result.SIMULATED + "Bars go from the layer with the fewest to the one with the most.",
        name="decode",
    )


# --- speculative decoding: what verifying drafts costs and yields, and the best draft length


def weights_read(layers: Frame) -> float:
    """Bytes that a step reads, or experts where the size of one is unknown. NaN where a layer has
    no such step. layers: a row per router."""
    distinct_L = layers["distinct_experts"]
    bytes_L = layers["bytes_per_token"] * layers["batch"] * (layers["draft"] + 1)
    known = bytes_L.isna().equals(distinct_L.isna())
    return float((bytes_L if known else distinct_L).sum(skipna=False))


def tokens_gained(acceptance: float, draft: int) -> float:
    """Expected tokens of a sequence per step: the draft tokens before the first that is rejected,
    and one of the model's own. Σ_{n=0..d} a^n = (1 − a^(d+1)) / (1 − a). arXiv:2211.17192."""
    return sum(acceptance**n for n in range(draft + 1))


def break_even(draft: int, cost: float) -> float:
    """The least acceptance, to 10⁻⁶, at which a step yields as many times the tokens of one without
    a draft as it costs; NaN if none below 1 is enough."""
    enough = bisect_left(range(10**6), cost, key=lambda n: tokens_gained(n / 10**6, draft))
    return enough / 10**6 if enough < 10**6 else np.nan


def speculated(rows: Frame) -> pd.DataFrame:
    """What drafts cost and yield, relative to steps without at the same positions. rows: per
    router, batch size and draft length `at`, one without and one with the draft."""
    made = list[dict[str, Any]]()
    for (batch, draft), both in rows.groupby(["batch", "at"]):
        plain, layers = both[both["draft"] == 0], both[both["draft"] == draft]
        alone = weights_read(plain)
        relative = weights_read(layers) / alone if alone > 0 else np.nan
        means = layers[["distinct_experts", "independent", "from_marginals"]].mean(skipna=False)
        for acceptance in ACCEPTANCES:
            gained = tokens_gained(acceptance, draft)
            made.append(
                {
                    "batch": batch,
                    "draft": draft,
                    "acceptance": acceptance,
                    "steps": layers["steps"].min(),
                    **means,
                    "relative_cost": relative,
                    "tokens_per_step": gained,
                    "speedup": gained / relative,
                    "break_even": break_even(draft, relative) if draft and relative > 0 else np.nan,
                }
            )
    rows = pd.DataFrame(made)
    speedups = rows["speedup"].dropna().groupby([rows["batch"], rows["acceptance"]])
    return rows.assign(best=rows.index.isin(speedups.idxmax()))


def _of_drafts(table: Frame, too_few: bool) -> list[str]:
    """too_few: the trace has too little data to advise a draft length."""
    said = []
    for batch, mine in table.groupby("batch"):
        drafted = mine[mine["draft"] > 0].dropna(subset=["speedup"])
        if drafted.empty:
            continue
        last, least = drafted.iloc[-1], drafted["break_even"].iloc[-1]
        best = (
            f"at {row.acceptance:g} "
            + (f"{plural(row.draft, 'token')} ({row.speedup:.2f}x)" if row.draft else "none")
            for row in mine[mine["best"]].sort_values("acceptance").itertuples()
        )
        of_draft = (
            f"{plural(batch, 'sequence')} with drafts of {plural(last['draft'], 'token')}: a step "
            f"reads {last['distinct_experts']:.1f} experts per layer (mean of "
            f"{plural(last['steps'], 'step')}; if tokens chose independently: "
            f"{last['from_marginals']:.1f}), {last['relative_cost']:.2f}x the weights of one "
            "without drafts"
        )
        pays = f"from an acceptance of {least:.2f}" if least < 1 else "at no acceptance below 1"
        advice = f", which pays {pays}. Best draft by acceptance: {', '.join(best)}"
        said.append(f"{of_draft}{'' if too_few else advice}.")
    if said and not too_few:
        said.append(
            "Drafts cost the expert weights that verifying them reads, as long as steps are "
            "memory-bound. The draft model costs too, and makes drafts worth less than this; "
            "weights that a step reads once for all its tokens make them worth more."
        )
    stepped = table.loc[(table["draft"] == 0) & (table["steps"] > 0), "batch"]
    none = table[(table["steps"] == 0) & table["batch"].isin(stepped)]
    said += [
        f"No step of {plural(batch, 'sequence')} with drafts of "
        f"{', '.join(map(str, drafts))} tokens: too few sequences are that long."
        for batch, drafts in none.groupby("batch")["draft"].unique().items()
    ]
    return said


def _when_drafts_pay(table: Frame) -> Panel:
    """Break-even acceptance by draft length, a line per batch size."""
    drafted = table[table["draft"] > 0].drop_duplicates(["batch", "draft"])
    names = drafted["draft"].unique()
    at = np.arange(len(names), dtype=float)
    marks = tuple(
        Line(at, mine["break_even"].to_numpy(), plural(batch, "sequence"), colour, dots=True)
        for (batch, mine), colour in zip(drafted.groupby("batch"), cycle(SERIES), strict=False)
        if mine["break_even"].notna().any()
    )
    x = Axis("draft tokens", tuple(map(str, names)))
    return Panel(marks, x, Axis("break-even acceptance", low=0, high=1), "When drafts pay")
