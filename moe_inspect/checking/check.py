"""`moe_inspect.check`: what is wrong with a trace, with arrays of routes, or with the responses of
an engine. Of a trace the files come first, then the routes.

T tokens, B blocks of the model, L layers, K slots, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_inspect.analysis.counting.engine import count_trace
from moe_inspect.analysis.counting.select import select
from moe_inspect.checking import by_text, rows
from moe_inspect.checking.rows import LEVEL, Recorded, found
from moe_inspect.comparison.mismatch import integers_of
from moe_inspect.errors import MoeInspectError, check_whole
from moe_inspect.importers.context import ImportContext, ImportSource, formats, sniff
from moe_inspect.importers.responses import Response
from moe_inspect.importers.routed import unrouted_ends
from moe_inspect.later import pd
from moe_inspect.model.config import MOST_EXPERTS, read_facts
from moe_inspect.reporting.shown import Shown
from moe_inspect.reporting.verdict.findings import Finding, most_important_first
from moe_inspect.text import plural, print_stderr, ranges
from moe_inspect.trace.reader import Trace, address, open_trace, shards_of
from moe_inspect.trace.schema import MANIFEST, Router
from moe_inspect.trace.shard import Shard, codes, run_edges
from moe_inspect.trace.verify import COUNTED, Verification, verify

MOST_CELLS = 2**25  # tokens · routers · slots that are looked at
Against = Trace | str | Path | None
Group = tuple[str, int, int]  # stack, experts, top-k: routers that are looked at together
RowsCheck = Callable[[Recorded], Iterator[tuple[Finding, np.ndarray]]]
# each without what those before have found
ROWS: tuple[RowsCheck, ...] = (
    *(rows.filled, rows.out_of_range, rows.layers_filled, rows.twice, rows.repeated_rows),
    *(rows.repeated_block, rows.layer_copied, rows.sorted_ids, rows.loads, rows.groups),
    rows.weights,
)


@dataclass(repr=False)
class Checked(Shown):
    """The result of `check`.

    source: what was checked, in words. findings: the gravest first. read: a sentence about the
    files of a trace, and one about the routes. files: of a trace, its counts and its state."""

    source: str
    findings: list[Finding]
    read: list[str]
    files: Verification | None = None

    def __post_init__(self) -> None:
        self.tables = {"findings": self.table()}

    @property
    def wrong(self) -> list[str]:
        """The kinds of what is wrong: every finding is, but for notes."""
        return [*dict.fromkeys(one.kind for one in self.findings if one.severity != "note")]

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __repr__(self) -> str:
        return f"Checked({self.source!r}, {plural(len(self.findings), 'finding')})"

    def table(self, values: bool = False) -> pd.DataFrame:
        """A row per finding: severity, kind, where, p (0 where it is certain), text; `values`: and
        all its numbers."""
        columns = ["severity", "kind", "where", "p", "text", *(["values"] if values else [])]
        of = [{**one.values, **vars(one)} for one in self.findings]
        table = pd.DataFrame([[one[name] for name in columns] for one in of], columns=columns)
        texts = dict.fromkeys(("severity", "kind", "where", "text"), "str")
        return table.astype({**texts, "p": "float64"})

    @property
    def title(self) -> str:
        return f"check {self.source}"

    @property
    def said(self) -> list[Finding | str]:
        return [*self.findings, *self.read]


def check(
    source: Any,
    against: Against = None,
    quick: bool = False,
    *,
    token_ids: Any = None,
    lengths: Any = None,
    model: str | Path | None = None,
    experts: int | None = None,
    top_k: int | None = None,
) -> Checked:
    """Checks a trace, an array of routes, or the responses of an engine: what is wrong, where, how
    sure that is, and which published bug looks like it.

        assert moe_inspect.check("runs/a").ok

    Of a trace first every byte of its files is read (checksums, schema, counts); if they are not
    broken, its routes are checked. In a training loop, an array is checked:

        checked = moe_inspect.check(routed_experts, token_ids=token_ids, experts=64)
        if not checked.ok:
            raise RuntimeError(str(checked))

    source     a trace, its path or URL; or a file or folder of an engine's responses, as
               `import_trace` reads them; or an array of integers [T, L, K]: the experts of each
               token, layer and slot (NumPy, or anything that NumPy reads; tensors of a GPU are
               copied), −1 where a slot routed nowhere; layers with experts only
    against    a right trace of the same model, on any text: is each layer the same one?
    quick      only the files of a trace, not its routes
    token_ids  of an array: integers [T], −1 where unknown; without them a shift, and rows at the
               wrong text, cannot be told
    lengths    of an array: integers, the tokens of each sequence, one after the other; by default
               it is one sequence
    model      of responses: a hub id, a directory or a config.json, for what the files lack
    experts    of an array, or of responses that do not give it: experts per layer
    top_k      of responses that do not give it: experts per token

    Returns a `Checked`. Its `findings` have `values` with `where`, `p` (0 where `certain`), `known`
    (published bugs that look like it) and `option` (what mends it). Of a large trace the routes of
    the first tokens are checked, and the result states how many. Raises MoeInspectError where there
    is no trace, or a shape or a type is wrong."""
    facts: Mapping[str, Any] = {"model": model, "experts": experts, "top_k": top_k}
    if not isinstance(source, Trace | str | Path):
        if against is not None or quick or model or top_k:
            raise MoeInspectError("an array has neither files nor a right trace beside it")
        return check_array(source, token_ids, lengths, experts)
    if token_ids is not None or lengths is not None:
        raise MoeInspectError("token_ids and lengths are those of an array")
    if isinstance(source, Trace) or _is_trace(Path(source)):
        if any(facts.values()):
            raise MoeInspectError(f"{source} is a trace, which says what its model is")
        return check_trace(source, against, quick)
    if quick:
        raise MoeInspectError(f"{source} is no trace: quick checks the files of one")
    return check_responses(Path(source), against, facts)


def _is_trace(path: Path) -> bool:
    """Whether it is no file or folder of another tool. A trace may have lost its manifest."""
    return not path.exists() or (path / MANIFEST).exists() or any(path.glob("routing/*.parquet"))


def check_trace(trace: Trace | str | Path, against: Against = None, quick: bool = False) -> Checked:
    """Checks a trace: its files, and unless they are broken or it is `quick` its routes. against: a
    right trace of the same model, on any text."""
    if quick and against is not None:
        raise MoeInspectError("quick checks the files only: it takes no trace to check against")
    files, where = verify(trace), address(trace)
    if not files.ok:
        row = "" if files.row is None else f" row {files.row}"
        broken = found(
            "broken_file", f"{files.file}{row}: {files.violation}.", where=f"{files.file}{row}"
        )
        return Checked(
            where, [broken], ["The routes were not read, as the files are broken."], files
        )
    counts = ", ".join(plural(getattr(files, name), name[:-1]) for name in COUNTED)
    read = [
        f"Nothing wrong in the files: {counts} in {plural(files.shards, 'shard')}.",
        f"Checked in the files: {'; '.join(files.checked)}.",
    ]
    opened = open_trace(trace)
    notes = [] if files.status == "complete" else [_unfinished(files)]
    if unlinked := opened.manifest["counts"].get("unlinked"):
        notes.append(_unlinked(unlinked))
    if against is not None and opened.counts_only:
        raise MoeInspectError(f"{where} holds counts only, no decisions to check against another")
    if quick:
        return Checked(where, notes, [*read, "The routes were not checked."], files)
    if opened.counts_only:
        read.append("The routes were not checked, as the trace holds counts only.")
        return Checked(where, [*_of_counts(opened), *notes], read, files)
    listed, routes = _routes(recorded(opened), against, where, opened.n_tokens)
    return Checked(where, [*listed, *notes], [*read, routes], files)


def _of_counts(trace: Trace) -> Iterator[Finding]:
    """The findings in a trace of counts: missing ranks, and routers with fewer assignments than
    tokens × k."""
    if not trace.n_tokens:
        return
    counts = count_trace(trace, select(trace))
    loads = [load_E for r in counts.indices if (load_E := counts.load_E(r)).any()]
    if len({len(load_E) for load_E in loads}) == 1:
        yield from rows.missing_ranks(np.array(loads), max(r.top_k for r in trace.routers))
    slots_L = np.array([counts.tokens_of(r) * trace.routers[r].top_k for r in counts.indices])
    total_L = np.array([int(counts.load_E(r).sum()) for r in counts.indices])
    if (short_L := total_L < slots_L).any():
        worst = int((slots_L - total_L).argmax())
        layers = sorted({trace.routers[r].layer for r in np.flatnonzero(short_L).tolist()})
        where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)}"
        what = (
            f"Counts of {where} are fewer than tokens × k: layer {trace.routers[worst].layer} has "
            f"{total_L[worst]:,} assignments of {slots_L[worst]:,}."
        )
        lost = int((slots_L - total_L).sum())
        yield found("fewer_assignments", what, where=where, assignments=lost)


def _unlinked(sequences: int) -> Finding:
    what = (
        f"{plural(sequences, 'sequence')} began in the middle: what came before them is unknown, "
        "such as the cache that they continue, or the text that an encoder read for them."
    )
    return found("unlinked", what, sequences=sequences)


def _unfinished(files: Verification) -> Finding:
    text = f"The trace {files.state}."
    if files.uncommitted:
        left = plural(len(files.uncommitted), "file")
        text += f" Its writer was stopped in {left}, which readers ignore and --resume deletes."
    return found("unfinished", text)


def check_array(ids: Any, token_ids: Any, lengths: Any, experts: int | None) -> Checked:
    """The arguments are those of `check`."""
    ids_TLK = integers_of(ids, "ids")
    if experts is None:
        raise MoeInspectError("give experts, the number of them per layer")
    check_whole("experts", experts, 1)
    if experts > MOST_EXPERTS:
        raise MoeInspectError(f"experts is {experts}: give at most {MOST_EXPERTS:,}")
    if ids_TLK.ndim != 3:
        raise MoeInspectError(
            f"ids have the shape {ids_TLK.shape}: expected [tokens, layers, slots]"
        )
    T = len(ids_TLK)
    known = None if token_ids is None else integers_of(token_ids, "token_ids").ravel()
    length_S = None if lengths is None else integers_of(lengths, "lengths").ravel()
    if length_S is not None and length_S.min(initial=0) < 0:
        raise MoeInspectError(f"lengths has {length_S.min()}: a length is 0 or more")
    said = _lengths(T, known, length_S)
    if said or known is None:  # rows and tokens do not belong together
        known = np.full(T, -1)
    if said or length_S is None:
        length_S = np.array([T])
    listed = said
    if ids_TLK.size:
        begin_S = (np.cumsum(length_S) - length_S)[length_S > 0]
        recorded = Recorded(narrow(ids_TLK), int(experts), range(ids_TLK.shape[1]), known, begin_S)
        listed = most_important_first([*said, *findings(recorded)])
    many = f"{plural(T, 'token')}, {plural(ids_TLK.shape[1], 'layer')}"
    return Checked("array", listed, [_read(listed, many)])


def narrow(ids_TLK: np.ndarray) -> np.ndarray:
    """[K, T, L], in as few bytes as hold all ids: every check is faster."""
    low, high = int(ids_TLK.min()), int(ids_TLK.max())
    if high > np.iinfo(np.int64).max:  # as no expert is
        ids_TLK, high = np.minimum(ids_TLK, np.iinfo(np.int64).max), np.iinfo(np.int64).max
    fits = (np.dtype(name) for name in ("i1", "i2", "i4", "i8"))
    dtype = next(d for d in fits if low >= np.iinfo(d).min and high <= np.iinfo(d).max)
    return np.ascontiguousarray(np.moveaxis(ids_TLK.astype(dtype), 2, 0))


def _lengths(T: int, known: np.ndarray | None, length_S: np.ndarray | None) -> list[Finding]:
    """Whether there are as many rows as token ids, and as the lengths say."""
    S = 1 if length_S is None else len(length_S)
    if known is not None and len(known) != T:
        return [wrong_lengths(T, len(known), "token ids", S)]
    if length_S is not None and length_S.sum() != T:
        return [wrong_lengths(T, int(length_S.sum()), "tokens by lengths", S)]
    return []


def wrong_lengths(rows_of: int, tokens: int, name: str, S: int) -> Finding:
    lack = tokens - rows_of
    each = ""
    if S and lack == S:
        each = ", one for each sequence"
    elif S > 1 and lack == S - 1:
        each = ", one for each boundary of two sequences"
    what = (
        f"{plural(rows_of, 'row')} of routes for {tokens:,} {name}: {abs(lack):,} too "
        f"{'few' if lack > 0 else 'many'}{each}."
    )
    return found("lengths", what, rows=rows_of, tokens=tokens)


def _routes(
    groups: Iterable[tuple[Group, Recorded, bool]],
    against: Against,
    where: str,
    of: int,
    found: Sequence[Finding] = (),
) -> tuple[list[Finding], str]:
    """The findings, and what was looked at: where a stack has many tokens, the first ones; how many
    routers of the right trace choose by the text, so that others would show."""
    right = None
    if against is not None:
        opened = open_trace(against)
        if opened.counts_only:
            raise MoeInspectError(
                f"{address(opened)} holds counts only, no decisions to check against"
            )
        right = {group: r for group, r, _ in recorded(opened)}
    listed, tokens, routers, all_whole = [*found], dict[str, int](), 0, True
    compared = 0
    for group, r, whole in groups:
        beside = None
        if right is not None:
            if (known := right.get(group)) is None or known.L != r.L:
                said = f"{address(against)} has other routers than {where}"
                raise MoeInspectError(f"{said}: check against a trace of the same model")
            beside = known, by_text.usual(r, known)
            compared += int((by_text.tail(beside[1], r.L) < LEVEL).sum())
        listed += findings(r, beside)
        tokens[group[0]] = r.T  # of a stack, whose routers see the same
        routers, all_whole = routers + r.L, all_whole and whole
    looked_at, many = sum(tokens.values()), plural(of, "token")
    if not all_whole:
        many = f"the first {looked_at:,} of {many}"
    elif drafts := of - looked_at:
        many = f"{plural(looked_at, 'token')} (without {plural(drafts, 'rejected draft')})"
    many += f", {plural(routers, 'router')}"
    if right is not None:
        many += f" ({compared} of them known well enough to tell them from others)"
    return most_important_first(listed), _read(listed, many)


def _read(listed: Sequence[Finding], many: str) -> str:
    said = plural(len(listed), "finding") if listed else "Nothing wrong"
    return f"{said} in the routes of {many}."


def findings(r: Recorded, beside: by_text.Known | None = None) -> Iterator[Finding]:
    """What every check finds. beside: a right recording of the same layers."""
    chosen = False  # whether tokens are left out for their experts
    for check in ROWS:
        if chosen and check is rows.loads:
            continue
        left_T, left_L = np.zeros(r.T, bool), np.zeros(r.L, bool)
        for one, which in check(r):
            yield one
            chosen |= check in (rows.out_of_range, rows.twice)
            if len(which) and check in (rows.layers_filled, rows.layer_copied):
                left_L |= which
            elif len(which):
                left_T |= which
        if left_T.all() or left_L.all():
            return
        if beside is not None:
            known, usual_NL = beside
            beside = known.without_layers(left_L), usual_NL[:, ~left_L]
        r = r.select(~left_T).without_layers(left_L)
    shifted = [*by_text.shifts(r)]
    yield from shifted
    if beside is not None and not shifted:
        yield from by_text.habits(r, *beside)


def recorded(trace: Trace) -> Iterator[tuple[Group, Recorded, bool]]:
    """Of each kind of routers, the first tokens by sequence, and whether that is all."""
    groups = _grouped(trace.routers, range(len(trace.routers)))
    most = MOST_CELLS // sum(router.top_k for router in trace.routers)
    config = (trace.manifest.get("model") or {}).get("config")
    for group, routers in groups.items():
        parts, left = list[tuple[np.ndarray, np.ndarray, np.ndarray | None]](), most
        for shard in shards_of(trace, "checking routes"):
            part = _part(trace, shard, routers, left + 1)  # one more tells that there is more
            parts.append(part)
            if (left := left - len(part[0][0])) < 0:
                break
        if left == most:
            continue
        text = np.concatenate([part[0] for part in parts], axis=1)[:, :most]
        order = np.lexsort((text[1], text[0]))
        sequence_T, position_T, id_T = text[:, order]
        # what is not next to each other is not compared as if it were
        begin_S = run_edges(sequence_T, position_T - np.arange(len(order)))[:-1]
        slots_KTL = np.concatenate([part[1] for part in parts], axis=1)[:, order]
        weights = [part[2] for part in parts if part[2] is not None]
        listed = [trace.routers[n] for n in routers]
        yield (
            group,
            Recorded(
                slots_KTL,
                group[1],
                [router.layer for router in listed],
                id_T,
                begin_S,
                np.concatenate(weights, axis=1)[:, order] if weights else None,
                all(router.first_choice_known for router in listed),
                config if isinstance(config, dict) else {},
            ),
            left >= 0,
        )


def _part(
    trace: Trace, shard: Shard, routers: Sequence[int], most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Of a shard: sequence, position and id [3, T]; experts and gate weights [K, T, L]."""
    table = shard.tokens(["sequence", "position", "token_id", "phase"])
    code_T, phases = codes(table["phase"])
    # rejected drafts have the positions of other tokens
    kept_T = ~np.array([phase == "draft" for phase in phases], bool)[code_T]
    seen_T = shard.seen(routers[0])
    seen_T = np.ones(len(kept_T), bool) if seen_T is None else seen_T
    at = np.flatnonzero(kept_T[seen_T])[:most]
    names = ("sequence", "position", "token_id")
    text = np.stack([table[name].to_numpy().astype(np.int64)[seen_T][at] for name in names])
    ids = np.stack([shard.ids(n).T[:, at] for n in routers], axis=2)
    weights = None
    if trace.has_weights:
        weights = np.stack([np.stack(shard.slot_weights(n))[:, at] for n in routers], axis=2)
    return text, ids, weights


def check_responses(path: Path, against: Against, how: Mapping[str, Any]) -> Checked:
    """Checks the responses of an engine as they came: with padding, and without a config with dense
    layers. how: `model`, `experts` and `top_k` of `check`."""
    source = [ImportSource(path, None)]
    came, model = Responses(), how["model"]
    facts = None if model is None else read_facts(model)
    context = ImportContext(
        source, facts, how["experts"], how["top_k"], warn=print_stderr, returned=came.add
    )
    format = sniff(source)
    if not format.endswith("-routed"):
        raise MoeInspectError(
            f"{path} holds no responses ({format}): import it, and check the trace"
        )
    formats()[format].run(context)
    kept, shapes = came.kept, sorted(came.shapes)
    if len(shapes) != 1:
        what = f"responses of several shapes: {shapes}" if shapes else "no routed token"
        raise MoeInspectError(f"{path} holds {what}")
    B, K = shapes[0]
    routed_TBK = np.concatenate([response.routed_TBK for response in kept])
    id_T = np.concatenate([_ids(response) for response in kept])
    begin_R = np.cumsum([0, *(len(response.routed_TBK) for response in kept[:-1])])
    config = context.facts.config if context.facts else {}
    groups = [
        (
            of,
            Recorded(narrow(routed_TBK[:, at]), of[1], at, id_T, begin_R, config=config),
            len(routed_TBK) == came.rows,
        )
        for of, at in _routers_of(context, path, B, K).items()
    ]
    listed, routes = _routes(groups, against, str(path), came.rows, [*_length_findings(kept)])
    return Checked(str(path), listed, [routes])


@dataclass
class Responses:
    """The first ones as they came, up to MOST_CELLS; of all, the rows and the shapes."""

    kept: list[Response] = field(default_factory=list[Response])
    rows: int = 0
    shapes: set[tuple[int, ...]] = field(default_factory=set[tuple[int, ...]])
    whole: bool = True

    def add(self, response: Response) -> None:
        routed_TBK = response.routed_TBK
        if not routed_TBK.size:
            return
        self.rows += len(routed_TBK)
        self.shapes.add(routed_TBK.shape[1:])
        self.whole &= self.rows * routed_TBK[0].size <= MOST_CELLS
        if self.whole or not self.kept:
            self.kept.append(response)


def _ids(response: Response) -> np.ndarray:
    """Its token ids, −1 where a row has none."""
    rows = len(response.routed_TBK)
    id_T = np.full(rows, -1)
    if response.fed is not None:
        known = response.fed[response.start : response.start + rows]
        id_T[: len(known)] = known
    return id_T


def _grouped(routers: Sequence[Router], numbers: Iterable[int]) -> dict[Group, list[int]]:
    groups = dict[Group, list[int]]()
    for router, n in zip(routers, numbers, strict=True):
        groups.setdefault((router.stack, router.experts, router.top_k), []).append(n)
    return groups


def _routers_of(context: ImportContext, path: Path, B: int, K: int) -> dict[Group, list[int]]:
    """The layers of each kind of routers; without a config all, dense ones too."""
    if (facts := context.facts) is None:
        return {("", context.known_experts(path), context.top_k or K): [*range(B)]}
    if facts.layers != B:
        raise MoeInspectError(
            f"{path} has {B} layers, the model's config {facts.layers}: is it the config of this "
            "model?"
        )
    routers = facts.routers()
    return _grouped(routers, (router.layer for router in routers))


def _length_findings(came: Sequence[Response]) -> Iterator[Finding]:
    """Responses with another number of rows than tokens were fed, rows of padding apart."""
    rows, tokens, wrong = 0, 0, 0
    for response in came:
        if response.fed is None:
            continue
        begin, end = unrouted_ends(response.routed_TBK)
        number, fed = len(response.routed_TBK), len(response.fed) - response.start
        if not number - begin - end <= fed <= number:
            rows, tokens, wrong = rows + number, tokens + fed, wrong + 1
    if wrong:
        yield wrong_lengths(rows, tokens, "tokens that were fed", wrong)
