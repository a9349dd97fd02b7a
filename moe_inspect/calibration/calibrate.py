"""`moe-inspect calibrate`: has every expert enough tokens, how much text would it take, and which
texts are enough.

L routers, E experts, P pairs of the two, U units (clusters of documents), D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.router_counts import BASE
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics import coverage as cov
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.calibration.choose import Choice, Wanted
from moe_inspect.calibration.choose import choose as choose_documents
from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.model.config import expert_shape
from moe_inspect.reporting.charts.spec import Axis, Band, Chart, Line, Mark, Panel, Points, Rule
from moe_inspect.reporting.shown import Shown, python_call
from moe_inspect.reporting.tables.data import records
from moe_inspect.reporting.tables.registry import Excerpt, LazyTables, Table, table
from moe_inspect.reporting.verdict.findings import top_row
from moe_inspect.text import layer_label, plural
from moe_inspect.trace.reader import Trace, open_trace

if TYPE_CHECKING:
    pass

# tokens of an expert, as GPTQ was measured to need (docs/calibrate.md): per input of its first
# matrices, and where these are unknown
PER_INPUT, MINIMUM = 4, 512
SHARES = (0.95, 0.99, 1.0)  # of the experts
POINTS = 48  # of the chart
CHOICES = ("choice", "chosen")
# columns of `coverage`, the most informative first
SHOWN = ("layer", "router", "expert", "tokens", "tokens_low", "tokens_high", "tokens_needed")
SHOWN += ("tokens_needed_low", "tokens_needed_high", "main_domain", "main_domain_share")
SHOWN += ("weighted_tokens", "norm_spread", "enough")
TABLES: dict[str, Table] = {}
registered = partial(table, tables=TABLES)


@dataclass(frozen=True, repr=False)
class Calibration(Shown):
    """What a trace says of calibration text. `tables`: coverage (a row per expert), the others by
    name. `choice`: the documents chosen, where that was asked for. `print(calibration)` is one
    screen of it."""

    trace: Trace
    selection: Selection
    minimum: int
    counts: Counts
    forecast: cov.Forecast | None
    choice: Choice | None = None
    python: str = ""
    tables: Mapping[str, pd.DataFrame] = field(init=False)

    def __post_init__(self) -> None:
        with_choice = self.choice is not None
        known = {name: of for name, of in TABLES.items() if with_choice or name not in CHOICES}
        object.__setattr__(self, "tables", LazyTables(self, known))

    def __repr__(self) -> str:
        return f"Calibration({str(self.trace.path)!r}, tables: {', '.join(self.tables)})"

    @property
    def title(self) -> str:
        return f"calibrate {self.trace.path}"

    @property
    def command(self) -> str:
        return f"moe-inspect calibrate {self.trace.path}"

    @property
    def load_P(self) -> np.ndarray:
        """int64 [P]: tokens of each expert, router after router."""
        return np.concatenate([self.counts.load_E(r) for r in self.selection.routers])

    @property
    def by_domain_DP(self) -> np.ndarray:
        """The same of each domain."""
        each = [self.counts.assignments_DE(r) for r in self.selection.routers]
        return np.concatenate(each, axis=1)

    @property
    def said(self) -> list[str]:
        return [*_coverage_said(self), *_domains_said(self), *_choice_said(self)]

    def verdict(self) -> list[str]:
        """What it comes to, in plain sentences."""
        return self.said

    @property
    def excerpts(self) -> Mapping[str, Excerpt]:
        first = Excerpt("those that were picked first", lambda frame, most: frame.head(most))
        found = dict.fromkeys(CHOICES if self.choice is not None else (), first)
        return found | {
            "coverage": Excerpt("those with the fewest tokens", _fewest, SHOWN),
            "tokens_needed": Excerpt("all", lambda frame, most: frame.head(most)),
        }

    def charts(self) -> tuple[list[Chart], list[str]]:
        return [chart(self)], []

    def page(self) -> str:
        tables = {**self.tables, "coverage": _by_tokens(self.tables["coverage"])}
        return self._page_of(tables, f"minimum: {self.minimum:,} tokens per expert", self.python)

    def write_texts(
        self, path: str | Path, *, tokens: bool = False, data: Sequence[str] = ()
    ) -> int:
        """Writes the documents that were chosen, in the order in which they were picked: to a .txt
        the texts alone, else a line of JSON of each (document, domain, text). Returns how many.

        tokens   token ids (input_ids) in place of the text, as the model was fed
        data     where the corpus is now; by default where the trace says that it was

        MoeInspectError where none were chosen, the corpus is not there or differs, or a trace of
        counts has no tokens."""
        from moe_inspect.calibration.texts import write_texts

        if self.choice is None:
            raise MoeInspectError("no documents were chosen: give --choose N, or all")
        return write_texts(self.trace, self.choice.chosen, Path(path), tokens, data)


def calibrate(
    trace: Trace | str | Path,
    *,
    min_tokens: int | None = None,
    choose: int | Literal["all"] | None = None,
    keep_mixture: float = 0.0,
    layers: str | int | Iterable[int | str] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
) -> Calibration:
    """Whether a text gives every expert enough tokens to calibrate a quantiser with.

    `min_tokens`: tokens that every expert of every layer should get; by default 4 per input of its
    first matrices (the model's hidden size), 512 where that is unknown. `choose`: also choose
    documents, "all" for the fewest that give every expert the minimum (or all that it has), a
    number for the best of so many tokens together. `keep_mixture`: of the documents chosen each
    domain keeps this part of its share of the tokens, 0 to 1. `layers`, `domains`, `phase`: what is
    selected.

    Tables: coverage (a row per expert), coverage_by_layer, coverage_by_domain, tokens_needed (per
    share of the experts); with `choose` chosen (a row per document) and choice (beside random
    documents, and what no choice can do). MoeInspectError for settings out of range, and where
    documents are to be chosen from counts without documents."""
    opened = open_trace(trace)
    if min_tokens is None:
        shape = expert_shape(opened, 0)
        min_tokens = MINIMUM if shape is None else PER_INPUT * shape[0]
    check_whole("min_tokens", min_tokens)
    wrong = None
    if min_tokens < 1:
        wrong = f"min_tokens is {min_tokens}: give the tokens per expert, 1 or more"
    elif choose is not None and choose != "all" and not (type(choose) is int and choose > 0):
        wrong = f"choose is {choose!r}: give a number of tokens, or all"
    elif not 0 <= keep_mixture <= 1:
        wrong = f"keep_mixture is {keep_mixture:g}: give a part from 0 to 1"
    elif keep_mixture and choose is None:
        wrong = "keep_mixture is about documents that are chosen: give choose with it"
    elif choose is not None and opened.counts_only and not opened.by_document:
        wrong = (
            f"{opened.path} holds counts that do not say of which document: none can be chosen; "
            "trace with --counts-only --by-document, or with decisions"
        )
    elif not opened.n_tokens:
        wrong = f"{opened.path} holds no tokens yet: nothing is committed"
    if wrong:
        raise MoeInspectError(wrong)
    selection = select(opened, layers, domains, phase)
    sized = {"worth"} if opened.counts_only or "norm" in opened.slot_values else set[str]()
    counts = count_trace(opened, selection, BASE | sized)
    known = None
    if not counts.documents_unknown:
        assigned = [counts.of[r].assignments_UE for r in selection.routers]
        known = cov.forecast(assigned, counts.tokens_U, counts.domain_of_unit_U, min_tokens)
    picked = None
    if choose is not None:
        budget = None if choose == "all" else choose
        wanted = Wanted(minimum=min_tokens, budget=budget, keep_mixture=keep_mixture)
        picked = choose_documents(opened, selection, wanted)
    given = {"min_tokens": min_tokens, "choose": choose, "keep_mixture": keep_mixture or None}
    given |= {"layers": layers, "domains": domains, "phase": phase}
    python = python_call("calibrate", [opened], given)
    return Calibration(opened, selection, min_tokens, counts, known, picked, python)


# --- tables


@registered()
def coverage(made: Calibration) -> pd.DataFrame:
    """One row per expert of a router: its tokens, and how much text gives it the minimum."""
    counts, routers = made.counts, made.selection.routers
    load_P = made.load_P
    unknown_P = np.full(len(load_P), np.nan)
    needed_3P = unknown_P, _at_this_rate(made), unknown_P
    if made.forecast is not None:
        needed_3P = made.forecast.of_pairs()
    low_P, high_P = np.concatenate([_interval(counts, r) for r in routers], axis=1)
    by_domain_DP = made.by_domain_DP
    main_P = by_domain_DP.argmax(0)
    sizes = [made.trace.routers[r].experts for r in routers]
    columns = {
        "layer": np.repeat([made.trace.routers[r].layer for r in routers], sizes),
        "router": np.repeat(routers, sizes),
        "expert": np.concatenate([np.arange(E) for E in sizes]),
        "tokens": load_P,
        "tokens_low": low_P,
        "tokens_high": high_P,
        "weighted_tokens": np.concatenate([counts.weight_sum_E(r) for r in routers]),
        "norm_spread": np.concatenate([_norm_spread(counts, r) for r in routers]),
        "main_domain": np.array(counts.domains, object)[main_P],
        "main_domain_share": by_domain_DP.max(0) / nan_for_zero(load_P.astype(float)),
        "enough": load_P >= made.minimum,
        "tokens_needed": needed_3P[1],
        "tokens_needed_low": needed_3P[0],
        "tokens_needed_high": needed_3P[2],
    }
    return pd.DataFrame(columns)


def _interval(counts: Counts, router: int) -> np.ndarray:
    """95 % interval over documents of the tokens of each expert in a text of this size; no upper
    end without a token. float64 [2, E]"""
    of_UE, weights_RU = counts.of[router].assignments_UE, counts.weights_RU
    if weights_RU is None:
        return np.full((2, of_UE.shape[1]), np.nan)
    documents = unc.effective_documents(counts.tokens_U)
    ends_2E = unc.interval(weights_RU @ of_UE, documents, (0, np.inf))
    ends_2E[1, of_UE.sum(0) == 0] = np.nan
    return ends_2E


def _at_this_rate(made: Calibration) -> np.ndarray:
    """Tokens of text until each pair has the minimum, if it goes on as it is; infinite without a
    token. float64 [P]"""
    with np.errstate(divide="ignore"):
        return made.counts.tokens * made.minimum / made.load_P.astype(float)


def _norm_spread(counts: Counts, router: int) -> np.ndarray:
    """Standard deviation over documents of the mean norm of an expert's outputs, or of the root
    mean square of its inner activations, ÷ its mean; NaN where none were recorded. float64 [E]"""
    of = counts.of[router]
    size_UE = of.norm_UE if of.norm_UE is not None else of.energy_UE
    if size_UE is None or counts.documents_unknown:
        return np.full(counts.routers[router].experts, np.nan)
    n_UE = of.assignments_UE.astype(float)
    mean_UE = size_UE / nan_for_zero(n_UE)
    mean_UE = np.sqrt(mean_UE) if of.norm_UE is None else mean_UE
    total_E = nan_for_zero(n_UE.sum(0))
    mean_E = np.nansum(mean_UE * n_UE, 0) / total_E
    variance_E = np.nansum((mean_UE - mean_E) ** 2 * n_UE, 0) / total_E
    return np.sqrt(variance_E) / nan_for_zero(mean_E)


def _counted(load_P: np.ndarray, minimum: int) -> dict[str, float]:
    """What experts with these tokens come to."""
    return {
        "experts": len(load_P),
        "coverage": float((load_P >= minimum).mean()),
        "under_minimum": int((load_P < minimum).sum()),
        "without_tokens": int((load_P == 0).sum()),
        "fewest_tokens": int(load_P.min()),
    }


@registered(by_router=("coverage", "under_minimum", "without_tokens", "fewest_tokens"))
def coverage_by_layer(made: Calibration) -> pd.DataFrame:
    """One row per router: how many of its experts have the minimum."""
    rows = [
        {"layer": made.trace.routers[r].layer, "router": r}
        | _counted(made.counts.load_E(r), made.minimum)
        for r in made.selection.routers
    ]
    return pd.DataFrame(rows)


@registered()
def coverage_by_domain(made: Calibration) -> pd.DataFrame:
    """One row per domain, as if the text were it alone; the last is of all together."""
    counts = made.counts
    parts = [*zip(counts.domains, counts.tokens_D.tolist(), made.by_domain_DP, strict=True)]
    parts.append(("(all)", counts.tokens, made.load_P))
    rows = [
        {"domain": domain, "tokens": tokens, **_counted(load_P, made.minimum)}
        for domain, tokens, load_P in parts
    ]
    return pd.DataFrame(rows)


@registered()
def tokens_needed(made: Calibration) -> pd.DataFrame:
    """One row per share of the experts: tokens of this mixture until so many have the minimum."""
    rows = list[dict[str, float]]()
    for share in SHARES:
        if made.forecast is not None:
            low, middle, high = made.forecast.until(share)
        else:
            nth = math.ceil(share * len(made.load_P) - 1e-9) - 1
            low, middle, high = np.nan, float(np.sort(_at_this_rate(made))[nth]), np.nan
        names = ("tokens_needed", "tokens_needed_low", "tokens_needed_high")
        rows.append({"share": share, **dict(zip(names, (middle, low, high), strict=True))})
    return pd.DataFrame(rows)


@registered()
def chosen(made: Calibration) -> pd.DataFrame:
    """One row per document chosen, in the order in which they were picked: what each adds."""
    assert made.choice is not None
    of, wanted = made.choice.chosen, made.choice.wanted
    had_P, need_P, rows = np.zeros_like(made.choice.load_P), made.choice.need_P, []
    for s, number in enumerate(of.document_S.tolist()):
        experts, tokens = of.row(s)
        added = np.minimum(tokens, np.maximum(need_P[experts] - had_P[experts], 0)).sum()
        had_P[experts] += tokens
        rows.append(
            {
                "document": number,
                "domain": of.domains[of.domain_S[s]],
                "tokens": int(of.tokens_S[s]),
                "adds": int(added),
                "under_minimum": int((had_P < wanted.minimum).sum()),
                "coverage": float(made.choice.coverage(had_P)),
            }
        )
    columns = ["document", "domain", "tokens", "adds", "under_minimum", "coverage"]
    return pd.DataFrame(rows, columns=columns)


@registered()
def choice(made: Calibration) -> pd.DataFrame:
    """The documents chosen beside random ones of the same tokens (the mean, and the range of
    them), the whole text, and what no choice can do: fewer documents, or a greater share met."""
    assert made.choice is not None
    of, by_document = made.choice, made.choice.wanted.budget is None
    tokens, load_P = int(of.chosen.tokens_S.sum()), of.chosen.load_P
    bound = np.nan if of.bound is None else of.bound
    of_bound = (math.ceil(bound - 1e-6) if by_document and bound == bound else np.nan, np.nan)
    met = np.nan if by_document else min(1.0, bound / max(of.need_P.sum(), 1))
    S = len(of.chosen.tokens_S)
    spread_R = of.coverage(of.random_RP)
    rows: list[list[object]] = [
        ["chosen", S, tokens, of.coverage(load_P), np.nan, np.nan, of.met(load_P)],
        ["random", of.random_documents, tokens, spread_R.mean(), spread_R.min(), spread_R.max()],
        ["bound", of_bound[0], np.nan, np.nan, np.nan, np.nan, met],
        ["whole", of.documents_in_all, of.tokens, of.coverage(of.load_P), np.nan, np.nan, 1.0],
    ]
    rows[1].append(of.met(of.random_RP).mean())
    names = ["documents", "tokens", "coverage", "coverage_low", "coverage_high", "met"]
    return pd.DataFrame(rows, columns=["texts", *names]).astype({"tokens": "Int64"})


def _by_tokens(frame: pd.DataFrame) -> pd.DataFrame:
    """A page has the first rows of a long table: the experts with the fewest tokens."""
    return frame.sort_values("tokens", kind="stable", ignore_index=True)


def _fewest(frame: pd.DataFrame, most: int) -> pd.DataFrame:
    return frame if len(frame) <= most else _by_tokens(frame).head(most)


# --- in words


def amount(tokens: float) -> str:
    """ "9,254", "2.1 M"."""
    tokens = float(f"{tokens:.3g}") if tokens >= 1e5 else tokens  # 999,900 is 1 M
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "k")):
        if tokens >= size:
            return f"{tokens / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{tokens:,.0f}"


def part(share: float) -> str:
    """ "93.8%"; "100.0%" is all of it."""
    return f"{share if share == 1 else min(share, 0.999):.1%}"


def _coverage_said(made: Calibration) -> list[str]:
    load_P, m = made.load_P, made.minimum
    P, under, none = len(load_P), int((load_P < m).sum()), int((load_P == 0).sum())
    table = made.tables["coverage"]
    least = top_row(table, -table["tokens"])
    label = layer_label(made.trace.routers, int(least["router"]))
    if under:
        has = "have" if under > 1 else "has"
        said = f"{under:,} of {P:,} experts {has} under {m:,} tokens, {none or 'none'}"
        said += " none" if none else " is without any"
    else:
        said = f"Each of {P:,} experts has at least {m:,} tokens"
    fewest = f"; the fewest has expert {least['expert']} of layer {label}, {least['tokens']:,}."
    lines = [said + fewest, *_needed_said(made)]
    if none and not made.counts.documents_unknown:
        documents = max(made.counts.documents, 1)
        most = f"{100 * cov.most_unseen(documents):.2g}%"
        lines.append(
            f"No amount of this text is known to reach {plural(none, 'expert')}: none of "
            f"{plural(documents, 'document')} uses any of them, so that at most {most} of texts "
            "like these use a given one (with 95% confidence)."
        )
    return lines


def _needed_said(made: Calibration) -> list[str]:
    """How much text it takes, and why that has no interval."""
    known, said = made.forecast is not None, list[str]()
    for row in records(made.tables["tokens_needed"]):
        middle, low, high = (row[f"tokens_needed{end}"] for end in ("", "_low", "_high"))
        if math.isfinite(middle):
            amounts = amount(middle) + (f" ({amount(low)}-{amount(high)})" if known else "")
        else:
            amounts = f"at least {amount(low)}" if known else "an unknown number"
        of = "all of them" if row["share"] == 1 else f"{row['share']:.0%}"
        first = "" if said else "of the experts takes, in tokens of this mixture, "
        said.append(f"{of} {first}{amounts}")
    has = amount(made.counts.tokens)
    lines = [f"To cover {', '.join(said)}; this text has {has}."]
    if not known:
        n = len(made.counts.units)
        if made.counts.documents_unknown:
            why = "counts do not say of which document they are"
        elif n < unc.FEWEST_DOCUMENTS:
            why = f"{plural(n, 'document')} {'is' if n == 1 else 'are'} too few"
        else:
            why = "a router has no load at all"
        if not np.isfinite(made.tables["tokens_needed"]["tokens_needed"]).any():
            return [
                "How much text it takes to cover the experts is unknown, as some have no token and "
                f"{why}; this text has {has}."
            ]
        lines.append(
            f"How sure that is cannot be said, as {why}: it is what it takes at the rates seen."
        )
    return lines


def _domains_said(made: Calibration) -> list[str]:
    *rows, together = records(made.tables["coverage_by_domain"])
    if len(rows) < 2:
        return []
    tokens, covers = ([row[name] for row in rows] for name in ("tokens", "coverage"))
    return [
        f"Alone, the {len(rows)} domains ({amount(min(tokens))}-{amount(max(tokens))} tokens) "
        f"cover {_range(min(covers), max(covers))} of the experts; together "
        f"({amount(together['tokens'])}) {part(together['coverage'])}."
    ]


def _range(low: float, high: float) -> str:
    """ "34.4%-68.8%" """
    return "-".join(dict.fromkeys((part(low), part(high))))


def _choice_said(made: Calibration) -> list[str]:
    if (of := made.choice) is None:
        return []
    mine, drawn, bound, _ = records(made.tables["choice"])
    m, P = made.minimum, len(of.load_P)
    few = int((of.load_P < m).sum())
    beside = (
        f"random documents of as many tokens cover {part(drawn['coverage'])} "
        f"({_range(drawn['coverage_low'], drawn['coverage_high'])} in "
        f"{len(of.random_RP)} draws)"
    )
    many = f"{plural(int(mine['documents']), 'document')} ({amount(mine['tokens'])} tokens)"
    give = "gives" if mine["documents"] == 1 else "give"
    if of.wanted.budget is None:
        all_ = "every expert" if not few else f"all {P - few:,} of {P:,} experts that can have it"
        known = not math.isnan(bound["documents"])
        least = f"no choice takes under {bound['documents']:,.0f}; " if known else ""
        line = f"{many} of {of.documents_in_all:,} {give} {all_} {m:,} tokens; {least}{beside}."
        if few == P:
            line = (
                f"No expert has {m:,} tokens in all of this text, so each document that adds "
                f"any is chosen: {many} of {of.documents_in_all:,}."
            )
        idle = int((made.tables["chosen"]["adds"] == 0).sum())
        if idle and of.wanted.keep_mixture:
            line += f" Of those chosen, the mixture alone asks for {plural(idle, 'document')}."
    else:
        known = not math.isnan(bound["met"])
        most = f"no choice gives more than {math.ceil(bound['met'] * 1e3) / 10}%; " if known else ""
        line = (
            f"{many} {give} the experts {part(mine['met'])} of the {m:,} tokens each that this "
            f"text can give; {most}random documents of as many tokens give {part(drawn['met'])}. "
            f"They cover {part(mine['coverage'])}; {beside}."
        )
    return [line]


# --- as a picture


def chart(made: Calibration) -> Chart:
    """The share of the experts that have the minimum, against the tokens of text."""
    tokens, rows = made.counts.tokens, made.tables["tokens_needed"]
    ends = rows[["tokens_needed", "tokens_needed_low", "tokens_needed_high"]].to_numpy(float)
    known = ends[np.isfinite(ends) & (ends > 0)]
    first, last = max(tokens / 64, 1.0), min(max([2.0 * tokens, *known.tolist()]), 1e4 * tokens)
    x = np.unique(np.append(np.geomspace(first, last, POINTS), float(tokens)))
    at, marks = np.arange(len(x), dtype=float), list[Mark]()
    powers = 10.0 ** np.arange(math.ceil(math.log10(x[0])), math.log10(x[-1]) + 1e-9)
    powers = np.unique(np.outer(powers, [1, 2, 5])) if len(powers) < 4 else powers
    powers = powers[powers <= x[-1]]
    places = np.interp(np.log(powers), np.log(x), at).tolist()
    ticks = tuple(zip(places, map(amount, powers), strict=True))
    axis = Axis("tokens of text", tuple(map(amount, x)), ticks=ticks)
    if made.forecast is not None:
        low, middle, high = made.forecast.covered(x)
        marks += [Band(at, low, high, "95% interval"), Line(at, middle, "expected", "c1")]
        frame = pd.DataFrame({"tokens": x, "coverage": middle, "low": low, "high": high})
    else:
        needed = np.sort(_at_this_rate(made))
        share = np.searchsorted(needed, x, side="right") / len(needed)
        marks.append(Line(at, share, "at these rates", "c1"))
        frame = pd.DataFrame({"tokens": x, "coverage": share})
    now = float((made.load_P >= made.minimum).mean())
    marks += [Rule(0.99, "99%", "baseline", "dash")]
    here = at[np.searchsorted(x, tokens)]
    marks.append(Points(np.array([here]), np.array([now]), "this text", "c2"))
    return Chart(
        "Coverage",
        f"{part(now)} of the experts have {made.minimum:,} tokens after {amount(tokens)}",
        (Panel(tuple(marks), axis, Axis("share of the experts", low=0, high=1)),),
        text="The share of the experts of all layers that have the minimum of tokens, by the "
        "tokens of a text of this mixture."
        + " The band is over documents."
        * (made.forecast is not None),
        table=frame,
        name="coverage",
    )
