"""Report: the tables of a trace, each computed when it is first asked for, and the verdict in
words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.analysis.counting import token_ids as tokenids
from moe_inspect.analysis.counting.counts import BASE, Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import Selection, select
from moe_inspect.analysis.metrics.uncertainty import FEWEST_DOCUMENTS
from moe_inspect.errors import MoeInspectError
from moe_inspect.reporting.tables.load import (
    WANTS,
    every_table,
    specialization_by_id,
    vocabulary_of,
    whole_batches,
)
from moe_inspect.reporting.tables.thresholds import thresholds as thresholds_of
from moe_inspect.reporting.verdict import checks
from moe_inspect.reporting.verdict.chance import worst_router
from moe_inspect.reporting.verdict.findings import Finding
from moe_inspect.text import counted, ranges, storable
from moe_inspect.trace.reader import Trace, open_trace

TABLES = every_table()


def report(
    trace: Trace | str | Path,
    *,
    layers: str | int | Iterable[int] | None = None,
    domains: str | Iterable[str] | None = None,
    phase: str | None = None,
    top: int = 20,
    window: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    scheduler: object = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """The report on a trace, or on what is asked of it: layers "0-3,7", domains, phase "prefill",
    "decode" or "encode".

    `top`: token ids, and partners in tables of pairs, of each expert, 0 for all. `window`: tokens
    of a window, by default a 64th of the trace. `thresholds`: of the verdict, {"uneven": 0.3}.
    `scheduler`: address of a dask.distributed cluster. `progress` is told of decisions as they are
    read; what goes by token id reads them a second time."""
    trace = trace if isinstance(trace, Trace) else open_trace(trace)
    chosen = select(trace, layers, domains, phase)
    return Report(
        trace, chosen, top, progress, window=window, thresholds=thresholds, scheduler=scheduler
    )


class Report:
    """`tables["balance"]` and the others are DataFrames; `verdict()` is what they come to, in plain
    sentences."""

    def __init__(
        self,
        trace: Trace,
        selection: Selection,
        top: int = 20,
        progress: Callable[[int], None] | None = None,
        *,
        window: int | None = None,
        thresholds: Mapping[str, float] | None = None,
        scheduler: object = None,
    ):
        if top < 0:
            raise MoeInspectError(
                f"top is {top}: give the number of token ids an expert, 0 for all"
            )
        if window is not None and window < 1:
            raise MoeInspectError(f"window is {window}: give the number of its tokens, 1 or more")
        self.trace, self.selection, self.top, self.progress = trace, selection, top, progress
        self.window, self.scheduler, self.thresholds = window, scheduler, thresholds_of(thresholds)
        self._counts: Counts | None = None
        self.tables: Mapping[str, pd.DataFrame] = _Tables(self)

    def __repr__(self) -> str:
        return f"Report({str(self.trace.path)!r}, tables: {', '.join(TABLES)})"

    def _repr_html_(self) -> str:
        """What a notebook shows of a report that a cell ends with."""
        from moe_inspect.reporting.render.notebook import notebook

        return notebook(self)

    def verdict(self) -> list[Finding]:
        """What is wrong, how sure that is and what is fine: a Finding each, with a plain sentence
        in `text`; most important first."""
        return list(self._findings)

    @cached_property
    def _findings(self) -> list[Finding]:
        return checks.findings(self)

    @property
    def warning(self) -> str | None:
        """What to know before believing any of it: the trace is not complete, something was
        dropped, or its model has a quirk."""
        said = {
            "recording": (
                "this trace is still being recorded, or was cut off: the report is of what is "
                "committed so far"
            ),
            "interrupted": "this trace was interrupted: the report is of what was committed",
        }.get(self.trace.status)
        dropped = self.dropped
        lost = f"{dropped:,} decisions were dropped while recording" if dropped else None
        return (
            "; ".join(
                s for s in (said, lost, self.trace.manifest.get("model", {}).get("note")) if s
            )
            or None
        )

    @property
    def dropped(self) -> int:
        return int(self.trace.manifest.get("counts", {}).get("dropped", 0))

    @property
    def counts(self) -> Counts:
        return self.counts_for()

    def counts_for(self, *wants: str) -> Counts:
        """The counts with at least these among them. What is not counted yet takes another pass:
        `prepare` saves that."""
        asked = (
            BASE
            if self.trace.counts_only
            else BASE.union(wants) - (set() if "logits" in self.trace.tables else {"logits"})
        )
        if self._counts is None or not asked <= self._counts.wants:
            asked |= self._counts.wants if self._counts else frozenset()
            self._counts = count_trace(
                self.trace,
                self.selection,
                asked,
                window=self.window,
                scheduler=self.scheduler,
                progress=self.progress,
            )
        return self._counts

    def prepare(self, tables: Iterable[str]) -> None:
        """Counts in one pass what these tables need."""
        known = [name for name in tables if name in WANTS]
        self.counts_for(*frozenset[str]().union(*(WANTS[name] for name in known)))

    def decisions(self, table: str) -> Counts:
        """The counts for a table that counts alone cannot make."""
        if self.trace.counts_only:
            raise MoeInspectError(
                f"{self.trace.path} holds counts only, no decisions: no {table} table; "
                f"{self.trace.more_than_counts}"
            )
        return self.counts_for(*WANTS[table])

    @cached_property
    def loaded(self) -> list[dict[str, Any]]:
        """The rows of `balance` of the routers that have any load."""
        table: Any = self.tables["balance"]
        return table.dropna(subset=["max_vio"]).to_dict("records")

    @cached_property
    def by_id(self) -> list[dict[str, float]]:
        """What `specialization` needs of the pass by token id, a router each. The vocabulary falls
        out of the same pass."""
        rows, words = [], []
        for tables in tokenids.by_token_id(
            self.trace, self.selection, self.counts, nulls=True, progress=self.progress
        ):
            rows.append(specialization_by_id(tables, len(self.counts.domains)))
            if self.top:
                words.append(vocabulary_of(tables, self, self._text_of))
        if words:
            self.__dict__["vocabulary"] = pd.concat(words, ignore_index=True)
        return rows

    @cached_property
    def vocabulary(self) -> pd.DataFrame:
        if self.counts.counts_only:
            raise MoeInspectError(
                f"{self.trace.path} holds counts only, no token ids: no vocabulary table; "
                f"{self.trace.more_than_counts}"
            )
        asked = {} if self.top else {"min_count": 1, "most": len(self.counts.token_ids_V)}
        passes = tokenids.by_token_id(
            self.trace, self.selection, self.counts, nulls=False, progress=self.progress, **asked
        )
        return pd.concat(
            [vocabulary_of(tables, self, self._text_of) for tables in passes], ignore_index=True
        )

    @cached_property
    def _text_of(self) -> pd.Series:
        frame = self.trace.vocabulary().drop_duplicates("token_id")
        return pd.Series(frame["token"].to_numpy(object), index=frame["token_id"].to_numpy())

    def facts(self) -> list[tuple[str, str]]:
        """The rows of `summary`."""
        trace, counts, manifest = self.trace, self.counts, self.trace.manifest
        routers = self.selection.routers
        capture, model = manifest.get("capture", {}), manifest.get("model", {})
        facts: list[tuple[str, object]] = [("status", trace.status)]
        facts += [("warning", self.warning)] if self.warning else []
        facts += [
            ("model", model.get("id") or model.get("class")),
            ("capture_mode", capture.get("mode")),
            ("device", capture.get("device")),
            ("dtype", capture.get("dtype")),
            ("layers", ranges(sorted({trace.routers[r].layer for r in routers}))),
            ("routers", len(routers)),
        ]
        facts += (
            [("domains_selected", ", ".join(sorted(self.selection.domains)))]
            if self.selection.domains
            else []
        )
        facts += [("phase_selected", self.selection.phase)] if self.selection.phase else []
        facts += [
            ("tokens", counts.tokens),
            ("documents", counts.documents),
            *(
                (f"tokens_in_{domain}", int(n))
                for domain, n in zip(counts.domains, counts.tokens_D, strict=True)
            ),
            ("decisions", counts.decisions),
            ("assignments", sum(int(counts.load_E(r).sum()) for r in routers)),
            ("null_slots", sum(counts.of[r].null_slots for r in routers)),
            ("dropped", self.dropped),
        ]
        facts += self._worst()
        facts += self.thresholds.facts()
        facts += [("note", note) for note in self.notes()]
        return [
            (storable(key), "unknown" if value is None else storable(str(value)))
            for key, value in facts
        ]

    def _worst(self) -> list[tuple[str, object]]:
        facts: list[tuple[str, object]] = [
            ("dead_experts", sum(int(row["dead_experts"]) for row in self.loaded))
        ]
        if worst := worst_router(self):
            facts += [("worst_layer", worst["layer"]), ("worst_router", worst["router"])]
            facts += [
                ("worst_max_over_mean", f"{worst['max_over_mean']:.6g}"),
                ("worst_noise_floor", f"{worst['noise_floor']:.6g}"),
            ]
        pooled = self.pooled_max_over_mean()
        return facts + ([("pooled_max_over_mean", f"{pooled:.6g}")] if pooled is not None else [])

    def pooled_max_over_mean(self) -> float | None:
        """What adding up the loads of all routers before dividing would have shown; None where they
        have different experts."""
        counts = self.counts
        sizes = {counts.routers[r].experts for r in self.selection.routers}
        if len(sizes) > 1 or len(self.selection.routers) < 2:
            return None
        load_E = np.sum([counts.load_E(r) for r in self.selection.routers], axis=0)
        return float(load_E.max() / load_E.mean()) if load_E.any() else None

    def notes(self) -> list[str]:
        """Why a column is NaN."""
        counts, notes = self.counts, []
        if counts.counts_only:
            notes.append(
                "counts only: no intervals, batches, nulls or token ids; "
                f"{self.trace.more_than_counts} for those"
            )
        elif len(counts.units) < FEWEST_DOCUMENTS:
            notes.append(
                f"{counted(len(counts.units), 'document')}: intervals, design effect and domain "
                f"nulls need {FEWEST_DOCUMENTS}"
            )
        if len(counts.domains) < 2:
            way_out = "" if self.selection.domains else "; label sources as DOMAIN=SRC when tracing"
            notes.append(f"one domain: domain_mi_*, jsd_bits need two{way_out}")
        if not self.trace.has_weights:
            notes.append(
                "no weights recorded: weight_sum, importance_cv, gate_score, weight_* are NaN"
            )
        unranked = sum(not self.trace.routers[r].first_choice_known for r in self.selection.routers)
        if unranked:
            which = (
                ""
                if unranked == len(self.selection.routers)
                else f" of {counted(unranked, 'router')}"
            )
            notes.append(
                f"first choices{which} are unknown: no gate weights say which expert came first; "
                "what needs them is NaN"
            )
        if any(not counts.load_E(r).any() for r in self.selection.routers):
            notes.append("a router without a single assignment has no balance")
        if "logits" not in self.trace.tables:
            way_out = "" if self.trace.imported else "; trace with --logits for those"
            notes.append(
                f"no logits recorded: aux_loss, z_loss, gate entropy and margins are NaN{way_out}"
            )
        sizes = max((counts.of[r].batches for r in self.selection.routers), key=len)
        batches, whole = (sum(n for n, _ in of.values()) for of in (sizes, whole_batches(sizes)))
        if batches - whole > 1:
            notes.append(
                f"max_vio_batch is of {whole:,} of {batches:,} batches: the others hold under "
                "half the tokens of the largest; --phase takes decode steps by themselves"
            )
        if not counts.counts_only:
            notes += self._token_id_notes()
        return notes

    def _token_id_notes(self) -> list[str]:
        widest = max(self.trace.routers[r].experts for r in self.selection.routers)
        judged = tokenids.frequent(self.counts, tokenids.MIN_COUNT, tokenids.CELLS // widest)
        if not len(judged.ids_V):
            return [
                (
                    f"no token id occurs {tokenids.MIN_COUNT} times: token_mi_*, "
                    "domain_mi_given_token_*, vocabulary_specialization are NaN"
                )
            ]
        said = (
            f"token ids are judged from {tokenids.MIN_COUNT} occurrences: "
            f"{counted(len(judged.ids_V), 'id')}, {judged.coverage:.1%} of the tokens"
        )
        notes = (
            [said]
            if self.trace.vocabulary().size
            else [
                said,
                "no vocabulary in the trace: token is missing, give a tokenizer when tracing",
            ]
        )
        if len(self.counts.domains) > 1:
            paired, clusters = tokenids.pair_ids_of(self.counts, widest)
            if paired.coverage < judged.coverage:
                notes.append(
                    f"domain_mi_given_token_bits is of the {len(paired.ids_V):,} most frequent "
                    f"token ids ({paired.coverage:.1%} of the "
                    f"tokens), documents in {clusters} clusters a domain, to bound its memory"
                )
        return notes


class _Tables(Mapping[str, pd.DataFrame]):
    """name → DataFrame, made when first asked for."""

    def __init__(self, of: Report):
        self._report, self._made = of, dict[str, pd.DataFrame]()

    def __getitem__(self, name: str) -> pd.DataFrame:
        if name not in TABLES:
            raise MoeInspectError(f"no table {name!r}: there are {', '.join(TABLES)}")
        if name not in self._made:
            self._made[name] = TABLES[name](self._report)
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in TABLES

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)
