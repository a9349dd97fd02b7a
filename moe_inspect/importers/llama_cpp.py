"""llama.cpp's importance matrix as GGUF (`llama-imatrix`): exact counts of assignments by expert,
and the energy of its activations.

`blk.N.ffn_{gate,up,down,gate_up}_exps.weight.counts`, F32 [1, E], each assignment once in each of
the tensors; `.in_sum2` [columns, E], the summed squares of what the tensor was given. The form is
that of tools/imatrix/imatrix.cpp.

E experts, D domains.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import MOST_COUNT, batch_of_counts
from moe_inspect.importers.context import ImportContext, Imported, ImportSource, importer, named
from moe_inspect.model.config import MOST_LAYERS
from moe_inspect.model.gguf import MAGIC, Gguf, read_gguf
from moe_inspect.text import plural, ranges
from moe_inspect.trace.schema import Router

SNAPSHOT = re.compile(r"(.+)\.at_(\d+)")  # llama-imatrix --save-frequency: what it has so far
COUNTS = re.compile(r"(blk\.(\d+)\.ffn_(?:gate_up|gate|up|down)_exps\.weight)\.counts")
EXACT = 2**24  # float32 holds every integer up to here


@dataclass(frozen=True)
class _Matrix:
    """What a file says. tokens: how many it was computed on; load: layer → counts [E]; energy:
    layer → [E], None where a layer's is missing."""

    path: Path
    domain: str
    datasets: list[str]
    tokens: int
    load: dict[int, np.ndarray]
    energy: dict[int, np.ndarray] | None


def _is_old(name: str, head: bytes) -> bool:
    return name.endswith(".dat") and head[:4] != MAGIC and b"blk." in head


@importer(
    "imatrix",
    gives="counts by domain, with the energy of activations",
    sniff=lambda name, head: (head[:4] == MAGIC and b"imatrix" in head) or _is_old(name, head),
)
def imatrix(context: ImportContext) -> Imported:
    files = _last(context, context.files(r".*\.(gguf|dat)(\.at_\d+)?", "imatrix.gguf"))
    found = [_read(context, path, source) for path, source in files]
    where, routers = found[0].path, _routers(context, found)
    for f in found:
        _warn(context, f, {r.layer: r.top_k for r in routers})
    domains = sorted({f.domain for f in found})
    load = [np.zeros((len(domains), r.experts), np.int64) for r in routers]
    energy = [np.zeros((len(domains), r.experts)) for r in routers]
    for f in found:
        d = domains.index(f.domain)
        for n, layer in enumerate(router.layer for router in routers):
            if layer not in f.load:
                raise MoeInspectError(f"{f.path} has no counts of layer {layer}, and {where} has")
            load[n][d] += f.load[layer]
            if f.energy is not None:
                energy[n][d] += f.energy[layer]
    known = all(f.energy is not None for f in found)
    batch = batch_of_counts(load, routers, domains, 0, sums={"energy": energy} if known else {})
    datasets = [name for f in found for name in f.datasets]
    notes = [f"computed on {', '.join(datasets)}"] if datasets else []
    extras = {"energy": known}
    return Imported(routers, iter([batch]), counts_only=True, notes=notes, extras=extras)


def _last(
    context: ImportContext, files: list[tuple[Path, ImportSource]]
) -> list[tuple[Path, ImportSource]]:
    """The files without the snapshots of which a later one is there: each holds the ones before."""
    of_run: dict[Path, list[tuple[float, Path, ImportSource]]] = {}
    for path, source in files:
        snapshot = SNAPSHOT.fullmatch(path.name)
        run = path.with_name(snapshot[1]) if snapshot else path
        chunks = int(snapshot[2]) if snapshot else float("inf")
        of_run.setdefault(run.resolve(), []).append((chunks, path, source))
    kept = [max(found, key=lambda one: one[0])[1:] for found in of_run.values()]
    if n := len(files) - len(kept):
        context.warn(f"{plural(n, 'snapshot')} left out: a later file of the same run holds more")
    return kept


def _read(context: ImportContext, path: Path, source: ImportSource) -> _Matrix:
    with open(path, "rb") as file:
        if _is_old(path.name, file.read(4096)):
            raise MoeInspectError(
                f"{path} is an imatrix of the old .dat form, which has no counts of experts: let "
                "llama-imatrix write it as .gguf (--output-format gguf)"
            )
    made = read_gguf(path)
    if (kind := made.fields.get("general.type")) != "imatrix":
        raise MoeInspectError(
            f"{path} is GGUF with general.type {str(kind)[:40]!r}, not an imatrix"
        )
    of_layer: dict[int, list[str]] = {}
    for name in made.tensors:
        if (match := COUNTS.fullmatch(name)) and int(match[2]) < MOST_LAYERS:
            of_layer.setdefault(int(match[2]), []).append(match[1])
    if not of_layer:
        raise MoeInspectError(f"{path} has no counts of experts (blk.N.ffn_…_exps.weight.counts)")
    tokens = made.number("imatrix.chunk_count") * made.number("imatrix.chunk_size")
    load = {layer: _load(made, names) for layer, names in of_layer.items()}
    energy = {layer: _energy(made, layer, len(load[layer])) for layer in of_layer}
    known = {layer: energy_E for layer, energy_E in energy.items() if energy_E is not None}
    stated = made.fields.get("imatrix.datasets")
    datasets = [str(name) for name in stated] if isinstance(stated, list) else []
    domain = source.domain or (Path(datasets[0]).stem if len(datasets) == 1 else "") or named(path)
    context.read(made.size)
    return _Matrix(path, domain, datasets, tokens, load, known if len(known) == len(load) else None)


def _load(made: Gguf, names: list[str]) -> np.ndarray:
    """int64 [E]: the counts of a layer, which each of its tensors states."""
    load_E = np.zeros(0, np.int64)
    for name in names:
        where = f"{made.path}: {name}.counts"
        count_E = made.floats(f"{name}.counts").reshape(-1)
        if len(count_E) == 1:
            why = "the file was converted from the old .dat form, which has no counts of experts"
            raise MoeInspectError(f"{where} is one count for all experts: {why}")
        with np.errstate(invalid="ignore"):
            wrong_E = ~((count_E >= 0) & (count_E <= MOST_COUNT) & (count_E == np.floor(count_E)))
        if not len(count_E) or wrong_E.any():
            value = count_E[wrong_E.argmax()] if len(count_E) else "nothing"
            raise MoeInspectError(f"{where} holds {value}, not a count")
        if name != names[0] and not np.array_equal(load_E, count_E.astype(np.int64)):
            raise MoeInspectError(f"{where} is not what {names[0]}.counts is: of the same router")
        load_E = count_E.astype(np.int64)
    return load_E


def _energy(made: Gguf, layer: int, experts: int) -> np.ndarray | None:
    """float64 [E]: the summed squares of what the layer's down projections were given."""
    name = f"blk.{layer}.ffn_down_exps.weight.in_sum2"
    if name not in made.tensors:
        return None
    sum2_EC = made.floats(name)
    if sum2_EC.ndim != 2 or len(sum2_EC) != experts:
        raise MoeInspectError(f"{made.path}: {name} is not of {experts} experts")
    with np.errstate(invalid="ignore"):
        energy_E = sum2_EC.sum(1, dtype=np.float64)
    if (wrong_E := ~((energy_E >= 0) & (energy_E < np.inf))).any():
        raise MoeInspectError(f"{made.path}: {name} sums to {energy_E[wrong_E.argmax()]}")
    return energy_E


def _routers(context: ImportContext, found: list[_Matrix]) -> list[Router]:
    """k is what the user or the config says, else Σ counts ÷ tokens of most layers, where that is a
    whole number."""
    of_layers = (divmod(int(load_E.sum()), f.tokens) for f in found for load_E in f.load.values())
    top_k, votes = context.top_k, Counter(k for k, rest in of_layers if k and not rest)
    if not top_k and not context.facts:
        top_k = votes.most_common(1)[0][0] if votes else context.known_top_k(found[0].path)
    routers: list[Router] = []
    for layer in sorted({layer for f in found for layer in f.load}):
        having = [f for f in found if layer in f.load]
        sizes, where = {len(f.load[layer]) for f in having}, having[0].path
        if len(sizes) > 1:
            raise MoeInspectError(
                f"{where}: layer {layer} has {sorted(sizes)} experts: of one model?"
            )
        k = top_k or (context.facts.top_k.get(layer, 1) if context.facts else 1)
        routers.append(context.routers_of([layer], sizes.pop(), k, where)[0])
    return routers


def _warn(context: ImportContext, f: _Matrix, top_k: dict[int, int]) -> None:
    odd = [layer for layer in sorted(f.load) if f.load[layer].sum() != f.tokens * top_k[layer]]
    if odd:
        context.warn(
            f"{f.path}: {plural(len(odd), 'layer')} ({ranges(odd)}) with other than "
            f"{f.tokens:,} tokens (chunks × size) × k assignments: layer {odd[0]} has "
            f"{int(f.load[odd[0]].sum()):,}"
        )
    if (largest := max(int(load_E.max()) for load_E in f.load.values())) > EXACT:
        context.warn(
            f"{f.path}: a count of {largest:,}: the file stores float32, in which counts above "
            f"{EXACT:,} are not exact"
        )
