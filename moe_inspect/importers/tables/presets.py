"""Formats that are tables: where each of our columns is in them. `--map` says the same of any
other table, `--map FILE.yaml` with all the fields of a Preset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moe_inspect.errors import MoeInspectError
from moe_inspect.files import read_small
from moe_inspect.text import first_line, no_such

COLUMNS = {
    "layer": "the layer",
    "router": "the router, where a layer has several",
    "expert": "the expert, of rows that are an assignment or a count",
    "experts": "the experts of a decision: a list, or the columns of a pattern as `expert_*`; "
    "beside `expert`: how many there are",
    "top_k": "how many experts each token uses",
    "slot": "the place of an assignment in its decision, from 0",
    "dropped": "not 0 where an assignment was dropped",
    "weight": "the gate weight of an assignment",
    "weights": "the gate weights of a decision",
    "order": "scores of a decision by which its experts are in order, if they are",
    "per_expert": "a list with a value for each expert",
    "count": "how many assignments (also `assignments`); without it a row is one",
    "share": "the share of the tokens that chose the expert, of `tokens` × `samples`",
    "tokens": "see `share`",
    "samples": "see `share`",
    "first_choice": "how many of the assignments were first choices",
    "weight_sum": "the sum of their gate weights (also `gate_sum`)",
    "energy": "the sum of the squares of the expert's neurons",
    "document": "the document: a number or a name",
    "position": "the token's place in its document; by default the number of its row there",
    "token_id": "the token's number in the vocabulary",
    "token_text": "the token's text",
    "domain": "the domain",
    "phase": "prefill (or 0) or decode (or 1)",
}
ALIASES = {"assignments": "count", "gate_sum": "weight_sum"}
PLACES = {"layer": r"(?<!\d)\d+", "router": r"\d+", "expert": r"\d+"}  # else any text
PLACE = re.compile(r"\{(\w+)(?::([^{}]*))?\}|\*")
# a table with names of ours; ? may be missing
OWN = {name: f"{name}?" for name in COLUMNS} | {
    "count": "count|assignments?",
    "weight_sum": "weight_sum|gate_sum?",
    "experts": "experts|expert_[0-9]*?",
    "weights": "weights|weight_[0-9]*?",
}


@dataclass(frozen=True)
class Preset:
    """A table's form.

    map: our column → where it is. In CSV, TSV and Parquet that is a column's name, or the first of
        several that is there (`a|b`); with `?` at the end it may be missing; a pattern (`e_*`) is
        a list of columns. In JSON: a path of keys joined by dots, or a field beside what it leads
        to (paths.py). A text in quotes is a constant.
    file: a pattern of the file's name, and folders above it: `*`, {layer}, {domain}, … stand for a
        part, {domain:[a-z]+} for one of this regular expression; `a|b` for either.
    head: such a pattern of a line of comments (#) before the table, of {experts} and {top_k}.
    marks: texts that the first bytes of a file of this form all hold.
    experts, top_k: of the model, where neither the table nor the user says.
    layers: the model's layers, where the table numbers those that it has from 0.
    omits_unused: an expert without a row was not chosen, and all layers have as many experts.
    note: for the manifest."""

    map: dict[str, str] = field(default_factory=lambda: OWN)
    file: str = "*.json|*.jsonl|*.csv|*.tsv|*.parquet"
    reads: str = ""
    gives: str = ""
    head: str = ""
    marks: tuple[str, ...] = ()
    experts: int | None = None
    top_k: int | None = None
    layers: tuple[int, ...] = ()
    omits_unused: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        stated = {*self.map}
        for name, path in self.map.items():
            if name not in COLUMNS:
                raise MoeInspectError(f"--map: {no_such('column', name, COLUMNS)}")
            if not path:
                raise MoeInspectError(f"--map: {name} is nowhere")
            for key in path.split("."):
                parts = [match[1] for match in PLACE.finditer(key) if match[1]]
                if unknown := {*parts} - {*COLUMNS}:
                    raise MoeInspectError(f"--map: {{{min(unknown)}}} is no column of ours")
                if twice := [part for part in parts if parts.count(part) > 1]:
                    raise MoeInspectError(
                        f"--map: {{{twice[0]}}} stands twice in {key}: write * for one"
                    )
                stated |= {*parts}
        stated |= {match[1] for match in PLACE.finditer(self.file)}
        for name in ("layer", "expert"):
            if not {name, f"{name}s"} & stated:
                raise MoeInspectError(f"--map does not say where the {name} is")

    def names(self) -> Iterator[re.Pattern[str]]:
        """Patterns of a path's end, each also compressed."""
        for one in self.file.split("|"):
            yield re.compile(rf"(?:.*/)?{pattern(one, '[^/]').pattern}(?:\.gz|\.zst)?", re.DOTALL)

    def said_by(self, path: Path) -> dict[str, str] | None:
        """What a file's name says; None where it is none of this form."""
        text = path.absolute().as_posix()
        found = next((match for name in self.names() if (match := name.fullmatch(text))), None)
        return None if found is None else found.groupdict()


def pattern(text: str, any: str = ".") -> re.Pattern[str]:
    """Of "layer_{layer}" one that finds the layer; `*` stands for any text. any: what a character
    of a text is."""
    made, at = "", 0
    for match in PLACE.finditer(text):
        made += re.escape(text[at : match.start()])
        name = match[1]
        made += f"(?P<{name}>{match[2] or PLACES.get(name, f'{any}+')})" if name else f"{any}*"
        at = match.end()
    try:
        return re.compile(made + re.escape(text[at:]), re.DOTALL)
    except re.error as error:
        raise MoeInspectError(f"--map: {text[:60]} is no pattern: {first_line(error)}") from None


def parse_map(text: str) -> Preset:
    """ "layer=block,expert=id,count=hits", or the name of a .yaml file of a Preset's fields."""
    if text.endswith((".yaml", ".yml")):
        return _from_yaml(Path(text))
    made: dict[str, str] = {}
    for part in text.split(","):
        name, equals, path = part.strip().partition("=")
        if not equals or not path:
            raise MoeInspectError(f"--map {part!r}: write it like layer=block,expert=id,count=hits")
        made[ALIASES.get(name, name)] = path
    file = made.pop("file", Preset.file)
    return Preset(made, file)


def _from_yaml(path: Path) -> Preset:
    import yaml

    try:
        written: Any = yaml.safe_load(read_small(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from None
    kinds = {one.name: str(one.type).removesuffix(" | None") for one in fields(Preset)}
    if not isinstance(written, dict) or not isinstance(written.get("map"), dict):
        raise MoeInspectError(f"{path} has no map, of columns → where they are")
    for name, value in written.items():
        if name not in kinds:
            raise MoeInspectError(f"{path}: {no_such('field', str(name), kinds)}")
        kind: Any = {"str": str, "int": int, "bool": bool, "tuple[int, ...]": list}.get(
            kinds[name], list if name == "marks" else dict
        )
        if not isinstance(value, kind):
            raise MoeInspectError(f"{path}: {name} is {str(value)[:40]!r}, not of {kind.__name__}")
        if isinstance(value, list):
            written[name] = tuple(value)
    written["map"] = {
        ALIASES.get(str(name), str(name)): str(place) for name, place in written["map"].items()
    }
    return Preset(**written)


PRESETS = {
    "bigmoeonedge": Preset(
        {
            "document": "turn",
            "phase": "phase",
            "position": "step",
            "layer": "layer",
            "slot": "slot",
            "expert": "expert",
            "weight": "weight",
            "dropped": "dropped?",
        },
        file="*.csv",
        reads="BigMoeOnEdge's `--route-trace`, `.csv`",
        gives="decisions with weights, without token ids",
        # github.com/Helldez/BigMoeOnEdge, docs/telemetry.md (route_trace v1)
        head="# model=* n_expert={experts} n_expert_used={top_k}",
        marks=("turn,phase,step,layer,slot,expert,",),
    ),
    "moe-policylang": Preset(
        {
            "document": "prompt_id",
            "position": "token_idx",
            "layer": "layer_idx",
            "experts": "selected_experts",
            "order": "router_scores?",
            "per_expert": "router_softmax|router_logits?",
            "token_id": "token_id?",
            "phase": "phase?",
            "domain": "domain_tag?",
        },
        file="*.parquet",
        reads="moe-policylang's trace, `.parquet`",
        gives="decisions by prompt; its domain_tag is the domain",
        # 1.15, integrations/trace_recorder.py: router_scores are the softmax of the router logits
        # before they are normalised, so no gate weights, but in their order
        marks=("PAR1", "selected_experts", "prompt_id"),
        note="choices were computed anew from the softmax of the router logits",
    ),
    "gpt-oss-fingerprints": Preset(
        {
            "share": "{domain}_expert_analytics.layer_{layer}.{expert}.count_frequency",
            "tokens": "num_{domain}_tokens",
            "samples": "sample_count",
        },
        file="|".join(f"{{domain}}/{a}_{b}.json" for a in (True, False) for b in (True, False)),
        reads="GPT-OSS fingerprints, `<category>/True_True.json`",
        gives="counts, rounded; category and think or answer are the domain",
        # github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting
        marks=('"think_expert_analytics"', '"sample_count"'),
        top_k=4,
        omits_unused=True,
        note="counts are mean frequencies over samples, times their tokens: rounded, not exact",
    ),
    "fiddler": Preset(
        {"count": "expert_popularity.{layer}.{expert}"},
        file="expert_popularity_{domain}.json",
        reads="`expert_popularity_<subject>.json`",
        gives="counts; the subject is the domain",
        marks=('"expert_popularity"',),
        top_k=2,  # of Mixtral
    ),
    "sglang-json": Preset(
        {"count": "logical_count.*.{layer}.{expert}|logical_count.{layer}.{expert}"},
        file="*.json",
        reads="SGLang's `logical_count` as JSON, as `--init-expert-location` takes it",
        gives="counts; the name of a file is its domain",
        marks=('"logical_count"',),
    ),
    "experts4bit": Preset(
        {"count": "routed.{layer}.1", "expert": "0", "document": "example_index"},
        file="*.jsonl",
        reads="experts4bit-qlora's JSONL of `example_index` and `routed`",
        gives="counts, summed over the examples",
        marks=('"example_index"', '"routed"'),
        experts=64,  # of OLMoE
        top_k=8,
    ),
    "moe-beyond": Preset(
        {
            "layer": "Layer ID",
            "document": "Batch Number",
            "token_text": "Token",
            "experts": "Activated Expert IDs",
            "domain": "'prompts'",
        },
        file="prompt_*_data.csv",
        reads="MoE-Beyond's `prompt_<n>_data.csv`",
        gives="decisions with the text of tokens; a prompt is a document",
        marks=("Layer ID,Batch Number,Token,Activated Expert IDs",),
        experts=64,  # of DeepSeek-V2-Lite
    ),
    "glm-merged": Preset(
        {"count": "layers.{layer}.cnt.{expert}", "weight_sum": "layers.{layer}.gate.{expert}"},
        file="merged_{domain}.json|blend_{domain}.json",
        reads="glm-expert-pruning's `merged_<domain>.json`",
        gives="counts and sums of gate weights by domain",
        marks=('"glm-dsa"', '"n_expert"', '"layers"'),
        top_k=8,  # of GLM-5.2
    ),
    "olmoe-counts": Preset(
        {"count": "{layer}.{expert}"},
        file="olmoe*expert_counts_{domain:[a-z0-9]+}.json",
        reads="OLMoE's `olmoe_expert_counts_<domain>.json`, from its authors' pickles",
        gives="counts of three layers by domain",
        experts=64,
        top_k=8,
        layers=(0, 7, 15),
        omits_unused=True,
    ),
    "flame-moe": Preset(
        {"experts": "indices", "weights": "scores"},
        file="*{layer}.parquet",
        reads="FLAME-MoE's traces, a `.parquet` of `indices` and `scores` for each layer",
        gives="decisions with weights, in the order of the rows",
        marks=("PAR1", "indices", "scores"),
        experts=64,
    ),
    "counts": Preset(
        reads="`.csv`, `.tsv`, `.json(l)` or `.parquet` of layer, expert, count [, domain, router, "
        "top_k]; other names by `--map`",
        gives="counts by domain",
        marks=("layer", "expert", "count"),
    ),
    "table": Preset(
        reads="any table, each row a decision, an assignment or a count, by `--map`; all of these "
        "also as `.gz` and `.zst`",
        gives="decisions or counts: what its columns say",
    ),
}
