"""Commands that take a FORMAT list the formats of a registry at the end of their help."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from moe_inspect.cli.help.command import GroupedCommand


class FormatsCommand(GroupedCommand, ABC):
    """Adds a section "Formats". The registry is loaded only when the help is asked for."""

    @abstractmethod
    def formats(self) -> dict[str, str]:
        """Name → what it reads or writes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Formats"):
            formatter.write_dl(list(self.formats().items()))
        super().format_epilog(ctx, formatter)
