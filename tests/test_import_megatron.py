"""Dumps of Megatron runs with pipeline parallelism: the stages' files become one trace, and what cannot be paired with certainty is one line."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace.importers.job import Job, Source
from moe_inspect.trace.importers.megatron import megatron
from moe_inspect.trace.importers.run import import_trace
from moe_inspect.trace.reader import Trace
from tests.foreign import MAKERS, E, config_file, drawn, lines, megatron_rank, router_logits

Passes = list[tuple[int, list[np.ndarray]]]  # step, ids [T, K] of each layer


def passes_of(layers: int, micro: int = 2, steps: int = 2, T: int = 6, seed: int = 0) -> Passes:
    return [(step, drawn(T, 1000 * seed + 10 * step + m, layers)) for step in range(steps) for m in range(micro)]


def dump(root: Path, columns: list[Passes], stages: list[list[int]], logits: bool = True) -> Path:
    """Columns of passes over stages of layers: rank = stage · columns + column, as Megatron numbers them."""
    root.mkdir(exist_ok=True)
    for stage, layers in enumerate(stages):
        for c, passes in enumerate(columns):
            megatron_rank(root, stage * len(columns) + c, [(s, {i: ids[i] for i in layers}) for s, ids in passes], logits)
    return root


def changed(path: Path, change: Callable[[list[dict]], list[dict] | None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    new = change(rows)
    lines(path, rows if new is None else new)


def taken(root: Path, *sources: str | Path, **options) -> tuple[Trace, list[str]]:
    said: list[str] = []
    return import_trace("megatron", list(sources), root / "t", warn=said.append, **options), said


def decisions(trace: Trace, router: int) -> np.ndarray:
    table = trace.routing(router=router)
    return table[[c for c in table if c.startswith("expert_")]].to_numpy()


def whole(columns: list[Passes], layer: int) -> np.ndarray:
    return np.concatenate([ids[layer] for passes in columns for _, ids in passes])


def refused(root: Path, *sources: str | Path, match: str, **options) -> None:
    with pytest.raises(MoeInspectError, match=match) as raised:
        taken(root, *sources, **options)
    assert "\n" not in str(raised.value)
    assert not (root / "t").exists()


def test_ranks_are_paired_by_number_not_by_name(tmp_path: Path):
    """Rank 10 sorts before rank 2: twelve ranks of two stages, every token's experts at every layer."""
    columns = [passes_of(4, seed=c) for c in range(6)]
    trace, said = taken(tmp_path, dump(tmp_path / "in", columns, [[0, 1], [2, 3]]))
    assert said == []
    assert [r.layer for r in trace.routers] == [0, 1, 2, 3]
    for layer in range(4):
        assert np.array_equal(decisions(trace, layer), whole(columns, layer))
    assert trace.tokens()["batch"].tolist() == ([0] * 12 + [1] * 12) * 6
    assert trace.documents()["source"].tolist()[:2] == ["router_trace_rank0.jsonl step 0 rank 0"] * 2
    assert any("2 pipeline stages" in note and "(0 + 6, 1 + 7, 2 + 8, …)" in note for note in trace.manifest["corpus"]["notes"])
    found = np.stack(trace.logits(layer=3)["logits"].to_list())[:6]
    assert np.abs(found - router_logits(3, whole(columns, 3)[:6])).max() < 0.02


def test_one_stage_has_no_note_of_stages(tmp_path: Path):
    trace, _ = taken(tmp_path, MAKERS["megatron"](tmp_path).source)
    assert not any("stages" in note for note in trace.manifest["corpus"]["notes"])


def test_tensor_parallel_ranks_are_taken_once_where_all_stages_agree(tmp_path: Path):
    first = passes_of(2)
    half = [(s, [ids[0], drawn(6, 99 + i, 1)[0]]) for i, (s, ids) in enumerate(first)]  # alike at stage 0 alone: another column
    trace, said = taken(tmp_path, dump(tmp_path / "in", [first, first, half], [[0], [1]]))
    assert [line for line in said if "tensor parallelism" in line] == said
    assert said[0].startswith("4 passes")
    assert np.array_equal(decisions(trace, 1), whole([first, half], 1))


def test_recomputed_passes_are_left_out_before_stages_are_paired(tmp_path: Path):
    """1F1B: the first stage meets forward 0, forward 1, again 0, again 1; the last one forward 0, again 0, forward 1, again 1."""
    (_, a), (_, b) = passes_of(4, steps=1)
    place = tmp_path / "in"
    place.mkdir()
    backwards = lambda ids, i, j: {j: ids[j], i: ids[i]}  # noqa: E731
    megatron_rank(place, 0, [(0, {0: a[0], 1: a[1]}), (0, {0: b[0], 1: b[1]}), (0, backwards(a, 0, 1)), (0, backwards(b, 0, 1))])
    megatron_rank(place, 1, [(0, {2: a[2], 3: a[3]}), (0, backwards(a, 2, 3)), (0, {2: b[2], 3: b[3]}), (0, backwards(b, 2, 3))])
    trace, said = taken(tmp_path, place)
    for layer in range(4):
        assert np.array_equal(decisions(trace, layer), np.concatenate([a[layer], b[layer]]))
    assert said == ["4 passes repeat one of the same rank and step (activations recomputed): each is taken once"]


def test_stages_with_the_block_of_multi_token_prediction(tmp_path: Path):
    columns = [passes_of(3)]
    place = dump(tmp_path / "in", columns, [[0], [1, 2]], logits=False)
    for row in (rows := [json.loads(line) for line in (place / "router_trace_rank1.jsonl").read_text().splitlines()]):
        row |= {"block": "mtp", "mtp_idx": 0, "layer": 1} if row["layer"] == 3 else {}
    lines(place / "router_trace_rank1.jsonl", rows)
    trace, _ = taken(tmp_path, place, experts=E)
    assert [(r.layer, r.path) for r in trace.routers] == [(0, "layers.0"), (1, "layers.1"), (2, "mtp.0.layers.0")]
    assert np.array_equal(decisions(trace, 2), whole(columns, 2))


def test_runs_of_two_labels_are_paired_apart(tmp_path: Path):
    runs = {label: [passes_of(2, seed=i)] for i, label in enumerate("ab")}
    places = [f"{label}={dump(tmp_path / label, columns, [[0], [1]])}" for label, columns in runs.items()]
    trace, _ = taken(tmp_path, *places)
    assert np.array_equal(decisions(trace, 1), whole([columns[0] for columns in runs.values()], 1))
    refused(
        tmp_path / "x",
        tmp_path / "a",
        tmp_path / "b",
        match=r"a/router_trace_rank0.jsonl and .*b/router_trace_rank0.jsonl are both of rank 0",
    )


def test_a_missing_rank_is_named_by_its_stage(tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(4, seed=c) for c in range(2)], [[0, 1], [2, 3]])
    (place / "router_trace_rank3.jsonl").unlink()
    line = r"2 of layers 1, 2, as in .*rank0\.jsonl; 1 of layers 3, 4, as in .*rank2\.jsonl: give the files of all ranks"
    refused(tmp_path, place, match=line)


def test_a_missing_stage_is_named_where_the_config_says_so(tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(3)], [[1], [2]])
    assert taken(tmp_path / "x", place, model=config_file(tmp_path))[0].n_tokens == 24
    (place / "router_trace_rank1.jsonl").unlink()
    refused(tmp_path, place, match=r"layers 2 \(from 0\) have experts in the config and are in no file", model=tmp_path / "model.json")


def test_numbers_from_zero_are_known_by_the_config(tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(3)], [[1, 2]])
    changed(place / "router_trace_rank0.jsonl", lambda rows: [row | {"layer": row["layer"] - 1} for row in rows])
    trace, said = taken(tmp_path, place, model=config_file(tmp_path))
    assert ([r.layer for r in trace.routers], said) == ([1, 2], [])


@pytest.mark.parametrize(
    ("stages", "shift", "line"),
    [
        ([[0, 1], [1, 2]], 0, r"rank1\.jsonl has layer 2 and so has .*rank0\.jsonl"),
        ([[0, 1, 2], [1, 2]], 0, r"rank1\.jsonl has layer 2 and so has .*rank0\.jsonl"),
        ([[1, 2], [3, 4, 5]], 3, "does each stage number its layers from 0"),  # in numbers of their own 2, 3 and 1, 2, 3
        ([[2, 3], [4, 5]], 4, "rank 1 with layers 1, 2, .* of 0 with layers 3, 4: later pipeline stages have higher ranks"),
    ],
)
def test_stages_that_overlap_are_refused(stages: list[list[int]], shift: int, line: str, tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(6)], stages)
    changed(place / "router_trace_rank1.jsonl", lambda rows: [row | {"layer": row["layer"] - shift} for row in rows])
    refused(tmp_path, place, match=line)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda rows: rows[:-1], r"rank0.jsonl line 4: step 1 with 6 tokens, .*rank1.jsonl: no further pass"),
        (lambda rows: rows[:1] + rows[2:], r"rank0.jsonl line 2: step 0 with 6 tokens, .*rank1.jsonl line 2: step 1 with 6 tokens"),
        (
            lambda rows: [rows[0] | {"top_indices": rows[0]["top_indices"][::-1]}, *rows],
            r"rank0.jsonl line 3: step 1 with 6 tokens, .*rank1.jsonl line 3: step 0 with 6 tokens",
        ),
        (lambda rows: [r | {"step": r["step"] + 1} for r in rows], r"step 0 with 6 tokens, .*step 1 with 6 tokens"),
        (
            lambda rows: [*rows[:3], rows[3] | {"num_tokens": 5, "top_indices": rows[3]["top_indices"][:5]}],
            r"rank0.jsonl line 4: step 1 with 6 tokens, .*rank1.jsonl line 4: step 1 with 5 tokens: are both files whole",
        ),
        (lambda rows: [*rows[:2], rows[2] | {"rank": 3}, rows[3]], "step 1 of rank 3 in a file of rank 1"),
        (lambda rows: [r | {"topk": 1, "top_indices": [t[:1] for t in r["top_indices"]]} for r in rows], "topk is 1, 2 in the first pass"),
        (lambda rows: [r | {"logit_shape": [6, E + 1]} for r in rows], rf"logit_shape is \[6, {E + 1}\], not \[6, {E}\]"),
        (lambda rows: [{k: v for k, v in r.items() if "logit" not in k} for r in rows], "rank1.jsonl line 1 has no logits, .* has"),
    ],
)
def test_stages_that_disagree_are_refused(spoil: Callable, line: str, tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(2)], [[0], [1]])
    changed(place / "router_trace_rank1.jsonl", spoil)
    refused(tmp_path, place, match=line)
    refused(tmp_path, place / "router_trace_rank1.jsonl", place / "router_trace_rank0.jsonl", match=".")


def interleaved(place: Path, group: int, rank_layers: list[list[list[int]]], passes: Passes, together: bool = False) -> None:
    """Each rank's chunks of layers, called for `group` microbatches of a step in turn."""
    place.mkdir()
    for rank, chunks in enumerate(rank_layers):
        calls = []
        for step in sorted({s for s, _ in passes}):
            of_step = [ids for s, ids in passes if s == step]
            for first in range(0, len(of_step), group):
                calls += [(step, {i: ids[i] for i in chunk}) for chunk in chunks for ids in of_step[first : first + group]]
        megatron_rank(place, rank, calls)


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("layers", [[[[0], [2]], [[1], [3]]], [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]])
def test_interleaved_stages_are_refused(layers: list[list[list[int]]], micro: int, tmp_path: Path):
    interleaved(tmp_path / "in", 2, layers, passes_of(8, micro))
    refused(tmp_path, tmp_path / "in", match="the first pass does not agree: .* interleaved pipeline stages, which cannot be told apart")


def test_interleaved_stages_of_one_microbatch_at_a_time_are_whole_passes(tmp_path: Path):
    passes = passes_of(4)
    interleaved(tmp_path / "in", 1, [[[0], [2]], [[1], [3]]], passes)
    trace, _ = taken(tmp_path, tmp_path / "in")
    for layer in range(4):
        assert np.array_equal(decisions(trace, layer), whole([passes], layer))


def test_calls_of_two_passes_in_one_are_refused(tmp_path: Path):
    place = dump(tmp_path / "in", [passes_of(4)], [[0, 1], [2, 3]])
    changed(place / "router_trace_rank1.jsonl", lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]])
    refused(tmp_path, place, match=r"line 5: step 1 of rank 1 calls its routers in another order than the first pass")


def test_progress_is_told_of_every_byte_once(tmp_path: Path):
    for name in ("megatron", "megatron-pipeline"):
        (place := tmp_path / name).mkdir()
        MAKERS[name](place)
        told: list[int] = []
        job = Job([Source(place, None)], read=told.append)
        assert sum(1 for _ in megatron(job).batches) == {"megatron": 4, "megatron-pipeline": 8}[name]
        assert sum(told) == sum(p.stat().st_size for p in place.glob("*.jsonl"))


def test_a_dump_of_many_steps_is_read_a_pass_at_a_time(tmp_path: Path):
    def peak(steps: int) -> int:
        place = dump(tmp_path / f"in{steps}", [passes_of(2, steps=steps, T=400)], [[0], [1]], logits=False)
        tracemalloc.start()
        for _ in megatron(Job([Source(place, None)], experts=E)).batches:
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(20) < 1.5 * peak(4)
