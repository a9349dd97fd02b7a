"""What a model computes when its tokens go elsewhere: experts dropped or forced, the routing of a
trace replayed, and what each expert is worth by that measure.

May import: analysis, capture, errors, model, reporting, text, trace.
"""
