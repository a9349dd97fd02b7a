"""The buffers that an engine's routers write their choices into, and what is taken of them behind a
forward pass: on a GPU one launch per router, and one per step. Beside each Triton kernel stands its
implementation in torch. On a CPU nothing is copied before the next step begins.

L routers, T rows of a buffer, m rows that are recorded, K slots, E experts.
"""

from __future__ import annotations

# pyright sees neither what @triton.jit makes of a signature nor that the kernels exist only with
# triton:
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportOptionalSubscript=false
import itertools
from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from moe_inspect.capture.hook import first_launch, kernels
from moe_inspect.errors import MoeInspectError

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the torch implementations run
    triton = None

BLOCK = 1024  # slots per program
# rows that wait on a CPU until the engine's own thread counts them, as where the sender is blocked
COUNT_AT = 4096
FEWEST = 16  # rows that a step counts for: what is held of it takes as much memory
# tokens and positions [m], ids and weights [L, m, K], logits [L, m, E] or None, and physical ids
# [L, m, K] or None; of a CPU tokens, positions and what each router returned
Taken = list[Any]


class Rows:
    """Buffers whose addresses never change, so that a CUDA graph replays the writes into them. What
    lies behind a step's own rows is padding, or left of earlier steps. On a GPU what is taken lies
    in `staged`, of the same size, until the host has it. All of it is allocated here, before the
    engine measures how much memory is left for its cache. Without `weights` nothing is taken, and
    rows are only counted. `compiled`: whether torch.compile may trace through the routers;
    `physicals`: whether experts have replicas, of which one is chosen; `buffers`: on a CPU too."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        E: int,
        logits: bool,
        device: torch.device,
        weights: bool = True,
        compiled: bool = True,
        physicals: bool = False,
        buffers: bool = False,
    ):
        self.shape, self.E, self.device, self.compiled = shape, E, device, compiled
        L, T, K = shape
        buffers |= device.type != "cpu" or kernels.runs_triton(torch.empty(0))
        rows = -(-T // 16) * 16 if buffers else 1  # so that each router's part is aligned
        half = {"dtype": torch.float16, "device": device}
        self.ids = torch.full((L, rows, K), -1, dtype=torch.int16, device=device)
        self.weights = torch.zeros(L, rows, K, **half) if weights else None
        self.logits = torch.zeros(L, rows, E, **half) if logits else None
        self.physicals = torch.full_like(self.ids, -1) if physicals and weights else None
        self.kept = self.ids, self.weights, self.logits, self.physicals
        self._of_router = [[None if t is None else t[r] for t in self.kept] for r in range(L)]
        self.tokens = 0  # that were given to be counted
        # of each router, between two places for what is no expert and so routes nowhere
        self.sums = torch.zeros(L, E + 2, dtype=torch.int64, device=device)
        self.first = (torch.arange(L, device=device) * (E + 2) + 1).view(L, 1, 1)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self.every = torch.arange(rows, device=device)
        self.staged = self.staging() if kernels.runs_triton(self.ids) else None
        self.host = None if buffers else HostRows(self)
        self.fault: Exception | None = None  # of a compiled graph, until the recorder looks
        self.key = next(KEYS)
        ROWS[self.key] = self

    def staging(self) -> Taken:
        """Room for what is taken, uninitialized."""
        if self.weights is None:
            return [None] * 6
        of_rows = [self.every.new_empty(len(self.every), dtype=torch.int32) for _ in range(2)]
        return [*of_rows, *(None if t is None else torch.empty_like(t) for t in self.kept)]

    def counted(self) -> tuple[int, Tensor]:
        """Tokens so far, and their assignments by router and expert: [L × E]. On a GPU these may be
        those of a step more."""
        tokens, sums = self.tokens, self.sums
        if self.host is not None:
            tokens, total = self.host.count()
            sums = torch.from_numpy(total)
        return tokens, sums[:, 1:-1].reshape(-1)

    @property
    def nbytes(self) -> int:
        """What it holds of the device's memory."""
        held = [*self.kept, self.sums, self.every, *(self.staged or ())]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def keep(
        self,
        router: int,
        ids_TK: Tensor,
        weights_TK: Tensor,
        logits_TE: Tensor,
        physicals_TK: Tensor | None = None,
    ) -> None:
        """In the forward pass: a router's choice, of logical experts, and their replicas."""
        choice = ids_TK, weights_TK, logits_TE, physicals_TK
        if self.compiled and torch.compiler.is_compiling():  # it would trace into the function
            to = (None if t is None else t[router] for t in self.kept)
            torch.ops.moe_inspect.keep_rows(*to, *choice, self.E, self.key, router)
        elif self.host is not None:
            self.host.keep(router, *choice)
        else:
            ids, weights, logits, physicals = self._of_router[router]
            _keep(ids, weights, logits, physicals, *choice, self.E)

    def take(
        self,
        counted: int,
        m: int = 0,
        picked: Tensor | None = None,
        tokens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Taken:
        """Behind the forward pass: adds the first `counted` rows to the counts, and returns the m
        at the indices `picked`, or the first ones. `tokens`, `positions`: of all rows."""
        self.tokens += counted
        if self.host is not None:
            return self.host.take(counted, m, picked, tokens, positions)
        if (rows := max(counted, m)) > len(self.every):
            raise ValueError(f"{rows} rows of a buffer of {len(self.every)}")
        call = self, counted, m, picked, tokens, positions
        if self.staged is None or not rows:
            return take_torch(*call)
        parts = ("counted", counted), ("taken", m)
        name = "rows " + " and ".join(part for part, n in parts if n)
        codes = take_triton, take_torch
        return first_launch.run(name, self.device, [self.sums], *codes, *call)

    def count(self, n: int) -> None:
        ids_LNK = self.ids.narrow(1, 0, n).clamp(-1, self.E)
        at = torch.add(ids_LNK, self.first).view(-1)
        self.sums.view(-1).scatter_add_(0, at, self._one.expand(len(at)))


def joined(steps: Sequence[Sequence[Tensor]], rows: Sequence[int], buffer: Tensor) -> np.ndarray:
    """Values of each step and router, the first rows of each step, one behind the other: [L, all
    rows, width of the buffer]. At once, as it takes long to look at each tensor."""
    L, _, width = buffer.shape
    shape = sum(rows), width
    array_LNW = torch.empty(L, *shape, dtype=buffer.dtype)
    whole = all(len(of[0]) == m for of, m in zip(steps, rows, strict=True))
    for r, of in enumerate(zip(*steps, strict=True)):
        if not whole or (values := torch.cat(of)).shape != shape:
            values = torch.cat([t[:m, :width] for t, m in zip(of, rows, strict=True)])
        if values.shape != shape:
            raise ValueError(f"a router returned {tuple(values.shape)}, not {shape}")
        array_LNW[r] = values
    return array_LNW.numpy()


class HostRows:
    """On a CPU nothing is copied in the forward pass: there a copy takes ten times what it takes
    elsewhere, as neither its code nor Python's is in the core's caches. What routers return is
    held, as no engine writes into it (vLLM 0.32, SGLang 0.5.23), and read where there is time.
    Rows are counted many at a time, in whichever thread asks. `viewed`: tokens and positions of the
    last step and their memory, as those of vLLM's runner V1 are always the same."""

    def __init__(self, of: Rows):
        self.of = of
        self.held: list[Any] = [None] * of.shape[0]
        self.tokens, self.total = 0, of.sums.numpy()
        # to be counted: ids of each router, and the number of rows
        self.waiting, self.rows_waiting = deque[tuple[list[Tensor], int]](), 0
        self.counting = Lock()
        self.viewed: Any = (None, None, ())
        self.weighs, self.scores = of.weights is not None, of.logits is not None

    def keep(
        self,
        router: int,
        ids: Tensor,
        weights: Tensor | None,
        logits: Tensor | None,
        physicals: Tensor | None = None,
    ) -> None:
        weights = weights if self.weighs else None  # what is not recorded is the engine's to free
        self.held[router] = ids, weights, logits if self.scores else None, physicals

    def take(
        self,
        counted: int,
        m: int,
        picked: Tensor | None,
        tokens: Tensor | None,
        positions: Tensor | None,
    ) -> Taken:
        held, self.held = self.held, [None] * len(self.held)
        if None in held:
            raise MoeInspectError(f"router {held.index(None)} chose no experts in a forward pass")
        if counted:
            self.waiting.append(([choice[0] for choice in held], counted))
            self.rows_waiting += max(counted, FEWEST)
            if self.rows_waiting >= COUNT_AT and not self.counting.locked():
                self.count()
        if tokens is None or positions is None or not self.weighs:
            return []
        if tokens is not self.viewed[0] or positions is not self.viewed[1]:
            views = [memoryview(t.numpy()) for t in (tokens, positions)]
            self.viewed = tokens, positions, views
        views = self.viewed[2]
        if picked is None:
            taken: Taken = [memoryview(bytes(view[:m])).cast(view.format) for view in views]
        else:
            taken = [np.asarray(view)[picked.numpy()] for view in views]
            # the other rows are not to wait
            held = [[None if t is None else t[picked] for t in choice] for choice in held]
        return [*taken, held]

    def count(self) -> tuple[int, np.ndarray]:
        """Tokens and sums, with those that wait. What cannot be counted waits no more: it would
        fail again."""
        with self.counting:
            self.rows_waiting = 0
            if steps := [self.waiting.popleft() for _ in range(len(self.waiting))]:
                ids, rows = zip(*steps, strict=True)
                tokens = sum(rows)
                try:
                    ids_LNK = joined(ids, rows, self.of.ids).clip(-1, self.of.E)
                except Exception as error:
                    raise MoeInspectError(f"{tokens} tokens not counted: {error}") from error
                at = (ids_LNK + self.of.first.numpy()).ravel()
                new = np.bincount(at, minlength=self.total.size)
                self.total = self.total + new.reshape(self.total.shape)
                self.tokens += tokens
            return self.tokens, self.total


# --- in the forward pass


def _keep(
    to_ids: Tensor,
    to_weights: Tensor | None,
    to_logits: Tensor | None,
    to_physicals: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    logits: Tensor | None,
    physicals: Tensor | None,
    E: int,
) -> None:
    """More columns than a row has are fused shared experts, behind the routed ones; more rows than
    the buffer has are those of a profiling pass."""
    recorded = None if to_weights is None else weights
    call = to_ids, to_weights, ids, recorded, to_physicals, physicals
    if kernels.runs_triton(to_ids) and len(ids):
        written = to_ids, to_weights, to_physicals
        first_launch.run("rows kept", to_ids.device, written, keep_triton, keep_torch, *call)
    else:
        keep_torch(*call)
    if to_logits is not None and logits is not None:
        _copy(to_logits, logits)


def _copy(rows: Tensor, values: Tensor) -> None:
    if values.shape[1] == rows.shape[1] and len(values) <= len(rows):
        rows.narrow(0, 0, len(values)).copy_(values)
        return
    n, width = (min(sizes) for sizes in zip(values.shape, rows.shape, strict=True))
    rows[:n, :width].copy_(values[:n, :width])


# of this process, as a compiled graph calls them
KEYS, ROWS = itertools.count(), WeakValueDictionary[int, Rows]()


def _keep_in_graph(*given: Any) -> None:
    """A fault of ours would end the engine's forward pass. A graph uses its memory again."""
    *to_and_given, key, router = given
    rows = ROWS.get(key)  # which may have ended before the graph
    try:
        if rows is not None and rows.host is not None:
            choice = zip(to_and_given[:4], to_and_given[4:8], strict=True)
            rows.host.keep(router, *(None if to is None else t.clone() for to, t in choice))
        else:
            _keep(*to_and_given)
    except Exception as error:
        if rows is not None:
            rows.fault = error


def keep_torch(
    to_ids: Tensor,
    to_weights: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    to_physicals: Tensor | None = None,
    physicals: Tensor | None = None,
) -> None:
    _copy(to_ids, ids)
    for to, given in ((to_weights, weights), (to_physicals, physicals)):
        if to is not None and given is not None:
            _copy(to, given)


SCHEMA = (
    "(Tensor(a!) to_ids, Tensor(b!)? to_weights, Tensor(c!)? to_logits, Tensor(d!)? to_physicals, "
    "Tensor ids, Tensor weights, Tensor? logits, Tensor? physicals, int E, int rows, int router) "
    "-> ()"
)
torch.library.custom_op(
    "moe_inspect::keep_rows",
    _keep_in_graph,
    mutates_args=("to_ids", "to_weights", "to_logits", "to_physicals"),
    schema=SCHEMA,
).register_fake(lambda *_: None)


# --- behind the forward pass


def take_torch(
    of: Rows,
    counted: int,
    m: int,
    picked: Tensor | None,
    tokens: Tensor | None,
    positions: Tensor | None,
) -> Taken:
    if counted:
        of.count(counted)
    if not m or tokens is None or positions is None or of.weights is None:
        return []
    at = slice(0, m) if picked is None else picked
    of_routers = (None if t is None else t[:, at] for t in of.kept)
    taken = [tokens[at], positions[at], *of_routers]
    # the next step overwrites the rows; picked ones are a copy already
    return taken if picked is not None else [None if t is None else t.clone() for t in taken]


if triton is not None:

    @triton.jit(do_not_specialize=["T"])
    def _keep_kernel(
        ids, weights, physicals, to_ids, to_weights, to_physicals, T,
        K: tl.constexpr, IDS: tl.constexpr, WEIGHTS: tl.constexpr, PHYSICALS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The first K values of T rows, which have as many as IDS, WEIGHTS and PHYSICALS say."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < T * K
        expert = tl.load(ids + i // K * IDS + i % K, mask=inside)
        tl.store(to_ids + i, expert.to(tl.int16), mask=inside)
        if to_weights is not None:
            weight = tl.load(weights + i // K * WEIGHTS + i % K, mask=inside)
            tl.store(to_weights + i, weight.to(tl.float16), mask=inside)
        if to_physicals is not None:
            replica = tl.load(physicals + i // K * PHYSICALS + i % K, mask=inside)
            tl.store(to_physicals + i, replica.to(tl.int16), mask=inside)

    @triton.jit(do_not_specialize=["counted", "m"])
    def _take_kernel(
        ids, weights, physicals, picked, tokens, positions, sums,
        to_tokens, to_positions, to_ids, to_weights, to_physicals, E, rows, counted, m,
        K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A program counts and copies some slots of one router."""
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        router = tl.program_id(1).to(tl.int64)
        first = router * rows * K
        expert = tl.load(ids + first + i, mask=i < counted * K, other=-1).to(tl.int32)
        routed = (expert >= 0) & (expert < E)
        count_E = tl.histogram(tl.where(routed, expert, 0), BINS, mask=routed).to(tl.int64)
        of_expert = sums + router * (E + 2) + 1 + tl.arange(0, BINS)
        tl.atomic_add(of_expert, count_E, mask=count_E > 0, sem="relaxed")
        if to_ids is not None:
            inside = i < m * K
            at = first + tl.load(picked + i // K, mask=inside, other=0) * K + i % K
            to = router * m * K + i
            tl.store(to_ids + to, tl.load(ids + at, mask=inside), mask=inside)
            tl.store(to_weights + to, tl.load(weights + at, mask=inside), mask=inside)
            if to_physicals is not None:
                tl.store(to_physicals + to, tl.load(physicals + at, mask=inside), mask=inside)
            if router == 0:  # its programs have m slots at least
                inside = i < m
                row = tl.load(picked + i, mask=inside, other=0)
                token = tl.load(tokens + row, mask=inside).to(tl.int32)
                position = tl.load(positions + row, mask=inside).to(tl.int32)
                tl.store(to_tokens + i, token, mask=inside)
                tl.store(to_positions + i, position, mask=inside)

    def keep_triton(
        to_ids: Tensor,
        to_weights: Tensor | None,
        ids: Tensor,
        weights: Tensor | None,
        to_physicals: Tensor | None = None,
        physicals: Tensor | None = None,
    ) -> None:
        T, K = min(len(ids), len(to_ids)), to_ids.shape[1]
        if T == 0:
            return
        kept = ids, weights, None if to_physicals is None else physicals
        given = [None if t is None else t.contiguous() for t in kept]
        widths = (K if t is None else t.shape[1] for t in given)
        named = dict(zip(("IDS", "WEIGHTS", "PHYSICALS"), widths, strict=True))
        with torch.cuda.device_of(ids):
            _keep_kernel[(-(-T * K // BLOCK),)](
                *given, to_ids, to_weights, to_physicals, T, K=K, **named, BLOCK=BLOCK
            )

    def take_triton(
        of: Rows,
        counted: int,
        m: int,
        picked: Tensor | None,
        tokens: Tensor | None,
        positions: Tensor | None,
    ) -> Taken:
        """Returns views of what is staged."""
        assert of.staged is not None
        (L, rows, K), (*to, to_logits, to_physicals) = of.ids.shape, of.staged
        # what is None is not read: all is taken, or nothing
        of_rows = (of.every if t is None else t for t in (picked, tokens, positions))
        picked, tokens, positions = of_rows if of.weights is not None else (None, None, None)
        read = of.ids, of.weights, of.physicals, picked, tokens, positions, of.sums
        bins = max(16, triton.next_power_of_2(of.E))
        with torch.cuda.device_of(of.ids):
            _take_kernel[(-(-max(counted, m) * K // BLOCK), L)](
                *read, *to, to_physicals, of.E, rows, counted, m, K=K, BINS=bins, BLOCK=BLOCK
            )
        if not m or of.weights is None:
            return []
        of_rows, of_slots = [t[:m] for t in to[:2]], (*to[2:], to_logits, to_physicals)
        widths = K, K, of.E, K
        ids, weights, logits, physicals = (
            None if t is None else t.view(-1)[: L * m * width].view(L, m, width)
            for t, width in zip(of_slots, widths, strict=True)
        )
        if logits is not None:
            torch.index_select(of.logits, 1, picked[:m], out=logits)
        return [*of_rows, ids, weights, logits, physicals]
