"""What every importer is given and gives back: an ImportContext (files, what is known of the model,
callbacks) → an Imported (routers, batches for the writer).

T tokens, K slots, E experts, D domains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS, ModelFacts
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import CountedBatches, Document, RoutedBatch

MOST_LINE_BYTES = 2**30  # a response of a million tokens fits
MOST_JSON_BYTES = 2**28  # of a file that is one JSON value
MOST_DOMAINS = 10_000
WINDOWS = 64  # of a counts-only trace: its load over time, in so many shards at most
NO_ID = -1  # a token whose vocabulary id the source does not say


@dataclass(frozen=True)
class ImportSource:
    """A file or folder, and the label of its tokens (None: the importer chooses one)."""

    path: Path
    domain: str | None


@dataclass
class ImportContext:
    """What an importer is given.

    facts: of the model, from its config, where the user gave one.
    experts, top_k, pipeline_stages: the user's, where neither files nor a config give them.
    warn: is called with a line for each oddity.
    read: is called with the number of bytes read since the last call."""

    sources: list[ImportSource]
    facts: ModelFacts | None = None
    experts: int | None = None
    top_k: int | None = None
    pipeline_stages: int | None = None
    warn: Callable[[str], None] = print
    read: Callable[[int], None] = lambda n: None

    def files(self, pattern: str, what: str) -> list[tuple[Path, ImportSource]]:
        """Files whose name matches, in the sources' folders and their subfolders; a source that is
        a file is taken whatever its name is. `what`: what they are, for the error."""
        found: list[tuple[Path, ImportSource]] = []
        for source in self.sources:
            if source.path.is_dir():
                inside = sorted(
                    p
                    for p in source.path.rglob("*")
                    if p.is_file() and re.fullmatch(pattern, p.name)
                )
                if not inside:
                    raise MoeInspectError(f"{source.path} holds no {what}")
                found += [(p, source) for p in inside]
            elif source.path.is_file():
                found.append((source.path, source))
            else:
                raise MoeInspectError(f"no file or folder {source.path}")
        return found

    def lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """(number from 1, line) of each line that is not empty."""
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MOST_LINE_BYTES):
                number += 1
                if len(line) == MOST_LINE_BYTES:
                    raise MoeInspectError(
                        f"{path} line {number} is over {MOST_LINE_BYTES:,} bytes long: it is not "
                        "a file of this format"
                    )
                self.read(len(line))
                if not line.isspace():
                    yield number, line

    def json_lines(self, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, object) of each line."""
        for number, line in self.lines(path):
            where = f"{path} line {number}"
            yield where, parsed_object(line, where)

    def json(self, path: Path) -> Any:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise MoeInspectError(
                f"{path} is one JSON value of {size:,} bytes, over {MOST_JSON_BYTES:,}: write one "
                "object per line"
            )
        self.read(size)
        return parsed(path.read_bytes(), str(path))

    def known_top_k(self, where: object) -> int:
        """top-k, the same for all routers, where the file does not give it."""
        stated = (
            {self.top_k} if self.top_k else set(self.facts.top_k.values()) if self.facts else set()
        )
        if len(stated) != 1:
            raise MoeInspectError(
                f"{where} does not say how many experts each token uses: give --model, --config or "
                "--top-k"
            )
        return stated.pop()

    def known_experts(self, where: object) -> int:
        stated = (
            {self.experts}
            if self.experts
            else set(self.facts.experts.values())
            if self.facts
            else set()
        )
        if len(stated) != 1:
            raise MoeInspectError(
                f"{where} does not say how many experts there are: give --model, --config or "
                "--experts"
            )
        return stated.pop()

    def routers_of(
        self, layers: Iterable[int], experts: int, top_k: int, where: object
    ) -> list[Router]:
        """A router for each block. MoeInspectError where the config disagrees."""
        layers = sorted(layers)
        if not layers:
            raise MoeInspectError(f"{where} holds no decisions")
        if (
            not 1 <= top_k <= experts <= MOST_EXPERTS
            or layers[0] < 0
            or layers[-1] >= 2**16
            or len(layers) > MOST_LAYERS
        ):
            raise MoeInspectError(
                f"{where}: {top_k} of {experts} experts in layers {layers[0]}-{layers[-1]} is "
                "not possible"
            )
        if self.facts is None:
            return [Router(layer, "experts", f"layers.{layer}", experts, top_k) for layer in layers]
        for layer in layers:
            if layer not in self.facts.experts:
                raise MoeInspectError(
                    f"{where}: layer {layer} has experts here and none in {self.facts.id}: is "
                    "the config the model's?"
                )
            stated = self.facts.experts[layer], self.facts.top_k[layer]
            if stated != (experts, top_k):
                raise MoeInspectError(
                    f"{where}: {top_k} of {experts} experts in layer {layer}, {stated[1]} of "
                    f"{stated[0]} in {self.facts.id}: is it the config of this model?"
                )
        return [r for r in self.facts.routers() if r.layer in set(layers)]


@dataclass(frozen=True)
class Imported:
    """What an importer gives back. `batches`: in the order of the trace. `notes`: what the source
    does not say, for the manifest."""

    routers: list[Router]
    batches: Iterator[RoutedBatch | CountedBatches]
    weights: bool = False
    logits: bool = False
    counts_only: bool = False
    notes: list[str] = field(default_factory=list)


def parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MoeInspectError(f"{where} is not JSON: {first_line(error)}") from None


def parsed_object(data: bytes, where: str) -> dict[str, Any]:
    value = parsed(data, where)
    if not isinstance(value, dict):
        raise MoeInspectError(f"{where} is {str(value)[:40]!r}, not an object")
    return value


def integer(value: Any, where: str, low: int = 0, high: int = 2**31 - 1) -> int:
    """`value`, if it is an integer of that range. `where`: file and field, for the error."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MoeInspectError(
            f"{where} is {str(value)[:60]!r}, not a number from {low:,} to {high:,}"
        )
    return value


def integers(
    values: Any,
    where: str,
    shape: tuple[int | None, ...] = (None,),
    low: int = 0,
    high: int = 2**31 - 1,
) -> np.ndarray:
    """int64 array of nested lists of integers of that range. None in `shape`: any length."""
    try:
        array = np.array(values) if isinstance(values, list) else None
    except (ValueError, OverflowError, RecursionError):  # ragged
        array = None
    if array is not None and not array.size and all(extent in (None, 0) for extent in shape[:1]):
        array = np.zeros([extent or 0 for extent in shape], np.int64)
    if array is None or array.dtype.kind not in "iu" or len(array.shape) != len(shape):
        raise MoeInspectError(
            f"{where} is not a {len(shape)}-dimensional list of integers: {str(values)[:40]!r}"
        )
    if any(wanted not in (None, found) for wanted, found in zip(shape, array.shape, strict=True)):
        raise MoeInspectError(
            f"{where} has shape {list(array.shape)}, not "
            f"{[w if w is not None else 'any' for w in shape]}"
        )
    if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
        wrong = array[(array < low) | (array > high)].reshape(-1)[0]
        raise MoeInspectError(f"{where} holds {int(wrong)}, not of {low:,} to {high:,}")
    return array.astype(np.int64, copy=False)


class Numbering:
    """Assigns numbers to documents, sequences, batches and domains in order of appearance."""

    def __init__(self) -> None:
        self.documents = self.sequences = self.batches = 0
        self.domains: tuple[str, ...] = ()
        self._code: dict[str, int] = {}
        self._named: dict[tuple[str, str], int] = {}

    def domain(self, label: str) -> int:
        if label not in self._code:
            if len(self._code) >= MOST_DOMAINS:
                raise MoeInspectError(
                    f"over {MOST_DOMAINS:,} domains, {label[:40]!r} the last: does the field "
                    "hold names of documents?"
                )
            self._code[label] = len(self._code)
            self.domains = (*self.domains, label)
        return self._code[label]

    def document(
        self, domain: str, source: str, tokens: int, name: str | None = None
    ) -> tuple[int, list[Document]]:
        """The document's number, and its row where it is new. Sequences with the same `name` belong
        to one document."""
        if name is not None and (domain, name) in self._named:
            return self._named[domain, name], []
        number, self.documents = self.documents, _below_int32(self.documents + 1)
        if name is not None:
            self._named[domain, name] = number
        return number, [Document(number, domain, source, tokens)]

    def sequence(self, n: int = 1) -> int:
        """The first of the next n."""
        first, self.sequences = self.sequences, _below_int32(self.sequences + n)
        return first

    def batch(self) -> int:
        number, self.batches = self.batches, _below_int32(self.batches + 1)
        return number


def _below_int32(number: int) -> int:
    if number >= 2**31:
        raise MoeInspectError(
            "over 2,147,483,647 sequences, more than a trace can number: import the source in parts"
        )
    return number


def batch_of_decisions(
    numbers: Numbering,
    ids: list[np.ndarray],
    *,
    document: int,
    domain: int,
    sequence: np.ndarray | int,
    position: np.ndarray,
    token_id: np.ndarray | None = None,
    weights: list[np.ndarray] | None = None,
    logits: list[np.ndarray] | None = None,
    documents: Sequence[Document] = (),
    phase: str = "prefill",
    batch: int | None = None,
) -> RoutedBatch:
    """A batch of one document."""
    T = len(position)
    return RoutedBatch(
        batch=numbers.batch() if batch is None else batch,
        token_id=np.full(T, NO_ID, np.int32)
        if token_id is None
        else token_id.astype(np.int32, copy=False),
        document=np.full(T, document, np.int32),
        sequence=np.broadcast_to(np.asarray(sequence, np.int32), T),
        position=position.astype(np.int32, copy=False),
        domain=np.full(T, domain, np.int32),
        domains=numbers.domains,
        ids=ids,
        weights=weights,
        logits=logits,
        documents=list(documents),
        phase=phase,
    )


def batch_of_counts(
    load_LDE: Sequence[np.ndarray],
    routers: Sequence[Router],
    domains: Sequence[str],
    batch: int,
    first_choice: list[np.ndarray] | None = None,
    weight_sum: list[np.ndarray] | None = None,
) -> CountedBatches:
    """A batch of counts [D, E] of each router. The number of tokens, which sources of counts do not
    give, is the smallest that each domain's largest router needs."""
    tokens_D = np.zeros(len(domains), np.int64)
    for load_DE, router in zip(load_LDE, routers, strict=True):
        tokens_D = np.maximum(tokens_D, -(-load_DE.sum(1) // router.top_k))
    return CountedBatches(
        batch, int(tokens_D.sum()), list(domains), list(load_LDE), first_choice, weight_sum
    )


def windows_of(n: int, most: int = WINDOWS) -> np.ndarray:
    """int64 [n]: the window of each of n steps; at most `most` windows, of about equal size."""
    return np.arange(n) * min(n, most) // max(n, 1)


def one_ranks_experts(load_LE: np.ndarray) -> tuple[int, int] | None:
    """(first, last) where only a contiguous block of at most half of the experts has load, the same
    in all layers: what one rank of an expert-parallel model counts."""
    E = load_LE.shape[1]
    there = np.nonzero(load_LE.any(0))[0]
    if not len(there) or E < 4 or there[-1] - there[0] + 1 > E // 2:
        return None
    return int(there[0]), int(there[-1])
