"""What a derived trace states of the traces that it was made of, and of the process that made
it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import write_atomically
from moe_inspect.trace.files.location import Remote, output_location
from moe_inspect.trace.files.lock import refuse_while_locked
from moe_inspect.trace.manifest import refuse_while_written, this_process, write_manifest
from moe_inspect.trace.reader import Trace
from moe_inspect.trace.verify import Verification, verify
from moe_inspect.trace.writer.part_file import vocabulary_bytes

# what a corpus states of its documents
COUNTED = ("split_documents", "empty_documents")
OF_A_PROCESS = {"command", "host", "pid", "process_start"}


def same_place(a: Path | Remote, b: Path | Remote) -> bool:
    """Whether two locations are one: a file's URL is its path."""
    return output_location(a).resolve() == output_location(b).resolve()


def contents(trace: Trace) -> str | None:
    """A hash of all that a trace holds; None where its lines do not state that of each file."""
    files = [part.sha256 for shard in trace.shards for part in shard.files.stated.values()]
    stated = [file for file in files if file is not None]
    if not files or len(stated) < len(files):
        return None
    return sha256(" ".join(stated).encode()).hexdigest()


def verified(trace: Trace, path: Path | Remote) -> Verification:
    """MoeInspectError where the trace is damaged or still written."""
    refuse_while_written(path, trace.manifest)
    refuse_while_locked(path)
    if not (found := verify(path)).ok:
        raise MoeInspectError(f"{found}")
    return found


def begin(draft: Path, manifest: dict[str, Any], vocabulary: pa.Table | None) -> None:
    """Writes the vocabulary, a manifest that says "recording" and the folders of the tables. Adds
    the checksum of the vocabulary to `manifest`."""
    if vocabulary is not None:
        data = vocabulary_bytes(vocabulary)
        write_atomically(draft / schema.VOCABULARY, data)
        manifest["vocabulary"] = checksums.stated(data)
    write_manifest(draft, {**manifest, "status": "recording"})
    for table in manifest["tables"]:
        (draft / table).mkdir()


def origin(trace: Trace, found: Verification) -> dict[str, Any]:
    """Which trace it was: its name, the digest of its manifest, a hash of its files and what it
    held."""
    return {
        "name": trace.path.resolve().name,
        "digest": trace.manifest.get("digest") or checksums.digest(trace.manifest),
        "contents": contents(trace),
        "status": found.status,
        "documents": found.documents,
        "tokens": found.tokens,
        "decisions": trace.n_decisions,
    }


def written_here(capture: dict[str, Any]) -> dict[str, Any]:
    """What `capture` states of how was recorded, and which process wrote this trace of it."""
    how = {k: v for k, v in capture.items() if k not in OF_A_PROCESS}
    return {**this_process(), **how}


def random_weights(corpus: dict[str, Any]) -> dict[str, Any] | None:
    """Of the plan of a corpus only what reports need of it, that weights were drawn at random: a
    trace without the whole plan is none that --resume can go on with."""
    plan = corpus.get("plan") or {}
    return {k: plan[k] for k in ("random_init",) if plan.get(k) is not None} or None
