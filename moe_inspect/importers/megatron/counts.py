"""Megatron-LM's `tokens_per_expert/rank<r>.jsonl` (`--save-tokens-per-expert-interval`): a line per
iteration and layer, with the tokens that each expert of that rank received in each microbatch, from
every rank of its expert-parallel group.

W windows of iterations, D runs, L routers, E experts; of a rank S routers and n experts; M
microbatches.

Layer numbers are those of the modules' names, from 0 in each pipeline stage. Ranks of expert tensor
parallelism hold slices of the same experts and count alike; after them count those of expert
parallelism, then those of expert data parallelism, which hold the same experts and see other
tokens, then pipeline stages: rank = tensor + ETP · (expert + EP · (data + EDP · stage)).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_COUNT, batches_of_windows, window_of
from moe_inspect.importers.context import ImportContext, Imported, ImportSource
from moe_inspect.importers.megatron import layers
from moe_inspect.importers.values import as_it_is, integer, integers
from moe_inspect.model.config import MOST_EXPERTS


@dataclass(frozen=True)
class RankCounts(layers.RankFile):
    """`load`: iteration → int64 [S, n], routers as in `numbered`. `once`: routers with a line whose
    microbatches are not all there twice."""

    load: dict[int, np.ndarray] = field(kw_only=True)
    once: set[layers.Spot] = field(kw_only=True)

    @property
    def held(self) -> int:
        return next(iter(self.load.values())).shape[1]


def tokens_per_expert(context: ImportContext, found: list[tuple[Path, ImportSource]]) -> Imported:
    files: list[RankCounts] = []
    empty: list[layers.EmptyFile] = []  # files without a line
    for path, source in found:
        folder = path.resolve().parent
        folder = folder.parent if folder.name == "tokens_per_expert" else folder
        run = ImportSource(source.path, source.domain or folder.name or "megatron")
        if counts := _read(context, path, run):
            files.append(counts)
        else:
            empty.append((path, run))
    where, n = str(files[0].path), files[0].held
    if odd := next((f for f in files if f.held != n), None):
        raise MoeInspectError(
            f"{odd.path} counts {odd.held} experts, {where} {n}: are they of one run?"
        )
    E, top_k = context.known_experts(where), context.known_top_k(where)
    if E % n:
        why = f"and {E} in all is not a multiple of {n}: how many experts does the model have?"
        raise MoeInspectError(f"{where} counts the {n} experts of its rank, {why}")
    parallel = E // n  # ranks of expert parallelism
    distinct = _distinct(context, files, parallel)
    files = layers.located(context, distinct, empty, by_name=True, together=parallel)
    spots = sorted({spot for f in files for spot in f.spots})
    routers = layers.routers_of(context, spots, E, top_k, where)
    domains = list(dict.fromkeys(str(f.source.domain) for f in files))
    windows = window_of(i for f in files for i in f.load)
    load_WDLE = _summed(files, spots, domains, windows, parallel)
    # under activation recomputation experts are called again for the backward, and every count is
    # written twice; one pair may be equal by chance
    once = {f.spot(spot) for f in files for spot in f.once}
    twice = [r for r, spot in enumerate(spots) if spot not in once]
    if sum(len(f.load) for f in files) * len(twice) > 1 and load_WDLE[:, :, twice].any():
        load_WDLE[:, :, twice] //= 2
        context.warn(
            f"{where}: every count of {len(twice)} of {len(spots)} layers is there twice "
            "(activations recomputed): each is counted once"
        )
    last_of = {window: iteration for iteration, window in windows.items()}  # which ascend
    return Imported(
        routers,
        batches_of_windows(load_WDLE, routers, domains, [*last_of.values()]),
        counts_only=True,
        notes=["counts are summed over the microbatches of an iteration"],
    )


def _summed(
    files: list[RankCounts],
    spots: list[layers.Spot],
    domains: list[str],
    windows: dict[int, int],
    parallel: int,
) -> np.ndarray:
    """int64 [W, D, L, E]: the counts of all ranks, each at the experts that its rank holds. The
    ranks of a pipeline stage make whole groups of `parallel` ones."""
    n, row = files[0].held, {spot: r for r, spot in enumerate(spots)}
    shape = (max(windows.values()) + 1, len(domains), len(spots), n * parallel)
    load_WDLE = np.zeros(shape, np.int64)
    stages: dict[tuple[str, frozenset[layers.Spot]], list[RankCounts]] = {}
    for f in files:
        stages.setdefault((str(f.source.domain), frozenset(f.spots)), []).append(f)
    for (domain, _), stage in stages.items():
        if len(stage) % parallel:
            raise MoeInspectError(
                f"{stage[0].path} counts {n} of {n * parallel} experts: {len(stage)} ranks do not "
                f"make whole groups of {parallel}; give the files of all ranks"
            )
        for number, f in enumerate(stage):
            first, rows = number % parallel * n, [row[spot] for spot in f.spots]
            load_WLn = load_WDLE[:, domains.index(domain), :, first : first + n]
            for i, load_Sn in f.load.items():
                load_WLn[windows[i], rows] += load_Sn
    return load_WDLE


def _read(context: ImportContext, path: Path, source: ImportSource) -> RankCounts | None:
    """None of a file without a line."""
    if (rank := re.fullmatch(r"\D*(\d{1,9})\.jsonl", path.name)) is None:
        raise MoeInspectError(f"{path} is not named rank<r>.jsonl: which rank is it from?")
    lines: dict[int, dict[layers.Spot, np.ndarray]] = {}
    once: set[layers.Spot] = set()
    held: int | None = None
    for where, fields in context.prepared(path, as_it_is):
        if "tpe" not in fields:
            raise MoeInspectError(f"{where} has no tpe, as the lines of tokens_per_expert have")
        iteration = integer(fields.get("iter"), f"{where}: iter")
        spot = layers.spot_of(fields, where)
        tpe_Mn = integers(fields["tpe"], f"{where}: tpe", (None, held), 0, MOST_COUNT)
        if not tpe_Mn.size or tpe_Mn.shape[1] > MOST_EXPERTS:
            raise MoeInspectError(
                f"{where}: tpe has shape {list(tpe_Mn.shape)}, not [microbatches, experts]"
            )
        held = tpe_Mn.shape[1]
        if spot in lines.setdefault(iteration, {}):
            raise MoeInspectError(
                f"{where} repeats iteration {iteration} of layer {spot[2]}: a run that began "
                "again? keep the lines of one"
            )
        lines[iteration][spot] = tpe_Mn.sum(0)
        if any(times % 2 for times in Counter(map(bytes, tpe_Mn)).values()):
            once.add(spot)
    if not lines:
        return None
    spots = sorted({spot for of_iteration in lines.values() for spot in of_iteration})
    for iteration, of_iteration in lines.items():
        if missing := next((spot for spot in spots if spot not in of_iteration), None):
            why = f"iteration {iteration} has no line of layer {missing[2]}: is the file whole?"
            raise MoeInspectError(f"{path}: {why}")
    load = {
        i: np.stack([of_iteration[spot] for spot in spots]) for i, of_iteration in lines.items()
    }
    return RankCounts(path, source, int(rank[1]), spots, load=load, once=once)


def _distinct(context: ImportContext, files: list[RankCounts], parallel: int) -> list[RankCounts]:
    """By run and rank, without those that count what the rank before them does. Every run must have
    the files of all ranks."""
    kept: list[RankCounts] = []
    for mine in layers.runs(files):
        for a, b in pairwise(mine):
            if b.rank != a.rank + 1:
                why = f"the next file of rank {b.rank}: give the files of all ranks"
                raise MoeInspectError(f"{a.path} is of rank {a.rank}, {why}")
            if differ := a.load.keys() ^ b.load.keys():
                raise MoeInspectError(
                    f"iteration {min(differ)} is in one of {a.path} and {b.path} alone: are both "
                    "files whole, and of one run?"
                )
        first = [True, *(not _alike(a, b) for a, b in pairwise(mine))]
        tensor = len(mine) // sum(first)
        regular = first == [i % tensor == 0 for i in range(len(mine))]
        if tensor > 1 and regular and len(mine) // tensor % parallel == 0:
            context.warn(
                f"{mine[0].path}: {tensor} ranks in a row count alike (expert tensor "
                "parallelism): one of them is counted"
            )
            mine = mine[::tensor]
        else:
            tensor = 1
        if len(mine) % parallel or mine[0].rank // tensor % parallel:
            raise MoeInspectError(
                f"{mine[0].path} counts {mine[0].held} of {mine[0].held * parallel} experts: "
                "give the files of all ranks, which "
                f"make groups of {parallel}; there are {len(mine)} from rank {mine[0].rank} on"
            )
        kept += mine
    return kept


def _alike(a: RankCounts, b: RankCounts) -> bool:
    return a.numbered == b.numbered and all(
        np.array_equal(load_Sn, b.load[i]) for i, load_Sn in a.load.items()
    )
