"""Recorder: attaches to a model, records the choice of every router in every forward pass, writes
the trace, and always detaches.

T rows a router sees (padding included), K slots, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from moe_inspect.capture.counted import Counted, Totals
from moe_inspect.capture.hand_over import HandOver
from moe_inspect.capture.hook.arguments import CallReader
from moe_inspect.capture.hook.attach import Attachment
from moe_inspect.capture.hook.experts import mode_of
from moe_inspect.capture.hook.inputs import PassInputs
from moe_inspect.capture.hook.numbering import Rows
from moe_inspect.capture.hook.stack import Sinks, Stack
from moe_inspect.capture.open_trace import Planned, TraceOpener
from moe_inspect.capture.options import RecordOptions
from moe_inspect.capture.ranks import Ranks
from moe_inspect.errors import MoeInspectError
from moe_inspect.model.find import no_routers, recordable
from moe_inspect.model.own import as_tokenizer
from moe_inspect.model.routers import Site
from moe_inspect.model.wrapped import unwrapped
from moe_inspect.trace.files.location import output_location
from moe_inspect.trace.output_dir import check_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import TraceWriter

if TYPE_CHECKING:
    import pandas as pd


P = ParamSpec("P")
R = TypeVar("R")


def locked(method: Callable[Concatenate[Recorder, P], R]) -> Callable[Concatenate[Recorder, P], R]:
    """The method of a recorder, run by one thread at a time: another may ask it what there is."""

    @wraps(method)
    def run(self: Recorder, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            return method(self, *args, **kwargs)

    return run


class Recorder:
    """Records every forward pass of `model` within its `with` block. The public function
    `moe_inspect.record` describes the options, `documents` and `domains`.

    `planned` is of callers that plan the batches (`trace_model`). `balance_of` computes the table
    that `balance()` returns from the counts."""

    def __init__(
        self,
        model: Any,
        path: str | Path | None = None,
        options: RecordOptions | None = None,
        *,
        tokenizer: Any = None,
        documents: Sequence[Hashable] | None = None,
        domains: Sequence[str] | None = None,
        planned: Planned | None = None,
        balance_of: Callable[[Totals], pd.DataFrame] | None = None,
    ):
        self.options = options = options or RecordOptions()
        self._is_planned = planned is not None
        self._planned = planned or Planned(Ranks(alone=True))
        place = output_location(path) if path is not None else None
        options.check(place is not None)
        self.model = unwrapped(model, by_path=bool(options.routers))
        self.sites = recordable(self.model, options.routers, options.layers, options.logits)
        self.mode = mode_of(self.model, self.sites, options.capture, options.output_norms)
        if place is not None and planned is None:
            check_directory(place, options.overwrite)
        self.attachment = Attachment(model, self.model, self.sites, self.mode, options.extras, self)
        self.attachment.take_probes(None if self.sites else self._add, options)
        scopes, kinds = self.attachment.scopes, self.attachment.kinds
        self.stacks = {name: Stack(name, of, kinds, self.model) for name, of in scopes.items()}
        for site, sinks in zip(self.sites, self.attachment.sinks, strict=True):
            self.stacks[site.stack].add(site, sinks)
        reader = CallReader(self.model, self.sites, options.inputs)
        self.inputs = PassInputs(reader, documents, domains)
        for stack in self.stacks.values():
            stack.is_summed, stack.fixed_rows = options.counts_only, options.ring_tokens
        counted = None
        if options.counts_only:
            counted = Counted(self.stacks, self.inputs, options, self._planned.shard_tokens)
        self._hand_over = HandOver(self.stacks, self.inputs, options, counted)
        tokenizer = as_tokenizer(tokenizer) if tokenizer is not None else None
        self._opener = TraceOpener(
            place, self.model, self.sites, self.mode, tokenizer, options, self._planned
        )
        self._balance_of = balance_of
        self._entered, self.lock = False, RLock()
        resume = self._planned.resume
        self._forwards = resume.next_batch if resume is not None else 0
        self._opened = False  # the routers and the shapes of their rows are known
        self._has_cuda = torch.cuda.is_available()
        self._stepped = False  # the current pass was announced by `step`
        self._capturing = False  # this pass into a CUDA graph: nothing runs

    @property
    def routers(self) -> list[Router]:
        return [router for stack in self.stacks.values() for router in stack.routers]

    @property
    @locked
    def tokens(self) -> int:
        """Number of tokens recorded so far, without padding."""
        return self._hand_over.count_tokens()

    @property
    def writer(self) -> TraceWriter | None:
        return self._hand_over.writer

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
            try:
                if kind is None:
                    self._end_step()
                    self._hand_over.finish()
                    status = "complete"
                    if not self._opened and not self._is_planned:
                        self._opener.tell_unused()
            finally:
                self._hand_over.abandon()
            self._hand_over.finish_counts()
        finally:
            try:
                if self.writer is not None:
                    self.writer.close(status, quiet=status != "complete")
            finally:
                self._opener.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside the block are not recorded, replayed CUDA graphs included."""
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
            if stack.rows is not None:
                stack.rows.enable(on)

    # --- the caller describes the next passes

    @locked
    def label(
        self, *, documents: Sequence[Hashable] | None = None, domains: Sequence[str] | None = None
    ) -> None:
        """Sets the document and the domain of each batch row of the next forward pass."""
        self.inputs.label(documents, domains)

    @locked
    def expect(self, *rows: Rows) -> None:
        """Sets the rows of the next forward pass (for an encoder-decoder, of each stack), for a
        caller that planned it."""
        self.inputs.expect(*rows)

    def end_group(self) -> None:
        """Ends a group of passes: their counts may be committed."""
        self._hand_over.end_group()

    def step(self, tokens: int, **inputs: object) -> None:
        """Announces a forward pass of `tokens` rows per router that runs without a call of the
        model: a CUDA graph replayed by hand, on this stream. Waits until there is room for it.
        `inputs`: what the model would be called with (`input_ids`, `attention_mask`,
        `position_ids`, `past_key_values`); without them its rows are one document of unknown
        tokens."""
        if list(self.stacks) != [""]:
            raise MoeInspectError(
                f"{type(self.model).__name__} has an encoder and a decoder, and step() cannot tell "
                "which one runs: call the model"
            )
        stack = self.stacks[""]
        if stack.is_new or self.options.counts_only:
            raise MoeInspectError(
                "step() needs a forward pass recorded before it, and a trace (not counts_only)"
            )
        stack.replayed = True
        self._begin()
        unknown = {"input_ids": torch.full((1, tokens), -1)}
        fed = self.inputs.of_call(stack.name, (), inputs or unknown)
        if tokens != fed.T:
            raise MoeInspectError(f"step({tokens}) with inputs of {fed.T} rows")
        self._hand_over.feed(stack, fed, in_compiled=True)
        self._stepped = True
        self.inputs.returned(stack.name, inputs)

    # --- called by the attachment during a forward pass

    @locked
    def begin(self) -> None:
        self._capturing = self._has_cuda and torch.cuda.is_current_stream_capturing()
        if not self._capturing:
            self._begin()
            return
        # only the kernels' launches matter; the host must not read from the device now
        if self._forwards < 2 or self.options.counts_only or list(self.stacks) != [""]:
            raise MoeInspectError(
                "before capturing a CUDA graph, record two forward passes; neither counts_only "
                "nor an encoder-decoder can be captured"
            )
        self.stacks[""].replayed = True

    def _begin(self) -> None:
        self._end_step()
        for stack in self.stacks.values():
            stack.begin()
        number = self.inputs.begin()
        self._forwards = number if number is not None else self._forwards
        self._hand_over.begin(self._forwards)

    @locked
    def feed(self, stack: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._capturing:
            return
        of = self.stacks[stack]
        if of.scope.fed is not None:
            raise MoeInspectError(
                f"the {stack or 'model'} ran twice in one forward pass of "
                f"{type(self.model).__name__}: call it by itself"
            )
        fed = self.inputs.of_call(stack, args, kwargs)
        self._hand_over.feed(of, fed, self.attachment.in_compiled)

    def returned(self, stack: str, output: object) -> None:
        if not self._capturing:
            self.inputs.returned(stack, output)

    def _add(self, site: Site) -> Sinks:
        """One more router, which a probe shows in the first forward pass."""
        stack = self.stacks[""]
        if not stack.is_new:
            raise MoeInspectError(
                f"{site.path} was not called in the first forward pass: record a pass that calls "
                "every probe first"
            )
        self.sites.append(site)
        sinks = self.attachment.add(site)
        stack.add(site, sinks)
        return sinks

    @locked
    def end(self) -> None:
        if self._capturing:
            self._capturing = False
            return
        fed = [stack for stack in self.stacks.values() if stack.scope.fed is not None]
        if new := [stack for stack in fed if stack.is_new]:  # they have run for the first time
            if not self.sites:
                raise no_routers(self.model)
            dtypes = [dtype for stack in new for dtype in stack.fix_shape(self._opened)]
            if not self._opened:
                is_bf16 = all(d == torch.bfloat16 for d in dtypes)
                self._open(torch.bfloat16 if is_bf16 else torch.float16)
            for stack in new:
                stack.lay_out(self._hand_over.weight_dtype)
                if self.attachment.in_compiled:  # which writes to buffers from the next pass on
                    stack.write_calls()
        if fed:  # a stack without routers has nothing to record
            self._hand_over.end(fed, self._forwards)
            self._forwards += 1
        self.inputs.end()

    def _end_step(self) -> None:
        """The forward pass that `step` announced is over."""
        if self._stepped:
            self._stepped = False
            self.end()

    # --- the first forward pass determines the shapes of rows and tables

    def _open(self, weight_dtype: torch.dtype) -> None:
        self._opened = True
        self._hand_over.weight_dtype = weight_dtype
        self._hand_over.writer = self._opener.open(self.routers, weight_dtype)

    # --- counts_only

    @locked
    def totals(self, all_ranks: bool = False) -> Totals:
        """The counts since the recording began (`counts_only=True`); with `all_ranks` summed over
        the processes of torch.distributed."""
        if not self.options.counts_only or not self._opened:
            raise MoeInspectError(
                "no counts yet: record with counts_only=True, and run a forward pass first"
            )
        return self._hand_over.totals(all_ranks)

    def balance(self, all_ranks: bool = False) -> pd.DataFrame:
        """The balance table of `totals`."""
        assert self._balance_of is not None
        return self._balance_of(self.totals(all_ranks))
