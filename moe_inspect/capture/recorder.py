"""Recorder: attaches to a model, sees every router's choice in every forward pass, writes the trace, detaches (always).

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from moe_inspect.capture import kernels
from moe_inspect.capture.attach import Attachment, mode_of, uncompiled
from moe_inspect.capture.counts import DeviceCounts
from moe_inspect.capture.manifest import capture_facts
from moe_inspect.capture.models import config_record, vocabulary_table
from moe_inspect.capture.ranks import Ranks
from moe_inspect.capture.ring import Rings
from moe_inspect.capture.routers import Site, find_routers
from moe_inspect.capture.rows import Given, RowReader, Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.place import check_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import SHARD_TOKENS, ResumePoint, RoutedBatch, TraceWriter, clear_trace


@dataclass(frozen=True)
class Forward:
    """A forward pass on its way to the writer: its rows lie in the rings from position `start` on, the first `kept` of them."""

    number: int
    fed: Rows | Given
    start: int
    kept: int
    stands: list[Tensor]  # of each ring: where its cursors stood afterwards


class Recorder:
    """Records every forward pass of `model` within the `with` block: `with record(model, "runs/a", tokenizer=tok): …`.

    Each batch row is a sequence of its own document, unless `documents` and `domains` (one value a batch row) say
    otherwise, here for every forward pass or with the recorder's `label` for the next; `attention_mask` is honoured, a reset
    of `position_ids` starts a new sequence, and a forward pass with a key-value cache goes on with its rows' sequences.
    What the model executes is what is recorded: `generate` feeds padding to rows that have ended, and its beams are rows
    like others.

    tokenizer     its vocabulary goes into the trace
    capture       "dispatch": our experts implementation routes and records; "tap": the model's own is left alone and its
                  calls are watched; "auto": dispatch where the model would run the stock grouped_mm on a GPU
    layers        only these block indices
    weights, logits     whether the gate weights, the router logits are recorded
    counts_only   keeps only counts on the device ([routers, domains, experts]); with `every=N` of each N-th forward pass.
                  `path` may be None then, and the recorder's `balance()` gives the table
    overwrite     replaces a trace at `path`; without it an existing one is refused
    drop          where the writer cannot keep up, leaves decisions out and counts them, instead of waiting
    ring_tokens   rows of the largest forward pass to make room for on the device. By default the room grows as needed, which it
                  cannot once CUDA graphs write into it

    `ranks`, `resume`, `manifest` and `shard_tokens` are for who plans the batches (`trace_model`).

    A CUDA graph replayed by hand: record two forward passes of its shape as usual (the first shows what there is to record,
    the second loads the kernels), capture another, then call `step` before each replay.

    Raises MoeInspectError for a dense model, a place that cannot be written, and, in a forward pass, where a router has not
    seen every token exactly once."""

    def __init__(
        self,
        model: Any,
        path: str | Path | None = None,
        *,
        tokenizer: Any = None,
        capture: str = "auto",
        layers: Sequence[int] | None = None,
        weights: bool = True,
        logits: bool = False,
        counts_only: bool = False,
        every: int = 1,
        documents: Sequence[Any] | None = None,
        domains: Sequence[str] | None = None,
        overwrite: bool = False,
        drop: bool = False,
        ring_tokens: int | None = None,
        ranks: Ranks | None = None,
        resume: ResumePoint | None = None,
        manifest: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ):
        if path is None and not counts_only:
            raise MoeInspectError("record needs a path for the trace (only counts_only=True works without)")
        if every != 1 and not counts_only:
            raise MoeInspectError("every=N samples counts: give counts_only=True with it")
        if not isinstance(resume, ResumePoint | None):
            raise MoeInspectError("only trace_model can resume: it knows which batch comes next")
        if counts_only and logits:
            raise MoeInspectError("counts_only keeps no logits: drop one of the two")
        self.model, self.path, self.tokenizer = uncompiled(model), Path(path) if path is not None else None, tokenizer
        self.weights, self.logits, self.counts_only, self.every = weights, logits, counts_only, every
        self.shard_tokens, self.resume, self.overwrite, self._extra = shard_tokens, resume, overwrite, manifest or {}
        self.drop, self.ring_tokens = drop, ring_tokens
        self.sites = self._chosen(find_routers(self.model), layers)
        self.mode = mode_of(self.model, self.sites, capture)
        if logits and any(s.logits_module is None for s in self.sites):
            raise MoeInspectError(f"{type(self.model).__name__} does not show its router logits: trace without --logits")
        self.ranks = ranks
        if self.path is not None and resume is None and ranks is None:
            check_directory(self.path, overwrite)
        self.routers: list[Router] = []  # a site's one after another: a layer that runs twice has two
        self._routers_of: list[list[int]] = []  # of each site
        self.writer: TraceWriter | None = None
        self.tokens = 0
        self.reader = RowReader(documents, domains)
        self.attachment = Attachment(model, self.sites, self.mode, logits, self)
        self._planned: Rows | None = None
        self._entered = False
        self._forwards = resume.next_batch if resume else 0
        self._staged: list[list[tuple[Tensor, Tensor]]] | None = []  # of the first forward pass: each router's calls
        self._staged_logits: list[list[Tensor]] = []
        self._rings: Rings | None = None
        self._fixed = ring_tokens is not None  # something else holds the rings' addresses, or their size was asked for
        self._leaving: deque[Forward] = deque()
        self._counts: DeviceCounts | None = None
        self._counting = self._in_group = False
        self._current: Rows | Given | None = None  # what the forward pass under way is fed
        self._given: Given | None = None  # the same, unless it was planned
        self._stepped = False  # it is one that `step` announced
        self._capturing = False  # it is one that a CUDA graph captures: nothing runs
        self._seen: list[int] = [0] * len(self.sites)
        self._dropped_rows = 0

    # --- attach and detach

    def __enter__(self) -> Recorder:
        if self._entered:
            raise MoeInspectError("this recording is over: call record again for another")
        self._entered = True
        self.attachment.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "interrupted"
        try:
            self.attachment.detach()
            if kind is None:
                self._finish()
                status = "complete"
            # an interrupt may have cut a hand-over short: what is still in the ring is left out, so that no batch is missing
            # between others, and --resume feeds it again
            if not self._in_group:
                self._flush_counts()
        finally:
            if self.writer is not None:
                self.writer.close(status, quiet=status != "complete")

    def _chosen(self, sites: list[Site], layers: Sequence[int] | None) -> list[Site]:
        if layers is None:
            return sites
        unknown = sorted(set(layers) - {s.layer for s in sites})
        if unknown:
            raise MoeInspectError(f"no router in layer {unknown[0]}: the MoE layers are {', '.join(str(s.layer) for s in sites)}")
        return [s for s in sites if s.layer in set(layers)]

    # --- what the caller says

    def label(self, *, documents: Sequence[Any] | None = None, domains: Sequence[str] | None = None) -> None:
        """The document and the domain of each batch row of the next forward pass."""
        self.reader.label(documents, domains)

    def expect(self, rows: Rows) -> None:
        """What the next forward pass is fed, from who planned it."""
        self._planned = rows

    def end_group(self) -> None:
        """The passes of a group are over: what was counted may be committed."""
        self._in_group = False
        if self._counts is not None and self._counts.tokens >= self.shard_tokens:
            self._flush_counts()

    def step(self, tokens: int, **inputs: Any) -> None:
        """Announces a forward pass of `tokens` rows a router that runs without the model being called: a CUDA graph replayed
        by hand, on this stream. Waits until there is room for it. `inputs`: what the model would be called with (`input_ids`,
        `attention_mask`, `position_ids`, `past_key_values`); without them its rows are one document of unknown tokens."""
        if self._staged is not None or self.counts_only:
            raise MoeInspectError("step() follows a forward pass that was recorded as usual, into a trace")
        self._fixed = True
        fed = self._next((), inputs or {"input_ids": torch.full((1, tokens), -1)})
        if tokens != fed.T:
            raise MoeInspectError(f"step({tokens}) with inputs of {fed.T} rows")
        self._start(fed)
        self._stepped = True
        self._confirm(inputs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes within are not recorded, CUDA graphs replayed within neither."""
        self._end_step()
        before, self.attachment.paused = self.attachment.paused, True
        if self._rings is not None:
            self._rings.enable(False)
        try:
            yield
        finally:
            self.attachment.paused = before
            if self._rings is not None:
                self._rings.enable(not before)

    # --- what the attachment says of a forward pass

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if self._capturing:  # only the kernels' launches matter; the host must not look at anything now
            if self._forwards < 2 or self.counts_only:
                raise MoeInspectError("record two forward passes before capturing a CUDA graph, and a trace, not counts_only")
            self._fixed = True
            return
        fed = self._next(args, kwargs)
        self._seen = [0] * len(self.sites)
        if self._staged is not None:
            self._current = self._read(fed)
            self._staged = [[] for _ in self.sites]
            self._staged_logits = [[] for _ in self.sites]
        elif self._counts is not None:
            self._current = rows = self._read(fed)
            self._counting = self._forwards % self.every == 0
            if self._counting:
                self._counts.begin(rows, len(self.reader.domains))
        else:
            self._start(fed)

    def _next(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | Given:
        """What the coming forward pass is fed: as planned, else as its arguments say."""
        planned, self._planned, self._given = self._planned, None, None
        if planned is None:
            self._given = self.reader.note(args, kwargs)
            return self._given
        if planned.number is not None:
            self._forwards = planned.number
        return planned

    def _read(self, fed: Rows | Given) -> Rows:
        return fed if isinstance(fed, Rows) else self.reader.rows(fed)

    def _confirm(self, output: Any) -> None:
        if self._given is not None:
            self.reader.confirm(self._given, output)

    def take(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One call of router r, before there is a tape or where there is none."""
        row, self._seen[r] = self._seen[r], self._seen[r] + len(ids_TK)
        if self._staged is not None:
            self._staged[r].append((ids_TK.clone(), weights_TK.clone()))
        elif self._counts is not None and self._counting and self._current is not None:
            time, row = divmod(row, self._current.T)
            if time < len(self._routers_of[r]):  # else the completeness check speaks of it
                self._counts.add(self._routers_of[r][time], row, ids_TK, weights_TK)

    def take_logits(self, r: int, logits_TE: Tensor) -> None:
        self._staged_logits[r].append(logits_TE.clone())

    def end(self, output: Any) -> None:
        if self._capturing:
            self._capturing = False
            return
        if self._staged is not None:
            self._begin_with()
        if self._counts is not None:
            self._end_counted(self._counts)
        else:
            self._end_forward()
        self._confirm(output)

    # --- a forward pass that is recorded on tapes

    def _start(self, fed: Rows | Given) -> None:
        """Back-pressure is here: waits until the rings have room, unless decisions may be dropped."""
        self._end_step()
        rings, T = self._rings, fed.T
        assert rings is not None
        if self._current is not None:  # the forward pass before this one failed
            rings.rewind(self._dropped_rows)
        self._drain()
        too_large = rings.fits < T
        while rings.room < T and self._leaving and (too_large or not self.drop):
            self._drain(wait=True, most=1)
        if rings.room < T and too_large:
            if self._fixed:
                raise MoeInspectError(
                    f"a forward pass of {T:,} rows is more than the {rings.fits:,} there is room for on the device: "
                    f"record with ring_tokens={T}"
                )
            self._make_rings(T)
        self._current = self._read(fed) if rings.at_once else fed

    def _end_forward(self) -> None:
        """A forward pass has been launched, and need not have run."""
        rings, fed = self._rings, self._current
        assert rings is not None
        assert fed is not None
        T = fed.T
        forward = Forward(self._forwards, fed, rings.head, min(T, max(0, rings.room)), rings.stands())
        if rings.at_once:  # else it is seen when it has arrived
            self._check(forward)
        rings.end(T)
        self._leaving.append(forward)
        self.reader.settle()
        self._current = None
        self._forwards += 1
        self._dropped_rows += T - forward.kept
        self._drain()

    def _end_step(self) -> None:
        """The forward pass that `step` announced is over."""
        if self._stepped:
            self._stepped = False
            self._end_forward()

    def _check(self, forward: Forward) -> None:
        """Every router must have seen every token exactly once, or the trace would be silently wrong."""
        assert self._rings is not None
        seen = self._rings.seen(forward.stands, forward.start)
        self._check_seen(forward.fed.T, *seen)

    def _check_seen(self, T: int, seen: Sequence[int], logits: Sequence[int] | None = None) -> None:
        for rows_of in (seen, logits):
            for router, n in zip(self.routers, rows_of or (), strict=bool(rows_of)):
                if n != T:
                    self._refuse_rows(router.path, n, T, logits=rows_of is logits)

    def _refuse_rows(self, path: str, n: int, T: int, logits: bool) -> NoReturn:
        if logits:
            raise MoeInspectError(f"{path} showed logits of {n} rows in a forward pass of {T}: trace without --logits")
        why = "fused experts, or kernels of the hub that bypass their call: load the model without them"
        why += ", or a CUDA graph replayed without step()" if self._fixed else ""
        raise MoeInspectError(f"{path} routed {n} rows in a forward pass of {T}: this model's routing cannot be seen ({why})")

    def _drain(self, wait: bool = False, most: int | None = None) -> None:
        """Hands the forward passes that have arrived to the writer, up to `most`; with `wait` waits for them, and for it."""
        rings = self._rings
        while self._leaving and most != 0:
            assert rings is not None
            assert self.writer is not None
            if self.drop and not wait and self.writer.full:
                return
            forward = self._leaving[0]
            if not rings.arrived(forward.start + forward.fed.T, wait):
                return
            if not rings.at_once:
                self._check(forward)
            self._hand_over(forward)
            rings.handed_over(forward.start + forward.fed.T)
            self._leaving.popleft()
            most = most - 1 if most is not None else None

    def _hand_over(self, forward: Forward) -> None:
        rings, rows = self._rings, self._read(forward.fed)
        self.reader.settle()
        assert rings is not None
        assert self.writer is not None
        real = rows.real[: forward.kept]
        keep = None if real.all() else np.flatnonzero(real)
        n = int(real.sum())
        self.tokens += n
        self.writer.dropped += (int(rows.real.sum()) - n) * len(self.routers)

        def of(kind: str) -> list[np.ndarray]:
            return [rings.rows(kind, r, forward.start, forward.kept, keep) for r in range(len(self.routers))]

        self.writer.write(
            RoutedBatch(
                forward.number,
                rows.token_id[:n],
                rows.document[:n],
                rows.sequence[:n],
                rows.position[:n],
                rows.domain[:n],
                list(self.reader.domains),
                ids=of("ids"),
                weights=of("weights") if self.weights else None,
                logits=of("logits") if self.logits else None,
                documents=rows.documents,
                phase=rows.phase,
                group=rows.group,
            )
        )

    def _finish(self) -> None:
        """Everything to the writer; device and host must agree on what was dropped."""
        self._end_step()
        if self._rings is not None:
            self._rings.synchronize()
        self._drain(wait=True)
        if self._rings is None:
            return
        if self._current is not None:  # the last forward pass failed
            self._rings.rewind(self._dropped_rows)
        stands, dropped = self._rings.stands(), self._rings.dropped()  # the second waits for the device, and for the first
        self._check_seen(0, *self._rings.seen(stands, self._rings.head))
        assert all(n == self._dropped_rows for n in dropped), f"the device dropped {dropped} rows, the host {self._dropped_rows}"

    # --- a forward pass that is counted

    def _end_counted(self, counts: DeviceCounts) -> None:
        rows, self._current = self._current, None
        assert isinstance(rows, Rows)
        self.reader.settle()
        if self._counting:
            times = [len(routers) for routers in self._routers_of]
            self._check_seen(rows.T, [share for n, t in zip(self._seen, times, strict=True) for share in _shares(n, t, rows.T)])
            counts.end(rows, self._forwards)
            self._in_group = rows.group is not None
            if not self._in_group:
                self.end_group()
        self._forwards += 1
        self.tokens += int(rows.real.sum())

    def _flush_counts(self) -> None:
        if self._counts is not None and self.writer is not None and self._counts.tokens:
            self.writer.write(self._counts.take(list(self.reader.domains)))

    # --- the first forward pass says what the pages and the table look like

    def _begin_with(self) -> None:
        """Top-k, dtypes and devices are what the first forward pass showed, not what a config claims. Its decisions were
        kept aside (`_staged`), and are written now."""
        staged, logits, rows = self._staged, self._staged_logits, self._current
        assert staged is not None
        assert isinstance(rows, Rows)
        T = rows.T
        times = [len(calls) if len(calls) > 1 and all(len(ids) == T for ids, _ in calls) else 1 for calls in staged]
        for calls_of in (staged, logits) if self.logits else (staged,):
            for site, calls, t in zip(self.sites, calls_of, times, strict=True):
                if (n := _length(calls)) != t * T:
                    self._refuse_rows(site.path, n, T, logits=calls_of is logits)
        for r, calls in enumerate(logits):
            if calls:
                self._refuse_probabilities(r, calls[0])
        runs = [(site, time) for site, t in zip(self.sites, times, strict=True) for time in range(t)]
        staged, logits = _by_run(staged, times), _by_run(logits, times)
        first = [calls[0] for calls in staged]
        self._shape = [(ids.device, ids.shape[1], site.experts) for (site, _), (ids, _) in zip(runs, first, strict=True)]
        self._routers_of = [[n for n, (s, _) in enumerate(runs) if s is site] for site in self.sites]
        self._weight_dtype = torch.bfloat16 if all(w.dtype == torch.bfloat16 for _, w in first) else torch.float16
        self.routers = [_router(site, time, shape[1]) for (site, time), shape in zip(runs, self._shape, strict=True)]
        if self.path is not None and self.writer is None:
            self.writer = self._open_writer()
        if not self.counts_only:
            self._make_rings(self.ring_tokens or T)
        self._staged, self._staged_logits = None, []
        if self.counts_only:
            self._counts, self._counting = DeviceCounts(self.routers, [ids.device for ids, _ in first], self.weights), True
            self._counts.begin(rows, len(self.reader.domains))
            self._seen = [0] * len(self.sites)
            for site, routers in enumerate(self._routers_of):
                for choice in [choice for r in routers for choice in staged[r]]:
                    self.take(site, *choice)
            return
        self._current = None
        self._start(rows)
        assert self._rings is not None
        for tape, calls in zip(self._rings.tapes, staged, strict=True):
            for choice in calls:
                kernels.record(tape, *choice)
        for tape, calls in zip(self._rings.logit_tapes, logits, strict=False):
            for values in calls:
                kernels.record(tape, None, values)

    def _refuse_probabilities(self, r: int, logits_TE: Tensor) -> None:
        values = logits_TE.float()
        if bool((values >= 0).all()) and torch.allclose(values.sum(1), torch.ones(len(values), device=values.device), atol=1e-2):
            raise MoeInspectError(f"{self.sites[r].path} shows probabilities where its family declares logits: trace without --logits")

    def _make_rings(self, rows: int) -> None:
        """Rings that hold forward passes of `rows` rows; those before them, if any, are empty."""
        assert not self._leaving
        self._rings = Rings(self._shape, self._weight_dtype if self.weights else None, self.logits, rows)
        self._rings.rewind(self._dropped_rows)
        for sinks, tapes in ((self.attachment.sinks, self._rings.tapes), (self.attachment.logit_sinks, self._rings.logit_tapes)):
            for sink, routers in zip(sinks, self._routers_of, strict=False):
                sink.tapes = [tapes[r] for r in routers]

    def _open_writer(self) -> TraceWriter:
        assert self.path is not None
        ranks = self.ranks
        if ranks is not None and ranks.rank:
            ranks.hear("open")  # rank 0 has made way
        elif self.resume is None:
            check_directory(self.path, self.overwrite)  # another recording may have begun there meanwhile
            if self.overwrite and (self.path / schema.MANIFEST).exists():
                clear_trace(self.path)
        text = self.model.config.get_text_config()
        manifest = {
            "model": {"id": getattr(self.model.config, "_name_or_path", ""), "revision": None, "class": type(self.model).__name__},
            **self._extra,
        }
        manifest["model"]["config"] = config_record(self.model.config)
        manifest["capture"] = {
            **capture_facts(self.model, self.mode),
            "weight_dtype": str(self._weight_dtype).removeprefix("torch.") if self.weights else None,
        }
        vocabulary: pa.Table | None = None
        if self.tokenizer is not None:
            vocabulary = vocabulary_table(self.tokenizer, getattr(text, "vocab_size", 0) or 0)
        writer = TraceWriter(
            self.path,
            manifest,
            self.routers,
            weights=self.weights,
            logits=self.logits,
            counts_only=self.counts_only,
            vocabulary=vocabulary,
            rank=ranks.rank if ranks is not None else 0,
            resume=self.resume,
            shard_tokens=self.shard_tokens,
        )
        if ranks is not None:
            ranks.say("open")
            writer.others = ranks.status
        return writer

    def balance(self, all_ranks: bool = False) -> Any:
        """The balance table of what has been counted since the recording began (`counts_only=True`); with `all_ranks`
        summed over the processes of torch.distributed."""
        if self._counts is None:
            raise MoeInspectError("balance() reads counts on the device: record with counts_only=True, after a forward pass")
        from moe_inspect.analysis.aggregate import Counts, RouterCounts
        from moe_inspect.report.tables import balance_of

        load, tokens = self._counts.totals(all_ranks)
        counts = Counts(self.routers, tuple(range(len(self.routers))), [""], [("", 0)], np.array([tokens]), counts_only=True)
        for r, load_E in enumerate(load):
            counts.of[r] = RouterCounts(load_E[None], load_E[None] * 0, None)
        return balance_of(counts)


record = Recorder  # the public name: `with moe_inspect.record(model, path): …`


def _router(site: Site, time: int, top_k: int) -> Router:
    again = f" (run {time + 1})" if time else ""
    name, path = site.path.split(".", 1)[-1] + again, site.path + again
    return Router(site.layer, name, path, site.experts, top_k, site.scoring, site.shared_experts)


def _shares(n: int, times: int, T: int) -> list[int]:
    """n rows that a site saw, by the runs of its layer; what is too many goes to the last."""
    return [min(T, max(0, n - time * T)) if time < times - 1 else max(0, n - time * T) for time in range(times)]


def _by_run(calls_of: list[list[Any]], times: list[int]) -> list[list[Any]]:
    """The calls of each site → the calls of each run of its layer."""
    return [run for calls, t in zip(calls_of, times, strict=True) for run in ([[c] for c in calls] if t > 1 else [calls])]


def _length(calls: Sequence[Any]) -> int:
    """Rows of the calls of one router; a choice is (ids, weights)."""
    return sum(len(call[0]) if isinstance(call, tuple) else len(call) for call in calls)
