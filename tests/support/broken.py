"""`moe-inspect` with a kernel that is broken on purpose: `BROKEN=record python -m
tests.support.broken trace …`. The kernels run in Triton's interpreter, as they would on a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when it is imported

from tests.support.mutation import changed_source, load_file
from tests.support.streams import PromptStream

NAME = "moe_inspect.capture.hook.kernels"
# what is broken → a fragment of the kernels' source, and the wrong one
BREAKS = {
    "record": ("row * K + i % K", "row * K + (i + 1) % K"),
    "dispatch": ("tl.store(token + place, i // K,", "tl.store(token + place, (i + 1) // K,"),
    "combine": ("tl.load(weights + slot)", "tl.load(weights + slot // 2 * 2)"),
}


def load(broken: str, place: Path) -> None:
    """Puts broken kernels, whose source is written to `place`, where the package's are."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    source, file = Path(str(spec.origin)).read_text(), place / "kernels.py"
    file.write_text(changed_source(source, *BREAKS[broken]))
    module = sys.modules["moe_inspect.capture.hook"].kernels = load_file(NAME, file)
    module.runs_triton = lambda tensor: True
    from moe_inspect.capture import rows

    rows.SIDE_STREAMS["cpu"] = PromptStream


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        load(os.environ["BROKEN"], Path(place))
        from moe_inspect.__main__ import main

        main()
