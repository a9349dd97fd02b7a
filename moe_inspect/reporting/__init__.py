"""Reports on a trace: `tables` computes them, `verdict` states findings on them, `charts` describes
figures as data, and `render` draws tables and charts as text, images and a page.

May import: analysis, errors, later, model, progress, text, trace.
"""
