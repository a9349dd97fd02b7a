"""The report's tables. Importing the package registers them, in this order: a new file of tables is
added here."""

# isort: off
from moe_inspect.reporting.tables import summary
from moe_inspect.reporting.tables import load
from moe_inspect.reporting.tables import coverage
from moe_inspect.reporting.tables import specialization
from moe_inspect.reporting.tables import pairs
from moe_inspect.reporting.tables import router

__all__ = ["coverage", "load", "pairs", "router", "specialization", "summary"]
