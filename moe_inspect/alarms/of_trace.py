"""The alarms of a trace, after the fact: what they would have been while it was written.

R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moe_inspect.alarms.alarms import Alarm, Alarms, Window, drop_rate_R
from moe_inspect.alarms.rules import BATCH, DROP_RATE, OF_MODEL, Rule
from moe_inspect.analysis.counting.count_shard import count_shard
from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import WINDOWS, count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.chance import FEWEST_TO_JUDGE
from moe_inspect.analysis.tasks import by_shard
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.header import TraceHeader
from moe_inspect.trace.reader import Trace

FEWEST_TOKENS = 4096


def alarms_of(
    trace: Trace,
    rules: Sequence[Rule],
    selection: Selection | None = None,
    window: int | None = None,
) -> list[Alarm]:
    """The alarms of a trace, in its order. The windows of a history of training are those that were
    committed; every other trace is cut into windows of `window` tokens, by default a 64th of it and
    at least FEWEST_TOKENS: a few documents are no trend. MoeInspectError for a rule on what no
    trace holds."""
    refuse_rules(rules, trace)
    selection, effects = selection or select(trace), None
    counts = _counted(trace, selection, window)
    if counts is not None and not trace.counts_only:
        effects = {r: _effect(counts, r) for r in selection.routers}
    steps = "step" if trace.is_history else "window"
    seen = Alarms(trace.routers, rules, steps, effects)
    windows = _committed(trace, selection) if counts is None else _cut(counts)
    return [alarm for w in windows for alarm in seen.see(w)]


def _effect(counts: Counts, r: int) -> float:
    """The design effect of the documents; without documents enough to tell chance from the model,
    as for the verdict, no number of tokens is."""
    if len(counts.units) < FEWEST_TO_JUDGE:
        return math.inf
    of_U = counts.of[r].assignments_UE, counts.tokens_U_of(r), counts.domain_of_unit_U
    return unc.design_effect(*of_U)


def refuse_rules(rules: Sequence[Rule], of: TraceHeader | None = None) -> None:
    """MoeInspectError for a rule on what no trace holds, or that one `of` does not."""
    for rule in rules:
        if rule.metric in (BATCH, *OF_MODEL):
            raise MoeInspectError(
                f"the rule {str(rule)!r}: a trace does not hold {rule.metric}, only the monitor of "
                "a training run knows it"
            )
        if rule.metric == DROP_RATE and of is not None and not of.drops:
            raise MoeInspectError(
                f"the rule {str(rule)!r}: {of.path} does not state that its empty slots are drops"
            )


def windows_of_trace(
    trace: Trace, selection: Selection, window: int | None = None
) -> Iterator[Window]:
    """The windows of a trace in order. Routers that are not selected have no tokens."""
    counts = _counted(trace, selection, window)
    return _committed(trace, selection) if counts is None else _cut(counts)


def _counted(trace: Trace, selection: Selection, window: int | None) -> Counts | None:
    """A trace by window; None of a history, whose windows are those that were committed."""
    if trace.is_history and window is None:
        return None
    window = window or max(-(-trace.n_tokens // WINDOWS), FEWEST_TOKENS)
    return count_trace(trace, selection, BASE | {"windows"}, window=window)


def _committed(trace: Trace, selection: Selection) -> Iterator[Window]:
    last = 0
    counted = by_shard(trace, None, count_shard, selection, BASE)
    for shard, counts in zip(trace.shards, counted, strict=True):
        first, last = shard.files.first_batch or last + 1, shard.files.last_batch
        load = [_load(counts, r) for r in range(len(trace.routers))]
        yield _window(first, last, load, _tokens(counts), counts)


def _cut(counts: Counts) -> Iterator[Window]:
    for w in range(len(counts.first_token_W)):
        load = [_load(counts, r, w) for r in range(len(counts.routers))]
        if any(load_E.any() for load_E in load):
            yield _window(w, w, load, _tokens(counts, w), counts)


def _load(counts: Counts, r: int, w: int | None = None) -> np.ndarray:
    if r not in counts.of:
        return np.zeros(counts.routers[r].experts, np.int64)
    if w is None:
        return counts.load_E(r)
    load_WE = counts.of[r].window_load_WE
    assert load_WE is not None
    return load_WE[w]


def _window(
    first: int, last: int, load: list[np.ndarray], tokens_R: np.ndarray, counts: Counts
) -> Window:
    values = {DROP_RATE: drop_rate_R(load, tokens_R, counts.routers)}
    return Window(first, last, load, tokens_R, values)


def _tokens(counts: Counts, w: int | None = None) -> np.ndarray:
    """int64 [R]"""
    tokens_R = np.zeros(len(counts.routers), np.int64)
    for r, of in counts.of.items():
        tokens_R[r] = counts.tokens_of(r) if w is None else of.window_tokens_W[w]  # pyright: ignore[reportOptionalSubscript]
    return tokens_R
