"""Reads, checks and writes trace.json; and finds the process that is writing the trace."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from moe_inspect.errors import Damaged, MoeInspectError
from moe_inspect.files import read_small, why_unread
from moe_inspect.text import did_you_mean, join_first
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import write_atomically
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote, inside
from moe_inspect.trace.files.lock import is_running, process_start, settle
from moe_inspect.trace.schema import check_schema, parsed

MOST_EXPERTS_IN_ALL = 2**24  # of all routers together


def read_manifest(root: Path | Remote) -> Json:
    """Reads the manifest, and checks everything that other code relies on."""
    path = inside(root, schema.MANIFEST)
    if isinstance(root, Path):
        settle(root)
    if not path.is_file():
        raise no_trace(root)
    data = stored_manifest(root)
    try:
        manifest = parsed(data)
        if not isinstance(manifest, dict) or type(version := manifest.get("format")) is not int:
            raise ValueError("it is not a manifest: format is missing")
        if version != schema.FORMAT:
            raise MoeInspectError(
                f"{path} has format {version!r:.30}, this moe-inspect reads {schema.FORMAT}: "
                "upgrade moe-inspect"
            )
        check_manifest(manifest)
    except ValueError as error:
        raise Damaged(path, str(error), schema.MANIFEST) from None
    except RecursionError:
        raise Damaged(path, "it is nested too deeply", schema.MANIFEST) from None
    return manifest


def check_manifest(manifest: Json) -> None:
    """ValueError for the first value that is missing or impossible, with the full path of its
    key."""
    check_schema("trace_json", manifest)
    if "digest" in manifest and manifest["digest"] != checksums.digest(manifest):
        raise ValueError(
            "it was changed after it was written (its digest differs): restore it, or delete the "
            "key digest to accept the change. "
            f"These values may be edited: {', '.join(checksums.FREE_TEXT)}"
        )
    for r, router in enumerate(manifest["routers"]):
        if router["top_k"] > router["experts"]:
            said = f"routers[{r}].top_k is {router['top_k']}: 1 to {router['experts']} are possible"
            raise ValueError(said)
    experts = sum(router["experts"] for router in manifest["routers"])
    if experts > MOST_EXPERTS_IN_ALL:
        raise ValueError(
            f"routers have {experts:,} experts in all: at most {MOST_EXPERTS_IN_ALL:,} are possible"
        )


def stored_manifest(root: Path | Remote) -> bytes:
    """trace.json as it is stored. FileNotFoundError where it is missing, Damaged where it cannot be
    one: a pipe, a device, a link to outside of the trace, too large a file."""
    path = inside(root, schema.MANIFEST)
    try:
        return path.read_bytes() if isinstance(path, Remote) else read_small(path)
    except ValueError as error:
        raise Damaged(path, str(error), schema.MANIFEST) from None


def no_trace(root: Path | Remote) -> MoeInspectError:
    """That there is no trace, and what to do: take one that is near, or make one, where nothing is
    in the way."""
    if isinstance(root, Remote):
        return MoeInspectError(f"no trace at {root}")
    near, place = "", root
    if root.is_dir():
        if inside := _traces_in(root):
            listed = join_first(inside)
            return MoeInspectError(f"no trace at {root}, but in it: {listed}")
        place = root / "NAME"
    elif root.exists() and not root.is_file():
        return MoeInspectError(why_unread(root))
    else:
        near = did_you_mean(str(root), map(str, _traces_in(root.parent)))
    return MoeInspectError(
        f'no trace at {root}{near}: make one with "moe-inspect trace MODEL -o {place}"'
    )


def _traces_in(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(p.parent for p in folder.glob(f"*/{schema.MANIFEST}"))
    return []


def refuse_within_trace(path: Path, a_trace: bool = False) -> None:
    """MoeInspectError where what is to be written would be in the directory of a trace. `a_trace`:
    it is one, and may replace another."""
    real = Path(os.path.realpath(path))
    for folder in real.parents if a_trace else (real, *real.parents):
        if (folder / schema.MANIFEST).is_file() and _is_trace(folder):
            where = "a trace" if folder == real else f"within the trace {folder}"
            raise MoeInspectError(f"{path} is {where}: choose another place")


def _is_trace(folder: Path) -> bool:
    """Whether a folder with a file trace.json, which profilers write too, is a trace."""
    with suppress(MoeInspectError, OSError):
        read_manifest(folder)
        return True
    return any(folder.glob("shards-*.jsonl"))  # it is damaged


def write_manifest(root: Path, manifest: Json) -> None:
    """Writes trace.json, with its digest."""
    stated = {**manifest, "digest": checksums.digest(manifest)}
    text = json.dumps(stated, indent=1, ensure_ascii=False) + "\n"
    write_atomically(root / schema.MANIFEST, text.encode(errors="backslashreplace"))


def writer_of(manifest: Json) -> int | None:
    """The process that is writing this trace, as far as this machine can tell: None where it is
    done or gone."""
    capture = manifest["capture"]
    pid, here = capture.get("pid"), capture.get("host") == socket.gethostname()
    if manifest["status"] != "recording" or not here or pid in (None, os.getpid()):
        return None
    return pid if is_running(pid, capture.get("process_start")) else None


def refuse_while_written(root: Path | Remote, manifest: Json) -> None:
    """MoeInspectError where the process that writes this trace is still at work on this machine."""
    if (pid := writer_of(manifest)) is not None:
        raise MoeInspectError(f"process {pid} is still writing {root}: wait for it, or stop it")


def this_process() -> Json:
    """What a manifest's `capture` states of the process that writes it."""
    from importlib.metadata import version

    return {
        "versions": {"moe-inspect": version("moe-inspect"), "python": sys.version.split()[0]},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "host": socket.gethostname(),
    }
