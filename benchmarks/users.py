"""`python -m benchmarks.users`: what commands cost as a user types them: CPU time, wall time and
peak memory of whole processes, imports included, beside DuckDB, Polars and what pyarrow takes to
read the same files. The processes of a case take turns; the least of some rounds counts, of two
rounds where a process takes over 15 CPU-seconds. `--against PATH`: a second checkout takes turns
too. Writes benchmarks/results/users-<machine>.json.

    python -m benchmarks.users [--case TEXT ...] [--rounds 5] [--against PATH] [--kept DIR]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import ROOT, in_a_process, machine, write_results, written

PASS = 8192  # tokens of a forward pass
WORDS = 5_000
LONG = 15.0  # CPU seconds of a process that runs only twice


@dataclass(frozen=True)
class Shape:
    """Of a made trace."""

    tokens: int
    layers: int = 48
    experts: int = 128
    top_k: int = 8
    per_document: int = 512
    domains: int = 8
    extras: bool = False  # logits and norms
    per_shard: int = 65_536
    seed: int = 0
    changed: float = 0.0  # share of decisions with another expert than with the same seed and 0

    @property
    def assignments(self) -> int:
        return self.tokens * self.layers * self.top_k


def of_assignments(count: float, **others: Any) -> Shape:
    return Shape(round(count / (48 * 8)), **others)


TRACES = {
    "1e7": of_assignments(1e7),
    "1e7 changed": of_assignments(1e7, changed=0.02),
    "1e8": of_assignments(1e8),
    "1e9": of_assignments(1e9),
    "8 domains": Shape(131_072, per_document=256),
    "500 domains": Shape(131_072, per_document=256, domains=500),
    "1e6 documents": Shape(8_000_000, layers=4, experts=32, top_k=2, per_document=8),
    "1 shard": Shape(26_000, per_document=52),
    "500 shards": Shape(26_000, per_document=52, per_shard=52),
    "5,000 shards": Shape(260_000, per_document=52, per_shard=52),
    "94 x 512": Shape(16_384, layers=94, experts=512, top_k=10),
    "1e6 tokens in a document": Shape(
        2**20, layers=16, experts=64, top_k=4, per_document=2**20, domains=1
    ),
    "k = 1": Shape(200_000, top_k=1),
    "logits, norms": Shape(65_536, layers=16, experts=64, extras=True),
}


def make(root: str, **shape: Any) -> None:
    """Writes a trace: experts of unlike popularity, tokens of unlike confidence, domains that
    prefer other experts."""
    import pyarrow as pa

    from moe_inspect.trace.schema import Router
    from moe_inspect.trace.writer import ShardLimits, TraceWriter

    made = Shape(**shape)
    routers = [
        Router(layer, "experts", f"layers.{layer}.mlp.experts", made.experts, made.top_k)
        for layer in range(made.layers)
    ]
    extras: dict[str, Any] = {"logits": True, "norms": True} if made.extras else {}
    words = pa.table(
        {
            "token_id": np.arange(WORDS, dtype=np.int32),
            "token": [f"{chr(97 + i % 26)}{i} " for i in range(WORDS)],
        }
    )
    with TraceWriter(
        root, {}, routers, vocabulary=words, limits=ShardLimits(made.per_shard), **extras
    ) as writer:
        for batch in batches(made):
            writer.write(batch)


def batches(made: Shape) -> Iterator[Any]:
    from moe_inspect.trace.writer import Document, RoutedBatch

    rng, chance = np.random.default_rng(made.seed), np.random.default_rng(99)
    E, k, size = made.experts, made.top_k, min(PASS, made.per_shard)
    popular_E, preferred_DE = rng.normal(0, 0.35, E), rng.normal(0, 0.2, (made.domains, E))
    codes = [f"domain {d}" for d in range(made.domains)]
    for n, first in enumerate(range(0, made.tokens, size)):
        token_T = np.arange(first, min(first + size, made.tokens))
        document_T, position_T = np.divmod(token_T, made.per_document)
        domain_T = document_T % made.domains
        spread_T = rng.uniform(0.7, 1.6, (len(token_T), 1))
        drawn_TE = (
            popular_E + preferred_DE[domain_T] + rng.gumbel(0, 1, (len(token_T), E)) * spread_T
        )
        top_TK = np.argpartition(-drawn_TE, min(k, E - 1), 1)[:, :k]
        top_TK = np.take_along_axis(
            top_TK, np.argsort(-np.take_along_axis(drawn_TE, top_TK, 1), 1), 1
        )
        chosen_TK = np.exp(np.take_along_axis(drawn_TE, top_TK, 1))
        weight_TK = (chosen_TK / chosen_TK.sum(1, keepdims=True)).astype(np.float16)
        ids, weights = [], []
        dtype = np.uint8 if E < 256 else np.uint16
        for layer in range(made.layers):
            order = rng.permutation(len(token_T))  # no layer is a copy of another
            ids_TK = ((top_TK[order] + 7 * layer) % E).astype(dtype)
            if made.changed:
                other_T = chance.random(len(token_T)) < made.changed
                unused = (ids_TK[other_T, -1].astype(int) + 1) % E
                taken = (ids_TK[other_T, :-1] == unused[:, None]).any(1)
                ids_TK[np.flatnonzero(other_T)[~taken], -1] = unused[~taken]
            ids.append(ids_TK)
            weights.append(weight_TK[order])
        extras: dict[str, Any] = {}
        if made.extras:
            extras["extras"] = {
                "logits": [drawn_TE.astype(np.float16)] * made.layers,
                "norms": [np.abs(w) + np.float16(1) for w in weights],
            }
        begun = np.unique(document_T[position_T == 0])
        yield RoutedBatch(
            n,
            (rng.zipf(1.3, len(token_T)) % WORDS).astype(np.int32),
            document_T.astype(np.int32),
            document_T.astype(np.int32),
            position_T.astype(np.int32),
            domain_T.astype(np.int32),
            codes,
            ids,
            weights,
            documents=[
                Document(int(d), codes[d % made.domains], "made", made.per_document) for d in begun
            ],
            **extras,
        )


# The same answers by others. {a} and {b} are traces, {k} their slots. One thread each. "load": the
# assignments alone; "load's columns": also first choices and weights, which the table `load` has
# (and of which `balance` has the weights).

POLARS = """
import polars as pl
slots = [f"expert_{{j}}" for j in range({k})]
def routing(root): return pl.scan_parquet(root + "/routing/*.parquet")
def tokens(root): return pl.scan_parquet(root + "/tokens/*.parquet")
"""
BY_OTHERS = {
    "load": {
        "polars": POLARS
        + """
each = [routing("{a}").group_by("router", pl.col(s).alias("expert")).len() for s in slots]
print(pl.concat(each).group_by("router", "expert").agg(pl.col("len").sum())
    .collect(engine="streaming"))
""",
        "duckdb": """
import duckdb
db = duckdb.connect(config={{"threads": 1}})
slots = ", ".join(f"expert_{{j}}" for j in range({k}))
print(db.sql(f"select router, expert, count(*) from (select router, unnest([{{slots}}]) as expert "
    "from '{a}/routing/*.parquet') group by all").fetchnumpy())
""",
        "polars, load's columns": POLARS
        + """
each = [
    routing("{a}").group_by("router", pl.col(s).alias("expert")).agg(
        pl.len(), (pl.len() * (j == 0)).alias("first"),
        pl.col(f"weight_{{j}}").cast(pl.Float64).sum().alias("weight"),
    )
    for j, s in enumerate(slots)
]
print(pl.concat(each).group_by("router", "expert").agg(pl.col("len", "first", "weight").sum())
    .collect(engine="streaming"))
""",
        "duckdb, load's columns": """
import duckdb
db = duckdb.connect(config={{"threads": 1}})
slots, weights = (", ".join(f"{{name}}_{{j}}" for j in range({k})) for name in ("expert", "weight"))
print(db.sql(f"select router, expert, count(*), sum((slot = 0)::int), sum(weight::double) from "
    f"(select router, unnest([{{slots}}]) as expert, unnest([{{weights}}]) as weight, "
    "unnest(range({k})) as slot from '{a}/routing/*.parquet') group by all").fetchnumpy())
""",
    },
    "domains": {
        "polars": POLARS
        + """
domain = tokens("{a}").select("token", pl.col("domain").cast(pl.String))
rows = routing("{a}").select("token", "router", *slots).join(domain, on="token")
each = [rows.group_by("router", "domain", pl.col(s).alias("expert")).len() for s in slots]
print(pl.concat(each).group_by("router", "domain", "expert").agg(pl.col("len").sum())
    .collect(engine="streaming"))
""",
        "duckdb": """
import duckdb
db = duckdb.connect(config={{"threads": 1}})
slots = ", ".join(f"expert_{{j}}" for j in range({k}))
print(db.sql(f"select router, domain, expert, count(*) from (select router, domain, "
    f"unnest([{{slots}}]) as expert from '{a}/routing/*.parquet' join '{a}/tokens/*.parquet' using "
    "(token)) group by all").fetchnumpy())
""",
    },
    "join": {
        "polars": POLARS
        + """
sides = [routing(root).select("token", "router", pl.concat_list(slots).list.sort().alias("set"))
    for root in ("{a}", "{b}")]
print(sides[0].join(sides[1], on=["token", "router"])
    .group_by("router").agg((pl.col("set") != pl.col("set_right")).mean()).collect())
""",
        "duckdb": """
import duckdb
db = duckdb.connect(config={{"threads": 1}})
slots = ", ".join(f"expert_{{j}}" for j in range({k}))
one, other = (f"(select token, router, list_sort([{{slots}}]) as s from "
    f"'{{root}}/routing/*.parquet')" for root in ("{a}", "{b}"))
print(db.sql(f"select router, avg((x.s != y.s)::int) from {{one}} x join {{other}} y using "
    "(token, router) group by all").fetchnumpy())
""",
    },
    "read": {
        "pyarrow": """
import pyarrow.parquet as pq
from pathlib import Path
for path in sorted(Path("{a}", "routing").glob("*.parquet")):
    file = pq.ParquetFile(path, memory_map=True)
    for group in range(file.num_row_groups):
        file.read_row_group(group, use_threads=False)
"""
    },
}


@dataclass(frozen=True)
class Case:
    trace: str
    arguments: str  # {a}, {b}: the trace and the one it is compared with; {out}: a file
    same: str = ""  # who else gives the answer, of BY_OTHERS
    other: str = ""  # {b}

    @property
    def label(self) -> str:
        return f"{self.trace}: moe-inspect {self.arguments}"


CASES = [
    *(
        case
        for size in ("1e7", "1e8", "1e9")
        for case in (
            Case(size, "report {a}", "read"),
            Case(size, "report {a} --table load", "load"),
            Case(size, "report {a} --table balance", "load"),
            Case(size, "export {a} --format counts -o {out}.csv", "domains"),
        )
    ),
    Case("1e7", "compare {a} {b} --table agreement", "join", "1e7 changed"),
    Case("1e7", "text {a} --documents 0"),
    Case("1e7", "report {a} --html {out}.html"),
    Case("1e8", "report {a} --html {out}.html"),
    Case("1e8", "simulate cache {a}", "read"),
    Case("1e8", "simulate placement {a}", "read"),
    Case("1e8", "simulate routing {a}", "read"),
    Case("1e8", "simulate decode {a}", "read"),
    *(Case(f"{n} domains", "report {a}", "read") for n in (8, 500)),
    Case("1e6 documents", "report {a}", "read"),
    *(Case(trace, "report {a}", "read") for trace in ("1 shard", "500 shards", "5,000 shards")),
    Case("94 x 512", "report {a}", "read"),
    Case("94 x 512", "report {a} --html {out}.html"),
    Case("94 x 512", "report {a} --plots {out}"),
    Case("1e6 tokens in a document", "report {a}", "read"),
    Case("1e6 tokens in a document", "text {a} --documents 0"),
    Case("1e6 tokens in a document", "text {a} --layers 3 --experts 5"),
    Case("k = 1", "report {a}", "read"),
    Case("logits, norms", "report {a}", "read"),
    Case("logits, norms", "simulate routing {a}"),
]


def once(command: list[str], checkout: Path) -> dict[str, float]:
    """CPU and wall seconds and peak memory of a process and its children."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "POLARS_MAX_THREADS": "1",
        "COLUMNS": "120",
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it: modules are compiled once
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\n{said.decode()[-2000:]}")
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - began,
        "peak_memory_mib": used.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help="only cases whose label has this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a second checkout, measured in turn")
    parser.add_argument("--kept", type=Path, help="where traces are kept from run to run")
    asked = parser.parse_args()
    checkouts = {"ours": ROOT, **({"before": asked.against} if asked.against else {})}
    facts = machine() | {"command": f"python -m benchmarks.users --rounds {asked.rounds}"}
    if asked.against:
        asked_git = ["git", "-C", str(asked.against), "rev-parse", "--short", "HEAD"]
        facts["before"] = subprocess.check_output(asked_git, text=True).strip()
    measured = written("users", facts)
    print(f"{'':<64}{'':<24}{'CPU s':>9}{'wall s':>9}{'MiB':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        kept = asked.kept or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        for case in CASES:
            label = case.label
            if asked.case and not any(text in label for text in asked.case):
                continue
            paths = dict[str, str]()
            for side, name in (("a", case.trace), ("b", case.other)):
                if name:
                    paths[side] = str(kept / name.replace(" ", "-").replace(",", ""))
                    if not Path(paths[side]).exists():
                        made = in_a_process("make_of", paths[side], name, module="benchmarks.users")
                        assert made == {}
            ours = case.arguments.format(**paths, out=f"{scratch}/out").split()
            ways = {
                who: ([sys.executable, "-m", "moe_inspect", *ours], checkout)
                for who, checkout in checkouts.items()
            }
            for who, code in BY_OTHERS.get(case.same, {}).items():
                code = code.format(**paths, k=TRACES[case.trace].top_k)
                ways[who] = ([sys.executable, "-c", code], ROOT)
            runs: dict[str, list[dict[str, float]]] = {who: [] for who in ways}
            for _ in range(asked.rounds):
                for who, (command, checkout) in ways.items():
                    if len(runs[who]) < 2 or runs[who][0]["cpu_s"] < LONG:
                        runs[who].append(once(command, checkout))
            measured[label] = {
                "assignments": TRACES[case.trace].assignments,
                **{
                    who: {name: min(run[name] for run in of) for name in of[0]}
                    for who, of in runs.items()
                },
            }
            for n, (who, least) in enumerate(list(measured[label].items())[1:]):
                print(
                    f"{'' if n else label:<64}{who:<24}{least['cpu_s']:>9.2f}"
                    f"{least['wall_s']:>9.2f}{least['peak_memory_mib']:>8.0f}",
                    flush=True,
                )
            labels = [case.label for case in CASES]
            write_results("users", facts, {k: measured[k] for k in labels if k in measured})


def make_of(root: str, name: str) -> dict[str, Any]:
    """In a process of its own."""
    make(root, **asdict(TRACES[name]))
    return {}


if __name__ == "__main__":
    main()
