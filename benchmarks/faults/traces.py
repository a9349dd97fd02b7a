"""What is left of a trace: written, resumed and replaced by the writer itself, by `import`, `merge`
and `trace`, by one process or several, and with bits that flip."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks import imports
from benchmarks.faults.bench import Bench, Faults
from moe_inspect.errors import MoeInspectError
from moe_inspect.making import import_trace
from moe_inspect.public import Trace, report
from moe_inspect.trace import schema
from moe_inspect.trace.files.lock import hold
from moe_inspect.trace.manifest import process_start, read_manifest
from moe_inspect.trace.output_dir import claim_directory
from moe_inspect.trace.schema import Router
from moe_inspect.trace.verify import verify
from moe_inspect.trace.writer import Document, RoutedBatch, ShardLimits, TraceWriter, resume_point

ROUTERS = [
    Router(0, "gate", "layers.0", 8, 2),
    Router(1, "gate", "layers.1", 300, 4),
    Router(1, "gate2", "layers.1b", 8, 2),
]
BATCHES, TOKENS, WORDS, SHARD_TOKENS = 6, 30, 40, 60
FLIPS = 300


# --- a small trace, by the writer itself


def batches(seed: int, routers: Sequence[Router] = ROUTERS) -> list[RoutedBatch]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(BATCHES):
        row = np.arange(TOKENS, dtype=np.int32)
        ids = [
            np.argsort(rng.random((TOKENS, r.experts)), 1)[:, : r.top_k].astype(
                np.uint16 if r.experts > 255 else np.uint8
            )
            for r in routers
        ]
        weights = [-np.sort(-rng.random((TOKENS, r.top_k)), 1).astype(np.float16) for r in routers]
        same = np.full(TOKENS, number, np.int32)
        made.append(
            RoutedBatch(
                number, rng.integers(0, WORDS, TOKENS).astype(np.int32), same, same, row, np.full(TOKENS, number % 2, np.int32),
                ["law", "code"], ids, weights, documents=[Document(number, ["law", "code"][number % 2], "made", TOKENS)],
            )
        )  # fmt: skip
    return made


def manifest(seed: int) -> dict[str, Any]:
    facts = {
        "mode": "tap",
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "host": os.uname().nodename,
    }
    return {"model": {"id": f"made {seed}"}, "capture": facts, "corpus": {"plan": {"seed": seed}}}


VOCABULARY = pa.table({"token_id": range(WORDS), "token": [f" w{i}" for i in range(WORDS)]})


def begin(
    root: Path,
    seed: int = 0,
    overwrite: bool = False,
    shard_seconds: float = 60.0,
    pause_s: float = 0.0,
) -> str:
    with claim_directory(root, overwrite) as lock:
        _write(root, seed, batches(seed), shard_seconds, pause_s, lock=lock)
    return "begun"


def resume(root: Path, seed: int = 0, shard_seconds: float = 60.0, pause_s: float = 0.0) -> str:
    if not (root / schema.MANIFEST).exists():
        return begin(root, seed, shard_seconds=shard_seconds, pause_s=pause_s)
    with hold(root) as lock:
        if read_manifest(root)["status"] == "complete":
            return "was complete"
        point = resume_point(root)
        _write(
            root,
            seed,
            batches(seed)[point.next_batch :],
            shard_seconds,
            pause_s,
            resume=point,
            lock=lock,
        )
    return "resumed"


def _write(
    root: Path,
    seed: int,
    left: list[RoutedBatch],
    shard_seconds: float,
    pause_s: float,
    **more: Any,
) -> None:
    with TraceWriter(
        root,
        manifest(seed),
        ROUTERS,
        vocabulary=VOCABULARY,
        limits=ShardLimits(SHARD_TOKENS, shard_seconds),
        **more,
    ) as writer:
        for batch in left:
            writer.write(batch)
            time.sleep(pause_s)


Rows = dict[str, pa.Table]


def rows_of(trace: Trace) -> Rows:
    """All that a trace holds, labels as text."""
    parts = {
        "tokens": [shard.tokens() for shard in trace.shards],
        "documents": [shard.table("documents") for shard in trace.shards],
        "vocabulary": [trace.vocabulary_table],
        **{
            f"router {r}": [shard.routing(r) for shard in trace.shards]
            for r in range(len(trace.routers))
        },
    }
    return {
        name: pa.concat_tables([_plain(t) for t in tables])
        for name, tables in parts.items()
        if tables
    }


def _plain(table: pa.Table) -> pa.Table:
    kinds = [
        pa.field(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type)
        for f in table.schema
    ]
    return table.cast(pa.schema(kinds))


def same_rows(trace: Trace, whole: Rows) -> None:
    """What there is of `trace` is what the undisturbed one begins with, decision by decision."""
    if not trace.n_tokens:
        return
    for name, found in rows_of(trace).items():
        assert found.equals(whole[name].slice(0, len(found))), f"{name} differs"
        assert len(found) == (
            trace.n_tokens
            if name.startswith(("tokens", "router"))
            else len(whole[name])
            if name == "vocabulary"
            else len(found)
        )


def is_whole(root: Path, whole: Rows) -> None:
    found = verify(root)
    assert found.ok, found
    trace = Trace(root)
    assert trace.status == "complete"
    assert trace.n_tokens == len(whole["tokens"])
    same_rows(trace, whole)
    left = [str(p.relative_to(root)) for p in root.rglob("*") if p.name.startswith(".")]
    assert not left, f"left behind: {left}"


def what_is_left(root: Path, whole: dict[str, Rows]) -> str | None:
    """Checks a trace after a fault; returns the id of its model, None where there is no trace
    (yet)."""
    if not (root / schema.MANIFEST).exists():
        try:
            raise AssertionError(f"no manifest, yet it verifies: {verify(root)}")
        except MoeInspectError:
            return None
    found = verify(root)
    assert found.ok, found
    trace = Trace(root)
    of = trace.manifest["model"]["id"]
    same_rows(trace, whole[of])
    assert trace.status != "complete" or trace.n_tokens == len(whole[of]["tokens"])
    return of


# --- what is tried


WHOLE = "whole-0", "whole-1"


def made_whole(bench: Bench) -> dict[str, Rows]:
    """What undisturbed runs write, by the id of the model."""
    for seed, name in enumerate(WHOLE):
        bench.must(lambda seed=seed, name=name: begin(bench.root / name, seed))
    return {f"made {seed}": rows_of(Trace(bench.root / name)) for seed, name in enumerate(WHOLE)}


def cut_short(place: Path) -> None:
    """An interrupted trace: a part that no line speaks of, or a torn line."""
    pid = os.fork()
    if not pid:
        Faults(70, "kill", seed=42).install()
        begin(place / "t")
        os._exit(1)
    os.waitpid(pid, 0)
    assert 0 < Trace(place / "t").n_tokens < BATCHES * TOKENS


def writing(bench: Bench) -> None:
    """The writer itself: a new trace, one that goes on, one that replaces another."""
    whole = made_whole(bench)
    new = whole["made 0"]

    def goes_on(place: Path) -> None:
        root = place / "t"
        of = what_is_left(root, whole)
        if root.exists():
            shutil.copytree(root, place / "over")
            begin(place / "over", overwrite=True)
            is_whole(place / "over", new)
        if of != "made 1":  # the old trace, complete
            resume(root)
            is_whole(root, new)

    for how in ("kill", "EIO"):
        bench.at_every_call(
            "a new trace", how, lambda place: None, lambda place: begin(place / "t"), goes_on
        )
        bench.at_every_call("resuming", how, cut_short, lambda place: resume(place / "t"), goes_on)
        bench.at_every_call(
            "overwriting",
            how,
            lambda place: shutil.copytree(bench.root / WHOLE[1], place / "t") and None,
            lambda place: begin(place / "t", overwrite=True),
            goes_on,
        )


def writing_at_once(bench: Bench, tries: int = 20) -> None:
    """Two and three processes at one place, started together: each ends or is refused in a line,
    and the trace is whole."""
    whole = made_whole(bench)["made 0"]
    kinds: dict[str, tuple[Callable[[Path], None], Callable[..., str]]] = {
        "two resumes at once": (cut_short, resume),
        "two new traces at once": (lambda place: None, resume),
        "two that overwrite at once": (
            cut_short,
            lambda root, **options: begin(root, overwrite=True, **options),
        ),
    }
    for what, (before, work) in kinds.items():
        for n in range(tries):
            place = bench.place()
            bench.must(lambda before=before, place=place: before(place))
            options = {"shard_seconds": 0.0 if n % 2 else 60.0, "pause_s": 0.003 * (n % 3)}
            said = bench.children(
                [lambda o=options, p=place, w=work: w(p / "t", **o)] * (2 + n % 2)
            )
            wrong = [s["raised"] for s in said if "raised" in s]
            wrong += [
                s["refused"]
                for s in said
                if "refused" in s
                and "still writing" not in s["refused"]
                and "there is a trace" not in s["refused"]
            ]
            wrong += [] if any("returned" in s for s in said) else ["all were refused"]
            checked = bench.child(lambda place=place: is_whole(place / "t", whole))
            failure = "; ".join(wrong) or checked.get("raised") or checked.get("refused")
            by = "shards by time" if options["shard_seconds"] == 0 else "shards by size"
            bench.count(
                f"{what}, {by}",
                " + ".join(sorted(next(iter(s)) for s in said)),
                failure,
                f"try {n}",
            )


def importing(bench: Bench) -> None:
    """Imports: what is at the place is the old trace, whole, or the new one, whole, or nothing;
    drafts are cleared by the next."""
    imports.SEQUENCE, imports.SHAPES["vllm-routed"] = 64, (4, 16, 2)
    for n in (0, 1):
        (bench.root / f"in-{n}").mkdir()
        imports.SEQUENCE += 16
        imports.make("vllm-routed", bench.root / f"in-{n}", 1)
        (bench.root / f"in-{n}" / "config.json").write_text(
            json.dumps({"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2})
        )

    def run(out: Path, n: int, overwrite: bool = True) -> None:
        source = bench.root / f"in-{n}"
        import_trace(
            "vllm-routed",
            [source / "responses.jsonl"],
            out,
            model=source / "config.json",
            overwrite=overwrite,
            warn=lambda line: None,
        )

    for n in (0, 1):
        bench.must(lambda n=n: run(bench.root / f"imported-{n}", n))
    whole = {n: rows_of(Trace(bench.root / f"imported-{n}")) for n in (0, 1)}

    def either(place: Path) -> None:
        if (place / "t" / schema.MANIFEST).exists():
            n = next(n for n in (0, 1) if len(whole[n]["tokens"]) == Trace(place / "t").n_tokens)
            assert verify(place / "t").ok
            same_rows(Trace(place / "t"), whole[n])
        run(place / "t", 0)
        is_whole(place / "t", whole[0])
        assert [p.name for p in place.iterdir()] == ["t"], list(place.iterdir())

    for how in ("kill", "EIO"):
        bench.at_every_call(
            "a new import", how, lambda place: None, lambda place: run(place / "t", 0), either
        )
        bench.at_every_call(
            "an import that overwrites",
            how,
            lambda place: run(place / "t", 1),
            lambda place: run(place / "t", 0),
            either,
        )


def tracing(bench: Bench) -> None:
    """`trace` itself, with the bundled model."""
    import torch  # noqa: F401  (imported once, not in every child)

    import moe_inspect

    defaults: Any = TraceWriter.__init__.__kwdefaults__

    def trace(out: Path, shard_seconds: float = 0.0, **more: Any) -> str:
        defaults["shard_seconds"] = shard_seconds
        moe_inspect.trace_model("demo", out, max_tokens=700, batch_tokens=100, **more)
        return "traced"

    bench.must(lambda: trace(bench.root / "traced"))
    whole = rows_of(Trace(bench.root / "traced"))

    def goes_on(place: Path) -> None:
        root = place / "t"
        if (root / schema.MANIFEST).exists():
            found = verify(root)
            assert found.ok, found
            same_rows(Trace(root), whole)
        trace(root, resume=True)
        is_whole(root, whole)

    for how in ("kill", "EIO"):
        bench.at_every_call(
            "trace demo", how, lambda place: None, lambda place: trace(place / "t"), goes_on, step=7
        )

    def cut_short(place: Path) -> None:
        pid = os.fork()
        if not pid:
            Faults(70, "kill").install()
            trace(place / "t")
            os._exit(1)
        os.waitpid(pid, 0)

    for n in range(6):
        place = bench.place()
        bench.must(lambda place=place: cut_short(place))
        seconds = 0.0 if n % 2 else 60.0
        said = bench.children(
            [lambda place=place, s=seconds: trace(place / "t", s, resume=True)] * 2
        )
        wrong = [s["raised"] for s in said if "raised" in s]
        wrong += [
            s["refused"] for s in said if "refused" in s and "still writing" not in s["refused"]
        ]
        checked = bench.child(lambda place=place: is_whole(place / "t", whole))
        failure = "; ".join(wrong) or checked.get("raised") or checked.get("refused")
        by = "shards by size" if n % 2 == 0 else "shards by time"
        bench.count(
            f"two trace --resume at once, {by}",
            " + ".join(sorted(next(iter(s)) for s in said)),
            failure,
            f"try {n}",
        )


REPORTED = ("load", "balance", "domains", "vocabulary", "windows")


def read_all(root: Path) -> Iterator[pd.DataFrame]:
    trace = Trace(root)
    yield from (trace.tokens(), trace.documents(), trace.vocabulary())
    yield from (trace.routing(router=r) for r in range(len(trace.routers)))
    yield pd.DataFrame([(r.layer, r.experts, r.top_k) for r in trace.routers])
    yield pd.DataFrame([(trace.status, trace.n_tokens, trace.n_decisions, trace.has_weights)])


def reported(root: Path) -> Iterator[pd.DataFrame]:
    made = report(root)
    yield from (made.tables[name] for name in REPORTED)


def unlike(
    read: Callable[[Path], Iterator[pd.DataFrame]], root: Path, whole: list[pd.DataFrame]
) -> bool:
    found = list(read(root))
    return len(found) != len(whole) or any(
        not a.astype(str).equals(b.astype(str)) for a, b in zip(found, whole, strict=True)
    )


def flipping(bench: Bench) -> None:
    """One bit of one file: verify says so, or nothing that is read has changed; a report says so,
    or has the same numbers."""
    whole = bench.root / "whole-flips"
    bench.must(lambda: begin(whole))
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    rng = random.Random(0)
    flips = [
        (name, rng.randrange((whole / name).stat().st_size * 8))
        for name in (rng.choice(files) for _ in range(FLIPS))
    ]

    def tried(part: list[tuple[Path, int]]) -> list[list[str | None]]:
        right, numbers = list(read_all(whole)), list(reported(whole))
        place, found = bench.root / "flipped", []
        for name, bit in part:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place)
            data = bytearray((place / name).read_bytes())
            data[bit // 8] ^= 1 << bit % 8
            (place / name).write_bytes(bytes(data))
            outcome: list[str | None] = []
            for check in (_verified, _reported):
                try:
                    outcome.append(check(place, right if check is _verified else numbers))
                except MoeInspectError as error:
                    outcome.append(None if "\n" not in str(error) else f"more than a line: {error}")
                except Exception as error:
                    outcome.append(f"a traceback: {type(error).__name__}: {error}")
            found.append(outcome)
        return found

    for start in range(0, FLIPS, 25):
        part = flips[start : start + 25]
        said = bench.child(lambda part=part: tried(part))
        results = said.get("returned") or [[str(said), None]] * len(part)
        for (name, bit), (by_verify, by_report) in zip(part, results, strict=True):
            case = f"bit {bit} of {name}"
            bench.count(
                "bits flipped: verify",
                "caught or harmless" if by_verify is None else "missed",
                by_verify,
                case,
            )
            bench.count(
                "bits flipped: report",
                "caught or harmless" if by_report is None else "missed",
                by_report,
                case,
            )


def _verified(place: Path, right: list[pd.DataFrame]) -> str | None:
    if verify(place).ok and unlike(read_all, place, right):
        return "verify is content, and something else is read"
    return None


def _reported(place: Path, right: list[pd.DataFrame]) -> str | None:
    return "other numbers, without a word" if unlike(reported, place, right) else None
