"""moe-inspect: where do the tokens of a Mixture-of-Experts model go?

    import moe_inspect

    with moe_inspect.record(model, "runs/a", tokenizer=tokenizer):  # any Hugging Face MoE
        model(**batch)
    trace = moe_inspect.open_trace("runs/a")
    trace.report().tables["balance"]  # a pandas DataFrame
    trace.simulate.placement(gpus=8)

Nothing heavy is imported before it is used; a trace and its report never import torch.
"""

import lazy_loader

# the names are in __init__.pyi, which type checkers read too
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
