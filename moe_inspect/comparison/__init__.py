"""Two traces of the same tokens: whether their routing is the same, where it differs, and why. Two
traces of counts are compared by their loads.

May import: analysis, errors, progress, reporting, text, trace.
"""
