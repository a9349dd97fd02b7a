"""`moe-inspect report`: what a trace says, as text, tables, pictures or a page."""

from moe_inspect.cli.report.command import ReportCommand, report

__all__ = ["ReportCommand", "report"]
