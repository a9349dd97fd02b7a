"""Reports on a trace: tables, terminal, pictures. `moe_inspect.report` is this package and also the
function `report`."""

from __future__ import annotations

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    # `import moe_inspect.report` binds the package to the name that the function has in the public
    # API: it must be both
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from moe_inspect.reporting.report import report

        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
