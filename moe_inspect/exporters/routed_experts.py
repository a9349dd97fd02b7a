"""The routed experts of each sequence, as vLLM returns them and reinforcement-learning stacks hand
them on.

T tokens of a shard, N of a sequence, B blocks of the model, K slots.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.exporters import need_decisions
from moe_inspect.text import storable
from moe_inspect.trace.files.atomic import draft_of
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.shard import Shard, codes


def routed_experts(trace: Trace, output: Path) -> None:
    """JSONL: a line per sequence with `prompt_token_ids`, `token_ids` (generated), `document`,
    `domain` and `routed_experts`, the base64 of a .npy [tokens − 1, blocks, k]: as an engine has
    them, the last token has no row, dense blocks are zeros; slots that routed nowhere are −1. To
    replay the routing elsewhere; `import vllm-routed` reads it back."""
    need_decisions(trace, "routed-experts")
    if len({r.layer for r in trace.routers}) < len(trace.routers) or trace.routers[0].stack:
        raise MoeInspectError(
            "routed-experts needs one router per layer that sees every token: this model differs"
        )
    if len({r.top_k for r in trace.routers}) > 1:
        raise MoeInspectError("routed-experts needs the same k in every layer: this model differs")
    with draft_of(output) as draft, open(draft, "w", encoding="utf-8") as file:
        for shard in trace.shards:
            for line in _sequences(trace, shard):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _sequences(trace: Trace, shard: Shard) -> Iterator[dict[str, object]]:
    names = ("document", "sequence", "position", "token_id", "domain", "phase")
    table = shard.tokens([*names])
    document_T, sequence_T, position_T, id_T = (table[name].to_numpy() for name in names[:4])
    domain_T, domains = codes(table["domain"])
    phase_T, phases = codes(table["phase"])
    decoded_T = np.array([phase == "decode" for phase in phases], bool)[phase_T]
    routed_TBK = _routed(trace, shard, len(table))
    order_T = np.lexsort([position_T, sequence_T, document_T])
    edges = run_edges(document_T[order_T], sequence_T[order_T])
    for first, end in itertools.pairwise(edges.tolist()):
        rows_N, t = order_T[first:end], order_T[first]
        line: dict[str, object] = {
            "document": int(document_T[t]),
            "sequence": int(sequence_T[t]),
            "domain": storable(domains[domain_T[t]]),
        }
        if (id_T[rows_N] >= 0).all():
            line["prompt_token_ids"] = id_T[rows_N[~decoded_T[rows_N]]].tolist()
            line["token_ids"] = id_T[rows_N[decoded_T[rows_N]]].tolist()
        file = io.BytesIO()
        # without the last token, which an engine samples and never feeds
        np.save(file, routed_TBK[rows_N[:-1]], allow_pickle=False)
        yield line | {"routed_experts": base64.b64encode(file.getvalue()).decode()}


def _routed(trace: Trace, shard: Shard, T: int) -> np.ndarray:
    """[T, B, K], in the smallest type that holds it."""
    E, K = max(r.experts for r in trace.routers), trace.routers[0].top_k
    ids = [shard.ids(r) for r in range(len(trace.routers))]
    nowhere = any((ids_TK < 0).any() for ids_TK in ids)
    dtype = np.int16 if nowhere else np.uint8 if E <= 256 else np.uint16
    routed_TBK = np.zeros((T, trace.blocks, K), dtype)
    for router, ids_TK in zip(trace.routers, ids, strict=True):
        routed_TBK[:, router.layer] = ids_TK
    return routed_TBK
