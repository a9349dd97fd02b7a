"""A trace that is there whole or not at all: written in a temporary directory beside the output,
which is renamed when it is complete.

One for object storage, where nothing is renamed, is written on this machine and then uploaded: its
manifest is the commit. Of a trace that is replaced everything stays until then, and is deleted
last. The new one's objects have names that the old one does not use, but for the lists of shards.
These hold the lines of both meanwhile: a line counts for the manifest that states the same
`generation`. Whenever it is stopped, readers find the old trace or the new one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Generator
from contextlib import suppress
from functools import partial
from pathlib import Path

from moe_inspect.errors import MoeInspectError
from moe_inspect.text import first_line, print_stderr
from moe_inspect.trace import schema
from moe_inspect.trace.files import checksums
from moe_inspect.trace.files.atomic import draft_folder_of, put_folder
from moe_inspect.trace.files.checksums import Json
from moe_inspect.trace.files.location import Remote
from moe_inspect.trace.files.lock import LOCK, OLD, Lock, followed, hold, left_of
from moe_inspect.trace.manifest import manifest_bytes, read_manifest
from moe_inspect.trace.output_dir import (
    OVERWRITTEN,
    check_directory,
    clear_trace,
    contents,
    remove_trace,
)


@contextlib.contextmanager
def whole_trace(out: Path | Remote, overwrite: bool, nothing: str) -> Generator[tuple[Path, Lock]]:
    """A temporary directory, and its lock. On success it becomes `out`, where a trace is replaced
    with `overwrite`; on an exception it is removed. `nothing` ends the message where the disk
    fails: "nothing was imported"."""
    put = partial(_put, overwrite=overwrite)
    if isinstance(out, Remote):
        put = partial(upload, out=out, overwrite=overwrite)
    with draft_folder_of(out, put, remove_trace) as (draft, lock), _told(out, nothing):
        yield draft, lock
    for old in left_of(followed(out), OLD) if isinstance(out, Path) else ():
        try:
            remove_trace(old)
        except (OSError, MoeInspectError) as error:  # the next one tries again
            print_stderr(f"warning: the old trace stays at {old}: {first_line(error)}")


@contextlib.contextmanager
def _told(out: Path | Remote, nothing: str) -> Generator[None]:
    """Where the disk or the network fails, the message says so and ends with `nothing`."""
    try:
        yield
    except (OSError, MoeInspectError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        # the message of the writer suggests --resume, which there is not here
        if isinstance(cause, OSError):
            raise MoeInspectError(f"cannot write {out}: {first_line(cause)}; {nothing}") from None
        raise


def _put(draft: Path, target: Path, overwrite: bool) -> None:
    """Puts a trace at `target`. On an exception the old one is back; after a kill, see `settle`."""
    aside = draft.with_suffix(OLD)
    with hold(target) as lock:
        check_directory(target, overwrite, resumable=False, locked=True)
        os.rename(target, aside)
        lock.root = aside
        try:
            put_folder(draft, target)
        except BaseException:
            os.rename(aside, target)
            lock.root = target
            raise


NUMBER = re.compile(r"(?<=-)\d+(?=\.parquet$)")  # of a part


def upload(draft: Path, _: Path, *, out: Remote, overwrite: bool) -> None:
    """Uploads the trace at `draft` to `out`. On an exception, `out` is as it was."""
    with hold(out) as lock:
        check_directory(out, overwrite, resumable=False, locked=True)
        if contents(out).is_free:
            clear_trace(out)  # what is left of one that was killed
        _Upload(draft, out, lock).run()


class _Upload:
    def __init__(self, draft: Path, out: Remote, lock: Lock):
        self.draft, self.out, self.lock = draft, out, lock
        self.before = contents(out).files
        self.generation = secrets.token_hex(4) if self.before else None
        numbers = [int(found[0]) for name in self.before if (found := NUMBER.search(name))]
        self.shift = max(numbers, default=-1) + 1
        files = [p for p in draft.rglob("*") if p.is_file() and p.name != LOCK]
        names = {p.relative_to(draft).as_posix(): p for p in files}
        self.lists = {n: p.read_bytes() for n, p in names.items() if n.startswith("shards-")}
        self.old_lists = {}  # without a line that is not whole
        for name in sorted(self.lists.keys() & {*self.before}):
            data = (out / name).read_bytes()
            self.old_lists[name] = data[: data.rfind(b"\n") + 1]
        self.parts = {self._renamed(n): p for n, p in names.items() if "/" in n}
        self.manifest: Json = json.loads(names[schema.MANIFEST].read_bytes())
        self.kept = {schema.MANIFEST, OVERWRITTEN, *self.lists, *self.parts}
        if (words := names.get(schema.VOCABULARY)) is not None:
            self._name_vocabulary(words)
        if self.generation is not None:
            self.manifest["generation"] = self.generation
            self.lists = {name: self._lines(data) for name, data in self.lists.items()}

    def run(self) -> None:
        manifest = manifest_bytes(self.manifest)
        try:
            self._write(OVERWRITTEN, b"")
            for name, path in sorted(self.parts.items()):
                self.lock.check()
                (self.out / name).upload(path)
            for name, lines in self.lists.items():
                self._write(name, self.old_lists.get(name, b"") + lines)
            self._write(schema.MANIFEST, manifest)
        except BaseException as error:
            if not self._is_committed(manifest) or not isinstance(error, OSError):
                raise
        try:  # the rest of the old trace is deleted
            for name in self.old_lists:
                self._write(name, self.lists[name])
            self._delete({*self.before} - self.kept)
        except OSError as error:
            said = f"what {self.out} held before could not all be deleted: {first_line(error)}"
            print_stderr(f"warning: {said}")

    def _write(self, name: str, data: bytes) -> None:
        self.lock.check()
        (self.out / name).write_bytes(data)

    def _delete(self, names: set[str]) -> None:
        for name in (*names, OVERWRITTEN):
            (self.out / name).unlink(missing_ok=True)

    def _is_committed(self, manifest: bytes) -> bool:
        """Whether the manifest is there after all: its answer may have been lost. Where it is not,
        what was uploaded is removed."""
        with suppress(MoeInspectError, OSError):  # else both stay: either is right with its lines
            self.lock.check()
            there = self.out / schema.MANIFEST
            if there.exists() and there.read_bytes() == manifest:
                return True
            self._take_back()
        return False

    def _take_back(self) -> None:
        for name, lines in self.old_lists.items():
            (self.out / name).write_bytes(lines)
        self._delete({*self.parts, *self.lists} - {*self.before})

    def _renamed(self, name: str) -> str:
        return NUMBER.sub(lambda found: str(int(found[0]) + self.shift), name)

    def _lines(self, data: bytes) -> bytes:
        """A list of shards, with the new names of the parts and the generation."""
        entries = [json.loads(line) for line in data.splitlines()]
        for one in entries:
            one |= {"path": self._renamed(one["path"]), "generation": self.generation}
        return b"".join(map(checksums.sealed, entries))

    def _name_vocabulary(self, words: Path) -> None:
        """Gives the new vocabulary its own name, unless the old one is the same."""
        name = schema.VOCABULARY
        if self.before:
            with suppress(MoeInspectError):
                name = schema.vocabulary_file(read_manifest(self.out))
            if name not in self.before or (self.out / name).read_bytes() != words.read_bytes():
                name = f"vocabulary-{self.generation}.parquet"
        self.kept.add(name)
        if name not in self.before:
            self.parts[name] = words
        if name != schema.VOCABULARY:
            self.manifest["vocabulary"]["path"] = name
