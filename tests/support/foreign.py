"""Foreign files, made to the letter of their formats from decisions that the tests know.

T tokens, K slots, L layers with experts.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.synthetic import uniform_ids

E, K, LAYERS, DENSE = 8, 2, 3, 0  # block 0 is dense
CONFIG = {
    "num_hidden_layers": LAYERS,
    "num_experts": E,
    "num_experts_per_tok": K,
    "mlp_only_layers": [DENSE],
    "vocab_size": 100,
}
ROUTED = [layer for layer in range(LAYERS) if layer != DENSE]


@dataclass(frozen=True)
class Made:
    """Where, and the ids [T, K] (and weights) of each router of the trace, or the load [E]."""

    source: Path
    ids: list[np.ndarray] | None = None
    load: list[np.ndarray] | None = None
    config: bool = True
    weights: np.ndarray | None = None  # [T, K] of every router
    layers: tuple[int, ...] = tuple(ROUTED)
    experts: int = E
    top_k: int = K


Make = Callable[[Path], Made]
MAKERS: dict[str, Make] = {}
FORMAT_OF: dict[str, str] = {}  # name of a maker → format that reads what it makes


def maker(name: str, format: str | None = None) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        MAKERS[name], FORMAT_OF[name] = make, format or name
        return make

    return register


def config_file(root: Path) -> Path:
    path = root / "model.json"
    path.write_text(json.dumps(CONFIG))
    return path


def drawn(
    T: int, seed: int = 0, routers: int = len(ROUTED), shape: tuple[int, int] = (E, K)
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [uniform_ids(rng, T, *shape).astype(np.int64) for _ in range(routers)]


def joined(parts: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
    """The ids of each router, one part after the other."""
    return [np.concatenate(of_router) for of_router in zip(*parts, strict=True)]


def loads(ids: list[np.ndarray], experts: int = E) -> list[np.ndarray]:
    return [np.bincount(ids_TK.reshape(-1), minlength=experts) for ids_TK in ids]


def routed(of_routers: Iterable[Any]) -> dict[int, Any]:
    """By the blocks that have experts."""
    return dict(zip(ROUTED, of_routers, strict=True))


def descending(T: int) -> np.ndarray:
    """Gate weights [T, K]."""
    return np.array([[0.5 + t / 64, 0.25 - t / 64] for t in range(T)])


def blocks(ids: list[np.ndarray]) -> np.ndarray:
    """[T, blocks, K] as engines have it: the dense block reads as expert 0."""
    whole = np.zeros((len(ids[0]), LAYERS, K), np.int64)
    whole[:, ROUTED] = np.stack(ids, 1)
    return whole


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@maker("vllm-routed")
def vllm(root: Path) -> Made:
    parts, rows = [drawn(T, T) for T in (6, 1, 9)], []
    for n, ids in enumerate(parts):
        T, prompt = len(ids[0]), min(4, len(ids[0]))
        row = {"prompt_token_ids": [*range(prompt)], "token_ids": [*range(50, 51 + T - prompt)]}
        rows.append(
            row | {"routed_experts": npy(blocks(ids).astype(np.uint8)), "domain": "ab"[n % 2]}
        )
    lines(root / "v.jsonl", rows)
    return Made(root / "v.jsonl", joined(parts))


@maker("vllm-npy", format="vllm-routed")
def vllm_npy(root: Path) -> Made:
    ids = drawn(12)
    np.save(root / "a.npy", blocks(ids).astype(np.uint16))
    np.save(root / "a.token_ids.npy", np.arange(12))
    return Made(root / "a.npy", ids)


@maker("tensorrt-llm-routed")
def tensorrt_llm_routed(root: Path) -> Made:
    parts, rows = [drawn(T, T) for T in (6, 2, 9)], []
    for n, ids in enumerate(parts):
        routes = npy(np.stack(ids, 1).astype(np.int16))
        row = {"request_id": n, "prompt_token_ids": [*range(len(ids[0]) - 2)]}
        rows.append(row | {"outputs": [{"token_ids": [50, 51, 52], "routed_experts": routes}]})
    lines(root / "results.jsonl", rows)
    return Made(root / "results.jsonl", joined(parts))


@maker("sglang-routed")
def sglang_routed(root: Path) -> Made:
    ids = drawn(7)
    text = base64.b64encode(blocks(ids).astype("<i4").tobytes()).decode()
    row = {"prompt_token_ids": [1] * 5, "token_ids": [2] * 6, "routed_experts": text, "start": 3}
    lines(root / "s.jsonl", [row])
    return Made(root / "s.jsonl", ids)


def physical_map() -> np.ndarray:
    """[blocks, P]: 8 logical experts in 10 places, in another order in each layer."""
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation([*range(E), 3, 5]) for _ in range(LAYERS)])


def physical(ids: list[np.ndarray]) -> np.ndarray:
    """int32 [blocks, T, 8], a random replica of each expert, −1 where nothing was written."""
    rng, maps = np.random.default_rng(6), physical_map()
    topk = np.full((LAYERS, len(ids[0]), 8), -1, np.int32)
    for layer, ids_TK in routed(ids).items():
        for t, k in np.ndindex(ids_TK.shape):
            topk[layer, t, k] = rng.choice(np.nonzero(maps[layer] == ids_TK[t, k])[0])
    return topk


def write_recorder(path: Path, records: list[dict[str, Any]]) -> None:
    """A file of SGLang's recorder, with its map of physical experts."""
    import torch

    maps = torch.tensor(physical_map())
    torch.save({"records": records, "last_physical_to_logical_map": maps}, path)


def sglang_pass(
    number: int, ids: list[np.ndarray], mode: int, *places: list[int] | None
) -> dict[str, Any]:
    """The record of a pass that keeps every token; `places`: its input ids, positions, lengths."""
    import torch

    return {
        **{"rank": 0, "gatherer_key": "primary", "misc_objects": [], "forward_pass_id": number},
        **dict(zip(("input_ids", "positions", "extend_seq_lens"), places, strict=True)),
        "forward_mode": mode,
        "topk_ids_of_layer": torch.tensor(physical(ids)),
        "global_physical_count": torch.zeros(LAYERS, 10, dtype=torch.int32),
    }


@maker("sglang-per_token", format="sglang")
def sglang_per_token(root: Path) -> Made:
    """Of a mixed pass a single token is a prompt where it is the first of its sequence."""
    parts, path = (
        [drawn(T, T) for T in (7, 3, 4, 5)],
        root / "expert_distribution_recorder_1.5_0.pt",
    )
    places: list[tuple[int, list[int], list[int] | None]] = [
        (1, [0, 1, 2, 3, 5, 6, 7], [4, 3]),
        (2, [4, 8, 30], None),
        (1, [0, 4, 5, 7], [1, 2, 1]),
        (3, [0, 0, 1, 2, 9], [1, 3, 1]),
    ]
    passes = [
        sglang_pass(n, ids, mode, [*range(len(at))], at, lengths)
        for n, (ids, (mode, at, lengths)) in enumerate(zip(parts, places, strict=True))
    ]
    write_recorder(path, passes)
    return Made(path, joined(parts))


@maker("sglang-per_pass", format="sglang")
def sglang_per_pass(root: Path) -> Made:
    import torch

    parts = [drawn(16, 10 + rank) for rank in range(2)]
    for rank, ids in enumerate(parts):
        count = np.stack([np.bincount(row[row >= 0], minlength=10) for row in physical(ids)])
        record = {"forward_pass_id": 4, "rank": rank, "gatherer_key": "primary"}
        record["global_physical_count"] = torch.tensor(count.astype(np.int32))
        write_recorder(root / f"expert_distribution_recorder_1.5_{rank}.pt", [record])
    return Made(root, load=loads(joined(parts)))


@maker("sglang-stat", format="sglang")
def sglang_stat(root: Path) -> Made:
    import torch

    ids = drawn(40, 3)
    count = np.zeros((5, LAYERS, E), np.int32)  # two rows of the ring were never written
    for s in range(2):
        count[s, ROUTED] = loads([np.split(ids_TK, 2)[s] for ids_TK in ids])
    path = root / "expert_distribution_recorder_1.5.pt"
    made = {"rank": 0, "logical_count": torch.tensor(count)}
    torch.save(made | {"average_utilization_rate_over_window": None}, path)
    return Made(path, load=loads(ids))


def _tensorrt(root: Path, raw: bool) -> Made:
    from safetensors.numpy import save_file

    (root / "meta_info.json").write_text(json.dumps({"num_experts": E, "num_experts_per_token": K}))
    parts = []
    for rank in range(2):
        tensors = {}
        for iteration in (50, 51):
            ids = drawn(9 + rank, rank * 100 + iteration)
            parts.append(ids)
            written = [ids_TK.astype(np.int32) for ids_TK in ids] if raw else loads(ids)
            tensors |= {f"{iteration}_{layer}": of for layer, of in routed(written).items()}
        save_file(tensors, root / f"rank{rank}{'_raw' if raw else ''}.safetensors")
    ids = joined(parts)
    return Made(root, *((ids, None) if raw else (None, loads(ids))), config=False)


maker("tensorrt-llm")(partial(_tensorrt, raw=False))
maker("tensorrt-llm-raw", format="tensorrt-llm")(partial(_tensorrt, raw=True))


def router_logits(layer: int, ids_TK: np.ndarray) -> np.ndarray:
    """float32 [T, E], drawn; those of the experts chosen are the largest, and descend by slot."""
    drawn_TE = np.random.default_rng(layer).normal(size=(len(ids_TK), E)).astype(np.float32)
    np.put_along_axis(drawn_TE, ids_TK, np.arange(10, 10 - K, -1, dtype=np.float32)[None], axis=1)
    return drawn_TE


def megatron_rank(
    root: Path, rank: int, passes: list[tuple[int, dict[int, np.ndarray]]], hook: bool = False
) -> None:
    """One rank's file: of each pass its step, and the ids [T, K] by layer. The inference engine
    numbers from 1; the training hook writes the number in the module's name, sorts ids, and has
    logits beside them."""
    rows, sidecar = [], b""
    for step, by_layer in passes:
        for layer, ids_TK in by_layer.items():
            row = {"step": step, "stage": "pre_dispatch", "block": "decoder", "rank": rank}
            row |= {"layer": layer + (not hook), "num_tokens": len(ids_TK), "topk": K}
            row["top_indices"] = (np.sort(ids_TK, axis=1) if hook else ids_TK).tolist()
            if hook:
                data = (router_logits(layer, ids_TK).view(np.uint32) >> 16).astype("<u2").tobytes()
                row |= {"logit_offset": len(sidecar), "logit_bytes": len(data)}
                row["logit_shape"] = [len(ids_TK), E]
                sidecar += data
            rows.append(row)
    lines(root / f"router_trace_rank{rank}.jsonl", rows)
    if hook:
        (root / f"logits_rank{rank}.bin").write_bytes(sidecar)


@maker("megatron")
def megatron(root: Path) -> Made:
    """By the training hook, on two ranks of data parallelism."""
    parts = []
    for rank in range(2):
        passes = [drawn(5 + rank, 10 * step + rank) for step in range(2)]
        megatron_rank(root, rank, [(s, routed(ids)) for s, ids in enumerate(passes)], hook=True)
        parts += passes
    return Made(root, joined(parts))


@maker("megatron-pipeline", format="megatron")
def megatron_pipeline(root: Path) -> Made:
    """By the inference engine. Ranks 9 and 10 are the first stage; by name 10 comes first."""
    parts = []
    for column in range(2):
        passes = [
            (step, drawn(4 + column + micro, 100 * step + 10 * micro + column))
            for step in range(2)
            for micro in range(2)
        ]
        for stage, layer in enumerate(ROUTED):
            of_stage = [(step, {layer: ids[stage]}) for step, ids in passes]
            megatron_rank(root, 9 + 2 * stage + column, of_stage)
        parts += [ids for _, ids in passes]
    return Made(root, joined(parts))


def megatron_tpe(root: Path, ranks: dict[int, dict[int, dict[int, np.ndarray]]]) -> None:
    """tokens_per_expert: rank → iteration → layer → counts [microbatches, local experts]."""
    (root / "tokens_per_expert").mkdir(parents=True)
    for rank, iterations in ranks.items():
        rows = [
            {"iter": i, "block": "decoder", "layer": layer, "tpe": tpe_Mn.tolist()}
            for i, of_layer in iterations.items()
            for layer, tpe_Mn in of_layer.items()
        ]
        lines(root / "tokens_per_expert" / f"rank{rank}.jsonl", rows)


@maker("megatron-counts", format="megatron")
def megatron_counts(root: Path) -> Made:
    """Two ranks, each with half of the experts, two microbatches an iteration."""
    parts, half = [], E // 2
    ranks: dict[int, dict[int, dict[int, np.ndarray]]] = {0: {}, 1: {}}
    for i in (100, 200):
        micro = [drawn(30, i + m) for m in range(2)]
        parts += micro
        for layer, tpe_ME in routed(np.stack([loads(ids) for ids in micro], 1)).items():
            for rank in ranks:
                ranks[rank].setdefault(i, {})[layer] = tpe_ME[:, rank * half : (rank + 1) * half]
    megatron_tpe(root, ranks)
    return Made(root, load=loads(joined(parts)))


def by_layer(
    file: str,
    of_layers: Callable[[list[list[int]]], object],
    *layers: int,
    shape: tuple[int, int] = (E, K),
    config: bool = False,
) -> Make:
    """A JSON file of the counts [L, E] of these layers."""

    def make(root: Path) -> Made:
        load = loads(drawn(30, 8, shape=shape), shape[0])
        (root / file).write_text(json.dumps(of_layers([load_E.tolist() for load_E in load])))
        return Made(root, None, load, config, None, layers, *shape)

    return make


def sparse(of: list[list[int]]) -> list[dict[str, int]]:
    return [{str(e): n for e, n in enumerate(load_E) if n} for load_E in of]


def four_bits(of: list[list[int]]) -> object:
    sets = [[[e, n] for e, n in enumerate(load_E) if n] for load_E in of]
    return {"example_index": 0, "routed": dict(zip(map(str, ROUTED), sets, strict=True))}


def glm_merged(of: list[list[int]]) -> object:
    def layer(load_E: list[int]) -> object:
        return {"cnt": load_E, "gate": [n / 4 for n in load_E], "sal": [n / 2 for n in load_E]}

    return {"n_expert": E, "layers": routed(map(layer, of))}


def fiddler(of: list[list[int]]) -> object:
    return {"total_input_tokens": 11, "expert_popularity": of}


def with_a_dense_layer(of: list[list[int]]) -> object:
    return {"logical_count": [[0.0] * E, *of]}


maker("fiddler")(by_layer("expert_popularity_law.json", fiddler, 0, 1))
maker("sglang-json")(by_layer("decode.json", with_a_dense_layer, *ROUTED, config=True))
maker("experts4bit")(by_layer("x.jsonl", four_bits, *ROUTED, config=True))
maker("glm-merged")(by_layer("merged_law.json", glm_merged, *ROUTED, config=True))
maker("olmoe-counts")(by_layer("olmoe_expert_counts_law.json", sparse, 0, 7, shape=(64, 8)))
maker("mixtral-counts")(by_layer("mistral_expert_counts_law.json", sparse, 0, 7))


@maker("moe-beyond")
def moe_beyond(root: Path) -> Made:
    ids = drawn(9, 61)
    rows = [
        f'{layer},0,t{t},"{ids_TK[t].tolist()}"\n'
        for layer, ids_TK in routed(ids).items()
        for t in range(9)
    ]
    header = "Layer ID,Batch Number,Token,Activated Expert IDs\n"
    (root / "prompt_3_data.csv").write_text(header + "".join(rows))
    return Made(root, ids)


@maker("flame-moe")
def flame_moe(root: Path) -> Made:
    """A file for each layer, as the repository describes them."""
    ids, weights = drawn(10, 62), descending(10)
    for layer, ids_TK in routed(ids).items():
        lists = {"scores": (weights, pa.float16()), "indices": (ids_TK, pa.int16())}
        columns = {name: pa.array([*map(list, of)], pa.list_(k)) for name, (of, k) in lists.items()}
        pq.write_table(pa.table(columns), root / f"layer_{layer:02}.parquet")
    return Made(root, ids, weights=weights)


@maker("table")
def table(root: Path) -> Made:
    """Decisions under our names, compressed."""
    ids, weights = drawn(9, 63), descending(9)
    rows = [
        {"layer": layer, "position": t, "experts": ids_TK[t].tolist(), "weights": [*weights[t]]}
        for t in range(9)
        for layer, ids_TK in routed(ids).items()
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "t.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return Made(root / "t.jsonl.gz", ids, weights=weights)


@maker("counts")
def counts(root: Path) -> Made:
    load = loads(drawn(30, 9))
    rows = [f"{layer},{e},{n}\n" for layer, of in routed(load).items() for e, n in enumerate(of)]
    (root / "c.csv").write_text("layer,expert,count\n" + "".join(rows))
    return Made(root / "c.csv", load=load)


@maker("counts-rows", format="counts")
def counts_rows(root: Path) -> Made:
    """A row per assignment, as llama.cpp's moe-trace writes them."""
    ids = drawn(30, 9)
    rows = [f"{layer},{e}\n" for layer, one in routed(ids).items() for e in one.flat]
    (root / "r.csv").write_text("layer,expert\n" + "".join(rows))
    return Made(root / "r.csv", load=loads(ids))


Field = int | float | str | list[str]
Tensor = tuple[int, tuple[int, ...], bytes]


def gguf_file(
    path: Path, fields: dict[str, Field], tensors: dict[str, np.ndarray | Tensor]
) -> None:
    """Writes GGUF version 3, to the letter of ggml's docs/gguf.md: metadata of u32, f32, strings
    and lists of strings; tensors of float32, or (ggml's type, shape with the fastest dimension
    first, bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value: Field) -> bytes:
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(text(key) + typed(value) for key, value in fields.items())
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = (0, tensor.shape[::-1], tensor.astype("<f4").tobytes())
        kind, shape, content = tensor
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def write_imatrix(
    path: Path,
    load: dict[int, np.ndarray],
    tokens: int,
    energy: dict[int, np.ndarray] | None = None,
    chunk: int = 1,
) -> None:
    """What llama-imatrix writes of these layers' counts [E], beside a dense tensor's."""
    tensors: dict[str, np.ndarray] = {}
    for layer, load_E in load.items():
        for part in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            sums_EC = np.tile(load_E[:, None] * 0.5, (1, 4))
            if energy is not None and part == "down":
                sums_EC = np.repeat(energy[layer][:, None] / 4, 4, axis=1)
            tensors[f"{name}.in_sum2"] = sums_EC
            tensors[f"{name}.counts"] = load_E[:, None]
        dense = f"blk.{layer}.attn_q.weight"
        tensors[f"{dense}.in_sum2"] = np.ones((1, 4))
        tensors[f"{dense}.counts"] = np.full((1, 1), tokens)
    fields: dict[str, Field] = {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": tokens // chunk,
        "imatrix.chunk_size": chunk,
    }
    gguf_file(path, fields, dict(tensors))


@maker("imatrix")
def imatrix(root: Path) -> Made:
    load = loads(drawn(30, 12))
    write_imatrix(root / "imatrix.gguf", routed(load), 30, chunk=5)
    return Made(root / "imatrix.gguf", load=load, config=False)


PREAMBLE = """# route_trace v1
# model=/data/a model.gguf arch=qwen3moe n_layer={layers} n_expert={E} n_expert_used={K}
# layer=0 expert_bytes=13219200 dense_bytes=23280128
"""


def write_route_trace(path: Path, rows: list[list[int | float]], dropped: bool = True) -> None:
    """BigMoeOnEdge's CSV of rows of turn, phase, step, layer, slot, expert, weight, residency,
    expert_bytes[, dropped]."""
    names = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
    text = PREAMBLE.format(layers=LAYERS, E=E, K=K) + names + ",dropped" * dropped + "\n"
    path.write_text(
        text + "".join(",".join(f"{v:.6g}" for v in row[: 9 + dropped]) + "\n" for row in rows)
    )


@maker("bigmoeonedge")
def bigmoeonedge(root: Path) -> Made:
    """A prompt of 6 tokens, layer by layer, and 3 decoded ones."""
    ids, weights = drawn(9, 60), descending(9)
    rows: list[list[int | float]] = []
    for phase, tokens in ((0, range(6)), *((1, range(t, t + 1)) for t in range(6, 9))):
        for layer, ids_TK in routed(ids).items():
            for t in tokens:
                chosen = zip(ids_TK[t].tolist(), weights[t], strict=True)
                rows += [[0, phase, t, layer, j, e, w, 1, 0, 0] for j, (e, w) in enumerate(chosen)]
    write_route_trace(root / "route.csv", rows)
    return Made(root / "route.csv", ids, weights=weights, config=False)


@maker("moe-policylang")
def policylang(root: Path) -> Made:
    """Two prompts, layer by layer, as its recorder's hooks append them."""
    ids, rows = drawn(9, 70), []
    for prompt, tokens in enumerate((range(5), range(5, 9))):
        for layer, ids_TK in routed(ids).items():
            for at, t in enumerate(tokens):
                row = {"prompt_id": prompt, "token_idx": at, "layer_idx": layer, "token_id": t}
                row |= {"selected_experts": ids_TK[t].tolist(), "router_scores": [0.5, 0.25]}
                row |= {"router_softmax": [1 / E] * E, "token_loss": 1.5 if at else None}
                row |= {"phase": "prefill" if at < 3 else "decode"}
                rows.append(row | {"domain_tag": ["code", "chat"][prompt]})
    i32, lists, text = pa.int32(), pa.list_(pa.float32()), pa.string()
    kinds = {"prompt_id": i32, "token_idx": i32, "layer_idx": i32}
    kinds |= {"selected_experts": pa.list_(i32), "router_scores": lists, "router_softmax": lists}
    kinds |= {"token_id": i32, "phase": text, "domain_tag": text, "token_loss": pa.float32()}
    schema = pa.schema(kinds)
    pq.write_table(pa.Table.from_pylist(rows, schema), root / "t.parquet", compression="zstd")
    return Made(root / "t.parquet", ids, config=False)


def write_fingerprint(
    path: Path, samples: int, tokens: dict[str, float], load: dict[str, list[np.ndarray]]
) -> None:
    """GPT-OSS's fingerprint of a category: "think" and "answer" → load [E] by routed layer."""
    written: dict[str, object] = {"sample_count": samples}
    for part, load_LE in load.items():
        written[f"num_{part}_tokens"] = tokens[part]
        written[f"{part}_expert_analytics"] = {
            f"layer_{layer}": {
                str(e): {"prob_density": 0.1, "count_frequency": n / (samples * tokens[part])}
                for e, n in sorted(enumerate(load_E.tolist()), key=lambda pair: -pair[1])
                if n
            }
            for layer, load_E in routed(load_LE).items()
        }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(written, indent=2))


@maker("gpt-oss-fingerprints")
def fingerprints(root: Path) -> Made:
    load = loads(drawn(60, 80))
    write_fingerprint(root / "law" / "True_True.json", 4, {"think": 15.0}, {"think": load})
    (root / "law" / "True_True_examples.json").write_text('{"row_index": 1}')
    return Made(root, load=load)
