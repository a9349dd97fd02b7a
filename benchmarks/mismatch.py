"""`python -m benchmarks.mismatch`: how much the routing of the bundled model differs between ways
to run it (data type, batching, quantised experts), by `moe_inspect.compare`. Prints a table,
writes benchmarks/results/mismatch.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, machine

BITS = (8, 4, 3)
SMALL = 256  # tokens of a batch: a text or two


def main() -> None:
    import moe_inspect

    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        trace(root / "fp32", "float32")
        trace(root / "bf16", "bfloat16")
        trace(root / "again", "bfloat16")
        trace(root / "small", "bfloat16", batch_tokens=SMALL)
        for bits in BITS:
            model = quantised(root / f"model{bits}", bits)
            trace(root / f"int{bits}", "float32", model=model)
        pairs = {
            "float32 / bfloat16": ("fp32", "bf16"),
            "bfloat16, again": ("bf16", "again"),
            f"bfloat16, batches of 8,192 / {SMALL} tokens": ("bf16", "small"),
            **{f"float32 / experts of {bits} bits": ("fp32", f"int{bits}") for bits in BITS},
        }
        for what, (a, b) in pairs.items():
            made = moe_inspect.compare(root / a, root / b)
            verdict = made.verdict()[0]
            rows.append(
                {
                    "pair": what,
                    "decisions": made.decisions,
                    "decisions_mismatch": made.mismatched / made.decisions,
                    "tokens_mismatch": made.tokens_mismatch,
                    "by_layer": made.tables["agreement"]["set_mismatch"].tolist(),
                    "kind": verdict.kind,
                    "verdict": verdict.text,
                }
            )
            row = rows[-1]
            layers = " ".join(f"{share:.2%}" for share in row["by_layer"])
            print(
                f"{what:46} {row['decisions_mismatch']:8.3%} {row['tokens_mismatch']:8.2%}  "
                f"{layers}  {row['kind']}"
            )
    facts = machine() | {"command": "python -m benchmarks.mismatch"}
    text = json.dumps({"machine": facts, "measured": rows}, indent=1, ensure_ascii=False)
    (RESULTS / "mismatch.json").write_text(text + "\n")
    print("wrote benchmarks/results/mismatch.json")


def trace(path: Path, dtype: str, batch_tokens: int = 8192, model: str = "demo") -> None:
    """A trace of the bundled corpus."""
    import moe_inspect

    moe_inspect.trace_model(model, path, dtype=dtype, batch_tokens=batch_tokens, logits=True)


def quantised(path: Path, bits: int) -> str:
    """A copy of the bundled model whose experts' weights are rounded to so many bits, symmetric,
    with a scale per row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moe_inspect.demo import MODEL_DIR

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, values in model.named_parameters():
            if ".experts." in name:
                scale = values.abs().amax(-1, keepdim=True) / most
                values.copy_((values / scale).round().clamp(-most, most) * scale)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(path)
    return str(path)


if __name__ == "__main__":
    main()
