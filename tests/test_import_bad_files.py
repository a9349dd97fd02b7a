"""Whatever is wrong with a file of another tool, its import ends in one line that says what and
where, and the way out, and leaves nothing."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.foreign import MAKERS, PREAMBLE, gguf_file, megatron_tpe, write_imatrix
from tests.support.importing import refused
from tests.test_import_megatron import (
    MEGATRON,
    SINGLE,
    Change,
    Layers,
    ascending,
    changed,
    columns_of,
    dump,
    interleaved,
    needs_megatron,
    numbered,
    of_rank,
    options,
    parallel,
    passes_of,
    tpe_of,
    unordered,
)

# what files begin with, or hold
BEGIN = {
    "$counts": "layer,expert,count",
    "$each": "layer,position",
    "$line": '{"layer":0,"position":1,"experts":[1]}\n\n{"layer":0,"position":',
    "$rows": "block,at,ids,of\n" + "".join(f'1,{t},"[{t}, 7]",law\n' for t in range(6)),
    "$route": PREAMBLE.format(layers=3, E=8, K=2)
    + "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped",
    "$four": '{"example_index":0,"routed":{"0":[[',
    "$loads": 'expert_counts_law.json:{"0": {"0": 2, "1": 2}}',
    "$form": "l,p,e\n0,0,0\n0,0,1\n0,0,2 & form.yaml",
    "$records": '[{"block": 3, "id": "0", "hits": 5, "text": "law", "unsaid": null}]',
}
ROWS = "map=layer=block,position=at,experts=ids,document=of"
# format | files | options, besides experts=8 top_k=2 | words of the line, in order
TEXTS = r"""
counts | x.csv:block,id,hits\n1,0,5 | | x.csv holds no decisions or counts: it has block, id, hits
counts | x.csv:$counts\n | | x.csv holds no decisions or counts: it has no rows
counts | x.json:[{"foo": 1}] | | x.json holds no decisions or counts: it has foo
counts | x.json:[{"layer": null}] | | x.json holds no decisions or counts: it has layer
counts | x.json:[{}] | | x.json holds no decisions or counts: it has no columns
counts | x.jsonl: | | x.jsonl holds no decisions or counts: it has no rows
counts | x.csv:layer,expert,hits\n0,0,5 | | x.csv has no column count: it has layer, expert, hits
counts | x.csv:$counts,count\n0,0,5,5 | | x.csv has several columns count
counts | x.json:{"layer": [0, 0], "expert": [0, 1], "count": [5]} | | columns of different lengths
counts | x.csv:$counts,first_choice\n0,0,5,2\n0,1,3,4 | | row 1 ~ first_choice is 4 of 3
counts | x.csv:$counts\n0,0,9007199254740992 | | row 0 ~ count is 9007199254740992, not of 0 to
counts | x.csv:$counts\n0,0,1099511627776\n0,0,1 | | expert 0 of layer 0 ~ 1,099,511,627,777
counts | x.csv:$counts\n0,0,99999999999999 | | row 0 ~ not of 0 to 1,099,511,627,776
counts | x.csv:$counts\n0,0,1099511627776\n0,1,1 | top_k=1 | over 1,099,511,627,776 tokens
counts | x.csv:$counts,top_k\n0,0,2,2 | top_k=1 | x.csv row 0: top_k is 2, --top-k 1
counts | x.csv:$counts,experts\n0,0,2,4 | | x.csv row 0: experts is 4, --experts 8
counts | x.csv:$counts,top_k\n0,0,2,2\n0,1,2,1 | top_k= | layer 0 has top_k 1 and 2
counts | x.csv:$counts\n0,0,2\n0,8,2 | | x.csv row 1: expert is 8, not of 0 to 7
counts | x.csv:$counts\n0,0,2\n0,99999999999,1 | experts= | x.csv row 1: expert is 99999999999, not
counts | x.csv:$counts\n0,0,2\n0,1,2,3 | | x.csv row 1: Expected 3 columns, got 4
counts | x.csv:$counts,document\n0,0,2,a\n0,1,2, | | x.csv row 1: document is empty
counts | x.csv:layer;expert;count\n0;0;2 | | x.csv ~ layer;expert;count ~ columns with ; ~ write ,
counts | x.csv:layer;position;experts\n0;0;[1, 2] | | layer;position;experts ~ columns with ;
counts | x.csv:$counts,gate_sum\n0,0,2,1\n0,1,2,nan | | x.csv row 1: gate_sum is nan
counts | x.csv:$counts,gate_sum,saliency\n0,0,3,1.5,1\n0,1,1,, | | x.csv row 1: gate_sum is empty
counts | x.csv:$counts\n0,0,2\n1,0,2 | top_k=9 | : 9 of 8 experts is not possible
counts | x.csv:Layer, Expert,Count\n0,0,2 | | --map 'layer=Layer,expert= Expert,count=Count'
counts | x.csv:Layer,Position,Expert_0,Expert_1\n0,0,1,2 | | --map ~ experts=Expert_*
counts | x.json:$records | map=layer=block,count=hits | --map does not say where the expert is
counts | x.json:$records | map=count=hits,expert=id | --map does not say where the layer is
counts | x.json:$records | map=layer=?,expert=id,count=hits | --map: layer is nowhere
counts | x.json:$records | map=layer | write it like layer=block,expert=id,count=hits
counts | x.json:$records | map=slut=block,count=hits | no column 'slut' (did you mean slot?)
counts | x.json:$records | map=count={floor}.{layer}.{expert} | {floor} is no column of ours
counts | x.json:$records | map=layer=block,expert=id,count=misses | has nothing at misses
counts | x.json:$records | map=layer=floor,expert=id,count=hits | has no field floor beside
counts | x.json:$records | map=layer=block,expert=id,weight=hits | are counts, which have no weight
counts | x.json:$records | map=layer=block,expert=id,count=hits,position=id | have no position:
counts | x.json:$records | map=layer=block,expert=text,count=hits | row 0 ~ text is 'law', not a
counts | x.json:$records | map=layer=block,expert=id,count=hits.n | where n should be
counts | x.json:$records | map=layer=block,expert=id,count=unsaid | row 0: unsaid is empty
counts | x.json:$records | map=count={layer}_{layer}.{expert} | {layer} stands twice in
sglang | x.json:$records | map=count=hits | --map ~ of the format counts, table, not of sglang
counts | x.csv:$counts\n0,0,2 | pipeline_stages=2 | --pipeline-stages ~ of the format megatron, not
table | x.csv:$each,expert\n0,0,1\n0,0,1 | | x.csv row 1: expert is 1 again, at position 0
table | x.csv:$each,expert\n0,0,1\n0,0,2\n0,1,3\n0,1,3 | | x.csv row 3: expert is 3 again
table | x.csv:$each,experts\n0,0,[1 2]\n0,1,[5 5] | | x.csv row 1: experts names expert 5 again
table | x.csv:$each,experts\n0,0,[0 0] | | row 0: experts names expert 0 again; a dense layer
table | x.csv:$each,expert_0,expert_1\n0,0,1,2\n0,1,5,5 | | row 1: expert_1 names expert 5 agai
table | x.csv:$each,expert_0,expert_1\n0,0,1,2\n0,1,5,x | | row 1: expert_1 is 'x', not a whole
table | x.csv:$each,expert_0,expert_1\n0,0,1,2\n0,1,8,5 | | row 1: expert_0 is 8, not of -1 to 7
table | x.csv:$each,expert_0,expert_1\n0,0,1,2\n0,1, ,5 | | row 1: expert_0 is empty; write -1
table | x.csv:$each,expert_0,expert_1\n0,0,1,2\n0,1,5, | | row 1: expert_1 is empty; write -1
table | x.csv:$each,experts,document\n0,0,[1 2],a\n0,1,[1 2], | | row 1: document is empty
table | x.csv:$each,experts\n0,0,[1 2 3 4] | | row 0: experts has 4 values, top-k is 2
table | x.csv:$each,experts,top_k\n0,0,[1 2 3],3 | | top_k 2 and 3, one of them by --top-k
table | x.csv:$each,experts\n0,0,[1 2]\n0,1,[] | | row 1: experts has 0 values, not 2
table | x.csv:$each,experts\n0,0,[] | | row 0: experts has 0 values
table | x.csv:$each,expert\n0,0,1\n0,0, | | row 1: expert is empty; write -1 where there is non
table | x.csv:$each,expert\n0,0,1\n0,1,2 | | over 1 expert in a layer, and top-k is 2
table | x.csv:$each,expert\n0,3,1\n0,3,2\n0,3,4 | | position 3 of the document has over 2 rows
table | x.csv:$each,expert,slot\n0,0,1,0\n0,0,2,2 | | row 1: slot is 2, not of 0 to 1
table | 0.csv:$each,expert\n0,0,1 & 1.csv:$each,experts\n0,0,[1 2] | | 1.csv: not all files
table | 0.csv:$each,experts\n0,0,[1 2] & 1.csv:$each,expert\n0,0,1 | | 1.csv: not all files
table | 0.csv:$each,expert\n0,0,1 & 1.csv:$each,expert\n1,0,1 | | 1.csv has layers 1, ~ 0.csv 0
table | 0.csv:$each,expert\n0,0,1 & 1.csv:$counts\n0,0,1 | | 1.csv has no column position
table | x.json:[{"layer":0,"position":0,"experts":[1,null]}] | | row 0: experts is empty; write -1
table | x.csv:$each,experts,phase\n0,0,[1],x\n0,1,[1],decode | top_k= | row 0: phase is 'x'
table | x.csv:$each,experts,phase\n0,0,[1],decode\n0,1,[1],x | top_k= | row 1: phase is 'x'
table | x.csv:$rows1,6,"[1, 9]",law | $ROWS | x.csv row 6: ids is 9, not of -1 to 7
table | x.csv:$rows1,6,"[1]",law | top_k= $ROWS | x.csv row 6: ids has 1 value, not 2, as the first
table | x.csv:$rows1,6,"[1, x]",law | $ROWS | x.csv row 6: ids is 'x', not a whole number
table | x.csv:$rows1,6,"[1, 2",law | $ROWS | x.csv row 6: ids is '[1, 2', a list cut short
table | x.csv:$rowsone,6,"[1, 2]",law | $ROWS | x.csv row 6: block is 'one', not a whole number
table | x.csv:$rows1,,"[1, 2]",law | $ROWS | x.csv row 6: at is empty
table | x.csv:$rows1,6.5,"[1, 2]",law | $ROWS | x.csv row 6: at is '6.5', not a whole number
table | x.csv:$rows1,5,"[1, 2]",law | $ROWS | position 5 of law has two rows of one layer
table | x.csv:$form:{top_k: 3, map: {layer: l, position: p, expert: e}} | | over 2 rows of one layer
table | x.csv:$form:{top_k: 3, map: {layer: l, position: p, experts: e}} | top_k= | row 0: e has 1
table | x.csv:$form:{nota: 3, map: {layer: l}} | | no field 'nota' (did you mean note
table | x.csv:$form:{head: 7, map: {layer: l}} | | head is '7', not of str
table | x.csv:$form:[1] | | has no map
table | x.csv:$form:{top_k: 3} | | form.yaml has no map, of columns
table | x.csv:$form:a: [ | | cannot read
table | x.jsonl:{"layer":0,"expert":0,"count":2}\n\n{"layer":0,"expert":9,"count":2} | | line 3: ex
table | x.jsonl:{"of":[[2]]}\n\n{"of":[[1,2]]} | experts=1 map=count=of.{layer}.{expert} | line 3:
table | x.jsonl:$line2,"experts":[9]} | top_k= | x.jsonl line 3: experts is 9
table | x.jsonl:$line1,"experts":[2]} | top_k= | x.jsonl line 3: layer is 0: position 1 of the
bigmoeonedge | x.csv:$route\n0,0,0,1,0,3,1,0,0,0\n0,0,0,1,0,4,1,0,0,0 | | position 0 of 0 has two
bigmoeonedge | x.csv:$route\n0,0,-1,1,0,3,1,0,0,0 | | x.csv row 0: step is -1, not of 0 to
bigmoeonedge | x.csv:$route\n0,0,0,1,2,3,1,0,0,0 | | slot is 2, not of 0 to 1
bigmoeonedge | x.csv:$route\n0,0,0,1,0,8,1,0,0,0 | | expert is 8, not of -1 to 7
bigmoeonedge | x.csv:$route\n0,0,0,1,0,1,1,0,0,0\n0,0,0,1,1,1,1,0,0,0 | | row 1: expert is 1 again
bigmoeonedge | x.csv:$route\n0,0,0,1,0,1,1,0,0,0\n0,1,0,1,1,2,1,0,0,0 | | row 0: phase differs
bigmoeonedge | x.csv:$route\n0,0,0,1,0,1,inf,0,0,0 | | weight is inf
bigmoeonedge | x.csv:$route\n | | holds no decisions
experts4bit | x.jsonl:$four2,8]]}}\n\n$four64,8]]}} | experts= top_k= | line 3: expert is 64, not
auto | x.json:{"sample_count": 3} | | like gpt-oss-fingerprints, but lacks "think_expert_analytics"
auto | README.md:Parquet of indices and scores | | cannot tell the format of
auto | x.json:{"name": "an expert picks a layer", "count": 3} | | cannot tell the format of
auto | x.jsonl:{"a": "the \"layer\": 1, \"expert\": 2, \"count\": 3"} | | cannot tell the format
auto | x.json:[{"layer": 1, "expert": 2, "weight": 3}] | | cannot tell the format of
auto | x.json:["layer", "expert", "count"] | | cannot tell the format of
auto | x.csv:text\nlayer expert count\n | | cannot tell the format of
auto | x.txt:layer,expert,count\n0,0,1\n | | cannot tell the format of
auto | mistral_$loads & olmoe_$loads | | mixtral-counts (mistral_ ~ and olmoe-counts (olmoe_ ~ name
mixtral-counts | a/mistral_$loads & b/mistral_$loads | | /a and ~ /b both have mistral_expert_counts
"""


def texts() -> list[Any]:
    text = TEXTS.strip().replace("$ROWS", ROWS)
    return [pytest.param(*re.split(r" ?\| ", line), id=line[:50]) for line in text.splitlines()]


def refused_as(case: str, root: Path, source: Path) -> None:
    """format | options, besides experts=8 top_k=2 | words of the line, in order"""
    format, given, words = re.split(r" ?\| ", case)
    how: dict[str, Any] = {"experts": 8, "top_k": 2}
    for name, _, value in (option.partition("=") for option in given.split()):
        how[name] = int(value) if value.isdigit() else value or None
    if "config" in how:
        how["config"] = tuple(map(int, str(how["config"]).split(",")))
    why = ".*".join(map(re.escape, re.split(" ?~ ?", words.strip())))
    refused(root, why, format, source, **options(root, **how))


@pytest.mark.parametrize(("format", "files", "given", "words"), texts())
def test_a_bad_text(format: str, files: str, given: str, words: str, tmp_path: Path) -> None:
    (folder := tmp_path / "in").mkdir()
    for begin, text in BEGIN.items():
        files = files.replace(begin, text)
    for file in files.split(" & "):
        name, _, text = file.partition(":")
        path = (tmp_path if name == "form.yaml" else folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("\\n", "\n"))
    if (tmp_path / "form.yaml").exists():
        given += f" map={tmp_path / 'form.yaml'}"
    only = [p for p in folder.rglob("*") if p.is_file()]
    case = f"{format} | {given} | {words}"
    refused_as(case, tmp_path, only[0] if len(only) == 1 else folder)
    if format == "counts" and "map=" not in given:  # nor is it lost among others
        (folder / "good.csv").write_text("layer,expert,count\n0,0,2\n0,1,2\n")
        refused_as(case, tmp_path, folder)


# --- files that are no text, and ranks that do not fit together

Write = Callable[[Path], Any]  # into a folder
TWO, THREE = [[0, 1], [2, 3]], [[0, 1, 2], [3, 4, 5]]
DOUBLE = [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def imatrix(load: list[float], tokens: int = 8, layers: int = 1) -> Write:
    of = {n: np.array(load) for n in range(layers)}
    return lambda at: write_imatrix(at / "i.gguf", of, tokens)


def gguf(fields: dict[str, Any], **tensors: Any) -> Write:
    return lambda at: gguf_file(at / "i.gguf", fields, tensors)


def bytes_of(write: Write, change: Callable[[bytes], bytes]) -> Write:
    def written(at: Path) -> None:
        write(at)
        (path,) = at.iterdir()
        path.write_bytes(change(path.read_bytes()))

    return written


def old_form(at: Path) -> None:
    name = b"blk.0.ffn_up_exps.weight"
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii4f", 2, 4, *range(4))
    (at / "imatrix.dat").write_bytes(data)


def of_maker(name: str, change: Change = list, file: str = "") -> Write:
    """What the maker writes, with the rows of its JSONL (of this name) changed."""

    def write(at: Path) -> None:
        MAKERS[name](at)
        changed(at / file if file else next(at.glob("*.jsonl")), change)

    return write


def policylang(without: list[str], **columns: Any) -> Write:
    def write(at: Path) -> None:
        table = pd.read_parquet(source := MAKERS["moe-policylang"](at).source)
        table.drop(columns=without).assign(**columns).to_parquet(source)

    return write


def ranks(change: Change, number: int = 1, stages: Layers = TWO, **how: Any) -> Write:
    return lambda at: dump(at, columns_of(number, 6), stages, change=change, **how)


def less(by: int) -> Change:
    return lambda rows: [row | {"layer": row["layer"] - by} for row in rows]


def of_ids(row: dict, ids: list, **more: int) -> dict:
    return row | {"top_indices": ids} | more


def counted(spoil: Callable[[dict], Any], ranks: int = 2) -> Write:
    def write(at: Path) -> None:
        spoil(made := dict(enumerate(parallel(tpe_of(0), ranks))))
        megatron_tpe(at, made)

    return write


def counted_again(at: Path) -> None:
    megatron_tpe(at, {0: tpe_of(0)})
    changed(at / "tokens_per_expert/rank0.jsonl", lambda rows: [*rows, rows[-1]])


def both_kinds(at: Path) -> None:
    megatron_tpe(at, {0: tpe_of(0)})
    dump(at, [passes_of(2)], [[0, 1]])


def second(change: Change) -> Write:
    """Of two stages, what is done to the rows of the second."""
    return ranks(change, stages=[[0], [1]], hook=True)


def hooked(*stages: list[int]) -> Write:
    return lambda at: dump(at, [passes_of(6)], [*stages], hook=True)


def woven(chunks: list[Layers], micro: int) -> Write:
    return lambda at: interleaved(at, 2, chunks, passes_of(8, micro))


def one_rank(layers: list[int], ids: Callable[[int], np.ndarray]) -> Write:
    return lambda at: numbered(at, layers, ids)


def without(name: str, pattern: str) -> Write:
    """What the maker writes, without the files of a pattern."""

    def write(at: Path) -> None:
        MAKERS[name](at)
        for path in at.glob(pattern):
            path.unlink()

    return write


def several(*names: str) -> Write:
    """What the makers write, in folders of their own."""

    def write(at: Path) -> None:
        for n, name in enumerate(names):
            (at / str(n)).mkdir()
            MAKERS[name](at / str(n))

    return write


def empty(at: Path) -> None:
    of_rank(at, 0).touch()


def lost_call(at: Path) -> None:
    dump(at, [passes_of(3)], [[0, 1, 2]], hook=True, change=lambda rows: rows[:4] + rows[5:])


# where each expert is filled up to its capacity tokens have more or fewer than K
FILLED = np.reshape([*map(int, "012300124567345671234567")], (12, 2))
COUNTS = "blk.0.ffn_up_exps.weight.counts"
CHUNKS = {"general.type": "imatrix", "imatrix.chunk_count": 1, "imatrix.chunk_size": 1}
WHOLE = "pipeline_stages=2 config=2"
# format | options, besides experts=8 top_k=2 | words of the line, in order
MADE: dict[str, Write] = {
    "imatrix | | old .dat form, which has no counts of expert": old_form,
    "auto | | old .dat form, which has no counts of expert": old_form,
    "imatrix | | converted from the old .dat form": imatrix([8]),
    "imatrix | | gate_exps.weight.counts holds 1.5, not a count": imatrix([1.5, 2.5], 2),
    "imatrix | | has no counts of experts": imatrix([], layers=0),
    "imatrix | top_k= | not say how many experts each token uses": imatrix([1, 1, 0, 1], 4),
    r"imatrix | | 'a\nb' has 5 dimensions": gguf(CHUNKS, **{"a\nb": np.zeros((1,) * 5)}),
    f"imatrix | | {COUNTS} holds nothing, not": gguf(CHUNKS, **{COUNTS: (0, (2**63, 0), b"")}),
    "imatrix | | general.type 'model', not an imatrix": gguf({"general.type": "model"}),
    "imatrix | | ends within blk.0": bytes_of(imatrix([3, 1], 4), lambda data: data[:-120]),
    # of a 3 there is a 2
    "imatrix | | is not what blk.0.ffn_gate_exps.weight.counts is": bytes_of(
        imatrix([3, 1], 4), lambda data: data.replace(b"\0\0@@", b"\0\0\0@", 1)
    ),
    "auto | | holds no call of a router: ~capacity factor": empty,
    "vllm-routed | experts= top_k= | not say how many experts there are": of_maker("vllm-routed"),
    "vllm-routed | | all 6 tokens go to one expert in layer 0, as a dense layer reads: give --": (
        of_maker("vllm-routed")
    ),
    "vllm-routed | config=3,1 | v.jsonl line 4: routed_experts is NoneType": of_maker(
        "vllm-routed", lambda rows: [*rows, {}]
    ),
    "tensorrt-llm | | no ~/in/meta_info.json: it says how many experts there are": without(
        "tensorrt-llm", "*.json"
    ),
    "tensorrt-llm | | in holds no rank<r>.safetensors": without("tensorrt-llm", "rank*"),
    "vllm-routed | | in holds no .jsonl of responses": without("vllm-routed", "*"),
    "sglang | | .pt: a stat dump holds the sum over all ranks: import one": several(
        "sglang-stat", "sglang-stat"
    ),
    "sglang | | in holds files of the modes per_pass and stat: import them separately": several(
        "sglang-stat", "sglang-per_pass"
    ),
    "moe-policylang | experts= top_k= | does not say how many experts there are": policylang(
        ["router_softmax", "router_scores"]
    ),
    "moe-policylang | top_k= | row 1: selected_experts has 2 values, not 1": policylang(
        ["router_softmax", "router_scores"], selected_experts=[[0], *[[0, 1]] * 17]
    ),
}
# the same of Megatron's ranks and stages
OF_RANKS: dict[str, Write] = {
    "| 2 of layers 0, 1 (from 0), as in ~rank0.jsonl; 1 of layers 2, 3 ~rank2.jsonl: give": (
        ranks(lambda rows: [], 2)
    ),
    "| rank1.jsonl has layer 1 (from 0) and so has ~rank0": ranks(list, 1, [[0, 1], [1, 2]]),
    "| rank1.jsonl has layer 1 (from 0) and so has ~ 0.jso": ranks(list, 1, [[0, 1, 2], [1]]),
    "| If each stage numbers its layers from 0": ranks(less(3), 1, [[1, 2], [3, 4, 5]]),
    "| 1 with layers 0, 1 ~ of 0 with layers 2, 3 ~: later pi": ranks(less(4), 1, [[2, 3], [4, 5]]),
    "| line 5: step 1 of rank 1 calls its routers in another order than the first": ranks(
        lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]]
    ),
    "config=3,1 | layers 2 (from 0) have experts in the config and are in no file": (
        lambda at: dump(at, [passes_of(3)], [[1]])
    ),
    "config=6 | layers 3, 4, 5 (from 0) have": one_rank([1, 2, 3], unordered),
    "config=3 | in has layers 1, 2, 3 (from 0), ~ 3.json has experts in 0, 1, 2: for a run": (
        one_rank([1, 2, 3], ascending)
    ),
    "config=3 pipeline_stages=1 | is it the config of": one_rank([1, 2, 3], ascending),
    "| step 0 of rank 0 lacks layer 1 ~calls are missing, ~capacity factor": lost_call,
    "| holds no call of a router: ~capacity factor": empty,
    "| every expert 3 assignments ~capacity": one_rank([1], lambda n: FILLED),
    "| goes to one expert twice": one_rank([1], lambda n: np.minimum(FILLED, 6)),
    **{
        f"| first pass does not agree: ~ interleaved pipeline stages{' ' * n}": write
        for n, write in enumerate(woven(of, n) for of in (SINGLE, DOUBLE) for n in (2, 4))
    },
    f"{WHOLE} | 0.jsonl line 4: step 1 with 6 tokens, ~1.jsonl: no further pass": second(
        lambda rows: rows[:-1]
    ),
    f"{WHOLE} | 0.jsonl line 2: step 0 with ~1.jsonl line 2: step 1 with 6 tokens": second(
        lambda rows: [rows[0], *rows[2:]]
    ),
    f"{WHOLE} | 0.jsonl line 3: step 1 with ~1.jsonl line 3: step 0 with 6 tokens": second(
        lambda rows: [of_ids(rows[0], rows[0]["top_indices"][::-1]), *rows]
    ),
    f"{WHOLE} | : step 0 with 6 tokens, ~step 1 with 6 tokens": second(
        lambda rows: [row | {"step": row["step"] + 1} for row in rows]
    ),
    f"{WHOLE} | : step 1 with 6 tokens, ~1.jsonl line 4: step 1 with 5 tokens": second(
        lambda rows: [*rows[:3], of_ids(rows[3], rows[3]["top_indices"][:5], num_tokens=5)]
    ),
    f"{WHOLE} | step 1 of rank 3 in a file of rank 1": second(
        lambda rows: [row | {"rank": 3 if n == 2 else 1} for n, row in enumerate(rows)]
    ),
    f"{WHOLE} | topk is 1, 2 in the first pass": second(
        lambda rows: [of_ids(row, [ids[:1] for ids in row["top_indices"]], topk=1) for row in rows]
    ),
    f"{WHOLE} | logit_shape is [6, 9], not [6, 8]": second(
        lambda rows: [row | {"logit_shape": [6, 9]} for row in rows]
    ),
    f"{WHOLE} | rank1.jsonl line 1 has no logits, ~ has": second(
        lambda rows: [{k: v for k, v in row.items() if "logit" not in k} for row in rows]
    ),
    "| there are files of 2 ranks: give --pipeline-stages (1 if": hooked(*THREE),
    "pipeline_stages=2 | --pipeline-stages 2: ~ give --model or --con": hooked(*THREE),
    "config=6 | 3, 4, 5: for a run with pipeline parallelism give --pip": hooked(*THREE),
    "config=6 pipeline_stages=3 | files of 2 ranks do not make 3 pip": hooked(*THREE),
    "config=7 pipeline_stages=2 | have 3 + 3 layers ~ has 7: ~ Inter": hooked(*THREE),
    "config=3 pipeline_stages=2 | is 2, by their layers ~ of 1": hooked(*THREE),
    "config=8,2 pipeline_stages=2 | stage 0 cannot be blocks 2, 3, 4": hooked(*THREE),
    # one stage's file beside an empty one
    "| there are files of 2 ranks: give --pipeline-stages": hooked([], [2, 3]),
    "config=5 pipeline_stages=2 | has layers 0, 1, ~ rank1.jsonl has layers 0, 1, 2: ~tp": (
        hooked(*[[0, 1], [2, 3, 4]] * 2)
    ),
    # Megatron's counts
    "| 4 of 8 experts: ~ make groups of 2; there are 1 from": counted(lambda r: r.pop(1)),
    "| there are 1 from rank 1 on": counted(lambda r: r.pop(0)),
    "| 0.jsonl is of rank 0, the next ~3": counted(lambda r: r.update({3: r.pop(1)})),
    "| 20 is in one of ~0.jsonl and ~1.jsonl alone": counted(lambda r: r[1].pop(20)),
    "| rank1.jsonl: iteration 20 has no line of layer 1:": counted(lambda r: r[1][20].pop(1)),
    "| rank1.jsonl line 4: tpe has shape [3, 3], not ['any', 4]": counted(
        lambda r: r[1][20].update({1: r[1][20][1][:, :3]})
    ),
    "experts=6 | the 4 experts of its rank, and 6 in all is": counted(list),
    "experts= | does not say how many experts there are": counted(list),
    "top_k= | does not say how many experts each token uses": counted(list),
    "| files of 4 ranks: give --pipeline-stages": counted(
        lambda r: r.update(enumerate(parallel(tpe_of(1), 2), 2))
    ),
    "| line 5 repeats iteration 20 of layer 1: a run that began again": counted_again,
    "| holds a router trace and tokens_per_expert: import one": both_kinds,
}
MADE |= {f"megatron | {case}": write for case, write in OF_RANKS.items()}
# what is said of files that Megatron-Core wrote
REALLY = {
    "megatron | | files of 2 ranks: give --pipeline-stages": "ppall",
    "megatron | | no call of a router: ~capacity factor": "capacity",
    "megatron | top_k= | does not say how many experts each token uses": "tpe",
    "megatron | top_k=1 | counts 2 of 8 experts: give the files of all ranks": "tpe",
}


@pytest.mark.parametrize("case", MADE)
def test_a_bad_file(case: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    MADE[case](tmp_path / "in")
    refused_as(case, tmp_path, tmp_path / "in")


@needs_megatron
@pytest.mark.parametrize("case", REALLY)
def test_real_files_that_cannot_say(case: str, tmp_path: Path) -> None:
    refused_as(case, tmp_path, MEGATRON / REALLY[case])
