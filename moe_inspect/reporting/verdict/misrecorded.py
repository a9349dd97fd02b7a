"""What misrecorded routes are said to be, and the options of `compare` that mend them: the same
words beside a right trace (comparison) and without one (linting)."""

from __future__ import annotations

NEVER_FED = "tokens that were never fed, or padding"
REPLICAS = "physical ids of replicas"
OF_ANOTHER_ROUTER = "a router of another layer, such as an MTP layer's, or were never recorded"
MENDS = {
    "zero_filled": "--drop-zero-filled",
    "last_token": "--drop-last",
    "routes_shifted": "--shift-routes N",
    "layers_shifted": "--shift-layers N",
    "routes_of_another_router": "--layers …",
}
