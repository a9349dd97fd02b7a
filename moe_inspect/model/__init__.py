"""What is known of a model without running it: its config, the families of models, which of its
modules are routers, and how to load it. `describe` counts parameters, bytes and FLOPs.

May import: demo, errors, files, text, trace.
"""
