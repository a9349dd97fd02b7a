"""BigMoeOnEdge's routing trace (`bmoe-cli --route-trace FILE`): CSV, a row per choice of a token,
behind lines of `#` that say what model it is. The columns are read by name, as its format asks.

Form: github.com/Helldez/BigMoeOnEdge, docs/telemetry.md (route_trace v1). N rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from moe_inspect.errors import MoeInspectError
from moe_inspect.importers.batches import Numbering
from moe_inspect.importers.context import ImportContext, Imported
from moe_inspect.importers.registry import importer, named
from moe_inspect.importers.rows.pivot import Choices, batches_of, choices_of
from moe_inspect.importers.values import check_range
from moe_inspect.text import first_line, plural
from moe_inspect.trace.slot_order import stated
from moe_inspect.trace.writer import RoutedBatch

INTEGERS = ("turn", "phase", "step", "layer", "slot", "expert")
MOST_PREAMBLE = 2**20
FACTS = re.compile(rb"# model=.* n_expert=(\d{1,6}) n_expert_used=(\d{1,6})\s*")


def _has_columns(name: str, head: bytes) -> bool:
    return head.startswith(b"# route_trace v1") or b"turn,phase,step,layer,slot,expert," in head


@importer(
    "bigmoeonedge",
    gives="decisions with weights, without token ids",
    sniff=_has_columns,
)
def bigmoeonedge(context: ImportContext) -> Imported:
    files = context.files(r".*\.csv", "CSV of --route-trace")
    read = [(path, source, *_read(context, path)) for path, source in files]
    where, _, first, experts, _ = read[0]
    for path, _, found, others, _ in read:
        if (others, found.layers) != (experts, first.layers):
            raise MoeInspectError(
                f"{path} has {others} experts in {len(found.layers)} layers, {where} {experts} in "
                f"{len(first.layers)}: of one model?"
            )
    without = [path for path, _, found, _, _ in read if found.weights_LTK is None]
    weighted = not without
    if without:
        context.warn(f"{without[0]}: weights are unknown in some rows: imported without weights")
    routers = context.routers_of(first.layers, experts, first.ids_LTK.shape[2], where)
    routers = [stated(router, known=weighted) for router in routers]

    def batches() -> Iterator[RoutedBatch]:
        numbers = Numbering()
        for path, source, found, _, _ in read:
            label = source.domain or named(path)
            labels = dict.fromkeys(found.document_T.tolist(), label)
            yield from batches_of(str(path), found, routers, labels, numbers)

    notes = [note for *_, notes in read for note in notes]
    return Imported(routers, batches(), weights=weighted, notes=notes)


def _read(context: ImportContext, path: Path) -> tuple[Choices, int, list[str]]:
    """The choices of a file, E, and what is to be noted of it."""
    lines, experts, top_k = _preamble(context, path)
    try:
        table = pyarrow.csv.read_csv(
            path,
            pyarrow.csv.ReadOptions(skip_rows=lines, use_threads=False),
            convert_options=pyarrow.csv.ConvertOptions(
                null_values=[""],  # and not "nan": a weight that is unknown
                column_types={
                    **dict.fromkeys((*INTEGERS, "dropped"), pa.int64()),
                    "weight": pa.float64(),
                },
            ),
        )
        names = table.column_names
    except (pa.ArrowException, UnicodeError) as error:
        raise MoeInspectError(f"{path}: {first_line(error)}") from None
    context.read(path.stat().st_size)
    for name in (*INTEGERS, "weight"):
        if names.count(name) != 1 or table[name].null_count:
            raise MoeInspectError(f"{path} has no column {name}, or no value in some of its rows")
    if not len(table):
        raise MoeInspectError(f"{path} holds no decisions")
    columns = {name: table[name].to_numpy() for name in INTEGERS}
    check_range(columns["turn"], f"{path}: turn", 0, 2**31 - 1)
    check_range(columns["phase"], f"{path}: phase", 0, 1)
    # a step below 0 is a row that the program could not attribute to a position
    check_range(columns["step"], f"{path}: step", 0, 2**31 - 1)
    check_range(columns["layer"], f"{path}: layer", 0, 2**16 - 1)
    check_range(columns["expert"], f"{path}: expert", 0, experts - 1)
    expert_N, notes = columns["expert"], []
    if "dropped" in names and (dropped_N := table["dropped"].fill_null(0).to_numpy() != 0).any():
        expert_N = np.where(dropped_N, -1, expert_N)
        notes.append(f"{path.name}: {plural(int(dropped_N.sum()), 'choice')} dropped while cold")
    weight_N = table["weight"].to_numpy()
    if np.isnan(weight_N).any():  # the model's graph did not expose them
        weight_N = None
    elif not (np.abs(weight_N) < np.finfo(np.float16).max).all():
        raise MoeInspectError(f"{path}: weight is {weight_N[np.abs(weight_N).argmax()]}")
    found = choices_of(
        str(path),
        {
            "document": columns["turn"],
            "position": columns["step"],
            "layer": columns["layer"],
            "slot": columns["slot"],
            "expert": expert_N,
            "decoded": columns["phase"],
        },
        top_k,
        weight_N,
    )
    if found.missing:
        notes.append(
            f"{path.name}: {plural(found.missing, 'decision')} without rows: of a prompt only the "
            "last token reaches the last layer"
        )
    return found, experts, notes


def _preamble(context: ImportContext, path: Path) -> tuple[int, int, int]:
    """The number of lines before the table's header, E and k."""
    lines, facts = 0, None
    with open(path, "rb") as file:
        while (line := file.readline(MOST_PREAMBLE)).startswith(b"#"):
            lines, facts = lines + 1, facts or FACTS.fullmatch(line)
    experts, top_k = (int(facts[1]), int(facts[2])) if facts else (0, 0)
    experts = experts or context.known_experts(path)
    return lines, experts, top_k or context.known_top_k(path)
