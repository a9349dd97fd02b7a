"""The documents that were chosen, written for a quantiser; and how each quantiser takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moe_inspect.calibration.choose import Pool
from moe_inspect.capture.corpus import documents
from moe_inspect.demo import MODEL_DIR
from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.output_dir import output_file
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.texts import text as text_of

PLAIN = ".txt"


def write_texts(trace: Trace, chosen: Pool, path: Path, tokens: bool, data: Sequence[str]) -> int:
    if path.suffix not in (PLAIN, ".jsonl"):
        raise MoeInspectError(f"-o {path}: texts are written as .jsonl or .txt")
    if path.suffix == PLAIN and tokens:
        raise MoeInspectError(f"{path} is plain text, which holds no token ids: name it .jsonl")
    domains = [chosen.domains[d] for d in chosen.domain_S]
    domain_of = dict(zip(chosen.document_S.tolist(), domains, strict=True))
    field = "input_ids" if tokens else "text"
    of = _ids(trace, [*domain_of]) if tokens else _texts(trace, domain_of, data)
    with output_file(path) as draft, open(draft, "w", encoding="utf-8") as file:
        for number, domain in domain_of.items():
            if path.suffix == PLAIN:
                file.write(f"{of[number]}\n\n")
            else:
                line = {"document": number, "domain": domain, field: of[number]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return len(domain_of)


def _texts(trace: Trace, domain_of: dict[int, str], data: Sequence[str]) -> dict[int, Any]:
    """The texts of documents by number: from the corpus that was traced, else from the tokens."""
    plan: dict[str, Any] = (trace.manifest.get("corpus") or {}).get("plan") or {}
    if "sources" not in plan:
        if data:
            raise MoeInspectError(
                f"{trace.path} does not say of which corpus it is: its texts cannot be found in "
                "--data; leave it out to take them from the trace's tokens"
            )
        return {number: text_of(trace, number) for number in domain_of}
    found = dict[int, Any]()
    sources = _sources(trace, plan["sources"], data)
    stats = documents.CorpusStats()
    fields = plan["text_field"], plan["domain_field"]
    for number, (domain, source, text) in enumerate(documents.interleaved(sources, *fields, stats)):
        if number in domain_of:
            if domain != domain_of[number]:
                raise MoeInspectError(
                    f"document {number} of {trace.path} is of {domain_of[number]!r}, that in "
                    f"{source} of {domain!r}: the corpus has changed"
                )
            found[number] = text
            if len(found) == len(domain_of):
                return found
    raise MoeInspectError(
        f"the corpus of {trace.path} has documents that are not found: it has changed"
    )


def _sources(
    trace: Trace, stated: list[dict[str, Any]], data: Sequence[str]
) -> list[documents.Source]:
    """The files that the trace was recorded of, checked by their hashes."""
    found = documents.find_sources(data or [each["path"] for each in stated])
    if [of.sha256 for of in found] != [each["sha256"] for each in stated]:
        where = ", or --data names others" if data else ": give theirs with --data"
        raise MoeInspectError(f"the files that {trace.path} was recorded of have changed{where}")
    return [
        replace(documents.Source(**each), **({"path": of.path} if data else {}))
        for of, each in zip(found, stated, strict=True)
    ]


def _ids(trace: Trace, numbers: Sequence[int]) -> dict[int, list[int]]:
    """The token ids of documents as they were fed, sequence after sequence."""
    if trace.counts_only:
        raise MoeInspectError(f"{trace.path} holds counts only, no tokens: leave out --tokens")
    parts = list[pa.Table]()
    names = ["document", "sequence", "position", "token_id", "phase"]
    for shard in trace.shards:
        table = shard.tokens(names)
        parts.append(table.filter(pa.array(np.isin(table["document"].to_numpy(), numbers))))
    frame = pa.concat_tables(parts).unify_dictionaries().to_pandas()
    frame = frame[frame["phase"].isin(["prefill", "encode"])]
    if (frame["token_id"] < 0).any():
        raise MoeInspectError(f"{trace.path} was recorded with --no-text: it has no token ids")
    ordered = frame.sort_values(["document", "sequence", "position"], kind="stable")
    return {int(d): of["token_id"].tolist() for d, of in ordered.groupby("document")}


# --- recipes

# the name of a tool → the lines that calibrate with a file of these texts
RECIPES = {
    "llm-compressor": """\
# llm-compressor
from datasets import load_dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {model!r}
with load_quantizable_moe():  # each expert in matrices of its own
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
texts = load_dataset("json", data_files={path!r}, split="train")
texts = texts.map(
    lambda row: tokenizer(row["text"], truncation=True, max_length={length}),
    remove_columns=texts.column_names,
)
# a group must divide the width of every layer: 128 takes less room where it does
weights = {{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}
recipe = GPTQModifier(
    config_groups={{"linear": {{"targets": ["Linear"], "weights": weights}}}},
    # the router as well as lm_head: what its layer is called depends on the model
    ignore=["lm_head", "re:.*gate$"],
)
oneshot(
    model=model,
    dataset=texts,
    recipe=recipe,
    max_seq_length={length},
    num_calibration_samples=len(texts),
    # True, the default, sends every token to every expert: coverage is then complete whatever the
    # text, but experts are calibrated on tokens that they never get
    moe_calibrate_all_experts=False,
)
model.save_pretrained("quantised", save_compressed=True)
tokenizer.save_pretrained("quantised")
""",
    "gptqmodel": """\
# GPTQModel
import json

from gptqmodel import GPTQModel, QuantizeConfig

texts = [json.loads(line)["text"] for line in open({path!r}, encoding="utf-8")]
# moe=MoEConfig(routing=ExpertsRoutingOverride(…)) or ExpertsRoutingBypass() would send tokens to
# experts that the router does not choose: these counts then do not hold
config = QuantizeConfig(bits=4, group_size=128)
model = GPTQModel.load({model!r}, config)
model.quantize(texts, batch_size=1)
model.save("quantised")
""",
    "modelopt": """\
# TensorRT Model Optimizer
import json

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {model!r}
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
texts = [json.loads(line)["text"] for line in open({path!r}, encoding="utf-8")]


def calibrate(model):
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length={length})
        with torch.no_grad():
            model(**ids.to(model.device))


# moe_calib_experts_ratio, which some versions set themselves, sends each token to that share of
# the experts while it calibrates: these counts then do not hold
model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)
export_hf_checkpoint(model, export_dir="quantised")
""",
    "llama-imatrix": """\
# llama.cpp: all texts one after the other, cut into chunks of -c tokens, two at least; a rest that
# is shorter is left out. --override-kv *.expert_used_count=int:N sends tokens to more experts than
# the model does: these counts then do not hold
llama-imatrix -m model-f16.gguf -f {path} -c {length} -o imatrix.gguf
llama-quantize --imatrix imatrix.gguf model-f16.gguf model-q4.gguf Q4_K_M
# and what each expert got: moe-inspect import imatrix imatrix.gguf -o runs/imatrix
""",
}


def recipe(trace: Trace, tool: str, path: Path) -> str:
    """How a tool calibrates with a file that `write_texts` wrote. MoeInspectError where it reads
    no such file."""
    plain = tool == "llama-imatrix"
    if plain != (path.suffix == PLAIN):
        what = "plain text: name it .txt" if plain else "lines of JSON: name it .jsonl"
        raise MoeInspectError(f"-o {path}: {tool} reads {what}")
    plan = (trace.manifest.get("corpus") or {}).get("plan") or {}
    model = (trace.manifest.get("model") or {}).get("id") or "MODEL"
    model = MODEL_DIR if model == "demo" else model
    length = plan.get("max_length") or 2048
    return RECIPES[tool].format(model=str(model), path=str(path), length=length)
