"""Table of the tokens that a text gives each expert: a quantiser calibrates an expert on these.

D domains, E experts.
"""

from __future__ import annotations

import numpy as np

from moe_inspect.analysis.counting.counts import Counts
from moe_inspect.analysis.metrics import uncertainty as unc
from moe_inspect.analysis.metrics.balance import nan_for_zero
from moe_inspect.model.config import expert_shape
from moe_inspect.reporting.tables.data import ReportData
from moe_inspect.reporting.tables.load import Columns, rows_per_router
from moe_inspect.reporting.tables.registry import AsColumns, table

# GPTQ inverts the second moments of the inputs of a matrix: singular with fewer tokens than inputs
TOKENS_PER_INPUT, MINIMUM = 4, 512  # the second if the number of inputs is unknown


@table()
def coverage(data: ReportData) -> AsColumns:
    """One row per expert of a router: its tokens, with a 95 % interval over documents, the domain
    that gives it most of them, and whether they are enough to calibrate a quantiser with."""
    counts = data.counts

    def columns(r: int) -> Columns:
        load_E, of_DE = counts.load_E(r), counts.assignments_DE(r)
        shape = expert_shape(data.trace, r)
        minimum = MINIMUM if shape is None else TOKENS_PER_INPUT * shape[0]
        low_E, high_E = _interval(counts, r)
        names = np.array([*counts.domains, None], object)
        main_E = np.where(load_E > 0, of_DE.argmax(0), -1) if len(of_DE) else load_E - 1
        return {
            "expert": np.arange(len(load_E)),
            "tokens": load_E,
            "tokens_low": low_E,
            "tokens_high": high_E,
            "main_domain": names[main_E],
            "main_domain_share": of_DE.max(0, initial=0) / nan_for_zero(load_E.astype(float)),
            "minimum": np.array(minimum),
            "enough": load_E >= minimum,
        }

    return rows_per_router(data, columns)


def _interval(counts: Counts, r: int) -> np.ndarray:
    """95 % interval over documents of the tokens of each expert in a text of this size; NaN if
    documents are unknown or few. No upper end for an expert without a token. float64 [2, E]"""
    of_UE, weights_RU = counts.of[r].assignments_UE, counts.weights_RU
    if weights_RU is None:
        return np.full((2, of_UE.shape[1]), np.nan)
    documents = unc.effective_documents(counts.tokens_U)
    ends_2E = unc.interval(weights_RU @ of_UE, documents, (0, np.inf))
    ends_2E[1, of_UE.sum(0) == 0] = np.nan
    return ends_2E
