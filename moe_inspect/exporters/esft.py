"""ESFT: expert weights, scores and training configuration of each domain.

T tokens, K slots, E experts, S sequences.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.analysis.metrics.worth import gate_score, token_score
from moe_inspect.analysis.scores import ALL, scores_of
from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters import need_decisions
from moe_inspect.text import no_such
from moe_inspect.trace.files.atomic import draft_folder_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.shard import Shard

# the scores that ESFT has, by their names here; "token" is its own name of the first
OF_ESFT = {"frequency": "token", "token": "token", "gate": "gate"}
Scores = dict[str, dict[str, float]]  # layer → expert → score


def esft(
    trace: Trace,
    output: Path,
    top_p: float = 0.2,
    by: str = "frequency",
    weights: str | Path | None = None,
    losses: str | Path | None = None,
) -> None:
    """DIR/<domain>/: rank_0/expert_weights_<layer>.txt, one line per sequence (and shard), which
    ESFT's generate_expert_config.py reads; summary.json, the scores; expert_cfg.json, the experts
    to train, which its train.py takes as --expert_config."""
    if not 0 < top_p <= 1:
        raise MoeInspectError(f"--top-p is {top_p:g}: give a share above 0, at most 1")
    if by not in (*ALL, *OF_ESFT):
        raise MoeInspectError(no_such("score", by, ALL))
    need_decisions(trace, "esft")
    layers = {router.layer for router in trace.routers if not router.stack}
    if not trace.has_weights or len(layers) < len(trace.routers):
        raise MoeInspectError(
            "ESFT's text has the gate weights of one router per layer: this trace has others, "
            "or none"
        )
    if output.exists():
        raise MoeInspectError(f"there is something at {output}: give a new folder")
    others = None
    if by not in OF_ESFT or weights is not None or losses is not None:
        others = scores_of(trace, by, weights=weights, losses=losses)
    with draft_folder_of(output) as (draft, _):
        folders: dict[str, Path] = {}
        for shard in trace.shards:
            _esft_shard(shard, draft, folders)
        counted = count_trace(trace, select(trace))
        for domain, folder in folders.items():
            scores = _scores(trace, counted, counted.domains.index(domain))
            name = f"{OF_ESFT.get(by, by)}_scores"
            if others is not None:
                scores[name] = _by_layer(trace, others.of_domain(domain))
            (folder / "summary.json").write_text(json.dumps(scores))
            (folder / "expert_cfg.json").write_text(json.dumps(_config(scores[name], top_p)))


def _esft_shard(shard: Shard, root: Path, folders: dict[str, Path]) -> None:
    tokens = shard.tokens(["sequence", "domain"])
    sequence_T, domain_T = tokens["sequence"].to_numpy(), tokens["domain"].to_pylist()
    code_T, _ = pd.factorize(sequence_T)  # in the order of their first tokens
    _, first_S, size_S = np.unique(code_T, return_index=True, return_counts=True)
    order_T = np.argsort(code_T, kind="stable")
    folder_S = [_folder(domain_T[t], root, folders) for t in first_S]
    for folder in set(folder_S):
        (folder / "rank_0").mkdir(parents=True, exist_ok=True)
    for r, router in enumerate(shard.trace.routers):
        ids_TK, weights_TK = shard.ids(r)[order_T], shard.weights(r)[order_T]
        if (ids_TK < 0).any():
            raise MoeInspectError(f"ESFT's text has no empty slots: layer {router.layer} has some")
        sizes_S = size_S * router.top_k
        ids_S, weights_S = (_joined(of_TK.reshape(-1), sizes_S) for of_TK in (ids_TK, weights_TK))
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


def _folder(domain: str, root: Path, folders: dict[str, Path]) -> Path:
    """A domain's folder: its label, without what a path cannot hold."""
    if domain not in folders:
        name = re.sub(r"[^\w.+ -]", "_", domain).lstrip(".")[:100] or "_"
        used = {path.name for path in folders.values()}
        folders[domain] = root / (name if name not in used else f"{name}_{len(used)}")
    return folders[domain]


def _config(scores: Scores, top_p: float) -> dict[str, object]:
    """Of each layer the experts with the highest scores, up to the share `top_p` of these."""
    experts: dict[str, list[int]] = {}
    for layer, of_expert in scores.items():
        # an expert without which the loss is less has a score below 0
        score_E = np.maximum(list(of_expert.values()), 0)
        best_E = np.argsort(-score_E, kind="stable")
        before_E = np.cumsum(score_E[best_E]) - score_E[best_E]
        # a sum that is top_p but for rounding is enough
        experts[layer] = best_E[before_E < top_p * score_E.sum() * (1 - 1e-9)].tolist()
    return {"experts": experts, "shared_experts": False, "non_expert_modules": False}


def _scores(trace: Trace, counted: Counts, d: int) -> dict[str, Scores]:
    """d: the domain."""
    token_LE = [token_score(counted.assignments_DE(r))[d] for r in counted.indices]
    sums = ((r, of.weight_sum_DE) for r, of in counted.of.items())
    gate_LE = [gate_score(of, counted.tokens_D_of(r))[d] for r, of in sums if of is not None]
    return {"token_scores": _by_layer(trace, token_LE), "gate_scores": _by_layer(trace, gate_LE)}


def _by_layer(trace: Trace, score_LE: list[np.ndarray]) -> Scores:
    return {
        str(router.layer): {str(e): value for e, value in enumerate(score_E.tolist())}
        for router, score_E in zip(trace.routers, score_LE, strict=True)
    }
