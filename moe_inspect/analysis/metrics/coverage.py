"""Do all experts get enough of a text? A quantiser judges an expert by the tokens it is given.

E experts.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.metrics.registry import metric


@metric("balance", ideal="T * k / E", range="0 to T·k/E", unit="tokens")
def min_tokens(load_E: np.ndarray) -> int:
    """Tokens of the expert with the fewest. 0 if an expert is dead."""
    return int(load_E.min())
