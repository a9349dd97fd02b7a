"""verify: checks a trace by the rules of its format, a shard and a row group at a time, and names
the first violation by file and row.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.files.location import Remote, location
from moe_inspect.trace.files.lock import is_locked, refuse_while_locked, settle
from moe_inspect.trace.manifest import no_trace, writer_of
from moe_inspect.trace.output_dir import contents
from moe_inspect.trace.reader import TRIES, Trace, shards_of
from moe_inspect.trace.verify.counts import check_counts
from moe_inspect.trace.verify.decisions import check_logits, check_routing
from moe_inspect.trace.verify.files import check_files, check_lines, check_orphans
from moe_inspect.trace.verify.tokens import Documents, Positions, check_tokens
from moe_inspect.trace.verify.verification import Verification, Violation, violation_of


def verify(
    path: str | Path | Remote, progress: Callable[[int], None] | None = None
) -> Verification:
    """Checks a trace by every rule of its format (docs/trace-format.md), every byte of it.

    A damaged file is a violation like any other. MoeInspectError where there is no trace.
    `progress` is called with the number of tokens of each shard that is done."""
    root = location(path)
    settle(root)
    if not (root / schema.MANIFEST).is_file():
        if root.is_dir() and any(root.iterdir()) and contents(root).is_free:
            refuse_while_locked(root)
            raise MoeInspectError(
                f"no trace at {root} yet: its writer was stopped before anything was committed; "
                "--resume starts it again"
            )
        raise no_trace(root)
    for _ in range(TRIES):
        found = Verification(str(path))
        trace = None
        try:
            trace = _opened(root)
            _verify(trace, found, progress)
        except Violation as violation:
            found.ok, found.violation, found.file, found.row = (
                False,
                violation.what,
                violation.file,
                violation.row,
            )
        if found.ok or trace is None or not trace.is_replaced():
            break
    return found


def _opened(root: Path | Remote) -> Trace:
    try:
        return Trace(root)
    except MoeInspectError as error:
        raise violation_of(error, schema.MANIFEST) from None


def _verify(trace: Trace, found: Verification, progress: Callable[[int], None] | None) -> None:
    files = [shard.files for shard in trace.shards]
    found.status = _status(trace)
    found.resumable = (
        found.status == "interrupted"
        and (trace.manifest.get("corpus") or {}).get("plan") is not None
    )
    check_lines(trace, files)
    unhashed = sum(check_files(shard) for shard in shards_of(trace, "checksums"))
    check_orphans(trace, files, found)
    found.checked += [
        "sha256 and rows of every file are those of its line"
        if not unhashed
        else f"rows of every file are those of its line; {unhashed:,} files state no sha256: "
        "a changed byte may go unseen in them",
        "no orphaned files",
        "tokens numbered without a gap",
    ]
    words = _check_vocabulary(trace)
    documents = Documents(trace)
    found.documents = len(documents.number)
    found.checked.append("documents declared once")
    positions = Positions(bool(trace.manifest.get("counts", {}).get("dropped")))
    for shard in shards_of(trace, "checking rows"):
        if trace.counts_only:
            check_counts(shard, found)
        else:
            phase_T = check_tokens(shard, words, documents, positions)
            check_routing(shard, phase_T, found)
            if "logits" in trace.tables:
                check_logits(shard, phase_T)
        found.shards += 1
        found.tokens += shard.files.tokens
        if progress:
            progress(shard.files.tokens)
    _check_totals(trace, found)
    if trace.counts_only:
        found.checked += [
            "every expert of every router listed once",
            "Σ counts ≤ tokens × k for each router, none negative, sums finite",
        ]
    else:
        found.checked += [
            "token ids within the vocabulary",
            "positions follow each other within a sequence"
            if positions.strict
            else "positions: not checked, decisions were dropped",
            "each router saw each of its tokens once, in order",
            "ids < E, no expert twice in a decision, Σ counts = tokens × k − empty slots",
            "weights finite, present exactly where an expert is, descending where stated"
            if trace.has_weights
            else "no weights recorded",
            *(
                f"{value}s of outputs finite, not negative, present exactly where an expert is"
                for value in trace.slot_values
                if value not in ("weight", schema.DROPPED)
            ),
            *(
                ["dropped experts < E, only in slots without an expert, none twice in a decision"]
                if trace.has_dropped
                else []
            ),
            *(
                ["losses and entropies not negative, null in both or neither"]
                if trace.has_loss
                else []
            ),
            *(["logits of each decision, none NaN"] if "logits" in trace.tables else []),
        ]
    found.checked.append("the manifest's totals are those of the shards")


def _status(trace: Trace) -> str:
    if trace.status != "recording" or writer_of(trace.manifest) is not None:
        return trace.status
    if isinstance(trace.path, Remote):
        return "interrupted" if is_locked(trace.path) is False else "recording"
    try:
        refuse_while_locked(trace.path)
    except MoeInspectError:  # by a process of another machine
        return "recording"
    return "interrupted"


def _check_vocabulary(trace: Trace) -> int | None:
    """How many token ids there are; None where the trace has no vocabulary."""
    try:
        return len(trace.vocabulary_table) or None
    except MoeInspectError as error:
        raise violation_of(error, schema.VOCABULARY) from None


def _check_totals(trace: Trace, found: Verification) -> None:
    stated = trace.manifest.get("counts")
    if trace.status != "complete" or not isinstance(stated, dict):
        return
    totals = {
        "tokens": found.tokens,
        **({} if trace.counts_only else {"decisions": found.decisions}),
    }
    for name, value in totals.items():
        if stated.get(name) != value:
            raise Violation(
                schema.MANIFEST,
                None,
                f"counts.{name} is {stated.get(name)}, the shards have {value}",
            )
