"""Foreign files, made to the letter of their formats from decisions that the tests know.

T tokens, K slots, L layers with experts.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.synthetic import uniform_ids

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
    """What was written: where, and for decisions the ids [T, K] of each router in the order of the
    trace (and their weights), for counts the load [E]."""

    source: Path
    ids: list[np.ndarray] | None = None
    load: list[np.ndarray] | None = None
    config: bool = True
    weights: np.ndarray | None = None  # [T, K] of every router


MAKERS: dict[str, Callable[[Path], Made]] = {}
FORMAT_OF: dict[str, str] = {}  # name of a maker → format that reads what it makes


def maker(
    name: str, format: str | None = None
) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    def register(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
        MAKERS[name], FORMAT_OF[name] = make, format or name
        return make

    return register


def config_file(root: Path) -> Path:
    path = root / "model.json"
    path.write_text(json.dumps(CONFIG))
    return path


def drawn(T: int, seed: int = 0, routers: int = len(ROUTED)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [uniform_ids(rng, T, E, K).astype(np.int64) for _ in range(routers)]


def blocks(ids: list[np.ndarray]) -> np.ndarray:
    """[T, blocks, K] as engines have it: the dense block reads as expert 0."""
    whole = np.zeros((len(ids[0]), LAYERS, K), np.int64)
    for layer, ids_TK in zip(ROUTED, ids, strict=True):
        whole[:, layer] = ids_TK
    return whole


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@maker("vllm-routed")
def vllm(root: Path) -> Made:
    parts = [drawn(T, T) for T in (6, 1, 9)]
    rows = []
    for n, ids in enumerate(parts):
        T = len(ids[0])
        prompt = min(4, T)
        rows.append(
            {
                "prompt_token_ids": list(range(prompt)),
                "token_ids": list(range(50, 50 + T + 1 - prompt)),
                "routed_experts": npy(blocks(ids).astype(np.uint8)),
                "domain": "ab"[n % 2],
            }
        )
    lines(root / "v.jsonl", rows)
    return Made(root / "v.jsonl", [np.concatenate(p) for p in zip(*parts, strict=True)])


@maker("vllm-npy", format="vllm-routed")
def vllm_npy(root: Path) -> Made:
    ids = drawn(12)
    np.save(root / "a.npy", blocks(ids).astype(np.uint16))
    np.save(root / "a.token_ids.npy", np.arange(12))
    return Made(root / "a.npy", ids)


@maker("tensorrt-llm-routed")
def tensorrt_llm_routed(root: Path) -> Made:
    parts = [drawn(T, T) for T in (6, 2, 9)]
    results = [
        {"token_ids": list(range(50, 53)), "routed_experts": npy(np.stack(ids, 1).astype(np.int16))}
        for ids in parts
    ]
    prompts = [list(range(len(ids[0]) - 2)) for ids in parts]
    rows = [
        {"request_id": n, "prompt_token_ids": prompt, "outputs": [result]}
        for n, (prompt, result) in enumerate(zip(prompts, results, strict=True))
    ]
    lines(root / "results.jsonl", rows)
    return Made(root / "results.jsonl", [np.concatenate(p) for p in zip(*parts, strict=True)])


@maker("sglang-routed")
def sglang_routed(root: Path) -> Made:
    ids, start = drawn(7), 3
    text = base64.b64encode(blocks(ids).astype("<i4").tobytes()).decode()
    lines(
        root / "s.jsonl",
        [
            {
                "prompt_token_ids": [1] * 5,
                "token_ids": [2] * 6,
                "routed_experts": text,
                "start": start,
            }
        ],
    )
    return Made(root / "s.jsonl", ids)


def physical_map() -> np.ndarray:
    """[blocks, P]: 8 logical experts in 10 places, in another order in each layer."""
    rng = np.random.default_rng(5)
    return np.stack([rng.permutation([*range(E), 3, 5]) for _ in range(LAYERS)])


def physical(ids: list[np.ndarray]) -> np.ndarray:
    """int32 [blocks, T, 8], a random replica of each expert, −1 where nothing was written."""
    rng, maps = np.random.default_rng(6), physical_map()
    topk = np.full((LAYERS, len(ids[0]), 8), -1, np.int32)
    for layer, ids_TK in zip(ROUTED, ids, strict=True):
        for t, k in np.ndindex(ids_TK.shape):
            topk[layer, t, k] = rng.choice(np.nonzero(maps[layer] == ids_TK[t, k])[0])
    return topk


@maker("sglang-per_token", format="sglang")
def sglang_per_token(root: Path) -> Made:
    import torch

    prefill, decode = drawn(7, 1), drawn(3, 2)
    common = {"rank": 0, "gatherer_key": "primary", "misc_objects": []}
    records = [
        {
            **common,
            "forward_pass_id": 0,
            "input_ids": list(range(7)),
            "positions": [0, 1, 2, 3, 5, 6, 7],
            "extend_seq_lens": [4, 3],
            "forward_mode": 1,
            "topk_ids_of_layer": torch.tensor(physical(prefill)),
            "global_physical_count": torch.zeros(LAYERS, 10, dtype=torch.int32),
        },
        {
            **common,
            "forward_pass_id": 1,
            "input_ids": [7, 8, 9],
            "positions": [4, 8, 30],
            "extend_seq_lens": None,
            "forward_mode": 2,
            "topk_ids_of_layer": torch.tensor(physical(decode)),
            "global_physical_count": torch.zeros(LAYERS, 10, dtype=torch.int32),
        },
    ]
    path = root / "expert_distribution_recorder_1.5_0.pt"
    torch.save(
        {"records": records, "last_physical_to_logical_map": torch.tensor(physical_map())}, path
    )
    return Made(path, [np.concatenate(p) for p in zip(prefill, decode, strict=True)])


@maker("sglang-per_pass", format="sglang")
def sglang_per_pass(root: Path) -> Made:
    import torch

    load = [np.zeros(E, np.int64) for _ in ROUTED]
    for rank in range(2):
        ids = drawn(16, 10 + rank)
        count = np.zeros((LAYERS, 10), np.int32)
        for layer, row in enumerate(physical(ids)):
            count[layer] = np.bincount(row[row >= 0], minlength=10)
        load = [
            total + np.bincount(i.reshape(-1), minlength=E)
            for total, i in zip(load, ids, strict=True)
        ]
        record = {
            "forward_pass_id": 4,
            "rank": rank,
            "gatherer_key": "primary",
            "global_physical_count": torch.tensor(count),
        }
        content = {
            "records": [record],
            "last_physical_to_logical_map": torch.tensor(physical_map()),
        }
        torch.save(content, root / f"expert_distribution_recorder_1.5_{rank}.pt")
    return Made(root, load=load)


@maker("sglang-stat", format="sglang")
def sglang_stat(root: Path) -> Made:
    import torch

    ids = drawn(40, 3)
    count = np.zeros((5, LAYERS, E), np.int32)  # two rows of the ring were never written
    for layer, ids_TK in zip(ROUTED, ids, strict=True):
        for s, part in enumerate(np.split(ids_TK, 2)):
            count[s, layer] = np.bincount(part.reshape(-1), minlength=E)
    path = root / "expert_distribution_recorder_1.5.pt"
    torch.save(
        {
            "rank": 0,
            "logical_count": torch.tensor(count),
            "average_utilization_rate_over_window": None,
        },
        path,
    )
    return Made(path, load=[np.bincount(i.reshape(-1), minlength=E) for i in ids])


def _tensorrt(root: Path, raw: bool) -> list[np.ndarray]:
    from safetensors.numpy import save_file

    (root / "meta_info.json").write_text(json.dumps({"num_experts": E, "num_experts_per_token": K}))
    parts = []
    for rank in range(2):
        tensors = {}
        for iteration in (50, 51):
            ids = drawn(9 + rank, rank * 100 + iteration)
            parts.append(ids)
            for layer, ids_TK in zip(ROUTED, ids, strict=True):
                counts = np.bincount(ids_TK.reshape(-1), minlength=E)
                tensors[f"{iteration}_{layer}"] = ids_TK.astype(np.int32) if raw else counts
        save_file(tensors, root / f"rank{rank}{'_raw' if raw else ''}.safetensors")
    return [np.concatenate(p) for p in zip(*parts, strict=True)]


@maker("tensorrt-llm")
def tensorrt(root: Path) -> Made:
    return Made(
        root,
        load=[np.bincount(i.reshape(-1), minlength=E) for i in _tensorrt(root, False)],
        config=False,
    )


@maker("tensorrt-llm-raw", format="tensorrt-llm")
def tensorrt_raw(root: Path) -> Made:
    return Made(root, _tensorrt(root, True), config=False)


def router_logits(layer: int, ids_TK: np.ndarray) -> np.ndarray:
    """float32 [T, E], drawn but for those of the experts chosen, which descend by slot: the first
    choice has the largest."""
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
            rows.append(
                {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer + (not hook),
                    "rank": rank,
                    "num_tokens": len(ids_TK),
                    "topk": K,
                    "top_indices": (np.sort(ids_TK, axis=1) if hook else ids_TK).tolist(),
                }
            )
            if hook:
                data = (router_logits(layer, ids_TK).view(np.uint32) >> 16).astype("<u2").tobytes()
                rows[-1] |= {
                    "logit_offset": len(sidecar),
                    "logit_bytes": len(data),
                    "logit_shape": [len(ids_TK), E],
                }
                sidecar += data
    lines(root / f"router_trace_rank{rank}.jsonl", rows)
    if hook:
        (root / f"logits_rank{rank}.bin").write_bytes(sidecar)


@maker("megatron")
def megatron(root: Path) -> Made:
    """By the training hook, on two ranks of data parallelism."""
    parts = []
    for rank in range(2):
        passes = [(step, drawn(5 + rank, 10 * step + rank)) for step in range(2)]
        megatron_rank(
            root,
            rank,
            [(step, dict(zip(ROUTED, ids, strict=True))) for step, ids in passes],
            hook=True,
        )
        parts += [ids for _, ids in passes]
    return Made(root, [np.concatenate(p) for p in zip(*parts, strict=True)])


@maker("megatron-pipeline", format="megatron")
def megatron_pipeline(root: Path) -> Made:
    """By the inference engine. Ranks 9 and 10 are the first stage, 11 and 12 the second; by name 10
    comes first, 9 last."""
    parts = []
    for column in range(2):
        passes = [
            (step, drawn(4 + column + micro, 100 * step + 10 * micro + column))
            for step in range(2)
            for micro in range(2)
        ]
        for stage, layer in enumerate(ROUTED):
            megatron_rank(
                root, 9 + 2 * stage + column, [(step, {layer: ids[stage]}) for step, ids in passes]
            )
        parts += [ids for _, ids in passes]
    return Made(root, [np.concatenate(p) for p in zip(*parts, strict=True)])


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
    """Two ranks of expert parallelism, each with half of the experts, two microbatches an
    iteration."""
    load, half = [np.zeros(E, np.int64) for _ in ROUTED], E // 2
    ranks: dict[int, dict[int, dict[int, np.ndarray]]] = {0: {}, 1: {}}
    for i in (100, 200):
        counts = [
            [np.bincount(ids.reshape(-1), minlength=E) for ids in drawn(30, i + m)]
            for m in range(2)
        ]
        for n, layer in enumerate(ROUTED):
            tpe_ME = np.stack([of_layer[n] for of_layer in counts])
            load[n] = load[n] + tpe_ME.sum(0)
            for rank in ranks:
                ranks[rank].setdefault(i, {})[layer] = tpe_ME[:, rank * half : (rank + 1) * half]
    megatron_tpe(root, ranks)
    return Made(root, load=load)


@maker("esft")
def esft(root: Path) -> Made:
    folder = root / "law"
    folder.mkdir()
    ids = drawn(10, 4)
    weights = np.array([[0.5 + t / 64, 0.25 - t / 64] for t in range(10)])
    for layer, ids_TK in zip(ROUTED, ids, strict=True):
        text = ""
        for part in (slice(4), slice(4, None)):
            text += (
                "\t\t".join(
                    "\t".join(map(str, values[part].reshape(-1))) for values in (ids_TK, weights)
                )
                + "\n"
            )
        (folder / f"expert_weights_{layer}.txt").write_text(text)
    return Made(folder, ids, weights=weights)


@maker("fiddler")
def fiddler(root: Path) -> Made:
    load = [np.bincount(i.reshape(-1), minlength=E) for i in drawn(30, 8)]
    written = {"total_input_tokens": 11, "expert_popularity": [i.tolist() for i in load]}
    (root / "expert_popularity_law.json").write_text(json.dumps(written))
    return Made(root, load=load, config=False)


@maker("counts")
def counts(root: Path) -> Made:
    load = [np.bincount(i.reshape(-1), minlength=E) for i in drawn(30, 9)]
    rows = [
        {"layer": layer, "expert": e, "count": int(n)}
        for layer, row in zip(ROUTED, load, strict=True)
        for e, n in enumerate(row)
    ]
    (root / "c.csv").write_text(
        "layer,expert,count\n" + "".join(f"{r['layer']},{r['expert']},{r['count']}\n" for r in rows)
    )
    return Made(root / "c.csv", load=load)
