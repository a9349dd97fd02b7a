"""What is linted: a trace, the responses of an engine as they came, or files that can be imported.

T tokens, B blocks of the model, L routers, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import ImportContext, ImportSource, formats, sniff
from moe_inspect.importers.responses import Response
from moe_inspect.importers.routed import unrouted_ends
from moe_inspect.importers.run import import_trace
from moe_inspect.linting import by_text
from moe_inspect.linting.lint import findings, narrow, wrong_lengths
from moe_inspect.linting.recorded import LEVEL, Recorded
from moe_inspect.model.config import read_facts
from moe_inspect.reporting.verdict.findings import Finding, most_important_first
from moe_inspect.text import plural
from moe_inspect.trace.reader import Trace, address, open_trace, shards_of
from moe_inspect.trace.runs import run_edges
from moe_inspect.trace.schema import MANIFEST, Router
from moe_inspect.trace.shard import Shard, codes

MOST_CELLS = 2**25  # tokens · routers · slots that are looked at
Against = Trace | str | Path | None
Group = tuple[str, int, int]  # stack, experts, top-k: routers that are looked at together


@dataclass(frozen=True)
class Linted:
    """What was found in `tokens` of the `of` tokens, and how many routers they have. whole: whether
    all that routers chose for was looked at: else the first tokens. compared: routers whose
    choices in the right trace follow the text, so that others would show; None without one."""

    found: list[Finding]
    tokens: int
    of: int
    routers: int
    whole: bool
    compared: int | None = None

    def __str__(self) -> str:
        """ "9,254 tokens, 4 routers" """
        routers = plural(self.routers, "router")
        if self.compared is not None:
            routers += f" ({self.compared} of them known well enough to tell them from others)"
        if not self.whole:
            return f"the first {self.tokens:,} of {plural(self.of, 'token')}, {routers}"
        drafts = self.of - self.tokens
        left_out = f" (without {plural(drafts, 'rejected draft')})" if drafts else ""
        return f"{plural(self.tokens, 'token')}{left_out}, {routers}"


def lint_trace(
    trace: Trace | str | Path, *, against: Against = None, where: str | None = None
) -> Linted:
    """Lints a trace: its first tokens, up to MOST_CELLS of tokens × routers × slots. against: a
    right trace of the same model, on any text. where: what the trace was made of."""
    opened = open_trace(trace)
    where = where or address(opened)
    if opened.counts_only:
        raise MoeInspectError(f"{where} holds counts only, no decisions to lint")
    return _linted(recorded(opened), against, where, opened.n_tokens)


def _linted(
    groups: Iterable[tuple[Group, Recorded, bool]],
    against: Against,
    where: str,
    of: int,
    found: Sequence[Finding] = (),
) -> Linted:
    right = None
    if against is not None:
        opened = open_trace(against)
        if opened.counts_only:
            raise MoeInspectError(f"{address(opened)} holds counts only, no decisions to lint by")
        right = {group: r for group, r, _ in recorded(opened)}
    listed, tokens, routers, all_whole = [*found], dict[str, int](), 0, True
    compared = 0
    for group, r, whole in groups:
        beside = None
        if right is not None:
            if (known := right.get(group)) is None or known.L != r.L:
                said = f"{address(against)} has other routers than {where}"
                raise MoeInspectError(f"{said}: lint against a trace of the same model")
            beside = known, by_text.usual(r, known)
            compared += int((by_text.tail(beside[1], r.L) < LEVEL).sum())
        listed += findings(r, beside)
        tokens[group[0]] = r.T  # of a stack, whose routers see the same
        routers, all_whole = routers + r.L, all_whole and whole
    return Linted(
        most_important_first(listed),
        sum(tokens.values()),
        of,
        routers,
        all_whole,
        None if right is None else compared,
    )


def lint(trace: Trace, *, against: Against = None) -> list[Finding]:
    """What is wrong with the routes of this trace, as far as they tell without a reference: as
    `moe_inspect.lint` of an array. against: a right trace of the same model, on any text."""
    return lint_trace(trace, against=against).found


def recorded(trace: Trace) -> Iterator[tuple[Group, Recorded, bool]]:
    """Of each kind of routers, the first tokens by sequence, and whether that is all."""
    groups = _grouped(trace.routers, range(len(trace.routers)))
    most = MOST_CELLS // sum(router.top_k for router in trace.routers)
    config = (trace.manifest.get("model") or {}).get("config")
    for group, routers in groups.items():
        parts, left = list[tuple[np.ndarray, np.ndarray, np.ndarray | None]](), most
        for shard in shards_of(trace, "linting"):
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


def lint_path(
    path: str,
    *,
    model: str | Path | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    against: str | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Linted:
    """Lints a trace, or a file or folder that can be imported. The other arguments are those of
    `import_trace`."""
    if not Path(path).exists() or (Path(path) / MANIFEST).exists():
        if model or experts or top_k:
            raise MoeInspectError(f"{path} is a trace, which says what its model is")
        return lint_trace(path, against=against)
    if any(Path(path, "routing").glob("*.parquet")):
        open_trace(path)  # whose manifest is missing: says so
    source = [ImportSource(Path(path), None)]
    came = Responses()
    facts = None if model is None else read_facts(model)
    context = ImportContext(source, facts, experts, top_k, warn=warn, returned=came.add)
    format = sniff(source)
    if format.endswith("-routed"):
        formats()[format].run(context)
        return _of_responses(came, context, path, against)
    with TemporaryDirectory() as place:
        how: Mapping[str, Any] = {"model": model, "experts": experts, "top_k": top_k}
        made = import_trace(format, [path], Path(place) / "trace", **how, warn=warn)
        return lint_trace(made, against=against, where=path)


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


def _of_responses(
    came: Responses, context: ImportContext, path: str, against: str | None
) -> Linted:
    """Rows as they came: with padding, and without a config with dense layers."""
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
        for of, at in _routers(context, path, B, K).items()
    ]
    return _linted(groups, against, path, came.rows, [*_lengths(kept)])


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


def _routers(context: ImportContext, path: str, B: int, K: int) -> dict[Group, list[int]]:
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


def _lengths(came: Sequence[Response]) -> Iterator[Finding]:
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
