"""`moe-inspect report`: what a trace says, as text, tables, pictures or a page; `moe-inspect
atlas`: the pages of many."""

from moe_inspect.cli.report.atlas import atlas
from moe_inspect.cli.report.command import ReportCommand, report

__all__ = ["ReportCommand", "atlas", "report"]
