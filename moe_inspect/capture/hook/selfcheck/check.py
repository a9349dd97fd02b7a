"""The self-check: the first time that a variant of a kernel is to run on a device, its results are
compared with the reference there, on awkward small cases. Where they differ, or the variant cannot
be compiled, torch does its work, checked in the same way.

MOE_INSPECT_SELFCHECK=0 checks nothing, =always checks in every process what an earlier one has
checked; the default is 1.

T tokens, K slots, E experts, H hidden.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_inspect.capture.hook.selfcheck import memory
from moe_inspect.capture.hook.selfcheck.reference import (
    SIZES,
    Case,
    Mismatch,
    check_combine,
    check_dispatch,
    check_record,
    rows_of,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, plural, print_stderr

SWITCH = "MOE_INSPECT_SELFCHECK"
TOKENS = (1, 7, 371)
COMBINED = (1, 7, 37)  # as H multiplies them
WIDTHS = (1040, 1037)  # H: of two programs, a multiple of 16 or not
# of other numbers of tokens:
TAPES = {1: ("in one page",), 7: ("across the ring's end", "disabled")}
EDGES = ("across pages", "beyond the limit")


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled: types, constants, and numbers that it is specialized on.

    kernel    record, dispatch or combine
    ids       type of the ids, None where only router logits are recorded
    given     type of the weights
    recorded  type of the weights on the tape, None without a tape
    P         rows per page of the tape, 0 without one
    launches  how many kernels do it: 1 to 3
    block     of a dispatch: slots per program
    y, out    of combine: types of the experts' outputs and of the sum
    grouped   of combine: whether the rows are in the order of the experts
    aligned   of combine: whether H is a multiple of 16
    sizes     of combine: which sizes of the outputs it writes
    columns   of combine: per program
    shifted   which of ids, weights and y do not begin at a multiple of 16 bytes
    """

    kernel: str
    device: torch.device
    E: int
    K: int
    ids: torch.dtype | None
    given: torch.dtype | None
    recorded: torch.dtype | None
    P: int
    launches: int = 1
    block: int | None = None
    y: torch.dtype | None = None
    out: torch.dtype | None = None
    grouped: bool = False
    aligned: bool = True
    sizes: tuple[str, ...] = ()
    columns: int = 0
    shifted: tuple[str, ...] = ()

    def __str__(self) -> str:
        weights = "no weights" if self.given is None else f"{_name(self.given)} weights"
        parts = [f"{self.kernel} {self.K} of {self.E} experts", f"{_name(self.ids)} ids", weights]
        parts += [f"recorded as {_name(self.recorded)} in {self.P}"] if self.P else []
        parts += [f"{self.launches} launches of {self.block}"] if self.kernel == "dispatch" else []
        parts += [f"{self.launches} launches"] if self.kernel == "record" else []
        if self.kernel == "combine":
            order = "grouped" if self.grouped else "in order"
            parts += [f"{_name(self.y)} to {_name(self.out)}", order]
            parts += [] if self.aligned else ["odd width"]
            parts += [f"{' and '.join(self.sizes)} of {self.columns}"] if self.sizes else []
        parts += [f"{name} at an odd address" for name in self.shifted]
        return ", ".join(parts)

    def cases(self, kernels: Any) -> Iterator[Case]:
        """Small shapes with ids of no expert, at the edges of pages, of the ring, and of the
        limit."""
        weights = "none"
        if self.recorded is not None or self.kernel == "combine":
            recorded = self.recorded if self.recorded is not None else self.given
            weights = f"{_name(self.given)} as {_name(recorded)}"
        for T in self._tokens(kernels):
            for tape in TAPES.get(T, EDGES) if self.P else ("none",):
                yield Case(
                    self.E,
                    self.K,
                    T,
                    "uniform",
                    self.launches,
                    self.ids,
                    weights,
                    tape,
                    self._holds_invalid_ids(),
                    self.block,
                    self.P,
                    self.shifted,
                )

    @property
    def width(self) -> int:
        """H of the cases: of two programs, or what one that measures its rows sees."""
        if not self.sizes:
            return WIDTHS[not self.aligned]
        return self.columns // 2 + (16 if self.aligned else 13)

    def _tokens(self, kernels: Any) -> list[int]:
        if self.kernel == "record" and self.launches == 2:
            return [max(TOKENS[-1], kernels.RECORD_BLOCK // self.K + 1)]
        most = TOKENS[-1]
        if self.kernel == "dispatch" and self.launches == 1:
            most = kernels.ONE_LAUNCH // self.K
        elif self.P and self.kernel != "dispatch":
            most = kernels.RECORD_BLOCK // self.K
        wanted = COMBINED if self.kernel == "combine" else TOKENS
        return sorted({min(T, most) for T in wanted})

    def _holds_invalid_ids(self) -> bool:
        """Whether the type of the ids holds −1 and E."""
        if self.ids is None:
            return False
        limits = torch.iinfo(self.ids)
        return limits.min < 0 and limits.max >= self.E


Found = dict[Variant, str]  # "ok", "not checked", or what is wrong


def shifted_among(ids_TK: Any, weights_TK: Any, y_SH: Any = None) -> tuple[str, ...]:
    """The names of the tensors that do not begin at a multiple of 16 bytes, for which Triton
    compiles other kernels."""
    bits = ids_TK.data_ptr() if ids_TK is not None else 0
    bits |= weights_TK.data_ptr() if weights_TK is not None else 0
    bits |= y_SH.data_ptr() if y_SH is not None else 0
    if not bits & 15:  # nearly always
        return ()
    tensors = {"ids": ids_TK, "weights": weights_TK, "y": y_SH}
    return tuple(n for n, t in tensors.items() if t is not None and t.data_ptr() & 15)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def run(kernels: Any, variant: Variant, by_torch: bool) -> None:
    """Raises Mismatch where the kernel, or with `by_torch` the torch code in its place, differs
    from the reference."""
    device, name = variant.device, variant.kernel
    code = getattr(kernels, f"{name}_on_device" if by_torch else f"{name}_triton")
    if name == "dispatch" and not by_torch:
        code = functools.partial(code, launches=variant.launches, block=variant.block)
    for case in variant.cases(kernels):
        try:
            if name == "record":
                check_record(kernels, case, code, device)
            elif name == "dispatch":
                check_dispatch(kernels, case, code, device)
            else:
                assert variant.y is not None
                assert variant.out is not None
                rows = rows_of(kernels, case, variant.grouped, variant.width, variant.y, device)
                check_combine(kernels, case, code, rows, variant.out, variant.sizes)
        except Mismatch as error:
            raise Mismatch(f"{error} of {plural(case.T, 'token')}, {case.tape}") from error


class SelfCheck:
    """Whether each variant is to be trusted on its device, in this process. `kernels`: the name of
    the module."""

    def __init__(self, kernels: str):
        self._kernels = kernels
        self._trusted: dict[Hashable, bool] = {}
        self.found: Found = {}  # in this process
        self._recordings: list[Found] = []

    def begin(self) -> Found:
        """A recording begins. Returns what will be found of the variants that are used until
        `end`."""
        self._trusted.clear()  # each is asked for again, when it is first used
        self._recordings.append({})
        return self._recordings[-1]

    def end(self, found: Found) -> None:
        self._recordings = [other for other in self._recordings if other is not found]

    # --- asked at every call: the keys hold what a variant is made from, and no more

    def record(self, tape: Any, ids_TK: Any, weights_TK: Any, launches: int) -> bool:
        ids = ids_TK.dtype if tape.ids is not None else None
        weights = weights_TK.dtype if weights_TK is not None else None
        shifted = shifted_among(ids_TK, weights_TK)
        key = tape.kind, ids, weights, launches, shifted
        found = self._trusted.get(key)
        if found is None:
            variant = _of_tape("record", tape, ids, weights_TK)
            found = self._first_use(key, variant(launches=launches, shifted=shifted))
        return found

    def dispatch(
        self, ids_TK: Any, weights_TK: Any, E: int, tape: Any, launches: int, block: int
    ) -> bool:
        ids = ids_TK.dtype
        key: tuple[Hashable, ...]
        if tape is None:
            shifted = shifted_among(ids_TK, None)
            key = ids_TK.get_device(), E, ids_TK.size(1), ids, launches, block, shifted
        else:
            shifted = shifted_among(ids_TK, weights_TK)
            key = tape.kind, ids, weights_TK.dtype, launches, block, shifted
        found = self._trusted.get(key)
        if found is None:
            variant = _of_call("dispatch", ids_TK, weights_TK if tape else None, E, tape)
            made = variant(launches=launches, block=block, shifted=shifted)
            found = self._first_use(key, made)
        return found

    def combine(
        self,
        y_SH: Any,
        ids_TK: Any,
        weights_TK: Any,
        grouped: bool,
        dtype: Any,
        E: int,
        tape: Any,
        sizes: Any = None,
    ) -> bool:
        H = y_SH.size(1)
        shifted = shifted_among(ids_TK, weights_TK, y_SH)
        written: tuple[bool, ...] = ()
        columns = 0
        if sizes is not None:
            written = tuple(size is not None for size in sizes)
            columns = sys.modules[self._kernels].combine_columns(H, True)
        kinds = (
            (ids_TK.dtype, weights_TK.dtype, y_SH.dtype, dtype, grouped, not H % 16, shifted),
            (written, columns),
        )
        key = (y_SH.get_device(), E, ids_TK.size(1), kinds) if tape is None else (tape.kind, kinds)
        found = self._trusted.get(key)
        if found is None:
            variant = _of_call("combine", ids_TK, weights_TK, E, tape)
            made = variant(
                y=y_SH.dtype,
                out=dtype,
                grouped=grouped,
                aligned=not H % 16,
                sizes=tuple(n for n, on in zip(SIZES, written, strict=False) if on),
                columns=columns,
                shifted=shifted,
            )
            found = self._first_use(key, made)
        return found

    def _first_use(self, key: Hashable, variant: Variant) -> bool:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.found.get(variant, "ok") in FINE  # a graph must not hold the check
        self._trusted[key] = True  # the check itself calls the kernel
        found = self.found.get(variant)
        if found is None:
            try:
                found = self.found[variant] = self._checked(variant)
            except BaseException:
                del self._trusted[key]
                raise
        for recording in self._recordings:
            recording[variant] = found
        self._trusted[key] = found in FINE
        return self._trusted[key]

    # --- the check

    def _checked(self, variant: Variant) -> str:
        """ "ok", "not checked", or what is wrong with the variant. MoeInspectError where torch is
        wrong too."""
        wanted = switch()
        if wanted == "0":
            return "not checked"
        kernels = sys.modules[self._kernels]
        environment, name = memory.environment_of(kernels, variant.device), str(variant)
        if wanted == "1" and name in memory.passed(environment):
            return "ok"
        wrong = wrong_with(kernels, variant, by_torch=False)
        if wrong is None:
            memory.remember(environment, {name})
            return "ok"
        where = f"{variant.kernel} on {device_name(variant.device)}"
        if (also := wrong_with(kernels, variant, by_torch=True)) is not None:
            raise MoeInspectError(
                f"{where}: the kernel {wrong}, and torch instead {also} ({name}): record on "
                'another device, and report it with the output of "moe-inspect doctor"'
            )
        print_stderr(
            f"warning: {where}: the kernel {wrong} ({name}): torch runs instead, more slowly; "
            'please report it with the output of "moe-inspect doctor"'
        )
        return wrong


def summary(found: Found) -> dict[str, str]:
    """Kernel → "ok", "not checked", or why torch did its work; of those in `found`."""
    told: dict[str, str] = {}
    for variant, result in found.items():
        if result not in FINE:
            result = f"done by torch: the kernel {result} ({variant})"
        elif told.get(variant.kernel, "ok") != "ok":
            continue
        told[variant.kernel] = result
    return told


FINE = ("ok", "not checked")


def switch() -> str:
    """The value of MOE_INSPECT_SELFCHECK."""
    wanted = os.environ.get(SWITCH) or "1"
    if wanted not in ("0", "1", "always"):
        raise MoeInspectError(f"{SWITCH}={wanted}: give 0, 1 or always")
    return wanted


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _of_tape(kernel: str, tape: Any, ids: Any, weights_TK: Any) -> Any:
    """A Variant of these, but for what differs between kernels."""
    given = weights_TK.dtype if tape.weights is not None else None
    recorded = tape.weights.dtype if tape.weights is not None else None
    device, E, K = tape.cursor.device, tape.experts, tape.K
    return functools.partial(Variant, kernel, device, E, K, ids, given, recorded, tape.P)


def _of_call(kernel: str, ids_TK: Any, weights_TK: Any, E: int, tape: Any) -> Any:
    """The same; `tape` may be None."""
    if tape is not None:
        return _of_tape(kernel, tape, ids_TK.dtype, weights_TK)
    given = weights_TK.dtype if weights_TK is not None else None
    device, K = ids_TK.device, ids_TK.size(1)
    return functools.partial(Variant, kernel, device, E, K, ids_TK.dtype, given, None, 0)


def wrong_with(kernels: Any, variant: Variant, by_torch: bool) -> str | None:
    """What is wrong with the results, or why there are none; None where they are right."""
    try:
        run(kernels, variant, by_torch)
    except Mismatch as error:
        return f"gives a wrong result: {error}"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"cannot be run: {first_line(error)}"
    return None
