"""Recorder: attaches to a model, sees every router's choice in every forward pass, writes the
trace, detaches (always).

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from moe_inspect.capture.hook.attach import Attachment, mode_of, uncompiled
from moe_inspect.capture.hook.call_inputs import Given, RowReader, Rows
from moe_inspect.capture.hook.device_counts import DeviceCounts, Totals
from moe_inspect.capture.hook.stack import Pass, Stack
from moe_inspect.capture.manifest import capture_facts
from moe_inspect.capture.ranks import Ranks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.load import config_record
from moe_inspect.model.routers import Site, find_routers
from moe_inspect.model.vocabulary import vocabulary_table
from moe_inspect.trace import slot_order
from moe_inspect.trace.files.lock import Lock, join
from moe_inspect.trace.output_dir import check_directory, claim_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import SHARD_TOKENS, ResumePoint, RoutedBatch, TraceWriter

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Forward:
    """A forward pass on its way to the writer."""

    number: int
    passes: list[Pass]  # of an encoder-decoder: of the encoder, then of the decoder

    def arrived(self, wait: bool) -> bool:
        return all(
            p.stack.rings is not None and p.stack.rings.arrived(p.start + p.fed.T, wait)
            for p in self.passes
        )


class Recorder:
    """Records every forward pass of `model` within its `with` block. The public function
    `moe_inspect.record` describes the options.

    `ranks`, `resume` with its `lock`, `manifest` and `shard_tokens` are for callers that plan the
    batches (`trace_model`). `balance_of` turns what has been counted into the table that
    `balance()` returns."""

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
        lock: Lock | None = None,
        manifest: dict[str, Any] | None = None,
        shard_tokens: int = SHARD_TOKENS,
        balance_of: Callable[[Totals], pd.DataFrame] | None = None,
    ):
        if path is None and not counts_only:
            raise MoeInspectError(
                "record needs a path for the trace (only counts_only=True works without)"
            )
        if every != 1 and not counts_only:
            raise MoeInspectError("every=N samples counts: give counts_only=True with it")
        if counts_only and logits:
            raise MoeInspectError("counts_only keeps no logits: drop one of the two")
        self.model, self.path, self.tokenizer = (
            uncompiled(model),
            Path(path) if path is not None else None,
            tokenizer,
        )
        self.weights, self.logits, self.counts_only, self.every = (
            weights,
            logits,
            counts_only,
            every,
        )
        self.shard_tokens, self.resume, self.overwrite, self._extra = (
            shard_tokens,
            resume,
            overwrite,
            manifest or {},
        )
        self.drop, self.ring_tokens, self._balance_of = drop, ring_tokens, balance_of
        self.sites = self._chosen(find_routers(self.model), layers)
        self.mode = mode_of(self.model, self.sites, capture)
        if logits and any(s.logits_module is None for s in self.sites):
            raise MoeInspectError(
                f"{type(self.model).__name__} does not show its router logits: trace without "
                "--logits"
            )
        self._at: dict[
            int, tuple[str, int]
        ] = {}  # of each site: its stack, and which of the stack's it is
        self.ranks, self.lock = ranks, lock
        self._own_lock: Lock | None = None
        if self.path is not None and resume is None and ranks is None:
            check_directory(self.path, overwrite)
        self.writer: TraceWriter | None = None
        self.tokens = 0
        self.attachment = Attachment(model, self.sites, self.mode, logits, self)
        self.stacks = {name: self._stack(name) for name in self.attachment.gates}
        self.reader = RowReader(
            {name: _arguments(gate.module) for name, gate in self.attachment.gates.items()},
            documents,
            domains,
        )
        self._planned: dict[str, Rows] = {}  # of the next forward pass, by stack
        self._plan: dict[str, Rows] = {}  # of the one under way
        self._entered = False
        self._forwards = resume.next_batch if resume else 0
        self._fixed = (
            ring_tokens is not None
        )  # something else holds the rings' addresses, or their size was asked for
        self._leaving: deque[Forward] = deque()
        self._counts: DeviceCounts | None = None
        self._counting = self._in_group = False
        self._returned: list[
            tuple[Given, Any]
        ] = []  # what the stacks in this forward pass were given, and returned
        self._opened = False  # the routers are known, and what their pages hold
        self._stepped = False  # it is one that `step` announced
        self._capturing = False  # it is one that a CUDA graph captures: nothing runs

    def _stack(self, name: str) -> Stack:
        of_stack = [r for r, site in enumerate(self.sites) if site.stack == name]
        sinks, logit_sinks = self.attachment.sinks, self.attachment.logit_sinks
        self._at.update({r: (name, n) for n, r in enumerate(of_stack)})
        return Stack(
            name,
            [self.sites[r] for r in of_stack],
            [sinks[r] for r in of_stack],
            [logit_sinks[r] for r in of_stack] if logit_sinks else [],
            self.model,
        )

    @property
    def routers(self) -> list[Router]:
        return [router for stack in self.stacks.values() for router in stack.routers]

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
            # an interrupt may have cut a hand-over short: what is still in the ring is left out, so
            # that no batch is missing between others, and --resume feeds it again
            if not self._in_group:
                self._flush_counts()
        finally:
            try:
                if self.writer is not None:
                    self.writer.close(status, quiet=status != "complete")
            finally:
                if self._own_lock is not None:
                    self._own_lock.release()

    def _chosen(self, sites: list[Site], layers: Sequence[int] | None) -> list[Site]:
        if layers is None:
            return sites
        unknown = sorted(set(layers) - {s.layer for s in sites})
        if unknown:
            raise MoeInspectError(
                f"no router in layer {unknown[0]}: the MoE layers are "
                f"{', '.join(str(s.layer) for s in sites)}"
            )
        return [s for s in sites if s.layer in set(layers)]

    # --- what the caller says

    def label(
        self, *, documents: Sequence[Any] | None = None, domains: Sequence[str] | None = None
    ) -> None:
        """The document and the domain of each batch row of the next forward pass."""
        self.reader.label(documents, domains)

    def expect(self, *rows: Rows) -> None:
        """What the next forward pass is fed (of an encoder-decoder, each of its stacks), from who
        planned it."""
        self._planned = {r.stack: r for r in rows}

    def end_group(self) -> None:
        """The passes of a group are over: what was counted may be committed."""
        self._in_group = False
        if self._counts is not None and self._counts.tokens >= self.shard_tokens:
            self._flush_counts()

    def step(self, tokens: int, **inputs: Any) -> None:
        """Announces a forward pass of `tokens` rows a router that runs without the model being
        called: a CUDA graph replayed by hand, on this stream. Waits until there is room for it.
        `inputs`: what the model would be called with (`input_ids`, `attention_mask`,
        `position_ids`, `past_key_values`); without them its rows are one document of unknown
        tokens."""
        if list(self.stacks) != [""]:
            raise MoeInspectError(
                f"{type(self.model).__name__} is two stacks, and step() says nothing of which it "
                "feeds: call the model"
            )
        stack = self.stacks[""]
        if stack.staged is not None or self.counts_only:
            raise MoeInspectError(
                "step() follows a forward pass that was recorded as usual, into a trace"
            )
        self._fix()
        self._begin()
        fed = self._next(stack, (), inputs or {"input_ids": torch.full((1, tokens), -1)})
        if tokens != fed.T:
            raise MoeInspectError(f"step({tokens}) with inputs of {fed.T} rows")
        self._make_room(stack, fed)
        self._stepped = True
        self._confirm(stack, inputs)

    def _fix(self) -> None:
        """A CUDA graph writes into the rings: they stay where they are."""
        self._fixed = self.stacks[""].replayed = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes within are not recorded, CUDA graphs replayed within neither."""
        self._end_step()
        before, self.attachment.paused = self.attachment.paused, True
        self._enable(False)
        try:
            yield
        finally:
            self.attachment.paused = before
            self._enable(not before)

    def _enable(self, on: bool) -> None:
        for stack in self.stacks.values():
            if stack.rings is not None:
                stack.rings.enable(on)

    # --- what the attachment says of a forward pass

    def begin(self) -> None:
        self._capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if (
            self._capturing
        ):  # only the kernels' launches matter; the host must not look at anything now
            if self._forwards < 2 or self.counts_only or list(self.stacks) != [""]:
                raise MoeInspectError(
                    "record two forward passes before capturing a CUDA graph, and a trace of one "
                    "stack, not counts_only"
                )
            self._fix()
            return
        self._begin()

    def _begin(self) -> None:
        self._end_step()
        self.reader.forget()  # the forward pass before this one, if it failed
        for stack in self.stacks.values():
            stack.begin()
        self._plan, self._planned, self._returned = self._planned, {}, []
        self._forwards = next(
            (r.number for r in self._plan.values() if r.number is not None), self._forwards
        )
        self._counting = self._forwards % self.every == 0
        if self._counts is not None:
            self._counts.begin()

    def feed(self, stack: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._capturing:
            return
        of = self.stacks[stack]
        if of.fed is not None:
            raise MoeInspectError(
                f"the {stack} ran twice in one forward pass of {type(self.model).__name__}: call "
                "it by itself"
            )
        fed = self._next(of, args, kwargs)
        if of.staged is None and self._counts is None:
            self._make_room(of, fed)
            return
        of.fed = self._read(fed)
        if of.staged is None:
            self._count(of)

    def _next(self, stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | Given:
        """What the coming call of a stack is fed: as planned, else as its arguments say."""
        if stack.name in self._plan:
            return self._plan[stack.name]
        encoder = (
            self.stacks["encoder"].given
            if stack.name == "decoder" and "encoder" in self.stacks
            else None
        )
        stack.given = self.reader.note(args, kwargs, stack.name, encoder)
        return stack.given

    def _read(self, fed: Rows | Given) -> Rows:
        return fed if isinstance(fed, Rows) else self.reader.rows(fed)

    def returned(self, stack: str, output: Any) -> None:
        if not self._capturing:
            self._confirm(self.stacks[stack], output)

    def _confirm(self, stack: Stack, output: Any) -> None:
        if stack.given is not None:
            self._returned.append((stack.given, output))

    def take(self, r: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One call of the router at site r, before there is a tape or where there is none."""
        name, n = self._at[r]
        stack = self.stacks[name]
        row, stack.seen[n] = stack.seen[n], stack.seen[n] + len(ids_TK)
        if stack.staged is not None:
            stack.staged[n].append((ids_TK.clone(), weights_TK.clone()))
        elif self._counts is not None and self._counting and stack.fed is not None:
            time, row = divmod(row, stack.fed.T)
            if time < stack.times[n]:  # else the completeness check speaks of it
                self._counts.add(
                    stack.first_router + stack.routers_of[n][time], row, ids_TK, weights_TK
                )

    def take_logits(self, r: int, logits_TE: Tensor) -> None:
        name, n = self._at[r]
        self.stacks[name].staged_logits[n].append(logits_TE.clone())

    def end(self) -> None:
        if self._capturing:
            self._capturing = False
            return
        fed = [stack for stack in self.stacks.values() if stack.fed is not None]
        if new := [stack for stack in fed if stack.staged is not None]:
            self._begin_with(new)
        if fed and self._counts is not None:
            self._end_counted(self._counts, fed)
        elif fed:  # nothing is recorded of a stack without routers
            self._end_forward(fed)
        for given, output in self._returned:
            self.reader.confirm(given, output)
        self._returned = []

    # --- a forward pass that is recorded on tapes

    def _make_room(self, stack: Stack, fed: Rows | Given) -> None:
        """Back-pressure is here: waits until the rings have room, unless decisions may be
        dropped."""
        rings, T = stack.rings, fed.T
        assert rings is not None
        self._drain()
        too_large = rings.fits < T
        while rings.room < T and self._leaving and (too_large or not self.drop):
            self._drain(wait=True, most=1)
        if rings.room < T and too_large:
            if self._fixed:
                raise MoeInspectError(
                    f"a forward pass of {T:,} rows is more than the {rings.fits:,} there is room "
                    "for on the device: "
                    f"record with ring_tokens={T}"
                )
            self._make_rings(stack, T)
            rings = stack.rings
            assert rings is not None
        stack.fed = self._read(fed) if rings.at_once else fed

    def _make_rings(self, stack: Stack, rows: int) -> None:
        assert not any(p.stack is stack for forward in self._leaving for p in forward.passes)
        stack.make_rings(
            rows, self._weight_dtype
        )  # also without weights in the trace: its slots are ordered by them

    def _end_forward(self, fed: Sequence[Stack]) -> None:
        """A forward pass has been launched, and need not have run."""
        passes = [stack.end() for stack in fed]
        for done in passes:
            if (
                rings := done.stack.rings
            ) is not None and rings.at_once:  # else it is seen when it has arrived
                done.stack.check(done)
        for done in passes:
            assert done.stack.rings is not None
            done.stack.rings.end(done.fed.T)
            done.stack.dropped_rows += done.fed.T - done.kept
            done.stack.fed = None
        self._leaving.append(Forward(self._forwards, passes))
        self.reader.settle()
        self._forwards += 1
        self._drain()

    def _end_step(self) -> None:
        """The forward pass that `step` announced is over."""
        if self._stepped:
            self._stepped = False
            self.end()

    def _drain(self, wait: bool = False, most: int | None = None) -> None:
        """Hands the forward passes that have arrived to the writer, up to `most`; with `wait` waits
        for them, and for it."""
        while self._leaving and most != 0:
            assert self.writer is not None
            if self.drop and not wait and self.writer.full:
                return
            forward = self._leaving[0]
            if not forward.arrived(wait):
                return
            for done in forward.passes:
                if done.stack.rings is not None and not done.stack.rings.at_once:
                    done.stack.check(done)
            self._hand_over(forward)
            for done in forward.passes:
                assert done.stack.rings is not None
                done.stack.rings.handed_over(done.start + done.fed.T)
            self._leaving.popleft()
            most = most - 1 if most is not None else None

    def _hand_over(self, forward: Forward) -> None:
        assert self.writer is not None
        parts = [(done, self._read(done.fed)) for done in forward.passes]
        self.reader.settle()
        kept = {done.stack.name: rows.real[: done.kept] for done, rows in parts}
        counts = {name: int(real.sum()) for name, real in kept.items()}
        self.tokens += sum(counts.values())
        for done, rows in parts:
            self.writer.dropped += (int(rows.real.sum()) - counts[done.stack.name]) * len(
                done.stack.routers
            )

        def of_tokens(name: str) -> np.ndarray:
            arrays = [getattr(rows, name)[: counts[done.stack.name]] for done, rows in parts]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        empty_of = {
            "ids": np.uint8,
            "weights": np.uint16 if self._weight_dtype == torch.bfloat16 else np.float16,
            "logits": np.float16,
        }

        def of_routers(kind: str) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for name, stack in self.stacks.items():
                done = next((p for p in forward.passes if p.stack is stack), None)
                if done is None:  # this forward pass fed it nothing
                    widths = [
                        router.experts if kind == "logits" else router.top_k
                        for router in stack.routers
                    ]
                    found += [np.empty((0, width), empty_of[kind]) for width in widths]
                    continue
                assert stack.rings is not None
                keep = None if kept[name].all() else np.flatnonzero(kept[name])
                found += [
                    stack.rings.rows(kind, r, done.start, done.kept, keep)
                    for r in range(len(stack.routers))
                ]
            return found

        _, last = parts[-1]
        self.writer.write(
            RoutedBatch(
                forward.number,
                of_tokens("token_id"),
                of_tokens("document"),
                of_tokens("sequence"),
                of_tokens("position"),
                of_tokens("domain"),
                list(self.reader.domains),
                ids=of_routers("ids"),
                weights=of_routers("weights"),
                logits=of_routers("logits") if self.logits else None,
                documents=[document for _, rows in parts for document in rows.documents],
                phase=last.phase,
                group=last.group,
                encoded=counts.get("encoder", 0),
            )
        )

    def _finish(self) -> None:
        """Everything to the writer; device and host must agree on what was dropped."""
        self._end_step()
        for stack in self.stacks.values():
            if stack.rings is not None:
                stack.rings.synchronize()
        self._drain(wait=True)
        for stack in self.stacks.values():
            if (rings := stack.rings) is None:
                continue
            if stack.fed is not None:  # the last forward pass failed
                rings.rewind(stack.dropped_rows)
            stands, dropped = (
                rings.stands(),
                rings.dropped(),
            )  # the second waits for the device, and for the first
            stack.check_seen(0, *rings.seen(stands, rings.head))
            assert all(n == stack.dropped_rows for n in dropped), (
                f"the device dropped {dropped} rows, the host {stack.dropped_rows}"
            )

    # --- a forward pass that is counted

    def _count(self, stack: Stack) -> None:
        assert isinstance(stack.fed, Rows)
        if self._counts is not None and self._counting:
            routers = range(stack.first_router, stack.first_router + len(stack.routers))
            self._counts.feed(routers, stack.fed, len(self.reader.domains))

    def _end_counted(self, counts: DeviceCounts, fed: Sequence[Stack]) -> None:
        self.reader.settle()
        rows = [stack.fed for stack in fed if isinstance(stack.fed, Rows)]
        if self._counting:
            for stack in fed:
                stack.check_counted()
            counts.end(self._forwards)
            self._in_group = rows[-1].group is not None
            if not self._in_group:
                self.end_group()
        self._forwards += 1
        self.tokens += sum(int(r.real.sum()) for r in rows)
        for stack in fed:
            stack.fed = None

    def _flush_counts(self) -> None:
        if self._counts is not None and self.writer is not None and self._counts.tokens:
            self.writer.write(self._counts.take(list(self.reader.domains)))

    # --- the first forward pass says what the pages and the table look like

    def _begin_with(self, new: Sequence[Stack]) -> None:
        """These stacks have run for the first time. What they chose was kept aside, and is written
        now."""
        dtypes = [dtype for stack in new for dtype in stack.settle_shape()]
        if self._opened:
            for stack in new:
                stack.refuse_undeclared()
        else:
            self._open(
                torch.bfloat16 if all(d == torch.bfloat16 for d in dtypes) else torch.float16
            )
        for stack in new:
            rows, staged = stack.fed, stack.staged
            assert isinstance(rows, Rows)
            assert staged is not None
            if self.counts_only:
                stack.staged, stack.staged_logits, stack.seen = None, [], [0] * len(stack.sites)
                self._count(stack)
                for site, choices in zip(self._sites_of(stack), stack.routers_of, strict=True):
                    for choice in [choice for r in choices for choice in staged[r]]:
                        self.take(site, *choice)
            else:
                self._make_rings(stack, self.ring_tokens or rows.T)
                stack.fed = None
                self._make_room(stack, rows)
                stack.unstage()

    def _sites_of(self, stack: Stack) -> list[int]:
        return [r for r, (name, _) in self._at.items() if name == stack.name]

    def _open(self, weight_dtype: torch.dtype) -> None:
        self._opened, self._weight_dtype = True, weight_dtype
        first = 0
        for stack in self.stacks.values():
            stack.first_router, first = first, first + len(stack.routers)
        if self.path is not None:
            self.writer = self._open_writer()
        if self.counts_only:
            self._counts = DeviceCounts(
                self.routers,
                [d for stack in self.stacks.values() for d in stack.devices()],
                self._weight_dtype,
                self.weights,
            )
            self._counts.begin()

    def _open_writer(self) -> TraceWriter:
        assert self.path is not None
        ranks = self.ranks
        job = (
            ranks.hear("open") if ranks is not None and ranks.rank else None
        )  # rank 0 has made way
        if self.lock is None and self._own_lock is None:
            shared = ranks is not None and ranks.world > 1
            self._own_lock = (
                join(self.path, job)
                if job is not None
                else claim_directory(self.path, self.overwrite, shared=shared)
            )
        held = self.lock or self._own_lock
        assert held is not None
        text = self.model.config.get_text_config()
        manifest = {
            "model": {
                "id": getattr(self.model.config, "_name_or_path", ""),
                "revision": None,
                "class": type(self.model).__name__,
            },
            **self._extra,
        }
        manifest["model"]["config"] = config_record(self.model.config)
        if notes := {
            site.adapter.note
            for site in self.sites
            if site.adapter is not None and site.adapter.note
        }:
            manifest["model"]["note"] = "; ".join(sorted(notes))
        manifest["capture"] = {
            **capture_facts(self.model, self.mode),
            "weight_dtype": str(self._weight_dtype).removeprefix("torch.")
            if self.weights
            else None,
        }
        vocabulary: pa.Table | None = None
        if self.tokenizer is not None:
            vocabulary = vocabulary_table(self.tokenizer, getattr(text, "vocab_size", 0) or 0)
        writer = TraceWriter(
            self.path,
            manifest,
            [slot_order.stated(router, known=True) for router in self.routers],
            weights=self.weights,
            logits=self.logits,
            counts_only=self.counts_only,
            vocabulary=vocabulary,
            rank=ranks.rank if ranks is not None else 0,
            resume=self.resume,
            shard_tokens=self.shard_tokens,
            lock=held,
        )
        if ranks is not None:
            ranks.say("open", held.job)
            writer.others = ranks.status
        return writer

    def totals(self, all_ranks: bool = False) -> Totals:
        """What has been counted since the recording began (`counts_only=True`); with `all_ranks`
        summed over the processes of torch.distributed."""
        if self._counts is None:
            raise MoeInspectError(
                "nothing is counted yet: record with counts_only=True, and run a forward pass first"
            )
        return self._counts.totals(all_ranks)

    def balance(self, all_ranks: bool = False) -> pd.DataFrame:
        """The balance table of `totals`."""
        assert self._balance_of is not None
        return self._balance_of(self.totals(all_ranks))


def _arguments(module: torch.nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
