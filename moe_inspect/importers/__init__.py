"""One file (or folder) per format of another tool. A new format takes its file and a line here."""

# name → module of this package, in which `@importer` registers it; "auto" tries them in this order
MODULES = {
    "imatrix": "llama_cpp.imatrix",
    "mbolt": "llama_cpp.mbolt",
    "bigmoeonedge": "rows.bigmoeonedge",
    "moe-policylang": "rows.policylang",
    "gpt-oss-fingerprints": "fingerprints",
    "counts": "counts",
    "esft": "esft",
    "fiddler": "fiddler",
    "megatron": "megatron.importer",
    "tensorrt-llm-routed": "tensorrt_llm",
    "vllm-routed": "responses",
    "sglang-routed": "responses",
    "sglang": "sglang.importer",
    "tensorrt-llm": "tensorrt_llm",
}
