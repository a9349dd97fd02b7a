"""Formats that other tools read: load, plans and profiles. A new format takes a function and a line
here.

May import: analysis, errors, model, reporting, simulate, text, trace.
"""

# name → module of this package with a function of that name, and what the function writes
MODULES = {
    "sglang": (
        "plans",
        "the load, for --init-expert-location of SGLang and ktransformers (.pt, .json)",
    ),
    "llama-cpp": ("plans", "-ot of llama.cpp: which layers' experts stay on the CPU (a line)"),
    "pruning": ("plans", "scores of the experts, and the experts to drop (.json)"),
    "counts": ("counts", "load by expert and domain (.csv, .json, .parquet)"),
    "routing-profile": (
        "routing_profile",
        "load, distinct experts, locality, drift for simulators of serving (.json)",
    ),
}
