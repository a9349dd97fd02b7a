"""A trace → what other tools read, a shard and a router at a time.

T tokens, K slots, E experts, D domains, N assignments.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from moe_inspect.errors import MoeInspectError, writing
from moe_inspect.text import safe_cell
from moe_inspect.trace import schema
from moe_inspect.trace.reader import Shard, Trace

EXPORTS: dict[str, Callable[..., None]] = {}  # (trace, output, and the options of OPTIONS)
OPTIONS = {"top_p": "esft", "score": "esft", "safe_csv": "counts"}  # of which format each is
COUNTS = pa.schema(
    [
        ("layer", pa.int32()),
        ("router", pa.int32()),
        ("domain", pa.string()),
        ("expert", pa.int32()),
        ("count", pa.int64()),
        ("first_choice", pa.int64()),
        ("weight_sum", pa.float64()),
        ("experts", pa.int32()),
        ("top_k", pa.int32()),
    ]
)
SUMS = ("count", "first_choice", "weight_sum")
SCORES = ("token", "gate")  # of ESFT


def exporter(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(write: Callable[..., None]) -> Callable[..., None]:
        EXPORTS[name] = write
        return write

    return register


def export_trace(
    trace: str | Path | Trace,
    format: str,
    output: str | Path,
    *,
    top_p: float | None = None,
    score: str | None = None,
    safe_csv: bool = False,
) -> Path:
    """Writes a trace for another tool.

    format   sglang (logical_count for --init-expert-location, as .pt or .json), esft (a folder per
    domain), counts (.csv, .json or
             .parquet) or long-parquet (one row per assignment)
    top_p    esft: train the fewest experts of each layer whose scores sum to this share of the
    layer's (0.2) score    esft: "token" (share of the assignments, the default) or "gate" (share of
    the gate weight) safe_csv counts as .csv: a domain that a spreadsheet would take for a formula
    gets an apostrophe in front"""
    if format not in EXPORTS:
        raise MoeInspectError(f"no format {format!r}: there are {', '.join(EXPORTS)}")
    given = (("top_p", top_p), ("score", score), ("safe_csv", safe_csv or None))
    options = {name: value for name, value in given if value is not None}
    if wrong := [name for name in options if OPTIONS[name] != format]:
        raise MoeInspectError(
            f"--{wrong[0].replace('_', '-')} is an option of the format {OPTIONS[wrong[0]]}, not "
            f"of {format}"
        )
    opened = trace if isinstance(trace, Trace) else Trace(trace)
    output = Path(output)
    if isinstance(opened.path, Path) and output.resolve().is_relative_to(opened.path.resolve()):
        raise MoeInspectError(f"{output} is within the trace: write it elsewhere")
    with writing(output):
        EXPORTS[format](
            opened, output.resolve() if output.is_file() else output, **options
        )  # through a link, such as /dev/stdout
    return output


# --- counts


def _counts(trace: Trace) -> list[dict[str, dict[str, np.ndarray]]]:
    """Of each router: domain → column → [E]. weight_sum is missing without weights, first_choice
    where the source did not say."""
    made: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in trace.routers]
    for shard in trace.shards:
        for r, domain, sums in _counted(shard) if trace.counts_only else _summed(shard):
            total = made[r].setdefault(domain, {})
            for name, values_E in sums.items():
                total[name] = total[name] + values_E if name in total else values_E
    return made


def _summed(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    domain_T = np.array(shard.tokens(["domain"])["domain"].to_pylist(), object)
    labels, code_T = np.unique(domain_T.astype(str), return_inverse=True)
    for r, router in enumerate(shard.trace.routers):
        E, seen_T = router.experts, shard.seen(r)
        code = code_T if seen_T is None else code_T[seen_T]
        ids_TK = shard.ids(r).astype(np.int64)
        weights_TK = shard.weights(r) if shard.trace.has_weights else None
        cells_TK = code[:, None] * E + ids_TK
        there_TK = ids_TK >= 0

        def sums_of(cells: np.ndarray, weights: np.ndarray | None = None, E: int = E) -> np.ndarray:
            return np.bincount(cells, weights, len(labels) * E).reshape(-1, E)

        count_DE = sums_of(cells_TK[there_TK])
        first_DE = sums_of(cells_TK[:, 0][there_TK[:, 0]]) if router.first_choice_known else None
        weight_DE = (
            None if weights_TK is None else sums_of(cells_TK[there_TK], weights_TK[there_TK])
        )
        for d, label in enumerate(labels):
            made = {"count": count_DE, "first_choice": first_DE, "weight_sum": weight_DE}
            yield (
                r,
                str(label),
                {name: values_DE[d] for name, values_DE in made.items() if values_DE is not None},
            )


def _counted(shard: Shard) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
    table = shard.counts()
    router_N, expert_N = table["router"].to_numpy(), table["expert"].to_numpy()
    domain_N = np.array(table["domain"].to_pylist(), object)
    columns = {"count": "assignments", "first_choice": "first_choice", "weight_sum": "weight_sum"}
    there = {
        name: table[c].to_numpy()
        for name, c in columns.items()
        if c in table.column_names and not table[c].null_count
    }
    for r, router in enumerate(shard.trace.routers):
        known = {
            name: values
            for name, values in there.items()
            if name != "first_choice" or router.first_choice_known
        }
        for domain in dict.fromkeys(domain_N[router_N == r]):
            rows = (router_N == r) & (domain_N == domain)
            weigh = {
                name: np.bincount(expert_N[rows], values[rows], router.experts)
                for name, values in known.items()
            }
            yield (
                r,
                domain,
                {n: v if n == "weight_sum" else v.astype(np.int64) for n, v in weigh.items()},
            )


@exporter("counts")
def counts(trace: Trace, output: Path, safe_csv: bool = False) -> None:
    """A row an expert, router and domain, also of experts without load: what pruning by use or by
    gate weight starts from."""
    columns: dict[str, list[Any]] = {name: [] for name in COUNTS.names}
    for r, (router, of_domain) in enumerate(zip(trace.routers, _counts(trace), strict=True)):
        for domain, sums in sorted(of_domain.items()):
            fixed = {
                "layer": router.layer,
                "router": r,
                "domain": safe_cell(domain) if safe_csv and output.suffix == ".csv" else domain,
                "experts": router.experts,
                "top_k": router.top_k,
            }
            for name, value in fixed.items():
                columns[name] += [value] * router.experts
            columns["expert"] += range(router.experts)
            for name in SUMS:
                columns[name] += sums[name].tolist() if name in sums else [None] * router.experts
    table = pa.table(columns, schema=COUNTS)
    table = table.drop_columns(
        [n for n in ("first_choice", "weight_sum") if table[n].null_count == len(table)]
    )
    with schema.draft_of(output) as draft:
        if output.suffix == ".csv":
            with open(draft, "wb") as file:
                pyarrow.csv.write_csv(table, file)
        elif output.suffix == ".parquet":
            with open(draft, "wb") as file:
                pq.write_table(table, file, compression="zstd")
        elif output.suffix in (".json", ".jsonl"):
            draft.write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()),
                encoding="utf-8",
            )
        else:
            raise MoeInspectError(f"-o {output}: counts are written as .csv, .json or .parquet")


@exporter("sglang")
def sglang(trace: Trace, output: Path) -> None:
    """logical_count, by which SGLang's --init-expert-location places replicas: int64 [1, layers,
    experts] as its recorder writes it (.pt, also for ktransformers), or [layers, experts] (.json).
    Their readers count every layer: dense ones are rows of zeros."""
    if output.suffix not in (".pt", ".json"):
        raise MoeInspectError(f"-o {output}: for SGLang the load is written as .pt or .json")
    sizes = {r.experts for r in trace.routers}
    if len(sizes) > 1 or len({r.layer for r in trace.routers}) < len(trace.routers):
        raise MoeInspectError(
            "SGLang places layers of one router and of as many experts each: this model has others"
        )
    config = trace.manifest.get("model", {}).get("config") or {}
    stated = next(
        (
            c["num_hidden_layers"]
            for c in (config, config.get("text_config") or {})
            if isinstance(c.get("num_hidden_layers"), int)
        ),
        0,
    )
    load_LE = np.zeros(
        (max(stated, max(r.layer for r in trace.routers) + 1), sizes.pop()), np.int64
    )
    for router, of_domain in zip(trace.routers, _counts(trace), strict=True):
        load_LE[router.layer] = sum(sums["count"] for sums in of_domain.values())
    data = (
        _pt(load_LE[None])
        if output.suffix == ".pt"
        else (json.dumps({"logical_count": load_LE.tolist()}) + "\n").encode()
    )
    with schema.draft_of(output) as draft:
        draft.write_bytes(data)


def _pt(count_1LE: np.ndarray) -> bytes:
    try:
        import torch
    except ImportError:
        raise MoeInspectError(
            "a .pt needs torch: pip install 'moe-inspect[trace]', or write it as .json"
        ) from None
    file = io.BytesIO()  # written in one go: torch has other errors for a full disk
    torch.save({"logical_count": torch.from_numpy(count_1LE)}, file)
    return file.getvalue()


# --- decisions


@exporter("esft")
def esft(trace: Trace, output: Path, top_p: float = 0.2, score: str = "token") -> None:
    """DIR/<domain>/: rank_0/expert_weights_<layer>.txt, one line per sequence (and shard), which
    ESFT's generate_expert_config.py reads; summary.json, the scores; expert_cfg.json, the experts
    to train, which its train.py takes as --expert_config."""
    if not 0 < top_p <= 1:
        raise MoeInspectError(f"--top-p is {top_p:g}, not over 0 and at most 1")
    if score not in SCORES:
        raise MoeInspectError(f"no score {score!r}: there are {', '.join(SCORES)}")
    _need_decisions(trace, "esft")
    if (
        not trace.has_weights
        or len({r.layer for r in trace.routers}) < len(trace.routers)
        or any(r.stack for r in trace.routers)
    ):
        raise MoeInspectError(
            "ESFT's text has the gate weights of one router a layer: this trace has others, or none"
        )
    if output.exists():
        raise MoeInspectError(f"there is something at {output}: give a new folder")
    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        folders: dict[str, Path] = {}
        for shard in trace.shards:
            _esft_shard(shard, draft, folders)
        counted = _counts(trace)
        for domain, folder in folders.items():
            scores = _scores(trace, counted, domain)
            (folder / "summary.json").write_text(json.dumps(scores))
            (folder / "expert_cfg.json").write_text(
                json.dumps(_config(scores[f"{score}_scores"], top_p))
            )
        os.replace(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _esft_shard(shard: Shard, root: Path, folders: dict[str, Path]) -> None:
    tokens = shard.tokens(["sequence", "domain"])
    sequence_T, domain_T = tokens["sequence"].to_numpy(), tokens["domain"].to_pylist()
    _, first, code_T = np.unique(sequence_T, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # in the order of their first tokens
    order_T = np.argsort(rank[code_T], kind="stable")
    size_S = np.bincount(rank[code_T], minlength=len(first))
    folder_S = [
        folders.setdefault(domain_T[t], root / _file_name(domain_T[t], folders))
        for t in np.sort(first)
    ]
    for folder in set(folder_S):
        (folder / "rank_0").mkdir(parents=True, exist_ok=True)
    for r, router in enumerate(shard.trace.routers):
        ids_TK, weights_TK = shard.ids(r)[order_T], shard.weights(r)[order_T]
        if (ids_TK < 0).any():
            raise MoeInspectError(f"ESFT's text has no empty slots: layer {router.layer} has some")
        ids_S, weights_S = (
            _joined(values_TK.reshape(-1), size_S * router.top_k)
            for values_TK in (ids_TK, weights_TK)
        )
        lines: dict[Path, list[str]] = defaultdict(list)
        for folder, ids, weights in zip(folder_S, ids_S, weights_S, strict=True):
            lines[folder].append(f"{ids}\t\t{weights}\n")
        for folder, text in lines.items():
            with open(folder / "rank_0" / f"expert_weights_{router.layer}.txt", "a") as file:
                file.writelines(text)


def _joined(values_N: np.ndarray, sizes_S: np.ndarray) -> list[str]:
    """The values of each sequence, tabs between them; floats as few digits as give them back."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes_S)]), pa.int32())
    text = pc.cast(pa.array(np.ascontiguousarray(values_N)), pa.string())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, text), "\t").to_pylist()  # pyright: ignore[reportAttributeAccessIssue]


def _file_name(domain: str, taken: dict[str, Path]) -> str:
    """A domain's folder: its label, without what a path cannot hold."""
    name = re.sub(r"[^\w.+ -]", "_", domain).lstrip(".")[:100] or "_"
    used = {p.name for p in taken.values()}
    return name if name not in used else f"{name}_{len(used)}"


def _config(scores: dict[str, dict[str, float]], top_p: float) -> dict[str, Any]:
    """ESFT's training configuration: of each layer the experts with the highest scores, until they
    have the share `top_p`."""
    experts: dict[str, list[int]] = {}
    for layer, of_expert in scores.items():
        score_E = np.array(list(of_expert.values()))
        best_E = np.argsort(-score_E, kind="stable")
        before_E = np.cumsum(score_E[best_E]) - score_E[best_E]
        experts[layer] = best_E[
            before_E < top_p * score_E.sum() * (1 - 1e-9)
        ].tolist()  # a sum that is top_p but for rounding is enough
    return {"experts": experts, "shared_experts": False, "non_expert_modules": False}


def _scores(
    trace: Trace, counted: list[dict[str, dict[str, np.ndarray]]], domain: str
) -> dict[str, Any]:
    """token_scores: share of the assignments; gate_scores: gate weight ÷ tokens."""
    scores: dict[str, Any] = {"token_scores": {}, "gate_scores": {}}
    for router, of_domain in zip(trace.routers, counted, strict=True):
        load_E, weight_E = of_domain[domain]["count"], of_domain[domain]["weight_sum"]
        tokens = load_E.sum() / router.top_k
        for name, values_E in (
            ("token_scores", load_E / load_E.sum()),
            ("gate_scores", weight_E / tokens),
        ):
            scores[name][str(router.layer)] = {str(e): float(v) for e, v in enumerate(values_E)}
    return scores


@exporter("long-parquet")
def long_parquet(trace: Trace, output: Path) -> None:
    """A row an assignment, with all that is known of its token: for a quick look in any tool, at
    several times the trace's size."""
    _need_decisions(trace, "long-parquet")
    facts = [f for f in schema.TOKENS if f.name != "token"]
    kinds = [
        ("token", pa.int64()),
        ("layer", pa.uint16()),
        ("router", pa.uint16()),
        ("slot", pa.uint16()),
        ("expert", pa.uint16()),
    ]
    columns = pa.schema(
        [*kinds, *([("weight", pa.float32())] if trace.has_weights else []), *facts]
    )
    with schema.draft_of(output) as draft, ExitStack() as stack:
        file = stack.enter_context(open(draft, "wb"))
        writer = stack.enter_context(
            pq.ParquetWriter(file, columns, compression="zstd", compression_level=1)
        )
        for shard in trace.shards:
            tokens = shard.tokens()
            for r, router in enumerate(trace.routers):
                seen_T = shard.seen(r)
                of_token = tokens if seen_T is None else tokens.filter(pa.array(seen_T))
                ids_TK = shard.ids(r)
                there_TK = ids_TK >= 0
                row_N, slot_N = np.nonzero(there_TK)
                part = of_token.take(pa.array(row_N))
                n = len(part)
                arrays = [
                    part["token"],
                    *(pa.array(np.full(n, v, np.uint16)) for v in (router.layer, r)),
                ]
                arrays += [
                    pa.array(slot_N.astype(np.uint16)),
                    pa.array(ids_TK[there_TK].astype(np.uint16)),
                ]
                arrays += [pa.array(shard.weights(r)[there_TK])] if trace.has_weights else []
                writer.write_table(
                    pa.Table.from_arrays([*arrays, *(part[f.name] for f in facts)], schema=columns)
                )


def _need_decisions(trace: Trace, format: str) -> None:
    if trace.counts_only:
        raise MoeInspectError(
            f"{trace.path} holds counts only, no decisions: {format} needs those; --format "
            "counts or sglang"
        )
