"""Megatron-Core's router trace and tokens_per_expert, of one rank and of many."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_inspect.importers.context import ImportContext, ImportSource
from moe_inspect.importers.megatron.importer import megatron
from moe_inspect.trace.reader import Trace
from tests.conftest import Cli
from tests.support import importing
from tests.support.foreign import (
    MAKERS,
    E,
    K,
    config_file,
    drawn,
    lines,
    megatron_rank,
    megatron_tpe,
)
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
    root: Path, columns: list[Passes], stages: Layers, hook: bool = False, first: tuple = ()
) -> Path:
    """Columns of passes over stages of layers: rank = stage · columns + column, as Megatron numbers
    them. The hook numbers each stage from 0: `first` is the block index of each stage's layer 0,
    where that has no experts."""
    root.mkdir(exist_ok=True)
    for stage, layers in enumerate(stages):
        start = (first[stage] if first else min(layers, default=0)) if hook else 0
        for c, passes in enumerate(columns):
            calls = [(s, {i - start: ids[i] for i in layers}) for s, ids in passes if layers]
            megatron_rank(root, stage * len(columns) + c, calls, hook)
    return root


def of_rank(place: Path, rank: int) -> Path:
    return place / f"router_trace_rank{rank}.jsonl"


def config_of(root: Path, layers: int, dense: int = 0) -> Path:
    """The config of a model whose first `dense` layers have no experts."""
    path = root / f"{layers}.json"
    sizes = {"num_hidden_layers": layers, "num_experts": E, "num_experts_per_tok": K}
    path.write_text(json.dumps(sizes | {"first_k_dense_replace": dense}))
    return path


def changed(path: Path, change: Change) -> None:
    lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))


def taken(root: Path, *sources: str | Path, **options: Any) -> tuple[Trace, list[str]]:
    return importing.taken(root, "megatron", *sources, **{"experts": E} | options)


def refused(root: Path, why: str, *sources: str | Path, **options: Any) -> None:
    importing.refused(root, why, "megatron", *sources, **{"experts": E} | options)


def whole(columns: list[Passes], layer: int) -> np.ndarray:
    return np.concatenate([ids[layer] for passes in columns for _, ids in passes])


def holds(trace: Trace, columns: list[Passes]) -> bool:
    """Whether it has every decision of the passes."""
    return all(
        np.array_equal(decisions(trace, n), whole(columns, r.layer))
        for n, r in enumerate(trace.routers)
    )


RECOMPUTED = "4 passes repeat one of the same rank and step (activations recomputed): each is"


def test_ranks_are_paired_by_number_not_by_name(tmp_path: Path):
    """Rank 10 sorts before rank 2: twelve ranks of two stages."""
    columns = columns_of(6, 4)
    place = dump(tmp_path / "in", columns, [[0, 1], [2, 3]])
    trace, said = taken(tmp_path, place, model=config_of(tmp_path, 4))
    assert (said, [r.layer for r in trace.routers]) == ([], [0, 1, 2, 3])
    assert holds(trace, columns)
    assert trace.tokens()["batch"].tolist() == ([0] * 12 + [1] * 12) * 6
    sources = trace.documents()["source"].tolist()
    assert sources[:2] == ["router_trace_rank0.jsonl step 0 rank 0"] * 2
    note = next(note for note in trace.manifest["corpus"]["notes"] if "2 pipeline stages" in note)
    assert "(0 + 6, 1 + 7, 2 + 8, 3 more)" in note


def test_tensor_parallel_ranks_are_taken_once_where_all_stages_agree(tmp_path: Path):
    first = passes_of(2)
    # alike at stage 0 alone: another column
    half = [(s, [ids[0], drawn(6, 99 + i, 1)[0]]) for i, (s, ids) in enumerate(first)]
    place = dump(tmp_path / "in", [first, first, half], [[0], [1]])
    trace, said = taken(tmp_path, place, model=config_of(tmp_path, 2))
    assert [line for line in said if "tensor parallelism" in line] == said
    assert said[0].startswith("4 passes")
    assert np.array_equal(decisions(trace, 1), whole([first, half], 1))


def test_recomputed_passes_are_left_out_before_stages_are_paired(tmp_path: Path):
    """1F1B: the first stage meets forward 0, 1, again 0, 1; the last forward 0, again 0, 1, 1."""
    (_, a), (_, b) = passes_of(4, steps=1)
    (place := tmp_path / "in").mkdir()
    for rank, order in enumerate(([a, b, a, b], [a, a, b, b])):
        first, calls = 2 * rank, list[tuple[int, dict[int, np.ndarray]]]()
        for n, ids in enumerate(order):
            again = any(ids is before for before in order[:n])
            layers = (first + 1, first) if again else (first, first + 1)  # the backward's order
            calls.append((0, {layer: ids[layer] for layer in layers}))
        megatron_rank(place, rank, calls)
    trace, said = taken(tmp_path, place, model=config_of(tmp_path, 4))
    assert holds(trace, [[(0, a), (0, b)]])
    assert said == [f"{RECOMPUTED} counted once"]


def test_stages_with_the_block_of_multi_token_prediction(tmp_path: Path):
    columns = [passes_of(3)]
    place = dump(tmp_path / "in", columns, [[0], [1, 2]])
    mtp = {"block": "mtp", "mtp_idx": 0, "layer": 1}
    changed(of_rank(place, 1), lambda rows: [r | (mtp if r["layer"] == 3 else {}) for r in rows])
    trace, _ = taken(tmp_path, place)
    paths = ["layers.0", "layers.1", "mtp.0.layers.0"]
    assert [(r.layer, r.path) for r in trace.routers] == [*enumerate(paths)]
    assert np.array_equal(decisions(trace, 2), whole(columns, 2))


def test_runs_of_two_labels_are_paired_apart(tmp_path: Path):
    runs = columns_of(2, 2)
    places = [dump(tmp_path / "ab"[n], [run], [[0], [1]]) for n, run in enumerate(runs)]
    trace, _ = taken(tmp_path, *(f"{place.name}={place}" for place in places))
    assert holds(trace, runs)
    line = "a/router_trace_rank0.jsonl and .*b/router_trace_rank0.jsonl are both of rank 0"
    refused(tmp_path / "x", line, *places)


def test_a_missing_stage_is_named_where_the_config_says_so(tmp_path: Path):
    place, model = dump(tmp_path / "in", [passes_of(3)], [[1], [2]]), config_file(tmp_path)
    assert taken(tmp_path / "x", place, model=model)[0].n_tokens == 24
    of_rank(place, 1).unlink()
    line = r"layers 2 \(from 0\) have experts in the config and are in no file"
    refused(tmp_path, line, place, model=model)


def less(by: int) -> Change:
    return lambda rows: [row | {"layer": row["layer"] - by} for row in rows]


LOST = r"2 of layers 0, 1 \(from 0\), as in .*rank0\.jsonl; 1 of layers 2, 3 .*rank2\.jsonl: give"
CROSSED = "line 5: step 1 of rank 1 calls its routers in another order than the first pass"
TWICE = r"rank1\.jsonl has layer 1 \(from 0\) and so has .*rank0\.jsonl"


# ranks of a stage, layers of each, what is done to the rows of the last rank → what is said
@pytest.mark.parametrize(
    ("ranks", "stages", "change", "line"),
    [
        (2, [[0, 1], [2, 3]], lambda rows: [], LOST),
        # stages overlap
        (1, [[0, 1], [1, 2]], less(0), TWICE),
        (1, [[0, 1, 2], [1, 2]], less(0), TWICE),
        # in numbers of their own 2, 3 and 1, 2, 3
        (1, [[1, 2], [3, 4, 5]], less(3), "If each stage numbers its layers from 0, give --pipel"),
        (1, [[2, 3], [4, 5]], less(4), "1 with layers 0, 1 .* of 0 with layers 2, 3 .*: later pi"),
        (1, [[0, 1], [2, 3]], lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]], CROSSED),
    ],
)
def test_unlike_stages(ranks: int, stages: Layers, change: Change, line: str, tmp_path: Path):
    place = dump(tmp_path / "in", columns_of(ranks, 6), stages)
    changed(of_rank(place, 2 * ranks - 1), change)
    refused(tmp_path, line, place)


def of_ids(row: dict, ids: list, **more: int) -> dict:
    return row | {"top_indices": ids} | more


# what is done to the second stage's rows → what is said
DISAGREEING: dict[str, Change] = {
    r"0.jsonl line 4: step 1 with 6 tokens, .*1.jsonl: no further pass": lambda rows: rows[:-1],
    r"0.jsonl line 2: step 0 with 6 tokens, .*1.jsonl line 2: step 1 with 6 tokens": (
        lambda rows: [rows[0], *rows[2:]]
    ),
    r"0.jsonl line 3: step 1 with 6 tokens, .*1.jsonl line 3: step 0 with 6 tokens": (
        lambda rows: [of_ids(rows[0], rows[0]["top_indices"][::-1]), *rows]
    ),
    r"step 0 with 6 tokens, .*step 1 with 6 tokens": lambda rows: [
        row | {"step": row["step"] + 1} for row in rows
    ],
    r"0.jsonl line 4: step 1 with 6 tokens, .*1.jsonl line 4: step 1 with 5 tokens: are both": (
        lambda rows: [*rows[:3], of_ids(rows[3], rows[3]["top_indices"][:5], num_tokens=5)]
    ),
    "step 1 of rank 3 in a file of rank 1": lambda rows: [
        row | {"rank": 3 if n == 2 else 1} for n, row in enumerate(rows)
    ],
    "topk is 1, 2 in the first pass": lambda rows: [
        of_ids(row, [ids[:1] for ids in row["top_indices"]], topk=1) for row in rows
    ],
    rf"logit_shape is \[6, {E + 1}\], not \[6, {E}\]": lambda rows: [
        row | {"logit_shape": [6, E + 1]} for row in rows
    ],
    "rank1.jsonl line 1 has no logits, .* has": lambda rows: [
        {name: value for name, value in row.items() if "logit" not in name} for row in rows
    ],
}


@pytest.mark.parametrize("line", DISAGREEING)
def test_stages_that_disagree_are_refused(line: str, tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(2)], [[0], [1]], hook=True)
    changed(of_rank(place, 1), DISAGREEING[line])
    stages = {"pipeline_stages": 2, "model": config_of(tmp_path, 2)}
    refused(tmp_path, line, place, **stages)
    refused(tmp_path, ".", of_rank(place, 1), of_rank(place, 0), **stages)


def interleaved(place: Path, group: int, rank_layers: list[Layers], passes: Passes) -> Path:
    """Each rank's chunks of layers, called for `group` microbatches of a step in turn."""
    place.mkdir()
    turns = [passes[n : n + group] for n in range(0, len(passes), group)]  # steps are multiples
    for rank, chunks in enumerate(rank_layers):
        each = [(step, ids, of) for turn in turns for of in chunks for step, ids in turn]
        megatron_rank(place, rank, [(step, {i: ids[i] for i in of}) for step, ids, of in each])
    return place


def test_interleaved_stages_are_refused_unless_whole_passes_follow_each_other(tmp_path: Path):
    line = "first pass does not agree: .* interleaved pipeline stages, which cannot be told apart"
    single, double = [[[0], [2]], [[1], [3]]], [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    for n, (layers, micro) in enumerate(((single, 2), (single, 4), (double, 2), (double, 4))):
        refused(tmp_path, line, interleaved(tmp_path / f"{n}", 2, layers, passes_of(8, micro)))
    passes = passes_of(4)
    assert holds(taken(tmp_path, interleaved(tmp_path / "in", 1, single, passes))[0], [passes])


def test_a_dump_of_many_steps_is_read_a_pass_at_a_time(tmp_path: Path):
    def peak(steps: int) -> int:
        place = dump(tmp_path / f"in{steps}", [passes_of(2, steps=steps, T=400)], [[0], [1]])
        context = ImportContext([ImportSource(place, None)], experts=E, warn=[].append)
        tracemalloc.start()
        for _ in megatron(context).batches:
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(20) < 1.5 * peak(4)


# --- which block a number means


def numbered(root: Path, layers: list[int], ids: Callable[[int], np.ndarray], **fields) -> Path:
    """One rank's file of one pass that has these numbers."""
    root.mkdir()
    common = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "rank": 0, "topk": K} | fields
    each = ((n, ids(n)) for n in layers)
    calls = [{"layer": n, "num_tokens": len(of), "top_indices": of.tolist()} for n, of in each]
    lines(of_rank(root, 0), [common | call for call in calls])
    return root


def ascending(n: int) -> np.ndarray:
    return np.sort(drawn(30, n, 1)[0], axis=1)


def unordered(n: int) -> np.ndarray:
    return drawn(30, n, 1)[0]


@pytest.mark.parametrize("layers", [[1, 2, 3], [0, 1, 2]])
@pytest.mark.parametrize(("ids", "fields"), [(ascending, {}), (unordered, {"hs_offset": 0})])
def test_the_hook_starts_at_zero(layers: list[int], ids: Callable, fields: dict, tmp_path: Path):
    trace, said = taken(tmp_path, numbered(tmp_path / "in", layers, ids, **fields))
    assert ([r.layer for r in trace.routers], said) == (layers, [])


def test_numbers_of_unknown_origin_are_settled_by_the_config_or_assumed(tmp_path: Path):
    place = numbered(tmp_path / "in", [1, 2, 3], unordered)
    zero = numbered(tmp_path / "from0", [0, 1], unordered)
    for source, layers, line in (
        (place, [0, 1, 2], "(1, 2, 3) start at 0 or 1: assumed 1"),
        (zero, [0, 1], "has a layer 0: its layer numbers are taken to start at 0"),
    ):
        trace, said = taken(tmp_path / f"{source.name} alone", source)
        assert [r.layer for r in trace.routers] == layers
        assert [line in told for told in said] == [True]
    for dense, layers in ((0, [0, 1, 2]), (1, [1, 2, 3])):
        config = config_of(tmp_path, 3 + dense, dense)
        trace, said = taken(tmp_path / config.stem, place, model=config)
        assert ([r.layer for r in trace.routers], said) == (layers, [])
    line = "layers 3, 4, 5 .from 0. have experts in the config and are in no file"
    refused(tmp_path, line, place, model=config_of(tmp_path, 6))


@pytest.mark.parametrize(("different", "layer"), [(19, 0), (20, 1)])
def test_so_many_ascending_decisions_are_the_hooks(different: int, layer: int, tmp_path: Path):
    pairs = np.array([[a, b] for a in range(E) for b in range(a + 1, E)])[:different]
    place = numbered(tmp_path / "in", [1], lambda n: np.repeat(pairs, 3, axis=0))
    trace, said = taken(tmp_path, place)
    assert [r.layer for r in trace.routers] == [layer]
    assert bool(said) == (layer == 0)


def test_a_config_that_the_hooks_numbers_do_not_fit_is_refused(tmp_path: Path):
    place, model = numbered(tmp_path / "in", [1, 2, 3], ascending), config_of(tmp_path, 3)
    line = r"in has layers 1, 2, 3 \(from 0\), .*3\.json has experts in 0, 1, 2: "
    refused(tmp_path, line + "for a run with pipeline paralleli", place, model=model)
    refused(tmp_path, line + "is it the config of", place, model=model, pipeline_stages=1)


# --- stages that each number their layers from 0


@pytest.mark.parametrize(
    ("stages", "first", "dense"),
    [
        ([[0, 1, 2], [3, 4, 5]], (), 0),
        ([[0, 1], [2, 3, 4, 5]], (), 0),
        ([[1, 2], [3, 4, 5]], (0, 3), 1),  # 1, 2 and 0, 1, 2
        ([[1], [2, 3], [4]], (0, 2, 4), 1),
        ([[], [2, 3]], (0, 2), 2),  # the first stage is dense
        ([[], [3, 4]], (0, 2), 3),  # and so is the second's first layer
    ],
)
@pytest.mark.parametrize("data", [1, 2])
def test_stages_are_joined(stages: Layers, first: tuple, dense: int, data: int, tmp_path: Path):
    depth = max(stages[-1]) + 1
    columns = columns_of(data, depth)
    place = dump(tmp_path / "in", columns, stages, hook=True, first=first)
    how = {"model": config_of(tmp_path, depth, dense), "pipeline_stages": len(stages)}
    trace, said = taken(tmp_path, place, **how)
    assert [r.layer for r in trace.routers] == list(range(dense, depth))
    assert holds(trace, columns)
    assert ["--use-tp-pp-dp-mapping" in line for line in said] == [True] * (data > 1)


THREE = [[0, 1, 2], [3, 4, 5]]
STAGES_INSIDE = (
    r"rank0\.jsonl has layers 0, 1, .*rank1\.jsonl has layers 0, 1, 2: 2 consecutive ranks .* "
    "--use-tp-pp-dp-mapping cannot be joined"
)


@pytest.mark.parametrize(
    ("layers", "config", "stages", "line"),
    [
        (THREE, None, None, r"there are files of 2 ranks: give --pipeline-stages \(1 if"),
        (THREE, None, 2, "--pipeline-stages 2: .* takes the model's config: give --model or --con"),
        (THREE, (6, 0), None, "3, 4, 5: for a run with pipeline parallelism give --pipeline-stage"),
        (THREE, (6, 0), 3, "files of 2 ranks do not make 3 pipeline stages: give the files of all"),
        (THREE, (7, 0), 2, "2 pipeline stages have 3 . 3 layers .* has 7: .* Interleaved"),
        (THREE, (3, 0), 2, "--pipeline-stages is 2, by their layers .* of 1"),
        (THREE, (8, 2), 2, "stage 0 cannot be blocks 2, 3, 4"),
        # one stage's file beside an empty one
        ([[], [2, 3]], None, None, "there are files of 2 ranks: give --pipeline-stages"),
        ([[0, 1], [2, 3, 4]] * 2, (5, 0), 2, STAGES_INSIDE),
    ],
)
def test_stages_without_what_joins_them_are_refused(
    layers: Layers, config: tuple | None, stages: int | None, line: str, tmp_path: Path
):
    place = dump(tmp_path / "in", [passes_of(6)], layers, hook=True)
    model = {"model": config_of(tmp_path, *config)} if config else {}
    refused(tmp_path, line, place, pipeline_stages=stages, **model)


def test_one_stage_pools_its_ranks(tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(6)], THREE, hook=True)
    pooled = taken(tmp_path, place, pipeline_stages=1)[0]
    assert ([r.layer for r in pooled.routers], pooled.n_tokens) == ([0, 1, 2], 48)
    assert "stages" not in str(pooled.manifest["corpus"]["notes"])


def test_the_command_takes_pipeline_stages(cli_here: Cli, tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(4)], [[0, 1], [2, 3]], hook=True)
    config = config_of(tmp_path, 4)
    command = ("import", "megatron", place, "-o", tmp_path / "t", "--config", config)
    assert "give --pipeline-stages" in cli_here(*command, check=1).stderr
    cli_here(*command, "--pipeline-stages", 2)
    assert len(Trace(tmp_path / "t").routers) == 4
    why = "--pipeline-stages is an option of the format megatron, not of counts"
    source = MAKERS["counts"](tmp_path).source
    importing.refused(tmp_path / "x", why, "counts", source, top_k=K, pipeline_stages=2)


# --- what the hook writes twice, or not at all


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0], [0], [1, 0]], ids=str)
def test_recomputed_routers_are_left_out(order: list[int], tmp_path: Path):
    """Of one rank: a layer at a time, two layers at a time, or the first layers alone."""
    passes = passes_of(3)
    called = [(s, {i: ids[i] for i in of}) for s, ids in passes for of in (range(3), order)]
    (place := tmp_path / "in").mkdir()
    megatron_rank(place, 0, called, hook=True)
    trace, said = taken(tmp_path, place)
    assert said == [f"{RECOMPUTED} counted once"]
    assert holds(trace, [passes])


def test_passes_of_one_token_that_choose_alike_are_all_taken(tmp_path: Path):
    """Another single token may well choose the same; a rank's, too."""
    (place := tmp_path / "in").mkdir()
    one = dict(enumerate(drawn(1, 0, 2)))
    for rank in range(2):
        megatron_rank(place, rank, [(0, one), (0, one)], hook=True)
    trace, said = taken(tmp_path, place, pipeline_stages=1)
    assert (trace.n_tokens, said) == (4, [])
    of_rank(place, 1).unlink()
    # the first layer again, alone
    changed(of_rank(place, 0), lambda rows: [*rows, rows[0] | {"step": 0}])
    trace, said = taken(tmp_path / "again", place)
    assert trace.n_tokens == 2
    assert ["activations recomputed" in line for line in said] == [True]


def test_a_capacity_factor_is_named_where_calls_are_missing(tmp_path: Path):
    (place := tmp_path / "in").mkdir()
    of_rank(place, 0).touch()
    for format in ("megatron", "auto"):
        why = "holds no call of a router: .* capacity factor"
        importing.refused(tmp_path, why, format, place, experts=E)
    dump(place, [passes_of(3)], [[0, 1, 2]], hook=True)
    changed(of_rank(place, 0), lambda rows: rows[:4] + rows[5:])
    line = "line 4: step 0 of rank 0 lacks layer 1 .* calls are missing, .* capacity factor"
    refused(tmp_path, line, place)


def test_experts_filled_up_to_their_capacity_are_refused(tmp_path: Path):
    """The hook reshapes the map's true entries to [T, K], though tokens have more or fewer."""
    pairs = "01 23 00 12 45 67 34 56 71 23 45 67"
    ids = np.array([[int(e) for e in pair] for pair in pairs.split()])
    line = "gives every expert 3 assignments .*moe_pad_expert_input_to_capacity"
    refused(tmp_path, line, numbered(tmp_path / "in", [1], lambda n: ids))
    other = np.where(ids == 7, 6, ids)
    refused(tmp_path, "goes to one expert twice", numbered(tmp_path / "x", [1], lambda n: other))


# --- tokens_per_expert


Run = dict[int, dict[int, np.ndarray]]  # iteration → layer → [microbatches, experts]


def parallel(run: Run, ranks: int) -> list[Run]:
    """The experts of each rank of expert parallelism."""

    def part(r: int) -> Run:
        mine = slice(r * E // ranks, (r + 1) * E // ranks)
        return {i: {layer: tpe[:, mine] for layer, tpe in of.items()} for i, of in run.items()}

    return [part(r) for r in range(ranks)]


def written(root: Path, ranks: list[Run]) -> Path:
    megatron_tpe(root / "in", dict(enumerate(ranks)))
    return root / "in"


def tpe_of(seed: int, layers: int = 2, iterations: tuple[int, ...] = (10, 20)) -> Run:
    rng = np.random.default_rng(seed)
    return {
        i: {layer: rng.multinomial(100, [1 / E] * E, size=3) for layer in range(layers)}
        for i in iterations
    }


def counted_as(trace: Trace, *runs: Run, first: int = 0) -> bool:
    """Whether the trace has the load of the runs at each layer from `first` on."""
    layers = range(first, first + len(trace.routers))
    each = [of_layer for run in runs for of_layer in run.values()]
    return np.array_equal(loads(trace), [sum(of[layer].sum(0) for of in each) for layer in layers])


def test_counts_of_expert_parallel_ranks_are_joined_and_data_parallel_ones_added(tmp_path: Path):
    runs = [tpe_of(seed) for seed in range(2)]
    place = written(tmp_path, [of_rank for run in runs for of_rank in parallel(run, 2)])
    refused(tmp_path, "files of 4 ranks: give --pipeline-stages", place, top_k=K)
    trace, said = taken(tmp_path, place, top_k=K, pipeline_stages=1)
    assert (said, [r.layer for r in trace.routers]) == ([], [0, 1])
    assert counted_as(trace, *runs)
    assert set(trace.counts()["domain"]) == {"in"}
    assert trace.n_tokens == 2 * 2 * 3 * 100 // K
    assert [shard.files.last_batch for shard in trace.shards] == [10, 20]


def test_counts_of_pipeline_stages_are_joined(tmp_path: Path):
    run = tpe_of(0, layers=5)
    stages = [
        {i: {n: of[layer] for n, layer in enumerate(own, start)} for i, of in run.items()}
        for start, own in ((1, [1, 2]), (0, [3, 4]))
    ]
    place = written(tmp_path, [of_rank for stage in stages for of_rank in parallel(stage, 2)])
    trace, _ = taken(tmp_path, place, model=config_of(tmp_path, 5, dense=1), pipeline_stages=2)
    assert [r.layer for r in trace.routers] == [1, 2, 3, 4]
    assert counted_as(trace, run, first=1)


def twice(run: Run, layers: list[int]) -> Run:
    return {
        i: {layer: np.tile(tpe, (1 + (layer in layers), 1)) for layer, tpe in of.items()}
        for i, of in run.items()
    }


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (
            lambda run: [of_rank for of_rank in parallel(run, 2) for _ in range(2)],
            "2 ranks in a row count alike (expert tensor parallelism)",
        ),
        (lambda run: [twice(run, [0, 1])], "every count of 2 of 2 layers is there twice (activati"),
        (lambda run: [twice(run, [0])], "every count of 1 of 2 layers is there twice (activations"),
    ],
)
def test_counts_that_are_there_twice_are_taken_once(ranks: Callable, line: str, tmp_path: Path):
    run = tpe_of(0)
    trace, said = taken(tmp_path, written(tmp_path, ranks(run)), top_k=K)
    assert [line in told for told in said] == [True]
    assert counted_as(trace, run)


def test_dropped_or_padded_tokens_are_told(tmp_path: Path):
    run = tpe_of(0)
    run[10][1][0, 0] += 4
    said = taken(tmp_path, written(tmp_path, [run]), top_k=K)[1]
    assert ["layers differ in their assignments" in line for line in said] == [True]


@pytest.mark.parametrize(
    ("spoil", "options", "line"),
    [
        (lambda r: r.pop(1), {}, "4 of 8 experts: .* make groups of 2; there are 1 from rank 0 on"),
        (lambda r: r.pop(0), {}, "there are 1 from rank 1 on"),
        (lambda r: r.update({3: r.pop(1)}), {}, r"0\.jsonl is of rank 0, the next .* of rank 3:"),
        (lambda r: r[1].pop(20), {}, r"20 is in one of .*0\.jsonl and .*1\.jsonl alone: are both"),
        (lambda r: r[1][20].pop(1), {}, r"rank1\.jsonl: iteration 20 has no line of layer 1:"),
        (list, {"experts": 6}, "the 4 experts of its rank, and 6 in all is not a multiple of 4"),
        (list, {"experts": None}, "does not say how many experts there are"),
        (list, {"top_k": None}, "does not say how many experts each token uses"),
        (
            lambda r: r[1][20].update({1: r[1][20][1][:, :3]}),
            {},
            r"rank1\.jsonl line 4: tpe has shape \[3, 3\], not \['any', 4\]",
        ),
    ],
)
def test_counts_that_cannot_be_joined(spoil: Callable, options: dict, line: str, tmp_path: Path):
    ranks = dict(enumerate(parallel(tpe_of(0), 2)))
    spoil(ranks)
    megatron_tpe(tmp_path / "in", ranks)
    refused(tmp_path, line, tmp_path / "in", **{"top_k": K} | options)


def test_counts_written_twice_or_beside_a_router_trace_are_refused(tmp_path: Path):
    place = written(tmp_path, [tpe_of(0)])
    changed(place / "tokens_per_expert" / "rank0.jsonl", lambda rows: [*rows, rows[-1]])
    line = "line 5 repeats iteration 20 of layer 1: a run that began again"
    refused(tmp_path, line, place, top_k=K)
    dump(place, [passes_of(2)], [[0, 1]])
    refused(tmp_path, "holds a router trace and tokens_per_expert: import one of the two", place)


# --- files that Megatron-Core 0.19.2 wrote

MEGATRON = REAL / "megatron"
needs_megatron = pytest.mark.skipif(not MEGATRON.is_dir(), reason=f"no {MEGATRON}")


@needs_megatron
@pytest.mark.parametrize("name", ["all_moe", "dense_first", "big_logits", "sink", "mtp", "ppall"])
def test_real_files_come_to_their_truth(name: str, tmp_path: Path):
    truth = json.loads((MEGATRON / f"{name}.truth.json").read_text())
    options = {"model": config_of(tmp_path, 6), "pipeline_stages": 2} if name == "ppall" else {}
    trace, said = taken(tmp_path, MEGATRON / name, **options)
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
def test_real_files_that_cannot_say_are_refused_and_told_they_are_read(tmp_path: Path):
    for name, line, options in (
        ("ppall", "files of 2 ranks: give --pipeline-stages", {}),
        ("capacity", "no call of a router: .* capacity factor", {}),
        ("tpe", "does not say how many experts each token uses", {}),
        ("tpe", "counts 2 of 8 experts: give the files of all ranks", {"top_k": 1}),
    ):
        refused(tmp_path, line, MEGATRON / name, **options)
    trace, said = taken(tmp_path, MEGATRON / "tpe", experts=2, top_k=1)
    assert (said, [r.layer for r in trace.routers]) == ([], [3])
    assert loads(trace)[0].tolist() == [224, 144]
