"""Written traces of every odd kind, for tests that compute a table once more from its rows:

    @on_generated()
    def test_the_table_is_what_its_formulas_give(kind: Kind) -> None:
        root = written(kind)  # the folder of a trace
        rows = decisions(root)  # a row per router, token and slot, through pandas alone

`ODD` has one kind of each oddity, which every run sees; `generated()` draws mixtures of them.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import Document, RoutedBatch, ShardLimits, TraceWriter

FOLDER = tempfile.TemporaryDirectory(prefix="generated-")  # removed when the process ends
SHAPES = (((8, 2),) * 3, ((4, 1), (12, 3)), ((300, 2), (6, 5), (8, 2)), ((2, 1),))


@dataclass(frozen=True)
class Kind:
    seed: int = 0
    shape: tuple[tuple[int, int], ...] = SHAPES[0]  # experts and top-k of each router
    lengths: tuple[int, ...] = (40, 7, 90, 1, 33, 64)  # tokens of each document
    domains: int = 2
    empty: float = 0.0  # share of the slots that routed nowhere
    dropped: bool = False  # by capacity: the trace names the experts that dropped them
    unnamed: float = 0.0  # but for this share of them
    weights: bool = True
    ordered: bool = True  # without weights: whether slot 0 is the first choice
    logits: bool = False
    norms: bool = False  # of the experts' outputs
    answers: float = 0.0  # share of each sequence that was generated, a token per pass
    shard_tokens: int = 1_000  # a shard holds whole sequences
    taste: float = 0.7  # of a document for some experts
    run: int = 0  # another one chooses anew for the same text
    changed: float = 0.0  # share of the decisions that another run of this text made otherwise


@cache
def written(kind: Kind) -> Path:
    """Folder of a trace. Two documents go through a pass together; those of 60 tokens or more are
    two sequences."""
    rng, rows = np.random.default_rng(kind.seed), []
    for d, tokens in enumerate(kind.lengths):
        cut = tokens // 2 if tokens >= 60 else tokens
        for s, length in enumerate((cut, tokens - cut)):
            prompt = max(1, round(length * (1 - kind.answers)))
            rows += [(d // 2, max(0, p - prompt + 1), d, 2 * d + s, p) for p in range(length)]
    request, step, document, sequence, position = np.array(sorted(rows)).T
    numbers = np.unique(np.stack([request, step]), axis=1, return_inverse=True)[1]
    T, labels = len(step), [f"domain {d}" for d in range(kind.domains)]
    columns = rng.integers(0, 12, T), document, sequence, position, document % kind.domains
    rng = np.random.default_rng([kind.seed, kind.run]) if kind.run else rng
    choices = [_choices(rng, E, k, document, kind) for E, k in kind.shape]
    known = "weight" if kind.ordered or kind.weights else "unknown"
    scoring = ("softmax", "sigmoid", "")
    routers = [
        Router(2 * r, "gate", f"layers.{2 * r}", E, k, scoring[r], slot_order=known)
        for r, (E, k) in enumerate(kind.shape)
    ]
    capture = {"mode": "tap", **({"drops": True} if kind.dropped else {})}
    root = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "t"
    words = pa.table({"token_id": range(12), "token": [f" w{i}" for i in range(12)]})
    options: dict[str, Any] = {"vocabulary": words, "limits": ShardLimits(kind.shard_tokens)}
    options |= {name: getattr(kind, name) for name in ("weights", "logits", "norms")}
    options["dropped_experts"] = kind.dropped
    norms = [rng.integers(1, 256, ids.shape).astype(np.float32) for ids, *_ in choices]
    other = np.random.default_rng([kind.seed, 1])
    for (E, k), decided, norm in zip(kind.shape, choices, norms, strict=True):
        [at] = np.nonzero(other.random(T) < kind.changed)
        for kept, now in zip(decided, _choices(other, E, k, document, kind, 3), strict=True):
            kept[at] = now[at]
        norm[at] = other.integers(1, 256, norm[at].shape)
    extras = {"logits": [of for *_, of in choices], "norms": norms}
    extras = {name: of for name, of in extras.items() if options[name]}
    fed = Counter(document[step == 0].tolist())  # of each document, its prompts
    with TraceWriter(root, {"model": {"id": "made"}, "capture": capture}, routers, **options) as to:
        for batch in range(1 + numbers[-1]):
            [at] = np.nonzero(numbers == batch)
            new = sorted({*document[at].tolist()} - {*document[: at[0]].tolist()})
            one = RoutedBatch(
                batch,
                *(column[at].astype(np.int32) for column in columns),
                labels,
                [ids[at] for ids, *_ in choices],
                [weights[at] for _, weights, _ in choices] if kind.weights else None,
                [Document(d, labels[d % kind.domains], "made", fed[d]) for d in new],
                phase="decode" if step[at[0]] else "prefill",
                extras={name: [a[at] for a in of] for name, of in extras.items()},
            )
            to.write(one)
    return root


def _choices(
    rng: np.random.Generator, E: int, k: int, document: np.ndarray, kind: Kind, lean: float = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids as the writer takes them, weights and logits, with a taste of each document. lean: of all
    documents towards the last experts."""
    taste = rng.gumbel(size=(1 + document.max(), E)) * kind.taste + lean * np.arange(E) / E
    logits = (taste[document] + rng.gumbel(size=(len(document), E))).astype(np.float16)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    lost = np.sort(rng.random(ids.shape) < kind.empty, axis=1)  # the last slots of a token
    nowhere = ids + E if kind.dropped else np.iinfo(np.uint16).max
    if kind.unnamed:
        nowhere = np.where(rng.random(ids.shape) < kind.unnamed, np.iinfo(np.uint16).max, nowhere)
    weights = np.sort(rng.integers(1, 64, ids.shape) / 64, axis=1)[:, ::-1]
    weights = np.where(lost, 0, weights).astype(np.float32)
    return np.where(lost, nowhere, ids).astype(np.uint16), weights, logits


ODD = {
    "uneven documents": Kind(),
    "one token": Kind(lengths=(1,), domains=1),
    "many documents": Kind(lengths=tuple(range(1, 60, 3)), norms=True, logits=True),
    "documents alike": Kind(lengths=(25,) * 14, taste=0.0, weights=False),
    "one document": Kind(lengths=(120,), domains=1, shape=SHAPES[3]),
    "dropped slots": Kind(empty=0.2, dropped=True, logits=True, norms=True),
    "empty slots, several shards": Kind(empty=0.3, shard_tokens=50, answers=0.3),
    "no weights": Kind(weights=False, shape=SHAPES[1], domains=3),
    "slots in no order": Kind(weights=False, ordered=False, empty=0.1, domains=3),
    "mixed routers": Kind(shape=SHAPES[2], answers=0.4, logits=True, shard_tokens=90),
}


def generated() -> st.SearchStrategy[Kind]:
    flags = "dropped", "weights", "ordered", "logits", "norms"
    kinds: dict[str, Any] = dict.fromkeys(flags, st.booleans())
    kinds |= dict.fromkeys(("empty", "answers"), st.sampled_from((0.0, 0.15, 0.6)))
    kinds["lengths"] = st.lists(st.integers(1, 90), min_size=1, max_size=14).map(tuple)
    kinds |= {"domains": st.integers(1, 3), "shard_tokens": st.sampled_from((30, 100, 1_000))}
    kinds |= {"seed": st.integers(0, 9), "shape": st.sampled_from(SHAPES)}
    return st.builds(Kind, **kinds)


def on_generated(most: int = 6) -> Callable[[Any], Any]:
    """Runs a test, which takes `kind`, on every odd one and on `most` that are drawn."""

    def decorated(test: Any) -> Any:
        for kind in ODD.values():
            test = example(kind=kind)(test)
        phases = (
            Phase.explicit,
            Phase.generate,
        )  # without shrinking: the kinds are small
        few = settings(
            max_examples=most, derandomize=True, deadline=None, database=None, phases=phases
        )
        return few(given(kind=generated())(test))

    return decorated


def decisions(root: Path) -> pd.DataFrame:
    """A row per router, token and slot of its own top-k, in this order. `routed`: false where the
    slot routed nowhere, `expert` is −1 then. `dropped`: whether capacity dropped it,
    `dropped_expert`: which one's, −1 if none or unknown. `weight`: NaN if empty or not recorded.
    `first`: whether it is the first choice, false where that is unknown."""
    stated, parts = json.loads((root / "trace.json").read_text()), []
    for line in committed(root, "routing"):
        tokens = pd.read_parquet(root / line["path"].replace("routing", "tokens", 1))
        rows = pd.read_parquet(root / line["path"]).merge(tokens, on="token")
        parts.append(rows.assign(shard=line["shard"]))
    names, keys = ["expert", "weight", "norm", "dropped_expert"], ["router", "token"]
    slots = pd.wide_to_long(pd.concat(parts), names, keys, "slot", sep="_").reset_index()
    routers = pd.DataFrame(stated["routers"]).rename_axis("router").reset_index()
    order = routers["slot_order"] if "slot_order" in routers else pd.Series("", routers.index)
    table = slots.merge(routers[["router", "experts", "top_k"]]).query("slot < top_k")
    table = table.reindex(columns=[*table, *{*names} - {*table}])
    unsorted = ~order.isin(["weight", "unknown"]).to_numpy()[table["router"]]
    table["key"] = np.where(unsorted, -table["weight"], 0)  # NaN, of an empty slot, comes last
    table = table.sort_values([*keys, "key", "slot"], ignore_index=True).drop(columns="key")
    table["slot"] = table.groupby(keys).cumcount()
    for name in ("expert", "dropped_expert"):
        table[name] = table[name].fillna(-1).astype(int)
    table["routed"] = table["expert"] >= 0
    table["dropped"] = ~table["routed"] & bool(stated["capture"].get("drops"))
    known = (order == "weight") | (order == "") & bool(stated["capture"]["weights"])
    table["first"] = (table["slot"] == 0) & table["routed"] & known.to_numpy()[table["router"]]
    return table.astype({"domain": str, "phase": str, "router": int, "layer": int, "weight": float})


def committed(root: Path, table: str) -> list[dict[str, Any]]:
    """The lines of its files in the lists of shards."""
    text = "".join(path.read_text() for path in sorted(root.glob("shards-*.jsonl")))
    return [line for line in map(json.loads, text.splitlines()) if line["table"] == table]


def logits_of(root: Path) -> dict[Any, np.ndarray]:
    """Logits of each router [T, E], of a trace that has them."""
    rows = pd.concat(pd.read_parquet(root / line["path"]) for line in committed(root, "logits"))
    routers = json.loads((root / "trace.json").read_text())["routers"]
    lists: dict[Any, list[np.ndarray]] = rows.groupby("router")["logits"].agg(list).to_dict()
    return {r: np.stack(of)[:, : routers[r]["experts"]].astype(float) for r, of in lists.items()}
