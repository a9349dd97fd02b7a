"""`moe-inspect check`: whether the files of a trace are complete, and whether its routes are right.
The routes are judged without a reference.

May import: analysis, comparison, errors, importers, later, model, reporting, text, trace.
"""
