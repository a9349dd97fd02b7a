"""Reads what a forward pass is fed from the arguments of the model's call: the document, sequence,
position and domain of each row.

B batch rows, S positions, T = B·S rows a router sees (padding included).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from moe_inspect.capture.hook.decode_steps import DecodeStep
from moe_inspect.capture.hook.inputs.arguments import InputsOf
from moe_inspect.capture.hook.inputs.given import cache_among, copies_of, length_of, of_decoder
from moe_inspect.capture.hook.inputs.row_order import RowOrder
from moe_inspect.capture.hook.inputs.rows import Cached, CachedRows, CallInputs, Rows
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import Document


class RowReader:
    """Finds the rows of a forward pass in the model's own arguments, where no plan says what is
    fed. Numbers documents and sequences as they come and keeps the domain labels
    (`domains[code]`)."""

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
        self.domains: list[str] = []
        self._labels = {"documents": documents, "domains": domains}
        self._next_labels: dict[str, Sequence[Any] | None] = {}
        self._document_numbers: dict[Any, int] = {}  # by the value the caller gave
        self._documents = self._sequences = 0
        self._cached: WeakKeyDictionary[Any, Cached] = WeakKeyDictionary()  # by key-value cache
        self.step: DecodeStep | None = None  # what was read last, where it is one
        # the last encoder passes: their outputs at the first position, [B, C], and rows
        self._encoded: deque[tuple[torch.Tensor, CachedRows]] = deque(maxlen=8)
        # the counters before the rows read last, and the documents that are new in them
        self._undo: tuple[int, int, list[Any]] | None = None

    def label(self, documents: Sequence[Any] | None, domains: Sequence[str] | None) -> None:
        """Sets the document and domain of each batch row of the next forward pass."""
        self._next_labels = {"documents": documents, "domains": domains}
        self.step = None

    def domain_code(self, label: str) -> int:
        """The code of a domain label, new or known."""
        if label not in self.domains:
            self.domains.append(label)
        return self.domains.index(label)

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
        cache = cache_among(given.values())
        cached = self._cached.get(cache) if cache is not None else None
        before = cached.rows if cached is not None else None
        past = length_of(cache, before, S) if cache is not None else 0
        before = before if past else None
        if before is None and stack == "decoder":
            before = (
                encoder.after
                if encoder is not None
                else self._read_by_encoder(given.get("encoder_hidden_states"))
            )
        labels = self._labels
        if self._next_labels:
            new = {name: n for name, n in self._next_labels.items() if n is not None}
            labels, self._next_labels = {**labels, **new}, {}
        if self._inputs is not None:
            labels = {name: given.get(name, value) for name, value in labels.items()}
        if before is None or stack != "decoder":
            _check_labels(labels, B)
        token_BS, mask_BS, position = copies_of(ids, given, B, S, past)
        copied = None
        if fed.is_cuda:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(fed.device))
        order = self._row_order(B, S) if self._row_order is not None else None
        T = B * S if order is None else len(order)
        after = CachedRows(past + S)
        call = CallInputs(
            B, S, T, token_BS, mask_BS, position, labels, before, after, stack, copied, order
        )
        self.step = None
        by_name = not args or (len(args) == 1 and args[0] is ids)
        is_plain = self._inputs is None and by_name and labels is self._labels and not stack
        if (
            is_plain
            and self._row_order is None
            and ids is not None
            and ids.is_cpu
            and S == 1
            and cached is not None
        ):
            self.step = DecodeStep(call, args, kwargs, cache, cached)
        return call

    def remember(self, call: CallInputs, output: Any) -> None:
        """Notes, after the forward pass was launched, that the key-value cache in its output holds
        the rows it was given."""
        values: Collection[Any] = ()
        if isinstance(output, (dict, Mapping)):  # (the abstract class takes long to ask)
            values = output.values()
        elif isinstance(output, tuple):
            values = output
        cache = cache_among(values)
        if cache is not None:
            if (cached := self._cached.get(cache)) is not None:
                cached.rows = call.after
            else:
                self._cached[cache] = Cached(call.after)
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
        if self._undo is None:
            self._undo = (self._documents, self._sequences, [])
        if call.copied is not None:
            call.copied.synchronize()
        B, S = call.B, call.S
        real_BS = (
            call.mask_BS.numpy().astype(bool) if call.mask_BS is not None else np.ones((B, S), bool)
        )
        token_BS = call.token_BS.numpy() if call.token_BS is not None else np.full((B, S), -1)
        end = call.after.length
        position_BS = np.broadcast_to(
            call.position.numpy() if call.position is not None else np.arange(end - S, end), (B, S)
        )
        state = call.before.state if call.before is not None else None
        repeats = (
            B // len(state[0])
            if state is not None and (call.stack == "decoder" or len(state[0]) == B)
            else 0
        )
        # transformers repeats a row for each of its beams
        if state is not None and repeats * len(state[0]) == B:
            document_BS, sequence_BS, domain_BS = (
                np.repeat(np.repeat(rows, repeats)[:, None], S, 1) for rows in state
            )
            new: list[Document] = []
        else:
            _check_labels(call.labels, B)
            document_BS, sequence_BS, domain_BS, new = self._number(
                real_BS, position_BS, **call.labels
            )
        if B and S:
            call.after.state = (document_BS[:, -1], sequence_BS[:, -1], domain_BS[:, -1])
        order = slice(None) if call.order is None else call.order
        real = real_BS.reshape(-1)[order]
        flat = [
            a.reshape(-1)[order][real].astype(np.int32)
            for a in (token_BS, document_BS, sequence_BS, position_BS, domain_BS)
        ]
        if call.order is not None and len(call.order) < B * S:  # a part of the tokens
            new = [
                Document(d.document, d.domain, d.source, int((flat[1] == d.document).sum()))
                for d in new
            ]
        phase = (
            "encode"
            if call.stack == "encoder"
            else "decode"
            if call.after.length > S and S == 1
            else "prefill"
        )
        return Rows(real, *flat, documents=new, phase=phase, stack=call.stack)

    def rows_of_steps(self, steps: Sequence[CallInputs]) -> Rows:
        """The rows of passes that `steps_at` found, one after the other."""
        first, n = steps[0], len(steps)
        assert first.before is not None
        assert first.before.state is not None
        if self._undo is None:
            self._undo = (self._documents, self._sequences, [])
        for call in steps:
            if call.copied is not None:
                call.copied.synchronize()
            call.after.state = first.before.state

        def of_steps(tensors: list[torch.Tensor | None], otherwise: np.ndarray) -> np.ndarray:
            """[n, B], from one row for all or one per batch row."""
            given = [t.reshape(-1) for t in tensors if t is not None]
            found = torch.stack(given).numpy() if given else otherwise
            return np.broadcast_to(found, (n, first.B))

        lengths_N1 = np.array([[call.after.length] for call in steps])
        real = of_steps([c.mask_BS for c in steps], np.ones((1, 1), bool)).astype(bool).reshape(-1)
        token = of_steps([c.token_BS for c in steps], np.full((1, 1), -1))
        position = of_steps([c.position for c in steps], lengths_N1 - 1)
        document, sequence, domain = (np.broadcast_to(s, (n, first.B)) for s in first.before.state)
        token, document, sequence, position, domain = (
            a.reshape(-1)[real].astype(np.int32)
            for a in (token, document, sequence, position, domain)
        )
        return Rows(
            real, token, document, sequence, position, domain, phase="decode", stack=first.stack
        )

    def discard(self) -> None:
        """Undoes the rows read since `accept`, as their forward pass failed: the next one takes its
        numbers."""
        if self._undo is not None:
            self._documents, self._sequences, names_to_forget = self._undo
            for name in names_to_forget:
                del self._document_numbers[name]
            self._undo = None

    def accept(self) -> None:
        """Keeps the rows read since: they were recorded."""
        self._undo = None

    def _number(
        self,
        real_BS: np.ndarray,
        position_BS: np.ndarray,
        documents: Sequence[Any] | None,
        domains: Sequence[str] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Document]]:
        """Document, sequence and domain code of each position, int [B, S] each, and the documents
        that are new. A sequence begins with each row and, within a row, where the positions start
        again."""
        B, S = real_BS.shape
        starts_BS = np.zeros((B, S), bool)
        starts_BS[:, 1:] = (
            (position_BS[:, 1:] <= position_BS[:, :-1]) & real_BS[:, 1:] & real_BS[:, :-1]
        )
        starts_BS[:, :1] = True
        sequence_BS = self._sequences + np.cumsum(starts_BS.reshape(-1)).reshape(B, S) - 1
        self._sequences += int(starts_BS.sum())
        label_B = [str(d) for d in domains] if domains is not None else [""] * B
        domain_BS = np.repeat(np.array([self.domain_code(d) for d in label_B])[:, None], S, 1)
        document_BS = np.empty((B, S), np.int64)
        new: dict[int, Document] = {}
        for b, s in zip(*np.nonzero(starts_BS), strict=True):
            known = documents is not None and documents[b] in self._document_numbers
            number = (
                self._document_numbers[documents[b]]
                if known and documents is not None
                else self._documents
            )
            document_BS[b, s:] = number
            if not known:
                self._documents += 1
                if documents is not None:
                    self._document_numbers[documents[b]] = number
                    if self._undo is not None:
                        self._undo[2].append(documents[b])
                source = str(documents[b]) if documents is not None else ""
                new[number] = Document(number, label_B[b], source, 0)
        sizes = np.bincount(document_BS[real_BS], minlength=self._documents)
        return (
            document_BS,
            sequence_BS,
            domain_BS,
            [Document(d.document, d.domain, d.source, int(sizes[n])) for n, d in new.items()],
        )


def _check_labels(labels: dict[str, Sequence[Any] | None], B: int) -> None:
    for name, values in labels.items():
        if values is not None and len(values) != B:
            raise MoeInspectError(f"{name} has {len(values)} values, the forward pass has {B} rows")
