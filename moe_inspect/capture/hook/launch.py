"""Launches of Triton kernels that cost the host little.

Triton binds, checks and specializes all arguments again at every launch, which takes the host 12 to
20 µs: more than the kernels take on a GPU. Here that happens once per variant of a kernel. Later
launches call the compiled kernel, with the addresses of its tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Triton specializes tensors on whether their address is a multiple of it, and numbers likewise
ALIGNMENT = 16
# Fewer elements, of up to 8 bytes, keep numbers and offsets in bytes within 31 bits: Triton
# specializes numbers on that, and on AMD GPUs tensors
FEW_ELEMENTS = 2**28

Argument: TypeAlias = Any  # of a kernel: a tensor, a number, a constant, or a tuple of them


class State(NamedTuple):
    """Arguments that never change, such as those of a ring buffer."""

    arguments: tuple[Argument, ...]  # as Triton takes them
    addresses: tuple[Argument, ...]  # the same with the address of each tensor
    variant: int  # equal for states that can share a compiled kernel


_variants: dict[Hashable, int] = {}


def state(*arguments: Argument) -> State:
    variant = _variants.setdefault(specialization(arguments), len(_variants))
    return State(arguments, addresses(arguments), variant)


def specialization(argument: Argument) -> Hashable:
    """What Triton compiles a kernel anew for, in an argument. Where it is equal, the compiled
    kernel is the same."""
    if isinstance(argument, Tensor):
        aligned = argument.data_ptr() % ALIGNMENT == 0
        return argument.dtype, aligned, argument.untyped_storage().nbytes() < 2**31
    if isinstance(argument, tuple):
        return tuple(map(specialization, argument))
    if isinstance(argument, int):
        return argument == 1, argument % ALIGNMENT == 0, argument < 2**31
    return getattr(argument, "value", argument)  # of a tl.constexpr


def addresses(argument: Argument) -> Argument:
    """The argument with the address of each tensor in its place."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, tuple):
        made = map(addresses, argument)
        return type(argument)(*made) if hasattr(argument, "_fields") else tuple(made)
    return argument


class Launch:
    """Launches one Triton kernel, always with the same constants.

    The kernel's parameters are, in this order: tensors, numbers that it is specialized on, numbers
    that it is not (`do_not_specialize`), a state, constants.

    constants   by name, in the kernel's order
    options     num_warps …

    A variant is bound when it has been launched once. It is: the device, the types of `tensors`
    (None for one that is absent), the specialized numbers and the state's `variant`. A launch takes
    Triton's own way if its variant is not bound yet, if the address of a tensor is not a multiple
    of 16, if there are FEW_ELEMENTS or more, or if a hook wants to see launches
    (`triton.knobs.runtime`). In Triton's interpreter all do.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any):
        first = len(kernel.arg_names) - len(constants)
        assert kernel.arg_names[first:] == list(constants), "constants in another order"
        self.kernel, self.named = kernel, {**constants, **options}
        self.constants = tuple(constants.values())
        self.interpreted = not isinstance(kernel, JITFunction)
        self.bound: dict[Hashable, tuple[Argument, ...]] = {}

    def __call__(
        self,
        device: int,
        grid: tuple[int, int],
        elements: int,
        tensors: Sequence[Tensor | None],
        typed: Sequence[Tensor],
        specialized: tuple[int, ...],
        numbers: tuple[int, ...],
        state: State,
    ) -> None:
        """Launches on the current stream of `device` (its index, or −1 for tensors of the CPU).
        `elements`: of the largest tensor. `typed`: tensors of the same types at every launch."""
        given = tensors, typed, specialized, numbers
        if self.interpreted:
            return self._by_triton(None, grid, given, state)
        active: Any = driver.active
        current = active.get_current_device()
        if current != device >= 0:
            with torch.cuda.device(device):
                return self(device, grid, elements, *given, state)
        pointers, kinds, bits = [], [], 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                kinds.append(None)
            else:
                pointers.append(pointer := tensor.data_ptr())
                kinds.append(tensor.dtype)
                bits |= pointer
        for tensor in typed:
            pointers.append(pointer := tensor.data_ptr())
            bits |= pointer
        can_be_bound = bits % ALIGNMENT == 0 and elements < FEW_ELEMENTS
        variant = (current, specialized, state.variant, *kinds) if can_be_bound else None
        bound = self.bound.get(variant)
        runtime: Any = knobs.runtime
        try:  # whether a hook wants to see launches: Triton's are lists of functions
            observed = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
        except AttributeError:  # whatever else somebody puts there may be one
            observed = True
        if bound is None or observed:
            return self._by_triton(variant, grid, given, state)
        run, function, metadata, _ = bound
        run(*grid, 1, active.get_current_stream(current), function, metadata, None, None, None,
            *pointers, *specialized, *numbers, *state.addresses, *self.constants)  # fmt: skip
        return None

    def _by_triton(
        self, variant: Hashable, grid: tuple[int, int], given: Sequence[Sequence[Any]], state: State
    ) -> None:
        """Triton's own way. Binds the variant, unless it is None."""
        compiled = self.kernel[grid](*chain(*given, state.arguments), **self.named)
        if variant is not None and isinstance(compiled, CompiledKernel):
            # the last only keeps the module loaded
            bound = compiled.run, compiled.function, compiled.packed_metadata, compiled
            self.bound[variant] = bound
