"""Tensors that have a shape and no data, and the functions of torch that make and change them."""

# pyright: strict

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from moe_inspect.model.shapes.unknown import Undetermined, Unknown

Shape = tuple[int, ...]


class Tensor:
    """A shape. Elementwise operations follow torch's rules of broadcasting; all others give what
    is not known."""

    is_meta = True
    device = SimpleNamespace(type="meta")

    def __init__(self, *shape: int) -> None:
        if any(type(n) is not int for n in shape):
            raise Undetermined(f"a tensor of shape {shape}")
        self.shape = shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: object) -> None: ...

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def expand(self, *sizes: Any) -> Tensor:
        wanted = _sizes(sizes)
        own = (1,) * (len(wanted) - self.ndim) + self.shape
        return Tensor(*(n if size == -1 else size for size, n in zip(wanted, own, strict=True)))

    def _same(self, *args: object, **kwargs: object) -> Tensor:
        return Tensor(*self.shape)

    def _with(self, other: object) -> Any:
        if isinstance(other, Tensor):
            pairs = zip_longest(self.shape[::-1], other.shape[::-1], fillvalue=1)
            return Tensor(*[max(pair) for pair in pairs][::-1])
        return self._same() if isinstance(other, int | float) else Unknown("tensor")

    def __getitem__(self, index: object) -> Any:
        return Tensor(1, *self.shape) if index == (None, slice(None)) else Unknown("tensor[…]")

    def __setitem__(self, index: object, value: object) -> None: ...

    def __iter__(self) -> Iterator[Unknown]:
        return iter([Unknown("tensor[…]")] * self.shape[0])

    def __bool__(self) -> bool:
        raise Undetermined("the value of a tensor")

    def _compared(self, other: object) -> Any:
        return Unknown("tensor")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(f"tensor.{name}")

    __hash__ = object.__hash__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compared
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _with
    __truediv__ = __rtruediv__ = __floordiv__ = __pow__ = __rpow__ = _with
    __neg__ = contiguous = clone = detach = to = float = log = exp = _same
    requires_grad_ = uniform_ = normal_ = fill_ = zero_ = copy_ = _same


class Parameter(Tensor):
    def __init__(self, data: object, requires_grad: bool = True) -> None:
        if not isinstance(data, Tensor):
            raise Undetermined(f"a parameter made of {data!r}")
        super().__init__(*data.shape)


def _sizes(sizes: Any) -> Shape:
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _of_size(*sizes: Any, **options: object) -> Tensor:
    return Tensor(*_sizes((options["size"],) if "size" in options else sizes))


def _full(size: Any, value: object, **options: object) -> Tensor:
    return Tensor(*_sizes((size,)))


def _of_values(values: Any, **options: object) -> Tensor:
    shape: list[int] = []
    while isinstance(values, list | tuple):
        shape.append(len(values))  # pyright: ignore[reportUnknownArgumentType]
        values = values[0] if values else 0  # pyright: ignore[reportUnknownVariableType]
    return Tensor(*shape)


def _arange(start: Any, end: Any = None, step: Any = 1, **options: object) -> Tensor:
    start, end = (0, start) if end is None else (start, end)
    return Tensor(max(0, math.ceil((end - start) / step)))


def _linspace(start: object, end: object, steps: int, **options: object) -> Tensor:
    return Tensor(steps)


def _like(tensor: Any, *args: object, **options: object) -> Any:
    return Tensor(*tensor.shape) if isinstance(tensor, Tensor) else Unknown("tensor")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("empty", "zeros", "ones", "rand", "randn"), _of_size),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "log", "exp", "clamp"), _like),
    "full": _full,
    "tensor": _of_values,
    "arange": _arange,
    "linspace": _linspace,
}
