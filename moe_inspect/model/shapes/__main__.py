"""Describes one model per line of stdin, {"model", "context", "revision"}; answers each with a line
on stdout: the Description, or null where it takes torch."""

# pyright: strict

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict

from moe_inspect.model.shapes.stand_ins import install


def main() -> None:
    # imports leave nothing to collect, and looking for it takes a fifth of their time
    gc.disable()
    answers = sys.stdout
    # transformers may print, and stdout is for answers
    sys.stdout = sys.stderr
    install()
    from moe_inspect.model.describe import describe_built

    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        try:
            answer = asdict(describe_built(**json.loads(line)))
        # whatever is missing here, the model can still be built with torch
        except Exception:
            answer = None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
