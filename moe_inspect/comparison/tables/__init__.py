"""The tables of a comparison. Importing the package registers them, in this order."""

# ruff: noqa: F401
# isort: off
from moe_inspect.comparison.tables import summary
from moe_inspect.comparison.tables import agreement
from moe_inspect.comparison.tables import tokens
from moe_inspect.comparison.tables import experts
from moe_inspect.comparison.tables import worth
from moe_inspect.comparison.tables import loss
