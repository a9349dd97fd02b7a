"""What the pages of help are made of, besides the options themselves: groups and examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_inspect.cli.capture import ModelOptions, TextOptions
from moe_inspect.cli.options import GateOptions, SelectionOptions, names
from moe_inspect.cli.show import ShowOptions, TableOptions
from moe_inspect.cli.trace import RequestOptions, WriteOptions


@dataclass(frozen=True)
class Page:
    """groups: title → names of parameters; those in no group are under "Options". examples: command
    lines, without "moe-inspect"."""

    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    examples: tuple[str, ...] = ()


# title → commands
COMMANDS = {
    "Record": ("trace", "serve-trace", "import", "watch", "doctor"),
    "Look": ("report", "atlas", "text", "sql", "compare", "describe"),
    "Try": ("simulate", "ablate", "prune"),
    "Files": ("verify", "merge", "sample", "export"),
}

_OUTPUT = ("full", *names(ShowOptions), "simulate", "top")
_SELECTION = names(SelectionOptions)
_GATES = (*names(GateOptions), "threshold", "rules")
_SHOWN = {"Selection": _SELECTION, "Output": _OUTPUT}
_HELD_OUT = names(TextOptions)
_TEXT = (*_HELD_OUT, "special_tokens")
_LOADED = names(ModelOptions)
_DECODING = ("generate", "temperature", "seed")
_TRACE = names(WriteOptions)
_REQUESTS = names(RequestOptions)

# name of a command → its page; "" is moe-inspect itself
PAGES = {
    "": Page(
        examples=(
            "trace demo -o runs/demo",
            "report runs/demo",
            "report runs/demo --html report.html",
        )
    ),
    "trace": Page(
        {
            "Text": _TEXT,
            "Decoding": _DECODING,
            "Model": ("capture", *_LOADED),
            "Record": ("layers", "text", "weights", "logits", "counts_only"),
            "Trace": _TRACE,
            "Server, with --engine": ("engine", "model_config", *_REQUESTS),
        },
        (
            "trace demo -o runs/demo",
            "trace allenai/OLMoE-1B-7B-0924 -o runs/olmoe --data wiki.jsonl",
            "trace ./checkpoint -o runs/a --data corpus/ --generate 32 --logits",
            "trace http://localhost:8000 --engine vllm -o runs/served",
        ),
    ),
    "serve-trace": Page(
        {
            "Engine": ("engine", "model_config", "engine_log", "start_timeout", *_REQUESTS),
            "Text": _TEXT,
            "Decoding": _DECODING,
            "Record": ("layers", "text"),
            "Trace": _TRACE,
        },
        (
            "serve-trace -o runs/a -- vllm serve allenai/OLMoE-1B-7B-0924",
            "serve-trace -o runs/a -- sglang serve --model-path ./model --tp 2",
        ),
    ),
    "report": Page(
        {**_SHOWN, "Checks, exit code 3": _GATES},
        (
            "report runs/a",
            "report runs/a --html report.html",
            "report runs/a --plots figs --only load --width 3.3in --format pdf",
            "report runs/a --table load --layers 0-3 --format csv -o load.csv",
            "report runs/a --fail-above max_vio=0.5 --fail-above dead_experts=0",
        ),
    ),
    "atlas": Page(
        {"Site": ("output", "text", "add")},
        ("atlas runs/a runs/b -o site", "atlas runs/c -o site --add"),
    ),
    "ablate": Page(
        {
            "Experts": ("layers", "experts"),
            "Held-out text": _HELD_OUT,
            "Model": _LOADED,
            "Run": ("most_passes", "resume"),
            "Output": ("table", *names(TableOptions)),
        },
        (
            "ablate demo --layers 1",
            "ablate ./model --data held_out.jsonl --resume kept -o worth.csv",
            "ablate ./model --data held_out/ --table domains --most-passes 900",
        ),
    ),
    "prune": Page(
        {
            "Experts": ("trace", "by", "keep", "draws", "seed", "resume"),
            "Held-out text": _HELD_OUT,
            "Model": _LOADED,
            "Output": ("output", "dry_run", "table", "format", "safe_csv"),
        },
        (
            "prune demo --trace runs/demo --by gate --dry-run",
            "prune ./model --trace runs/a --data held_out/ --keep 0.5 -o pruned",
            "prune demo --trace runs/demo --by gate --dry-run --table scores",
        ),
    ),
    "text": Page(
        {
            "A document": ("document",),
            "An expert": ("layer", "expert", "top", "sort", "context", "seed"),
            "Output": names(TableOptions),
        },
        (
            "text runs/a --document 0 --layer 3",
            "text runs/a --layer 2 --expert 5",
            "text runs/a --layer 2 --expert 5 --sort random --format csv",
        ),
    ),
    "sql": Page(
        examples=(
            'sql runs/a "select * from routing limit 20"',
            'sql runs/a "select * from load where layer = 3" -o load.csv',
        )
    ),
    "compare": Page(
        {
            **_SHOWN,
            "Alignment": (
                "noise",
                "shift_layers",
                "shift_positions",
                "shift_routes",
                "drop_last",
                "drop_zero_filled",
            ),
            "Checks, exit code 3": _GATES,
        },
        (
            "compare runs/bf16 runs/fp8",
            "compare runs/bf16 runs/fp8 --table flips --format csv",
            "compare runs/step-1000 runs/step-2000 runs/step-3000",
            "compare runs/train runs/serve --fail-above set_mismatch=0.01",
        ),
    ),
    "describe": Page(
        {
            "Training": ("train_tokens", "gpu", "mfu", "gpu_hours"),
            "Weights": ("weights", "table"),
            "Output": _OUTPUT,
            "Model": ("revision", "trust_remote_code"),
        },
        (
            "describe allenai/OLMoE-1B-7B-0924",
            "describe config.json --train-tokens 2e12 --mfu 0.4",
            "describe demo --weights --table experts",
        ),
    ),
    "import": Page(
        {
            "Model": ("model", "config", "experts", "top_k", "pipeline_stages"),
            "Trace": ("output", "overwrite", "commit_every"),
            "Run": ("workers", "scheduler"),
        },
        (
            "import auto recorded/ -o runs/served --model Qwen/Qwen3-30B-A3B",
            "import counts loads.csv -o runs/loads --top-k 8",
        ),
    ),
    "verify": Page(examples=("verify runs/a", "verify runs/a --json")),
    "merge": Page(
        {"Trace": ("output", "overwrite")},
        ("merge runs/a runs/b -o runs/all", "merge runs/a runs/b runs/c -o runs/all --overwrite"),
    ),
    "sample": Page(
        {
            "Documents": ("documents", "share", "by_domain", "seed", "rest"),
            "Trace": ("output", "overwrite"),
        },
        (
            "sample runs/a -o runs/few --documents 100",
            "sample runs/a -o runs/tenth --share 0.1 --by-domain",
            "sample runs/a -o runs/others --share 0.1 --by-domain --rest",
        ),
    ),
    "export": Page(
        examples=(
            "export runs/a --format counts -o counts.csv",
            "export runs/a --format sglang -o distribution.json",
        )
    ),
    "watch": Page(
        {"Alarms": ("window", "rules"), "Serve a page": ("serve", "per_expert", "allow_host")},
        ("watch runs/a", "watch runs/a --rules rules.txt", "watch runs/a --serve 8000"),
    ),
    "doctor": Page(
        {"Model": ("device", "dtype", "revision", "trust_remote_code", "random_init")},
        ("doctor", "doctor demo", "doctor allenai/OLMoE-1B-7B-0924 --device cuda"),
    ),
    "capacity": Page(_SHOWN, ("simulate capacity runs/a --capacity-factor 1.0,1.25,2.0",)),
    "placement": Page(
        {
            "GPUs": ("gpus", "nodes", "physical_experts", "groups"),
            "Policy": ("policy", "fit_share", "window", "minimize", "slack", "dispatch"),
            "Plan": ("output", "plan_for"),
            **_SHOWN,
        },
        (
            "simulate placement runs/a --gpus 8 --physical-experts 72",
            "simulate placement runs/a --gpus 8 -o plan.json",
        ),
    ),
    "decode": Page(_SHOWN, ("simulate decode runs/a --batch 1,8,32",)),
    "cache": Page(_SHOWN, ("simulate cache runs/a --slots 2,4 --expert-mb 90 --gb-per-s 25",)),
    "routing": Page(_SHOWN, ("simulate routing runs/a --top-k 1,2,4",)),
}
