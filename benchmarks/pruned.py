"""`python -m benchmarks.pruned [FAMILY …]`: which families of the installed transformers can be
pruned. Of each a tiny random model of 16 experts a layer (float32) is saved, a checkpoint without
four of them is written and loaded, and its logits are compared with those of the whole model under
`intervene(drop=…)`. Prints a line per family; exits with 1 where one is neither equal nor refused.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers

from moe_inspect import MoeInspectError, intervene
from moe_inspect.analysis.scores import lowest, random_scores
from moe_inspect.interventions.pruning import checkpoint
from moe_inspect.interventions.pruning.run import check
from moe_inspect.interventions.rules import beyond
from moe_inspect.model.config import groups_of
from moe_inspect.model.find import find_routers
from moe_inspect.model.load import config_record
from moe_inspect.model.routers import top_k_of
from tests.support import zoo
from tests.test_intervene import with_experts

E, KEEP, ROUNDING = 16, 0.75, 1e-4


def compared(family: str, folder: Path) -> tuple[float, float, float]:
    """The greatest difference of the logits of the written checkpoint to those of the whole model
    without these experts, the greatest of these logits, and how far they are from the whole
    model's."""
    with_experts(family, E).save_pretrained(folder / "whole")
    kind: Any = zoo.model_class(family)
    model, inputs = kind.from_pretrained(folder / "whole").eval(), zoo.inputs(family, [9, 5])
    sites = find_routers(model)
    check(model, sites, KEEP, max(top_k_of(site, model) for site in sites))
    groups, _, _ = groups_of(config_record(model.config))
    gone = lowest(random_scores([site.experts for site in sites], 0), KEEP, groups)
    drop: Any = {site.layer: experts for site, experts in zip(sites, gone, strict=True)}
    whole = zoo.outputs(model, inputs)
    with intervene(model, drop=drop):
        expected = zoo.outputs(model, inputs)
    pruned = checkpoint.Pruned(drop, E, beyond(sites[0].logits_module))
    checkpoint.write(folder / "whole", folder / "pruned", pruned, lambda draft: {})
    found = zoo.outputs(kind.from_pretrained(folder / "pruned").eval(), inputs)
    real = inputs["attention_mask"].bool()
    differences = (found - expected)[real], expected[real], (whole - expected)[real]
    return tuple(float(d.abs().max()) for d in differences)  # pyright: ignore[reportReturnType]


def main(families: list[str]) -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failed = equal = close = 0
    for family in families or zoo.FAMILIES:
        if family in zoo.WHY_NOT:
            print(f"{family:<22} not built: {zoo.WHY_NOT[family]}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                difference, most, control = compared(family, Path(folder))
            except MoeInspectError as error:
                print(f"{family:<22} refused: {error}")
                continue
        good = difference <= ROUNDING < control
        equal, close = equal + (good and not difference), close + (good and difference > 0)
        failed += not good
        print(
            f"{family:<22} {'as without them' if good else 'DIFFERS'}, by {difference:.1e} of up "
            f"to {most:.1f} (the whole model by {control:.1e})"
        )
    print(
        f"transformers {transformers.__version__}: {equal + close} as without these experts, "
        f"{equal} of them to the bit; {failed} differ"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
