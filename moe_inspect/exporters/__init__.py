"""One file per format that other tools read. A new format takes its file and a line here."""

# name → module of this package, whose function is registered by `@exporter`
MODULES = {
    "sglang": "sglang",
    "llama-cpp": "llama_cpp",
    "esft": "esft",
    "pruning": "pruning",
    "counts": "counts",
    "long-parquet": "long_parquet",
    "routed-experts": "routed_experts",
}
