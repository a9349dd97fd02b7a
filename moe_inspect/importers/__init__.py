"""Formats of other tools that become traces, one file (or folder) per format. A new format takes
its file and a line here.

May import: errors, files, model, text, trace, workers.
"""

from moe_inspect.importers.tables.presets import PRESETS

# name → module of this package, in which `@importer` registers it, and what it reads: in short, and
# details after a semicolon, which --help leaves out; "auto" tries them in this order
MODULES = {
    "imatrix": ("llama_cpp", "llama.cpp's importance matrix, `imatrix.gguf`"),
    "megatron": (
        "megatron.importer",
        "JSONL of Megatron-Core's router trace; with `logits_rank<r>.bin` where there are "
        "logits; or its `tokens_per_expert/rank<r>.jsonl`",
    ),
    "tensorrt-llm-routed": (
        "tensorrt_llm",
        "JSONL of the LLM API's results: `outputs` with `routed_experts`; base64 of a `.npy` "
        "[tokens, layers with experts, k]",
    ),
    "vllm-routed": (
        "responses",
        "JSONL of responses with `routed_experts`, or `.npy`; base64 of a `.npy`, [tokens, "
        "layers, k]",
    ),
    "sglang-routed": (
        "responses",
        "JSONL of responses (`/generate`, OpenAI's routes) with `routed_experts`; base64 of "
        "raw int32, needs the model's config",
    ),
    "sglang": (
        "sglang",
        "`expert_distribution_recorder_*.pt`; of the modes stat, stat_approx, per_pass, "
        "per_token, needs torch",
    ),
    "tensorrt-llm": (
        "tensorrt_llm",
        "a folder of `meta_info.json` and `rank<r>.safetensors`; or `rank<r>_raw.safetensors`",
    ),
    **{name: ("tables.counts", preset.reads) for name, preset in PRESETS.items()},
}
