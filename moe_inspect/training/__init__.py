"""Watches the routers of a model while it is trained: counts, metrics in the logs, history, alarms.

Import from here: `RoutingMonitor` for a training loop, `RoutingCallback` for the Trainer of
transformers and TRL, `LightningRoutingCallback` for Lightning.

May import: analysis, capture, errors, model, reporting, text, trace, watch.
"""

import lazy_loader

# the names are in __init__.pyi, which type checkers read too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
