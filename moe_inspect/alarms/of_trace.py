"""The alarms of a trace, after the fact: what they would have been while it was written.

R routers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from moe_inspect.alarms.alarms import Alarm, Alarms, Window, drop_rate_R
from moe_inspect.alarms.rules import BATCH, DROP_RATE, OF_MODEL, Rule, refuse_gpus
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
    windows, effects = windows_of(trace, selection or select(trace), window)
    seen = Alarms(trace.routers, rules, "step" if trace.is_history else "window", effects)
    return [alarm for w in windows for alarm in seen.see(w)]


def refuse_rules(rules: Sequence[Rule], of: TraceHeader | None = None, plan: bool = False) -> None:
    """MoeInspectError for a rule on what no trace holds, or that one `of` does not, and without a
    `plan` for one on GPUs."""
    if not plan:
        refuse_gpus(rules)
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


def windows_of(
    trace: Trace, selection: Selection, window: int | None = None
) -> tuple[Iterator[Window], dict[int, float] | None]:
    """The windows of a trace in order, and the design effect of each router where decisions tell
    it. Routers that are not selected have no tokens."""
    if trace.is_history and window is None:
        return _committed(trace, selection), None
    window = window or max(-(-trace.n_tokens // WINDOWS), FEWEST_TOKENS)
    counts = count_trace(trace, selection, BASE | {"windows"}, window=window)
    cut = (_window(counts, w, w, w) for w in range(len(counts.first_token_W)))
    loaded = (of for of in cut if any(load_E.any() for load_E in of.load))
    if trace.counts_only:
        return loaded, None
    if len(counts.units) < FEWEST_TO_JUDGE:  # as for the verdict: no number of tokens is enough
        return loaded, dict.fromkeys(selection.routers, math.inf)
    domain_U = counts.domain_of_unit_U
    effects = {
        r: unc.design_effect(of.assignments_UE, counts.tokens_U_of(r), domain_U)
        for r, of in counts.of.items()
    }
    return loaded, effects


def _committed(trace: Trace, selection: Selection) -> Iterator[Window]:
    last = 0
    counted = by_shard(trace, None, count_shard, selection, BASE)
    for shard, counts in zip(trace.shards, counted, strict=True):
        first, last = shard.files.first_batch or last + 1, shard.files.last_batch
        yield _window(counts, first, last)


def _window(counts: Counts, first: int, last: int, w: int | None = None) -> Window:
    """All that was counted, or window w of it. Routers that were not counted have no load."""
    load = [np.zeros(router.experts, np.int64) for router in counts.routers]
    tokens_R = np.zeros(len(load), np.int64)
    for r, of in counts.of.items():
        if w is None:
            load[r], tokens_R[r] = counts.load_E(r), counts.tokens_of(r)
        else:
            assert of.window_load_WE is not None
            assert of.window_tokens_W is not None
            load[r], tokens_R[r] = of.window_load_WE[w], of.window_tokens_W[w]
    values = {DROP_RATE: drop_rate_R(load, tokens_R, counts.routers)}
    return Window(first, last, load, tokens_R, values)
