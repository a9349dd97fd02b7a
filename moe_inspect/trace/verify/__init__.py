"""verify: checks a trace by every rule of its format."""

from moe_inspect.trace.verify.run import verify
from moe_inspect.trace.verify.verification import Verification

__all__ = ["Verification", "verify"]
