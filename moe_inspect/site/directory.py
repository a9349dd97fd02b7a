"""The directory of the site: what stands in it, and how it changes. Pages are written beside those
that are there and renamed at the end, the index last: a run that is killed before leaves the old
site as it was. The index holds what a later run reuses."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.files import mapped, read_small
from moe_inspect.reporting.render.html import slug
from moe_inspect.reporting.tables.summary import mapping
from moe_inspect.site.entry import Entry
from moe_inspect.text import cut
from moe_inspect.trace.files.atomic import draft_of, sync_directory
from moe_inspect.trace.files.lock import drafts_of, hold
from moe_inspect.trace.manifest import refuse_within_trace

INDEX = "index.html"
FORMAT = 1  # of what the index holds
DATA = re.compile(r'<script type="text/plain" data-of="atlas">([\w+/=]+)</script>', re.ASCII)
PAGE = re.compile(r"[a-z0-9-]+\.html")
DRAFT = re.compile(drafts_of(PAGE.pattern))
STATED = ("name", "page", "key", "address", "sha256")  # of an entry, whatever the version
UP = (INDEX, "← Atlas")  # of every page
PAGE_ABOVE = f'<a class="up" href="{INDEX}">'.encode()  # as page.html writes it
LONGEST = 60  # characters of a file's name
MOST_INDEX_BYTES = 2**30


class Directory(ExitStack):
    """Locked while it is open. `before`: the entries of the index that is there. MoeInspectError
    where something else is there."""

    def __init__(self, root: Path):
        super().__init__()
        self.root, self.taken = root, {INDEX}
        if root.exists() and not root.is_dir():
            raise MoeInspectError(f"{root} is a file: give a directory for the site")
        refuse_within_trace(root)
        self.callback(hold(root).release)
        try:
            with reading(root):
                self.before = _entries(root / INDEX)
                drafts = [path for path in root.iterdir() if DRAFT.fullmatch(path.name)]
            with writing(root):
                for path in drafts:  # of a run that was killed
                    path.unlink()
        except BaseException:
            self.close()
            raise
        self.drafts = self.enter_context(ExitStack())
        self.index = self.drafts.enter_context(draft_of(root / INDEX))  # renamed last

    def free_page(self, name: str) -> str:
        """The name of a page that no other has."""
        begin = cut(slug(name, "trace"), LONGEST).strip("-…")
        tries = (f"{begin}.html" if n == 1 else f"{begin}-{n}.html" for n in count(1))
        page = next(one for one in tries if one not in self.taken and self._is_free(one))
        self.taken.add(page)
        return page

    def _is_free(self, page: str) -> bool:
        """Whether no file is there, or a page: of this site, or that a run left that was killed
        between its pages and the index."""
        path = self.root / page
        with reading(path):
            return not path.exists() or (path.is_file() and mapped(path).find(PAGE_ABOVE) >= 0)

    def holds(self, page: str, sha256: str) -> bool:
        """Whether the page is there as it was written."""
        path = self.root / page
        with reading(path):
            return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256

    def write(self, page: str, text: str) -> str:
        """Returns its hash."""
        with writing(self.root / page):
            return _write(self.drafts.enter_context(draft_of(self.root / page)), text)

    def commit(self, index: str, pages: set[str]) -> None:
        """Makes the site what was written; then removes the pages that are no longer in it."""
        with writing(self.root):
            _write(self.index, index)
            self.drafts.close()
            for page in {entry["page"] for entry in self.before} - pages:
                (self.root / page).unlink(missing_ok=True)
            sync_directory(self.root)


def _entries(index: Path) -> list[Entry]:
    """Of the index that is there. Those of another version have no key."""
    if not index.exists():
        return []
    try:
        found = DATA.search(read_small(index, MOST_INDEX_BYTES).decode(errors="replace"))
        held = json.loads(gzip.decompress(base64.b64decode(found[1]))) if found else {}
        entries, same = held["entries"], held["format"] == FORMAT
        if not all(map(_is_entry, entries)):
            raise ValueError
    except (ValueError, TypeError, KeyError, OSError, EOFError, RecursionError):
        raise MoeInspectError(
            f"{index} does not belong to an atlas: give another directory, or move it away"
        ) from None
    return entries if same else [{**one, "key": ""} for one in entries]


def _is_entry(entry: object) -> bool:
    stated = mapping(entry)
    page = stated.get("page")
    known = all(isinstance(stated.get(name), str) for name in STATED)
    return known and page != INDEX and PAGE.fullmatch(str(page)) is not None


def _write(draft: Path, text: str) -> str:
    draft.write_bytes(data := text.encode(errors="backslashreplace"))
    return hashlib.sha256(data).hexdigest()
