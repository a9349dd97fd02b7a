"""Damaged, the error for a file of a trace that is not as it was written."""

from __future__ import annotations

from moe_inspect.errors import MoeInspectError


class Damaged(MoeInspectError):
    """A file of a trace is not as it was written. `file`: its path within the trace."""

    def __init__(self, where: object, what: str, file: str):
        super().__init__(f"damaged trace: {where}: {what}")
        self.where, self.file, self.what = where, file, what

    def __reduce__(self) -> tuple[type[Damaged], tuple[object, str, str]]:
        return Damaged, (self.where, self.what, self.file)
