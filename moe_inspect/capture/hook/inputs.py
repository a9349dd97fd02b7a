"""Inputs of forward passes: planned by the caller, else read from the arguments of the model's
calls. The document, sequence, position and domain of each row are read once the pass has run.

B batch rows, S positions, T = B·S rows a router sees (padding included), N tokens (without it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from moe_inspect.capture.hook import arguments
from moe_inspect.capture.hook.arguments import CallReader, cache_among, tensors_in
from moe_inspect.capture.hook.numbering import (
    CachedRows,
    CallInputs,
    Keys,
    Labels,
    Origin,
    Rows,
    SequenceNumbers,
    Sequences,
    check_labels,
    repeated,
)
from moe_inspect.trace.schema import PHASES

if TYPE_CHECKING:
    from moe_inspect.capture.hook.arguments import Given
    from moe_inspect.model.choices import Args, Kwargs


class PassInputs:
    """Inputs of a model's forward passes. `documents`, `domains`: labels of each batch row, unless
    `label` sets others."""

    def __init__(
        self,
        reader: CallReader,
        documents: Sequence[Hashable] | None = None,
        domains: Sequence[str] | None = None,
    ):
        self._reader = reader
        self._numbering = SequenceNumbers()
        self.domains = self._numbering.domains  # labels by code
        self.domain_code = self._numbering.domain_code
        self.accept = self._numbering.accept  # the rows read so far have been recorded
        self._labels: Labels = {"documents": documents, "domains": domains}
        self._next_labels: dict[str, Sequence[Hashable]] = {}
        self._next_plan: dict[str, Rows] = {}  # of the next forward pass, by stack
        self._plan: dict[str, Rows] = {}  # of the current forward pass
        self._calls: dict[str, CallInputs] = {}  # of stacks that were not planned
        self._outputs: list[tuple[CallInputs, object]] = []
        # contents by key-value cache, or by tensor that a stack returned
        self._cached: MutableMapping[object, CachedRows] = WeakIdKeyDictionary()
        # the last pass of each stack, for models that keep their cache to themselves
        self._uncached: dict[str, CachedRows] = {}
        # sequences in each paged cache, by the slot of their last token
        self._paged: WeakKeyDictionary[object, Sequences] = WeakKeyDictionary()
        self._told: Sequences = {}  # sequences by the value that `inputs` returned for them
        self._told_codes: dict[Hashable, int] = {}
        # passes of which tokens may be taken back before the next one, and their caches
        self._unsettled: list[tuple[CallInputs, Any]] = []

    # --- the caller describes the next pass

    def label(self, documents: Sequence[Hashable] | None, domains: Sequence[str] | None) -> None:
        """Set the document and domain of each batch row."""
        given = {"documents": documents, "domains": domains}
        self._next_labels = {name: of_B for name, of_B in given.items() if of_B is not None}

    def expect(self, *rows: Rows) -> None:
        self._next_plan = {r.stack: r for r in rows}

    # --- a forward pass

    def begin(self) -> int | None:
        """Begin a forward pass. Return its number if it was planned."""
        self._numbering.discard()  # of the previous forward pass, if it failed
        self._settle_caches()
        self._plan, self._next_plan, self._calls, self._outputs = self._next_plan, {}, {}, []
        numbers = (rows.number for rows in self._plan.values())
        return next((number for number in numbers if number is not None), None)

    def of_call(self, stack: str, args: Args, kwargs: Kwargs) -> Rows | CallInputs:
        """Return the inputs of a stack's call. MoeInspectError if it has neither input_ids nor
        inputs_embeds, or labels for another number of rows."""
        fed = self._plan.get(stack)
        if fed is None:
            fed = self._calls[stack] = self._read(stack, args, kwargs)
        if self._unsettled:
            self._settle(fed)
        return fed

    def returned(self, stack: str, output: object) -> None:
        """Note the output of a stack, or ("") of the whole model."""
        if (call := self._calls.get(stack)) is not None:
            self._outputs.append((call, output))
            cache = cache_among(_values(output)) if call.S > 1 else None
            if cache is not None or (call.S > 1 and call.origin.by_position):
                # nothing else may hold it any more once drafts have been taken back for the last
                # time; a prompt's is not kept alive
                may_be_drafts = call.after.length > call.S or call.asked > 1
                held = cache if may_be_drafts or cache is None else ref(cache)
                self._unsettled.append((call, held))
                call.is_settled = False

    def end(self) -> None:
        """End a launched pass: the key-value caches in its outputs hold its tokens."""
        for call, output in self._outputs:
            values = _values(output)
            if (cache := cache_among(values)) is not None:
                self._cached[cache] = call.after
            elif call.keys.of_tokens is None:
                self._uncached[call.stack] = call.after
                self._cached.update(dict.fromkeys(tensors_in(output), call.after))
        self._outputs.clear()

    def settle(self) -> None:
        """Decide which tokens were drafts, as no pass follows."""
        self._settle_caches()
        self._settle(None)

    def _settle_caches(self) -> None:
        """Note how many tokens were taken back from each cache since the pass before."""
        for call, held in self._unsettled:
            cache = held() if isinstance(held, ref) else held
            length = cache.get_seq_length() if cache is not None else None
            if length is not None and not getattr(length, "is_cuda", False):
                taken = call.after.length - int(length)
                call.after.taken = taken if 0 < taken < call.S else 0
            call.is_settled = held is not None
        self._unsettled = [(call, held) for call, held in self._unsettled if held is None]

    def _settle(self, following: Rows | CallInputs | None) -> None:
        """Settle passes once the next one has been read, or if there is none."""
        for call, _ in self._unsettled:
            if isinstance(following, CallInputs) and following.origin.before is call.after:
                call.following = following
            call.is_settled = True
        self._unsettled = []

    # --- the arguments of a call

    def _read(self, stack: str, args: Args, kwargs: Kwargs) -> CallInputs:
        given, fed = self._reader.read(stack, args, kwargs)
        B, S = fed.shape[:2]
        given, keys = self._keys(given, B, S)
        origin = self._origin(stack, given, keys, S)
        labels: Labels = {**self._labels, **self._next_labels}
        self._next_labels = {}
        if self._reader.inputs is not None:
            labels = {name: given.get(name, value) for name, value in labels.items()}
        if stack == "decoder" and origin.is_unlinked:  # `generate` repeats each row for its beams
            labels = {name: repeated(values, B) for name, values in labels.items()}
        if stack != "decoder" or origin.before is None or origin.by_position:
            check_labels(labels, B)
        token_BS, mask_BS, position = arguments.copies_of(given, B, S, origin.past)
        copied = torch.cuda.Event() if fed.is_cuda else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(fed.device))
        order = self._reader.row_order(B, S) if self._reader.row_order is not None else None
        return CallInputs(
            B,
            S,
            B * S if order is None else len(order),
            token_BS,
            mask_BS,
            position,
            labels,
            origin,
            CachedRows(origin.past + S),
            stack,
            copied,
            order,
            keys,
            asked=keep if isinstance(keep := given.get("logits_to_keep"), int) else 0,
        )

    def _keys(self, given: Given, B: int, S: int) -> tuple[Given, Keys]:
        """Return the arguments, with the mask of a packed call, and what identifies its
        sequences."""
        if (told := given.get("sequences")) is not None:
            return given, Keys(arguments.keys_told(told, self._told_codes, B, S), self._told)
        if (slots := arguments.slots_of(given)) is not None:
            slots_2BS, real_1S = slots
            places = self._paged.setdefault(given["cache"], {})
            return {**given, "attention_mask": real_1S}, Keys(slots_2BS, places)
        return given, Keys()

    def _origin(self, stack: str, given: Given, keys: Keys, S: int) -> Origin:
        """Return what a call continues: what its cache or its encoder's output says, else the pass
        before, if the positions follow it."""
        if keys.of_tokens is not None:
            return Origin(resumes=keys.places is not self._told)
        if (cache := cache_among(given.values())) is not None:
            before = self._cached.get(cache)
            if past := arguments.length_of(cache, before, S):
                return Origin(before, past, resumes=True, is_unlinked=before is None)
        if stack == "decoder":
            if (encoder := self._calls.get("encoder")) is not None:
                return Origin(encoder.after)
            if (hidden_BSC := given.get("encoder_hidden_states")) is not None:
                before = self._cached.get(hidden_BSC)
                return Origin(before, is_unlinked=before is None)
        if cache is not None or stack == "encoder":
            return Origin()
        tensors = [t for t in tensors_in(given.get("past_key_values")) if t.numel()]
        holders = {id(c): c for t in tensors if (c := self._cached.get(t)) is not None}
        before = next(iter(holders.values())) if len(holders) == 1 else None
        if given.get("position_ids") is not None or not tensors:
            last = self._uncached.get(stack)
            resumes = bool(tensors) or bool(given.get("resumes"))
            return Origin(before or last, by_position=True, resumes=resumes)
        past = before.length if before is not None else 0
        return Origin(before, past, resumes=True, is_unlinked=before is None)

    # --- rows, to be read in the order of the passes; then `accept`, or `discard` undoes it

    def rows(self, call: Rows | CallInputs) -> Rows:
        """Return the rows of a forward pass, or of one stack of an encoder-decoder in it."""
        if isinstance(call, Rows):
            return call
        call.wait()
        real_BS, position_BS = call.real_BS(), call.position_BS()
        if call.keys.of_tokens is not None and call.position is None:
            position_BS = arguments.positions_told(call)
        (document_N, sequence_N, *others_2N), new, unlinked = self._numbering.number(
            call, real_BS, position_BS
        )
        token_BS = np.full((call.B, call.S), -1) if call.token_BS is None else call.token_BS.numpy()
        # in the order of `Rows`, and the phase
        of_tokens_6N = np.stack(
            [token_BS[real_BS], document_N, sequence_N, position_BS[real_BS], *others_2N]
        )
        real_T = real_BS.reshape(-1)
        if call.order is not None:  # the routers see them in another one, or a part of them
            at_T = real_T.cumsum()[call.order] - 1
            real_T = real_T[call.order]
            of_tokens_6N = of_tokens_6N[:, at_T[real_T]]
            sizes = Counter(of_tokens_6N[1].tolist())
            new = [replace(d, tokens=min(d.tokens, sizes[d.document])) for d in new]
        *of_tokens, phase = of_tokens_6N.astype(np.int32)
        is_one = not len(phase) or bool((phase == phase[0]).all())
        return Rows(
            real_T,
            *of_tokens,
            documents=new,
            phase=PHASES[phase[0] if len(phase) else 0] if is_one else "",
            stack=call.stack,
            phases=None if is_one else phase,
            unlinked=unlinked,
        )


def _values(output: object) -> Collection[Any]:
    """Return the values in a model's output."""
    if isinstance(output, (dict, Mapping)):  # (the abstract class takes long to ask)
        return output.values()
    return output if isinstance(output, tuple) else ()
