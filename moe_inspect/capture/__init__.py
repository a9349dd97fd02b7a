"""Recording: feed a corpus to a model, hook its routers, and hand their choices to the writer of a
trace. `hook` attaches to a model in this process; `engine` attaches to a serving engine.

May import: demo, errors, files, model, text, trace.
"""
