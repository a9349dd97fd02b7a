"""The self-check: the first time that a variant of a kernel is to run on a user's device, its
results are compared with the reference there, on awkward small cases. Where they differ, or the
variant cannot be compiled, torch does its work, checked in the same way. What a device has passed
is kept between runs, in a small file of the user's cache directory.

MOE_INSPECT_SELFCHECK=0 checks nothing, =always checks in every process what an earlier one has
checked; the default is 1.

T tokens, K slots, E experts, H hidden.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_inspect.capture.hook.kernel_reference import (
    Case,
    Mismatch,
    Tape,
    check_combine,
    check_dispatch,
    check_record,
    check_rows,
)
from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, plural, print_stderr
from moe_inspect.trace.files.atomic import draft_of

SWITCH = "MOE_INSPECT_SELFCHECK"
TOKENS = (1, 7, 371)
COMBINED = (1, 7, 37)  # as H multiplies them

CHECKS = {
    "record": check_record,
    "dispatch": check_dispatch,
    "combine": check_combine,
    "rows": check_rows,
}
FINE = ("ok", "not checked")
MOST = 16  # devices × versions that are remembered
# of other numbers of tokens:
TAPES = {1: ("in one page",), 7: ("across the ring's end", "disabled")}
EDGES = ("across pages", "beyond the limit")


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled: types, constants, and numbers that it is specialized on.

    kernel    record, dispatch or combine; rows: those of a serving engine
    ids       type of the ids, None where only router logits are recorded
    given     type of the weights
    recorded  type of the weights on the tape, None without a tape
    P         rows per page of the tape, 0 without one
    launches  how many kernels do it: 1 to 3
    block     of a dispatch: slots per program
    y, out    of combine: types of the experts' outputs and of the sum
    grouped   of combine: whether the rows are in the order of the experts
    aligned   of combine: whether H is a multiple of 16
    norms     of combine: whether it writes the norms of the outputs
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
    y: torch.dtype = torch.float32
    out: torch.dtype = torch.float32
    grouped: bool = False
    aligned: bool = True
    norms: bool = False
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
            parts += [f"norms of {self.columns}"] if self.norms else []
        parts += [f"{name} at an odd address" for name in self.shifted]
        return ", ".join(parts)

    def cases(self, kernels: ModuleType) -> Iterator[Case]:
        """Small shapes with ids of no expert, at the edges of pages, ring and limit."""
        weights = "none"
        if self.given is not None:
            weights = f"{_name(self.given)} as {_name(self.recorded or self.given)}"
        # whether their type holds −1 and E
        limits = torch.iinfo(self.ids) if self.ids is not None else None
        invalid_ids = limits is not None and limits.min < 0 and limits.max >= self.E
        how = invalid_ids, self.block, self.P, self.shifted, self.device
        for T in self._tokens(kernels):
            of = self.E, self.K, T, "uniform", self.launches, self.ids, weights
            for tape in TAPES.get(T, EDGES) if self.P else ("none",):
                yield Case(*of, tape, *how)

    @property
    def width(self) -> int:
        """H of the cases: of two programs, or what one that measures its rows sees."""
        least = self.columns // 2 if self.norms else 1024
        return least + (16 if self.aligned else 13)

    def _tokens(self, kernels: ModuleType) -> list[int]:
        if self.kernel == "record" and self.launches == 2:
            return [max(TOKENS[-1], kernels.RECORD_BLOCK // self.K + 1)]
        most = TOKENS[-1]
        if self.kernel == "dispatch" and self.launches == 1:
            most = kernels.ONE_LAUNCH // self.K
        elif self.P and self.kernel != "dispatch":
            most = kernels.RECORD_BLOCK // self.K
        wanted = COMBINED if self.kernel == "combine" else TOKENS
        return sorted({min(T, most) for T in wanted})


Found = dict[Variant, str]  # "ok", "not checked", or what is wrong


def shifted_among(
    ids_TK: Tensor | None, weights_TK: Tensor | None, y_SH: Tensor | None
) -> tuple[str, ...]:
    """The names of the tensors that do not begin at a multiple of 16 bytes, for which Triton
    compiles other kernels."""
    bits = ids_TK.data_ptr() if ids_TK is not None else 0
    bits |= weights_TK.data_ptr() if weights_TK is not None else 0
    bits |= y_SH.data_ptr() if y_SH is not None else 0
    if not bits & 15:  # nearly always
        return ()
    tensors = {"ids": ids_TK, "weights": weights_TK, "y": y_SH}
    return tuple(n for n, t in tensors.items() if t is not None and t.data_ptr() & 15)


def _shape(ids_TK: Tensor | None, E: int) -> tuple[torch.device, int, int]:
    """The device, E and K of a call without a tape."""
    assert ids_TK is not None
    return ids_TK.device, E, ids_TK.size(1)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def wrong_with(kernels: ModuleType, variant: Variant, by_torch: bool) -> str | None:
    """How the results of the kernel, or with `by_torch` of the torch code in its place, differ from
    the reference, or why there are none; None where they are right."""
    name = variant.kernel
    code = getattr(kernels, f"{name}_torch" if by_torch else f"{name}_triton")
    if name == "dispatch" and not by_torch:
        code = functools.partial(code, launches=variant.launches, block=variant.block)
    check, more = CHECKS[name], ()
    if name == "combine":
        more = variant.grouped, variant.width, variant.y, variant.out, variant.norms
    try:
        for case in variant.cases(kernels):
            try:
                check(kernels, case, code, *more)
            except Mismatch as error:
                of = f"of {plural(case.T, 'token')}, {case.tape}"
                return f"gives a wrong result: {error} {of}"
    except Exception as error:  # whatever a compiler or a driver raises
        return f"cannot be run: {first_line(error)}"
    return None


class SelfCheck:
    """Whether each variant is to be trusted on its device, in this process. `kernels`: the name of
    the module."""

    def __init__(self, kernels: str):
        self._kernels = kernels
        self._trusted: dict[Hashable, bool] = {}
        self.found: Found = {}  # in this process
        self._recordings: list[Found] = []

    def begin(self) -> Found:
        """A recording begins: what will be found of the variants that are used until `end`."""
        self._trusted.clear()  # each is asked for again, when it is first used
        self._recordings.append({})
        return self._recordings[-1]

    def end(self, found: Found) -> None:
        self._recordings = [other for other in self._recordings if other is not found]

    def trusts(
        self,
        kernel: str,
        tape: Tape | None,
        E: int,
        ids_TK: Tensor | None,
        weights_TK: Tensor | None,
        y_SH: Tensor | None,
        *more: Any,
    ) -> bool:
        """Asked at every call of a kernel: the key holds what its variant is made from, and no
        more. `E`: of a call without a tape. `more`: the fields of `Variant` from `launches` on."""
        ids = ids_TK.dtype if ids_TK is not None else None
        given = weights_TK.dtype if weights_TK is not None else None
        shifted = shifted_among(ids_TK, weights_TK, y_SH)
        where = tape.kind if tape is not None else _shape(ids_TK, E)
        key = kernel, where, ids, given, more, shifted
        found = self._trusted.get(key)
        if found is not None:
            return found
        if tape is None:
            call = *_shape(ids_TK, E), ids, given, None, 0
        else:
            recorded = tape.weights.dtype if tape.weights is not None else None
            given = given if recorded is not None else None
            call = tape.cursor.device, tape.experts, tape.K, ids, given, recorded, tape.P
        return self._first_use(key, Variant(kernel, *call, *more, shifted=shifted))

    def _first_use(self, key: Hashable, variant: Variant) -> bool:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return self.found.get(variant, "ok") in FINE  # a graph must not hold the check
        self._trusted[key] = True  # the check itself calls the kernel
        found = self.found.get(variant)
        if found is None:
            try:
                found = self.found[variant] = self._checked(variant)
            finally:
                del self._trusted[key]
        for recording in self._recordings:
            recording[variant] = found
        self._trusted[key] = found in FINE
        return self._trusted[key]

    # --- the check

    def _checked(self, variant: Variant) -> str:
        """ "ok", "not checked", or what is wrong. MoeInspectError where torch is wrong too."""
        wanted = switch()
        if wanted == "0":
            return "not checked"
        kernels = sys.modules[self._kernels]
        environment, name = environment_of(kernels, variant.device), str(variant)
        if wanted == "1" and name in passed(environment):
            return "ok"
        wrong = wrong_with(kernels, variant, by_torch=False)
        if wrong is None:
            remember(environment, {name})
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
            told[variant.kernel] = f"done by torch: the kernel {result} ({variant})"
        elif told.get(variant.kernel, "ok") == "ok":
            told[variant.kernel] = result
    return told


def switch() -> str:
    """The value of MOE_INSPECT_SELFCHECK."""
    wanted = os.environ.get(SWITCH) or "1"
    if wanted not in ("0", "1", "always"):
        raise MoeInspectError(f"{SWITCH}={wanted}: give 0, 1 or always")
    return wanted


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# --- what a device has passed. What failed is checked again


def cache_file() -> Path | None:
    """$XDG_CACHE_HOME/moe-inspect/selfcheck.json; None for a user without a home."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "moe-inspect" / "selfcheck.json"


def passed(environment: str) -> set[str]:
    """The variants that have passed in an environment. A missing or damaged file holds none."""
    found = _read().get(environment)
    return {name for name in found if isinstance(name, str)} if isinstance(found, list) else set()


def remember(environment: str, variants: set[str]) -> None:
    """Adds variants to the file. Where it cannot be written they are checked again next time."""
    if (file := cache_file()) is None:
        return
    names, known = sorted(passed(environment) | variants), _read()
    known.pop(environment, None)  # it becomes the last one
    text = json.dumps(dict([*known.items(), (environment, names)][-MOST:]))
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with draft_of(file) as draft:
            draft.write_text(text)


def _read() -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text()) if (file := cache_file()) is not None else None
        if isinstance(found, dict):
            return found
    return {}


def environment_of(kernels: ModuleType, device: torch.device) -> str:
    """What a result depends on: the device, its driver, torch, Triton, and our kernels."""
    name = device.type
    # two checkouts may have the same version
    digest = hashlib.sha256(Path(kernels.__file__ or "").read_bytes()).hexdigest()
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        name = f"{of.name} {getattr(of, 'gcnArchName', '') or f'sm_{of.major}{of.minor}'}"
    parts = {
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": kernels.triton.__version__ if kernels.triton is not None else None,
        "moe-inspect": f"{version('moe-inspect')} {digest[:12]}",
    }
    return ", ".join([name, *(f"{key} {value}" for key, value in parts.items())])


@functools.cache
def driver_version() -> str | None:
    """The version of the GPU's kernel driver: NVIDIA's, else AMD's."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3,}\.\d[\d.]*", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    with contextlib.suppress(OSError):
        return Path("/sys/module/amdgpu/version").read_text().strip()
    return None
