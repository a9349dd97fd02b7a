"""What a trace would cost under other assumptions: placements of experts on GPUs, batch sizes,
capacities, caches, routers. A trace is all that it needs.

May import: analysis, errors, files, model, progress, reporting, text, trace.
"""
