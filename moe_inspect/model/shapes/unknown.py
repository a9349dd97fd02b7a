"""A value that is not known without torch."""

# pyright: strict, reportAssignmentType=false, reportUnknownArgumentType=false

from __future__ import annotations

import re
from types import FunctionType
from typing import Any, NoReturn

MODULE_OF_TORCH = re.compile(r"torch\.nn\.[A-Z]\w*$")


class Undetermined(Exception):
    """A shape depends on what is not known without torch."""


class NotKnown:
    """The base of a class that inherits from a module of torch which is not known here."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise Undetermined(f"{type(self).__name__} is derived from a module that is not known")


class Unknown:
    """A value that is not known, with a name that says where it comes from. It can be passed on,
    called, indexed and used as a decorator, a base class or an annotation; what needs the value
    itself raises Undetermined. As a decorator it changes nothing."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    @property
    def name(self) -> str:
        return self.__dict__["_name"]

    def _refuse(self, *others: object) -> NoReturn:
        raise Undetermined(f"the value of {self.name} is not known")

    def _more(self, *others: object) -> Unknown:
        return Unknown(f"{self.name}(…)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], type | FunctionType):
            return args[0]
        # what comes back could have other parameters than what was handed over
        handed_over = any(
            hasattr(type(value), "named_modules") for value in (*args, *kwargs.values())
        )
        if MODULE_OF_TORCH.match(self.name) or handed_over:
            self._refuse()
        return self._more()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(f"{self.name}.{name}")

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return (NotKnown,) if MODULE_OF_TORCH.match(self.name) else ()

    def __setattr__(self, name: str, value: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def __enter__(self) -> Unknown:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __repr__(self) -> str:
        return f"Unknown({self.name})"

    __hash__ = object.__hash__
    __bool__ = __iter__ = __len__ = __contains__ = __int__ = __index__ = __float__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _more
    __getitem__ = __or__ = __ror__ = __and__ = __rand__ = __xor__ = __invert__ = _more
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __neg__ = _more
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __pow__ = __rpow__ = _more
