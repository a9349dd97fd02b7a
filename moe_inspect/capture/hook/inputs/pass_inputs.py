"""What forward passes are fed: as planned by the caller, else as the arguments of the model's calls
say it. Each row's document, sequence, position and domain are read once the pass has run.

B batch rows, S positions, T = B·S rows a router sees (padding included), N tokens (without it).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from moe_inspect.capture.hook.inputs import arguments
from moe_inspect.capture.hook.inputs.arguments import CallReader, cache_among
from moe_inspect.capture.hook.inputs.rows import (
    CachedRows,
    CallInputs,
    Keys,
    Labels,
    Pages,
    Place,
    Rows,
    SequenceNumbers,
    check_labels,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import PHASES

if TYPE_CHECKING:
    from moe_inspect.capture.hook.inputs.arguments import Given
    from moe_inspect.model.choices import Args, Kwargs


class PassInputs:
    """`documents`, `domains`: labels of each batch row, unless `label` sets others."""

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
        self._plan: dict[str, Rows] = {}  # of the current one
        self._calls: dict[str, CallInputs] = {}  # by stack, where it was not planned
        self._outputs: list[tuple[CallInputs, object]] = []
        # by key-value cache, or by tensor that a pass returned
        self._cached: MutableMapping[object, CachedRows] = WeakIdKeyDictionary()
        # the last encoder passes: their outputs at the first position, [B, C], and rows
        self._encoded: deque[tuple[Tensor, CachedRows]] = deque(maxlen=8)
        # of models that keep their cache to themselves: the last pass of each stack
        self._uncached: dict[str, CachedRows] = {}
        self._pages: WeakKeyDictionary[object, Pages] = WeakKeyDictionary()  # by cache
        self._told: dict[int, tuple[Place, ...]] = {}  # by what `inputs` called the sequence
        self._told_codes: dict[Hashable, int] = {}
        # passes of which tokens may be taken back before the next one, and their caches
        self._unsettled: list[tuple[CallInputs, Any]] = []

    # --- the caller describes the next pass

    def label(self, documents: Sequence[Hashable] | None, domains: Sequence[str] | None) -> None:
        """Sets the document and domain of each batch row."""
        given = {"documents": documents, "domains": domains}
        self._next_labels = {name: of_B for name, of_B in given.items() if of_B is not None}

    def expect(self, *rows: Rows) -> None:
        self._next_plan = {r.stack: r for r in rows}

    # --- a forward pass

    def begin(self) -> int | None:
        """Begins a forward pass. Returns its number if it was planned."""
        self._numbering.discard()  # of the previous forward pass, if it failed
        self._settle_caches()
        self._plan, self._next_plan, self._calls, self._outputs = self._next_plan, {}, {}, []
        numbers = (rows.number for rows in self._plan.values())
        return next((number for number in numbers if number is not None), None)

    def of_call(self, stack: str, args: Args, kwargs: Kwargs) -> Rows | CallInputs:
        """The inputs of a stack's next call. MoeInspectError where it has neither input_ids nor
        inputs_embeds, or labels of another number of rows."""
        fed = self._plan.get(stack)
        if fed is None:
            fed = self._calls[stack] = self._read(stack, args, kwargs)
        if self._unsettled:
            self._settle(fed)
        return fed

    def returned(self, stack: str, output: object) -> None:
        """A stack's output, or ("") the whole model's."""
        if (call := self._calls.get(stack)) is not None:
            self._outputs.append((call, output))
            cache = cache_among(_values(output)) if call.S > 1 else None
            if cache is not None or (call.S > 1 and call.is_guess):
                # nothing else may hold it any more once drafts have been taken back for the last
                # time; a prompt's is not kept alive
                may_be_drafts = call.after.length > call.S or call.asked > 1
                held = cache if may_be_drafts or cache is None else ref(cache)
                self._unsettled.append((call, held))
                call.is_settled = False

    def end(self) -> None:
        """Ends a launched pass: the key-value caches in its outputs hold what they were given."""
        for call, output in self._outputs:
            values = _values(output)
            if (cache := cache_among(values)) is not None:
                self._cached[cache] = call.after
            elif call.keys.of_tokens is None:
                self._uncached[call.stack] = call.after
                if self._reader.inputs is not None:
                    tensors = list(arguments.tensors_in(output))
                    call.after.starts = list(map(arguments.start_of, tensors))
                    self._cached.update((tensor, call.after) for tensor in tensors)
            if call.before is not None and call.after.length > call.S:
                call.before.is_continued = True
            if call.stack == "encoder" and values:
                first_BSC = next(iter(values))
                self._encoded.append((first_BSC[:, 0].detach().clone(), call.after))
        self._outputs.clear()

    def settle(self) -> None:
        """No pass follows: what was taken back from the caches so far is what the trace says."""
        self._settle_caches()
        self._settle(None)

    def _settle_caches(self) -> None:
        """Notes how many tokens were taken back from each cache since the pass before."""
        for call, held in self._unsettled:
            cache = held() if isinstance(held, ref) else held
            length = cache.get_seq_length() if cache is not None else None
            if length is not None and not getattr(length, "is_cuda", False):
                taken = call.after.length - int(length)
                call.after.taken = taken if 0 < taken < call.S else 0
            call.is_settled = held is not None
        self._unsettled = [(call, held) for call, held in self._unsettled if held is None]

    def _settle(self, following: Rows | CallInputs | None) -> None:
        """The next pass was read, or there is none."""
        for call, _ in self._unsettled:
            if isinstance(following, CallInputs) and following.before is call.after:
                call.following = following
            call.is_settled = True
        self._unsettled = []

    # --- the arguments of a call

    def _read(self, stack: str, args: Args, kwargs: Kwargs) -> CallInputs:
        given, fed = self._reader.read(stack, args, kwargs)
        B, S = fed.shape[:2]
        given, keys = self._keys(given, B, S)
        cache = cache_among(given.values()) if keys.of_tokens is None else None
        before = self._cached.get(cache) if cache is not None else None
        past = arguments.length_of(cache, before, S) if cache is not None else 0
        before = before if past else None
        is_guess = False
        if before is None and stack == "decoder":
            before = self._encoder_rows(given.get("encoder_hidden_states"))
        if before is None and cache is None and keys.of_tokens is None and stack != "encoder":
            is_guess = True
            if (last := self._uncached.get(stack)) is not None:
                before, past = self._by_tensors(given, last)
        labels: Labels = {**self._labels, **self._next_labels}
        self._next_labels = {}
        if self._reader.inputs is not None:
            labels = {name: given.get(name, value) for name, value in labels.items()}
        if before is None or is_guess or stack != "decoder":
            check_labels(labels, B)
        token_BS, mask_BS, position = arguments.copies_of(given, B, S, past)
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
            before,
            CachedRows(past + S, fed=S),
            stack,
            copied,
            order,
            keys,
            is_guess=is_guess,
            is_branch=is_guess and before is not None and before.is_continued,
            resumes=past > 0 or bool(given.get("resumes")),
            asked=keep if isinstance(keep := given.get("logits_to_keep"), int) else 0,
        )

    def _keys(self, given: Given, B: int, S: int) -> tuple[Given, Keys]:
        """The arguments, with the mask of a packed call; and what identifies its sequences."""
        if (told := given.get("sequences")) is not None:
            return given, Keys(arguments.keys_told(told, self._told_codes, B, S), self._told)
        if (found := arguments.slots_of(given)) is not None:
            slots, real_1S = found
            if (pages := self._pages.get(given["cache"])) is None:
                pages = self._pages[given["cache"]] = Pages()
            return {**given, "attention_mask": real_1S}, Keys(slots, pages.places, pages)
        return given, Keys()

    def _by_tensors(self, given: Given, last: CachedRows) -> tuple[CachedRows, int]:
        """Of a model whose cache is tensors or its own: what a pass goes on from, and how many
        positions that holds, 0 where `position_ids` must tell. `last`: of the pass before."""
        cache = given.get("past_key_values")
        tensors = [t for t in arguments.tensors_in(cache) if t.numel()]
        if not tensors:
            return last, 0
        is_told = given.get("position_ids") is not None
        held = {id(c): c for t in tensors if (c := self._cached.get(t)) is not None}
        if len(held) == 1:
            (rows,) = held.values()
            by_shape = arguments.length_by_shape(tensors[0], rows)
            return rows, by_shape if is_told else rows.length
        past = arguments.length_by_shape(tensors[0], last)
        if is_told:
            return last, past
        # a copy may be of any cache of its length, and of its first positions or of its last
        is_slice = arguments.start_of(tensors[0]) in last.starts
        lengths = {c.length for c in self._cached.values() if c is not last}
        is_last = past == last.length and past not in lengths
        if held or not past or not (is_slice or is_last):
            raise MoeInspectError(
                f"the cache {list(tensors[0].shape)} given to this forward pass does not go on "
                "from a pass that was recorded: give inputs=…, a function of the forward's "
                "arguments that returns the `sequences` and `position_ids` of each row"
            )
        return last, past

    def _encoder_rows(self, hidden_BSC: Tensor | None) -> CachedRows | None:
        """What the encoder pass was fed that a decoder reads: that of the same forward pass, else
        the one that returned these values, which may have been copied, and each row repeated."""
        if (encoder := self._calls.get("encoder")) is not None:
            return encoder.after
        if hidden_BSC is None:
            return None
        for first_BC, cached in reversed(self._encoded):
            repeats, rest = divmod(len(hidden_BSC), len(first_BC))
            if repeats and not rest:
                candidate_BC = hidden_BSC[::repeats, 0].to(first_BC)
                if torch.equal(candidate_BC, first_BC):
                    return cached
        return None

    # --- rows, to be read in the order of the passes; then `accept`, or `discard` undoes it

    def rows(self, call: Rows | CallInputs) -> Rows:
        """The rows of a forward pass, or of one stack of an encoder-decoder in it."""
        if isinstance(call, Rows):
            return call
        call.wait()
        real_BS, position_BS = call.real_BS(), call.position_BS()
        if call.keys.of_tokens is not None and call.position is None:
            position_BS = arguments.positions_told(call)
        (document_N, sequence_N, *others_2N), new = self._numbering.number(
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
        )


def _values(output: object) -> Collection[Any]:
    """What a model has returned, one by one."""
    if isinstance(output, (dict, Mapping)):  # (the abstract class takes long to ask)
        return output.values()
    return output if isinstance(output, tuple) else ()
