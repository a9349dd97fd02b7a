"""Moves recorded forward passes from the rings to the writer, in order, once they have been copied
to the host. Applies back-pressure when a ring is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moe_inspect.capture.hook.call_inputs import CallInputs, Rows
from moe_inspect.capture.hook.pass_inputs import PassInputs
from moe_inspect.capture.hook.stack import Stack, StackPass
from moe_inspect.capture.options import RecordOptions
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.writer import RoutedBatch, TraceWriter


@dataclass(frozen=True)
class Forward:
    """A forward pass on its way to the writer. `passes`: one per stack that ran; the encoder comes
    before the decoder."""

    number: int
    passes: list[StackPass]

    def arrived(self, wait: bool) -> bool:
        return all(
            p.stack.rings is not None and p.stack.rings.is_on_host(p.start + p.fed.T, wait)
            for p in self.passes
        )


class HandOver:
    """`weight_dtype`: of the gate weights in the rings, known after the first forward pass;
    `writer`: None until then. `tokens`: passed to the writer so far."""

    def __init__(self, stacks: Mapping[str, Stack], inputs: PassInputs, options: RecordOptions):
        self.stacks, self.inputs, self.options = stacks, inputs, options
        self.writer: TraceWriter | None = None
        self.weight_dtype = torch.float16
        # fixed size: as an option, or because a CUDA graph holds the rings' addresses
        self.rings_fixed = options.ring_tokens is not None
        self.tokens = 0
        self._in_flight: deque[Forward] = deque()

    def make_rings(self, stack: Stack, rows: int) -> None:
        assert not any(p.stack is stack for forward in self._in_flight for p in forward.passes)
        # always with weights: slots are ordered by them, even in a trace without weights
        stack.make_rings(rows, self.weight_dtype)

    def make_room(self, stack: Stack, fed: Rows | CallInputs) -> None:
        """Waits until the stack's rings have room for these rows, unless decisions may be
        dropped."""
        rings, T = stack.rings, fed.T
        assert rings is not None
        self.drain()
        too_large = rings.max_rows < T
        while rings.free_rows < T and self._in_flight and (too_large or not self.options.drop):
            self.drain(wait=True, most=1)
        if rings.free_rows < T and too_large:
            if self.rings_fixed:
                raise MoeInspectError(
                    f"a forward pass of {T:,} rows is more than the {rings.max_rows:,} there is "
                    f"room for on the device: record with ring_tokens={T}"
                )
            self.make_rings(stack, T)
            rings = stack.rings
            assert rings is not None
        stack.fed = self.inputs.rows(fed) if rings.synchronous else fed

    def launched(self, forward: Forward) -> None:
        """Queues a forward pass that has been launched (on a GPU it may still be running)."""
        for done in forward.passes:
            assert done.stack.rings is not None
            if done.stack.rings.synchronous:  # else checked on arrival
                done.stack.check(done)
        for done in forward.passes:
            assert done.stack.rings is not None
            done.stack.rings.end(done.fed.T)
            done.stack.dropped_rows += done.fed.T - done.kept
            done.stack.fed = None
        self._in_flight.append(forward)
        self.inputs.accept()

    def finish(self) -> None:
        """Passes everything left to the writer. Device and host must agree on the number of dropped
        rows."""
        for stack in self.stacks.values():
            if stack.rings is not None:
                stack.rings.synchronize()
        self.drain(wait=True)
        for stack in self.stacks.values():
            if (rings := stack.rings) is None:
                continue
            if stack.fed is not None:  # the last forward pass failed
                rings.rewind(stack.dropped_rows)
            # `dropped` waits for the device, and so for the copy that `read_cursors` began
            cursors, dropped = rings.read_cursors(), rings.dropped()
            stack.check_seen(0, *rings.rows_seen(cursors, rings.head))
            assert all(n == stack.dropped_rows for n in dropped), (
                f"the device dropped {dropped} rows, the host {stack.dropped_rows}"
            )

    def drain(self, wait: bool = False, most: int | None = None) -> None:
        """Passes arrived forward passes to the writer, at most `most`; `wait` blocks until they
        have arrived and the writer accepts them."""
        while self._in_flight and most != 0:
            assert self.writer is not None
            if self.options.drop and not wait and self.writer.full:
                return
            forward = self._in_flight[0]
            if not forward.arrived(wait):
                return
            for done in forward.passes:
                if done.stack.rings is not None and not done.stack.rings.synchronous:
                    done.stack.check(done)
            self._write(self.writer, forward)
            for done in forward.passes:
                assert done.stack.rings is not None
                done.stack.rings.release(done.start + done.fed.T)
            self._in_flight.popleft()
            most = most - 1 if most is not None else None

    def _write(self, writer: TraceWriter, forward: Forward) -> None:
        parts = [(done, self.inputs.rows(done.fed)) for done in forward.passes]
        self.inputs.accept()
        kept = {done.stack.name: rows.real[: done.kept] for done, rows in parts}
        counts = {name: int(real.sum()) for name, real in kept.items()}
        self.tokens += sum(counts.values())
        for done, rows in parts:
            lost = int(rows.real.sum()) - counts[done.stack.name]
            writer.dropped += lost * len(done.stack.routers)

        def of_tokens(name: str) -> np.ndarray:
            arrays = [getattr(rows, name)[: counts[done.stack.name]] for done, rows in parts]
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        _, last = parts[-1]
        writer.write(
            RoutedBatch(
                forward.number,
                of_tokens("token_id"),
                of_tokens("document"),
                of_tokens("sequence"),
                of_tokens("position"),
                of_tokens("domain"),
                list(self.inputs.domains),
                ids=self._of_routers(forward, kept, "ids"),
                weights=self._of_routers(forward, kept, "weights"),
                logits=self._of_routers(forward, kept, "logits") if self.options.logits else None,
                documents=[document for _, rows in parts for document in rows.documents],
                phase=last.phase,
                group=last.group,
                encoded=counts.get("encoder", 0),
            )
        )

    def _of_routers(
        self, forward: Forward, kept: Mapping[str, np.ndarray], kind: str
    ) -> list[np.ndarray]:
        """Per router a copy of its rows in the rings, without padding. `kept`: stack → bool [rows],
        which rows are no padding."""
        found: list[np.ndarray] = []
        for name, stack in self.stacks.items():
            done = next((p for p in forward.passes if p.stack is stack), None)
            if done is None:  # did not run in this forward pass
                dtype = self._dtype(kind)
                widths = [r.experts if kind == "logits" else r.top_k for r in stack.routers]
                found += [np.empty((0, width), dtype) for width in widths]
                continue
            assert stack.rings is not None
            keep = None if kept[name].all() else np.flatnonzero(kept[name])
            found += [
                stack.rings.rows(kind, r, done.start, done.kept, keep)
                for r in range(len(stack.routers))
            ]
        return found

    def _dtype(self, kind: str) -> type:
        if kind == "ids":
            return np.uint8
        is_bits = kind == "weights" and self.weight_dtype == torch.bfloat16
        return np.uint16 if is_bits else np.float16
