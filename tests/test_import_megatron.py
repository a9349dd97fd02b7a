"""Megatron-Core's router trace and tokens_per_expert, of one rank and of many."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.checking.check import check
from moe_inspect.importers.context import ImportContext, ImportSource
from moe_inspect.importers.megatron.importer import megatron
from moe_inspect.public import Trace
from tests.conftest import Cli
from tests.support import importing
from tests.support.foreign import E, K, drawn, lines, megatron_rank, megatron_tpe
from tests.support.importing import decisions, loads
from tests.test_real_data import REAL

Passes = list[tuple[int, list[np.ndarray]]]  # step, ids [T, K] of each layer
Layers = list[list[int]]  # of each pipeline stage
Rows = list[dict[str, Any]]
Change = Callable[[Rows], Rows]


def passes_of(layers: int, micro: int = 2, steps: int = 2, T: int = 6, seed: int = 0) -> Passes:
    each = [(step, m) for step in range(steps) for m in range(micro)]
    return [(step, drawn(T, 1000 * seed + 10 * step + m, layers)) for step, m in each]


def columns_of(number: int, layers: int) -> list[Passes]:
    return [passes_of(layers, seed=c) for c in range(number)]


def dump(
    root: Path,
    columns: list[Passes],
    stages: Layers,
    hook: bool = False,
    first: tuple[int, ...] = (),
    change: Change | None = None,
) -> list[Passes]:
    """Writes columns of passes over stages of layers: rank = stage · columns + column, as Megatron
    numbers them. The hook numbers each stage from 0: `first` is the block index of each stage's
    layer 0, where that has no experts. `change`: what is done to the rows of the last rank."""
    root.mkdir(exist_ok=True)
    for stage, layers in enumerate(stages):
        start = (first[stage] if first else min(layers, default=0)) if hook else 0
        for c, passes in enumerate(columns):
            calls = [(s, {i - start: ids[i] for i in layers}) for s, ids in passes if layers]
            megatron_rank(root, stage * len(columns) + c, calls, hook)
    if change is not None:
        changed(of_rank(root, len(stages) * len(columns) - 1), change)
    return columns


def of_rank(place: Path, rank: int) -> Path:
    return place / f"router_trace_rank{rank}.jsonl"


def changed(path: Path, change: Change) -> None:
    lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))


def numbered(root: Path, layers: Iterable[int], ids: Callable[[int], np.ndarray], **fields) -> None:
    """One rank's file of one pass that has these numbers of layers."""
    root.mkdir(exist_ok=True)
    common = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "rank": 0, "topk": K} | fields
    each = ((n, ids(n)) for n in layers)
    calls = [{"layer": n, "num_tokens": len(of), "top_indices": of.tolist()} for n, of in each]
    lines(of_rank(root, 0), [common | call for call in calls])


def ascending(n: int) -> np.ndarray:
    return np.sort(drawn(30, n, 1)[0], axis=1)


def unordered(n: int) -> np.ndarray:
    return drawn(30, n, 1)[0]


def pairs(number: int) -> Callable[[int], np.ndarray]:
    """So many different ascending decisions."""
    every = np.array([[a, b] for a in range(E) for b in range(a + 1, E)])[:number]
    return lambda n: np.repeat(every, 3, axis=0)


def interleaved(root: Path, group: int, rank_layers: list[Layers], passes: Passes) -> list[Passes]:
    """Each rank's chunks of layers, called for `group` microbatches of a step in turn."""
    root.mkdir(exist_ok=True)
    turns = [passes[n : n + group] for n in range(0, len(passes), group)]  # steps are multiples
    for rank, chunks in enumerate(rank_layers):
        each = [(step, ids, of) for turn in turns for of in chunks for step, ids in turn]
        megatron_rank(root, rank, [(step, {i: ids[i] for i in of}) for step, ids, of in each])
    return [passes]


def options(root: Path, config: tuple[int, ...] | None = None, **more: Any) -> dict[str, Any]:
    """`config`: of a model of so many layers, of which the first so many have no experts."""
    if config is not None:
        sizes = {"num_hidden_layers": config[0], "num_experts": E, "num_experts_per_tok": K}
        sizes["first_k_dense_replace"] = sum(config[1:])
        more["model"] = root / f"{config[0]}.json"
        more["model"].write_text(json.dumps(sizes))
    return {"experts": E, **more}


def taken(root: Path, *sources: str | Path, **given: Any) -> tuple[Trace, list[str]]:
    return importing.taken(root, "megatron", *sources, **options(root, **given))


def whole(columns: list[Passes], layer: int) -> np.ndarray:
    return np.concatenate([ids[layer] for passes in columns for _, ids in passes])


# --- the router trace


def tensor_parallel(root: Path) -> list[Passes]:
    """Two ranks alike at both stages; a third like them at stage 0 alone is another column."""
    first = passes_of(2)
    half = [(s, [ids[0], drawn(6, 99 + i, 1)[0]]) for i, (s, ids) in enumerate(first)]
    dump(root, [first, first, half], [[0], [1]])
    return [first, half]


def one_forward_one_backward(root: Path) -> list[Passes]:
    """The first stage meets forward 0, 1, again 0, 1; the last forward 0, again 0, 1, 1."""
    (_, a), (_, b) = passes_of(4, steps=1)
    root.mkdir(exist_ok=True)
    for rank, order in enumerate(([a, b, a, b], [a, a, b, b])):
        first, calls = 2 * rank, list[tuple[int, dict[int, np.ndarray]]]()
        for n, ids in enumerate(order):
            again = any(ids is before for before in order[:n])
            layers = (first + 1, first) if again else (first, first + 1)  # the backward's order
            calls.append((0, {layer: ids[layer] for layer in layers}))
        megatron_rank(root, rank, calls)
    return [[(0, a), (0, b)]]


def recomputed(root: Path, order: list[int]) -> list[Passes]:
    passes = passes_of(3)
    root.mkdir(exist_ok=True)
    called = [(s, {i: ids[i] for i in of}) for s, ids in passes for of in (range(3), order)]
    megatron_rank(root, 0, called, hook=True)
    return [passes]


def single_tokens(root: Path, ranks: int, again: bool = False) -> list[Passes]:
    """Passes of one token that choose alike, as another token may well; `again`: and the first
    layer of the last once more, alone, as where it is recomputed."""
    one = drawn(1, 0, 2)
    repeat: Change = lambda rows: [*rows, rows[0]] if again else rows  # noqa: E731
    return dump(root, [[(0, one), (0, one)]] * ranks, [[0, 1]], hook=True, change=repeat)


RECOMPUTED = "4 passes repeat one of the same rank and step (activations recomputed): each is count"
ASSUMED, FROM_0 = "(1, 2, 3) start at 0 or 1: assumed 1", "layer numbers are taken to start at 0"
SINGLE, DATA = [[[0], [2]], [[1], [3]]], "--use-tp-pp-dp-mapping"
# what is written, and returned where it is known → options, layers, what each warning says
JOINED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[int], list[str]]] = {
    # by name rank 10 comes before rank 2
    "twelve ranks of two stages": (
        lambda at: dump(at, columns_of(6, 4), [[0, 1], [2, 3]]),
        *({"config": (4,)}, [0, 1, 2, 3], []),
    ),
    "tensor parallelism": (tensor_parallel, {"config": (2,)}, [0, 1], ["tensor parallelism"]),
    "1F1B": (one_forward_one_backward, {"config": (4,)}, [0, 1, 2, 3], [RECOMPUTED]),
    "whole passes of interleaved stages": (
        lambda at: interleaved(at, 1, SINGLE, passes_of(4)),
        *({}, [0, 1, 2, 3], ["(1, 2, 3, 4) start at 0 or 1: assumed 1"]),
    ),
    "single tokens": (
        lambda at: single_tokens(at, 2),
        *({"pipeline_stages": 1}, [0, 1], []),
    ),
    "a single token recomputed": (
        lambda at: single_tokens(at, 1, again=True),
        *({}, [0, 1], ["activations recomputed"]),
    ),
    **{
        f"recomputed {order}": (
            lambda at, of=order: recomputed(at, of),
            {},
            [0, 1, 2],
            [RECOMPUTED],
        )
        for order in ([2, 1, 0], [1, 2, 0], [0], [1, 0])
    },
    # each stage numbers its layers from 0
    **{
        f"{stages} of {data} columns": (
            lambda at, of=stages, data=data, first=first: dump(
                at, columns_of(data, 6), of, hook=True, first=first
            ),
            {"config": (max(stages[-1]) + 1, dense), "pipeline_stages": len(stages)},
            [*range(dense, max(stages[-1]) + 1)],
            [DATA] * (data > 1),
        )
        for data in (1, 2)
        for stages, first, dense in (
            ([[0, 1, 2], [3, 4, 5]], (), 0),
            ([[0, 1], [2, 3, 4, 5]], (), 0),
            ([[1, 2], [3, 4, 5]], (0, 3), 1),  # 1, 2 and 0, 1, 2
            ([[1], [2, 3], [4]], (0, 2, 4), 1),
            ([[], [2, 3]], (0, 2), 2),  # the first stage is dense
            ([[], [3, 4]], (0, 2), 3),  # and so is the second's first layer
        )
    },
    # which block a number means: the hook starts at 0, and sorts experts or has hidden states
    **{
        f"of {name} {layers}": (
            lambda at, of=layers, ids=ids, more=more: numbered(at, of, ids, **more),
            *({}, layers, []),
        )
        for layers in ([1, 2, 3], [0, 1, 2])
        for name, ids, more in (("hook", ascending, {}), ("states", unordered, {"hs_offset": 0}))
    },
    "twenty decisions": (lambda at: numbered(at, [1], pairs(20)), {}, [1], []),
    "nineteen": (lambda at: numbered(at, [1], pairs(19)), {}, [0], ["start at 0 or 1"]),
    "from 1": (lambda at: numbered(at, [1, 2, 3], unordered), {}, [0, 1, 2], [ASSUMED]),
    "from 0": (lambda at: numbered(at, [0, 1], unordered), {}, [0, 1], [FROM_0]),
    "of 3": (lambda at: numbered(at, [1, 2, 3], unordered), {"config": (3,)}, [0, 1, 2], []),
    "of 4": (lambda at: numbered(at, [1, 2, 3], unordered), {"config": (4, 1)}, [1, 2, 3], []),
}


@pytest.mark.parametrize("name", JOINED)
def test_ranks_and_stages_are_joined(name: str, tmp_path: Path):
    write, given, layers, warned = JOINED[name]
    columns = write(tmp_path / "in")
    trace, said = taken(tmp_path, tmp_path / "in", **given)
    assert [r.layer for r in trace.routers] == layers
    assert len(said) == len(warned)
    assert all(part in line for part, line in zip(warned, said, strict=True))
    for n, layer in enumerate(layers if columns else ()):
        assert np.array_equal(decisions(trace, n), whole(columns, layer))


def test_where_each_pass_came_from_is_kept(tmp_path: Path):
    dump(tmp_path / "in", columns_of(6, 4), [[0, 1], [2, 3]])
    trace, _ = taken(tmp_path, tmp_path / "in", config=(4,))
    assert trace.tokens()["batch"].tolist() == ([0] * 12 + [1] * 12) * 6
    sources = trace.documents()["source"].tolist()
    assert sources[:2] == ["router_trace_rank0.jsonl step 0 rank 0"] * 2
    note = next(note for note in trace.manifest["corpus"]["notes"] if "2 pipeline stages" in note)
    assert "(0 + 6, 1 + 7, 2 + 8, 3 more)" in note


def test_ranks_of_one_stage_are_pooled(tmp_path: Path):
    dump(tmp_path / "in", [passes_of(6)], [[0, 1, 2], [3, 4, 5]], hook=True)
    pooled = taken(tmp_path, tmp_path / "in", pipeline_stages=1)[0]
    assert ([r.layer for r in pooled.routers], pooled.n_tokens) == ([0, 1, 2], 48)
    assert "stages" not in str(pooled.manifest["corpus"]["notes"])


def test_stages_with_the_block_of_multi_token_prediction(tmp_path: Path):
    mtp = {"block": "mtp", "mtp_idx": 0, "layer": 1}
    change: Change = lambda rows: [r | (mtp if r["layer"] == 3 else {}) for r in rows]  # noqa: E731
    columns = dump(tmp_path / "in", [passes_of(3)], [[0], [1, 2]], change=change)
    trace, _ = taken(tmp_path, tmp_path / "in")
    paths = ["layers.0", "layers.1", "mtp.0.layers.0"]
    assert [(r.layer, r.path) for r in trace.routers] == [*enumerate(paths)]
    assert np.array_equal(decisions(trace, 2), whole(columns, 2))


def test_runs_of_two_labels_are_paired_apart(tmp_path: Path):
    runs = [dump(tmp_path / "ab"[n], [run], [[0], [1]]) for n, run in enumerate(columns_of(2, 2))]
    trace, _ = taken(tmp_path, *(f"{name}={tmp_path / name}" for name in "ab"))
    assert np.array_equal(decisions(trace, 1), whole([*runs[0], *runs[1]], 1))
    why = "a/router_trace_rank0.jsonl and .*b/router_trace_rank0.jsonl are both of rank 0"
    importing.refused(tmp_path / "x", why, "megatron", tmp_path / "a", tmp_path / "b", experts=E)


def test_a_dump_of_many_steps_is_read_a_pass_at_a_time(tmp_path: Path):
    def peak(steps: int) -> int:
        dump(place := tmp_path / f"in{steps}", [passes_of(2, steps=steps, T=400)], [[0], [1]])
        context = ImportContext([ImportSource(place, None)], experts=E, warn=[].append)
        tracemalloc.start()
        for _ in megatron(context).batches:
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(20) < 1.5 * peak(4)


def test_the_command_takes_pipeline_stages(cli_here: Cli, tmp_path: Path):
    dump(place := tmp_path / "in", [passes_of(4)], [[0, 1], [2, 3]], hook=True)
    config = options(tmp_path, (4,))["model"]
    command = ("import", "megatron", place, "-o", tmp_path / "t", "--config", config)
    assert "give --pipeline-stages" in cli_here(*command, check=1).stderr
    cli_here(*command, "--pipeline-stages", 2)
    assert len(Trace(tmp_path / "t").routers) == 4


# --- tokens_per_expert

Run = dict[int, dict[int, np.ndarray]]  # iteration → layer → [microbatches, experts]


def tpe_of(seed: int, layers: int = 2, iterations: tuple[int, ...] = (10, 20)) -> Run:
    rng = np.random.default_rng(seed)
    return {
        i: {layer: rng.multinomial(100, [1 / E] * E, size=3) for layer in range(layers)}
        for i in iterations
    }


def parallel(run: Run, ranks: int) -> list[Run]:
    """The experts of each rank of expert parallelism."""
    of = [slice(r * E // ranks, (r + 1) * E // ranks) for r in range(ranks)]
    return [
        {i: {layer: tpe[:, mine] for layer, tpe in rows.items()} for i, rows in run.items()}
        for mine in of
    ]


def stage_of(run: Run, layers: tuple[int, ...], start: int) -> Run:
    """These layers, numbered from `start`."""
    return {i: {n: of[at] for n, at in enumerate(layers, start)} for i, of in run.items()}


def twice(run: Run, layers: list[int]) -> Run:
    return {
        i: {layer: np.tile(tpe, (1 + (layer in layers), 1)) for layer, tpe in of.items()}
        for i, of in run.items()
    }


A, B = tpe_of(0, 5), tpe_of(1, 5)
# the ranks → options, the runs whose counts add up, their layers, what is told
COUNTED: dict[str, tuple[list[Run], dict[str, Any], list[Run], list[int], str]] = {
    "expert and data parallelism": (
        [*parallel(A, 2), *parallel(B, 2)],
        *({"pipeline_stages": 1}, [A, B], [0, 1, 2, 3, 4], ""),
    ),
    "pipeline stages": (
        [*parallel(stage_of(A, (1, 2), 1), 2), *parallel(stage_of(A, (3, 4), 0), 2)],
        *(
            {"config": (5, 1), "pipeline_stages": 2},
            [A],
            [1, 2, 3, 4],
            "2 consecutive ranks are assumed",
        ),
    ),
    "expert tensor parallelism": (
        [rank for rank in parallel(A, 2) for _ in range(2)],
        *({}, [A], [0, 1, 2, 3, 4], "2 ranks in a row count alike (expert tensor parallelism)"),
    ),
    **{
        f"{layers} recomputed": (
            [twice(A, layers)],
            *({}, [A], [0, 1, 2, 3, 4], f"every count of {len(layers)} of 5 layers is there twice"),
        )
        for layers in ([0, 1, 2, 3, 4], [0])
    },
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_joined_and_added(name: str, tmp_path: Path):
    ranks, given, runs, layers, warned = COUNTED[name]
    megatron_tpe(tmp_path / "in", dict(enumerate(ranks)))
    trace, said = taken(tmp_path, tmp_path / "in", **{"top_k": K} | given)
    assert len(said) == bool(warned)
    assert warned in "".join(said)
    assert [r.layer for r in trace.routers] == layers
    each = [of_layer for run in runs for of_layer in run.values()]
    assert np.array_equal(loads(trace), [sum(of[layer].sum(0) for of in each) for layer in layers])
    assert trace.n_tokens == len(each) * 3 * 100 // K
    assert set(trace.counts()["domain"]) == {"in"}
    assert [shard.files.last_batch for shard in trace.shards] == [10, 20]


def test_check_finds_dropped_or_padded_tokens(tmp_path: Path):
    run = tpe_of(0)
    run[10][1][0, 0] += 4
    megatron_tpe(tmp_path / "in", {0: run})
    (finding,) = check(taken(tmp_path, tmp_path / "in", top_k=K)[0]).findings
    assert finding.kind == "fewer_assignments"


# --- files that Megatron-Core 0.19.2 wrote

MEGATRON = REAL / "megatron"
needs_megatron = pytest.mark.skipif(not MEGATRON.is_dir(), reason=f"no {MEGATRON}")


@needs_megatron
@pytest.mark.parametrize("name", ["all_moe", "dense_first", "big_logits", "sink", "mtp", "ppall"])
def test_real_files_come_to_their_truth(name: str, tmp_path: Path):
    truth = json.loads((MEGATRON / f"{name}.truth.json").read_text())
    given = {"config": (6,), "pipeline_stages": 2} if name == "ppall" else {}
    trace, said = taken(tmp_path, MEGATRON / name, **given)
    for n, r in enumerate(trace.routers):
        load_E = np.bincount(decisions(trace, n).ravel(), minlength=E)
        assert load_E.tolist() == truth["load"].pop(str(r.layer))
    assert not truth["load"]
    assert any("assumed 1" in line for line in said) == (name == "sink")
    known = name == "big_logits"
    assert {r.slot_order for r in trace.routers} == {"weight" if known else "unknown"}
    for n, r in enumerate(trace.routers if known else ()):
        chosen = decisions(trace, n).astype(int)
        of_token = np.stack(trace.logits(layers=r.layer)["logits"].to_list())
        logits = np.take_along_axis(of_token, chosen, 1)
        equal = (logits[:, 0] == logits[:, 1]).sum()  # in bfloat16
        assert equal < 10
        first = np.bincount(chosen[:, 0], minlength=E)
        assert np.abs(first - truth["first"][str(r.layer)]).sum() <= 2 * equal


@needs_megatron
def test_real_counts_of_one_rank_are_read_where_they_are_all(tmp_path: Path):
    trace, said = taken(tmp_path, MEGATRON / "tpe", experts=2, top_k=1)
    assert (said, [r.layer for r in trace.routers]) == ([], [3])
    assert loads(trace)[0].tolist() == [224, 144]
