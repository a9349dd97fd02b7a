"""The losses without each expert that `moe-inspect ablate` measured, read back from its table.

D domains, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_inspect.errors import MoeInspectError, reading
from moe_inspect.files import read_small
from moe_inspect.text import first_line
from moe_inspect.trace.schema import Router

KEYS = ["layer", "router", "expert"]
MOST_BYTES = 2**28  # of a table: every expert of any model in 100 domains
COLUMNS = [*KEYS, "tokens", "difference"]


def losses_without(
    path: str | Path, routers: Sequence[Router]
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """What the model loses without each expert, in nats per token: float64 [E] of each router of a
    trace, of all text and by domain (of the table `domains`; of `experts` of none). Routers are
    those of the same layer, in its order. MoeInspectError where it is no such table, or of other
    experts."""
    table: Any = _read(Path(path))
    whole = table.assign(nats=table["difference"] * table["tokens"])
    whole: Any = whole.groupby(KEYS, as_index=False)[["nats", "tokens"]].sum()
    whole["difference"] = whole["nats"] / whole["tokens"]
    by_domain = dict[str, list[np.ndarray]]()
    if "domain" in table:
        for domain, of in table.groupby("domain", sort=False):
            by_domain[str(domain)] = _by_router(of, routers, path)
    return _by_router(whole, routers, path), by_domain


def _by_router(table: Any, routers: Sequence[Router], path: str | Path) -> list[np.ndarray]:
    found = list[np.ndarray]()
    for r, router in enumerate(routers):
        there = [i for i, other in enumerate(routers) if other.layer == router.layer]
        of_layer = table[table["layer"] == router.layer]
        numbers = sorted(set(of_layer["router"]))
        of_layer = of_layer[of_layer["router"] == dict(zip(there, numbers, strict=False)).get(r)]
        of_layer = of_layer.sort_values("expert")
        if len(numbers) != len(there) or list(of_layer["expert"]) != list(range(router.experts)):
            raise MoeInspectError(
                f"{path} has losses without {of_layer['expert'].nunique()} of {router.experts} "
                f"experts in layer {router.layer}: ablate all experts of the trace's model"
            )
        found.append(of_layer["difference"].to_numpy(np.float64))
    return found


def _read(path: Path) -> pd.DataFrame:
    readers = {".csv": _read_csv, ".json": _read_json, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise MoeInspectError(f"{path}: losses are read from {', '.join(readers)}")
    with reading(path):
        try:
            table = readers[path.suffix](io.BytesIO(read_small(path, MOST_BYTES)))
        # what pandas and pyarrow raise for a file that is none: ValueError and its kinds
        except ValueError as error:
            raise MoeInspectError(f"cannot read {path}: {first_line(error)}") from error
    if missing := [name for name in COLUMNS if name not in table]:
        raise MoeInspectError(
            f"{path} has no column {missing[0]!r}: it is not a table of moe-inspect ablate"
        )
    return table


# a domain may be called "NA" or "007"


def _read_csv(path: io.BytesIO) -> pd.DataFrame:
    empty = {name: [""] for name in COLUMNS}
    return pd.read_csv(path, dtype={"domain": str}, keep_default_na=False, na_values=empty)


def _read_json(path: io.BytesIO) -> pd.DataFrame:
    return pd.read_json(path, lines=True, dtype=False)
