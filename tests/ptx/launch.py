"""Stands in for the project's `@triton.jit` kernels: a launch compiles the kernel as Triton would
for these arguments, and executes what was compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ptx.execute import Counts, execute
from tests.ptx.memory import Buffer, Memory
from tests.ptx.values import Program, parse

POINTERS = {
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DIVISIBLE = [["tt.divisibility", 16]]


class Seen(NamedTuple):
    kernel: str
    ptx: str
    counts: Counts


@dataclass
class Device:
    """A GPU of which there is only the memory."""

    target: GPUTarget
    seed: int = 0
    edit: Callable[[Program], Program] | None = None  # what is changed in a kernel on purpose
    memory: Memory = field(default_factory=Memory)
    seen: list[Seen] = field(default_factory=list)
    tensors: dict[int, tuple[Buffer, torch.Tensor]] = field(default_factory=dict)

    def address(self, tensor: torch.Tensor, name: str, written: bool = True) -> int:
        """Where the device sees the first value of `tensor`."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.tensors:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            bits = whole.view(INTEGERS[tensor.itemsize])
            buffer = self.memory.add(name, bits.numpy())
            buffer.written[:] = written
            # the tensor is kept, lest another one takes its place in the host's memory
            self.tensors[storage.data_ptr()] = buffer, whole
        buffer = self.tensors[storage.data_ptr()][0]
        buffer.name = name
        return self.memory.address(buffer) + tensor.storage_offset() * tensor.itemsize


@dataclass
class Signature:
    """How Triton specialises a kernel for arguments, and the values that it is launched with."""

    device: Device
    kernel: str
    types: dict[str, Any] = field(default_factory=dict)
    constants: dict[Any, Any] = field(default_factory=dict)
    attributes: dict[tuple[int, ...], Any] = field(default_factory=dict)
    values: list[int] = field(default_factory=list)

    def add(self, path: tuple[int, ...], name: str, value: Any, specialise: bool) -> Any:
        """The type of the argument at `path`: its place, in a tuple also the place in there."""
        if isinstance(value, tuple):
            of_fields = enumerate(zip(value._fields, value, strict=True))
            return type(value)(*(self.add((*path, n), *of, specialise) for n, of in of_fields))
        constant = isinstance(value, triton.language.constexpr)
        value = value.value if constant else value
        if constant or value is None or (specialise and type(value) is int and value == 1):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            kind = POINTERS[value.dtype]
            value = self.device.address(value, f"{self.kernel}: {name}")
        else:
            assert type(value) is int, f"an argument {value!r}"
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        if specialise and value % 16 == 0:
            self.attributes[path] = DIVISIBLE
        self.values.append(value)
        return kind


class Specialised(NamedTuple):
    """A kernel as Triton compiles it for the arguments of a launch."""

    source: ASTSource
    options: dict[str, Any]
    values: list[int]  # with which it is launched

    def compile(self, target: GPUTarget) -> Any:
        return triton.compile(self.source, target=target, options=self.options)


def specialised(kernel: Any, device: Device, arguments: Any, named: dict[str, Any]) -> Specialised:
    options = {"num_warps": 4, **{k: v for k, v in named.items() if k not in kernel.arg_names}}
    bound = inspect.signature(kernel.fn).bind(
        *arguments, **{k: v for k, v in named.items() if k in kernel.arg_names}
    )
    found = Signature(device, kernel.fn.__name__)
    for n, parameter in enumerate(kernel.params):
        name, value = parameter.name, bound.arguments[parameter.name]
        if parameter.is_constexpr:
            value = triton.language.constexpr(value)
        found.types[name] = found.add((n,), name, value, not parameter.do_not_specialize)
    source = ASTSource(kernel, found.types, found.constants, found.attributes)
    return Specialised(source, options, found.values)


class Executed:
    """`kernel[grid](…)`, executed."""

    compiled: dict[str, Any] = {}  # noqa: RUF012  of all kernels, by what they were compiled for

    def __init__(self, kernel: Any, device: Device) -> None:
        self.kernel, self.device = kernel, device

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **named: self.launch(grid, *arguments, **named)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        found, target = specialised(self.kernel, self.device, arguments, named), self.device.target
        name, of = found.source.name, found.source
        key = repr((target, name, of.signature, of.constants, of.attrs, found.options))
        if key not in self.compiled:
            binary = found.compile(target)
            self.compiled[key] = binary, parse(binary.asm["ptx"])
        binary, program = self.compiled[key]
        self.device.seed += 1
        program = self.device.edit(program) if self.device.edit else program
        where = self.device.memory, binary.metadata.shared, self.device.seed
        counts = execute(program, grid, found.values, *where)
        self.device.seen.append(Seen(name, binary.asm["ptx"], counts))


class _NotWritten(TorchFunctionMode):
    """What `empty` makes holds nothing until a kernel writes it, whatever a test fills it with."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.empty, torch.Tensor.new_empty) and result.numel():
            self.device.address(result, "empty", written=False)
        return result


@contextmanager
def replaced(module: ModuleType, stand_in: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, stand-ins are launched in place of the kernels of `module`."""
    kernels = {
        name: kernel
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and isinstance(kernel, triton.runtime.JITFunction)
    }
    assert kernels, f"{module.__name__} has no kernels, or TRITON_INTERPRET is set"
    vars(module).update({name: stand_in(kernel) for name, kernel in kernels.items()})
    try:
        yield
    finally:
        vars(module).update(kernels)


@contextmanager
def executed(module: ModuleType, device: Device) -> Iterator[Device]:
    """While it lasts, launches of the kernels of `module` are executed on `device`."""
    with replaced(module, lambda kernel: Executed(kernel, device)), _NotWritten(device):
        yield device
