"""What two aligned traces come to: counts that merge by addition, in whole numbers, so that the
order in which shards are done shows nowhere.

T tokens of a shard that are compared, U units (clusters of a domain's documents), X cells (phase ×
position decile), M margin deciles, E experts, L routers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np

from moe_inspect.analysis.counting.counts import CLUSTERS
from moe_inspect.analysis.counting.router_counts import narrowed
from moe_inspect.comparison.aligning.rows import CELLS, DECILES

UNIT = 2**24  # of sums of weights and logits, kept as whole numbers of 1/UNIT
MOST_FLIPS = 256  # margins of flips kept per shard and router, for their median
GAMMA_FLOOR = 0.8


def fixed(value: float) -> int:
    """A sum of floats as a whole number, which adds up in any order."""
    return round(value * UNIT)


@dataclass
class PairRouterCounts:
    """Of one router, in some units. missing_UX: assignments that the other trace did not make;
    mismatch_UX: decisions with another set of experts. reordered_U, first_differs_U: decisions with
    another order of slots, another first choice. short_UX: slots that route nowhere in both. l1_U:
    Σ of weight differences. load_UE: A's assignments; moved_UE: B's minus A's. margin_UM,
    margin_mismatch_UM: decisions and those with another set, by A's margin. flips_EE: pairs of an
    expert that B dropped and one that it took instead. flip_margins: of decisions with another set,
    A's margins, by shard. last_mismatch: of the last tokens of sequences, those with another set.
    weights_differ: decisions in which a weight of an expert that both chose is not the same. new,
    again, before: tokens whose set differs first here; that differ here and did in an earlier
    layer; that did in an earlier layer."""

    E: int
    mismatch_UX: np.ndarray
    missing_UX: np.ndarray
    short_UX: np.ndarray
    reordered_U: np.ndarray
    first_differs_U: np.ndarray
    l1_U: np.ndarray
    load_UE: np.ndarray
    moved_UE: np.ndarray
    margin_UM: np.ndarray
    margin_mismatch_UM: np.ndarray
    flips_EE: np.ndarray
    flip_margins: dict[int, np.ndarray] = field(default_factory=dict)
    last_mismatch: int = 0
    weights_differ: int = 0
    new: int = 0
    again: int = 0
    before: int = 0
    kl: int = 0
    logit_decisions: int = 0

    @classmethod
    def zero(cls, E: int, U: int) -> PairRouterCounts:
        size = {"U": U, "X": CELLS, "E": E, "M": DECILES}
        shapes = ([size[x] for x in name.rpartition("_")[2]] for name in TABLES)
        return cls(E, *(np.zeros(shape, np.int64) for shape in shapes))

    def of_units(self, unit_V: np.ndarray) -> PairRouterCounts:
        """Of these units only, to be sent."""
        tables = {name: getattr(self, name)[unit_V] for name in BY_UNIT}
        tables["flips_EE"] = self.flips_EE
        return replace(self, **{name: narrowed(table) for name, table in tables.items()})

    def merge(self, other: PairRouterCounts, unit_V: np.ndarray) -> None:
        """Those of other shards, whose units are `unit_V`."""
        self.flip_margins |= other.flip_margins
        for name in BY_UNIT:
            getattr(self, name)[unit_V] += getattr(other, name)
        add_sums(self, other, "flips_EE")


def add_sums(total: Counts, other: Counts, *tables: str) -> None:
    """Adds the whole numbers of two counts of one kind, and these tables."""
    numbers = [f.name for f in fields(other) if f.type == "int" and f.name != "E"]
    for name in (*numbers, *tables):
        setattr(total, name, getattr(total, name) + getattr(other, name))


TABLES = [f.name for f in fields(PairRouterCounts) if f.type == "np.ndarray"]
BY_UNIT = [name for name in TABLES if "_U" in name]


@dataclass
class ComparisonCounts:
    """Of two traces. `domains`: A's labels; a unit is domain · CLUSTERS + document % CLUSTERS.
    decisions_UX: tokens compared that reach the routers of a stack, by stack. layers_N: tokens by
    the number of routers at which their sets differ. documents: rows (document, domain, tokens,
    decisions, decisions with another set), by shard. gamma: Σ of RSPO's router shift;
    gamma_below: tokens under GAMMA_FLOOR. last_tokens: tokens that are the last of their sequence.
    zero_filled_a, zero_filled_b: tokens that differ and of which every slot of every router is
    expert 0 in one trace."""

    domains: tuple[str, ...]
    of: dict[int, PairRouterCounts]
    decisions_UX: dict[str, np.ndarray]
    layers_N: np.ndarray
    documents: dict[int, np.ndarray] = field(default_factory=dict)
    shards_alike: int = 0
    gamma: int = 0
    gamma_below: int = 0
    gamma_tokens: int = 0
    last_tokens: int = 0
    zero_filled_a: int = 0
    zero_filled_b: int = 0

    @classmethod
    def zero(
        cls, domains: tuple[str, ...], experts: dict[int, int], stacks: set[str]
    ) -> ComparisonCounts:
        """experts: router → number of experts."""
        U = len(domains) * CLUSTERS
        of = {r: PairRouterCounts.zero(E, U) for r, E in experts.items()}
        decisions_UX = {stack: np.zeros((U, CELLS), np.int64) for stack in stacks}
        return cls(domains, of, decisions_UX, np.zeros(len(experts) + 1, np.int64))

    def of_units(self, unit_V: np.ndarray) -> ComparisonCounts:
        """Of these units only, to be sent: what a shard has any of is a few of all."""
        of = {r: counts.of_units(unit_V) for r, counts in self.of.items()}
        decisions_UX = {stack: of_UX[unit_V] for stack, of_UX in self.decisions_UX.items()}
        return replace(self, of=of, decisions_UX=decisions_UX)

    def merge(self, other: ComparisonCounts, unit_V: np.ndarray) -> None:
        """Those of other shards, whose units are `unit_V`."""
        for r, counts in other.of.items():
            self.of[r].merge(counts, unit_V)
        for stack, decisions_UX in other.decisions_UX.items():
            self.decisions_UX[stack][unit_V] += decisions_UX
        self.documents |= other.documents
        add_sums(self, other, "layers_N")

    @property
    def tokens(self) -> int:
        return int(self.layers_N.sum())

    @property
    def units(self) -> np.ndarray:
        """The units (clusters of documents) that have any token."""
        return np.flatnonzero(sum(x.sum(1) for x in self.decisions_UX.values()))

    @property
    def domain_U(self) -> np.ndarray:
        """int64 [U]: the domain of each unit."""
        return np.repeat(np.arange(len(self.domains)), CLUSTERS)

    def document_rows(self) -> np.ndarray:
        """int64 [documents, 5], ascending."""
        rows = np.concatenate([np.zeros((0, 5), np.int64), *self.documents.values()])
        names, at = np.unique(rows[:, 0], return_inverse=True)
        total = np.zeros((len(names), 5), np.int64)
        np.add.at(total, at, rows)
        total[:, 0], total[at, 1] = names, rows[:, 1]
        return total


Counts = PairRouterCounts | ComparisonCounts
