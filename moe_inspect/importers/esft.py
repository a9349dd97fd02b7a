"""Text files of ESFT: `expert_weights_{layer}.txt` with one line per sequence: ids, two tabs, gate
weights. 6 of 64 experts (DeepSeek-V2-Lite) unless a config says otherwise.

T tokens, K slots.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering
from moe_inspect.importers.context import ImportContext, Imported, importer
from moe_inspect.importers.routed import checked_ids
from moe_inspect.trace.schema import Router
from moe_inspect.trace.writer import RoutedBatch

EXPERTS, TOP_K = 64, 6
CHUNK_BYTES = 2**20  # of one layer's text parsed at once
NAME = re.compile(r"expert_weights_(\d{1,4})\.txt")
RANK = re.compile(r"rank_\d+")  # ESFT's script writes a folder per process: <domain>/rank_<r>/


@importer(
    "esft",
    gives=(
        "decisions with weights; a line is a sequence and a document, the name of the folder "
        "(above `rank_<r>`) its domain"
    ),
    sniff=lambda name, head: NAME.fullmatch(name) is not None,
)
def esft(context: ImportContext) -> Imported:
    tasks: dict[Path, dict[int, Path]] = {}
    label: dict[Path, str] = {}
    for path, source in context.files(NAME.pattern, "expert_weights_<layer>.txt"):
        found = NAME.fullmatch(path.name)
        if found is None:
            raise MoeInspectError(
                f"{path} is not named expert_weights_<layer>.txt: which layer is it from?"
            )
        tasks.setdefault(path.parent, {})[int(found[1])] = path
        folder = path.absolute().parent
        label[path.parent] = (
            source.domain or (folder.parent if RANK.fullmatch(folder.name) else folder).name
        )
    layers = set(next(iter(tasks.values())))
    for folder, files in tasks.items():
        if set(files) != layers:
            odd = min(layers ^ set(files))
            raise MoeInspectError(
                f"{folder} has other layers than {next(iter(tasks))}: layer {odd} is in one alone"
            )
    experts, top_k = EXPERTS, TOP_K
    if context.facts or context.experts or context.top_k:
        experts, top_k = context.known_experts("ESFT's text"), context.known_top_k("ESFT's text")
    routers = context.routers_of(layers, experts, top_k, next(iter(tasks)))
    numbers = Numbering()
    batches = chain.from_iterable(
        _task(context, numbers, label[folder], [files[r.layer] for r in routers], routers)
        for folder, files in tasks.items()
    )
    return Imported(routers, batches, weights=True, notes=["token ids are not in the source"])


def _task(
    context: ImportContext,
    numbers: Numbering,
    domain: str,
    paths: list[Path],
    routers: list[Router],
) -> Iterator[RoutedBatch]:
    """Reads the files of all layers in parallel, some lines at a time."""
    numbers.domain(domain)
    readers = [context.lines(path) for path in paths]
    while first := _lines(readers[0]):
        others = [list(islice(reader, len(first))) for reader in readers[1:]]
        ids, weights, sizes = [], [], []
        for lines, path, router in zip([first, *others], paths, routers, strict=True):
            if len(lines) != len(first):
                raise MoeInspectError(
                    f"{path} has {len(first) - len(lines)} lines fewer than {paths[0]}"
                )
            ids_TK, weights_TK, tokens = _parsed(lines, router, path)
            ids.append(ids_TK)
            weights.append(weights_TK)
            sizes.append(tokens)
            if tokens != sizes[0]:
                n = next(n for n, (a, b) in enumerate(zip(tokens, sizes[0], strict=True)) if a != b)
                why = f"that of {paths[0]} {sizes[0][n]}"
                raise MoeInspectError(f"{path} line {lines[n][0]} has {tokens[n]} tokens, {why}")
        at = 0
        for (number, _), T in zip(first, sizes[0], strict=True):
            part, at = slice(at, at + T), at + T
            numbers.document(domain, f"{paths[0].parent}:{number}", T)
            yield numbers.decisions(
                [i[part] for i in ids],
                position=np.arange(T, dtype=np.int32),
                sequence=numbers.sequence(),
                weights=[w[part] for w in weights],
            )
    for reader, path in zip(readers[1:], paths[1:], strict=True):
        if next(reader, None) is not None:
            raise MoeInspectError(f"{path} has more lines than {paths[0]}")


def _lines(reader: Iterator[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """So many that they have CHUNK_BYTES."""
    taken, size = list[tuple[int, bytes]](), 0
    while size < CHUNK_BYTES and (one := next(reader, None)):
        taken.append(one)
        size += len(one[1])
    return taken


def _parsed(
    lines: list[tuple[int, bytes]], router: Router, path: Path
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """ids [T, K], weights float16 [T, K], tokens of each line."""
    k, left, right, tokens = router.top_k, [], [], []
    for number, line in lines:
        ids, gap, weights = line.rstrip(b"\r\n\t ").partition(b"\t\t")
        n, m = ids.count(b"\t") + 1, weights.count(b"\t") + 1
        if not gap or n != m or n % k:
            said = f"{n} ids and {m if gap else 0} weights"
            why = f"not {k} per token of each, with two tabs between them"
            raise MoeInspectError(f"{path} line {number} has {said}: {why}")
        left.append(ids)
        right.append(weights)
        tokens.append(n // k)
    try:
        ids_N, weights_N = _numbers(left, pa.uint16()), _numbers(right, pa.float32())
    except (pa.ArrowInvalid, UnicodeDecodeError):
        raise _wrong_line(lines, path) from None
    with np.errstate(over="ignore"):
        rounded_N = weights_N.astype(np.float16)
    if not np.isfinite(rounded_N).all():
        at = int((~np.isfinite(rounded_N)).argmax())
        line = lines[int(np.searchsorted(np.cumsum(tokens) * k, at, side="right"))][0]
        raise MoeInspectError(f"{path} line {line} has a gate weight of {weights_N[at]}")
    return (
        checked_ids(ids_N.reshape(-1, k), router, f"{path} lines {lines[0][0]}-{lines[-1][0]}"),
        rounded_N.reshape(-1, k),
        tokens,
    )


def _numbers(parts: list[bytes], kind: pa.DataType) -> np.ndarray:
    text = pa.array([b"\t".join(parts).decode("ascii")], pa.large_string())
    return pc.cast(pc.split_pattern(text, "\t").flatten(), kind).to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]


def _wrong_line(lines: list[tuple[int, bytes]], path: Path) -> MoeInspectError:
    """The error for the first line that holds anything but numbers."""
    for number, text in ((number, text) for number, line in lines for text in line.split()):
        where = f"{path} line {number} holds {text[:40]!r}, which is not"
        try:
            float(text)
            if b"." not in text and not 0 <= int(text) < 2**16:
                return MoeInspectError(f"{where} an expert id")
        except ValueError:
            return MoeInspectError(f"{where} a number")
    return MoeInspectError(
        f"{path} lines {lines[0][0]}-{lines[-1][0]} hold something that is not a number"
    )
