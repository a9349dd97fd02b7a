"""Reads what a forward pass is fed from the arguments of the model's call: the document, sequence,
position and domain of each row.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from moe_inspect.capture.hook.inputs.arguments import InputsOf
from moe_inspect.capture.hook.inputs.given import cache_among, copies_of, length_of, of_decoder
from moe_inspect.capture.hook.inputs.keys import (
    keys_told,
    length_by_shape,
    positions_told,
    slots_of,
    start_of,
    tensors_in,
)
from moe_inspect.capture.hook.inputs.places import Pages, Place
from moe_inspect.capture.hook.inputs.row_order import RowOrder
from moe_inspect.capture.hook.inputs.rows import CachedRows, CallInputs, Keys, Rows, joined
from moe_inspect.capture.hook.inputs.sequences import Numbering, check_labels
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.schema import PHASES


class RowReader:
    """Finds the rows of a forward pass in the model's own arguments, where no plan says what is
    fed."""

    def __init__(
        self,
        names: Mapping[str, Sequence[str]],
        documents: Sequence[Any] | None = None,
        domains: Sequence[str] | None = None,
        inputs: InputsOf | None = None,
        row_order: RowOrder | None = None,
    ):
        """`names`: stack → the names of its forward arguments, in order. `inputs` reads them in
        place of these names. `row_order`: see `RowOrder`; None is batch-first."""
        self._argument_names, self._inputs, self._row_order = names, inputs, row_order
        self.numbering = Numbering()
        self._labels = {"documents": documents, "domains": domains}
        self._next_labels: dict[str, Sequence[Any] | None] = {}
        # by key-value cache, or by tensor that a pass returned
        self._cached: MutableMapping[Any, CachedRows] = WeakIdKeyDictionary()
        # the last encoder passes: their outputs at the first position, [B, C], and rows
        self._encoded: deque[tuple[torch.Tensor, CachedRows]] = deque(maxlen=8)
        # of models that keep their cache to themselves: the last pass of each stack
        self._uncached: dict[str, CachedRows] = {}
        self._pages: WeakKeyDictionary[Any, Pages] = WeakKeyDictionary()  # by cache
        self._told: dict[int, tuple[Place, ...]] = {}  # by what `inputs` called the sequence
        self._told_codes: dict[Any, int] = {}
        # passes of which tokens may be taken back before the next one, and their caches
        self._unsettled: list[tuple[CallInputs, Any]] = []

    def label(self, documents: Sequence[Any] | None, domains: Sequence[str] | None) -> None:
        """Sets the document and domain of each batch row of the next forward pass."""
        self._next_labels = {"documents": documents, "domains": domains}

    def read_call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stack: str = "",
        encoder: CallInputs | None = None,
    ) -> CallInputs:
        """The inputs of a call of the model, or of one of its stacks, for `rows` to read.
        `encoder`: the inputs of the encoder in the same forward pass. Raises MoeInspectError where
        the call has neither input_ids nor inputs_embeds, or labels of another number of rows."""
        given: Mapping[str, Any] = kwargs
        if self._inputs is not None:
            given = self._inputs(args, kwargs)
        elif args:
            given = {**dict(zip(self._argument_names[stack], args, strict=False)), **kwargs}
        if stack == "decoder":
            given = {**given, **of_decoder(given)}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        fed = ids if ids is not None else embeds
        if fed is None:
            raise MoeInspectError(
                "record saw a forward pass with neither input_ids nor inputs_embeds: give the "
                "model one of them, or inputs=… a function that returns it"
            )
        B, S = fed.shape[:2]
        given, keys = self._keys(given, B, S)
        cache = cache_among(given.values()) if keys.of_tokens is None else None
        before = self._cached.get(cache) if cache is not None else None
        past = length_of(cache, before, S) if cache is not None else 0
        before = before if past else None
        if before is None and stack == "decoder":
            before = (
                encoder.after
                if encoder is not None
                else self._read_by_encoder(given.get("encoder_hidden_states"))
            )
        is_guess = (
            before is None and cache is None and keys.of_tokens is None and stack != "encoder"
        )
        if is_guess and (before := self._uncached.get(stack)) is not None:
            before, past = self._by_tensors(given, before)
        labels = self._labels
        if self._next_labels:
            new = {name: n for name, n in self._next_labels.items() if n is not None}
            labels, self._next_labels = {**labels, **new}, {}
        if self._inputs is not None:
            labels = {name: given.get(name, value) for name, value in labels.items()}
        if before is None or is_guess or stack != "decoder":
            check_labels(labels, B)
        token_BS, mask_BS, position = copies_of(ids, given, B, S, past)
        copied = None
        if fed.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(fed.device))
        order = self._row_order(B, S) if self._row_order is not None else None
        T = B * S if order is None else len(order)
        after = CachedRows(past + S, fed=S)
        return CallInputs(
            B,
            S,
            T,
            token_BS,
            mask_BS,
            position,
            labels,
            before,
            after,
            stack,
            copied,
            order,
            keys=keys,
            is_guess=is_guess,
            is_branch=is_guess and before is not None and before.is_continued,
            resumes=past > 0 or bool(given.get("resumes")),
            asked=keep if isinstance(keep := given.get("logits_to_keep"), int) else 0,
        )

    def _by_tensors(self, given: Mapping[str, Any], last: CachedRows) -> tuple[CachedRows, int]:
        """Of a model whose cache is tensors, or which keeps it to itself: what a pass goes on from,
        and how many positions that holds, 0 where positions must tell. `last`: what the pass before
        has left. MoeInspectError where nothing tells."""
        tensors = [t for t in tensors_in(given.get("past_key_values")) if t.numel()]
        if not tensors:
            return last, 0
        is_told = given.get("position_ids") is not None
        held = {id(c): c for t in tensors if (c := self._cached.get(t)) is not None}
        if len(held) == 1:
            (rows,) = held.values()
            return rows, length_by_shape(tensors[0], rows) if is_told else rows.length
        past = length_by_shape(tensors[0], last)
        if is_told:
            return last, past
        # a copy may be of any cache of its length, and of its first positions or of its last
        is_slice = start_of(tensors[0]) in last.starts
        lengths = {c.length for c in self._cached.values() if c is not last}
        is_last = past == last.length and past not in lengths
        if held or not past or not (is_slice or is_last):
            raise MoeInspectError(
                f"the cache {list(tensors[0].shape)} given to this forward pass does not go on "
                "from a pass that was recorded: give inputs=…, a function of the forward's "
                "arguments that returns the `sequences` and `position_ids` of each row"
            )
        return last, past

    def _keys(self, given: Mapping[str, Any], B: int, S: int) -> tuple[Mapping[str, Any], Keys]:
        """The arguments of a call, with the mask of a packed one; and what identifies its
        sequences."""
        if (told := given.get("sequences")) is not None:
            return given, Keys(keys_told(told, self._told_codes, B, S), self._told)
        if (found := slots_of(given)) is not None:
            slots, real_1S = found
            if (pages := self._pages.get(given["cache"])) is None:
                pages = self._pages[given["cache"]] = Pages()
            return {**given, "attention_mask": real_1S}, Keys(slots, pages.places, pages)
        return given, Keys()

    def returned(self, call: CallInputs, output: Any) -> None:
        """Call it when the model has run. Until the next pass begins, tokens may be taken back from
        its cache."""
        if call.S > 1:
            cache = cache_among(_values(output))
            if cache is not None:
                call.is_settled = False
                # nothing else may hold it any more once drafts have been taken back for the last
                # time; a prompt's is not kept alive
                may_be_drafts = call.after.length > call.S or call.asked > 1
                self._unsettled.append((call, cache if may_be_drafts else ref(cache)))
            elif call.is_guess:
                call.is_settled = False
                self._unsettled.append((call, None))

    def settle_caches(self) -> None:
        """Call it when another pass begins, or when none follows: notes how many tokens were taken
        back from each cache."""
        unsettled, self._unsettled = self._unsettled, []
        for call, held in unsettled:
            if held is None:
                self._unsettled.append((call, None))
                continue
            cache = held() if isinstance(held, ref) else held
            length = cache.get_seq_length() if cache is not None else None
            if length is not None and not getattr(length, "is_cuda", False):
                taken = call.after.length - int(length)
                call.after.taken = taken if 0 < taken < call.S else 0
            call.is_settled = True

    def settle(self, following: Rows | CallInputs | None) -> None:
        """Call it with the next pass when it was read, or with None when there is none."""
        for call, _ in self._unsettled:
            if isinstance(following, CallInputs) and following.before is call.after:
                call.following = following
            call.is_settled = True
        self._unsettled = []

    def remember(self, call: CallInputs, output: Any) -> None:
        """Notes, after the forward pass was launched, that the key-value cache in its output holds
        the rows it was given."""
        values = _values(output)
        cache = cache_among(values)
        if cache is not None:
            self._cached[cache] = call.after
        elif call.keys.of_tokens is None:
            self._uncached[call.stack] = call.after
            if self._inputs is not None:
                tensors = list(tensors_in(output))
                call.after.starts = [start_of(tensor) for tensor in tensors]
                self._cached.update((tensor, call.after) for tensor in tensors)
        if call.before is not None and call.after.length > call.S:
            call.before.is_continued = True
        if call.stack == "encoder" and values:
            first_BSC = next(iter(values))
            self._encoded.append((first_BSC[:, 0].detach().clone(), call.after))

    def _read_by_encoder(self, hidden_BSC: torch.Tensor | None) -> CachedRows | None:
        """The rows of the encoder pass that returned this, found by its values: since then they may
        have been copied, and each row repeated. None where no recorded pass returned it."""
        for first_BC, cached in reversed(self._encoded if hidden_BSC is not None else ()):
            assert hidden_BSC is not None
            repeats, rest = divmod(len(hidden_BSC), len(first_BC))
            if (
                repeats
                and not rest
                and torch.equal(hidden_BSC[::repeats, 0].to(first_BC), first_BC)
            ):
                return cached
        return None

    def rows(self, call: CallInputs) -> Rows:
        """The rows of a forward pass, or of one stack of an encoder-decoder in it. Call it in the
        order of the passes, then `accept`, or `discard` to undo it."""
        self.numbering.begin()
        call.wait()
        B, S = call.B, call.S
        real_BS, position_BS = call.real_BS(), call.position_BS()
        if call.keys.of_tokens is not None and call.position is None:
            position_BS = positions_told(call)
        numbered = self.numbering.number(call, real_BS, position_BS)
        token_BS = call.token_BS.numpy() if call.token_BS is not None else np.full((B, S), -1)
        of_tokens = [token_BS[real_BS], position_BS[real_BS], *numbered[:4]]
        real, new = real_BS.reshape(-1), numbered.new
        if call.order is not None:  # the routers see them in another one, or a part of them
            at_T = real.cumsum()[call.order] - 1
            real = real[call.order]
            of_tokens = [values[at_T[real]] for values in of_tokens]
            sizes = Counter(of_tokens[2].tolist())
            new = [replace(d, tokens=min(d.tokens, sizes[d.document])) for d in new]
        token, position, document, sequence, domain, phase = (
            values.astype(np.int32, copy=False) for values in of_tokens
        )
        is_one = not len(phase) or bool((phase == phase[0]).all())
        return Rows(
            real,
            token,
            document,
            sequence,
            position,
            domain,
            documents=new,
            phase=PHASES[phase[0] if len(phase) else 0] if is_one else "",
            stack=call.stack,
            phases=None if is_one else phase,
        )

    def rows_of_steps(self, steps: Sequence[CallInputs]) -> Rows:
        """The rows of passes that `steps_at` found, one after the other."""
        first, n = steps[0], len(steps)
        assert first.before is not None
        state = first.before.state
        assert state is not None
        self.numbering.begin()
        for call in steps:
            call.wait()

        def of_steps(tensors: list[torch.Tensor | None], otherwise: np.ndarray) -> np.ndarray:
            """[n, B], from one row for all or one per batch row."""
            given = [t.reshape(-1) for t in tensors if t is not None]
            found = torch.stack(given).numpy() if given else otherwise
            return np.broadcast_to(found, (n, first.B))

        lengths_N1 = np.array([[call.after.length] for call in steps])
        real = of_steps([c.mask_BS for c in steps], np.ones((1, 1), bool)).astype(bool)
        token = of_steps([c.token_BS for c in steps], np.full((1, 1), -1))
        position = of_steps([c.position for c in steps], lengths_N1 - 1)
        last = state.last_B + real.cumsum(0)
        if (state.numbers_B3 < 0).any() or (last != position)[real].any():
            return joined([self.rows(call) for call in steps])
        for call, last_B in zip(steps, last, strict=True):
            call.after.state = state._replace(last_B=last_B)
        document, sequence, domain = (np.broadcast_to(s, (n, first.B)) for s in state.numbers_B3.T)
        token, document, sequence, position, domain = (
            a[real].astype(np.int32) for a in (token, document, sequence, position, domain)
        )
        return Rows(
            real.reshape(-1),
            token,
            document,
            sequence,
            position,
            domain,
            phase="decode",
            stack=first.stack,
        )


def _values(output: Any) -> Collection[Any]:
    """What a model has returned, one by one."""
    if isinstance(output, (dict, Mapping)):  # (the abstract class takes long to ask)
        return output.values()
    return output if isinstance(output, tuple) else ()
