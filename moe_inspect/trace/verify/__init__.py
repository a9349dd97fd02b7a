"""verify: checks a trace by every rule of its format."""

from moe_inspect.trace.verify.rules import Verification
from moe_inspect.trace.verify.run import verify

__all__ = ["Verification", "verify"]
