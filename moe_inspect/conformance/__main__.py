"""`python -m moe_inspect.conformance`: the command `moe-inspect conformance`."""

from __future__ import annotations

import sys

from moe_inspect.__main__ import main

sys.argv.insert(1, "conformance")
main()
