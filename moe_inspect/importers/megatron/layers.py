"""Which block of the model a layer number in Megatron-Core's files means.

What takes the number from a module's name (the training hook of the router trace,
tokens_per_expert) numbers the layers of each pipeline stage from 0; the inference engine's record
of routing indices numbers them from 1 through the whole model. A file does not say which.

Ranks are numbered with pipeline stages outermost unless the run asked for `--use-tp-pp-dp-mapping`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.context import ImportContext, ImportSource
from moe_inspect.importers.values import Fields, integer
from moe_inspect.model.config import ModelFacts
from moe_inspect.text import join_first
from moe_inspect.trace.schema import Router

Spot = tuple[str, int, int]  # block ("decoder" or "mtp"), mtp_idx, layer
EmptyFile = tuple[Path, ImportSource]  # a file without a record


@dataclass(frozen=True)
class RankFile:
    """A file of one rank. `numbered`: its routers, by the layer numbers of the file. `offset`: what
    to add to such a number for the block index."""

    path: Path
    source: ImportSource
    rank: int
    numbered: list[Spot]
    offset: int = 0

    @property
    def spots(self) -> list[Spot]:
        return [self.spot(spot) for spot in self.numbered]

    def spot(self, numbered: Spot) -> Spot:
        block, index, layer = numbered
        # stages do not shift mtp's own numbers
        return (block, index, layer + (self.offset if block == "decoder" else min(self.offset, 0)))


AnyFile = TypeVar("AnyFile", bound=RankFile)


def spot_of(fields: Fields, where: str) -> Spot:
    """The router that a line is of."""
    if (block := fields.get("block")) not in ("decoder", "mtp"):
        raise MoeInspectError(f"{where}: block is {str(block)[:40]!r}, not decoder or mtp")
    layer = integer(fields.get("layer"), f"{where}: layer", 0, 2**15)
    index = integer(fields.get("mtp_idx") or 0, f"{where}: mtp_idx", 0, 2**15)
    return block, index if block == "mtp" else 0, layer


def _decoder(spots: Iterable[Spot]) -> list[int]:
    """Their layers, each once, without those of multi-token prediction."""
    return sorted({layer for block, _, layer in spots if block == "decoder"})


def located(
    context: ImportContext,
    files: list[AnyFile],
    empty: Sequence[EmptyFile],
    by_name: bool,
    together: int = 1,
) -> list[AnyFile]:
    """The files with their offsets. `by_name`: layer numbers are known to come from module names;
    otherwise they may. `together`: number of ranks known to belong to one stage."""
    files = _with_offsets(context, files, empty, by_name, together)
    found, given = len({frozenset(f.spots) for f in files}), context.options.get("pipeline_stages")
    if given is not None and (found > given or (found < given and not empty)):
        layers = join_first(_decoder(spot for f in files for spot in f.spots))
        why = f"by their layers ({layers} from 0) the files are of {found}"
        raise MoeInspectError(f"--pipeline-stages is {given}, {why}")
    return files


def _with_offsets(
    context: ImportContext,
    files: list[AnyFile],
    empty: Sequence[EmptyFile],
    by_name: bool,
    together: int,
) -> list[AnyFile]:
    numbers = _decoder(spot for f in files for spot in f.numbered)
    stated = sorted(context.facts.experts) if context.facts else None
    given = context.options.get("pipeline_stages")
    path, stages = files[0].path, given or 1
    if numbers == stated:
        return files
    from_one = [replace(f, offset=-1) for f in files]
    if not by_name and [n - 1 for n in numbers] == stated:
        return from_one
    if context.facts is not None and stages > 1:
        return _joined(context, context.facts, files, empty, stages)
    if not by_name and min(layer for f in files for _, _, layer in f.numbered) > 0:
        if stated is None:
            context.warn(
                f"{path} does not say whether its layer numbers ({join_first(numbers)}) start at 0 "
                "or 1: assumed 1, as the inference engine writes them; the training hook starts at "
                "0. Give --model or --config to be sure"
            )
        return from_one
    if context.facts is not None:
        hint = (
            "for a run with pipeline parallelism give --pipeline-stages and the files of all ranks"
        )
        if given:
            hint = "is it the config of this model?"
        raise MoeInspectError(
            f"{context.sources[0].path} has layers {join_first(numbers)} (from 0), "
            f"{context.facts.id} has experts in {join_first(stated or ())}: {hint}"
        )
    if stages > 1:
        why = "which layers each stage has takes the model's config: give --model or --config"
        raise MoeInspectError(f"--pipeline-stages {stages}: {why}")
    ranks = max(len(_ranks(files, empty, run)) for run in {f.source.domain for f in files})
    if given is None and ranks > together:
        raise MoeInspectError(
            f"{path} numbers layers from 0, as each pipeline stage does, and there are files of "
            f"{ranks} ranks: give --pipeline-stages (1 if the run had no pipeline parallelism; "
            "above that also --model or --config)"
        )
    if not by_name:
        context.warn(
            f"{path} has a layer 0: its layer numbers are taken to start at 0. Give --model or "
            "--config to be sure"
        )
    return files


def _ranks(files: Iterable[RankFile], empty: Iterable[EmptyFile], run: str | None) -> list[int]:
    """Of one run, also those without a record, as stages of dense layers are."""
    names = (path.name for path, source in empty if source.domain == run)
    ranks = {int(found[1]) for name in names if (found := re.search(r"rank(\d{1,9})\D*$", name))}
    return sorted(ranks | {f.rank for f in files if f.source.domain == run})


def _joined(
    context: ImportContext,
    facts: ModelFacts,
    files: list[AnyFile],
    empty: Sequence[EmptyFile],
    stages: int,
) -> list[AnyFile]:
    """Files of stages that each number their layers from 0, by the order of their ranks."""
    located: list[AnyFile] = []
    for mine in runs(files):
        ranks = _ranks(mine, empty, mine[0].source.domain)
        if len(ranks) % stages:
            raise MoeInspectError(
                f"{mine[0].path}: files of {len(ranks)} ranks do not make {stages} pipeline "
                "stages: give the files of all ranks"
            )
        each = len(ranks) // stages
        groups = [
            [f for f in mine if f.rank in ranks[s * each : (s + 1) * each]] for s in range(stages)
        ]
        for group in groups:
            odd = next((f for f in group if set(f.numbered) != set(group[0].numbered)), None)
            if odd is not None or len(group) not in (0, each):
                other = f"{odd.path} {_of(odd)}" if odd else "another rank of that stage has none"
                raise MoeInspectError(
                    f"{group[0].path} {_of(group[0])}, {other}: {each} consecutive ranks are "
                    f"assumed to be one of {stages} pipeline stages; a run with "
                    "--use-tp-pp-dp-mapping cannot be joined"
                )
        if each > 1:
            context.warn(
                f"{each} consecutive ranks are assumed to be one pipeline stage ({ranks[0]}-"
                f"{ranks[each - 1]} for the first), which is wrong for a run with "
                "--use-tp-pp-dp-mapping"
            )
        layers = [_decoder(group[0].numbered) if group else [] for group in groups]
        for group, offset in zip(groups, _offsets(facts, layers, mine[0].path), strict=True):
            located += [replace(f, offset=offset) for f in group]
    return located


def _offsets(facts: ModelFacts, layers: list[list[int]], path: Path) -> list[int]:
    """The block index of each stage's layer 0. Blocks with experts follow each other through the
    stages."""
    stated, found = sorted(facts.experts), sum(map(len, layers))
    if found != len(stated):
        raise MoeInspectError(
            f"{path}: {len(layers)} pipeline stages have "
            f"{' + '.join(str(len(own)) for own in layers)} layers with experts, {facts.id} has "
            f"{len(stated)}: is the number of stages right? Interleaved (virtual) stages use the "
            "same numbers twice and cannot be told apart"
        )
    offsets: list[int] = []
    taken = 0
    for s, own in enumerate(layers):
        blocks = stated[taken : taken + len(own)]
        offset = blocks[0] - own[0] if own else 0  # of a stage without experts nothing needs it
        start = stated[taken - 1] + 1 if taken else 0
        if own and (
            offset < start or (s == 0 and offset) or [layer + offset for layer in own] != blocks
        ):
            raise MoeInspectError(
                f"{path}: layers {join_first(own)} of pipeline stage {s} cannot be blocks "
                f"{join_first(blocks)}, which is what {facts.id} leaves for it: is the config the "
                "model's, and the number of stages right?"
            )
        offsets.append(offset)
        taken += len(own)
    return offsets


def runs(files: Sequence[AnyFile]) -> Iterator[list[AnyFile]]:
    """The files of each run, by rank."""
    for run in dict.fromkeys(f.source.domain for f in files):
        mine = sorted((f for f in files if f.source.domain == run), key=lambda f: f.rank)
        for a, b in pairwise(mine):
            if a.rank == b.rank:
                raise MoeInspectError(
                    f"{a.path} and {b.path} are both of rank {a.rank}, by which pipeline stages "
                    "are paired: import runs apart, or each as LABEL=FOLDER"
                )
        yield mine


def routers_of(
    context: ImportContext, spots: Sequence[Spot], experts: int, top_k: int, where: str
) -> list[Router]:
    """A router for each of the sorted spots, which are block indices."""
    layers = _decoder(spots)
    routers = context.routers_of(layers, experts, top_k, where) if layers else []
    if missing := sorted(set(context.facts.experts if context.facts else ()) - set(layers)):
        raise MoeInspectError(
            f"{where}: layers {join_first(missing)} (from 0) have experts in the config and are in "
            "no file: give the files of all ranks"
        )
    # the layers of multi-token prediction come after the model's
    after = context.facts.layers if context.facts else max(layers, default=-1) + 1
    for n, (_, index, layer) in enumerate(s for s in spots if s[0] == "mtp"):
        routers.append(Router(after + n, "mtp", f"mtp.{index}.layers.{layer}", experts, top_k))
    return routers


def _of(file: RankFile) -> str:
    return f"has layers {join_first(_decoder(file.numbered)) or 'of mtp alone'}"
