"""What misrecorded routes are said to be, and the options of `compare` that mend them: the same
words beside a right trace (comparison) and without one (checking)."""

from __future__ import annotations

NEVER_FED = "tokens that were never fed, or padding"
OF_ANOTHER_ROUTER = "such as an MTP layer's, or were never recorded"
DROP_ZERO_FILLED, DROP_LAST = "--drop-zero-filled", "--drop-last"
SHIFT_ROUTES, SHIFT_LAYERS, LAYERS = "--shift-routes", "--shift-layers", "--layers"
