"""Makes the site of some traces, or brings it up to date. Pages are written beside those that are
there and renamed at the end, the index last: a run that is killed before leaves the old site as it
was. The index holds what a later run reuses."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import pandas as pd

from moe_inspect.errors import MoeInspectError, reading, writing
from moe_inspect.files import mapped, read_small
from moe_inspect.reporting.render.html import slug
from moe_inspect.reporting.render.page import report_page
from moe_inspect.reporting.render.texts import Amount
from moe_inspect.reporting.report import report
from moe_inspect.reporting.tables.summary import mapping
from moe_inspect.site.entry import FORMAT, LONGEST, Entry, entry_of, saturation
from moe_inspect.site.index import index_page, table_of
from moe_inspect.text import cut, readable, storable
from moe_inspect.trace import schema
from moe_inspect.trace.files.atomic import draft_of, sync_directory
from moe_inspect.trace.files.lock import drafts_of, hold
from moe_inspect.trace.manifest import refuse_within_trace
from moe_inspect.trace.reader import Trace, address, open_trace

INDEX = "index.html"
DATA = re.compile(r'<script type="text/plain" data-of="atlas">([\w+/=]+)</script>', re.ASCII)
PAGE = re.compile(r"[a-z0-9-]+\.html")
DRAFT = re.compile(drafts_of(PAGE.pattern))
STATED = ("name", "page", "key", "address", "sha256")  # of an entry, whatever the version
UP = (INDEX, "← Atlas")  # of every page
PAGE_ABOVE = f'<a class="up" href="{INDEX}">'.encode()  # as page.html writes it
LONGEST_FILE = 60  # characters of a page's name
MOST_INDEX_BYTES = 2**30


def atlas(
    traces: Iterable[Trace | str | Path],
    output: str | Path,
    *,
    text: Amount = 1,
    add: bool = False,
) -> pd.DataFrame:
    """Makes a static site of traces in the directory `output`: the page of each trace's report, and
    index.html with a table of all, which is searched by expert, domain and token. It needs no
    server and no network.

    A page whose trace has not changed since the last call is kept; pages of traces that are no
    longer named are removed. Files of other kinds in the directory stay. A call that is killed
    leaves the old site.

    traces  in the order of the index; traces of one text by models of the same shape are compared
            with the last of them (saturation)
    text    documents of each domain on the page of a trace, "all", 0 for none
    add     keep the pages that are there, before those of `traces`

    Returns the table of the index, a row per trace; its column `page` is the file, and `made` says
    whether that was made by this call. Raises MoeInspectError where there is no such trace, or
    something else is in the directory."""
    opened = [open_trace(one) for one in traces]
    if not opened:
        raise MoeInspectError("give at least one trace")
    where = [str(trace.path.resolve()) for trace in opened]
    if again := next((path for i, path in enumerate(where) if path in where[:i]), None):
        raise MoeInspectError(f"{again} is given twice")
    with Directory(Path(output)) as directory:
        plan = _planned(opened, directory.before, text, add)
        if any(one.trace is None and not one.entry["key"] for one in plan):
            raise MoeInspectError(
                f"{output} was made by another version of moe-inspect: name all its traces, "
                "without --add"
            )
        made = _make(directory, plan, text)
        entries = [one.entry for one in plan]
        _compare(plan)
        directory.commit(index_page(entries), {entry["page"] for entry in entries})
    pages = [entry["page"] for entry in entries]
    return table_of(entries).assign(page=pages, made=[page in made for page in pages])


@dataclass
class PlannedPage:
    """A page of the site. trace: None where the page is kept without its trace. entry: the one that
    is there, {} where there is none. content: the hash of the trace."""

    trace: Trace | None
    entry: Entry
    content: str = ""


def _planned(
    traces: Sequence[Trace], before: Sequence[Entry], text: Amount, add: bool
) -> list[PlannedPage]:
    """The pages in order, each with the entry of the same trace, else of one at its address."""
    named = [PlannedPage(trace, {}, content_of(trace)) for trace in traces]
    left = list(before)
    same: list[Callable[[PlannedPage, Entry], bool]] = [
        lambda one, entry: entry["key"] == _key(one.content, text),
        lambda one, entry: one.trace is not None and entry["address"] == address(one.trace),
    ]
    for one, alike in ((one, alike) for alike in same for one in named):
        found = None if one.entry else next((e for e in left if alike(one, e)), None)
        if found is not None:
            one.entry = found
            left.remove(found)
    if not add:
        return named
    of = {id(one.entry): one for one in named if one.entry}
    there = [of.get(id(entry), PlannedPage(None, entry)) for entry in before]
    return there + [one for one in named if not one.entry]


def _make(directory: Directory, plan: Sequence[PlannedPage], text: Amount) -> set[str]:
    """Writes the pages that are not there as they would be; returns their names."""
    made, names = set[str](), {one.entry["name"] for one in plan if one.entry}
    directory.taken |= {one.entry["page"] for one in plan if one.entry}
    for one in plan:
        key = _key(one.content, text)
        held = bool(one.entry) and directory.holds(one.entry["page"], one.entry["sha256"])
        if one.trace is None and not held:
            raise MoeInspectError(
                f"{directory.root / one.entry['page']} was changed since it was made: name its "
                f"trace too, {one.entry['address']}"
            )
        if one.trace is None or (held and one.entry["key"] == key):
            continue
        name = one.entry.get("name") or _free_name(one.trace, names)
        names.add(name)
        page = one.entry.get("page") or directory.free_page(name)
        report_made = report(one.trace)
        one.entry = {
            "name": name,
            "page": page,
            "key": key,
            "address": storable(address(one.trace)),
            "sha256": directory.write(page, report_page(report_made, text=text, up=UP)),
            **entry_of(report_made),
        }
        made.add(page)
    return made


def _free_name(trace: Trace, taken: set[str]) -> str:
    name = readable(cut(trace.path.resolve().name, LONGEST)) or "trace"
    tries = (name if n == 1 else f"{name} ({n})" for n in count(1))
    return next(one for one in tries if one not in taken)


def _compare(plan: Sequence[PlannedPage]) -> None:
    """Fills in the saturation of the entries: of models of one shape, with the last of them."""
    groups: dict[object, list[tuple[PlannedPage, Trace]]] = {}
    for one in plan:
        if one.trace is not None:
            groups.setdefault(_shape(one.trace), []).append((one, one.trace))
    for group in groups.values():
        last, last_trace = group[-1]
        for one, trace in group:
            pair, value, why = [one.content, last.content, len(group) > 1], None, ""
            if one.entry.get("pair") != pair:
                if len(group) == 1:
                    why = "no other trace has the same text and another checkpoint of this model"
                elif one is not last:
                    value, why = saturation(trace, last_trace)
                one.entry |= {"pair": pair, "saturation": value, "saturation_with": None}
                one.entry["no_saturation"] = readable(why)
            if one is not last and one.entry["saturation"] is not None:
                one.entry["saturation_with"] = last.entry["name"]


def _shape(trace: Trace) -> tuple[object, ...]:
    """Alike for checkpoints of a model with the same text; of counts, for no other trace."""
    config = trace.manifest.get("model", {}).get("config") or {}
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    routers = tuple((r.layer, r.experts, r.top_k) for r in trace.routers)
    stated = tuple(str(config.get(name)) for name in sizes)
    return routers, stated, trace.n_tokens, id(trace) if trace.counts_only else None


def content_of(trace: Trace) -> str:
    """The hash of what a trace states: its manifest, and its lists of shards with their hashes."""
    lists = sorted(p.name for p in trace.path.iterdir() if p.name.startswith("shards-"))
    stated = [(trace.path / name).read_bytes() for name in (schema.MANIFEST, *lists)]
    return hashlib.sha256(b"".join(stated)).hexdigest()


def _key(content: str, text: Amount) -> str:
    """What a page is made from."""
    return json.dumps([content, text, FORMAT, version("moe-inspect")])


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
        begin = cut(slug(name, "trace"), LONGEST_FILE).strip("-…")
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
