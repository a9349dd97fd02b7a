"""Rows of decisions, or of their assignments, in any order → the decisions of each router.

A first pass writes the rows to a temporary file and learns which tokens there are. A second pass
puts each row in its place. Memory grows only with the number of tokens, by a few bytes per token.
N rows, T tokens, L layers, K slots.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pyarrow as pa

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import NO_ID, Numbering
from moe_inspect.importers.context import ImportContext, Imported, named
from moe_inspect.importers.routed import DENSE_HINT, checked_ids, repeats
from moe_inspect.importers.tables.presets import Preset
from moe_inspect.importers.tables.read import TableChunk
from moe_inspect.model.config import MOST_EXPERTS, MOST_LAYERS
from moe_inspect.model.vocabulary import readable
from moe_inspect.text import plural, ranges
from moe_inspect.trace.schema import MOST_TOKEN_IDS, Router
from moe_inspect.trace.writer import RoutedBatch

BATCH_TOKENS = 16_384
PIECE = 2**18  # of rows
MOST_EMPTY = 2**20  # slots without a row, besides as many as there are rows
MOST_WEIGHT = float(np.finfo(np.float16).max)
MOST_NUMBER = 2**31 - 1
UNSTATED = -2  # of a token's id or phase, so far
PHASES = {"prefill": 0, "0": 0, "": 0, "decode": 1, "1": 1}


class Spool:
    """The rows of all files, in a temporary file.

    A group of rows is a file, or all files of a folder if each file name states a layer.
    experts: the number in the largest layer, 0 if only the files can state it. layers: group → its
    layers. documents: (group, name) → number. domains: the domain of each document."""

    def __init__(self, context: ImportContext, preset: Preset):
        self.context = context
        known = max(context.facts.experts.values(), default=0) if context.facts else 0
        self.experts = context.experts or known or preset.experts
        self.top_k = context.top_k or preset.top_k
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (until it is garbage)
        self.dtype, self.rows = np.dtype([("ids", "<i4", (0,))]), 0
        self.layers: dict[Path, set[int]] = {}
        self.documents: dict[tuple[Path, str], int] = {}
        self.domains: list[str] = []
        self.stated: dict[str, set[int]] = {"experts": set(), "top_k": set()}
        self.weighted = self.ordered = True
        self.unweighted, self.first_without = 0, ""  # how many rows, and what the first one lacks
        self.by_slot = self.has_weights = False
        self.texts: dict[int, str] = {}
        self.notes = [preset.note] * bool(preset.note)
        self.first_row: list[tuple[int, TableChunk]] = []  # of each chunk, without its table
        self._codes: dict[str, int] = {}  # text → number, of tokens without one
        self._seen: Counter[int] = Counter()  # (document, layer) → its rows so far

    @property
    def pieces(self) -> Iterator[np.ndarray]:
        self.file.seek(0)
        while len(rows := np.fromfile(self.file, self.dtype, PIECE)):
            yield rows

    def error(self, row: int, name: str, why: str) -> MoeInspectError:
        """Error that names the source file and row of a row of the temporary file."""
        first, chunk = next(one for one in reversed(self.first_row) if one[0] <= row)
        self.file.seek(row * self.dtype.itemsize)
        lines = np.fromfile(self.file, self.dtype, 1)["line"].tolist()
        at = replace(chunk, first=chunk.first + row - first, lines=lines if any(lines) else [])
        return at.error(0, name, why)

    def add(self, chunk: TableChunk) -> None:
        by_slot = "slot" in chunk or "expert" in chunk
        for name in ("layer", *(("position", "expert") if by_slot else ("experts",))):
            if name not in chunk:
                raise chunk.lacks(name)
        if self.rows and by_slot != self.by_slot:
            raise MoeInspectError(f"{chunk.path}: not all files have a row per slot")
        layer_N = chunk.numbers("layer", 0, MOST_LAYERS - 1)
        group = chunk.path.parent if "layer" in chunk.said else chunk.path
        self.layers.setdefault(group, set()).update(np.unique(layer_N).tolist())
        self._state(chunk)
        experts, top_k = (max(found, default=0) for found in self.stated.values())
        most, known = (experts or self.experts or MOST_EXPERTS) - 1, self.dtype["ids"].shape[0]
        self.by_slot = by_slot
        ids_NK = chunk.lists("expert" if by_slot else "experts", -1, most, known)
        K = ids_NK.shape[1]
        if not by_slot:
            _check_lists(chunk, ids_NK, top_k or self.top_k)
        if not known:
            numbers = ("line", "document", "position", "layer", "slot", "token_id", "decoded")
            lists = [("ids", "<i4", (K,)), ("weights", "<f2", (K,))]
            self.dtype = np.dtype([(name, "<i4") for name in numbers] + lists)
        rows = np.zeros(len(chunk), self.dtype)
        rows["line"], rows["layer"] = chunk.lines or 0, layer_N
        rows["document"] = self._documents(chunk, group)
        if "position" in chunk:
            rows["position"] = chunk.numbers("position", 0, MOST_NUMBER)
        else:
            rows["position"] = self._rows_before(rows)
        rows["slot"] = -1  # the next of its decision
        if "slot" in chunk:
            slots = top_k or self.top_k or self.context.known_top_k(chunk.path)
            rows["slot"] = chunk.numbers("slot", 0, slots - 1)
        if "dropped" in chunk:
            dropped_N = chunk.numbers("dropped", 0, MOST_NUMBER, empty=0) != 0
            ids_NK = np.where(dropped_N[:, None], -1, ids_NK)
            if n := int(dropped_N.sum()):
                self.notes.append(f"{chunk.path.name}: {plural(n, 'choice')} dropped")
        rows["ids"], rows["token_id"] = ids_NK, self._token_ids(chunk)
        if "phase" in chunk:
            rows["decoded"] = _decoded(chunk)
        rows["weights"] = self._weights(chunk, ids_NK)
        self.ordered &= "order" in chunk and bool(
            (np.diff(chunk.lists("order", -np.inf, np.inf, K, real=True)) <= 0).all()
        )
        rows.tofile(self.file)
        empty = chunk.table.schema.empty_table()
        self.first_row.append((self.rows, replace(chunk, table=empty, lines=[])))
        self.rows += len(rows)

    def _weights(self, chunk: TableChunk, ids_NK: np.ndarray) -> np.ndarray:
        weights, name = np.full(ids_NK.shape, np.nan), "weight" if self.by_slot else "weights"
        if name in chunk:
            self.has_weights = True
            weights = chunk.lists(name, -MOST_WEIGHT, MOST_WEIGHT, ids_NK.shape[1], real=True)
            weights = np.where(np.isnan(weights) & (ids_NK < 0), 0, weights)
        if (lack_NK := np.isnan(weights)).any():
            row, slot = divmod(int(lack_NK.argmax()), ids_NK.shape[1])
            lacks = str(chunk.error(row, name, "is unknown", slot))
            self.weighted, self.first_without = False, self.first_without or lacks
            self.unweighted += int(lack_NK.any(1).sum())
        return weights

    def _state(self, chunk: TableChunk) -> None:
        """Collect E and k if the rows state them. MoeInspectError if two values differ."""
        for name, found in self.stated.items():
            if name in chunk.said:
                found.add(int(chunk.said[name]))
            elif name in chunk and (name == "top_k" or "expert" in chunk):
                found.update(np.unique(chunk.numbers(name, 1, MOST_EXPERTS)).tolist())
        if "per_expert" in chunk:
            first = chunk.table["per_expert"][0].as_py()
            self.stated["experts"].add(len(first) if isinstance(first, list) else 0)
        for name, found in self.stated.items():
            given = getattr(self.context, name)
            if len(every := sorted(found | ({given} - {None}))) > 1:
                by = f", one of them by --{name.replace('_', '-')}" * bool(given)
                said = " and ".join(map(str, every))
                raise MoeInspectError(f"{chunk.path} has {name} {said}{by}: of one model?")

    def _rows_before(self, rows: np.ndarray) -> np.ndarray:
        """int64 [N]: how many rows of the same document and layer come before each."""
        key_N = rows["document"] * np.int64(MOST_LAYERS) + rows["layer"]
        group_N, keys = pd.factorize(key_N)
        before_G = np.array([self._seen[key] for key in keys.tolist()])
        counts = np.bincount(group_N).tolist()
        self._seen.update(dict(zip(keys.tolist(), counts, strict=True)))
        return before_G[group_N] + pd.Series(group_N).groupby(group_N).cumcount().to_numpy()

    def _documents(self, chunk: TableChunk, group: Path) -> np.ndarray:
        """The number of the document of each row. A document has the domain of its first row."""
        none = [""], np.zeros(len(chunk), np.intp)
        names, name_N = chunk.labels("document") if "document" in chunk else none
        labels, label_N = chunk.labels("domain") if "domain" in chunk else none
        default = chunk.said.get("domain") or named(group)
        rows, numbers = _first_rows(name_N, len(names)), list[int]()
        for name, row in zip(names, rows.tolist(), strict=True):
            numbers.append(self.documents.setdefault((group, name), len(self.documents)))
            if numbers[-1] == len(self.domains):
                self.domains.append(chunk.source.domain or labels[label_N[row]] or default)
        return np.array(numbers)[name_N]

    def _token_ids(self, chunk: TableChunk) -> np.ndarray | int:
        if "token_id" in chunk:
            ids_N = chunk.numbers("token_id", NO_ID, MOST_TOKEN_IDS - 1, empty=NO_ID)
            if "token_text" in chunk:
                texts, text_N = chunk.labels("token_text")
                ids, rows = np.unique(ids_N[::-1], return_index=True)  # the last row of each id
                pairs = zip(ids.tolist(), text_N[::-1][rows].tolist(), strict=True)
                self.texts |= {i: texts[n] for i, n in pairs if i >= 0}
            return ids_N
        if "token_text" not in chunk:
            return NO_ID
        texts, text_N = chunk.labels("token_text")
        ids = [self._codes.setdefault(text, len(self._codes)) for text in texts]
        if len(self._codes) > MOST_TOKEN_IDS:
            raise MoeInspectError(f"{chunk.path} has over {MOST_TOKEN_IDS:,} different tokens")
        self.texts |= dict(zip(ids, texts, strict=True))
        return np.array(ids)[text_N]

    def vocabulary(self) -> pa.Table | None:
        """token_id, token, where the rows have texts; byte-level ones (Ġ) decoded."""
        if not self.texts:
            return None
        byte_level = any("Ġ" in text for text in self.texts.values())
        ids = pa.array(range(max(self.texts) + 1), pa.int32())
        texts = [self.texts.get(i) for i in range(len(ids))]
        tokens = [readable(t) if t is not None and byte_level else t for t in texts]
        return pa.table({"token_id": ids, "token": tokens})


def in_order(documents: Sequence[tuple[Path, str]]) -> list[int]:
    """Indices of the documents by group. Within a group, numbered names come first, by number; the
    others keep their order."""
    at = {group: n for n, group in enumerate(dict.fromkeys(group for group, _ in documents))}

    def place(d: int) -> tuple[int, int]:
        group, name = documents[d]
        return at[group], int(name) if name.isdecimal() and len(name) < 19 else 2**63

    return sorted(range(len(documents)), key=place)


def decisions(context: ImportContext, preset: Preset, chunks: Iterator[TableChunk]) -> Imported:
    spool = Spool(context, preset)
    for chunk in chunks:
        spool.add(chunk)
    (where, first), *others = spool.layers.items()
    if odd := next((group for group, layers in others if layers != first), None):
        raise MoeInspectError(
            f"{odd} has layers {ranges(spool.layers[odd])}, {where} {ranges(first)}: of one model?"
        )
    experts, top_k = (max(found, default=0) for found in spool.stated.values())
    if not experts:
        known = None if context.facts or context.experts else preset.experts
        experts = known or context.known_experts(where)
    if not top_k:
        K = spool.dtype["ids"].shape[0]
        top_k = (spool.top_k or context.known_top_k(where)) if spool.by_slot else K
    routers = context.routers_of(first, experts, top_k, where)
    if spool.has_weights and not spool.weighted:
        rows = f"{spool.unweighted:,} of {plural(spool.rows, 'row')} lack a weight"
        context.warn(f"{spool.first_without}; {rows}: imported without weights")
    routers = [router.with_slot_order(known=spool.weighted or spool.ordered) for router in routers]
    placed, vocabulary = Placed(spool, where, routers), spool.vocabulary()
    placed.check(preset.last_layer_omits)
    batches, notes = placed.batches(), spool.notes
    return Imported(routers, batches, spool.weighted, notes=notes, vocabulary=vocabulary)


class Placed:
    """The decisions by document and position.

    key_T: document × 2^32 + position. ids and weights, [L, T, K], are in temporary files, which are
    mapped anew for each piece, so that written pages do not stay in memory. An id is stored + 2: 0
    means no row, 1 means −1."""

    def __init__(self, spool: Spool, where: Path, routers: list[Router]):
        names = [*spool.documents]
        document_D = in_order(names)
        rank_D = np.argsort(document_D)
        self.documents = [(names[d], spool.domains[d]) for d in document_D]
        self.routers, self.spool, self.where = routers, spool, where
        self.key_T = distinct_keys(_key(rows, rank_D) for rows in spool.pieces)
        L, T, K = shape = len(routers), len(self.key_T), routers[0].top_k
        if 2 * spool.rows * spool.dtype["ids"].shape[0] + MOST_EMPTY < L * T * K:
            what = f"{spool.rows:,} rows of {T:,} tokens × {L} layers × {K} slots"
            raise MoeInspectError(f"{where}: {what}: most are missing")
        self.shape, self.weighted = shape, spool.weighted
        self.ids = _scratch("<u4", shape)
        self.weights = _scratch("<f2", shape)
        self.of_token = {name: np.full(T, UNSTATED, np.int32) for name in ("token_id", "decoded")}
        layers, first = [router.layer for router in routers], 0
        for rows in spool.pieces:
            token_N = np.searchsorted(self.key_T, _key(rows, rank_D))
            self._put(rows, np.searchsorted(layers, rows["layer"]) * T + token_N, first)
            for name, value_T in self.of_token.items():
                before_N = value_T[token_N]
                value_T[token_N] = rows[name]
                differs = (before_N != UNSTATED) & (before_N != rows[name])
                if (differs := differs | (value_T[token_N] != rows[name])).any():
                    column = {"decoded": "phase"}.get(name, name)
                    n = int(differs.argmax())
                    why = f"differs from that of other rows of {self._place(int(token_N[n]))}"
                    raise spool.error(first + n, column, why)
            first += len(rows)

    def check(self, last_layer_omits: bool) -> None:
        """Raise MoeInspectError if a layer lacks a token that another layer has; the last layer may
        if `last_layer_omits`. Warn of slots without a row."""
        (L, T, K), spool, short, widest = self.shape, self.spool, 0, 0
        for n, router in enumerate(self.routers):
            rows_T = np.count_nonzero(self.ids()[n], axis=1)
            widest = max(widest, int(rows_T.max()))
            if missing := int((rows_T == 0).sum()):
                if not last_layer_omits or n < L - 1:
                    t = int((rows_T == 0).argmax())
                    (group, _), _ = self.documents[self.key_T[t] >> 32]
                    raise MoeInspectError(
                        f"{group}: layer {router.layer} has no row of {self._place(t)}, which "
                        f"other layers have ({plural(missing, 'token')} missing there): where a "
                        "layer routes none, write experts -1"
                    )
                spool.notes.append(
                    f"{self.where.name}: {plural(missing, 'decision')} without rows: of a prompt "
                    "some engines route the last token alone in the last layer"
                )
                spool.context.warn(spool.notes[-1])
            short += int((K - rows_T[rows_T > 0]).sum())
        if widest < K:
            why = f"no token has over {plural(widest, 'expert')} in a layer, and top-k is {K}"
            raise MoeInspectError(f"{self.where}: {why}")
        if short:
            what = f"{plural(short, 'slot')} of {L * T * K:,} without a row"
            spool.context.warn(f"{self.where}: {what}: imported as empty")

    def _place(self, t: int) -> str:
        _, name = self.documents[self.key_T[t] >> 32][0]
        return f"position {self.key_T[t] & MOST_NUMBER} of {name or 'the document'}"

    def _put(self, rows: np.ndarray, decision_N: np.ndarray, first: int) -> None:
        """Put rows in their decisions. MoeInspectError if a place is taken. first: the number of
        the first row."""
        K, cell_N, lists, what = self.shape[2], decision_N, slice(None), "two rows of one layer"
        by_slot, T = self.spool.by_slot, len(self.key_T)
        if by_slot:
            slot_N, what = rows["slot"], f"{what} and slot"
            if (slot_N < 0).any():
                rows_N = np.count_nonzero(self.ids().reshape(-1, K)[decision_N], axis=1)
                next_N = rows_N + pd.Series(decision_N).groupby(decision_N).cumcount()
                slot_N = np.where(slot_N < 0, np.minimum(next_N, K - 1), slot_N)
                what = f"over {plural(K, 'row')} of one layer"
            K, cell_N, lists = 1, decision_N * K + slot_N, slice(1)
        ids_CK = self.ids().reshape(-1, K)
        order = np.argsort(cell_N, kind="stable")
        again = np.diff(cell_N[order], prepend=-1) == 0
        again |= ids_CK[cell_N[order]].any(1)
        if again.any():
            n = int(order[again.argmax()])
            place = self._place(int(decision_N[n]) % T)
            raise self.spool.error(first + n, "layer", f"is {rows['layer'][n]}: {place} has {what}")
        ids_CK[cell_N] = rows["ids"][:, lists] + 2
        if by_slot:
            id_N = rows["ids"][:, 0]
            of_token_NK = ids_CK.reshape(self.shape[0] * T, -1)[decision_N]
            twice_N = (id_N >= 0) & ((of_token_NK == id_N[:, None] + 2).sum(1) > 1)
            if twice_N.any():
                n = int(twice_N.argmax())
                same_N = (decision_N == decision_N[n]) & (id_N == id_N[n])
                n = int(same_N.nonzero()[0][-1])
                why = f"is {id_N[n]} again, at {self._place(int(decision_N[n]) % T)}"
                raise self.spool.error(first + n, "expert", why)
        if self.weighted:
            self.weights().reshape(-1, K)[cell_N] = rows["weights"][:, lists]

    def batches(self) -> Iterator[RoutedBatch]:
        """Batches of one document and phase each, in the order of positions. A gap begins a new
        sequence."""
        numbers, T = Numbering(), len(self.key_T)
        document_T, position_T = self.key_T >> 32, self.key_T & MOST_NUMBER
        new_T = np.diff(document_T, prepend=-1) != 0
        gap_T = new_T | (np.diff(position_T, prepend=-1) != 1)
        sequence_T = gap_T.cumsum() - 1 + numbers.sequence(int(gap_T.sum()))
        decoded_T, token_id_T = self.of_token["decoded"], self.of_token["token_id"]
        starts = np.flatnonzero(new_T | (np.diff(decoded_T, prepend=0) != 0))
        for start, end in pairwise([*starts.tolist(), T]):
            (group, _), domain = self.documents[document_T[start]]
            if new_T[start]:
                tokens = int(np.searchsorted(document_T, document_T[start], "right")) - start
                numbers.document(domain, str(group), tokens)
            for first in range(start, end, BATCH_TOKENS):
                part = slice(first, min(first + BATCH_TOKENS, end))
                ids_LTK = self.ids()[:, part].astype(np.int64) - 2
                yield numbers.decisions(
                    [
                        checked_ids(np.maximum(ids_TK, -1), r, f"{group}, layer {r.layer}")
                        for ids_TK, r in zip(ids_LTK, self.routers, strict=True)
                    ],
                    position=position_T[part],
                    sequence=sequence_T[part],
                    token_id=token_id_T[part],
                    weights=[*np.array(self.weights()[:, part])] if self.weighted else None,
                    phase="decode" if decoded_T[start] else "prefill",
                )


def _check_lists(chunk: TableChunk, ids_NK: np.ndarray, top_k: int | None) -> None:
    K = ids_NK.shape[1]
    if top_k and top_k != K:
        raise chunk.error(0, "experts", f"has {plural(K, 'value')}, top-k is {top_k}")
    if (twice_N := repeats(ids_NK)).any():
        row = int(twice_N.argmax())
        ids = ids_NK[row].tolist()
        slot, expert = next((j, e) for j, e in enumerate(ids) if e >= 0 and e in ids[:j])
        why = f"names expert {expert} again{DENSE_HINT * (not any(ids))}"
        raise chunk.error(row, "experts", why, slot)


def _decoded(chunk: TableChunk) -> np.ndarray:
    texts, text_N = chunk.labels("phase")
    phases = [text.strip().lower() for text in texts]
    decoded_N = np.array([PHASES.get(phase, -1) for phase in phases])[text_N]
    what = "is {!r}, not prefill or decode"
    chunk.refuse(decoded_N < 0, "phase", lambda n: what.format(phases[text_N[n]][:40]))
    return decoded_N


def _first_rows(code_N: np.ndarray, codes: int) -> np.ndarray:
    """int64 [codes]: the first row that has each code. Every code has a row."""
    row_C = np.zeros(codes, np.int64)
    row_C[code_N[::-1]] = np.arange(len(code_N))[::-1]
    return row_C


def distinct_keys(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Sorted distinct numbers, from 0 on, of all parts. Memory stays within a few times theirs."""
    key_T, pending = np.zeros(0, np.int64), list[np.ndarray]()
    for part in parts:
        pending.append(_distinct(part))
        if sum(map(len, pending)) > len(key_T):  # so that no key is merged more than log T times
            key_T, pending = _distinct(np.concatenate([key_T, *pending])), []
    return _distinct(np.concatenate([key_T, *pending]))


def _distinct(values: np.ndarray) -> np.ndarray:
    # sorted runs, as most values are, merge in one go; np.unique hashes them
    ordered = np.sort(values, kind="stable")
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _key(rows: np.ndarray, rank_D: np.ndarray) -> np.ndarray:
    return rank_D[rows["document"]] << 32 | rows["position"]


def _scratch(dtype: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """Return a function that maps an array in a temporary file. The array begins as zeros, which
    take no space."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (until it is garbage)
    np.memmap(file, dtype, "w+", shape=shape)
    return partial(np.memmap, file, dtype, "r+", shape=shape)
