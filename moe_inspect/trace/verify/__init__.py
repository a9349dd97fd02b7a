"""Whether a trace is what it says: every invariant of the format, checked."""

from moe_inspect.trace.verify.run import verify
from moe_inspect.trace.verify.verification import Verification

__all__ = ["Verification", "verify"]
