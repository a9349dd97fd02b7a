"""One file per format that other tools read. A new format takes its file and a line here."""

# name → module of this package, whose function of that name writes it, and what it writes
MODULES = {
    "sglang": (
        "sglang",
        "the load, for --init-expert-location of SGLang and ktransformers (.pt, .json)",
    ),
    "llama-cpp": ("llama_cpp", "-ot of llama.cpp: which layers' experts stay on the CPU (a line)"),
    "pruning": ("pruning", "scores of the experts, and the experts to drop (.json)"),
    "counts": ("counts", "load by expert and domain (.csv, .json, .parquet)"),
    "routing-profile": (
        "routing_profile",
        "load, distinct experts, locality, drift for simulators of serving (.json)",
    ),
}
