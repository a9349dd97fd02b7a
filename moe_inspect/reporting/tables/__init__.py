"""The report's tables. Importing the package registers them, in this order: a new file of tables is
added here."""

# isort: off
from moe_inspect.reporting.tables import summary
from moe_inspect.reporting.tables import load
from moe_inspect.reporting.tables import specialization
from moe_inspect.reporting.tables import routes
from moe_inspect.reporting.tables import pairs
from moe_inspect.reporting.tables import router
from moe_inspect.reporting.tables import over_time
from moe_inspect.reporting.tables import worth

__all__ = [
    "load",
    "over_time",
    "pairs",
    "router",
    "routes",
    "specialization",
    "summary",
    "worth",
]
