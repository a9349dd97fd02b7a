"""Launches through `capture.hook.launch`, each compared with the same launch in Triton's own way,
on a driver that only notes what it is given. A program of its own: the other tests run the kernels
in Triton's interpreter, where nothing is compiled. Prints one JSON line per scenario."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from moe_inspect.capture.hook import kernels, launch
from moe_inspect.capture.hook.kernel_reference import Case, choice, tape_for
from tests.support.mutation import changed_source


class FakeDriver:
    """To be set with `triton.runtime.driver.set_active`. `device` and `stream` are the current
    ones; `seen`, where given, is called with each launch: kernel, grid, stream and arguments."""

    def __init__(self, seen: Callable[..., None] | None = None):
        self.device, self.streams = 0, {0: 100, 1: 200}  # the current stream of each device
        loaded = itertools.count(1)  # a module of its own, and so a function of its own, every time
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (n := next(loaded), f"{name}#{n}", 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": 232448,
                "multiprocessor_count": 132,
            },
        )
        run = _noting(seen) if seen is not None else lambda *arguments: None
        self.launcher_cls = lambda source, metadata: run
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: self.streams[device]
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_active_torch_device = lambda: torch.device("cpu")
        self.get_device_interface = lambda: torch.cpu
        self.is_active = lambda: True


def _noting(seen: Callable[..., None]) -> Callable[..., None]:
    def run(*arguments: Any) -> None:
        x, y, z, stream, function, metadata, launch_metadata, enter, leave, *given = arguments
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        noted = {"stream": stream, "function": function, "metadata": metadata}
        seen(SimpleNamespace(grid=(x, y, z), arguments=given, **noted))

    return run


# mistakes in launch.py: with each of them some launch differs from Triton's own
MISTAKES = {
    "types are ignored": ("kinds.append(tensor.dtype)", "kinds.append(0)"),
    "alignment is ignored": ("bits % ALIGNMENT == 0 and", ""),
    "alignment of outputs is ignored": (
        "append(pointer := tensor.data_ptr()) bits |= pointer",
        "append(tensor.data_ptr())",
    ),
    "large tensors are not told apart": ("and elements < FEW_ELEMENTS", ""),
    "specialized numbers are ignored": ("(current, specialized, state", "(current, state"),
    "the state is ignored": ("state.variant, *kinds", "*kinds"),
    "states with other constants are alike": ('getattr(argument, "value", argument)', "None"),
    "the device is ignored": ("(current, specialized, state", "(specialized, state"),
    "the tensors' device is ignored": ("if current != device >= 0:", "if False:"),
    "always the first stream": ("active.get_current_stream(current)", "100"),
    "hooks are not called": ("or observed:", ":"),
    "numbers swapped": ("*pointers, *specialized, *numbers,", "*pointers, *numbers, *specialized,"),
    "nothing is ever bound": ("self.bound[variant] = bound", "pass"),
}  # fmt: skip


class Fields(NamedTuple):
    x: Any
    base: Any
    P: Any


@triton.jit(do_not_specialize=["T", "lane"])
def _kernel(x, y, out, E, T, fields, lane, K: tl.constexpr):
    value = tl.load(out) + E + T + lane + K + fields.base + fields.P
    if x is not None:
        value += tl.load(x).to(tl.int32)
    if y is not None:
        value += tl.load(y).to(tl.int32)
    tl.store(out, value + tl.load(fields.x).to(tl.int32))


def plain(argument: Any) -> Any:
    """The argument as the device gets it."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, tuple):
        return tuple(map(plain, argument))
    return getattr(argument, "value", argument)


def given(noted: Any) -> tuple[Any, ...]:
    where = noted.grid, noted.stream, noted.function, noted.metadata
    return *where, plain(tuple(noted.arguments))


NOTED: list[Any] = []  # launches
DRIVER = FakeDriver(NOTED.append)
put = patch.multiple  # put(owner, name=value, …): attributes of an object, for a while


class Compared:
    """Calls a Launch, and launches the same in Triton's own way; they must not differ."""

    def __init__(self, module: ModuleType):
        driver.set_active(DRIVER)  # type: ignore[arg-type]
        DRIVER.device, DRIVER.streams[0] = 0, 100
        self.module, self.inside = module, False
        self.call, self.by_triton = module.Launch.__call__, module.Launch._by_triton
        self.unbound = 0  # launches in Triton's own way among those of the Launch

    def __call__(self, made: Any, *arguments: Any) -> None:
        if self.inside:  # on another device it calls itself
            return self.call(made, *arguments)
        before = DRIVER.device
        NOTED.clear()
        with put(self, inside=True):
            self.call(made, *arguments)
        assert DRIVER.device == before
        device, grid, _, tensors, outputs, specialized, numbers, state = arguments
        numbers = *specialized, *numbers, *state.arguments
        with put(DRIVER, device=device if device >= 0 else before):
            made.kernel[grid](*tensors, *outputs, *numbers, **made.named)
        ours, triton_own = map(given, NOTED)
        assert ours == triton_own, f"\n{ours}\n{triton_own}"
        return None

    def everywhere(self) -> AbstractContextManager[None]:
        """Every launch is compared."""

        def counted(made: Any, *arguments: Any) -> None:
            self.unbound += 1
            self.by_triton(made, *arguments)

        compared = lambda made, *arguments: self(made, *arguments)  # noqa: E731
        return put(self.module.Launch, __call__=compared, _by_triton=counted)

    def is_bound(self, call: Callable[[], object]) -> bool:
        """Whether a second call needs nothing of Triton."""
        call()
        before = self.unbound
        call()
        return self.unbound == before


def a_small_kernel(module: ModuleType = launch) -> None:
    """All that a variant hangs on, changed one by one and back."""
    compared = Compared(module)
    aligned = torch.zeros(64, dtype=torch.int64)
    out = torch.zeros(64, dtype=torch.int32)
    launches = {K: module.Launch(_kernel, {"K": K}, num_warps=1) for K in (4, 8)}

    def state(x: torch.Tensor = aligned, base: int = 32, P: int = 16, lane: int = 5) -> Any:
        return module.state(Fields(x, base, tl.constexpr(P)), lane)

    usual = {"x": aligned, "y": None, "out": out, "K": 4, "E": 64, "T": 7, "state": state()}
    usual |= {"device": -1, "elements": 64}

    def run(**change: Any) -> None:
        now = SimpleNamespace(**usual | change)
        tensors = (now.x, now.y), (now.out,)
        launches[now.K](now.device, (3, 2), now.elements, *tensors, (now.E,), (now.T,), now.state)

    xs = aligned, aligned.int(), aligned.bfloat16(), None, aligned[2:], aligned.int()[4:]
    states: list[dict[str, Any]] = [{"x": aligned[2:]}, {"x": aligned.int()}, {"lane": 1}]
    states += [{"lane": 16}, {"base": 40}, {"P": 32}]
    bound: list[dict[str, Any]] = [{"x": x} for x in xs]
    bound += [{"x": None, "y": aligned}, {"E": 60}, {"E": 1}, {"T": 1}, {"T": 16}, {"K": 8}]
    bound += [{"state": state(**of)} for of in states]
    never: list[dict[str, Any]] = [{"x": aligned[1:]}, {"out": out[1:]}]
    never += [{"y": aligned.int()[3:]}, {"T": 2**31, "elements": 2**31}]
    with compared.everywhere():
        for change, binds in (*((c, True) for c in bound), *((c, False) for c in never)):
            assert compared.is_bound(functools.partial(run, **change)) == binds, change
            run()
        streams_and_devices(compared, run)
        hooks(compared, run)


def streams_and_devices(compared: Compared, run: Callable[..., None]) -> None:
    for stream in (101, 102, 100):
        DRIVER.streams[0] = stream
        run()
    for device in (1, 0, 1):
        DRIVER.device = device
        assert compared.is_bound(run)

    with put(torch.cuda, device=lambda device: put(DRIVER, device=device)):
        for device in (0, 1, 0):
            run(device=device)
    DRIVER.device = 0


def hooks(compared: Compared, run: Callable[..., None]) -> None:
    run()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        called: list[Any] = []
        chain.add(called.append)
        run()
        chain.remove(called.append)
        assert len(called) == 2, "by ours and by Triton's own"
        run()
        assert len(called) == 2
    for hook in (None, called.append):
        with put(knobs.runtime, launch_enter_hook=hook):
            run()
    assert len(called) == 4
    assert compared.is_bound(run)


def mistakes_are_noticed() -> None:
    for name, (old, new) in MISTAKES.items():
        module = sys.modules["mistaken"] = ModuleType("mistaken")
        exec(compile(changed_source(launch, old, new), launch.__file__, "exec"), vars(module))
        try:
            a_small_kernel(module)
        except AssertionError:
            continue
        raise AssertionError(f"not noticed: {name}")


def our_kernels() -> None:
    """Record, dispatch in 1, 2 and 3 launches, combine, as the hooks call them."""
    compared = Compared(launch)
    with compared.everywhere():
        for weights, ids_type in (("bfloat16", torch.int64), ("none", torch.int32)):
            tape = "none" if weights == "none" else "in one page"
            case = Case(8, 2, 200, "uniform", None, ids_type, weights, tape, invalid_ids=False)
            for name, call in calls_of(case).items():
                assert compared.is_bound(call), name


def calls_of(case: Case) -> dict[str, Callable[[], object]]:
    ids, weights = choice(case)
    tapes = [tape_for(kernels, case) for _ in range(2)]  # of two layers

    def dispatch(launches: int) -> None:
        for tape in tapes:
            kernels.dispatch_triton(ids, weights, case.E, tape, launches=launches)

    calls: dict[str, Callable[[], object]] = {
        f"dispatch, {n} launches": functools.partial(dispatch, n) for n in (1, 2, 3)
    }
    if weights is None:
        return calls
    y_SH = torch.zeros(case.T * case.K, 40, dtype=torch.bfloat16)
    grouped = kernels.dispatch_torch(ids, None, case.E)
    long = ids.repeat(3, 1), weights.repeat(3, 1)

    def combine(grouped: Any, tape: Any = None, dtype: torch.dtype = torch.bfloat16) -> None:
        kernels.combine_triton(y_SH.to(dtype), ids, weights, grouped, dtype, case.E, tape)

    return calls | {
        "record": lambda: [kernels.record_triton(tape, ids, weights) for tape in tapes],
        "record, 2 launches": lambda: kernels.record_triton(tapes[0], *long),
        "combine": lambda: combine(grouped),
        "combine + record": lambda: combine(None, tapes[1]),
        "combine of another type": lambda: combine(grouped, dtype=torch.float32),
    }


def the_benchmark_measures_both_ways() -> None:
    from benchmarks import launch as benchmark

    ways: list[bool] = []
    by_triton = launch.Launch._by_triton

    def noted(made: Any, variant: Any, *arguments: Any) -> None:
        ways.append(variant is not None)
        by_triton(made, variant, *arguments)

    benchmark.ROUNDS, benchmark.LAUNCHES = 2, 3
    with put(launch.Launch, _by_triton=noted):
        found = benchmark.measure()
    launches = 1 + 1 + 2 + 3 + 1 + 3  # of all calls together
    assert ways.count(False) == launches * 2 * 3, "unbound"
    assert ways.count(True) <= launches, "each is bound once, and measured bound"
    assert found.keys() >= benchmark.AT_MOST.keys()


SCENARIOS = a_small_kernel, mistakes_are_noticed, our_kernels, the_benchmark_measures_both_ways


def main() -> None:
    for scenario in SCENARIOS:
        error = None
        try:
            scenario()
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"scenario": scenario.__name__, "error": error}), flush=True)


if __name__ == "__main__":
    main()
